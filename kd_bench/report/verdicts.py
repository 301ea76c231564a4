"""What `compare` and `check` tell: tables of differences and verdicts, and the gate's files for CI.

CI is told every ending, also that there is no verdict: a job whose file is missing looks like a job
that had nothing to say.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from pathlib import Path

from kd_bench.compare import Comparison, Flip, Relation
from kd_bench.compare.align import Difference
from kd_bench.compare.estimates import BLANK, CONTENT, GAPS, PART_NAMES, PARTS, Estimate, Measure
from kd_bench.compare.methods import MethodPair, MethodsComparison
from kd_bench.errors import KdBenchError, one_line
from kd_bench.files import write_text
from kd_bench.gate import NOT_WORSE, GateReport, Verdict
from kd_bench.gate_plan import Plan
from kd_bench.records import AVERAGE
from kd_bench.report.tables import Cell, Column, Row, Table

_TASK = Column("task", "Benchmark", "text")
_DIFFERENCE = Column("difference", "Difference", "difference")
_P = Column("p", "p (Holm)", "text")
_UNITS = Column("units", "Units", "count")


_MADE_OF = {
    CONTENT: "Content (what answers say, whatever their form) and form add up to the difference.",
    BLANK: "Guessing (the score with blank images) and sight add up to the difference.",
}
Gaps = Sequence[tuple[str, str, Mapping[str, Measure | Estimate]]]
"""Form gap and sight: a model's name, which of them, and its numbers by benchmark."""


def probability(p: float) -> str:
    """As tables show it."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# --- runs compared -------------------------------------------------------------------------------


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Each run against the first and what the difference is made of; form gaps; roles."""
    first, *others = comparison.runs
    gaps: Gaps = [
        (run.name, kind, comparison.measures(kind, run.run_id))
        for run in comparison.runs
        for kind in GAPS
    ]
    note, gaps, shown = _told(gaps)
    tables: list[Table | None] = []
    for number, other in enumerate(others):
        whole = {each.task: each.differences[number] for each in comparison.tasks}
        whole[AVERAGE] = comparison.average_differences[number]
        parts = {kind: comparison.measures(kind, other.run_id) for kind in shown}
        tables.append(_against_first(comparison, number + 1, note))
        tables.append(_part_table(f"{other.name} against {first.name}", whole, parts))
    tables += [_gap_table(gaps), _relation_table(comparison)]
    return [table for table in tables if table is not None]


def _told(gaps: Gaps) -> tuple[tuple[str, ...], Gaps, tuple[str, ...]]:
    """What of gaps and parts is worth a table: where no form costs anything, a note is enough."""
    form = [each.value for _, kind, found in gaps if kind == GAPS[0] for each in found.values()]
    if not form or any(form):
        return (), gaps, PART_NAMES
    note = "Form gap 0.0 on every benchmark of all of them: the differences are of content alone."
    return (note,), [each for each in gaps if each[1] != GAPS[0]], PARTS[BLANK]


def _against_first(comparison: Comparison, number: int, told: tuple[str, ...]) -> Table:
    first, other = comparison.runs[0], comparison.runs[number]
    columns = (
        _TASK,
        Column("first", first.name),
        Column("other", other.name),
        _DIFFERENCE,
        Column("fixed", "Fixed", "count"),
        Column("broken", "Broken", "count"),
        _P,
        Column("detectable", "Detectable", "score"),
        _UNITS,
    )

    def row(name: str, scores: Sequence[Measure], difference: Difference, section: str = "") -> Row:
        return Row.of(
            name,
            name,
            scores[0].value,
            scores[number].value,
            Cell(difference.value, interval=difference.interval),
            difference.fixed,
            difference.broken,
            probability(difference.p_holm),
            difference.detectable,
            difference.units,
            section=section,
        )

    found = [(each.task, each.scores, each.differences[number - 1]) for each in comparison.tasks]
    few = [f"{task}: {d.span}, no interval." for task, _, d in found if d.interval is None]
    average = comparison.average_differences[number - 1]
    return Table(
        f"{other.name} against {first.name}",
        columns,
        (*(row(*each) for each in found), row(AVERAGE, comparison.average, average, "all")),
        caption="Points on the 0-100 scale, 95 % intervals of each paired difference alone; p "
        "after Holm over the benchmarks; detectable: the smallest true difference that this test "
        "finds four times in five after Holm; units: images, pairs, groups or documents.",
        notes=(*comparison.warnings, *comparison.notes, *few, *told),
    )


def _part_table(
    title: str,
    whole: "Mapping[str, Difference | Estimate]",
    parts: "Mapping[str, Mapping[str, Measure | Estimate]]",
) -> Table | None:
    """The parts of a difference by their names, then by benchmark; None where none is known."""
    known = {kind: measures for kind, measures in parts.items() if measures}
    if not known:
        return None
    columns = (
        Column(kind, kind.removesuffix(" difference").capitalize(), "difference") for kind in known
    )
    return Table(
        f"What {title} is made of",
        (_TASK, _DIFFERENCE, *columns),
        tuple(
            _gap_row(key, [difference, *(measures.get(key) for measures in known.values())])
            for key, difference in whole.items()
        ),
        caption=" ".join(_MADE_OF[column] for column, kinds in PARTS.items() if kinds[0] in known),
    )


def _gap_table(gaps: Gaps) -> Table | None:
    """None where none is known."""
    known = [(name, kind, measures) for name, kind, measures in gaps if measures]
    keys = dict.fromkeys(key for _, _, measures in known for key in measures if key != AVERAGE)
    if not known:
        return None
    return Table(
        " and ".join(dict.fromkeys(kind for _, kind, _ in known)).capitalize(),
        (
            _TASK,
            *(
                Column(f"{place}", f"{kind.capitalize()}, {name}", "difference")
                for place, (name, kind, _) in enumerate(known)
            ),
        ),
        tuple(
            _gap_row(key, [measures.get(key) for _, _, measures in known])
            for key in (*keys, AVERAGE)
        ),
        caption="Points, with 95 % intervals. Form gap: score by content, what the answers say "
        "whatever their form, minus the score. Sight: score minus score with blank images.",
    )


def _gap_row(key: str, measures: "Sequence[Measure | Difference | Estimate | None]") -> Row:
    cells = (Cell(each.value, interval=each.interval) if each else None for each in measures)
    return Row.of(key, key, *cells, section="all" if key == AVERAGE else "")


def _relation_table(comparison: Comparison) -> Table | None:
    names = {run.run_id: run.name for run in comparison.runs}
    of_roles = ("retention", "gap closed", "vision gap", "language gap")
    relations = [r for r in comparison.relations if r.task == AVERAGE and r.kind in of_roles]
    if not relations:
        return None
    return Table(
        "On the average",
        (Column("kind", "Measure", "text"), Column("run", "Model", "text"), Column("v", "Value")),
        tuple(
            Row.of(
                f"{each.kind} {each.run_id}",
                each.kind.replace("_", " "),
                names[each.run_id],
                _measured(each),
            )
            for each in relations
        ),
        caption="Retention and gap closed in percent; vision and language gap in points; 95 % "
        "intervals.",
    )


def _measured(relation: Relation) -> str:
    factor, interval = 100 if relation.unit == "ratio" else 1, relation.measure.interval
    text = f"{relation.measure.value * factor:.1f}"
    if interval is not None:
        text += f" [{interval.low * factor:.1f}, {interval.high * factor:.1f}]"
    return text


def flip_table(flips: Sequence[Flip], task: str, names: tuple[str, str]) -> Table:
    """Documents whose score changed, broken ones first."""
    columns = ("Change", "Question", "Target", *names, "Image")
    return Table(
        f"{task}: {len(flips)} samples changed",
        tuple(Column(str(number), title, "text") for number, title in enumerate(columns)),
        tuple(
            Row.of(flip.document_id, flip.change, flip.question, flip.target,
                   flip.reference_answer, flip.other_answer, flip.picture)
            for flip in flips
        ),
    )  # fmt: skip


# --- methods compared ----------------------------------------------------------------------------


def method_tables(comparison: MethodsComparison) -> list[Table]:
    """Every pair of methods on the average, then each by benchmark with its parts; form gaps."""
    counts = comparison.methods
    gaps: Gaps = [
        (method, kind, measures)
        for method, by_kind in comparison.gaps.items()
        for kind, measures in by_kind.items()
    ]
    note, gaps, shown = _told(gaps)
    whole = Table(
        "Methods on the average",
        (Column("pair", "Methods", "text"), Column("seeds", "Seeds", "text"), _DIFFERENCE, _P),
        tuple(
            Row.of(
                f"{pair.first} {pair.second}",
                f"{pair.second} - {pair.first}",
                f"{counts[pair.second]} and {counts[pair.first]}",
                Cell(pair.estimates[AVERAGE].value, interval=pair.estimates[AVERAGE].interval),
                probability(pair.p_holm[AVERAGE]),
            )
            for pair in comparison.pairs
        ),
        caption="Points on the 0-100 scale; 95 % intervals over training seeds and documents; p "
        "after Holm over all pairs of methods.",
        notes=(*comparison.warnings, *note),
    )
    tables: list[Table | None] = [whole]
    for pair in comparison.pairs:
        parts = {kind: pair.parts.get(kind, {}) for kind in shown}
        title = f"{pair.second} against {pair.first}"
        tables += [_pair_table(comparison, pair), _part_table(title, pair.estimates, parts)]
    return [table for table in (*tables, _gap_table(gaps)) if table is not None]


def _pair_table(comparison: MethodsComparison, pair: MethodPair) -> Table:
    return Table(
        f"{pair.second} against {pair.first}",
        (
            _TASK,
            Column("first", pair.first),
            Column("second", pair.second),
            _DIFFERENCE,
            _P,
            _UNITS,
        ),
        tuple(
            Row.of(
                key,
                key,
                comparison.scores[pair.first][key].value,
                comparison.scores[pair.second][key].value,
                Cell(found.value, interval=found.interval),
                probability(pair.p_holm[key]),
                found.units,
                section="all" if key == AVERAGE else "",
            )
            for key, found in pair.estimates.items()
        ),
        caption="Means over seeds; 95 % intervals over seeds and documents; p after Holm over "
        "all pairs and benchmarks, of the average over all pairs.",
    )


# --- verdicts ------------------------------------------------------------------------------------


def plan_table(plan: Plan) -> Table:
    """What margins the stored units can carry."""
    columns = (
        Column("name", "Benchmark", "text"),
        _UNITS,
        Column("churn", "Churn", "percent"),
        Column("error", "Standard error"),
        Column("margin", "Smallest margin"),
        Column("found", "Drop found"),
    )
    return Table(
        f"Margins for {plan.baseline}",
        columns,
        tuple(
            Row.of(each.name, each.name, each.units, 100 * each.churn, each.error, each.margin,
                   each.found, section="all" if each.name == AVERAGE else "")
            for each in plan.lines
        ),
        caption="Points on the 0-100 scale. Smallest margin: passes an equal student 95 times in "
        "100; drop found: ends in a regression 95 times in 100 under these margins.",
        notes=plan.notes,
    )  # fmt: skip


def verdict_table(report: GateReport) -> Table:
    """The gate's verdicts, one row a benchmark and one for their average."""
    columns = (
        Column("name", "Benchmark", "text"),
        Column("baseline", "Baseline"),
        Column("candidate", "Candidate"),
        _DIFFERENCE,
        Column("margin", "Margin"),
        Column("verdict", "Verdict", "text"),
        Column("decided", "Decided by", "text"),
        _P,
        Column("units", "Units", "text"),
    )
    rows = tuple(
        Row.of(
            verdict.name,
            verdict.title,
            verdict.baseline,
            verdict.candidate,
            verdict.difference.value,
            verdict.non_inferiority.margin,
            verdict.verdict + " (advisory)" * verdict.advisory,
            verdict.decided_by,
            probability(verdict.difference.p_holm),
            f"{verdict.units:,}",
        )
        for verdict in report.verdicts
    )
    explained = (
        each.sentence
        for each in report.verdicts
        if each.verdict in ("regressed", "inconclusive") or each.real_drop
    )
    rules = (f"{rule.name} {rule.state}: {rule.sentence}" for rule in report.rules)
    return Table(
        f"{report.title}: {report.outcome}",
        columns,
        rows,
        caption="Points on the 0-100 scale. Decided by: the interval of the paired difference, or "
        "its lower bound, at the level that Holm gave this test. Units: images, pairs, groups or "
        "documents.",
        notes=(report.statement, *report.warnings, *explained, *rules, *report.notes,
               report.policy_line),
    )  # fmt: skip


# --- CI: JUnit -----------------------------------------------------------------------------------

MARKS = {"improved": "▲", NOT_WORSE: "=", "regressed": "▼", "inconclusive": "?"}
NO_VERDICT = "no verdict"
# XML 1.0 has no way to write these.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _small_drop(verdict: Verdict) -> bool:
    return verdict.real_drop and verdict.verdict == NOT_WORSE


def _why(error: Exception) -> str:
    """The error as the command line shows it."""
    told = one_line(error)
    return told if isinstance(error, KdBenchError) else f"{type(error).__name__}: {told}"


def junit_xml(report: GateReport | Exception) -> str:
    """One test case a verdict and a rule: regressed and failed are failures, undecided is skipped.

    Most CI systems have no third colour; the exit code tells undecided from passed. A gate that
    ended without a verdict is one case with an error.
    """
    suite = ET.Element("testsuite", name="kd-bench check")
    if isinstance(report, Exception):
        case = ET.SubElement(suite, "testcase", classname="kd-bench.check", name="check")
        kind = type(report).__name__
        ET.SubElement(case, "error", message=_xml(_why(report)), type=kind)
    else:
        _properties(suite, report)
        cases: list[tuple[str, str, str, str, bool]]
        cases = [("check", v.name, v.verdict, v.sentence, v.advisory) for v in report.verdicts]
        cases += [("rules", r.name, r.state, r.sentence, False) for r in report.rules]
        for group, name, state, sentence, advisory in cases:
            case = ET.SubElement(suite, "testcase", classname=f"kd-bench.{group}", name=_xml(name))
            if state in ("regressed", "failed") and not advisory:
                ET.SubElement(case, "failure", message=_xml(sentence), type=state)
            elif state in ("inconclusive", "not checked") or advisory:
                ET.SubElement(case, "skipped", message=_xml(sentence))
            ET.SubElement(case, "system-out").text = _xml(sentence)
        ET.SubElement(suite, "system-out").text = _xml(
            "\n".join((report.statement, *report.warnings, *report.notes, report.policy_line))
        )
    suite.set("tests", str(len(suite.findall("testcase"))))
    for counted, kind in (("failures", "failure"), ("skipped", "skipped"), ("errors", "error")):
        suite.set(counted, str(len(suite.findall(f"testcase/{kind}"))))
    ET.indent(suite)
    text = ET.tostring(suite, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


def _properties(suite: ET.Element, report: GateReport) -> None:
    """What a reader of the file alone must know: who, under which policy, and what limits it."""
    told = [
        ("candidate", report.candidate),
        ("baseline", report.baseline),
        ("outcome", report.outcome),
        ("policy", report.policy or "given in code"),
        ("policy_digest", report.policy_digest),
        *(("warning", each) for each in report.warnings),
        *(("note", each) for each in report.notes),
    ]
    properties = ET.SubElement(suite, "properties")
    for name, value in told:
        ET.SubElement(properties, "property", name=name, value=_xml(value))


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def write_junit(report: GateReport | Exception, path: Path) -> None:
    """Write the JUnit file atomically."""
    write_text(path, junit_xml(report))


# --- CI: GitHub ----------------------------------------------------------------------------------

HEADERS = ("benchmark", "baseline", "candidate", "difference", "95 % interval", "decided by",
           "margin", "p (Holm)", "units", "fixed", "broken", "verdict")  # fmt: skip


def job_summary(report: GateReport | Exception) -> str:
    """GitHub-flavoured Markdown: the outcome, one row a benchmark, rules and notes."""
    if isinstance(report, Exception):
        return f"### kd-bench check: {NO_VERDICT}\n\n{_markdown(_why(report))}\n"
    lines = [
        f"### kd-bench check: {report.outcome}",
        "",
        _markdown(report.title),
        "",
        "| " + " | ".join(HEADERS) + " |",
        "|---|" + "---:|" * (len(HEADERS) - 2) + "---|",
    ]
    rows = [[_markdown(cell) for cell in _summary(verdict)] for verdict in report.verdicts]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"- {_markdown(report.statement)}"]
    lines += [f"- **{_markdown(warning)}**" for warning in report.warnings]
    lines += [f"- **{_markdown(r.name)}** {r.state}: {_markdown(r.sentence)}" for r in report.rules]
    lines += [f"- {_markdown(note)}" for note in (*report.notes, report.policy_line)]
    return "\n".join(lines) + "\n"


def _summary(verdict: Verdict) -> tuple[str, ...]:
    change, test = verdict.difference, verdict.non_inferiority
    words = verdict.verdict + " (real drop)" * _small_drop(verdict)
    return (
        verdict.title,
        f"{verdict.baseline:.1f}",
        f"{verdict.candidate:.1f}",
        f"{change.value:+.2f}",
        change.span,
        verdict.decided_by,
        f"-{test.margin:g}",
        f"{change.p_holm:.3g}",
        f"{verdict.units}",
        str(change.fixed),
        str(change.broken),
        f"{MARKS[verdict.verdict]} {words}" + " (advisory)" * verdict.advisory,
    )


def _markdown(text: str) -> str:
    """Names come from users and models: nothing in them may become markup."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~@])", r"\\\1", text)


def annotations(report: GateReport | Exception) -> list[str]:
    """GitHub workflow commands: errors for what failed, warnings for what is undecided."""
    if isinstance(report, Exception):
        title = _property(f"kd-bench check: {NO_VERDICT}")
        return [f"::error title={title}::{_message(_why(report))}"]
    found = [
        ("error" if v.verdict == "regressed" else "warning", v.name, v.sentence)
        for v in report.verdicts
        if (v.verdict in ("regressed", "inconclusive") or _small_drop(v)) and not v.advisory
    ]
    found += [
        ("error" if r.state == "failed" else "warning", r.name, r.sentence)
        for r in report.rules
        if r.state in ("failed", "inconclusive")
    ]
    return [
        f"::{level} title={_property(f'kd-bench check: {name}')}::{_message(text)}"
        for level, name, text in found
    ]


def _message(text: str) -> str:
    """docs.github.com/actions: percent and line ends are encoded in a workflow command."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _message(text).replace(":", "%3A").replace(",", "%2C")


def append_summary(report: GateReport | Exception, path: Path) -> None:
    """Append the job summary to a file: GitHub gathers those of all steps of a job in one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="replace") as stream:
        stream.write(job_summary(report))
