"""The command line: `kd-bench train | eval | report | check` and their company.

Nothing heavy is imported here or at the top of a command's file, so that `--help` is immediate;
each command imports what it needs on its first lines.
"""

import sys

import typer

from kd_bench.cli import check, compare, convert, demo, doctor, evaluate, report, runs, tasks, train
from kd_bench.errors import ExitCode, KdBenchError, MissingExtraError, one_line

__all__ = ["app", "main"]

app = typer.Typer(
    name="kd-bench",
    help="Train, evaluate and compare distilled vision-language models.\n\n"
    "train → eval → report → check. Add --debug to any command for a traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(report.report)
app.command()(compare.compare)
app.command()(check.check)
app.command()(convert.convert)
app.command()(doctor.doctor)
app.add_typer(tasks.app, name="tasks")
app.add_typer(runs.app, name="runs")

# Top-level module of an optional package -> the extra that installs it.
_EXTRAS = {
    "torch": "train",
    "torchvision": "train",
    "transformers": "train",
    "accelerate": "train",
    "peft": "train",
    "safetensors": "train",
    "datasets": "train",
    "tokenizers": "train",
    "lmms_eval": "eval",
}


def main() -> None:
    """Entry point: runs the command and turns every error into one line and an exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        app(arguments)
    except (KdBenchError, ModuleNotFoundError, KeyboardInterrupt, OSError, MemoryError) as error:
        if debug:
            raise
        sys.exit(_explain(error, arguments))
    except Exception as error:
        if debug:
            raise
        _complain(f"Internal error: {type(error).__name__}: {one_line(error)}")
        _complain("Run the command again with --debug and report the traceback.")
        sys.exit(ExitCode.INTERNAL)


def _explain(error: BaseException, arguments: list[str]) -> int:
    """Print what went wrong and the way out; the exit code."""
    command = " ".join(arguments[:1])
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module not in _EXTRAS:
            _complain(f"Internal error: {one_line(error)}")
            return ExitCode.INTERNAL
        error = MissingExtraError(command, _EXTRAS[module], module)
    if isinstance(error, KdBenchError):
        _complain(one_line(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        _complain("Interrupted. What was done is kept; the same command continues.")
        return 130
    if isinstance(error, MemoryError):
        _complain("Out of memory. Use a smaller --batch-size or batch_size=; nothing done is lost.")
        return ExitCode.INCOMPLETE
    _complain(one_line(error))
    return ExitCode.INCOMPLETE


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error ", "bold red"), message)
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)
