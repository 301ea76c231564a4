"""`kd-bench tasks list | show`."""

from typing import Annotated

import typer

app = typer.Typer(help="The registry of benchmarks.", no_args_is_help=True)


@app.command("list")
def list_tasks() -> None:
    """The benchmarks, what they measure and in which unit."""
    from rich.console import Console
    from rich.table import Table

    from kd_bench.registry import load_tasks

    table = Table("Benchmark", "Title", "Skill", "lmms-eval task", "Metric", "Unit", box=None)
    for task in load_tasks():
        table.add_row(task.id, task.title, task.skill, task.upstream, task.metric, task.unit)
    Console().print(table)


@app.command("show")
def show(task: Annotated[str, typer.Argument(help="Benchmark id, e.g. gqa.")]) -> None:
    """One benchmark's registry entry."""
    import yaml

    from kd_bench.registry import load_task

    typer.echo(yaml.safe_dump(load_task(task).model_dump(), sort_keys=False, allow_unicode=True))
