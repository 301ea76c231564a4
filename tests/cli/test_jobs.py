"""Commands side by side end together, whatever ends them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kd_bench.cli.process import run_jobs
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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
    assert process.returncode == 128 + number
    assert "the same command continues" in told
    assert not [child for child in children if child.is_running()]
