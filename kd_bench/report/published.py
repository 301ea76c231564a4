"""What papers published, and the measured rows beside it where that is fair."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd_bench.errors import NotComparableError, UsageError
from kd_bench.records import AVERAGE
from kd_bench.registry import Published, TaskSpec, load_suite, load_tasks, published
from kd_bench.report.board import Board, TaskInfo, task_info
from kd_bench.report.tables import Cell, Column, Row, Table

if TYPE_CHECKING:
    import pandas as pd


def published_tables() -> tuple[Table | None, Table | None]:
    """The Switch-KD paper's rows, and all others, on the papers' 0-100 scale.

    Each benchmark's heading says how far its column may be compared with measured rows.
    """
    try:
        frame = published()
        known = {spec.id: spec for spec in load_tasks()}
        specs = [known[name] for name in load_suite("ten").tasks]
    except (UsageError, OSError, ValueError):
        return None, None
    if frame.empty:
        return None, None
    paper = frame["source"].str.contains("Switch-KD", na=False)
    first = _published(frame[paper], specs, "Rows of the Switch-KD paper's tables")
    rest = _published(frame[~paper], specs, f"{int((~paper).sum())} rows of related work")
    return first, rest


def _published(frame: "pd.DataFrame", specs: list[TaskSpec], title: str) -> Table:
    notes: list[str] = []

    def note(text: str) -> int:
        if text not in notes:
            notes.append(text)
        return notes.index(text)

    columns = [Column("method", "Method", "text"), Column("llm", "Language model", "text")]
    for spec in specs:
        info = task_info(spec)
        marks: tuple[int, ...] = ()
        if spec.published.verdict != "comparable":
            marks = (note(_verdict(spec.published)),)
        columns.append(Column(spec.id, info.short, "score", notes=marks))
    columns += [Column(AVERAGE, "Avg", "score"), Column("source", "Source", "text")]
    rows = []
    for number, record in enumerate(frame.to_dict("records")):
        model, _, remark = str(record["llm"]).partition(" (")
        cells = [
            Cell(str(record["method"])),
            Cell(model, notes=(note(remark.rstrip(")")),) if remark else ()),
            *(Cell(_on_scale(record, spec.published.column)) for spec in specs),
        ]
        kind = _text(record.get("avg_kind"))
        marks = (
            (note(f"{kind}: a mean over fewer benchmarks"),) if kind not in ("", "avg10") else ()
        )
        cells += [Cell(_value(record.get("avg")), notes=marks), Cell(_text(record["source"]))]
        rows.append(Row(f"published-{number}", tuple(cells)))
    return Table(title, tuple(columns), tuple(rows), notes=tuple(notes))


def paper_table(board: Board) -> Table | None:
    """Measured rows beside the Switch-KD paper's 0.5B rows; None where that would mislead.

    The average is over the benchmarks that the paper has and whose protocols, by the profiles of
    the measured rows, allow the comparison; for both sides. Mini scores are never put beside
    published ones.
    """
    if board.mini or not board.entries:
        return None
    try:
        frame = published()
    except (UsageError, OSError, ValueError):
        return None
    said = {task.id: _said(board, task) for task in board.tasks}
    fair = [
        task
        for task, about in said.items()
        if about is not None and about.verdict != "not comparable" and about.column in frame
    ]
    doubtful = {
        task: _verdict(about)
        for task, about in said.items()
        if about is not None and about.verdict != "comparable"
    }
    notes = list(dict.fromkeys(doubtful.values()))
    places = {task: (notes.index(text),) for task, text in doubtful.items()}
    columns = (
        Column("method", "Method", "text"),
        *(
            Column(task.id, task.short, "score", task.group, places.get(task.id, ()))
            for task in board.tasks
        ),
        Column(AVERAGE, f"Avg of {len(fair)} comparable", "score"),
    )
    rows = []
    for entry in board.entries:
        values = {task.id: entry.score(task.id) for task in board.tasks}
        cells = [Cell(s.value if s.known else None, s.spread) for s in values.values()]
        fair_values = [values[task].value for task in fair]
        rows.append(
            Row(entry.key, (Cell(entry.label), *cells, _mean(fair_values)), "Measured here")
        )
    for number, record in enumerate(_paper_rows(frame)):
        scores = {
            task: None if about is None else _on_scale(record, about.column)
            for task, about in said.items()
        }
        cells = [Cell(value) for value in scores.values()]
        mean = _mean([scores[task] for task in fair])
        rows.append(Row(f"paper-{number}", (Cell(str(record["method"])), *cells, mean), PAPER))
    return Table("Beside the paper", columns, tuple(rows), notes=tuple(notes))


def comparison(board: Board, with_what: str) -> Table:
    """The table behind `--compare`.

    Raises:
        UsageError: there is nothing of that name to compare with.
        NotComparableError: the board is of the embedded mini world.
    """
    if with_what != "paper":
        raise UsageError(f"Nothing called {with_what!r} to compare with.", "Known: paper.")
    table = paper_table(board)
    if table is None:
        raise NotComparableError(
            "These runs cannot stand beside the paper's: they are of the embedded mini world.",
            "Evaluate with --suite ten.",
        )
    return table


PAPER = "Switch-KD paper, 0.5B students"


def _paper_rows(frame: "pd.DataFrame") -> list[dict[Any, Any]]:
    """The 0.5B rows of the Switch-KD repository's ten-benchmark table."""
    paper = frame["source"].str.contains("Switch-KD", na=False)
    small = frame["params_llm_b"].astype(str).isin(["0.5", ".5"])
    return list(frame[paper & small].to_dict("records"))


def _mean(values: Sequence[float | None]) -> Cell:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return Cell(sum(known) / len(known)) if known and len(known) == len(values) else Cell()


def _said(board: Board, task: TaskInfo) -> Published | None:
    """What the registry says about published numbers, by the profile that the rows share.

    Rows of several profiles get the benchmark's own word, which is that of its default profile.
    """
    if task.spec is None:
        return None
    found = [results.get(task.id) for entry in board.entries for results in entry.results]
    profiles = {result.profile for result in found if result is not None}
    variant = task.spec.profiles.get(profiles.pop()) if len(profiles) == 1 else None
    return (variant.published if variant is not None else None) or task.spec.published


def _verdict(about: Published) -> str:
    """Whether a published number may stand beside a measured one, and why not quite."""
    return f"{about.verdict.capitalize()}: {about.why}"


def _on_scale(record: dict[Any, Any], column: str) -> float | None:
    value = _value(record.get(column))
    raw = column == "mme" and _text(record.get("mme_unit")).startswith("perception raw")
    return value / 20 if raw and value is not None else value


def _value(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)
