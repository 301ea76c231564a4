"""The leaderboard as the page's template wants it: cells in three views, hover details."""

from itertools import groupby
from typing import Any

from kd_bench.records import AVERAGE
from kd_bench.report.board import ROLE_TITLES, Board, Entry, Score
from kd_bench.report.leaderboard import SUMMARY_COLUMNS, Mode, emphasis_of, values_of
from kd_bench.report.tables import Kind, clean, format_number

__all__ = [
    "MODES",
    "column_groups",
    "columns",
    "css_series",
    "interval_text",
    "row_sections",
    "score_notes",
    "status_of",
]

MODES: tuple[tuple[Mode, str], ...] = (
    ("scores", "Scores"),
    ("differences", "Difference from SFT"),
    ("retention", "Retention"),
)
KINDS: dict[Mode, Kind] = {
    "scores": "score",
    "differences": "difference",
    "retention": "percent",
}
TITLES = {
    "difference": "Points above SFT on the average",
    "retention": "The average as a share of the teacher's",
    "gap_closed": "Share of the way from SFT to the teacher, on the average",
}


def columns(board: Board) -> list[dict[str, Any]]:
    """Headings; `first` starts a group."""
    found = [
        {"key": task.id, "short": clean(task.short), "title": clean(task.title), "first": first}
        for task, first in _starts(board)
    ]
    average = {"key": AVERAGE, "short": board.average_title, "first": True}
    found.append(average | {"title": "Mean of all benchmarks"})
    for column in SUMMARY_COLUMNS:
        first = column.key in ("difference", "parameters")
        title = TITLES.get(column.key, column.title)
        found.append({"key": column.key, "short": column.title, "title": title, "first": first})
    return found


def column_groups(board: Board) -> list[tuple[str, int]]:
    """Group headings and how many columns each spans."""
    groups = [(clean(g), len(list(m))) for g, m in groupby(board.tasks, key=lambda t: t.group)]
    return [*groups, ("overall", 1), ("relation", 3), ("cost", 4)]


def score_notes(board: Board) -> list[str]:
    """What the numbered marks on scores mean, in order of appearance."""
    keys = [*(task.id for task in board.tasks), AVERAGE]
    marks = (mark for e in board.entries for key in keys for mark in e.score(key).marks)
    return list(dict.fromkeys(clean(mark) for mark in marks))


def row_sections(board: Board, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """Rows under their role's heading; `numbers` are series colours by entry key."""
    return [
        {
            "role": role,
            "title": ROLE_TITLES.get(role, clean(role)),
            "rows": [_row(board, entry, numbers[entry.key]) for entry in members],
        }
        for role, members in groupby(board.entries, key=lambda e: e.role)
    ]


def css_series(number: int) -> int:
    """The number of the CSS colour variable of a series; late ones share colours."""
    return number if number < 9 else 2 + (number - 2) % 7


def status_of(entry: Entry) -> str:
    """The worst status among an entry's runs, `check` where only answers failed."""
    order = ("unhealthy", "partial", "running")
    found = [s for s in order if any(m.status == s for m in entry.manifests)]
    return found[0] if found else "check"


def interval_text(score: Score, kind: Kind) -> str:
    """`95 % interval 1.2 to 3.4`, empty where there is none."""
    if score.interval is None:
        return ""
    sources = ", over seeds and samples" if score.holds_seeds else ""
    return f"{round(100 * score.interval.level)} % interval {_ends(score, kind)}{sources}"


def _ends(score: Score, kind: Kind) -> str:
    if score.interval is None:
        return ""
    plain: Kind = "score" if kind == "percent" else kind
    low, high = score.interval.low, score.interval.high
    return f"{format_number(low, plain)} to {format_number(high, plain)}"


def _starts(board: Board) -> list[tuple[Any, bool]]:
    before = ["", *(task.group for task in board.tasks)]
    return [(task, task.group != group) for task, group in zip(board.tasks, before, strict=False)]


def _row(board: Board, entry: Entry, color: int) -> dict[str, Any]:
    notes = score_notes(board)
    cells = [_score_cell(board, entry, task.id, first, notes) for task, first in _starts(board)]
    cells.append(_score_cell(board, entry, AVERAGE, True, notes))
    cells += _relation_cells(entry)
    cells += _cost_cells(entry)
    return {
        "key": entry.key,
        "name": clean(entry.name),
        "role": entry.role,
        "color": css_series(color),
        "seeds": len(entry.runs),
        "health": [clean(line) for line in entry.health],
        "status": status_of(entry),
        "cells": cells,
    }


def _score_cell(
    board: Board, entry: Entry, key: str, first: bool, notes: list[str]
) -> dict[str, Any]:
    score = entry.score(key)
    return {
        "first": first,
        "views": [_view(board, entry, key, mode) for mode, _ in MODES],
        "marked": not score.comparable,
        "notes": ",".join(str(notes.index(clean(mark)) + 1) for mark in score.marks),
    }


def _view(board: Board, entry: Entry, key: str, mode: Mode) -> dict[str, str]:
    """One of a cell's three faces."""
    score, kind = values_of(entry, mode).get(key), KINDS[mode]
    if score is None or not score.known:
        return {"mode": mode, "text": "–", "number": "", "small": "", "tip": "", "emphasis": ""}
    if mode == "scores":
        small = f"± {score.spread:.1f}" if score.spread is not None else ""
    else:
        small = _ends(score, kind)
    return {
        "mode": mode,
        "text": format_number(score.value, kind),
        "number": f"{score.value:.6g}",
        "small": small,
        "tip": _tip(board, entry, key, mode),
        "emphasis": emphasis_of(board, entry, key) if mode == "scores" else "",
    }


def _tip(board: Board, entry: Entry, key: str, mode: Mode) -> str:
    """The lines that hovering a number shows: interval, n, seeds, protocol, health."""
    score = values_of(entry, mode)[key]
    task = next((t for t in board.tasks if t.id == key), None)
    name = task.short if task else board.average_title
    lines = [f"{clean(entry.name)}, {clean(name)}", interval_text(score, KINDS[mode])]
    if (documents := entry.score(key).documents) > 0:
        lines.append(f"{documents:,} samples" + (" a seed" if len(entry.runs) > 1 else ""))
    if mode == "scores":
        if len(score.seeds) > 1:
            lines.append("by seed: " + ", ".join(format_number(v, "score") for v in score.seeds))
        if score.rank is not None:
            lines.append(f"rank {score.rank} among the students")
    lines += _protocol(entry, key)
    lines += [clean(mark) for mark in score.marks]
    lines += [clean(line) for line in entry.health]
    return "\n".join(line for line in lines if line)


def _protocol(entry: Entry, key: str) -> list[str]:
    results = [r[key] for r in entry.results if key in r]
    if not results:
        return []
    first = results[0]
    profile = f", profile {clean(first.profile)}" if first.profile != "default" else ""
    lines = [
        f"metric {clean(first.metric)}{profile}",
        f"protocol {clean(first.fingerprint)[:8]}, {first.units:,} units",
    ]
    return lines + [f"{rate:.1%} {kind}" for kind, rate in sorted(first.rates.items()) if rate > 0]


def _relation_cells(entry: Entry) -> list[dict[str, Any]]:
    scores: tuple[tuple[Score | None, Kind], ...] = (
        (entry.differences.get(AVERAGE), "difference"),
        (entry.retentions.get(AVERAGE), "percent"),
        (entry.gap_closed, "percent"),
    )
    return [
        _plain(score.value, kind, place == 0, _ends(score, kind), interval_text(score, kind))
        if score is not None and score.known
        else _plain(None, kind, place == 0)
        for place, (score, kind) in enumerate(scores)
    ]


def _cost_cells(entry: Entry) -> list[dict[str, Any]]:
    cost = entry.cost
    values: tuple[tuple[float | None, Kind], ...] = (
        (cost.parameters, "count"),
        (cost.weight_bytes, "bytes"),
        (cost.latency_ms, "milliseconds"),
        (cost.peak_memory_bytes, "bytes"),
    )
    return [_plain(value, kind, place == 0) for place, (value, kind) in enumerate(values)]


def _plain(
    value: float | None, kind: Kind, first: bool, small: str = "", tip: str = ""
) -> dict[str, Any]:
    """A cell that is the same in every view."""
    return {
        "first": first,
        "views": None,
        "marked": False,
        "notes": "",
        "text": format_number(value, kind),
        "number": "" if value is None else f"{value:.6g}",
        "small": small,
        "tip": tip,
    }
