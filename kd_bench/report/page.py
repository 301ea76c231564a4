"""The report's folder: a self-contained page, the tables in every format, plots, all samples."""

import math
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kd_bench.compare.estimates import Evidence
from kd_bench.files import write_text
from kd_bench.records import AVERAGE
from kd_bench.report.board import Board, Entry, Score
from kd_bench.report.categories import category_tables
from kd_bench.report.facts import paper_table, published_tables, run_facts
from kd_bench.report.leaderboard import MODES, Mode, interval_text, leaderboard, status_of
from kd_bench.report.plots import board_plots
from kd_bench.report.samples import Chosen, choose_samples, embed_json, write_samples
from kd_bench.report.shell import PlotSection, claim_report, plot_sections, write_page
from kd_bench.report.style import Plot, css_series
from kd_bench.report.tables import (
    Cell,
    Column,
    Row,
    Table,
    clean,
    column_groups,
    format_interval,
    format_number,
    sections,
    to_csv,
    to_html,
    to_json_text,
    to_latex,
    to_markdown,
)
from kd_bench.report.training import logs_of

TABLES = ("leaderboard.md", "leaderboard.csv", "leaderboard.tex", "leaderboard.json")
PLOTS: tuple[PlotSection, ...] = (
    (
        "skills", "Skills", "Where the models are strong, by skill group and by benchmark.",
        ("radar", "bars"),
    ),
    (
        "differences", "Differences",
        "What a method gains over plain fine-tuning and keeps of its teacher, with 95 % intervals.",
        ("forest", "retention"),
    ),
    (
        "cost", "Gaps and cost",
        "What is lost in sight, what in language, and what a point costs.",
        ("gaps", "pareto"),
    ),
    ("training", "Training", "The logged losses of every run on this page.", ("losses", "knees")),
    ("calibration", "Calibration", "Whether a model knows when it knows.", ("reliability",)),
)  # fmt: skip


def render(
    board: Board, destination: Path, evidence: Evidence, *, paper: str | None = None
) -> Path:
    """Write the whole report of a board; returns the page's path.

    `paper` is written to `paper.tex`. Equal boards give equal bytes: nothing depends on the time or
    place of rendering.
    """
    plot_names = [name for *_, names in PLOTS for name in names]
    claim_report(
        destination, [*TABLES, "categories.json", "paper.tex", "samples.parquet"], plot_names
    )
    logs = {entry.key: logs_of(entry) for entry in board.entries}
    plots = board_plots(board, evidence, logs)
    chosen = choose_samples(board)
    tables = {mode: leaderboard(board, mode) for mode, _ in MODES}
    categories = category_tables(board)
    downloads = _write_tables(tables, destination)
    if categories:
        write_text(destination / "categories.json", to_json_text(categories))
        downloads.append(("categories.json", "scores by category for machines"))
    if paper is not None:
        write_text(destination / "paper.tex", paper)
        downloads.append(("paper.tex", "a paper's table, with caption"))
    _write_plots(plots, destination / "plots")
    if plots:
        downloads.append(("plots/", "every plot as SVG, in light and dark"))
    if chosen is not None:
        rows = write_samples(board, destination / "samples.parquet")
        downloads.append(("samples.parquet", f"all {rows:,} samples of every model"))
    page = destination / "index.html"
    context = _context(board, tables, plots, chosen, downloads)
    context["categories"] = [_embedded(table, folded=True) for table in categories]
    write_page(page, context)
    return page


def _write_plots(plots: list[Plot], folder: Path) -> None:
    """One file a plot; those of an earlier report that this one has not are removed."""
    for name in {name for *_, names in PLOTS for name in names} - {plot.name for plot in plots}:
        (folder / f"{name}.svg").unlink(missing_ok=True)
    for plot in plots:
        write_text(folder / f"{plot.name}.svg", plot.standalone())


def _write_tables(tables: dict[Mode, Table], destination: Path) -> list[tuple[str, str]]:
    """The text renderings; returns names and descriptions."""
    table = tables["scores"]
    texts = {
        "leaderboard.md": (to_markdown(table), "Markdown"),
        "leaderboard.csv": (to_csv(table), "full precision, with intervals and spreads"),
        "leaderboard.tex": (to_latex(table), "LaTeX, booktabs"),
        "leaderboard.json": (
            to_json_text(list(tables.values())),
            "scores, differences and retention for machines",
        ),
    }
    for name, (text, _) in texts.items():
        write_text(destination / name, text)
    return [(name, text) for name, (_, text) in texts.items()]


def _context(
    board: Board,
    tables: dict[Mode, Table],
    plots: list[Plot],
    chosen: Chosen | None,
    downloads: list[tuple[str, str]],
) -> dict[str, Any]:
    table = tables["scores"]
    return {
        "mini": board.mini,
        "title": _title(board),
        "eyebrow": _eyebrow(board),
        "lead": _lead(board),
        "figures": _figures(board),
        "warnings": _unhealthy(board),
        "caption": _caption(board),
        "legend": _legend(board, table),
        "modes": MODES if board.floor and board.teacher else MODES[:1],
        "roles": list(dict.fromkeys((row.role, clean(row.section)) for row in table.rows)),
        "table": table,
        "column_groups": column_groups(table),
        "row_sections": _row_sections(tables),
        "rows": bool(table.rows),
        "plot_sections": plot_sections(plots, PLOTS),
        "samples_json": Markup(embed_json(chosen.data)) if chosen else None,
        "sample_count": chosen.count if chosen else 0,
        "published": _published(board),
        "runs": [r for entry in board.entries for r in _runs(entry, board.colours[entry.key])],
        "left_out": [clean(line) for line in board.left_out],
        "downloads": downloads,
    }


# --- the leaderboard ---------------------------------------------------------------------------


def _row_sections(tables: dict[Mode, Table]) -> list[dict[str, Any]]:
    """The rows of the tables over each other: a cell has a face in each, or one where all agree."""
    faces = {mode: {row.key: row for row in table.rows} for mode, table in tables.items()}
    table = tables["scores"]
    return [
        {
            "title": clean(title),
            "rows": [
                {
                    "row": row,
                    "name": row.cells[0],
                    "color": css_series(row.series or 0),
                    "cells": [
                        _faces(tables, faces, row.key, place)
                        for place in range(1, len(table.columns))
                    ],
                }
                for row in rows
            ],
        }
        for title, rows in sections(table)
    ]


def _faces(
    tables: dict[Mode, Table], rows: dict[Mode, dict[str, Row]], key: str, place: int
) -> list[dict[str, Any]]:
    """One cell as each of the tables has it."""
    found = []
    for mode, table in tables.items():
        cell, column = rows[mode][key].cells[place], table.columns[place]
        if mode != "scores" and column.kind == tables["scores"].columns[place].kind:
            continue  # relations and costs are the same in every view
        found.append({"mode": mode, "cell": cell, **_shown(cell, column)})
    if len(found) == 1:
        found[0]["mode"] = "only"
    return found


def _shown(cell: Cell, column: Column) -> dict[str, str]:
    """The number, what stands small below it, and what it is sorted by."""
    value = cell.value
    known = isinstance(value, int | float) and math.isfinite(value)
    spread = f"± {cell.spread:.1f}" if known and cell.spread is not None else ""
    return {
        "text": format_number(value, column.kind),
        "small": spread or (format_interval(cell, column.kind) if known else ""),
        "number": f"{value:.6g}" if known else "",
        "tip": "\n".join(line for line in cell.detail if line),
    }


# --- the head of the page ----------------------------------------------------------------------


def _title(board: Board) -> str:
    """What the page may claim in one line; how much it holds, and nothing else, where it may not.

    Only a claim that holds over all methods, or of the one named as main, stands here, and only
    one of methods: a difference of single seeds may be that of the seeds.
    """
    if not board.entries:
        return "No runs yet"
    subject, claim = _subject(board), board.claim
    if claim is not None and subject is not None and not claim.weights_only:
        return f"{clean(subject.name)} {_change(claim.difference.value)} SFT"
    models = _count(len(board.entries), "model")
    return f"{models} on {_count(len(board.tasks), 'benchmark')}"


def _change(points: float) -> str:
    number = format_number(abs(points), "score")
    return f"gains {number} points over" if points > 0 else f"loses {number} points against"


def _subject(board: Board) -> Entry | None:
    """The row that the head of the page is about: the one named as main, else the claim's."""
    if board.main is not None:
        return board.main
    claim = board.claim
    return next((e for e in board.entries if claim and e.key == claim.method), None)


def _eyebrow(board: Board) -> str:
    runs = sum(len(entry.runs) for entry in board.entries)
    if not runs:
        return "kd-bench report"
    newest = max(m.finished or m.created for e in board.entries for m in e.manifests)
    return f"Suite {clean(board.suite)}, {_count(runs, 'run')}, newest of {clean(newest)[:10]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _lead(board: Board) -> list[str]:
    if not board.entries:
        lines = [
            "Evaluate a checkpoint with `kd-bench eval CHECKPOINT`, then render this page again."
        ]
        return lines + [clean(line) for line in board.left_out]
    teacher, floor = board.teacher, board.floor
    parts = []
    if teacher is not None and teacher.score(AVERAGE).known:
        name = clean(teacher.name)
        who = "The teacher" if name.lower() == "teacher" else f"The teacher, {name},"
        parts.append(f"{who} reaches {teacher.score(AVERAGE).value:.1f}")
    if floor is not None and floor.score(AVERAGE).known:
        parts.append(f"plain fine-tuning {floor.score(AVERAGE).value:.1f}")
    subject = _subject(board)
    if subject is not None and subject.score(AVERAGE).known:
        parts.append(f"{clean(subject.name)} {subject.score(AVERAGE).value:.1f}")
    lines = [", ".join(parts) + f" on average over {len(board.tasks)} benchmarks."] * bool(parts)
    return lines + _claimed(board, subject)


def _claimed(board: Board, subject: Entry | None) -> list[str]:
    """What the claim rests on, or that there is none."""
    floor, claim = board.floor, board.claim
    others = [e for e in board.students if floor is not None and e.key != floor.key]
    if not others or floor is None or not floor.score(AVERAGE).known:
        return []
    if claim is None or subject is None or claim.difference.interval is None:
        who = clean(board.main.name) if board.main else _count(len(others), "method")
        verb = "and SFT cannot be told apart" if board.main else "against SFT: no gain is certain"
        return [f"{who} {verb} on the average.", *_noise(others, floor)]
    interval = claim.difference.interval
    ends = format_interval(Cell(0.0, interval=interval), "difference")
    over = f", corrected for choosing among {claim.candidates} methods"
    over *= claim.candidates > 1
    line = f"The {100 * interval.level:.3g} % interval of that difference is {ends} points{over}."
    if claim.weights_only:
        line = (
            f"These weights of {clean(subject.name)} score "
            f"{format_number(claim.difference.value, 'difference')} points beside SFT's "
            f"({100 * interval.level:.3g} % interval {ends}{over})."
        )
    return [line, *_noise([subject], floor)]


def _noise(entries: list[Entry], floor: Entry) -> list[str]:
    """That one seed says nothing of a method, where there is only one."""
    if all(len(entry.runs) > 1 for entry in (*entries, floor)):
        return []
    return [
        "Single training seeds: what another seed would give is unknown, so these are differences "
        "of weights, not of methods."
    ]


def _figures(board: Board) -> list[dict[str, str]]:
    """The few numbers that the page is about.

    None where nobody was named and nothing holds, or holds for single seeds alone: the best of
    several would stand there in large type.
    """
    subject, claim = _subject(board), board.claim
    if subject is None or (board.main is None and claim is not None and claim.weights_only):
        return []
    found = [
        _figure(f"{board.average_title} of {clean(subject.name)}", subject.score(AVERAGE), "score"),
        _figure("Difference from SFT", subject.differences.get(AVERAGE), "difference", "points"),
        _figure("Of the teacher kept", subject.retentions.get(AVERAGE), "percent"),
        _figure("Gap to the teacher closed", subject.gap_closed, "percent"),
    ]
    return [figure for figure in found if figure is not None]


def _figure(name: str, score: Score | None, kind: Any, unit: str = "") -> dict[str, str] | None:
    if score is None or not score.known:
        return None
    return {
        "name": name,
        "value": format_number(score.value, kind),
        "unit": unit,
        "note": interval_text(score, kind) or "no interval",
    }


def _unhealthy(board: Board) -> list[dict[str, str]]:
    return [
        {
            "head": f"{clean(entry.name)}: {status_of(entry)}.",
            "text": "; ".join(map(clean, entry.health)),
        }
        for entry in board.entries
        if entry.health
    ]


def _caption(board: Board) -> str:
    lines = [f"All scores on a 0 to 100 scale; {board.average_title} is their mean."]
    if board.floor is not None:
        lines.append("Δ SFT: points above plain fine-tuning.")
    if board.teacher is not None:
        lines.append(
            "Retention: share of the teacher's score. "
            "Gap closed: share of the way from SFT to the teacher."
        )
    return " ".join(lines)


def _legend(board: Board, table: Table) -> str:
    lines = [table.legend.format(second="underlined")]
    lines.append("Point at a number for its interval, sample count and protocol.")
    if any(len(entry.runs) > 1 for entry in board.entries):
        lines.append("± is the spread over training seeds, apart from the sampling interval.")
    if any(len(entry.runs) == 1 for entry in board.entries):
        lines.append(
            "A row of one seed has the interval of its samples in that place; training noise is "
            "unknown."
        )
    return " ".join(line for line in lines if line)


# --- the rest ----------------------------------------------------------------------------------


def _published(board: Board) -> dict[str, Any] | None:
    main, rest = published_tables()
    if main is None:
        return None
    intro = (
        "From the papers and their repositories, as they stand there; "
        "never mixed with the rows above."
    )
    if board.mini:
        intro += (
            " The scores above are of the embedded mini world and cannot be compared with these."
        )
    beside = paper_table(board)
    tables = [_embedded(table, folded=False) for table in (beside, main) if table]
    if rest is not None:
        tables.append(_embedded(rest, folded=True))
    return {"intro": intro, "tables": tables}


def _embedded(table: Table, folded: bool) -> dict[str, Any]:
    return {"html": Markup(to_html(table)), "folded": folded, "summary": table.title}


def _runs(entry: Entry, color: int) -> list[dict[str, Any]]:
    return [
        {
            "name": clean(manifest.model.name),
            "role": entry.role,
            "status": manifest.status,
            "health": manifest.status != "complete",
            "color": css_series(color),
            "facts": [(name, clean(text)) for name, text in run_facts(manifest) if text],
        }
        for manifest in entry.manifests
    ]
