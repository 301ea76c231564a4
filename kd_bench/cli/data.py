"""`kd-bench data show`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Training data.", no_args_is_help=True)

SHOWN = 20  # unreadable rows that are listed
STUDENT = "embedded:weights/student"


@app.callback()
def _data() -> None:
    """Keeps `show` a command of its own."""


@app.command("show")
def show(
    path: Annotated[str, typer.Argument(help="JSON, JSONL, or a dataset folder.")],
    student: Annotated[
        str, typer.Option(help="Checkpoint whose tokenizer, template and image processor read it.")
    ] = STUDENT,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; default: the file's own.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to print.", min=0)] = 3,
    encode: Annotated[
        int, typer.Option(help="Rows to encode, images included; 0 for all.", min=0)
    ] = 200,
    max_length: Annotated[int, typer.Option(help="Tokens of a sample.", min=8)] = 2048,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            help="Instead of the student's: a Jinja file, llava, chatml or plain.",
            metavar="FILE|NAME",
        ),
    ] = None,
) -> None:
    """What a student will learn from: form, counts, samples with the learnt tokens marked."""
    from rich.console import Console
    from rich.text import Text

    from kd_bench.distill.encoding import preview_data
    from kd_bench.distill.models import quiet
    from kd_bench.distill.recipe import DataSource

    quiet()
    found = preview_data(
        DataSource(path=path, images=None if images is None else str(images)),
        student,
        samples=samples,
        encoded=encode or None,
        max_length=max_length,
        prompt_template=prompt_template,
    )
    console = Console(highlight=False, soft_wrap=True)
    for line in found.lines():
        console.print(line, markup=False)
    if found.samples:
        console.print(
            f"\nAs {student} sees it; what is learnt stands between « and »:", markup=False
        )
    for sample in found.samples:
        whole = Text("")
        for text, learnt in sample.parts:
            whole.append(
                _printable(f"«{text}»" if learnt else text), "bold green" if learnt else ""
            )
        console.print(Text(_printable(f"\n{sample.name}"), "bold"))
        console.print(whole)
        console.print(_printable("learnt: " + " ".join(map(repr, sample.learnt))), markup=False)
    if found.unreadable:
        console.print(f"\n{len(found.unreadable):,} cannot be used:")
        for name, reason in found.unreadable[:SHOWN]:
            console.print(_printable(f"  {name}: {reason}"), markup=False)
        if len(found.unreadable) > SHOWN:
            console.print(f"  and {len(found.unreadable) - SHOWN:,} more")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
