"""What stands beside the measured rows: published numbers, and where each run comes from."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kd_bench.errors import UsageError
from kd_bench.records import RunManifest
from kd_bench.registry import TaskSpec, load_suite, load_task, published
from kd_bench.report.frames import TaskInfo, task_infos
from kd_bench.report.tables import Cell, Column, Row, Table, format_number

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["published_tables", "run_facts"]


def published_tables() -> tuple[Table | None, Table | None]:
    """The Switch-KD paper's rows, and all others, on the papers' 0-100 scale.

    Each benchmark's heading says how far its column may be compared with measured rows.
    """
    try:
        frame = published()
        specs = [load_task(name) for name in load_suite("ten").tasks]
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
        info = _info(spec)
        marks: tuple[int, ...] = ()
        if spec.published.verdict != "comparable":
            marks = (note(f"{spec.published.verdict} with a measured row: {spec.published.why}"),)
        columns.append(Column(spec.id, info.short, "score", info.group, marks))
    columns += [Column("average", "Avg", "score"), Column("source", "Source", "text")]
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


def _info(spec: TaskSpec) -> TaskInfo:
    return task_infos([spec.id])[0]


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


def run_facts(manifest: RunManifest) -> list[tuple[str, str]]:
    """Name and text of what a reader needs to judge a run and to make it again."""
    model, protocol, provenance = manifest.model, manifest.protocol, manifest.provenance
    facts = [
        ("Run", manifest.run_id),
        (
            "Status",
            manifest.status + ("" if not manifest.notes else ": " + "; ".join(manifest.notes)),
        ),
        ("Checkpoint", model.path),
        ("Weights digest", model.weights_digest),
        ("Architecture", model.architecture),
        ("Parameters", format_number(manifest.cost.parameters, "count")),
        ("Method", model.method),
        ("Seed", "" if model.seed is None else str(model.seed)),
        ("Suite", protocol.suite + ("" if protocol.limit is None else f", first {protocol.limit}")),
        ("Profiles", ", ".join(f"{k}: {v}" for k, v in sorted(protocol.profiles.items()))),
        ("Number type", protocol.dtype),
        ("Batch size", "" if protocol.batch_size is None else str(protocol.batch_size)),
        ("Engine", protocol.engine),
        ("Evaluated", manifest.finished or manifest.created),
    ]
    facts += [(_title(name), text) for name, text in _flatten(provenance)]
    facts += [
        (_title(f"training {name}"), text) for name, text in _flatten(manifest.training or {})
    ]
    return [(name, text) for name, text in facts if text and text != "–"]


def _flatten(
    mapping: dict[str, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, str]]:
    """Leaves of a nested mapping as (`outer inner`, text); long lists are cut."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and depth < 2:
            yield from _flatten(value, f"{name} ", depth + 1)
        elif isinstance(value, list | tuple):
            joined = " ".join(map(str, value)) if key == "command" else ", ".join(map(str, value))
            yield name, _cut(joined)
        elif value is not None:
            yield name, _cut(str(value))


def _cut(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " …"


def _title(name: str) -> str:
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]
