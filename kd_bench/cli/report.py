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
    suite: Annotated[
        str | None, typer.Option(help="Only runs of this suite; default: the newest run's.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of the page.")] = Path("reports/latest"),
) -> None:
    """Render the leaderboard: terminal, Markdown and a self-contained page."""
    from rich.console import Console

    from kd_bench.report import print_report, render_report

    print_report(results, runs, suite=suite, console=Console())
    page = render_report(results, to, runs, suite=suite)
    typer.echo(f"Report: {page}")
