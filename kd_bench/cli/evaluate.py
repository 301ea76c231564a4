"""`kd-bench eval`."""

from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, Data, Results, comma_separated
from kd_bench.errors import ExitCode, UsageError


def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Checkpoint folders.", metavar="CHECKPOINT...")
    ],
    suite: Annotated[str, typer.Option(help="mini (embedded) or ten (the real ones).")] = "mini",
    tasks: Annotated[str | None, typer.Option(help="Only these benchmarks: mme,gqa.")] = None,
    data: Data = None,
    limit: Annotated[int | None, typer.Option(help="Documents a benchmark.", min=1)] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Questions at a time; default: chosen for you.", min=1)
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="teacher, sft, kd, switch, baseline or student.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in tables; one checkpoint only.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    results: Results = RESULTS,
) -> None:
    """Evaluate checkpoints; the same command continues a stopped evaluation."""
    if name is not None and len(checkpoints) > 1:
        raise UsageError("--name names one model, but several checkpoints were given.", "Drop it.")
    from kd_bench.evals.runner import evaluate as run_evaluation

    unhealthy = False
    for checkpoint in checkpoints:
        run = run_evaluation(
            checkpoint,
            suite=suite,
            tasks=comma_separated(tasks),
            data=data,
            limit=limit,
            batch_size=batch_size,
            role=role,
            name=name,
            dtype=dtype,
            results=results,
        )
        typer.echo(f"Run: {run.path} ({run.manifest.status})")
        unhealthy |= run.manifest.status != "complete"
    if unhealthy:
        raise typer.Exit(ExitCode.INCOMPLETE)
