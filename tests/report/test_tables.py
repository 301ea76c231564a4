"""The six renderings of one table: golden files, hostile text, width, ties."""

import csv
import io
import json
import os
import re
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from kd_bench.records import Interval
from kd_bench.report.tables import (
    Cell,
    Column,
    Row,
    Table,
    clean,
    format_number,
    to_csv,
    to_html,
    to_json_text,
    to_latex,
    to_markdown,
    to_terminal,
)

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTILE = [
    "[1cm] starts with a bracket",
    "<img src=x onerror=alert(1)>",
    '=HYPERLINK("http://x")',
    "\\input{/etc/passwd} 50% & _$^~#",
    "a|b\nc\td\x1b[31mred\x00",
    "[link](javascript:alert(1)) **bold** `code` ![i](x)",
    "\u202eevil\u202c שלום عربى 中文 模型",
]


def table() -> Table:
    """Every kind of column, sections, emphasis, notes, gaps."""
    columns = (
        Column("model", "Model", "text"),
        Column("mme", "MME", "score", "perception"),
        Column("gqa", "GQA", "score", "cognition", notes=(1,)),
        Column("difference", "Δ SFT", "difference", "relation"),
        Column("retention", "Retention", "percent", "relation"),
        Column("parameters", "Params", "count", "cost"),
        Column("weight_bytes", "Weights", "bytes", "cost"),
        Column("latency_ms", "Latency", "milliseconds", "cost"),
    )
    rows = (
        Row(
            "teacher",
            (
                Cell("teacher"), Cell(91.25), Cell(88.0), Cell(), Cell(),
                Cell(3_100_000_000), Cell(6.2e9), Cell(120.0),
            ),
            "Teacher (ceiling)",
        ),
        Row(
            "switch",
            (
                Cell("Switch-KD (3 seeds)"),
                Cell(66.84, 0.42, Interval(64.0, 69.5), "best"),
                Cell(61.6, 1.0, None, "best", (0,)),
                Cell(3.61, None, Interval(-0.2, 7.4)),
                Cell(90.8, None, Interval(88.0, 93.1)),
                Cell(610_000), Cell(2_440_000), Cell(11.04),
            ),
            "Distilled students",
        ),
        Row(
            "sft",
            (
                Cell("SFT"), Cell(63.2, None, None, "second"), Cell(float("nan")),
                Cell(-0.04), Cell(85.0), Cell(999), Cell(512), Cell(None),
            ),
            "SFT (floor)",
        ),
    )  # fmt: skip
    return Table("Leaderboard", columns, rows, "± over seeds.", ("12.0% unparsed", "Near: dev"))


@pytest.mark.parametrize(
    "name,render",
    [
        ("table.md", to_markdown),
        ("table.csv", to_csv),
        ("table.tex", to_latex),
        ("table.html", to_html),
        ("table.txt", to_terminal),
        ("table.json", lambda value: to_json_text([value])),
    ],
)
def test_golden(name: str, render) -> None:  # type: ignore[no-untyped-def]
    """Renew with UPDATE_GOLDEN=1 and read the difference."""
    path = GOLDEN / name
    text = render(table())
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8", newline="\n")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [100, 72, 50])
def test_the_terminal_rendering_keeps_its_width(width: int) -> None:
    wide = Table("T", tuple(Column(f"c{i}", f"Column{i}", "score", f"g{i // 3}") if i else
                            Column("m", "Model", "text") for i in range(16)),
                 (Row("r", (Cell("模型" * 30), *(Cell(55.5) for _ in range(15)))),))  # fmt: skip
    text = to_terminal(wide, width=width)
    assert max(map(cell_len, text.splitlines())) <= width
    assert all(f"Column{i}" in text for i in range(1, 16))


def test_columns_fold_by_group() -> None:
    columns = [Column("m", "Model", "text")]
    columns += [Column(f"c{i}", f"Column{i}", "score", "ab"[i // 4]) for i in range(8)]
    folded = to_terminal(
        Table("T", tuple(columns), (Row("r", (Cell("x"), *(Cell(1.0) for _ in range(8)))),)),
        width=60,
    )
    heads = [line for line in folded.splitlines() if line.startswith("Model")]
    assert [re.findall(r"\d", head) for head in heads] == [list("0123"), list("4567")]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert_everywhere(text: str) -> None:
    cells = (Cell(text, remark=text), Cell(1.0))
    hostile = Table(text, (Column("m", text, "text"), Column("s", "S")),
                    (Row("r", cells, text),), text, (text,))  # fmt: skip
    for page in (to_html(hostile), to_html(hostile, stacked=True)):
        assert "<img" not in page
        assert "<script" not in page
        assert "\x1b" not in page
    for rendering in (to_markdown, to_csv, to_latex, to_html, to_terminal):
        shown = rendering(hostile)
        assert "\x1b" not in shown
        assert "\x00" not in shown
        assert "\u202e" not in shown
    assert "<img" not in to_markdown(hostile)
    assert not re.search(r"(?<!\\)\]\(", to_markdown(hostile))
    for row in csv.reader(io.StringIO(to_csv(hostile))):
        assert not any(cell.startswith(("=", "+", "@")) for cell in row)
    assert r"\input{" not in to_latex(hostile)
    assert not re.search(r"\\\\\s*\[", to_latex(hostile))  # would be the line break's argument
    json.loads(to_json_text([hostile]))


class Tags(HTMLParser):
    """Collects tag names and checks that they nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_any_text_keeps_html_latex_and_csv_whole(text: str) -> None:
    some = Table("T", (Column("m", "M", "text"), Column("s", "S")),
                 (Row("r", (Cell(text), Cell(2.5)), text),), notes=(text,))  # fmt: skip
    tags = Tags()
    tags.feed(to_html(some))
    assert not tags.open
    table_tags = {"table", "caption", "thead", "tbody", "tr", "th", "td", "bdi"}
    assert tags.seen <= table_tags | {"ol", "li"}
    parse_tabular(to_latex(some))
    rows = list(csv.reader(io.StringIO(to_csv(some))))
    assert {len(row) for row in rows} == {4}
    lines = to_markdown(some).splitlines()
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert bars == {3}


def parse_tabular(text: str) -> list[list[str]]:
    """Rows of a booktabs tabular; fails on unbalanced braces or a wrong number of columns."""
    body = [line for line in text.splitlines() if not line.startswith("%")]
    joined = re.sub(r"\\[\\{}$&#%_]", "", "\n".join(body))
    assert joined.count("{") == joined.count("}")
    begin = re.match(r"\\begin\{tabular\}\{([lr]+)\}", body[0])
    assert begin is not None
    assert body[-1] == r"\end{tabular}"
    rows = []
    for line in body[1:-1]:
        if line.startswith(("\\toprule", "\\midrule", "\\bottomrule", "\\cmidrule")):
            continue
        assert line.endswith(r"\\")
        cells = re.split(r"(?<!\\)&", line[:-2])
        spans = (re.match(r"\s*\\multicolumn\{(\d+)\}", cell) for cell in cells)
        width = sum(int(found.group(1)) if found else 1 for found in spans)
        assert width == len(begin.group(1))
        rows.append(cells)
    return rows


def test_latex_parses_and_marks_best_and_second() -> None:
    text = to_latex(table())
    rows = parse_tabular(text)
    assert len(rows) == 1 + 1 + 3 + 3  # groups, headings, sections, models
    assert r"\textbf{66.8 $\pm$ 0.4}" in text
    assert r"\underline{63.2}" in text
    assert "\\toprule" in text
    assert "\\cmidrule(lr){2-2}" in text


@pytest.mark.slow
def test_latex_compiles(tmp_path: Path) -> None:
    import shutil
    import subprocess

    tex = shutil.which("pdflatex")
    if tex is None:
        pytest.skip("no pdflatex here; the parser above checks the structure")
    document = "\\documentclass{article}\\usepackage[utf8]{inputenc}\\usepackage{booktabs}" \
               "\\begin{document}" + to_latex(table()) + "\\end{document}"  # fmt: skip
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    done = subprocess.run([tex, "-halt-on-error", "t.tex"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    "value,kind,text",
    [
        (61.55, "score", "61.5"), (None, "score", "–"), (float("inf"), "score", "–"),
        (-0.04, "difference", "0.0"), (1.25, "difference", "+1.2"), (-3.0, "difference", "−3.0"),
        (610_000, "count", "610k"), (3_100_000_000, "count", "3.1B"), (0, "count", "0"),
        (2_440_000, "bytes", "2.4 MB"), (120.0, "milliseconds", "120 ms"), (2.0, "rank", "2"),
        (90.84, "percent", "90.8 %"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(value: float | None, kind, text: str) -> None:  # type: ignore[no-untyped-def]
    assert format_number(value, kind) == text


def test_json_has_a_version_and_no_nan() -> None:
    value = json.loads(to_json_text([table()]))
    assert value["version"] == 1
    (only,) = value["tables"]
    assert only["rows"][2]["cells"]["gqa"]["value"] is None
    assert only["rows"][1]["cells"]["mme"]["interval"] == {"low": 64.0, "high": 69.5, "level": 0.95}


def test_csv_reads_back_in_full_precision() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(table()))))
    assert float(rows[1]["mme"]) == 66.84
    assert float(rows[1]["difference_low"]) == -0.2
    assert rows[2]["gqa"] == ""
    assert rows[1]["notes"] == "12.0% unparsed"


def test_clean_keeps_scripts_and_drops_controls() -> None:
    for code in range(sys.maxunicode + 1):  # what is quick says the same as character by character
        character = chr(code)
        hidden = unicodedata.category(character) in ("Cc", "Cs") or 0x202A <= code <= 0x202E
        hidden = (hidden or 0x2066 <= code <= 0x2069) and character not in "\t\n\r"
        said = " ".join(f"a{'' if hidden else character} b".split())
        assert clean(f"a{character} b") == said, hex(code)
    assert clean("שלום عربى 中文 é") == "שלום عربى 中文 é"
    assert clean("a\x1b[2Jb\u2066c\ud800") == "a[2Jbc"
