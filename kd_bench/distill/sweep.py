"""Methods x seeds, one training after another; the same call continues where it stopped."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kd_bench.distill.methods import METHODS
from kd_bench.distill.recipe import Recipe, load_recipe
from kd_bench.errors import TrainingError, UsageError, closest


def plan(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Recipe]:
    """The recipes of a sweep, each with a folder of its own.

    Args:
        methods: names in `METHODS`, or `all`; by default the recipe's own.
        seeds: by default the recipe's own.

    Raises:
        UsageError: an unknown method, or a recipe that does not hold.
    """
    base = load_recipe(recipe, overrides)
    asked = list(METHODS) if methods and "all" in methods else list(methods or [])
    for name in asked:
        if name not in METHODS:
            raise UsageError(
                f"There is no method {name!r}.{closest(name, list(METHODS))}",
                f"Known: {', '.join(METHODS)}, all.",
            )
    planned = []
    for seed in seeds or [base.seed]:
        for name in asked or [""]:
            chosen = [f"method={name}"] if name else []
            single = load_recipe(recipe, [*overrides, f"seed={seed}", *chosen])
            if base.output is not None and (asked or seeds):  # each below the folder that was named
                own = f"{base.output}/{single.method}-seed{seed}"
                single = single.model_copy(update={"output": own})
            planned.append(single)
    return planned


def sweep(planned: Sequence[Recipe], *, console: Console | None = None) -> list[Path]:
    """Train every recipe of a plan; returns the folders of the finished students.

    A training that stops does not cost the others.

    Raises:
        UsageError: before anything is trained.
        TrainingError: at the end, naming the trainings that stopped.
    """
    from kd_bench.distill.train import train

    console = console or Console()
    if len(planned) == 1:
        return [train(planned[0], console=console)]
    finished: list[Path] = []
    stopped: list[str] = []
    for number, single in enumerate(planned, start=1):
        console.rule(f"{number}/{len(planned)}  {single.method}, seed {single.seed}", align="left")
        try:
            finished.append(train(single, console=console))
        except TrainingError as error:
            stopped.append(f"{single.method} with seed {single.seed}: {error.problem}")
            console.print(f"Stopped: {error}", highlight=False, soft_wrap=True)
    if stopped:
        raise TrainingError(
            f"{len(stopped)} of {len(planned)} trainings stopped: {' '.join(stopped)}",
            "Mend that and run the same command again: it continues.",
        )
    return finished
