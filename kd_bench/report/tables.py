"""The one table model: numbers with their uncertainty, and how people read them.

A `Table` holds numbers, not text; each rendering formats them by the column's kind. Names come from
models and data, so every rendering makes them inert in its own language.

tables_terminal.py  text that folds to the width of a console
tables_markup.py    Markdown, LaTeX and HTML
tables_data.py      CSV and JSON, in full precision
"""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

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
    def text(self) -> str:
        """A text with its remark."""
        return f"{self.value} ({self.remark})" if self.remark else f"{self.value}"


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

    def column(self, key: str) -> int:
        """The place of a column."""
        return next(i for i, column in enumerate(self.columns) if column.key == key)


def note_numbers(notes: tuple[int, ...]) -> str:
    """` (1) (2)` for notes 0 and 1."""
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
    if isinstance(cell.value, str):
        return clean(cell.text)
    text = format_number(cell.value, column.kind)
    if text == "–":
        return text
    several = cell.spread is not None and math.isfinite(cell.spread)
    if (spread or column.interval) and cell.spread is not None and several:
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
