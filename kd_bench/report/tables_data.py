"""Tables for other programs: CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from kd_bench.report.tables import Cell, Table, clean

JSON_VERSION = 1


def to_csv(table: Table) -> str:
    """Full-precision numbers; spread and interval have columns of their own where they occur."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    plan = [
        (column, index, any(row.cells[index].spread is not None for row in table.rows),
         any(row.cells[index].interval is not None for row in table.rows))
        for index, column in enumerate(table.columns)
    ]  # fmt: skip
    header = ["section"]
    for column, _, spread, interval in plan:
        header.append(column.key)
        header += [f"{column.key}_spread"] * spread
        header += [f"{column.key}_low", f"{column.key}_high"] * interval
    writer.writerow([*header, "notes"])
    named = {note for row in table.rows for cell in row.cells for note in cell.notes}
    named |= {note for column in table.columns for note in column.notes}
    whole = [note for number, note in enumerate(table.notes) if number not in named]
    for row in table.rows:
        values = [_csv_text(row.section)]
        for _, index, spread, interval in plan:
            cell = row.cells[index]
            values.append(_csv_value(cell.text if isinstance(cell.value, str) else cell.value))
            if spread:
                values.append(_csv_value(cell.spread))
            if interval:
                values.append(_csv_value(cell.interval.low if cell.interval else None))
                values.append(_csv_value(cell.interval.high if cell.interval else None))
        used = sorted({note for cell in row.cells for note in cell.notes})
        notes = [table.warning] * bool(table.warning) + [table.notes[note] for note in used]
        notes += whole
        writer.writerow([*values, _csv_text("; ".join(notes))])
    return stream.getvalue()


def _csv_value(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return _csv_text(value or "")
    if not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _csv_text(text: str) -> str:
    """A spreadsheet would run a text that starts like a formula."""
    text = clean(text)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def to_json_text(tables: Sequence[Table]) -> str:
    """All tables with a version; numbers that are not finite become null."""
    value = {"version": JSON_VERSION, "tables": [_json_table(table) for table in tables]}
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _json_table(table: Table) -> dict[str, Any]:
    return {
        "title": clean(table.title),
        "caption": clean(table.caption),
        **({"warning": clean(table.warning)} if table.warning else {}),
        "columns": [
            {"key": c.key, "title": clean(c.title), "kind": c.kind, "group": c.group}
            for c in table.columns
        ],
        "rows": [
            {
                "key": row.key,
                "section": clean(row.section),
                "cells": {
                    column.key: _json_cell(cell)
                    for column, cell in zip(table.columns, row.cells, strict=True)
                },
            }
            for row in table.rows
        ],
        "notes": [clean(note) for note in table.notes],
    }


def _json_cell(cell: Cell) -> dict[str, Any]:
    value = cell.text if isinstance(cell.value, str) else cell.value
    known: dict[str, Any] = {"value": _finite(value)}
    if cell.spread is not None:
        known["spread"] = _finite(cell.spread)
    if cell.interval is not None:
        low, high = _finite(cell.interval.low), _finite(cell.interval.high)
        known["interval"] = {"low": low, "high": high, "level": cell.interval.level}
    if cell.emphasis:
        known["emphasis"] = cell.emphasis
    if cell.notes:
        known["notes"] = list(cell.notes)
    return known


def _finite(value: float | str | None) -> float | str | None:
    if isinstance(value, str):
        return clean(value)
    return None if value is None or not math.isfinite(value) else round(value, 6)
