"""`kd-bench runs list | show | baseline`."""

from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Results

app = typer.Typer(help="Evaluations on disk.", no_args_is_help=True)
baseline = typer.Typer(help="Named baselines for `kd-bench check`.", no_args_is_help=True)
app.add_typer(baseline, name="baseline")


@app.command("list")
def list_runs(results: Results = RESULTS) -> None:
    """All runs, oldest first."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from kd_bench import store

    table = Table("Run", "Model", "Role", "Suite", "Status", box=None)
    for run in store.list_runs(results):
        manifest = run.manifest
        model = manifest.model
        cells = (run.path.name, model.name, model.role, manifest.protocol.suite, manifest.status)
        table.add_row(*(Text(cell) for cell in cells))
    if table.row_count:
        Console(soft_wrap=True).print(table)
    else:
        typer.echo(f"No runs below {results} yet: `kd-bench eval CHECKPOINT` makes one.")


@app.command("show")
def show(
    run: Annotated[str, typer.Argument(help="Run or model name.")], results: Results = RESULTS
) -> None:
    """One run: manifest and scores as JSON."""
    import json

    from kd_bench import store
    from kd_bench.records import to_json

    found = store.find_run(results, run)
    outcome = {
        "manifest": to_json(found.manifest),
        "results": {task: to_json(result) for task, result in found.results().items()},
    }
    typer.echo(json.dumps(outcome, indent=2, ensure_ascii=False))


@baseline.command("set")
def set_baseline(
    name: Annotated[str, typer.Argument(help="Name of the baseline, e.g. the suite's.")],
    run: Annotated[str, typer.Argument(help="Run or model name.")],
    results: Results = RESULTS,
) -> None:
    """Let NAME stand for RUN; refuses partial and unhealthy runs."""
    from kd_bench import store

    found = store.find_run(results, run)
    store.set_baseline(results, name, found)
    typer.echo(f"{name} is now {found.path.name}.")
