"""`kd-bench eval`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kd_bench.cli.options import (
    RESULTS,
    Data,
    Profiles,
    Results,
    Tasks,
    TemplateVariables,
    comma_separated,
    profiles_of,
    specs_of,
    template_variables,
)
from kd_bench.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from kd_bench.evals.checkpoint import Model

WAYS = "Name checkpoints, or --model, or --vision with --language."


def evaluate(
    context: typer.Context,
    checkpoints: Annotated[
        list[str] | None, typer.Argument(help="Folders or hub names.", metavar="CHECKPOINT")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Any model that lmms-eval knows.", metavar="NAME")
    ] = None,
    model_args: Annotated[
        str | None, typer.Option(help="Its arguments.", metavar="KEY=VALUE,...")
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(help="Hybrid: the vision tower of this ...", metavar="CHECKPOINT"),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option(help="... before projector and language model of this.", metavar="CHECKPOINT"),
    ] = None,
    suite: Annotated[str, typer.Option(help="mini (embedded) or ten (the real ones).")] = "mini",
    tasks: Tasks = None,
    data: Data = None,
    profile: Profiles = None,
    limit: Annotated[int | None, typer.Option(help="Documents a benchmark.", min=1)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Questions at a time; default: chosen for you.", min=1)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="auto (the checkpoint's own on an accelerator, float32 on a CPU), float32, "
            "bfloat16 or float16."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Round the weights while loading: nf4 or int8.", metavar="nf4|int8"),
    ] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="Spread a model that does not fit one device over all: auto, balanced, "
            "balanced_low_0 or sequential.",
            metavar="auto|...",
        ),
    ] = None,
    prompt_template: Annotated[
        str | None,
        typer.Option(
            help="Instead of the checkpoint's chat template: a Jinja file, llava, chatml or plain.",
            metavar="FILE|NAME",
        ),
    ] = None,
    chat_template_kwargs: TemplateVariables = None,
    reasoning_tags: Annotated[
        str | None,
        typer.Option(
            help="Tags around thoughts that are not scored; default as lmms-eval: think, analysis.",
            metavar="none|JSON",
        ),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            help="Ask about grey images, or other documents': what is left was guessed.",
            metavar="blank|shuffled",
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in tables.")] = None,
    role: Annotated[
        str | None, typer.Option(help="teacher, sft, kd, switch, baseline or student.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Training method; seeds of one method fold into a row.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Training seed.")] = None,
    error_limit: Annotated[
        float | None,
        typer.Option(help="Share of failed answers that is healthy; default 0.01.", min=0, max=1),
    ] = None,
    truncated_limit: Annotated[
        float | None,
        typer.Option(
            help="Share of answers that never end that is healthy; default 0.5.", min=0, max=1
        ),
    ] = None,
    results: Results = RESULTS,
) -> None:
    """Evaluate models; the same command continues a stopped evaluation."""
    given = {key: value for key, value in locals().items() if value is not None}
    debug = bool(given.pop("context").obj)
    models = _models(given)
    _refuse(models, given)
    given["profiles"] = profiles_of(given.pop("profile", None), specs_of(suite, tasks))
    given["tasks"] = comma_separated(tasks)
    given["chat_template_kwargs"] = template_variables(given.pop("chat_template_kwargs", None))
    from kd_bench import api

    unhealthy = False
    for each in models:
        run = api.evaluate(each, **given, debug=debug)
        typer.echo(f"Run: {run.path} ({run.manifest.status})")
        unhealthy |= run.manifest.status != "complete"
    if unhealthy:
        raise typer.Exit(ExitCode.INCOMPLETE)


def _models(given: dict[str, Any]) -> "list[Model]":
    """Take what is to be evaluated from the options: checkpoints, a stock model, or a switch."""
    checkpoints = given.pop("checkpoints", None)
    names = ("vision", "language", "model", "model_args")
    vision, language, model, model_args = (given.pop(name, None) for name in names)
    if (vision is None) != (language is None):
        raise UsageError("--vision and --language belong together.", WAYS)
    ways = {"CHECKPOINT": checkpoints or None, "--vision": vision, "--model": model}
    named = [way for way, value in ways.items() if value is not None]
    if not named:
        raise UsageError("No model to evaluate.", WAYS)
    if len(named) > 1:
        raise UsageError(f"{' and '.join(named)} do not go together.", WAYS)
    if model is None and model_args is not None:
        raise UsageError("--model-args without --model.", "Name the model, too.")
    from kd_bench.evals.checkpoint import StockModel, VisualSwitch

    if model is not None:
        return [StockModel(model, model_args or "")]
    return [VisualSwitch(vision, language)] if vision is not None else list(checkpoints)


def _refuse(models: "list[Model]", options: dict[str, Any]) -> None:
    """Refuse options that would silently do nothing, or something else than what was meant."""
    from kd_bench.distill.processes import world_size
    from kd_bench.evals.checkpoint import StockModel, VisualSwitch

    known = ("auto", "balanced", "balanced_low_0", "sequential")
    if options.get("device_map", "auto") not in known:
        raise UsageError(
            f"--device-map {options['device_map']}: accelerate has no such placement.",
            f"Use one of {', '.join(known)}.",
        )
    several, switch = len(models) > 1, isinstance(models[0], VisualSwitch)
    stock = isinstance(models[0], StockModel)
    rules = [
        ("name", several, "names one model, but several checkpoints were given"),
        ("seed", several, "is of one model, but several checkpoints were given"),
        ("role", switch, "is fixed for --vision with --language: switch"),
        ("method", switch, "is read from the --vision checkpoint"),
        ("dtype", stock, "goes into --model-args for a --model"),
        ("device-map", stock, "goes into --model-args for a --model"),
        ("device-map", switch, "places one model, and --vision with --language are two"),
        ("device-map", world_size() > 1, "spreads one process's model, and there are several"),
        ("quantize", stock, "goes into --model-args for a --model"),
        ("prompt-template", stock, "goes into --model-args for a --model"),
        ("chat-template-kwargs", stock, "goes into --model-args for a --model"),
    ]
    for option, broken, reason in rules:
        if broken and option.replace("-", "_") in options:
            raise UsageError(f"--{option} {reason}.", "Drop it.")
