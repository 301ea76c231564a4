"""A report's folder: a self-contained page, the tables in every format, plots, all samples."""

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kd_bench import __version__
from kd_bench.compare.estimates import Evidence
from kd_bench.errors import UsageError
from kd_bench.files import claim_folder, write_text
from kd_bench.records import AVERAGE, RunManifest
from kd_bench.report.board import Board, Entry, Score
from kd_bench.report.leaderboard import VIEWS, Mode, interval_text, leaderboard
from kd_bench.report.papers import paper_table, published_tables, to_whole
from kd_bench.report.plots import Logs, board_plots
from kd_bench.report.relations import FROM_SFT, category_tables, gap_table
from kd_bench.report.samples import choose_samples, embed_json, write_samples
from kd_bench.report.style import DARK, LIGHT, Plot, css_series, variables
from kd_bench.report.tables import (
    Cell,
    Kind,
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

TEMPLATES = Path(__file__).parent / "templates"
BRAND = '<span class="brand">kd-bench</span>'
"""On every page, also on those from before folders were marked."""
# Text colours keep a contrast of 4.5 to the paper, borders of controls 3.
CHROME_LIGHT = {
    "accent": "#0a58a8", "edge": "#8d8b85", "soft": "#f5f4f1", "warn": "#a33b00",
    "right": "#00785a", "wrong": "#b04a00",
}  # fmt: skip
CHROME_DARK = {
    "accent": "#7cbcf0", "edge": "#6d6b65", "soft": "#1f1f1d", "warn": "#ff9d6b",
    "right": "#2fc59a", "wrong": "#f0803c",
}  # fmt: skip
EMPTY: dict[str, Any] = {
    "mini": False, "title": "", "eyebrow": "", "lead": [], "figures": [], "unhealthy": [],
    "rows": False, "gaps": None, "categories": [], "samples_json": None,
    "published": [], "runs": [], "trend": None, "left_out": [], "downloads": [],
}  # fmt: skip

PlotSection = tuple[str, str, str, tuple[str, ...]]


def claim_report(folder: Path, files: Iterable[str], plots: Iterable[str]) -> None:
    """Make sure that a folder's page is ours to replace.

    Raises:
        UsageError: a file that would be replaced is somebody else's, or the folder lies where a
            store has its runs: it would be taken for a damaged one.
    """
    refuse_among_runs(folder)
    page = folder / "index.html"
    made_before = page.is_file() and BRAND in page.read_text(encoding="utf-8", errors="replace")
    names = ["index.html", *files, *(f"plots/{name}.svg" for name in plots)]
    claim_folder(folder, "report", names, made_before=made_before)


def refuse_among_runs(folder: Path) -> None:
    """Refuse a folder in which, or above which, a store has its runs."""
    place = folder.resolve()
    for above in (place, *place.parents):
        if above.name == "runs" and any(above.glob("*/manifest.json")):
            raise UsageError(f"{folder} lies in {above}, which holds runs.", "Give another --to.")


def write_report(
    folder: Path,
    context: dict[str, Any],
    files: Mapping[str, str],
    plots: Sequence[Plot],
    layout: Sequence[PlotSection],
) -> Path:
    """Write texts, plots and the page that shows them; returns the page's path.

    What the context leaves out is not on the page; plots of an earlier report that this one has not
    are removed.
    """
    for name, text in files.items():
        write_text(folder / name, text)
    drawn = {plot.name: plot for plot in plots}
    for name in (name for *_, names in layout for name in names):
        path = folder / "plots" / f"{name}.svg"
        if name in drawn:
            write_text(path, drawn[name].standalone())
        else:
            path.unlink(missing_ok=True)
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    context = EMPTY | context | {
        "layout": layout,
        "plots": drawn,
        "css": Markup(_css()),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "version": __version__,
    }  # fmt: skip
    page = folder / "index.html"
    write_text(page, _environment().get_template("page.html.j2").render(context))
    return page


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["clean"] = clean
    environment.filters["series"] = css_series
    environment.filters["html"] = lambda table: Markup(to_html(table))
    environment.filters["stacked"] = lambda table: Markup(to_html(table, stacked=True))
    environment.filters["clean_lines"] = lambda text: "\n".join(map(clean, text.splitlines()))
    return environment


def _css() -> str:
    light, dark = variables(LIGHT | CHROME_LIGHT), variables(DARK | CHROME_DARK)
    themes = (
        f":root{{color-scheme:light;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )
    return themes + (TEMPLATES / "style.css").read_text(encoding="utf-8")


TABLES = {
    "leaderboard.md": "Markdown",
    "leaderboard.csv": "full precision, with intervals and spreads",
    "leaderboard.tex": "LaTeX, booktabs, with caption",
    "leaderboard.json": "scores, differences and retention for machines",
}
GAPS = {
    "gaps.md": "form gap and sight, Markdown",
    "gaps.csv": "the same in full precision",
    "gaps.tex": "the same as LaTeX, booktabs",
    "gaps.json": "the same for machines",
}
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
    board: Board, destination: Path, evidence: Evidence, logs: Logs, paper: str | None = None
) -> Path:
    """Write the whole report of a board; returns the page's path.

    `paper` is written to `paper.tex`. Equal boards give equal bytes: nothing depends on the time or
    place of rendering.
    """
    names = [*TABLES, *GAPS, "categories.json", "paper.tex", "samples.parquet"]
    claim_report(destination, names, [name for *_, names in PLOTS for name in names])
    plots = board_plots(board, evidence, logs)
    chosen = choose_samples(board)
    tables = {mode: leaderboard(board, mode) for mode in VIEWS}
    table, categories = tables["scores"], category_tables(board)
    gaps = gap_table(board, evidence)
    first, related = published_tables()
    files = dict(zip(TABLES, (to_markdown(table), to_csv(table), to_whole(board, table),
                              to_json_text(list(tables.values()))), strict=True))  # fmt: skip
    downloads = list(TABLES.items())
    if gaps is not None and gaps.rows:
        texts = (to_markdown(gaps), to_csv(gaps), to_latex(gaps), to_json_text([gaps]))
        files |= dict(zip(GAPS, texts, strict=True))
        downloads += GAPS.items()
    if categories:
        files["categories.json"] = to_json_text(categories)
        downloads.append(("categories.json", "scores by category for machines"))
    if paper is not None:
        files["paper.tex"] = paper
        downloads.append(("paper.tex", "a paper's table, with caption"))
    if plots:
        downloads.append(("plots/", "every plot as SVG, in light and dark"))
    if chosen is not None:
        rows = write_samples(board, destination / "samples.parquet")
        downloads.append(("samples.parquet", f"all {rows:,} samples of every model"))
    context = {
        **head(board),
        "board": board,
        "seeds": {len(entry.runs) for entry in board.entries},
        "views": VIEWS if board.floor and board.teacher else {"scores": VIEWS["scores"]},
        "roles": list(dict.fromkeys((row.role, clean(row.section)) for row in table.rows)),
        "table": table,
        "column_groups": column_groups(table),
        "row_sections": list(sections(table)),
        "faces": {
            stack[0].key: [_faces(tables, stack, place) for place in range(1, len(table.columns))]
            for stack in zip(*(each.rows for each in tables.values()), strict=True)
        },
        "rows": bool(table.rows),
        "gaps": gaps,
        "gap_tables": [] if gaps is None else _own_and_parts(gaps),
        "categories": categories,
        "samples_json": Markup(embed_json(chosen)) if chosen else None,
        "sample_count": len(chosen["samples"]) if chosen else 0,
        "published": [each for each in (paper_table(board), first) if each] if first else [],
        "related": related,
        "runs": [run for entry in board.entries for run in _runs(board, entry)],
        "left_out": [clean(line) for line in board.left_out],
        "downloads": downloads,
    }
    return write_report(destination, context, files, plots, PLOTS)


def _own_and_parts(gaps: Table) -> list[tuple[bool, Table]]:
    """Each model's own gaps, and what differences are made of, which the page folds away."""
    found = []
    for is_part in (False, True):
        rows = tuple(row for row in gaps.rows if (row.section in FROM_SFT.values()) == is_part)
        title, width = gaps.title, len(gaps.columns)
        if is_part:  # the last column counts answers of a model
            title = "What differences from SFT are made of"
            width -= gaps.columns[-1].key == "ambiguous"
        rows = tuple(replace(row, cells=row.cells[:width]) for row in rows)
        if rows:
            found.append((is_part, Table(title, gaps.columns[:width], rows)))
    return found


# --- the leaderboard ---------------------------------------------------------------------------


def _faces(tables: dict[Mode, Table], stack: tuple[Row, ...], place: int) -> list[dict[str, Any]]:
    """One cell as each of the tables has it, or once where all agree."""
    found: list[dict[str, Any]] = []
    for row, (mode, table) in zip(stack, tables.items(), strict=True):
        cell, column = row.cells[place], table.columns[place]
        if mode != "scores" and column.kind == tables["scores"].columns[place].kind:
            continue  # relations and costs are the same in every view
        known = isinstance(cell.value, int | float) and math.isfinite(cell.value)
        spread = f"± {cell.spread:.1f}" if known and cell.spread is not None else ""
        found.append(
            {
                "mode": mode,
                "cell": cell,
                "text": format_number(cell.value, column.kind),
                "small": spread or (format_interval(cell, column.kind) if known else ""),
                "number": f"{cell.value:.6g}" if known else "",
                "tip": "\n".join(line for line in cell.detail if line),
            }
        )
    if len(found) == 1:
        found[0]["mode"] = "only"
    return found


# --- the head of the page ------------------------------------------------------------------------


def head(board: Board) -> dict[str, Any]:
    """What the page says before its tables: title, lead, few large numbers, warnings.

    The title is what the page may claim in one line; how much it holds, and nothing else, where it
    may not. Only a claim that holds over all methods, or of the one named as main, stands there,
    and only one of methods: a difference of single seeds may be that of the seeds.
    """
    claim, subject = board.claim, board.main
    if subject is None:
        subject = next((e for e in board.entries if claim and e.key == claim.method), None)
    runs = sum(len(entry.runs) for entry in board.entries)
    if not runs:
        empty = (
            "Evaluate a checkpoint with `kd-bench eval CHECKPOINT`, then render this page again."
        )
        title, eyebrow = "No runs yet", "kd-bench report"
        lead = [empty, *map(clean, board.left_out)]
    else:
        title = f"{_count(len(board.entries), 'model')} on {_count(len(board.tasks), 'benchmark')}"
        if claim is not None and subject is not None and not claim.weights_only:
            points = claim.difference.value
            number = format_number(abs(points), "score")
            verb = f"gains {number} points over" if points > 0 else f"loses {number} points against"
            title = f"{clean(subject.name)} {verb} SFT"
        newest = max(m.finished or m.created for e in board.entries for m in e.manifests)
        suite = f"Suite {clean(board.suite)}, {_count(runs, 'run')}"
        eyebrow = f"{suite}, newest of {clean(newest)[:10]}"
        lead = [*_averages(board, subject), *_claimed(board, subject)]
    return {
        "mini": board.mini,
        "title": title,
        "eyebrow": eyebrow,
        "lead": lead,
        "figures": _figures(board, subject),
        "unhealthy": [entry for entry in board.entries if entry.health],
    }


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _averages(board: Board, subject: Entry | None) -> list[str]:
    """What teacher, SFT and the page's subject reach."""
    named = clean(board.teacher.name) if board.teacher else ""
    who = "The teacher" if named.lower() == "teacher" else f"The teacher, {named},"
    told = (
        (board.teacher, f"{who} reaches"),
        (board.floor, "plain fine-tuning"),
        (subject, clean(subject.name) if subject else ""),
    )
    averages = ((words, entry.score(AVERAGE)) for entry, words in told if entry is not None)
    parts = [f"{words} {score.value:.1f}" for words, score in averages if score.known]
    return [", ".join(parts) + f" on average over {len(board.tasks)} benchmarks."] * bool(parts)


def _claimed(board: Board, subject: Entry | None) -> list[str]:
    """What the claim rests on, or that there is none; and that one seed says nothing of others."""
    floor, claim = board.floor, board.claim
    others = [e for e in board.students if floor is not None and e.key != floor.key]
    if not others or floor is None or not floor.score(AVERAGE).known:
        return []
    if claim is None or subject is None or claim.difference.interval is None:
        who = clean(board.main.name) if board.main else _count(len(others), "method")
        verb = "and SFT cannot be told apart" if board.main else "against SFT: no gain is certain"
        line, about = f"{who} {verb} on the average.", others
    else:
        interval, about = claim.difference.interval, [subject]
        ends = format_interval(Cell(0.0, interval=interval), "difference")
        over = f", corrected for choosing among {claim.candidates} methods"
        over *= claim.candidates > 1
        level = f"{100 * interval.level:.3g} % interval"
        line = f"The {level} of that difference is {ends} points{over}."
        if claim.weights_only:
            points = format_number(claim.difference.value, "difference")
            line = (
                f"These weights of {clean(subject.name)} score {points} points beside SFT's "
                f"({level} {ends}{over})."
            )
    if all(len(entry.runs) > 1 for entry in (*about, floor)):
        return [line]
    return [
        line,
        "Single training seeds: what another seed would give is unknown, so these are differences "
        "of weights, not of methods.",
    ]


def _figures(board: Board, subject: Entry | None) -> list[dict[str, str]]:
    """The few numbers that the page is about.

    None where nobody was named and nothing holds, or holds for single seeds alone: the best of
    several would stand there in large type.
    """
    claim = board.claim
    if subject is None or (board.main is None and claim is not None and claim.weights_only):
        return []
    found: tuple[tuple[str, Score | None, Kind, str], ...] = (
        (f"{board.average_title} of {clean(subject.name)}", subject.score(AVERAGE), "score", ""),
        ("Difference from SFT", subject.differences.get(AVERAGE), "difference", "points"),
        ("Of the teacher kept", subject.retentions.get(AVERAGE), "percent", ""),
        ("Gap to the teacher closed", subject.gap_closed, "percent", ""),
    )
    return [
        {
            "name": name,
            "value": format_number(score.value, kind),
            "unit": unit,
            "note": interval_text(score, kind) or "no interval",
        }
        for name, score, kind, unit in found
        if score is not None and score.known
    ]


# --- runs ----------------------------------------------------------------------------------------


def _runs(board: Board, entry: Entry) -> list[dict[str, Any]]:
    return [
        {
            "name": clean(manifest.model.name),
            "role": entry.role,
            "status": manifest.status,
            "health": manifest.status != "complete",
            "color": css_series(board.colours[entry.key]),
            "facts": [(name, clean(text)) for name, text in run_facts(manifest) if text],
        }
        for manifest in entry.manifests
    ]


def run_facts(manifest: RunManifest) -> list[tuple[str, str]]:
    """Name and text of what a reader needs to judge a run and to make it again."""
    model, protocol, provenance = manifest.model, manifest.protocol, manifest.provenance
    facts = [
        ("Run", manifest.run_id),
        (
            "Status",
            manifest.status + ("" if not manifest.notes else ": " + "; ".join(manifest.notes)),
        ),
        ("Checkpoint", model.path),
        ("Weights digest", model.weights_digest),
        ("Architecture", model.architecture),
        ("Parameters", format_number(manifest.cost.parameters, "count")),
        ("Method", model.method),
        ("Seed", "" if model.seed is None else str(model.seed)),
        ("Suite", protocol.suite + ("" if protocol.limit is None else f", first {protocol.limit}")),
        ("Profiles", ", ".join(f"{k}: {v}" for k, v in sorted(protocol.profiles.items()))),
        ("Number type", protocol.dtype),
        ("Quantized to", protocol.quantize),
        ("Batch size", "" if protocol.batch_size is None else str(protocol.batch_size)),
        ("Engine", protocol.engine),
        ("Evaluated", manifest.finished or manifest.created),
    ]
    facts += [(titled(name), text) for name, text in flatten(provenance)]
    facts += [(titled(f"training {name}"), text) for name, text in flatten(manifest.training or {})]
    return [(name, text) for name, text in facts if text and text != "–"]


def flatten(mapping: dict[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Leaves of a nested mapping as (`outer inner`, text); long lists are cut."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and depth < 2:
            yield from flatten(value, f"{name} ", depth + 1)
        elif value is not None:
            parts = value if isinstance(value, list | tuple) else [value]
            text = (" " if key == "command" else ", ").join(map(str, parts))
            yield name, text if len(text) <= 400 else text[:400] + " …"


def titled(name: str) -> str:
    """`weights_digest` -> `Weights digest`."""
    words = name.replace("_", " ").strip()
    return words[:1].upper() + words[1:]
