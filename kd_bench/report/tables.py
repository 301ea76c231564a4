"""The one table model: numbers with their uncertainty, how people read them, and six renderings.

A `Table` holds numbers, not text; each rendering formats them by the column's kind: terminal,
Markdown, LaTeX, HTML, and in full precision CSV and JSON. Names come from models and data, so every
rendering makes them inert in its own language.
"""

import csv
import html
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kd_bench.records import Interval

Kind = Literal[
    "text", "score", "difference", "percent", "rank", "count", "bytes", "milliseconds", "hours"
]


@dataclass(frozen=True)
class Column:
    """A column; `group` puts neighbours under one heading, `notes` are indices as in a cell.

    Attributes:
        interval: intervals are shown beside the values; always so in a column of differences.
        description: what the page tells of the heading.
    """

    key: str
    title: str
    kind: Kind = "score"
    group: str = ""
    notes: tuple[int, ...] = ()
    interval: bool = False
    description: str = ""

    @property
    def heading(self) -> str:
        """The title with the numbers of its notes."""
        return clean(self.title) + note_numbers(self.notes)


@dataclass(frozen=True)
class Cell:
    """A value with its uncertainty.

    Attributes:
        value: a number, a text, or None where nothing was measured.
        emphasis: `best` (also all that are not significantly behind) or `second`.
        notes: indices into the table's notes.
        remark: stands in brackets behind a text.
        detail: lines that the page shows when the cell is pointed at.
        doubt: must not be read beside the other rows' numbers.
    """

    value: float | str | None = None
    spread: float | None = None
    interval: Interval | None = None
    emphasis: Literal["", "best", "second"] = ""
    notes: tuple[int, ...] = ()
    remark: str = ""
    detail: tuple[str, ...] = ()
    doubt: bool = False

    @property
    def full(self) -> float | str | None:
        """The value in full precision, a text with its remark."""
        return f"{self.value} ({self.remark})" if self.remark else self.value


@dataclass(frozen=True)
class Row:
    """One row; rows with equal `section` stand under one heading.

    Attributes:
        role: what the page filters by.
        series: the number of the row's colour in the plots.
        flag: a word of warning beside the name.
    """

    key: str
    cells: tuple[Cell, ...]
    section: str = ""
    role: str = ""
    series: int | None = None
    flag: str = ""

    @classmethod
    def of(cls, key: str, *values: "Cell | float | str | None", section: str = "") -> "Row":
        """A row of cells, or of values without uncertainty."""
        cells = (value if isinstance(value, Cell) else Cell(value) for value in values)
        return cls(key, tuple(cells), section)


class Notes:
    """Numbers each distinct note once, in order of appearance."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, *texts: str) -> tuple[int, ...]:
        """Indices of notes, new ones added."""
        self.texts += [text for text in dict.fromkeys(texts) if text not in self.texts]
        return tuple(map(self.texts.index, texts))


@dataclass(frozen=True)
class Table:
    """Columns, rows in order, and numbered notes that cells refer to.

    Attributes:
        warning: what every rendering must say, whatever else it leaves out.
        legend: what the emphasis means; `{second}` is replaced by what the rendering uses.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    caption: str = ""
    notes: tuple[str, ...] = ()
    warning: str = ""
    legend: str = ""


def note_numbers(notes: tuple[int, ...]) -> str:
    """` (1) (2)` for notes 0 and 1."""
    return "".join(f" ({note + 1})" for note in notes)


def clean(text: str) -> str:
    """One line without control, bidirectional-override or unpaired surrogate characters."""
    if text.isprintable():  # nearly every text: nothing to take out, no line to join
        return " ".join(text.split())
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
    if kind == "hours":
        return f"{value:.0f} h" if value >= 100 else f"{value:.3g} h"
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


def format_cell(cell: Cell, column: Column, *, spread: bool = True) -> str:
    """The value with its uncertainty in one line: `66.8 ± 0.4`, `+3.6 [−0.2, +7.4]`.

    The spread over seeds stands before the interval: a column that shows its intervals does so
    where there is no spread, a column of differences always.
    """
    text = format_number(cell.full, column.kind)
    if isinstance(cell.value, str) or text == "–":
        return text
    several = cell.spread is not None and math.isfinite(cell.spread)
    if (spread or column.interval) and several:
        text += f" ± {cell.spread:.1f}"
    if column.kind == "difference" or (column.interval and not several):
        text += f" [{ends}]" if (ends := format_interval(cell, column.kind, ", ")) else ""
    return text


def format_interval(cell: Cell, kind: Kind, between: str = " to ") -> str:
    """The two ends of a cell's interval, without unit; empty where there is none."""
    if cell.interval is None:
        return ""
    plain: Kind = "score" if kind in ("percent", "milliseconds") else kind
    low, high = (format_number(end, plain) for end in (cell.interval.low, cell.interval.high))
    return f"{low}{between}{high}"


def sections(table: Table) -> Iterator[tuple[str, list[Row]]]:
    """Neighbouring rows under their heading, which may be empty."""
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        yield section, list(rows)


# --- terminal ------------------------------------------------------------------------------------


def to_terminal(table: Table, console: Console | None = None, width: int = 100) -> str:
    """Print to `console`, or return plain text; wide tables fold by column group."""
    sink = io.StringIO()
    target = console or Console(
        file=sink, width=width, color_system=None, legacy_windows=False, force_terminal=False
    )
    lines = [
        [
            format_cell(cell, column, spread=False) + note_numbers(cell.notes)
            for column, cell in zip(table.columns, row.cells, strict=True)
        ]
        for row in table.rows
    ]
    above = [(table.title, "bold"), (table.warning, "bold"), (table.caption, "dim")]
    below = [table.legend.format(second="underlined")]
    below += [f"({number}) {note}" for number, note in enumerate(table.notes, 1)]
    for text, style in above:
        if text:
            target.print(Text(clean(text), style=style))
    for block in _blocks(table, lines, min(width, target.width)):
        target.print(_rich_block(table, lines, block))
    for text in filter(None, below):
        target.print(Text(clean(text), style="dim"))
    plain = sink.getvalue().removesuffix("\n").split("\n")
    return "".join(line.rstrip() + "\n" for line in plain)


def _blocks(table: Table, lines: list[list[str]], width: int) -> list[list[int]]:
    """Column indices by block: whole groups, as many as fit beside the first column."""
    headings = [column.heading for column in table.columns]
    sizes = [
        max(Text(text).cell_len for text in texts) + 2
        for texts in zip(headings, *lines, strict=True)
    ]
    first = min(sizes[0], 32)
    places = groupby(range(1, len(sizes)), key=lambda index: table.columns[index].group)
    blocks: list[list[int]] = []
    used = 0
    for group in (list(members) for _, members in places):
        if not blocks or used + sum(sizes[index] for index in group) > width:
            blocks.append([])
            used = first
        for index in group:  # a group wider than the screen is broken inside
            if used + sizes[index] > width and blocks[-1]:
                blocks.append([])
                used = first
            blocks[-1].append(index)
            used += sizes[index]
    return blocks


def _rich_block(table: Table, lines: list[list[str]], block: list[int]) -> RichTable:
    rich = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True)
    rich.add_column(
        Text(clean(table.columns[0].title)), max_width=30, overflow="ellipsis", no_wrap=True
    )
    for index in block:
        column = table.columns[index]
        justify: Literal["left", "right"] = "left" if column.kind == "text" else "right"
        rich.add_column(Text(column.heading), justify=justify, no_wrap=True)
    styles = {"best": "bold", "second": "underline", "": ""}
    texts = iter(lines)
    for section, rows in sections(table):
        if section:
            rich.add_row(Text(clean(section), style="dim"))
        for row in rows:
            line = next(texts)
            cells = (Text(line[index], styles[row.cells[index].emphasis]) for index in block)
            rich.add_row(Text("  " * bool(section) + line[0]), *cells)
    return rich


# --- Markdown, LaTeX and HTML --------------------------------------------------------------------

Marks = dict[str, tuple[str, str]]
"""What stands before and after a text, by its emphasis."""
_MARKDOWN: Marks = {"best": ("**", "**"), "second": ("*", "*")}
_LATEX: Marks = {"best": (r"\textbf{", "}"), "second": (r"\underline{", "}")}
_HTML: Marks = {"best": ("<strong>", "</strong>"), "second": ("<u>", "</u>")}


def _texts(
    table: Table,
    row: Row,
    escape: Callable[[str], str],
    marks: Marks,
    numbers: Callable[[tuple[int, ...]], str],
) -> list[str]:
    """The cells of a row: escaped, then emphasized, then with the numbers of their notes."""
    texts = []
    for column, cell in zip(table.columns, row.cells, strict=True):
        before, after = marks.get(cell.emphasis, ("", ""))
        texts.append(before + escape(format_cell(cell, column)) + after + numbers(cell.notes))
    return texts


def column_groups(table: Table) -> list[tuple[str, int]]:
    """Neighbouring columns under one heading: the heading, and how many they are."""
    groups = groupby(table.columns, key=lambda column: column.group)
    return [(group, len(list(members))) for group, members in groups]


def to_markdown(table: Table) -> str:
    """A GitHub table: best bold, second in italics, notes numbered below."""
    lines = [f"### {md(table.title)}", ""]
    if table.warning:
        lines += [f"**{md(table.warning)}**", ""]
    if table.caption:
        lines += [md(table.caption), ""]
    lines.append("| " + " | ".join(md(column.heading) for column in table.columns) + " |")
    marks = ("---" if column.kind == "text" else "--:" for column in table.columns)
    lines.append("| " + " | ".join(marks) + " |")
    for section, rows in sections(table):
        if section:
            lines.append(f"| *{md(section)}* |" + " |" * (len(table.columns) - 1))
        texts = (_texts(table, row, md, _MARKDOWN, note_numbers) for row in rows)
        lines.extend(f"| {' | '.join(row)} |" for row in texts)
    if table.legend:
        lines += ["", md(table.legend.format(second="italics"))]
    if table.notes:
        lines.append("")
        lines.extend(f"{number}. {md(note)}" for number, note in enumerate(table.notes, 1))
    return "\n".join(lines) + "\n"


def md(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", clean(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "]": "{]}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "''",
    "−": "$-$", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$", "≤": r"$\le$", "≥": r"$\ge$",
}  # fmt: skip


def to_latex(table: Table) -> str:
    """A `tabular` with booktabs rules: best bold, second underlined."""
    spec = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    if any(column.group for column in table.columns):
        lines += _latex_groups(table)
    lines.append(" & ".join(tex(column.heading) for column in table.columns) + r" \\")
    whole = f"\\multicolumn{{{len(table.columns)}}}{{l}}{{%s}} \\\\"
    for section, rows in sections(table):
        lines.append("\\midrule")
        if section:
            lines.append(whole % f"\\emph{{{tex(section)}}}")
        texts = (_texts(table, row, tex, _LATEX, _latex_notes) for row in rows)
        lines.extend(" & ".join(row) + r" \\" for row in texts)
    lines.append("\\bottomrule")
    notes = [f"({number}) {note}" for number, note in enumerate(table.notes, 1)]
    if table.warning or table.legend:
        below = [table.warning, table.caption, table.legend.format(second="underlined"), *notes]
        lines += [whole % f"\\footnotesize {tex(text)}" for text in below if text]
    lines += ["\\end{tabular}", *(f"% {tex(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def _latex_groups(table: Table) -> list[str]:
    heads, rules, start = [], [], 1
    for group, count in column_groups(table):
        heads.append(f"\\multicolumn{{{count}}}{{c}}{{{tex(group)}}}")
        if group:
            rules.append(f"\\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    return [" & ".join(heads) + r" \\", " ".join(rules)]


def _latex_notes(notes: tuple[int, ...]) -> str:
    return f"$^{{{','.join(str(note + 1) for note in notes)}}}$" if notes else ""


def tex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_TEX.get(character, character) for character in clean(text))


def to_html(table: Table, *, stacked: bool = False) -> str:
    """A `<table>` fragment with scoped headings; every text is escaped.

    Args:
        stacked: intervals stand below their values.
    """
    parts = [f"<table><caption>{_h(table.title)}</caption><thead>"]
    if any(column.group for column in table.columns):
        parts.append("<tr>")
        for group, count in column_groups(table):
            tag = f'<th colspan="{count}" scope="colgroup">' if group else f'<td colspan="{count}">'
            parts.append(f"{tag}{_h(group)}</{tag[1:3]}>")
        parts.append("</tr>")
    # Numbers stand on the right.
    classes = ["" if column.kind == "text" else ' class="n"' for column in table.columns]
    parts.append("<tr>")
    for column, sort in zip(table.columns, classes, strict=True):
        title = _h(column.title) + _html_notes(column.notes)
        parts.append(f'<th scope="col"{sort}>{title}</th>')
    parts.append("</tr></thead>")
    for section, rows in sections(table):
        parts.append("<tbody>")
        if section:
            heading = f'<th colspan="{len(table.columns)}" scope="rowgroup">{_h(section)}</th>'
            parts.append(f'<tr class="section">{heading}</tr>')
        for row in rows:
            first, *others = (
                _stacked(table, row) if stacked else _texts(table, row, _h, _HTML, _html_notes)
            )
            cells = (f"<td{c}>{t}</td>" for c, t in zip(classes[1:], others, strict=True))
            parts.append(f'<tr><th scope="row"><bdi>{first}</bdi></th>{"".join(cells)}</tr>')
        parts.append("</tbody>")
    parts.append("</table>")
    if table.notes:
        notes = (f"<li>{_h(note)}</li>" for note in table.notes)
        parts.append(f'<ol class="notes">{"".join(notes)}</ol>')
    return "".join(parts)


def _stacked(table: Table, row: Row) -> list[str]:
    texts = []
    for column, cell in zip(table.columns, row.cells, strict=True):
        below = cell.remark or format_interval(cell, column.kind)
        small = f"<small>{_h(below)}</small>" if below else ""
        texts.append(_h(format_number(cell.value, column.kind)) + small)
    return texts


def _html_notes(notes: tuple[int, ...]) -> str:
    return "".join(f"<sup>{note + 1}</sup>" for note in notes)


def _h(text: str) -> str:
    return html.escape(clean(text))


# --- CSV and JSON --------------------------------------------------------------------------------

JSON_VERSION = 1


def to_csv(table: Table) -> str:
    """Full-precision numbers; spread and interval have columns of their own where they occur."""
    cells = [[row.cells[place] for row in table.rows] for place in range(len(table.columns))]
    spreads = [any(cell.spread is not None for cell in column) for column in cells]
    intervals = [any(cell.interval is not None for cell in column) for column in cells]
    header = ["section"]
    for column, spread, interval in zip(table.columns, spreads, intervals, strict=True):
        header += [column.key, *[f"{column.key}_spread"] * spread]
        header += [f"{column.key}_low", f"{column.key}_high"] * interval
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*header, "notes"])
    named = {note for row in table.rows for cell in row.cells for note in cell.notes}
    named |= {note for column in table.columns for note in column.notes}
    whole = [note for number, note in enumerate(table.notes) if number not in named]
    for row in table.rows:
        values: list[float | str | None] = [row.section]
        for cell, spread, interval in zip(row.cells, spreads, intervals, strict=True):
            values += [cell.full, *[cell.spread] * spread]
            ends = (cell.interval.low, cell.interval.high) if cell.interval else (None, None)
            values += ends * interval
        used = sorted({note for cell in row.cells for note in cell.notes})
        notes = [table.warning] * bool(table.warning) + [table.notes[note] for note in used]
        writer.writerow([*map(_csv_value, values), _csv_value("; ".join(notes + whole))])
    return stream.getvalue()


def _csv_value(value: float | str | None) -> str:
    """A number, or a text that a spreadsheet would not run as a formula."""
    if value is None or isinstance(value, str):
        text = clean(value or "")
        return "'" + text if text[:1] in ("=", "+", "-", "@") else text
    if not math.isfinite(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


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
    known: dict[str, Any] = {"value": _finite(cell.full)}
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
