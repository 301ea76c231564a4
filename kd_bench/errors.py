"""Every error a user can meet, with its exit code and a hint of what to do.

KdBenchError
├── UsageError              2   the command line, a recipe, a policy or a file is wrong
│   └── MissingExtraError   2   a package of an optional extra is not installed
├── NotComparableError      4   the runs measure different things
├── IncompleteRunError      5   a run is partial, damaged or unhealthy
└── TrainingError           5   training stopped: a NaN loss, unreadable data, a full disk
"""

import contextlib
from collections.abc import Iterator
from enum import IntEnum


class ExitCode(IntEnum):
    """What the shell learns from a command."""

    PASS = 0
    REGRESSION = 1
    USAGE = 2
    INCONCLUSIVE = 3
    NOT_COMPARABLE = 4
    INCOMPLETE = 5
    INTERNAL = 70


class KdBenchError(Exception):
    """An error that is shown as one line: what is wrong, then what to do."""

    exit_code = ExitCode.INTERNAL

    def __init__(self, problem: str, hint: str = "") -> None:
        self.problem = problem
        self.hint = hint
        super().__init__(f"{problem} {hint}".strip())


class UsageError(KdBenchError):
    """Something that the user gave cannot be used as it is."""

    exit_code = ExitCode.USAGE


class MissingExtraError(UsageError):
    """A command needs an optional extra that is not installed."""

    def __init__(self, command: str, extra: str, module: str) -> None:
        self.module = module
        self.extra = extra
        super().__init__(
            f"`kd-bench {command}` needs the package {module}, which is not installed.",
            f'Install it with: pip install "kd-bench[{extra}]"',
        )


class NotComparableError(KdBenchError):
    """Two runs were asked to be compared that measured different things."""

    exit_code = ExitCode.NOT_COMPARABLE


class IncompleteRunError(KdBenchError):
    """A run is partial, damaged, or has more errors than its limit allows."""

    exit_code = ExitCode.INCOMPLETE


class TrainingError(KdBenchError):
    """Training had to stop; the last good checkpoint is kept."""

    exit_code = ExitCode.INCOMPLETE


def one_line(error: BaseException) -> str:
    """The error's message on one line without control characters, as the command line shows it."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(character if character.isprintable() else "�" for character in line)


@contextlib.contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Name the extra that installs a package which `what` could not import.

    Raises:
        UsageError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "kd_bench":
            raise
        raise UsageError(
            f"{what} needs the package {package}, which is not installed.",
            f'Install it with: pip install "kd-bench[{extra}]"',
        ) from None


@contextlib.contextmanager
def explained(problem: str, hint: str) -> Iterator[None]:
    """Make one line of whatever a library raises on what the user gave; our own errors pass.

    Raises:
        UsageError: `problem`, then the reason.
    """
    try:
        yield
    except (KdBenchError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        first = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
        said = one_line(Exception(first))[:300].rstrip(".:")
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise UsageError(f"{problem}: {kind}{said}.", hint) from error


def closest(word: str, known: list[str]) -> str:
    """` Did you mean 'x'?` when a known word is near, else an empty string."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
