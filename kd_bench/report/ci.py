"""The gate's ending for machines that run CI: JUnit XML, GitHub job summary, annotations.

Every ending is told, also that there is no verdict: a job whose file is missing looks like a job
that had nothing to say.
"""

import re
import xml.etree.ElementTree as ET
from pathlib import Path

from kd_bench.errors import KdBenchError, one_line
from kd_bench.files import write_text
from kd_bench.gate import NOT_WORSE, GateReport, Verdict

MARKS = {"improved": "▲", NOT_WORSE: "=", "regressed": "▼", "inconclusive": "?"}
NO_VERDICT = "no verdict"
HEADERS = ("benchmark", "baseline", "candidate", "difference", "95 % interval", "decided by",
           "margin", "p (Holm)", "units", "fixed", "broken", "verdict")  # fmt: skip
# XML 1.0 has no way to write these.
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _cells(verdict: Verdict) -> tuple[str, ...]:
    change, test = verdict.difference, verdict.non_inferiority
    words = verdict.verdict + (" (real drop)" if _small_drop(verdict) else "")
    return (
        verdict.name,
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
        f"{MARKS[verdict.verdict]} {words}" + (" (advisory)" if verdict.advisory else ""),
    )


def _small_drop(verdict: Verdict) -> bool:
    return verdict.real_drop and verdict.verdict == NOT_WORSE


# --- JUnit -----------------------------------------------------------------------------------


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
        return _suite_xml(suite)
    _properties(suite, report)
    for verdict in report.verdicts:
        name = _xml(verdict.name)
        case = ET.SubElement(suite, "testcase", classname="kd-bench.check", name=name)
        _outcome(case, verdict.verdict, verdict.sentence, advisory=verdict.advisory)
    for rule in report.rules:
        case = ET.SubElement(suite, "testcase", classname="kd-bench.rules", name=_xml(rule.name))
        _outcome(case, rule.state, rule.sentence)
    ET.SubElement(suite, "system-out").text = _xml(
        "\n".join((report.statement, *report.warnings, *report.notes, report.policy_line))
    )
    return _suite_xml(suite)


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


def _suite_xml(suite: ET.Element) -> str:
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    ET.indent(suite)
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suite, encoding="unicode") + "\n"
    )


def _why(error: Exception) -> str:
    """The error as the command line shows it."""
    told = one_line(error)
    return told if isinstance(error, KdBenchError) else f"{type(error).__name__}: {told}"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def _outcome(case: ET.Element, state: str, sentence: str, advisory: bool = False) -> None:
    text = _xml(sentence)
    if state in ("regressed", "failed") and not advisory:
        ET.SubElement(case, "failure", message=text, type=state)
    elif state in ("inconclusive", "not checked") or advisory:
        ET.SubElement(case, "skipped", message=text)
    ET.SubElement(case, "system-out").text = text


def write_junit(report: GateReport | Exception, path: Path) -> None:
    """Write the JUnit file atomically."""
    write_text(path, junit_xml(report))


# --- GitHub ----------------------------------------------------------------------------------


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
    rows = [[_markdown(cell) for cell in _cells(verdict)] for verdict in report.verdicts]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", f"- {_markdown(report.statement)}"]
    lines += [f"- **{_markdown(warning)}**" for warning in report.warnings]
    lines += [f"- **{_markdown(r.name)}** {r.state}: {_markdown(r.sentence)}" for r in report.rules]
    lines += [f"- {_markdown(note)}" for note in (*report.notes, report.policy_line)]
    return "\n".join(lines) + "\n"


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
