"""`kd-bench train`."""

from typing import Annotated

import typer

from kd_bench.cli.options import comma_separated


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
) -> None:
    """Train a student; without arguments, the embedded mini recipe.

    The same command continues a stopped training.
    """
    from kd_bench.distill.recipe import load_recipe, recipe_yaml

    changes = list(overrides or [])
    if "=" in recipe:
        recipe, changes = "mini", [recipe, *changes]
    resolved = load_recipe(recipe, changes)
    if show:
        typer.echo(recipe_yaml(resolved), nl=False)
        return
    if method is not None or seeds is not None:
        from kd_bench.distill.sweep import sweep

        methods = comma_separated(method)
        folders = sweep(
            recipe,
            changes,
            methods=methods,
            seeds=[int(seed) for seed in comma_separated(seeds) or []],
        )
    else:
        from kd_bench.distill.trainer import train as run_training

        folders = [run_training(resolved)]
    for folder in folders:
        typer.echo(f"Checkpoint: {folder}")
