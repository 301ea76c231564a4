"""The command line as a user meets it: in a subprocess."""

import subprocess
import sys
from pathlib import Path

import pytest

from kd_bench.errors import ExitCode

HELPS = [
    [],
    ["demo"],
    ["train"],
    ["eval"],
    ["report"],
    ["compare"],
    ["check"],
    ["convert"],
    ["doctor"],
    ["tasks"],
    ["tasks", "list"],
    ["tasks", "show"],
    ["tasks", "validate"],
    ["tasks", "fetch"],
    ["tasks", "verify"],
    ["runs"],
    ["runs", "list"],
    ["runs", "show"],
    ["runs", "import"],
    ["runs", "fsck"],
    ["runs", "baseline"],
    ["runs", "baseline", "set"],
]
HEAVY = ["torch", "transformers", "lmms_eval", "pandas", "matplotlib", "scipy", "datasets", "numpy"]


def kd_bench(*arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kd_bench", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
@pytest.mark.slow
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    script = (
        "import sys; from kd_bench.cli import app\n"
        f"try: app({[*command, '--help']!r})\n"
        "except SystemExit as stop: assert not stop.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


EXAMPLE = str(Path(__file__).parents[2] / "results" / "example")


@pytest.mark.parametrize(
    "command, absent",
    [
        (["--help"], [*HEAVY, "pydantic", "ruamel"]),
        (["runs", "list", "--results", EXAMPLE], [name for name in HEAVY if name != "numpy"]),
        (["report", "--results", EXAMPLE, "--to", "page"],
         ["torch", "transformers", "lmms_eval", "datasets", "scipy.stats"]),
    ],
    ids=["help", "runs list", "report"],
)  # fmt: skip
@pytest.mark.slow
def test_a_command_imports_what_it_needs(
    command: list[str], absent: list[str], tmp_path: Path
) -> None:
    script = (
        "import sys; from kd_bench.cli import main\n"
        f"sys.argv = {['kd-bench', *command]!r}\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        f"print([name for name in {absent!r} if name in sys.modules], file=sys.stderr)"
    )
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["runs", "show", "nobody"], "No run named 'nobody'"),
        (["check", "nobody"], "No run named 'nobody'"),
        (["compare", "nobody", "noone"], "No run named 'nobody'"),
        (["tasks", "show", "gqq"], "Did you mean 'gqa'?"),
        (["convert", "pickle", "a", "b"], "Unknown checkpoint format 'pickle'"),
        (["train", "nosuchrecipe"], "nosuchrecipe"),
        (["train", "mini", "sed=1"], "Did you mean 'seed'?"),
        (["eval", "nosuchfolder"], "nosuchfolder"),
        (["eval", "nosuchfolder", "--tasks", "gqq"], "gqq"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], expected: str, tmp_path: Path
) -> None:
    done = kd_bench(*arguments, folder=tmp_path)
    assert done.returncode == ExitCode.USAGE, done.stderr
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = kd_bench("runs", "show", "nobody", "--debug", folder=tmp_path)
    assert "Traceback" in done.stderr
    assert "nobody" in done.stderr


def test_runs_list_on_an_empty_folder_says_how_to_make_one(tmp_path: Path) -> None:
    done = kd_bench("runs", "list", folder=tmp_path)
    assert done.returncode == ExitCode.PASS
    assert "kd-bench eval" in done.stdout
