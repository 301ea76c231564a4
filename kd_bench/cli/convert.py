"""`kd-bench convert`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.errors import UsageError


def convert(
    kind: Annotated[str, typer.Argument(help="Source format: tinyllava.")],
    source: Annotated[Path, typer.Argument(help="Checkpoint folder to read.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Convert a TinyLLaVA checkpoint to transformers' LLaVA classes."""
    if kind != "tinyllava":
        raise UsageError(f"Unknown checkpoint format {kind!r}.", "Known: tinyllava.")
    from kd_bench.distill.build import convert_tinyllava

    convert_tinyllava(source, destination)
    typer.echo(f"Checkpoint: {destination}")
