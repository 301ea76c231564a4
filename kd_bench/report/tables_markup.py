"""A table in Markdown, LaTeX and HTML.

The three share the order of work: escape, then emphasize, then number the notes.
"""

import html
import re
from collections.abc import Callable
from itertools import groupby

from kd_bench.report.tables import Column, Row, Table, clean, format_cell, note_numbers, sections

Marks = dict[str, tuple[str, str]]
"""What stands before and after a text, by its emphasis."""


def _texts(table: Table, row: Row, escape: Callable[[str], str], marks: Marks) -> list[str]:
    """The cells of a row, escaped and emphasized; without their notes."""
    texts = []
    for column, cell in zip(table.columns, row.cells, strict=True):
        before, after = marks.get(cell.emphasis, ("", ""))
        texts.append(before + escape(format_cell(cell, column)) + after)
    return texts


def column_groups(table: Table) -> list[tuple[str, int]]:
    """Neighbouring columns under one heading: the heading, and how many they are."""
    groups = groupby(table.columns, key=lambda column: column.group)
    return [(group, len(list(members))) for group, members in groups]


# --- Markdown ----------------------------------------------------------------------------------

_MARKDOWN: Marks = {"best": ("**", "**"), "second": ("*", "*")}


def to_markdown(table: Table) -> str:
    """A GitHub table: best bold, second in italics, notes numbered below."""
    lines = [f"### {_md(table.title)}", ""]
    if table.warning:
        lines += [f"**{_md(table.warning)}**", ""]
    if table.caption:
        lines += [_md(table.caption), ""]
    lines.append("| " + " | ".join(_md(column.heading) for column in table.columns) + " |")
    marks = ("---" if column.kind == "text" else "--:" for column in table.columns)
    lines.append("| " + " | ".join(marks) + " |")
    for section, rows in sections(table):
        if section:
            lines.append(f"| *{_md(section)}* |" + " |" * (len(table.columns) - 1))
        lines.extend(_markdown_row(table, row) for row in rows)
    if table.legend:
        lines += ["", _md(table.legend.format(second="italics"))]
    if table.notes:
        lines.append("")
        lines.extend(f"{number}. {_md(note)}" for number, note in enumerate(table.notes, 1))
    return "\n".join(lines) + "\n"


def _markdown_row(table: Table, row: Row) -> str:
    texts = _texts(table, row, _md, _MARKDOWN)
    noted = (text + note_numbers(cell.notes) for text, cell in zip(texts, row.cells, strict=True))
    return "| " + " | ".join(noted) + " |"


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    escaped = re.sub(r"([\\`*_{}\[\]|~#!])", r"\\\1", clean(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# --- LaTeX -------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "]": "{]}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': "''",
    "−": "$-$", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$", "≤": r"$\le$", "≥": r"$\ge$",
}  # fmt: skip
_LATEX: Marks = {"best": (r"\textbf{", "}"), "second": (r"\underline{", "}")}


def to_latex(table: Table) -> str:
    """A `tabular` with booktabs rules: best bold, second underlined."""
    grouped = any(column.group for column in table.columns)
    spec = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    lines = ["% needs \\usepackage{booktabs}", f"\\begin{{tabular}}{{{spec}}}", "\\toprule"]
    if grouped:
        lines += _latex_groups(table)
    lines.append(" & ".join(tex(column.heading) for column in table.columns) + r" \\")
    for section, rows in sections(table):
        lines.append("\\midrule")
        if section:
            title = tex(section)
            lines.append(f"\\multicolumn{{{len(table.columns)}}}{{l}}{{\\emph{{{title}}}}} \\\\")
        lines.extend(_latex_row(table, row) for row in rows)
    lines.append("\\bottomrule")
    below = [table.warning, table.caption, table.legend.format(second="underlined")]
    below += [f"({number}) {note}" for number, note in enumerate(table.notes, 1)]
    for text in filter(None, below if table.warning or table.legend else []):
        lines.append(
            f"\\multicolumn{{{len(table.columns)}}}{{l}}{{\\footnotesize {tex(text)}}} \\\\"
        )
    lines.append("\\end{tabular}")
    lines += [f"% ({number}) {tex(note)}" for number, note in enumerate(table.notes, 1)]
    return "\n".join(lines) + "\n"


def _latex_groups(table: Table) -> list[str]:
    heads, rules, start = [], [], 1
    for group, count in column_groups(table):
        heads.append(f"\\multicolumn{{{count}}}{{c}}{{{tex(group)}}}")
        if group:
            rules.append(f"\\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    return [" & ".join(heads) + r" \\", " ".join(rules)]


def _latex_row(table: Table, row: Row) -> str:
    texts = _texts(table, row, tex, _LATEX)
    for index, cell in enumerate(row.cells):
        if cell.notes:
            texts[index] += f"$^{{{','.join(str(note + 1) for note in cell.notes)}}}$"
    return " & ".join(texts) + r" \\"


def tex(text: str) -> str:
    """Text that LaTeX shows as it is."""
    return "".join(_TEX.get(character, character) for character in clean(text))


# --- HTML --------------------------------------------------------------------------------------

_HTML: Marks = {"best": ("<strong>", "</strong>"), "second": ("<u>", "</u>")}


def to_html(table: Table) -> str:
    """A `<table>` fragment with scoped headings; every text is escaped."""
    parts = [f"<table><caption>{_h(table.title)}</caption><thead>"]
    if any(column.group for column in table.columns):
        parts.append("<tr>")
        for group, count in column_groups(table):
            tag = f'<th colspan="{count}" scope="colgroup">' if group else f'<td colspan="{count}">'
            parts.append(f"{tag}{_h(group)}</{tag[1:3]}>")
        parts.append("</tr>")
    parts.append("<tr>")
    for column in table.columns:
        title = _h(column.title) + _html_notes(column.notes)
        parts.append(f'<th scope="col"{_html_class(column)}>{title}</th>')
    parts.append("</tr></thead>")
    for section, rows in sections(table):
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
    texts = _texts(table, row, _h, _HTML)
    for index, (column, cell) in enumerate(zip(table.columns, row.cells, strict=True)):
        text = texts[index] + _html_notes(cell.notes)
        if index == 0:
            parts.append(f'<th scope="row"><bdi>{text}</bdi></th>')
        else:
            parts.append(f"<td{_html_class(column)}>{text}</td>")
    parts.append("</tr>")
    return "".join(parts)


def _html_notes(notes: tuple[int, ...]) -> str:
    return "".join(f"<sup>{note + 1}</sup>" for note in notes)


def _html_class(column: Column) -> str:
    """Numbers stand on the right."""
    return "" if column.kind == "text" else ' class="n"'


def _h(text: str) -> str:
    return html.escape(clean(text))
