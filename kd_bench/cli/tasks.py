"""`kd-bench tasks list | show | validate | fetch | verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kd_bench.cli.options import App, Data, Profiles, Tasks, printable, profiles_of, specs_of
from kd_bench.errors import ExitCode, KdBenchError, MissingExtraError, UsageError, one_line

if TYPE_CHECKING:
    from kd_bench.registry import TaskSpec

app = App(help="The registry of benchmarks, and their data.")

SuiteOption = Annotated[str, typer.Option("--suite", help="Suite whose benchmarks are meant.")]


@app.command("list")
def list_tasks() -> None:
    """The benchmarks, one line each; `tasks show` tells everything about one."""
    from rich.console import Console
    from rich.table import Table

    from kd_bench.registry import load_tasks

    table = Table("Benchmark", "Skill", "Unit", "Title", box=None)
    table.title, table.title_justify = "Benchmarks", "left"
    for task in load_tasks():
        # What follows the colon explains; `tasks show` has room for it.
        table.add_row(task.id, task.skill, task.unit, task.title.partition(":")[0])
    Console().print(table)


@app.command("show")
def show(
    task: Annotated[str, typer.Argument(help="Benchmark id, e.g. gqa, or a YAML file.")],
    data: Data = None,
    document: Annotated[int, typer.Option(help="Which document to render.", min=0)] = 0,
    profile: Annotated[str | None, typer.Option(help="Protocol variant.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            "--images", "--pictures", help="Where its images go; default: a temporary folder."
        ),
    ] = None,
) -> None:
    """One benchmark's registry entry, and a document as a model meets it.

    Without --data, the document is one of the embedded world.
    """
    from kd_bench.config import dump_yaml
    from kd_bench.registry import load_task

    spec = load_task(task)
    spec.profile(profile)
    typer.echo(dump_yaml(spec.model_dump()))
    try:
        _show_sample(spec, data, document, profile, images)
    except (MissingExtraError, ModuleNotFoundError):
        hint = 'Install it with: pip install "kd-bench[eval]"'
        typer.echo(f"A document's prompt needs lmms-eval. {hint}", err=True)
    except UsageError as error:
        if data is not None:
            raise
        typer.echo(f"No document to show: {one_line(error)}", err=True)


def _show_sample(
    spec: "TaskSpec", data: Path | None, document: int, profile: str | None, folder: Path | None
) -> None:
    import tempfile

    from kd_bench.evals.benchmark import preview
    from kd_bench.world.build import resolve

    source = data or resolve("embedded:data/test")
    folder = folder or Path(tempfile.mkdtemp(prefix="kd-bench-"))
    prepared, index, images = preview(spec, source, folder, document=document, profile=profile)
    world = "of the embedded world" if data is None else f"of {data}"
    name = profile or spec.default_profile
    typer.secho(f"Document {index} {world}, profile {name}:\n", bold=True)
    typer.echo(printable(prepared.prompts[index]))
    typer.echo()
    for path in images:
        typer.echo(f"image: {path}")
    typer.echo(f"fingerprint: {prepared.fingerprint}")


@app.command("validate")
def validate(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Benchmark ids or YAML files; default: all.")
    ] = None,
) -> None:
    """Do the registry entries fit lmms-eval? Schema, upstream task, metric, split."""
    from kd_bench.evals.benchmark import lmms_eval
    from kd_bench.evals.benchmark import validate as problems_of
    from kd_bench.registry import load_task, task_names

    lmms_eval()  # missing, it is one error and not one of each entry
    broken = 0
    for name in tasks or task_names():
        try:
            problems = problems_of(load_task(name))
        except KdBenchError as error:
            problems = [one_line(error)]
        typer.echo(f"{name}: {'does not fit' if problems else 'fits'}")
        for problem in problems:
            typer.echo(f"  {problem}")
        broken += bool(problems)
    if broken:
        raise typer.Exit(ExitCode.USAGE)


@app.command("fetch")
def fetch(
    suite: SuiteOption = "ten",
    tasks: Tasks = None,
    profile: Profiles = None,
    to: Annotated[Path, typer.Option("--to", help="Folder to fill.")] = Path("data/benchmarks"),
) -> None:
    """Download the data sets; a stopped download is continued."""
    from kd_bench.evals.fetch import fetch as fetch_data

    specs = specs_of(suite, tasks)
    if _embedded(suite):
        raise UsageError(f"The suite {suite!r} comes with kd-bench.", "Nothing is to be fetched.")
    fetch_data(specs, to, profiles=profiles_of(profile, specs), report=typer.echo)
    typer.echo(f"Fetched: {to}. Check it with: kd-bench tasks verify {to}")


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder that `tasks fetch` or you filled.")],
    suite: SuiteOption = "ten",
    tasks: Tasks = None,
    profile: Profiles = None,
    subset: Annotated[
        bool, typer.Option("--subset", help="The data may be a part of the real one.")
    ] = False,
) -> None:
    """Check data: columns, counts, checksums, and that every image decodes."""
    from kd_bench.evals.fetch import verify as verify_data

    if not folder.is_dir():
        raise UsageError(f"There is no folder {folder}.", "`kd-bench tasks fetch` makes one.")
    specs = specs_of(suite, tasks)
    profiles = profiles_of(profile, specs)
    complete = not subset and not _embedded(suite)
    broken = 0
    for spec in specs:
        found = verify_data(spec, folder, complete=complete, profile=profiles.get(spec.id))
        if found.problems:
            typer.echo(f"{spec.id}: not as it should be")
            for problem in found.problems[:10]:
                typer.echo(f"  {problem.removeprefix(f'{spec.id}: ')}")
            if len(found.problems) > 10:
                typer.echo(f"  and {len(found.problems) - 10} more")
        else:
            revision = f", revision {found.revision[:12]}" if found.revision else ""
            typer.echo(
                f"{spec.id}: {found.documents:,} documents, {found.images:,} images{revision}"
            )
        broken += bool(found.problems)
    if broken:
        raise typer.Exit(ExitCode.INCOMPLETE)


def _embedded(suite: str) -> bool:
    from kd_bench.registry import load_suite

    return load_suite(suite).data == "embedded"
