"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Results = Annotated[
    Path, typer.Option("--results", help="Where runs are kept.", envvar="KD_BENCH_RESULTS")
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of parquet files, <benchmark>/<split>-*.parquet."),
]
RESULTS = Path("results")


def comma_separated(text: str | None) -> list[str] | None:
    """`a,b` -> [`a`, `b`]; None stays None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]
