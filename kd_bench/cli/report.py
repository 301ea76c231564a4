"""`kd-bench report`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Results, comma_separated
from kd_bench.errors import UsageError


def report(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Runs or model names; default: all runs.")
    ] = None,
    results: Results = RESULTS,
    suite: Annotated[
        str | None, typer.Option(help="Only runs of this suite; default: the newest run's.")
    ] = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of the page.")] = Path("reports/latest"),
    compare: Annotated[
        str | None, typer.Option(help="`paper`: measured rows beside the Switch-KD paper's.")
    ] = None,
    main: Annotated[
        str | None,
        typer.Option(help="Row that the headline is about; default: what holds over all methods."),
    ] = None,
    latex: Annotated[
        str | None,
        typer.Option(help="`paper`: also a table for a paper, with caption, in paper.tex."),
    ] = None,
    benchmarks: Annotated[
        str | None, typer.Option(help="Those of the paper's table, by comma; default: all.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Rows of the paper's table, by comma; default: all.")
    ] = None,
    trend: Annotated[
        bool, typer.Option("--trend", help="Runs by date and the baseline's moves instead.")
    ] = False,
    training: Annotated[
        list[Path] | None,
        typer.Option(help="Plot this training folder instead, finished or not; may be repeated."),
    ] = None,
    model_card: Annotated[
        str | None,
        typer.Option(help="Write this run's card for the Hugging Face hub instead.", metavar="RUN"),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(help="Upload the card to this repository of the hub.", metavar="OWNER/NAME"),
    ] = None,
) -> None:
    """Render the leaderboard: terminal, Markdown and a self-contained page."""
    if push is not None and model_card is None:
        raise UsageError("--push uploads a model card.", "Add --model-card RUN.")
    if model_card is not None:
        if runs or suite or compare or main or latex or trend or training:
            raise UsageError(
                "--model-card is about one run of the store.",
                "Give --results, --to and --push beside it only.",
            )
        _card(model_card, results, to, push)
        return
    if training and (runs or suite or compare or main or latex or trend):
        raise UsageError(
            "--training plots training folders only.",
            "Drop the runs, --suite, --compare, --main, --latex and --trend.",
        )
    if trend and (compare or main or latex):
        raise UsageError("--trend shows runs by date only.", "Drop --compare, --main and --latex.")
    if latex not in (None, "paper"):
        raise UsageError(f"There is no --latex {latex!r}.", "Known: paper.")
    if (benchmarks or methods) and latex is None:
        raise UsageError(
            "--benchmarks and --methods choose what stands in a paper's table.",
            "Add --latex paper.",
        )
    from rich.console import Console

    from kd_bench.distill import processes

    with processes.importing():
        from kd_bench.report import render_report
        from kd_bench.report.history import render_training, render_trend
        from kd_bench.report.papers import Paper

    if training:
        page = render_training(training, to)
    elif trend:
        page = render_trend(results, to, runs, suite=suite)
    else:
        page = render_report(
            results,
            to,
            runs,
            suite=suite,
            compare=compare,
            main=main,
            paper=Paper(comma_separated(benchmarks) or [], comma_separated(methods) or [])
            if latex
            else None,
            console=Console(),
            allow_empty=False,
        )
    typer.echo(f"Report: {page}")
    if latex:
        typer.echo(f"Paper's table: {page.parent / 'paper.tex'}")


def _card(run: str, results: Path, to: Path, repository: str | None) -> None:
    from kd_bench.report.model_card import model_card, push, write_card

    card = model_card(results, run, repository or "")
    typer.echo(f"Model card: {write_card(card, to)}")
    if repository is not None:
        typer.echo(f"Uploaded: {push(card, repository)}")
