"""What commands share: how they are declared, their options, and how they show what they found."""

import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand, TyperGroup

from kd_bench.errors import UsageError, closest

if TYPE_CHECKING:
    from kd_bench.registry import TaskSpec
    from kd_bench.report.tables import Table


Made = TypeVar("Made", bound=Callable[..., Any])


class Command(TyperCommand):
    """A command whose help shows no type beside a flag."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters as typer has them."""
        return _flags_without_type(super().get_params(ctx))


class Group(TyperGroup):
    """The same of a group of commands."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The parameters as typer has them."""
        return _flags_without_type(super().get_params(ctx))


def _flags_without_type(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class App(typer.Typer):
    """A group of commands; without one of them it shows its help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=Group, no_args_is_help=True, **settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Made], Made]:
        """Register a command."""
        return super().command(name, **{"cls": Command, **settings})


Results = Annotated[
    Path, typer.Option("--results", help="Where runs are kept.", envvar="KD_BENCH_RESULTS")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of parquet files, <benchmark>/<split>-*.parquet."),
]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Only these benchmarks: mme,gqa.")]
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        help="Protocol variant: of one benchmark, or of all that have it; may be repeated.",
        metavar="[BENCHMARK=]PROFILE",
    ),
]
RESULTS = Path("results")


def comma_separated(text: str | None) -> list[str] | None:
    """`a,b` -> [`a`, `b`]; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str | None, option: str) -> list[int]:
    """`0,1,2` -> [0, 1, 2]; None is none.

    Raises:
        UsageError: something in it is no whole number of zero or more, or stands twice.
    """
    parts = comma_separated(text) or []
    for part in parts:
        if not (part.isascii() and part.isdigit() and int(part) < 2**31):
            raise UsageError(f"{option} {text}: {part!r} is not a seed.", "Write 0,1,2.")
    numbers = [int(part) for part in parts]
    if len(set(numbers)) < len(numbers):
        raise UsageError(f"{option} {text}: a seed stands twice.", "Name each once.")
    return numbers


def specs_of(suite: str, tasks: str | None) -> list["TaskSpec"]:
    """The benchmarks of --tasks, else of --suite."""
    from kd_bench.registry import load_suite, load_task

    return [load_task(name) for name in comma_separated(tasks) or load_suite(suite).tasks]


TemplateVariables = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-template-kwargs",
        help="Variables of the chat template, such as enable_thinking=false; may be repeated.",
        metavar="KEY=VALUE",
    ),
]


def template_variables(values: list[str] | None) -> dict[str, Any]:
    """`--chat-template-kwargs enable_thinking=false` -> {"enable_thinking": False}.

    Raises:
        UsageError: not of that form, or a value that is neither text, number nor truth value.
    """
    from kd_bench.config import apply_overrides

    found = apply_overrides({}, values or [])
    for name, value in found.items():
        if not isinstance(value, str | bool | int | float):
            raise UsageError(f"--chat-template-kwargs {name}: not a plain value.", "KEY=VALUE.")
    return found


def profiles_of(values: list[str] | None, specs: list["TaskSpec"]) -> dict[str, str]:
    """`--profile a=x,b=y --profile thinking` -> profile by benchmark.

    Raises:
        UsageError: not of that form, an unknown profile, two for one benchmark, or for one that
            is not among `specs`.
    """
    known = {spec.id: spec for spec in specs}
    found: dict[str, str] = {}
    hint = "`kd-bench tasks show BENCHMARK` lists its profiles."
    for part in (part for value in values or [] for part in comma_separated(value) or []):
        if "=" not in part:
            having = [spec.id for spec in specs if part in spec.profiles]
            if not having:
                raise UsageError(f"None of the benchmarks has a profile {part!r}.", hint)
            found.update({task: part for task in having if task not in found})
            continue
        task, _, profile = (piece.strip() for piece in part.partition("="))
        if not task or not profile:
            raise UsageError(f"--profile {part!r} is not BENCHMARK=PROFILE.", hint)
        if task not in known:
            raise UsageError(
                f"--profile {part!r}: {task} is not among the chosen benchmarks."
                f"{closest(task, list(known))}",
                f"They are: {', '.join(known)}.",
            )
        known[task].profile(profile)
        if found.setdefault(task, profile) != profile:
            raise UsageError(f"--profile gives {task} both {found[task]} and {profile}.", hint)
    return found


def show_tables(tables: "Iterable[Table]", warnings: Iterable[str] = ()) -> None:
    """Print tables, then what the reader has to know about them."""
    from rich.console import Console

    from kd_bench.report.tables import to_terminal

    console = Console()
    for table in tables:
        to_terminal(table, console, console.width)
    for warning in warnings:
        console.print(warning, style="bold yellow", markup=False, highlight=False)


def printable(text: str) -> str:
    """Somebody else's text without what would steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def this_program() -> str:
    """What to type for kd-bench here: it may lie in an environment that is not active."""
    path = Path(sys.argv[0])
    if path.name != "kd-bench":
        return "python -m kd_bench"
    found = shutil.which("kd-bench")
    return "kd-bench" if found and Path(found).resolve() == path.resolve() else str(path)
