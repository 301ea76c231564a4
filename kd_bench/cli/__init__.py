"""The command line: `kd-bench train | eval | report | check` and their company.

Nothing heavy is imported here or at the top of a command's file, so that `--help` is immediate;
each command imports what it needs on its first lines.
"""

import errno
import logging
import os
import sys
from typing import Annotated, Any

import typer

from kd_bench import __version__, doctor
from kd_bench.cli import compare, demo, evaluate, process, report, runs, tasks, train
from kd_bench.cli.options import App
from kd_bench.errors import (
    ExitCode,
    IncompleteRunError,
    KdBenchError,
    MissingExtraError,
    UsageError,
    one_line,
)

__all__ = ["app", "entry", "main"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

app = App(
    name="kd-bench",
    help="Train, evaluate and compare distilled vision-language models.\n\n"
    "train → eval → report → check. Add --debug to any command for a traceback.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"kd-bench {__version__}")
        raise typer.Exit


@app.callback()
def _whole(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """What stands before the commands."""


app.command()(demo.demo)
app.command(cls=train.WithSettings)(train.train)
app.command("eval")(evaluate.evaluate)
app.command()(report.report)
app.command()(compare.compare)
app.command(cls=compare.SeveralBaselines)(compare.check)
app.command()(train.convert)
app.command()(doctor.doctor)
app.add_typer(train.recipes, name="recipes")
app.add_typer(train.data, name="data")
app.add_typer(tasks.app, name="tasks")
app.add_typer(runs.app, name="runs")

# Packages that the extras `train` and, with lmms_eval, `eval` install.
_OPTIONAL = {
    "torch", "torchvision", "transformers", "accelerate", "peft", "safetensors", "datasets",
    "tokenizers", "huggingface_hub", "lmms_eval", "decord",
}  # fmt: skip
_TRAIN_IS_ENOUGH = ("train", "convert", "data show", "tasks fetch")


# typer's own wrong-command-line error: of click, or of the copy that newer releases carry.
_WrongCommandLine: type[Exception] = typer.BadParameter.__mro__[1]


def entry() -> None:
    """Entry point: `main`, then a quick end."""
    try:
        main()
    except SystemExit as stop:
        process.leave(stop.code)


def main() -> None:
    """Run the command and turn every error into one line and an exit code."""
    process.prepare()
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advice at its mere import
    try:
        code = app(arguments, prog_name="kd-bench", standalone_mode=False, obj=debug)
        if code == INTERRUPTED:  # typer has turned the signal into this
            raise KeyboardInterrupt
    except _WrongCommandLine as error:
        code = _correct(error)
    except SystemExit as stop:
        # typer ends with 1, which is a regression's, where a pipe to a child of ours broke.
        if not isinstance(stop.__context__, OSError):
            raise
        code = _explain(stop.__context__, arguments)
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        code = _explain(error, arguments)
    if (lost := process.lost_output()) is not None:
        _complain(f"Standard output: {lost.strerror}; what was printed is not whole. Make room.")
        code = code or ExitCode.INCOMPLETE  # a verdict stays the verdict's
    sys.exit(code)


def _correct(error: Any) -> int:
    """Say in one line what is wrong with the command line; a bare group shows its help."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(error.message, nl=False)  # empty where typer has printed it itself
    elif (setting := _recipe_setting(error)) is not None:
        _complain(f"A recipe's settings have no dashes: write {setting}=VALUE after the recipe.")
    else:
        problem = one_line(Exception(error.format_message()))
        end = "" if problem.endswith((".", "?")) else "."
        _complain(f"{problem}{end} `{context.command_path} --help` shows what it takes.")
    return ExitCode.USAGE


def _recipe_setting(error: Any) -> str | None:
    """The setting that was meant by an option such as `train --steps 5`."""
    name = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_")
    if not name or error.ctx.info_name != "train":
        return None
    from kd_bench.distill.recipe import Recipe, Stage

    return name if name in {**Recipe.model_fields, **Stage.model_fields} else None


def _explain(error: BaseException, arguments: list[str]) -> int:
    """Print what went wrong and the hint; the exit code."""
    module = ""
    if isinstance(error, MissingExtraError | ModuleNotFoundError):
        module = error.module if isinstance(error, MissingExtraError) else error.name or ""
        module = module.partition(".")[0]
    if isinstance(error, MissingExtraError) or module in _OPTIONAL:
        # Only here it is known what the user typed.
        command = " ".join(arguments[: 2 if arguments[0] in ("data", "tasks", "runs") else 1])
        extra = error.extra if isinstance(error, MissingExtraError) else ""
        extra = extra or ("train" if command in _TRAIN_IS_ENOUGH else "eval")
        error = MissingExtraError(command, extra, module)
    if isinstance(error, OSError):
        error = _os_error(error)
    if isinstance(error, KdBenchError):
        _complain(one_line(error))
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        _complain("Interrupted. What was done is kept; the same command continues.")
        return process.interrupted_by()
    if isinstance(error, MemoryError):
        _complain("Out of memory. Use a smaller --batch-size or batch_size=; nothing done is lost.")
        return ExitCode.INCOMPLETE
    if isinstance(error, UnicodeEncodeError):  # pyarrow wants names in UTF-8
        name = error.object.encode("utf-8", "replace").decode()
        _complain(f"{name!r} is not UTF-8 in this locale. Rename it, or set LC_ALL=C.UTF-8.")
        return ExitCode.USAGE
    _complain(f"Internal error: {type(error).__name__}: {one_line(error)}")
    _complain("Run the command again with --debug and report the traceback.")
    return ExitCode.INTERNAL


# What a full or failing disk raises: something that was under way is lost.
_LOST = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.EPIPE)
_WAYS = {
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A file stands where a folder is needed: give another path.",
    errno.EISDIR: "A folder stands where a file is needed: give another path.",
    errno.EEXIST: "Something of another kind has that name: give another path.",
    errno.EACCES: "Give a path that you may use, or mend its permissions.",
    errno.EPERM: "Give a path that you may use, or mend its permissions.",
    errno.EROFS: "Give a path that can be written.",
    errno.ENAMETOOLONG: "Give a shorter one.",
}


def _os_error(error: OSError) -> KdBenchError:
    """The path, what is wrong with it, and whether a path or the machine has to be mended."""
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    reason = error.strerror or one_line(error)
    problem = f"{place}: {reason}." if place else f"{reason}."
    if error.errno in _LOST:
        hint = "Make room and run the same command again: what was done is kept."
        return IncompleteRunError(problem, hint)
    if error.errno in _EXHAUSTED or error.errno is None:
        return IncompleteRunError(problem, "What was done is kept; the same command continues.")
    return UsageError(problem, _WAYS.get(error.errno, "Check the path."))


def _complain(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error ", "bold red"), message)
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)
