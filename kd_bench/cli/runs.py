"""`kd-bench runs list | show | import | fsck | baseline`."""

from pathlib import Path
from typing import Annotated

import typer

from kd_bench.cli.options import RESULTS, App, Data, Results, show_tables
from kd_bench.errors import ExitCode, UsageError, closest

app = App(help="Evaluations on disk.")
baseline = App(help="Named baselines for `kd-bench check`.")
app.add_typer(baseline, name="baseline")


@app.command("list")
def list_runs(results: Results = RESULTS) -> None:
    """All runs, oldest first, and why one does not count; exit code 5 when one is damaged."""
    from kd_bench.report.leaderboard import run_table
    from kd_bench.store import catalogue, runs_elsewhere

    there = catalogue(results)
    if not there.runs and not there.damaged:
        other = runs_elsewhere(results)
        hint = f". {other}" if other else " yet: `kd-bench eval CHECKPOINT` makes one."
        typer.echo(f"No runs below {results}{hint}")
        return
    table, damaged = run_table(there)
    show_tables([table])
    for error in damaged:
        raise error


@app.command("show")
def show(
    run: Annotated[str, typer.Argument(help="Run or model name.")], results: Results = RESULTS
) -> None:
    """One run: manifest and scores as JSON; of a model that thinks, what that costs, too."""
    import json

    from kd_bench import store
    from kd_bench.records import to_json

    found = store.find_run(results, run)
    results_by_task = {task: to_json(result) for task, result in found.results().items()}
    if not any(result["tokens"].get("thinking") for result in results_by_task.values()):
        for result in results_by_task.values():
            del result["tokens"]  # a cost of models that think
    outcome = {"manifest": to_json(found.manifest), "results": results_by_task}
    typer.echo(json.dumps(outcome, indent=2, ensure_ascii=False))


@app.command("import")
def import_runs(
    path: Annotated[Path, typer.Argument(help="*_results.json of lmms-eval, or a folder of them.")],
    name: Annotated[str | None, typer.Option(help="Name in tables.")] = None,
    role: Annotated[
        str, typer.Option(help="teacher, sft, kd, switch, baseline or student.")
    ] = "baseline",
    method: Annotated[str, typer.Option(help="Training method.")] = "",
    seed: Annotated[int | None, typer.Option(help="Training seed.")] = None,
    data: Data = None,
    trust_samples: Annotated[
        bool,
        typer.Option("--trust-samples", help="Take the samples' score where results.json differs."),
    ] = False,
    results: Results = RESULTS,
) -> None:
    """Turn results of lmms-eval into runs; made with --log_samples.

    With --data, the answers are scored again on the documents: units and questions are known.
    """
    from kd_bench.records import ROLES

    if role not in ROLES:
        hint = closest(role, list(ROLES))
        raise UsageError(f"There is no role {role!r}.{hint}", f"Roles: {', '.join(ROLES)}.")
    if not path.exists():
        raise UsageError(f"There is no {path}.", "Give lmms-eval's --output_path.")
    from kd_bench.evals.importing import import_results

    imported = import_results(
        path,
        results,
        name=name,
        role=role,  # type: ignore[arg-type]  # checked above
        method=method,
        seed=seed,
        data=data,
        trust_samples=trust_samples,
    )
    for run in imported:
        typer.echo(f"Run: {run.path} ({', '.join(run.manifest.tasks)})")
        for note in run.manifest.notes[1:]:
            typer.echo(f"Note: {note}")


@app.command("fsck")
def fsck(
    repair: Annotated[
        bool, typer.Option("--repair", help="Cut torn journal tails, remove leftovers.")
    ] = False,
    results: Results = RESULTS,
) -> None:
    """Find and explain damage; exit code 5 when something remains to be done."""
    from rich.console import Console
    from rich.text import Text

    from kd_bench.report.tables import clean
    from kd_bench.store.damage import examine

    styles = {"damaged": "bold red", "unfinished": "yellow", "repaired": "green"}
    found = examine(results, repair=repair)
    console = Console(soft_wrap=True, highlight=False)
    for finding in found:
        problem = clean(f"{finding.path}: {finding.problem}.")
        state = (f"{finding.state:<10} ", styles.get(finding.state, ""))
        console.print(Text.assemble(state, problem))
        if finding.hint:
            console.print(Text(clean(finding.hint)), style="dim", soft_wrap=True)
    left = sum(finding.open for finding in found)
    runs = sum(path.is_dir() for path in (results / "runs").glob("*"))
    word = "run" if runs == 1 else "runs"
    typer.echo(f"{runs} {word} examined, {left or 'nothing'} to do.")
    if left:
        raise typer.Exit(ExitCode.INCOMPLETE)


@baseline.command("set")
def set_baseline(
    name: Annotated[str, typer.Argument(help="Name of the baseline, e.g. the suite's.")],
    run: Annotated[str, typer.Argument(help="Run or model name.")],
    allow_limited: Annotated[
        bool, typer.Option("--allow-limited", help="Even if its documents were limited.")
    ] = False,
    allow_subset: Annotated[
        bool, typer.Option("--allow-subset", help="Even if it lacks benchmarks of its suite.")
    ] = False,
    allow_unhealthy: Annotated[
        bool, typer.Option("--allow-unhealthy", help="Even if many of its answers failed.")
    ] = False,
    results: Results = RESULTS,
) -> None:
    """Let NAME stand for RUN: a complete, healthy, unlimited run of its whole suite.

    What else is allowed is written down beside the name, and `check` tells it.
    """
    from kd_bench import store

    found = store.find_run(results, run)
    store.set_baseline(
        results,
        name,
        found,
        allow_limited=allow_limited,
        allow_subset=allow_subset,
        allow_unhealthy=allow_unhealthy,
    )
    typer.echo(f"{name} is now {found.path.name}.")
