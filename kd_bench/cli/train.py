"""`kd-bench train`, and what comes before it: `recipes`, `data` and `convert`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_bench.cli.options import (
    App,
    Command,
    TemplateVariables,
    comma_separated,
    printable,
    template_variables,
    this_program,
    whole_numbers,
)
from kd_bench.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from kd_bench.config import StrictModel
    from kd_bench.distill.plan import StagePlan
    from kd_bench.distill.recipe import Recipe

recipes = App(help="Recipes of trainings, and their settings.")
data = App(help="Training data.")

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

SHOWN = 20  # unreadable rows that are listed
STUDENT = "embedded:weights/student"


class WithSettings(Command):
    """A command whose help ends with every setting of a recipe."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the settings."""
        from rich.console import Console

        super().format_help(ctx, formatter)
        Console().print(*_settings())


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
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Count weights, memory, operations and hours, load no model, and stop."
        ),
    ] = False,
    card: Annotated[
        str | None,
        typer.Option(
            help="Device of the plan: h100, a100, l40s, rtx4090, ..., or GB:TFLOPS as in 24:125."
        ),
    ] = None,
    devices: Annotated[int, typer.Option(help="Devices of the plan.", min=1, max=10**5)] = 1,
    utilisation: Annotated[
        float, typer.Option(help="Share of the peak that the plan reckons with.", min=0.01, max=1)
    ] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
    verify_data: Annotated[
        bool, typer.Option("--verify-data", help="Read all images again for the data's digest.")
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(help="Write a commented recipe to start from, and stop.", metavar="FILE.yaml"),
    ] = None,
) -> None:
    """Train a student; without arguments, the embedded mini recipe.

    Settings are written KEY=VALUE behind the recipe, as in method=sft seed=1;
    all of them are listed below.

    The same command continues a stopped training.
    """
    if init is not None:
        write_starter(init)
        typer.echo(f"Wrote {init}. Next: {this_program()} train {init} --show")
        return
    from kd_bench.distill.recipe import plan as sweep_of
    from kd_bench.distill.recipe import recipe_yaml

    changes = list(overrides or [])
    if "=" in recipe:
        recipe, changes = "mini", [recipe, *changes]
    seeds_asked = whole_numbers(seeds, "--seeds")
    planned = sweep_of(recipe, changes, methods=comma_separated(method), seeds=seeds_asked)
    if show:
        typer.echo("---\n".join(recipe_yaml(single) for single in planned), nl=False)
        return
    if plan:
        show_plans(planned, card, devices, utilisation, as_json)
        return
    from kd_bench.distill import processes

    with processes.importing():
        from kd_bench.distill.train import sweep

    folders = sweep(planned, verify_data=verify_data)
    embedded = all(str(single.student).startswith("embedded:") for single in planned)
    suite = "mini" if embedded else "ten --data DATA"
    typer.echo(f"Next: {this_program()} eval {' '.join(map(str, folders))} --suite {suite}")


def show_plans(
    planned: "list[Recipe]", card: str | None, devices: int, utilisation: float, as_json: bool
) -> None:
    """What trainings need, stage by stage."""
    import json
    from dataclasses import asdict

    from rich.console import Console

    from kd_bench.distill.plan import card_of, plan_training

    chosen = None if card is None else card_of(card)
    options: dict[str, Any] = {"devices": devices, "utilisation": utilisation}
    found = [(each, plan_training(each, card=chosen, **options)) for each in planned]
    if as_json:
        stages = [
            {"recipe": each.name, **asdict(plan), "needed": plan.needed, "fits": plan.fits}
            for each, plans in found
            for plan in plans
        ]
        typer.echo(json.dumps(stages, indent=2))
        return
    console = Console(highlight=False, soft_wrap=True)
    for plan in (plan for _, plans in found for plan in plans):
        for line in _plan_lines(plan, chosen.name if chosen else None, utilisation):
            console.print(line)


def _plan_lines(plan: "StagePlan", card: str | None, utilisation: float) -> "Iterator[Any]":
    """A stage's plan: how it runs, a table, whether it fits."""
    from rich.table import Table

    yield (
        f"{plan.stage}: {plan.method}, {plan.steps:,} steps; {plan.devices} device"
        f"{'s' if plan.devices > 1 else ''}, each {plan.gradient_accumulation} x "
        f"{plan.micro_batch} samples a step of up to {plan.tokens:,} tokens"
    )
    again = [name for name, on in plan.checkpointing.items() if on]
    yield f"computed again in the backward pass: {' and '.join(again) or 'nothing'}"
    table = Table("", "", box=None, show_header=False)
    table.columns[1].justify = "right"
    for name, count in plan.parameters.items():
        table.add_row(f"weights: {name.replace('_', ' ')}", f"{count:,}")
    for name, size in (*plan.memory.items(), ("in all, on each device", plan.needed)):
        table.add_row(
            f"memory: {name}", f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"
        )
    for name, flops in (*plan.flops.items(), ("in all", sum(plan.flops.values()))):
        table.add_row(f"operations of a step: {name}", f"{flops / 1e12:,.3g} TFLOP")
    if plan.hours is not None:
        table.add_row(f"time on {card} at {utilisation:.0%} of its peak", _span(plan.hours))
    yield table
    if plan.memory_limit is None:
        yield "Name a device to see whether it fits: --card h100."
    elif plan.fits:
        yield f"It fits: {plan.memory_limit / 1e9:.1f} GB of a device can be used."
    else:
        yield f"It does not fit: {plan.memory_limit / 1e9:.1f} GB can be used. {plan.hint}"
    yield ""


def _span(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:,.2g} min"


def write_starter(path: Path) -> None:
    """Write a commented recipe to start from.

    Raises:
        UsageError: something lies there already.
    """
    from kd_bench.distill.recipe import METHODS
    from kd_bench.files import write_text

    if path.exists():
        raise UsageError(f"{path} exists already.", "Give another name.")
    if path.suffix not in (".yaml", ".yml"):
        raise UsageError(f"{path}: a recipe's name ends in .yaml.", f"Write {path}.yaml.")
    write_text(path, STARTER.format(file=path, methods=", ".join(METHODS)))


# --- recipes --------------------------------------------------------------------------------------


@recipes.command("list")
def list_recipes() -> None:
    """The shipped recipes: their stages, and the two models."""
    from rich.console import Console
    from rich.table import Table

    from kd_bench.distill import recipe as shipped

    table = Table("Recipe", "Student, then teacher", "Stages", box=None)
    table.title, table.title_justify = "Recipes", "left"
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for name in shipped.list_recipes():
        recipe = shipped.load_recipe(name)
        stages = ", ".join(f"{stage.name} ({stage.method_name})" for stage in recipe.stages)
        student = recipe.student
        built = student if isinstance(student, str) else student.language_model
        table.add_row(name, "\n".join(filter(None, (built, recipe.teacher))), stages)
    Console().print(table)


@recipes.command("show")
def show_recipe(
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
) -> None:
    """A shipped recipe's file, comments and all."""
    from kd_bench.distill.recipe import find_recipe

    typer.echo(find_recipe(recipe).read_text(encoding="utf-8"), nl=False)


@recipes.command("settings")
def settings() -> None:
    """Every setting of a recipe with its default and meaning."""
    from rich.console import Console

    Console().print(*_settings())


def _settings() -> "Iterator[Table | str]":
    """Tables of the settings of a recipe and its parts, an empty line after each."""
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
    for title, model, prefix in sections:
        table = Table("Setting", "Default", "Meaning", box=None, title=title, title_justify="left")
        table.columns[0].no_wrap = True
        meanings = attribute_lines(model)
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else _default(field)
            table.add_row(prefix + name, default, escape(meanings.get(name, "")))
        yield table
        yield ""


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


# --- data -----------------------------------------------------------------------------------------


@data.callback()
def _data() -> None:
    """Keeps `show` a command of its own."""


@data.command("show")
def show_data(
    path: Annotated[str, typer.Argument(help="JSON, JSONL, or a dataset folder.")],
    student: Annotated[
        str, typer.Option(help="Checkpoint whose tokenizer, template and image processor read it.")
    ] = STUDENT,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images; default: the file's own.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples to print.", min=0)] = 3,
    encode: Annotated[
        int, typer.Option(help="Rows to encode, images included; 0 for all.", min=0)
    ] = 200,
    max_length: Annotated[int, typer.Option(help="Tokens of a sample.", min=8)] = 2048,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            help="Instead of the student's: a Jinja file, llava, chatml or plain.",
            metavar="FILE|NAME",
        ),
    ] = None,
    chat_template_kwargs: TemplateVariables = None,
) -> None:
    """What a student will learn from: form, counts, samples with the learnt tokens marked."""
    from rich.console import Console
    from rich.text import Text

    from kd_bench.distill.encoding import preview_data
    from kd_bench.distill.models import quiet
    from kd_bench.distill.recipe import DataSource

    quiet()
    found = preview_data(
        DataSource(path=path, images=None if images is None else str(images)),
        student,
        samples=samples,
        encoded=encode or None,
        max_length=max_length,
        prompt_template=prompt_template,
        chat_template_kwargs=template_variables(chat_template_kwargs),
    )
    console = Console(highlight=False, soft_wrap=True)
    for line in found.lines():
        console.print(line, markup=False)
    if found.samples:
        console.print(
            f"\nAs {student} sees it; what is learnt stands between « and »:", markup=False
        )
    for sample in found.samples:
        whole = Text("")
        for text, learnt in sample.parts:
            whole.append(printable(f"«{text}»" if learnt else text), "bold green" if learnt else "")
        console.print(Text(printable(f"\n{sample.name}"), "bold"))
        console.print(whole)
        console.print(printable("learnt: " + " ".join(map(repr, sample.learnt))), markup=False)
    if found.unreadable:
        console.print(f"\n{len(found.unreadable):,} cannot be used:")
        for name, reason in found.unreadable[:SHOWN]:
            console.print(printable(f"  {name}: {reason}"), markup=False)
        if len(found.unreadable) > SHOWN:
            console.print(f"  and {len(found.unreadable) - SHOWN:,} more")


# --- convert --------------------------------------------------------------------------------------


def convert(
    kind: Annotated[str, typer.Argument(help="Source format: tinyllava.")],
    source: Annotated[Path, typer.Argument(help="Checkpoint folder to read.")],
    destination: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """Convert a TinyLLaVA checkpoint to transformers' LLaVA classes."""
    if kind != "tinyllava":
        raise UsageError(f"Unknown checkpoint format {kind!r}.", "Known: tinyllava.")
    from kd_bench.distill.build import convert_tinyllava

    convert_tinyllava(source, destination)
    typer.echo(f"Checkpoint: {destination}")
