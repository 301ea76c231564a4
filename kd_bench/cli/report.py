"""`kd-bench report`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Results


def report(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs or model names; default: all runs.")
    ] = None,
    results: Results = RESULTS,
    to: Annotated[Path, typer.Option("--to", help="Folder of the page.")] = Path("reports/latest"),
) -> None:
    """Render the leaderboard: terminal, Markdown and a self-contained page."""
    from kd_bench.report import render_report

    page = render_report(results, to, runs)
    typer.echo(f"Report: {page}")
