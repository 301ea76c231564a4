"""Commands in this process, by the same entry point."""

import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from kd_bench import cli


class Told(NamedTuple):
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


Call = Callable[..., Told]


@pytest.fixture(autouse=True, scope="session")
def _heed_interrupts() -> None:
    """A suite in the background of a shell ignores SIGINT, and commands would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command line; GitHub's variables are those of the test."""
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "KD_BENCH_RESULTS"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["kd-bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Told(int(stop.value.code or 0), printed.out, printed.err)

    return run
