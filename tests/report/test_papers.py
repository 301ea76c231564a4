"""Papers: their published rows beside measured ones, and the leaderboard as a paper's table.

Published rows are on one scale, apart from measured rows, with their marks. The paper's table
compiles, fits a column, says what it is, and has the store's numbers.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kd_bench.cli import app
from kd_bench.errors import NotComparableError, UsageError
from kd_bench.records import AVERAGE
from kd_bench.report import render_report
from kd_bench.report.board import load_board
from kd_bench.report.leaderboard import leaderboard
from kd_bench.report.papers import Paper, paper_table, published_tables, to_paper, to_whole
from kd_bench.report.relations import read_board
from kd_bench.report.tables import Table
from tests.support.distinct_store import TASKS, TITLES, make_distinct, truths
from tests.support.report_store import Model, add_run, printed

# --- a paper's table -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_distinct(tmp_path_factory.mktemp("distinct"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve long names on ten benchmarks."""
    results = tmp_path_factory.mktemp("wide") / "results"
    add_run(results, Model("Qwen2-VL-2B-Instruct", "teacher", "", 1.4), units=6, suite="ten")
    for number, method in enumerate(["sft", *(f"method_{letter}" for letter in "abcdefghij")]):
        role = "sft" if method == "sft" else "kd"
        model = Model(f"tinyllava-0.5b-{method}", role, method, 0.1 * number, 0)
        add_run(results, model, units=6, suite="ten")
    return results


def paper(results: Path, benchmarks: str = "", methods: str = "") -> str:
    """The table alone, without a page around it."""
    choice = Paper(
        [name for name in benchmarks.split(",") if name],
        [name for name in methods.split(",") if name],
    )
    return to_paper(*read_board(results), choice)


def numbers(text: str) -> dict[str, list[str]]:
    """Cells of every row by its first cell, without emphasis and uncertainty."""
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if "&" not in line or "shortstack" in line or "\\caption" in line:
            continue
        first, *cells = (cell.strip() for cell in line.removesuffix(r"\\").split("&"))
        plain = [re.sub(r"\\(mathbf|underline)\{([\d.]+)\}", r"\2", cell) for cell in cells]
        shown = [m[1] if (m := re.match(r"\$([\d.]+)", cell)) else cell for cell in plain]
        rows.setdefault(first, []).extend(text for text in shown if text)
    return rows


@pytest.mark.slow
def test_models_beside_each_other_where_benchmarks_are_many(results: Path) -> None:
    text = paper(results)
    rows = numbers(text)
    order = ["teacher", "switch-kd-seed0-hybrid", "Switch-KD", "kl", "SFT"]
    true = {row.label: row for row in truths(results)}
    for title, key in [*((t, k) for k, t in TITLES.items()), (f"Avg{len(TASKS)}", AVERAGE)]:
        shown = [float(cell) for cell in rows[title]]
        assert shown == pytest.approx([true[name].scores[key] for name in order], abs=0.051), title
    spreads = re.findall(r"pm ([\d.]+)\}", next(x for x in text.splitlines() if x[:3] == "GQA"))
    wanted = [true[name].spread("gqa") for name in ("Switch-KD", "SFT")]
    assert [float(spread) for spread in spreads] == pytest.approx(wanted, abs=0.051)


def test_chosen_benchmarks_and_rows(results: Path) -> None:
    """Benchmarks are columns where they are few; average and ranks are of the choice."""
    text = paper(results, "gqa,POPE", "Switch-KD,sft,kl")
    rows = numbers(text)
    assert rows["Model"] == ["GQA", "POPE", "Avg2"]
    true = {row.label: row for row in truths(results)}
    assert set(rows) == {"Model", "Switch-KD", "kl", "SFT"}
    for name in ("Switch-KD", "kl", "SFT"):
        scores = [true[name].scores[task] for task in ("gqa", "pope")]
        wanted = [*scores, sum(scores) / 2]
        assert [float(cell) for cell in rows[name]] == pytest.approx(wanted, abs=0.051), name
    assert r"\mathbf" in text


@pytest.mark.slow
def test_the_caption_says_what_a_reviewer_asks(results: Path, wide: Path) -> None:
    caption = next(x for x in paper(results).splitlines() if "\\caption" in x)
    for word in ("Embedded mini world: not the real benchmarks", "MME 48", "GQA 192", "lmms-eval",
                 "suite mini", "Switch-KD 2", "kl 1", "standard deviation over training seeds",
                 "training noise is unknown", "Bold:", "underlined:"):  # fmt: skip
        assert word in caption, word
    other = paper(wide)
    assert "mini world" not in other
    assert "One training seed each" in other
    assert r"\label{tab:kd-bench-ten}" in other


@pytest.mark.slow
@pytest.mark.parametrize("options", ["twocolumn", "12pt"])
def test_it_compiles_and_fits_the_line(
    results: Path, wide: Path, tmp_path: Path, options: str
) -> None:
    tex = shutil.which("pdflatex")
    if tex is None:
        pytest.skip("no pdflatex here")
    (tmp_path / "many.tex").write_text(paper(wide), encoding="utf-8")
    (tmp_path / "few.tex").write_text(paper(results, "mme,gqa"), encoding="utf-8")
    (tmp_path / "six.tex").write_text(paper(results), encoding="utf-8")
    board, _ = read_board(wide)
    (tmp_path / "whole.tex").write_text(to_whole(board, leaderboard(board)), encoding="utf-8")
    parts = "".join(rf"\input{{{name}}}" for name in ("many", "few", "six", "whole"))
    document = (
        rf"\documentclass[{options}]{{article}}\usepackage{{booktabs}}\usepackage{{graphicx}}"
        rf"\begin{{document}}{parts}Text.\end{{document}}"
    )
    (tmp_path / "t.tex").write_text(document, encoding="utf-8")
    done = subprocess.run(
        [tex, "-halt-on-error", "-interaction=nonstopmode", "t.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull \\hbox" not in done.stdout, done.stdout[-3000:]


@pytest.mark.slow
def test_a_name_that_is_not_there_is_refused(results: Path, tmp_path: Path) -> None:
    base = ["report", "--results", str(results), "--to", str(tmp_path / "out")]
    for words, said in (
        (
            ["--latex", "paper", "--benchmarks", "gqb"],
            "No benchmark of this report is called 'gqb'",
        ),
        (["--latex", "paper", "--methods", "swich-kd"], "No row of this report is called"),
        (["--benchmarks", "gqa"], "Add --latex paper"),
        (["--latex", "slides"], "Known: paper"),
    ):
        done = CliRunner().invoke(app, [*base, *words])
        assert done.exit_code != 0
        assert said in f"{done.output} {done.exception} {getattr(done.exception, 'hint', '')}"
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_full_table_says_what_bold_means_and_what_world_it_is(
    results: Path, tmp_path: Path
) -> None:
    render_report(results, tmp_path, paper=Paper(["gqa"]))
    assert "GQA" in (tmp_path / "paper.tex").read_text(encoding="utf-8")
    for name in ("leaderboard.md", "leaderboard.tex"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Bold: the best student, and all that are not shown to be behind it" in text, name
    for name in ("leaderboard.md", "leaderboard.tex", "leaderboard.csv", "leaderboard.json"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "Embedded mini world: not the real benchmarks" in text, name


def test_the_full_table_is_a_float_with_the_caption_of_a_paper(tmp_path: Path) -> None:
    """Notes are numbered in the caption as in the cells; both floats may stand in one paper."""
    for name, role, skill in (("teacher", "teacher", 1.4), ("s", "sft", 0.0), ("k", "kd", 1.2)):
        add_run(tmp_path / "results", Model(name, role, role, skill, 0), tasks=("gqa",), units=30)
    add_run(tmp_path / "results", Model("part", "kd", "kl", 0.2, 1), tasks=(), planned=("gqa",),
            status="partial")  # fmt: skip
    render_report(tmp_path / "results", tmp_path / "out", paper=Paper())
    whole, paper = (
        (tmp_path / "out" / name).read_text(encoding="utf-8")
        for name in ("leaderboard.tex", "paper.tex")
    )
    (caption,) = (line for line in whole.splitlines() if line.startswith("\\caption{"))
    for word in ("Embedded mini world", "n = 240 samples a benchmark", "suite mini", "lmms-eval",
                 "One training seed each", "In brackets: 95", "Bold:", "underlined",
                 "(1) part is partial"):  # fmt: skip
        assert word in caption, word
    assert "part$^{1}$" in whole
    assert r"\label{tab:kd-bench-mini-leaderboard}" in whole
    assert r"\label{tab:kd-bench-mini}" in paper
    for text in (whole, paper):
        assert text.count("\\begin{") == text.count("\\end{")
        assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


def test_a_limited_run_is_marked_in_every_rendering(tmp_path: Path) -> None:
    from dataclasses import replace

    for name, role in (("s", "sft"), ("k", "kd")):
        run = add_run(
            tmp_path / "results", Model(name, role, role, 0.2, 0), tasks=("gqa",), units=6
        )
        manifest = run.manifest
        protocol = replace(manifest.protocol, limit=48)
        run.write_manifest(replace(manifest, protocol=protocol))
    render_report(tmp_path / "results", tmp_path / "out", ["s", "k"], paper=Paper())
    texts = {
        path.name: path.read_text(encoding="utf-8")
        for path in (tmp_path / "out").iterdir()
        if path.suffix in (".md", ".csv", ".tex", ".json", ".html") and "categ" not in path.name
    }
    texts["terminal"] = printed(tmp_path / "results", ["s", "k"])
    for name, text in texts.items():
        visible = "\n".join(x for x in text.splitlines() if not x.startswith("%"))
        assert re.search(r"n = 48|first 48|limited to 48", visible), name


# --- published numbers ---------------------------------------------------------------------------


def cell(table: Table, row: int, key: str):  # type: ignore[no-untyped-def]
    index = [column.key for column in table.columns].index(key)
    return table.rows[row].cells[index]


def test_the_papers_rows_are_on_the_0_to_100_scale() -> None:
    main, rest = published_tables()
    assert main is not None
    assert rest is not None
    assert (len(main.rows), len(main.rows) + len(rest.rows)) == (6, 60)
    assert [cell(main, row, "method").value for row in range(3)] == [
        "TinyLLaVA", "LLaVA-KD", "Switch-KD",
    ]  # fmt: skip
    assert cell(main, 2, "mme").value == 66.8  # perception / 20 as printed
    assert cell(main, 3, "mme").value == pytest.approx(1289.2 / 20)
    for table in (main, rest):
        for row in range(len(table.rows)):
            value = cell(table, row, "mme").value
            assert value is None or 50 < value < 100


def test_columns_that_cannot_be_compared_say_so() -> None:
    main, _ = published_tables()
    assert main is not None
    marked = {c.key: main.notes[c.notes[0]] for c in main.columns if c.notes}
    assert marked["vqav2"].startswith("Not comparable: papers use test-dev")
    assert marked["mmbench_en"].startswith("Near:")
    assert "gqa" not in marked


def test_an_average_over_fewer_benchmarks_is_marked() -> None:
    main, _ = published_tables()
    assert main is not None
    assert cell(main, 2, "average").notes == ()
    (note,) = cell(main, 5, "average").notes
    assert "fewer benchmarks" in main.notes[note]


def test_measured_rows_stand_beside_the_paper_on_comparable_columns(tmp_path: Path) -> None:
    add_run(tmp_path, Model("mine", "kd", "switch-kd", 0.5, 0), units=4, suite="ten")
    board = load_board(tmp_path)
    table = paper_table(board)
    assert table is not None
    assert [row.section for row in table.rows] == ["Measured here"] + [
        "Switch-KD paper, 0.5B students"
    ] * 3
    fair = ("mme", "mmbench_en", "mmbench_cn", "gqa", "scienceqa_img", "mmmu", "pope")
    paper = [66.8, 63.5, 57.8, 61.6, 57.9, 29.8, 87.3]
    assert cell(table, 3, "average").value == pytest.approx(sum(paper) / len(fair))
    mine = [board.entries[0].score(task).value for task in fair]
    assert cell(table, 0, "average").value == pytest.approx(sum(mine) / len(fair))
    assert "Beside the paper" in printed(tmp_path, compare="paper")


def test_the_verdict_is_that_of_the_profile_that_was_measured(tmp_path: Path) -> None:
    run = add_run(tmp_path, Model("mine", "kd", "switch-kd", 0.5, 0), units=4, suite="ten")
    for task, profile in (("textvqa", "ocr"), ("pope", "llava")):
        run.commit(replace(run.result(task), profile=profile), run.samples(task))
    table = paper_table(load_board(tmp_path))
    assert table is not None
    marks = {c.key: [table.notes[n] for n in c.notes] for c in table.columns}
    assert marks["pope"] == []
    assert marks["textvqa"][0].startswith("Near: the tokens are the same")
    paper = [66.8, 63.5, 57.8, 61.6, 57.9, 29.8, 52.3, 87.3]  # with TextVQA
    assert cell(table, 3, "average").value == pytest.approx(sum(paper) / len(paper))


def test_a_benchmark_that_the_paper_lacks_has_an_empty_cell(tmp_path: Path) -> None:
    model = Model("mine", "kd", "switch-kd", 0.5, 0)
    run = add_run(tmp_path, model, tasks=("gqa",), planned=("gqa", "mine"), units=4, suite="ten")
    run.commit(replace(run.result("gqa"), task="mine"), run.samples("gqa"))
    table = paper_table(load_board(tmp_path))
    assert table is not None
    assert {len(row.cells) for row in table.rows} == {len(table.columns)}
    assert cell(table, 3, "mine").value is None
    assert cell(table, 3, "average").value == pytest.approx(61.6)


def test_mini_scores_never_stand_beside_published_ones(tmp_path: Path) -> None:
    add_run(tmp_path, Model("mine", "kd", "switch-kd", 0.5, 0), tasks=("gqa",), units=4)
    assert paper_table(load_board(tmp_path)) is None
    with pytest.raises(NotComparableError, match="mini world"):
        printed(tmp_path, compare="paper")
    with pytest.raises(UsageError, match="papre"):
        printed(tmp_path, compare="papre")
