"""The table of a store's runs: what each measured, and why one does not count."""

from kd_bench.errors import KdBenchError
from kd_bench.records import RunManifest
from kd_bench.report.tables import Cell, Column, Row, Table
from kd_bench.store import Catalogue, Run, missing_tasks

COLUMNS = (
    Column("model", "Model", "text"),
    Column("role", "Role", "text"),
    Column("suite", "Suite", "text"),
    Column("average", "Average"),
    Column("documents", "Documents", "text"),
    Column("limit", "Limit", "text"),
    Column("status", "Status", "text"),
    Column("date", "Date", "text"),
    Column("run", "Run", "text"),
)


def run_table(there: Catalogue) -> tuple[Table, list[KdBenchError]]:
    """One row a run, oldest first, and the errors of damaged ones.

    A run that does not stand for its model has a note that says why. The average is over the
    whole suite or not at all.
    """
    rows: list[Row] = []
    notes: list[str] = []
    errors: list[KdBenchError] = []
    for run, manifest in there.runs:
        why = there.reason(run, manifest)
        status = str(manifest.status)
        try:
            average, documents = _numbers(run, manifest)
        except KdBenchError as error:
            errors.append(error)
            average, documents, status, why = None, "–", "damaged", error.problem
        unverified = "" if manifest.verified else "not verified by digests"
        told = [sentence for sentence in (why, unverified) if sentence]
        notes += [sentence for sentence in told if sentence not in notes]
        numbers = tuple(notes.index(sentence) for sentence in told)
        limit = manifest.protocol.limit
        model = manifest.model
        values: tuple[str | float | None, ...] = (
            model.name,
            model.role,
            manifest.protocol.suite,
            average,
            documents,
            "–" if limit is None else str(limit),
            status,
            manifest.created[:16].replace("T", " "),
            run.path.name,
        )
        cells = [Cell(value) for value in values]
        cells[6] = Cell(status, notes=numbers)
        rows.append(Row(run.path.name, tuple(cells)))
    for run, lost in there.damaged:
        errors.append(lost)
        notes.append(lost.problem)
        blank = [Cell("–") for _ in COLUMNS]
        blank[6] = Cell("damaged", notes=(len(notes) - 1,))
        blank[8] = Cell(run.path.name)
        rows.append(Row(run.path.name, tuple(blank)))
    return Table("Runs", COLUMNS, tuple(rows), notes=tuple(notes)), errors


def _numbers(run: Run, manifest: RunManifest) -> tuple[float | None, str]:
    """The average, and how many documents it is over: `8 of 636` where a limit left some out."""
    results = [run.result(task) for task in run.done_tasks(manifest)]
    documents = sum(result.documents for result in results)
    total = sum(result.total or result.documents for result in results)
    told = f"{documents:,}" if total == documents else f"{documents:,} of {total:,}"
    if not results or missing_tasks(run, manifest):
        return None, told
    return sum(result.score for result in results) / len(results), told
