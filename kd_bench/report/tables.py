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

__all__ = [
    "Cell",
    "Column",
    "Kind",
    "Row",
    "Table",
    "clean",
    "format_cell",
    "format_number",
    "note_numbers",
    "sections",
]

Kind = Literal["text", "score", "difference", "percent", "rank", "count", "bytes", "milliseconds"]


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
        return clean(self.title) + note_numbers(self.notes)


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


def format_cell(cell: Cell, kind: Kind, *, spread: bool = True) -> str:
    """Number, `± spread` over seeds; in a difference its interval carries the message, too."""
    text = format_number(cell.value, kind)
    if text == "–":
        return text
    if spread and cell.spread is not None and math.isfinite(cell.spread):
        text += f" ± {cell.spread:.1f}"
    if kind == "difference" and cell.interval is not None:
        low = format_number(cell.interval.low, kind)
        high = format_number(cell.interval.high, kind)
        text += f" [{low}, {high}]"
    return text


def sections(table: Table) -> Iterator[tuple[str, list[Row]]]:
    """Neighbouring rows under their heading, which may be empty."""
    for section, rows in groupby(table.rows, key=lambda row: row.section):
        yield section, list(rows)
