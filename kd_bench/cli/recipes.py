"""`kd-bench recipes list | show | settings`, and the recipe that `train --init` writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kd_bench.config import StrictModel

app = typer.Typer(help="Recipes of trainings, and their settings.", no_args_is_help=True)

STARTER = """\
# kd-bench train {file}
#
# Every setting has a default where none is given here: `kd-bench recipes settings` lists them.
student: checkpoints/student   # a transformers checkpoint: a folder, or a hub name (ORG/NAME)
teacher: checkpoints/teacher   # not needed for method: sft
data:
  path: data/conversations.json  # LLaVA JSON or JSONL
  images: data/images            # image names in it are relative to this folder
method: switch-kd   # {methods}
epochs: 1           # or steps: 1000
batch_size: 32      # samples of one optimizer step, over all devices
learning_rate: 2.0e-5
precision: bfloat16 # float32 on a CPU
seed: 0
"""


@app.command("list")
def list_recipes() -> None:
    """The shipped recipes, one line each."""
    from rich.console import Console
    from rich.table import Table

    from kd_bench.distill.recipe import list_recipes as shipped
    from kd_bench.distill.recipe import load_recipe

    table = Table("Recipe", "Stages", "Student", "Teacher", box=None)
    for name in shipped():
        recipe = load_recipe(name)
        stages = ", ".join(f"{stage.name} ({stage.method_name})" for stage in recipe.stages)
        built = recipe.student if isinstance(recipe.student, str) else recipe.student.language_model
        table.add_row(name, stages, built, recipe.teacher or "")
    Console().print(table)


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
) -> None:
    """A shipped recipe's file, comments and all."""
    from kd_bench.distill.recipe import find_recipe

    typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@app.command("settings")
def settings() -> None:
    """Every setting of a recipe with its default and meaning."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from kd_bench.distill.recipe import DataSource, LoraSettings, Recipe, Stage, StudentParts

    sections: list[tuple[str, type[StrictModel], str]] = [
        ("The recipe", Recipe, ""),
        ("Its data, or a stage's", DataSource, "data."),
        ("A stage; without its name in front, the last one", Stage, ""),
        ("Adapters of a stage", LoraSettings, "lora."),
        ("A student put together from parts", StudentParts, "student."),
    ]
    console = Console()
    for title, model, prefix in sections:
        table = Table("Setting", "Default", "Meaning", box=None, title=title, title_justify="left")
        meanings = attribute_lines(model)
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else _default(field)
            table.add_row(prefix + name, default, escape(meanings.get(name, "")))
        console.print(table)
        console.print()


def attribute_lines(model: type["StrictModel"]) -> dict[str, str]:
    """What the `Attributes:` of a model's docstring say, by field."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in (model.__doc__ or "").partition("Attributes:")[2].split("\n"):
        text = line.strip()
        if line.startswith(" " * 8) and not line.startswith(" " * 9) and ": " in text:
            listed, _, meaning = text.partition(": ")
            names = [name.strip() for name in listed.split(",")]
            found.update(dict.fromkeys(names, meaning))
        elif text and names:
            for name in names:
                found[name] += f" {text}"
    return found


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def write_starter(path: Path) -> None:
    """Write a commented recipe to start from.

    Raises:
        UsageError: something lies there already.
    """
    from kd_bench.distill.recipe import METHODS
    from kd_bench.errors import UsageError
    from kd_bench.files import write_text

    if path.exists():
        raise UsageError(f"{path} exists already.", "Give another name.")
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path}: a recipe's name ends in .yaml.", f"Write {path}.yaml.")
    write_text(path, STARTER.format(file=path, methods=", ".join(METHODS)))
