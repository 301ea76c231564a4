"""What `compare` and `check` print: tables of differences, relations, flips and verdicts."""

from collections.abc import Sequence

from kd_bench.compare import Comparison, Flip, Measure, Relation
from kd_bench.compare.align import Difference
from kd_bench.compare.methods import MethodsComparison
from kd_bench.gate import GateReport
from kd_bench.gate_plan import Plan
from kd_bench.records import AVERAGE
from kd_bench.report.tables import Cell, Column, Row, Table

_DIFFERENCE = (
    Column("difference", "Difference", "difference"),
    Column("fixed", "Fixed", "count"),
    Column("broken", "Broken", "count"),
    Column("p", "p (Holm)", "text"),
    Column("detectable", "Detectable", "score"),
    Column("units", "Units", "count"),
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
        caption="Points on the 0-100 scale, 95 % intervals of each paired difference alone; p "
        "after Holm over the benchmarks; detectable: the smallest true difference that this test "
        "finds four times in five after Holm; units: pictures, pairs, groups or documents.",
        notes=(*comparison.warnings, *comparison.notes, *_few(comparison, number)),
    )


def _few(comparison: Comparison, number: int) -> list[str]:
    """Benchmarks that have too few units for an interval."""
    return [
        f"{task.task}: {task.differences[number - 1].span}, no interval."
        for task in comparison.tasks
        if task.differences[number - 1].interval is None
    ]


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
        Cell(difference.units),
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
        caption="Retention and gap closed in percent; vision and language gap in points; 95 % "
        "intervals.",
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


def method_tables(comparison: MethodsComparison) -> list[Table]:
    """Every pair of methods on the average, then each pair by benchmark."""
    counts = comparison.methods
    columns = (
        Column("pair", "Methods", "text"),
        Column("seeds", "Seeds", "text"),
        Column("difference", "Difference", "difference"),
        Column("p", "p (Holm)", "text"),
    )
    whole = Table(
        "Methods on the average",
        columns,
        tuple(
            Row(
                f"{pair.first} {pair.second}",
                (
                    Cell(f"{pair.second} - {pair.first}"),
                    Cell(f"{counts[pair.second]} and {counts[pair.first]}"),
                    Cell(pair.estimates[AVERAGE].value, interval=pair.estimates[AVERAGE].interval),
                    Cell(_probability(pair.p_holm[AVERAGE])),
                ),
            )
            for pair in comparison.pairs
        ),
        caption="Points on the 0-100 scale; 95 % intervals over training seeds and documents; p "
        "after Holm over all pairs of methods.",
        notes=tuple(comparison.warnings),
    )
    return [whole, *(_pair_table(comparison, number) for number in range(len(comparison.pairs)))]


def _pair_table(comparison: MethodsComparison, number: int) -> Table:
    pair = comparison.pairs[number]
    columns = (
        Column("task", "Benchmark", "text"),
        Column("first", pair.first),
        Column("second", pair.second),
        Column("difference", "Difference", "difference"),
        Column("p", "p (Holm)", "text"),
        Column("units", "Units", "count"),
    )
    rows = [
        Row(
            key,
            (
                Cell(key),
                Cell(comparison.scores[pair.first][key].value),
                Cell(comparison.scores[pair.second][key].value),
                Cell(found.value, interval=found.interval),
                Cell(_probability(pair.p_holm[key])),
                Cell(found.units),
            ),
            "all" if key == AVERAGE else "",
        )
        for key, found in pair.estimates.items()
    ]
    return Table(
        f"{pair.second} against {pair.first}",
        columns,
        tuple(rows),
        caption="Means over seeds; 95 % intervals over seeds and documents; p after Holm over all "
        "pairs and benchmarks, of the average over all pairs.",
    )


def plan_table(plan: Plan) -> Table:
    """What margins the stored units can carry."""
    columns = (
        Column("name", "Benchmark", "text"),
        Column("units", "Units", "count"),
        Column("churn", "Churn", "percent"),
        Column("error", "Standard error"),
        Column("margin", "Smallest margin"),
        Column("found", "Drop found"),
    )
    rows = tuple(
        Row(
            each.name,
            (
                Cell(each.name),
                Cell(each.units),
                Cell(100 * each.churn),
                Cell(each.error),
                Cell(each.margin),
                Cell(each.found),
            ),
            "all" if each.name == AVERAGE else "",
        )
        for each in plan.lines
    )
    return Table(
        f"Margins for {plan.baseline}",
        columns,
        rows,
        caption="Points on the 0-100 scale. Smallest margin: passes an equal student 95 times in "
        "100; drop found: ends in a regression 95 times in 100 under these margins.",
        notes=(*plan.warnings, *plan.notes),
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
        Column("decided", "Decided by", "text"),
        Column("p", "p (Holm)", "text"),
        Column("units", "Units", "text"),
    )
    rows = tuple(
        Row(
            verdict.name,
            (
                Cell(verdict.name),
                Cell(verdict.baseline),
                Cell(verdict.candidate),
                Cell(verdict.difference.value),
                Cell(verdict.non_inferiority.margin),
                Cell(verdict.verdict + (" (advisory)" if verdict.advisory else "")),
                Cell(verdict.decided_by),
                Cell(_probability(verdict.difference.p_holm)),
                Cell(f"{verdict.units:,}"),
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
        f"{report.title}: {report.outcome}",
        columns,
        rows,
        caption="Points on the 0-100 scale. Decided by: the interval of the paired difference, or "
        "its lower bound, at the level that Holm gave this test. Units: pictures, pairs, groups or "
        "documents.",
        notes=(
            report.statement,
            *report.warnings,
            *explained,
            *rules,
            *report.notes,
            report.policy_line,
        ),
    )
