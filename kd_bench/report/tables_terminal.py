"""A table on a console: wide ones fold by column group."""

import io
from itertools import groupby
from typing import Literal

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from kd_bench.report.tables import Table, clean, format_cell, note_numbers, sections


def to_terminal(table: Table, console: Console | None = None, width: int = 100) -> str:
    """Print to `console`, or return plain text; wide tables fold by column group."""
    sink = io.StringIO()
    target = console or Console(
        file=sink, width=width, color_system=None, legacy_windows=False, force_terminal=False
    )
    width = min(width, target.width)
    target.print(Text(clean(table.title), style="bold"))
    if table.warning:
        target.print(Text(clean(table.warning), style="bold"))
    if table.caption:
        target.print(Text(clean(table.caption), style="dim"))
    for block in _blocks(table, width):
        target.print(_rich_block(table, block))
    if table.legend:
        target.print(Text(clean(table.legend.format(second="underlined")), style="dim"))
    for number, note in enumerate(table.notes, 1):
        target.print(Text(f"({number}) {clean(note)}", style="dim"))
    return (
        "\n".join(line.rstrip() for line in sink.getvalue().removesuffix("\n").split("\n")) + "\n"
    )


def _texts(table: Table, index: int) -> list[str]:
    column = table.columns[index]
    return [
        format_cell(row.cells[index], column, spread=False) + note_numbers(row.cells[index].notes)
        for row in table.rows
    ]


def _blocks(table: Table, width: int) -> list[list[int]]:
    """Column indices by block: whole groups, as many as fit beside the first column."""

    def size(index: int) -> int:
        texts = [table.columns[index].heading, *_texts(table, index)]
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
    texts = {index: iter(_texts(table, index)) for index in [0, *block]}
    for section, rows in sections(table):
        if section:
            rich.add_row(Text(clean(section), style="dim"))
        for row in rows:
            cells = [Text(("  " if section else "") + next(texts[0]))]
            for index in block:
                style = {"best": "bold", "second": "underline", "": ""}[row.cells[index].emphasis]
                cells.append(Text(next(texts[index]), style=style))
            rich.add_row(*cells)
    return rich
