"""What commands cost beside their work: `python -m tests.benchmarks.commands`, a minute.

CPU seconds of the same command in an interpreter of its own and forked from the demo's server, of
which the imports are paid once; then the commands that read a store.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from kd_bench.cli import jobs
from tests.benchmarks.figures import Figure, print_table

EXAMPLE = str(Path(__file__).parents[2] / "results" / "example")
TEACHER = ["eval", "embedded:weights/teacher", "--results"]


def fresh(words: list[str], folder: Path) -> float:
    """CPU seconds of a command and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-m", "kd_bench", *words]
    subprocess.run(line, cwd=folder, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def forked(server: jobs._Server, words: list[str], folder: Path) -> float:
    """The same, forked from the server."""
    counted = psutil.Process(server._process.pid)
    before = counted.cpu_times()
    pid = server.start(words, folder / "log")
    while (code := server.ended(pid)) is None:
        time.sleep(0.05)
    assert not code, (folder / "log").read_text(encoding="utf-8")
    after = counted.cpu_times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def main() -> None:
    """Print the table."""
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = jobs._Server(folder)
        with server:
            forked(server, ["--version"], folder)
            spent = psutil.Process(server._process.pid).cpu_times()
            told = f"{spent.user + spent.system:.1f} s"
            figures.append(Figure("the server's imports, once for all commands", told))
            for what, words in {
                "a training of one step": ["train", "mini", "steps=1", f"output={folder}/"],
                "an evaluation of the mini teacher, ten benchmarks": [*TEACHER, f"{folder}/"],
            }.items():
                theirs = fresh([*words[:-1], f"{words[-1]}fresh"], folder)
                ours = forked(server, [*words[:-1], f"{words[-1]}forked"], folder)
                ratio = theirs / ours
                figures.append(Figure(what, f"{ours:.1f} s", f"{theirs:.1f} s", ratio))
        for words in (["--help"], ["runs", "list", "--results", EXAMPLE],
                      ["report", "--results", EXAMPLE, "--to", f"{folder}/page"]):  # fmt: skip
            cost = min(fresh(words, folder) for _ in range(3))
            figures.append(Figure(f"`{' '.join(words[:2])}`, the example's store", f"{cost:.1f} s"))
    print_table("Commands", figures)


if __name__ == "__main__":
    main()
