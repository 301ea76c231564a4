"""`kd-bench train`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.options import comma_separated, whole_numbers


def train(
    recipe: Annotated[
        str, typer.Argument(help="Name of a shipped recipe, or a YAML file.")
    ] = "mini",
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change.", metavar="KEY=VALUE"),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="One method, several (a,b), or all: a sweep.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Training seeds of the sweep: 0,1,2.")] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the resolved recipe and stop.")
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(help="Write a commented recipe to start from, and stop.", metavar="FILE.yaml"),
    ] = None,
) -> None:
    """Train a student; without arguments, the embedded mini recipe.

    Settings are written KEY=VALUE behind the recipe: method=sft steps=1000 learning_rate=1e-4
    seed=1 data.path=FILE output=FOLDER ...; `kd-bench recipes settings` lists them all.

    The same command continues a stopped training.
    """
    if init is not None:
        from kd_bench.cli.recipes import write_starter

        write_starter(init)
        typer.echo(f"Wrote {init}. Next: kd-bench train {init} --show")
        return
    from kd_bench.distill.recipe import plan, recipe_yaml, sweep

    changes = list(overrides or [])
    if "=" in recipe:
        recipe, changes = "mini", [recipe, *changes]
    seeds_asked = whole_numbers(seeds, "--seeds")
    planned = plan(recipe, changes, methods=comma_separated(method), seeds=seeds_asked)
    if show:
        typer.echo("---\n".join(recipe_yaml(single) for single in planned), nl=False)
        return
    folders = sweep(planned)
    embedded = all(str(single.student).startswith("embedded:") for single in planned)
    suite = "mini" if embedded else "ten --data DATA"
    typer.echo(f"Next: kd-bench eval {' '.join(map(str, folders))} --suite {suite}")
