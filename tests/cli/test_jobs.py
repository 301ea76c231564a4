"""Commands side by side are forked from one process, and end together, whatever ends them."""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kd_bench.cli import jobs
from kd_bench.cli.jobs import run_jobs
from kd_bench.distill.processes import importing
from kd_bench.errors import IncompleteRunError


@pytest.mark.slow
def test_commands_run_in_order_and_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_jobs({"list": [["tasks", "list"], ["runs", "list"]]}, 1, tmp_path / "logs")
    told = capsys.readouterr().out
    first, *rest = told.split("\n")
    assert first == f"list: 2 commands, logs in {tmp_path / 'logs'}"
    assert [line.split()[0] for line in rest[:-1]] == ["started", "[1/2]", "started", "[2/2]"]
    assert "vqav2" in (tmp_path / "logs" / "list-0.log").read_text(encoding="utf-8")


def test_without_commands_nothing_is_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_jobs({"train": [], "eval": []}, 2, tmp_path / "logs", lambda command: 1.0)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "logs").exists()


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.mark.slow
def test_one_that_fails_ends_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = ["train", "mini", "steps=100000", f"output={tmp_path / 'out'}"]
    before = children()  # another test's resource tracker may live on
    begin = time.monotonic()
    with pytest.raises(IncompleteRunError, match="`kd-bench eval` ended with exit code 2"):
        run_jobs({"mixed": [long, ["eval", "nowhere"], long]}, 2, tmp_path / "logs")
    assert "nowhere" in capsys.readouterr().err
    assert children() <= before
    assert not (tmp_path / "logs" / "mixed-2.log").exists()
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_demo_leaves_nothing_running(tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "kd_bench", "demo", "--processes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    while sum(line.startswith("started") for line in lines) < 2:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    assert any("Ctrl-C" in line for line in lines)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    begin = time.monotonic()
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - begin < 15
    if number == signal.SIGKILL:
        assert process.returncode == -number
        psutil.wait_procs(children, timeout=15)
    else:
        assert process.returncode == 128 + number
        assert "the same command continues" in told
    assert not [child for child in children if child.is_running()]


# --- one process that the commands are forked from ------------------------------------------------


def written(folder: Path) -> dict[str, bytes]:
    """What a training and an evaluation of it leave, but for times, folders and the machine."""
    kept = ("*/final/model.safetensors", "runs/*/tasks/*.parquet", "images/*.png")
    found = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for kind in kept
        for file in sorted(folder.rglob(kind))
    }
    for file in folder.rglob("train_log.jsonl"):
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found[file.name] = json.dumps([(line["step"], line["loss"]) for line in lines]).encode()
    return found


@pytest.mark.slow
def test_forked_commands_write_what_fresh_interpreters_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, losses, answers and images byte by byte; one interpreter started instead of three.

    The second evaluation waits for the training that it evaluates, the first does not.
    """
    started: list[list[str]] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda line, **kw: started.append(line) or popen(line, **kw)
    )
    left = []
    for place, platform in (("forked", "linux"), ("fresh", "other")):
        monkeypatch.setattr(jobs.sys, "platform", platform)
        folder = tmp_path / place
        few = ["--tasks", "pope,mmmu", "--limit", "8", "--results", str(folder / "results")]
        commands = {
            "train": [["train", "mini", "steps=2", f"output={folder / 'kd'}"]],
            "eval": [
                ["eval", str(folder / "kd" / "final"), "--name", "student", *few],
                ["eval", "embedded:weights/teacher", *few],
            ],
        }
        run_jobs(commands, 2, tmp_path / f"{place}-logs")
        left.append(written(folder))
        assert len(started) == (1 if place == "forked" else 1 + 3)
    assert len(left[0]) > 8
    assert left[0] == left[1]
    log = (tmp_path / "forked-logs" / "eval-0.log").read_text(encoding="utf-8")
    assert "(complete)" in log


def test_a_command_waits_for_what_makes_its_input() -> None:
    train = [["train", "mini", f"output=out/{name}"] for name in "ab"]
    evaluate = [["eval", "out/b/final"], ["eval", "embedded:weights/teacher"]]
    assert jobs._next([*evaluate, *train], []) == 1
    assert jobs._next([evaluate[0], train[0]], [train[1]]) == 1
    assert jobs._next([evaluate[0]], [train[1]]) is None
    assert jobs._next([evaluate[0]], [train[0]]) == 0
    circle = [["train", "r", "student=x/final", "output=y"], ["train", "r", "output=x", "a=y/b"]]
    assert jobs._next(circle, []) == 0, "the command says what it lacks"


@pytest.mark.skipif(sys.platform != "linux", reason="commands are not forked here")
def test_the_server_has_no_threads_and_tells_how_commands_end(tmp_path: Path) -> None:
    server = jobs._Server(tmp_path)
    with server:
        pid = server.start(["train", "mini", f"output={tmp_path / 'out'}"], tmp_path / "killed.log")
        threads = Path("/proc", str(server._process.pid), "task")
        assert len(list(threads.iterdir())) == 1
        assert os.getpgid(pid) == pid
        assert server.ended(pid) is None
        os.kill(pid, signal.SIGKILL)
        pids = [server.start(words, tmp_path / "log") for words in (["--version"], ["--nonsense"])]
        while any(server.ended(each) is None for each in (pid, *pids)):
            time.sleep(0.01)
        assert [server.ended(each) for each in (pid, *pids)] == [-signal.SIGKILL, 0, 2]
        os.kill(server._process.pid, signal.SIGKILL)
        with pytest.raises(IncompleteRunError, match="process that starts commands has ended"):
            server.start(["--version"], tmp_path / "log")


@pytest.mark.skipif(sys.platform != "linux", reason="commands are not forked here")
def test_beside_an_accelerator_commands_have_interpreters_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver does not survive a fork."""
    (tmp_path / "sitecustomize.py").write_text(
        "import torch\ntorch.cuda.is_available = lambda: True\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    server = jobs._Server(tmp_path)
    with server:
        pid = server.start(["--version"], tmp_path / "log")
        assert psutil.Process(pid).ppid() == os.getpid()
        while server.ended(pid) is None:
            time.sleep(0.01)
        assert server.ended(pid) == 0
    assert "kd-bench" in (tmp_path / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("watched", [False, True])
def test_a_quick_end_loses_nothing(tmp_path: Path, watched: bool) -> None:
    """Threads are waited for, exit handlers run, streams are written out, the code is kept."""
    script = """
import atexit, os, sys, threading, time
from kd_bench.cli import process
class Told:
    def __del__(self, write=os.write): write(1, b"taken apart\\n")
kept = Told()
def late(): time.sleep(0.2); print("thread")
atexit.register(print, "handler")
threading.Thread(target=late).start()
print("said")
if WATCHED: sys.setprofile(lambda *_: None)
process.leave(3)
"""
    line = [sys.executable, "-c", script.replace("WATCHED", str(watched))]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    said = ["said", "thread", "handler"]
    assert done.stdout.split("\n")[:-1] == [*said, *(["taken apart"] if watched else [])]


def test_the_collector_rests_while_much_is_imported_and_is_as_before_afterwards() -> None:
    collects = []
    with contextlib.suppress(ImportError), importing():
        collects.append(gc.isenabled())
        raise ImportError
    assert [*collects, gc.isenabled()] == [False, True]
    gc.disable()
    try:
        with importing():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
