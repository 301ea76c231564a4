"""What a process owes its surroundings, and other kd-bench processes beside it.

Its streams have any encoding and readers that leave; a signal ends it with a word. Without this,
`report | head -1` would end in 1, which a script takes for a regression, `--help` would be an
encoding error where the locale is C, and SIGTERM would end a training without a word.
It also ends quickly: after torch, Python's own tearing down takes two seconds.
"""

import atexit
import codecs
import contextlib
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, NoReturn

PLAIN = {
    "−": "-", "–": "-", "—": "-", "→": ">", "±": "~", "Δ": "d", "×": "x", "·": ".", "…": "...",
    "▲": "^", "▼": "v", "≤": "<=", "≥": ">=", "≈": "~", "•": "*", "†": "+", "‡": "+", "●": "*",
    "“": '"', "”": '"', "‘": "'", "’": "'", "━": "-", "─": "-", "│": "|", "█": "#", "ø": "o",
}  # fmt: skip
"""One column wide wherever tables use it, so that columns still stand in line."""


_received: list[int] = []
_lost: list[OSError] = []


def lost_output() -> OSError | None:
    """Why standard output could not be written to the end; None where it was, or nobody reads."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or there is none
        sys.stdout.flush()
    return _lost[0] if _lost else None


def interrupted_by() -> int:
    """Exit code after an interrupt as shells have it: 128 + the signal's number, else SIGINT's."""
    return 128 + (_received[-1] if _received else signal.SIGINT)


def prepare() -> None:
    """Make the standard streams and the signals of this process behave; for the entry point."""
    codecs.register_error("kd_bench.plain", _plain)
    sys.stdout = _stream(sys.stdout, sys.__stdout__)
    sys.stderr = _stream(sys.stderr, sys.__stderr__)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # `nohup` has SIGHUP ignored; whoever embeds this may have a handler of his own.
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind as after Ctrl-C, so that locks, children and states are seen to."""
    _received.append(number)
    raise KeyboardInterrupt


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler: what the encoding lacks in a plain form, or as a question mark."""
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in lost), error.end


class _Pipe(io.FileIO):
    """Standard output or error; when its reader has gone, what is left to say goes nowhere.

    The work itself goes on: a verdict, a page or a checkpoint does not depend on who listens.
    Where the output is a file that takes no more, that is kept for `lost_output`.
    """

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or 0
        except BlockingIOError:
            raise  # only full for now
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and self.fileno() == 1:
                _lost.append(error)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


class _AsciiText(io.TextIOWrapper):
    """Encodes to ASCII, and says otherwise: to a stream that says so typer writes UTF-8."""

    encoding = "iso8859-1"


def _stream(stream: Any, original: Any) -> Any:
    """The process's own stream made tolerant; one that a host has put in its place is left."""
    if stream is None or stream is not original or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    ascii_only = codecs.lookup(stream.encoding).name == "ascii"
    kind = _AsciiText if ascii_only else io.TextIOWrapper
    return kind(
        io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False)),
        encoding="ascii" if ascii_only else stream.encoding,
        errors="kd_bench.plain",
        line_buffering=stream.line_buffering,
    )


def leave(code: object) -> NoReturn:
    """End the process with an exit code, as `sys.exit` does, without taking Python apart.

    Threads that Python waits for are waited for, exit handlers run, streams are written out. What
    is spared is freeing millions of objects one by one before the system frees the memory. One of
    several processes, and one that is being profiled or debugged, ends as usual.
    """
    watched = sys.gettrace() or sys.getprofile() or sys.flags.interactive
    if watched or not isinstance(code, int | None) or "WORLD_SIZE" in os.environ:
        sys.exit(code)  # type: ignore[arg-type]
    threading._shutdown()  # type: ignore[attr-defined]  # these two as Python's own end has them
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code or 0)
