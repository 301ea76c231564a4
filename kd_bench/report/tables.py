"""One table model, six renderings: terminal, Markdown, HTML, CSV, LaTeX and JSON.

A `Table` holds numbers, not text; each rendering formats them by the column's kind. Names come from
models and data, so every rendering makes them inert in its own language.
"""

import csv
import html as html_module
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kd_bench.records import Interval

__all__ = [
    "Cell",
    "Column",
    "Row",
    "Table",
    "clean",
    "format_number",
    "to_csv",
    "to_html",
    "to_json_text",
    "to_latex",
    "to_markdown",
    "to_terminal",
]

Kind = Literal["text", "score", "difference", "percent", "rank", "count", "bytes", "milliseconds"]
JSON_VERSION = 1


@dataclass(frozen=True)
class Column:
    """A column; `group` puts neighbours under one heading, `notes` are indices as in a cell."""

    key: str
    title: str
    kind: Kind = "score"
    group: str = ""
    notes: tuple[int, ...] = ()

    @property
    def heading(self) -> str:
        """The title with the numbers of its notes."""
        return clean(self.title) + _note_numbers(self.notes)


@dataclass(frozen=True)
class Cell:
    """A value with its uncertainty.

    Attributes:
        value: a number, a text, or None where nothing was measured.
        emphasis: `best` (also all that are not significantly behind) or `second`.
        notes: indices into the table's notes.
    """

    value: float | str | None = None
    spread: float | None = None
    interval: Interval | None = None
    emphasis: Literal["", "best", "second"] = ""
    notes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Row:
    """One row; rows with equal `section` stand under one heading."""

    key: str
    cells: tuple[Cell, ...]
    section: str = ""


@dataclass(frozen=True)
class Table:
    """Columns, rows in order, and numbered notes that cells refer to."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""
    notes: tuple[str, ...] = ()


def _note_numbers(notes: tuple[int, ...]) -> str:
    return "".join(f" ({note + 1})" for note in notes)


def clean(text: str) -> str:
    """One line without control, bidirectional-override or unpaired surrogate characters."""
    kept = (" " if c in "\t\n\r" else c for c in text if c in "\t\n\r" or not _hidden(c))
    return " ".join("".join(kept).split())


def _hidden(character: str) -> bool:
    kind = unicodedata.category(character)
    return (
        kind in ("Cc", "Cs")
        or character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    )


def format_number(value: float | str | None, kind: Kind) -> str:
    """A value as people read it; a dash where there is none."""
    if isinstance(value, str):
        return clean(value)
    if value is None or not math.isfinite(value):
        return "–"
    if kind == "difference":
        rounded = round(value, 1) + 0.0
        return "0.0" if rounded == 0 else f"{rounded:+.1f}".replace("-", "−")
    if kind == "rank":
        return f"{value:.0f}"
    if kind == "count":
        return _scaled(value, ((1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")))
    if kind == "bytes":
        return _scaled(value, ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (1, " B")))
    if kind == "milliseconds":
        return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"
    if kind == "percent":
        return f"{value:.1f} %".replace("-", "−")
    return f"{value:.1f}".replace("-", "−")


def _scaled(value: float, steps: Sequence[tuple[float, str]]) -> str:
    for size, unit in steps:
        if value >= size or size == 1:
            number = value / size
            digits = 0 if size == 1 or number >= 100 else 1
            return f"{number:.{digits}f}{unit}"
    return f"{value}"


def format_cell(cell: Cell, kind: Kind, *, spread: bool = True, interval: bool = True) -> str:
    """Number, `± spread` over seeds, `[low, high]`."""
    text = format_number(cell.value, kind)
    if text == "–":
        return text
    if spread and cell.spread is not None and math.isfinite(cell.spread):
        text += f" ± {cell.spread:.1f}"
    if interval and cell.interval is not None:
        plain: Kind = "score" if kind == "percent" else kind
        low = format_number(cell.interval.low, plain)
        high = format_number(cell.interval.high, plain)
        text += f" [{low}, {high}]"
    return text


def _has_intervals(table: Table, index: int) -> bool:
    """Intervals are printed in text where they carry the message: in difference columns."""
    return table.columns[index].kind == "difference"


def _sections(table: Table) -> Iterator[tuple[str, list[Row]]]:
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        yield section, list(rows)


# --- terminal ----------------------------------------------------------------------------------


def to_terminal(table: Table, console: Console | None = None, width: int = 100) -> str:
    """Print to `console`, or return plain text; wide tables fold by column group."""
    sink = io.StringIO()
    target = console or Console(
        file=sink, width=width, color_system=None, legacy_windows=False, force_terminal=False
    )
    width = min(width, target.width)
    target.print(Text(clean(table.title), style="bold"))
    if table.caption:
        target.print(Text(clean(table.caption), style="dim"))
    for block in _blocks(table, width):
        target.print(_rich_block(table, block))
    for number, note in enumerate(table.notes, 1):
        target.print(Text(f"({number}) {clean(note)}", style="dim"))
    return "\n".join(line.rstrip() for line in sink.getvalue().splitlines()) + "\n"


def _texts(table: Table, index: int, spread: bool) -> list[str]:
    column = table.columns[index]
    interval = _has_intervals(table, index)
    return [
        format_cell(row.cells[index], column.kind, spread=spread, interval=interval)
        + _note_numbers(row.cells[index].notes)
        for row in table.rows
    ]


def _blocks(table: Table, width: int) -> list[list[int]]:
    """Column indices by block: whole groups, as many as fit beside the first column."""

    def size(index: int) -> int:
        texts = [table.columns[index].heading, *_texts(table, index, spread=False)]
        return max(Text(text).cell_len for text in texts) + 2

    first = min(size(0), 32)
    groups = [
        [index for index, _ in members]
        for _, members in groupby(
            list(enumerate(table.columns))[1:], key=lambda pair: pair[1].group
        )
    ]
    blocks: list[list[int]] = []
    used = 0
    for group in groups:
        need = sum(size(index) for index in group)
        if not blocks or (used + need > width and blocks[-1]):
            blocks.append([])
            used = first
        for index in group:  # a group wider than the screen is broken inside
            if used + size(index) > width and blocks[-1]:
                blocks.append([])
                used = first
            blocks[-1].append(index)
            used += size(index)
    return blocks


def _rich_block(table: Table, block: list[int]) -> RichTable:
    rich = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True)
    rich.add_column(
        Text(clean(table.columns[0].title)), max_width=30, overflow="ellipsis", no_wrap=True
    )
    for index in block:
        column = table.columns[index]
        justify: Literal["left", "right"] = "left" if column.kind == "text" else "right"
        rich.add_column(Text(column.heading), justify=justify, no_wrap=True)
    texts = {index: iter(_texts(table, index, spread=False)) for index in [0, *block]}
    for section, rows in _sections(table):
        if section:
            rich.add_row(Text(clean(section), style="dim"))
        for row in rows:
            cells = [Text(("  " if section else "") + next(texts[0]))]
            for index in block:
                style = {"best": "bold", "second": "underline", "": ""}[row.cells[index].emphasis]
                cells.append(Text(next(texts[index]), style=style))
            rich.add_row(*cells)
    return rich


# --- Markdown ----------------------------------------------------------------------------------


def to_markdown(table: Table) -> str:
    """A GitHub table: best bold, second in italics, notes numbered below."""
    lines = [f"### {_md(table.title)}", ""]
    if table.caption:
        lines += [_md(table.caption), ""]
    lines.append("| " + " | ".join(_md(column.heading) for column in table.columns) + " |")
    marks = ("---" if column.kind == "text" else "--:" for column in table.columns)
    lines.append("| " + " | ".join(marks) + " |")
    for section, rows in _sections(table):
        if section:
            lines.append(f"| *{_md(section)}* |" + " |" * (len(table.columns) - 1))
        lines.extend(_markdown_row(table, row) for row in rows)
    if table.notes:
        lines.append("")
        lines.extend(f"{number}. {_md(note)}" for number, note in enumerate(table.notes, 1))
    return "\n".join(lines) + "\n"


def _markdown_row(table: Table, row: Row) -> str:
    texts = []
    for index, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
        text = _md(format_cell(cell, column.kind, interval=_has_intervals(table, index)))
        if cell.emphasis:
            sign = "**" if cell.emphasis == "best" else "*"
            text = f"{sign}{text}{sign}"
        texts.append(text + _note_numbers(cell.notes))
    return "| " + " | ".join(texts) + " |"


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", clean(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --- CSV ---------------------------------------------------------------------------------------


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
    for row in table.rows:
        values = [_csv_text(row.section)]
        for _, index, spread, interval in plan:
            cell = row.cells[index]
            values.append(_csv_value(cell.value))
            if spread:
                values.append(_csv_value(cell.spread))
            if interval:
                values.append(_csv_value(cell.interval.low if cell.interval else None))
                values.append(_csv_value(cell.interval.high if cell.interval else None))
        used = sorted({note for cell in row.cells for note in cell.notes})
        writer.writerow([*values, _csv_text("; ".join(table.notes[note] for note in used))])
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


# --- LaTeX -------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "]": "{]}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "''",
    "−": "$-$", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$", "≤": r"$\le$", "≥": r"$\ge$",
}  # fmt: skip


def to_latex(table: Table) -> str:
    """A `tabular` with booktabs rules: best bold, second underlined."""
    grouped = any(column.group for column in table.columns)
    spec = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    if grouped:
        lines += _latex_groups(table)
    lines.append(" & ".join(_tex(column.heading) for column in table.columns) + r" \\")
    for section, rows in _sections(table):
        lines.append("\\midrule")
        if section:
            title = _tex(section)
            lines.append(f"\\multicolumn{{{len(table.columns)}}}{{l}}{{\\emph{{{title}}}}} \\\\")
        lines.extend(_latex_row(table, row) for row in rows)
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"% ({number}) {_tex(note)}" for number, note in enumerate(table.notes, 1)]
    return "\n".join(lines) + "\n"


def _latex_groups(table: Table) -> list[str]:
    heads, rules, start = [], [], 1
    for group, members in groupby(table.columns, key=lambda column: column.group):
        count = len(list(members))
        heads.append(f"\\multicolumn{{{count}}}{{c}}{{{_tex(group)}}}")
        if group:
            rules.append(f"\\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    return [" & ".join(heads) + r" \\", " ".join(rules)]


def _latex_row(table: Table, row: Row) -> str:
    texts = []
    for index, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
        text = _tex(format_cell(cell, column.kind, interval=_has_intervals(table, index)))
        if cell.emphasis:
            macro = "textbf" if cell.emphasis == "best" else "underline"
            text = f"\\{macro}{{{text}}}"
        marks = ",".join(str(n + 1) for n in cell.notes)
        texts.append(text + (f"$^{{{marks}}}$" if marks else ""))
    return " & ".join(texts) + r" \\"


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in clean(text))


# --- HTML --------------------------------------------------------------------------------------


def to_html(table: Table) -> str:
    """A `<table>` fragment with scoped headings; every text is escaped."""
    parts = [f"<table><caption>{_h(table.title)}</caption><thead>"]
    if any(column.group for column in table.columns):
        parts.append("<tr>")
        for group, members in groupby(table.columns, key=lambda column: column.group):
            count = len(list(members))
            tag = f'<th colspan="{count}" scope="colgroup">' if group else f'<td colspan="{count}">'
            parts.append(f"{tag}{_h(group)}</{tag[1:3]}>")
        parts.append("</tr>")
    parts.append("<tr>")
    for column in table.columns:
        kind = "" if column.kind == "text" else ' class="n"'
        notes = "".join(f"<sup>{n + 1}</sup>" for n in column.notes)
        parts.append(f'<th scope="col"{kind}>{_h(column.title)}{notes}</th>')
    parts.append("</tr></thead>")
    for section, rows in _sections(table):
        parts.append("<tbody>")
        if section:
            heading = f'<th colspan="{len(table.columns)}" scope="rowgroup">{_h(section)}</th>'
            parts.append(f'<tr class="section">{heading}</tr>')
        parts.extend(_html_row(table, row) for row in rows)
        parts.append("</tbody>")
    parts.append("</table>")
    if table.notes:
        parts.append('<ol class="notes">')
        parts.extend(f"<li>{_h(note)}</li>" for note in table.notes)
        parts.append("</ol>")
    return "".join(parts)


def _html_row(table: Table, row: Row) -> str:
    parts = ["<tr>"]
    for index, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
        text = _h(format_cell(cell, column.kind, interval=_has_intervals(table, index)))
        if cell.emphasis:
            tag = "strong" if cell.emphasis == "best" else "u"
            text = f"<{tag}>{text}</{tag}>"
        text += "".join(f"<sup>{n + 1}</sup>" for n in cell.notes)
        if index == 0:
            parts.append(f'<th scope="row"><bdi>{text}</bdi></th>')
        else:
            kind = "" if column.kind == "text" else ' class="n"'
            parts.append(f"<td{kind}>{text}</td>")
    parts.append("</tr>")
    return "".join(parts)


def _h(text: str) -> str:
    return html_module.escape(clean(text))


# --- JSON --------------------------------------------------------------------------------------


def to_json_text(tables: Sequence[Table]) -> str:
    """All tables with a version; numbers that are not finite become null."""
    value = {"version": JSON_VERSION, "tables": [_json_table(table) for table in tables]}
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _json_table(table: Table) -> dict[str, Any]:
    return {
        "title": clean(table.title),
        "caption": clean(table.caption),
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
    known: dict[str, Any] = {"value": _finite(cell.value)}
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
