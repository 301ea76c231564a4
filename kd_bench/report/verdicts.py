"""What `compare` and `check` print: tables of differences, relations, flips and verdicts."""

from collections.abc import Sequence

from kd_bench.compare import Comparison, Difference, Flip, Measure, Relation
from kd_bench.gate import GateReport
from kd_bench.records import AVERAGE
from kd_bench.report.tables import Cell, Column, Row, Table

__all__ = ["comparison_tables", "flip_table", "verdict_table"]

_DIFFERENCE = (
    Column("difference", "Difference", "difference"),
    Column("fixed", "Fixed", "count"),
    Column("broken", "Broken", "count"),
    Column("p", "p (Holm)", "text"),
    Column("detectable", "Detectable", "score"),
)


def comparison_tables(comparison: Comparison) -> list[Table]:
    """One table for each run against the first, then what the roles make of the scores."""
    tables = [_against_first(comparison, number) for number in range(1, len(comparison.runs))]
    if comparison.relations:
        tables.append(_relation_table(comparison))
    return tables


def _against_first(comparison: Comparison, number: int) -> Table:
    first, other = comparison.runs[0], comparison.runs[number]
    columns = (
        Column("task", "Benchmark", "text"),
        Column("first", first.name),
        Column("other", other.name),
        *_DIFFERENCE,
    )
    rows = [
        Row(
            task.task,
            _cells(task.task, task.scores, number, task.differences[number - 1]),
        )
        for task in comparison.tasks
    ]
    average = comparison.average_differences[number - 1]
    rows.append(Row(AVERAGE, _cells(AVERAGE, comparison.average, number, average), "all"))
    return Table(
        f"{other.name} against {first.name}",
        columns,
        tuple(rows),
        caption="Points on the 0-100 scale, 95 % intervals of the paired difference; detectable: "
        "the smallest true difference that these documents find four times in five.",
        notes=tuple(comparison.notes),
    )


def _cells(
    name: str, scores: Sequence[Measure], number: int, difference: Difference
) -> tuple[Cell, ...]:
    return (
        Cell(name),
        Cell(scores[0].value),
        Cell(scores[number].value),
        Cell(difference.value, interval=difference.interval),
        Cell(difference.fixed),
        Cell(difference.broken),
        Cell(_probability(difference.p_holm)),
        Cell(difference.detectable),
    )


def _probability(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _relation_table(comparison: Comparison) -> Table:
    names = {run.run_id: run.name for run in comparison.runs}
    chosen = [each for each in comparison.relations if each.task == AVERAGE]
    return Table(
        "On the average",
        (Column("kind", "Measure", "text"), Column("run", "Model", "text"), Column("v", "Value")),
        tuple(
            Row(f"{each.kind} {each.run_id}", _relation(each, names[each.run_id]))
            for each in chosen
        ),
        caption="Retention and gap closed in percent; vision and language gap in points.",
    )


def _relation(relation: Relation, name: str) -> tuple[Cell, ...]:
    factor = 100 if relation.unit == "ratio" else 1
    value = relation.measure.value * factor
    interval = relation.measure.interval
    text = f"{value:.1f}"
    if interval is not None:
        text += f" [{interval.low * factor:.1f}, {interval.high * factor:.1f}]"
    return Cell(relation.kind.replace("_", " ")), Cell(name), Cell(text)


def flip_table(flips: Sequence[Flip], task: str, names: tuple[str, str]) -> Table:
    """Documents whose score changed, broken ones first."""
    columns = ("Change", "Question", "Target", *names, "Picture")
    return Table(
        f"{task}: {len(flips)} samples changed",
        tuple(Column(str(number), title, "text") for number, title in enumerate(columns)),
        tuple(
            Row(
                flip.document_id,
                tuple(
                    Cell(text)
                    for text in (
                        flip.change,
                        flip.question,
                        flip.target,
                        flip.reference_answer,
                        flip.other_answer,
                        flip.picture,
                    )
                ),
            )
            for flip in flips
        ),
    )


def verdict_table(report: GateReport) -> Table:
    """The gate's verdicts, one row a benchmark and one for their average."""
    columns = (
        Column("name", "Benchmark", "text"),
        Column("baseline", "Baseline"),
        Column("candidate", "Candidate"),
        Column("difference", "Difference", "difference"),
        Column("margin", "Margin"),
        Column("verdict", "Verdict", "text"),
    )
    rows = tuple(
        Row(
            verdict.name,
            (
                Cell(verdict.name),
                Cell(verdict.baseline),
                Cell(verdict.candidate),
                Cell(verdict.difference.value, interval=verdict.difference.interval),
                Cell(verdict.non_inferiority.margin),
                Cell(verdict.verdict + (" (advisory)" if verdict.advisory else "")),
            ),
        )
        for verdict in report.verdicts
    )
    explained = tuple(
        each.sentence
        for each in report.verdicts
        if each.verdict in ("regressed", "inconclusive") or each.real_drop
    )
    rules = tuple(f"{rule.name} {rule.state}: {rule.sentence}" for rule in report.rules)
    return Table(
        f"{report.candidate} against {report.baseline}: {report.outcome}",
        columns,
        rows,
        caption="Points on the 0-100 scale, 95 % intervals of the paired difference.",
        notes=(*explained, *rules, *report.notes),
    )
