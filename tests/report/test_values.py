"""No number in the wrong place: every cell and every plotted coordinate is read back.

Expectations come from the files of the store by hand (`tests.support.distinct_store`);
intervals, which `tests/statistics` judges, from the board. The page is read in tests/browser.
"""

import csv
import io
import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd_bench.records import AVERAGE, Interval
from kd_bench.registry import load_task
from kd_bench.report import render_report
from kd_bench.report.relations import read_board
from tests.support.distinct_store import (
    TASKS,
    TITLES,
    Truth,
    make_distinct,
    raw_score,
    run_named,
    truths,
)
from tests.support.report_store import printed
from tests.support.svg_reading import Panel, Point, number, read_svg

AVERAGE_TITLE = f"Avg{len(TASKS)}"
HEADINGS = {title: task for task, title in TITLES.items()} | {
    AVERAGE_TITLE: AVERAGE,
    "Δ SFT": "difference",
    "Retention": "retention",
    "Gap closed": "gap_closed",
    "Params": "parameters",
    "Weights": "weight_bytes",
    "Latency": "latency_ms",
    "Memory": "peak_memory_bytes",
}
COSTS = ("parameters", "weight_bytes", "latency_ms", "peak_memory_bytes")


@dataclass
class Value:
    """What a cell must say."""

    value: float | None
    spread: float | None = None
    interval: Interval | None = None


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_distinct(tmp_path_factory.mktemp("distinct"))


@pytest.fixture(scope="module")
def report(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(results, tmp_path_factory.mktemp("report")).parent


def expected(results: Path, mode: str = "scores") -> dict[str, dict[str, Value]]:
    """Rows by label, cells by column key."""
    board, _ = read_board(results)
    found = {}
    for truth in truths(results):
        entry = next(e for e in board.entries if e.name == truth.label)
        scores = {
            "scores": (truth.scores, entry.scores),
            "differences": (truth.differences, entry.differences),
            "retention": (truth.retentions, entry.retentions),
        }[mode]
        row = {key: Value(None) for key in HEADINGS.values()}
        for key, value in scores[0].items():
            spread = truth.spread(key) if mode == "scores" else None
            row[key] = Value(value, spread, scores[1][key].interval)
        for key, values, shown in (
            ("difference", truth.differences, entry.differences),
            ("retention", truth.retentions, entry.retentions),
        ):
            if AVERAGE in values:
                row[key] = Value(values[AVERAGE], None, shown[AVERAGE].interval)
        if truth.gap_closed == truth.gap_closed:
            row["gap_closed"] = Value(truth.gap_closed, None, entry.gap_closed.interval)
        row |= {key: Value(truth.costs[key], None, _range(truth.measured[key])) for key in COSTS}
        found[truth.label] = row
    return found


def _range(values: list[float]) -> Interval | None:
    """What seeds of one size cost at least and at most, where the two differ."""
    low, high = min(values), max(values)
    return Interval(low, high, 1.0) if high > 1.02 * low else None


def say(text: str, truth: Value, where: str, *, whole: bool = False) -> None:
    """A cell's text says this number; an interval or spread that it shows is the right one too.

    A `whole` one shows the spread where there is one, else the interval where there is one.
    """
    text = re.sub(r"[*\\]|\(\d+\)", "", text).strip()
    if truth.value is None:
        assert text == "–", f"{where}: {text} is shown, there is nothing to show"
        return
    found = re.match(r"[+−-]?[\d.]+(?:\s?(?:[kMG]?B|[kMB]|ms|%))?(?![\d.])", text)
    assert found, f"{where}: {text!r} shows no number"
    close(number(found[0]), truth.value, where, found[0])
    if spread := re.search(r"± ([\d.]+)", text):
        assert truth.spread is not None, f"{where}: a spread without seeds"
        close(float(spread[1]), truth.spread, f"{where}, spread", spread[1])
    ends = re.search(r"\[?([+−-]?[\d.]+)(?: %)?(?:,| to) ([+−-]?[\d.]+)(?: %)?\]?", text)
    if whole:
        assert (spread is None) == (truth.spread is None), f"{where}: spread in {text!r}"
    if ends or (whole and not spread):
        assert (ends is None) == (truth.interval is None), f"{where}: interval in {text!r}"
    if ends and truth.interval:
        close(number(ends[1]), truth.interval.low, f"{where}, low end", ends[1])
        close(number(ends[2]), truth.interval.high, f"{where}, high end", ends[2])


def close(shown: float, true: float, where: str, text: str) -> None:
    """Within the rounding of what is shown: one digit after the point, or three in all."""
    digits = re.search(r"\.(\d+)", text)
    unit = number(re.sub(r"[+−-]?[\d.]+", "1", text, count=1))
    step = unit * 10.0 ** -(len(digits[1]) if digits else 0)
    assert abs(shown - true) <= 0.5 * step * (1 + 1e-9) + 1e-9, f"{where}: {text}, is {true:.6g}"


def name_of(label: str) -> str:
    """A row's label without seeds, notes and emphasis."""
    return re.sub(r"\(\d+( seeds)?\)|\*", "", label).replace("\\", "").strip()


def test_no_number_stands_twice_in_this_store(results: Path) -> None:
    rows = truths(results)
    shown = [f"{v:.1f}" for row in rows for v in row.scores.values()]
    shown += [f"{v:.1f}" for row in rows for v in row.differences.values()]
    shown += [f"{v:.1f}" for row in rows for v in (*row.retentions.values(), row.gap_closed)]
    twice = {text for text, count in Counter(shown).items() if count > 1} - {"nan"}
    assert not twice
    for row in rows:
        assert len(set(row.costs.values())) == len(COSTS)
    assert [len({row.costs[key] for row in rows}) for key in COSTS] == [len(rows)] * len(COSTS)


# --- tables ------------------------------------------------------------------------------------


def markdown_rows(text: str) -> list[dict[str, str]]:
    """The rows of the one pipe table, by heading; sections are left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:] if any(row[1:])]


@pytest.mark.slow
def test_markdown(results: Path, report: Path) -> None:
    truth = expected(results)
    rows = markdown_rows((report / "leaderboard.md").read_text(encoding="utf-8"))
    assert {name_of(row["Model"]) for row in rows} == set(truth)
    for row in rows:
        name = name_of(row["Model"])
        for heading, key in HEADINGS.items():
            say(row[heading], truth[name][key], f"{name}, {heading}", whole=True)


def test_latex(results: Path, report: Path) -> None:
    truth = expected(results)
    text = (report / "leaderboard.tex").read_text(encoding="utf-8")
    plain = {r"\pm": "±", "$": "", r"\Delta": "Δ", "{[}": "[", "{]}": "]", r"\%": "%", "--": "–"}
    lines = [line for line in text.splitlines() if "&" in line and not line.startswith("%")]
    lines = [line.split(r"\\")[0] for line in lines if "multicolumn" not in line]
    for old, new in plain.items():
        lines = [line.replace(old, new) for line in lines]
    lines = [re.sub(r"\^\{[\d,]*\}", "", line) for line in lines]
    lines = [re.sub(r"\\(textbf|underline|emph)\{([^{}]*)\}", r"\2", line) for line in lines]
    table = [[cell.strip() for cell in line.split("&")] for line in lines]
    seen = set()
    for row in table[1:]:
        named = dict(zip(table[0], row, strict=True))
        name = name_of(named["Model"])
        seen.add(name)
        for heading, key in HEADINGS.items():
            text = named[heading].replace("-", "−") if "–" not in named[heading] else "–"
            say(text, truth[name][key], f"{name}, {heading}", whole=True)
    assert seen == set(truth)


def test_csv(results: Path, report: Path) -> None:
    truth = expected(results)
    text = (report / "leaderboard.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(line for line in io.StringIO(text) if not line.startswith("#")))
    assert {name_of(row["model"]) for row in rows} == set(truth)
    for row in rows:
        name = name_of(row["model"])
        for key in HEADINGS.values():
            true, where = truth[name][key], f"{name}, {key}"
            same(row[key], true.value, where)
            same(row.get(f"{key}_spread", ""), true.spread, f"{where}, spread")
            same(row.get(f"{key}_low", ""), true.interval and true.interval.low, f"{where}, low")
            same(row.get(f"{key}_high", ""), true.interval and true.interval.high, f"{where}, high")


def same(text: str | float | None, true: float | None, where: str) -> None:
    if true is None:
        assert text in ("", None), f"{where}: {text}"
    else:
        assert text not in ("", None), f"{where}: nothing, is {true:.6g}"
        assert float(text) == pytest.approx(true, rel=1e-5), where  # type: ignore[arg-type]


@pytest.mark.slow
def test_json(results: Path, report: Path) -> None:
    tables = json.loads((report / "leaderboard.json").read_text(encoding="utf-8"))["tables"]
    for table, mode in zip(tables[:3], ("scores", "differences", "retention"), strict=True):
        truth = expected(results, mode)
        assert [c["key"] for c in table["columns"] if c["key"] in HEADINGS.values()] == list(
            HEADINGS.values()
        )
        assert len(table["rows"]) == len(truth)
        for row in table["rows"]:
            name = name_of(row["cells"]["model"]["value"])
            for key in HEADINGS.values():
                true, cell = truth[name][key], row["cells"][key]
                where, ends = f"{mode}, {name}, {key}", cell.get("interval") or {}
                same(cell["value"], true.value, where)
                same(cell.get("spread"), true.spread, f"{where}, spread")
                same(ends.get("low"), true.interval and true.interval.low, f"{where}, low")
                same(ends.get("high"), true.interval and true.interval.high, f"{where}, high")


def test_json_emphasis_and_terminal_rank_follow_the_board(results: Path, report: Path) -> None:
    """Three students, far apart: the ranks are 1, 2, 3 by score."""
    table = json.loads((report / "leaderboard.json").read_text(encoding="utf-8"))["tables"][0]
    marks = {
        name_of(row["cells"]["model"]["value"]): row["cells"][AVERAGE].get("emphasis", "")
        for row in table["rows"]
    }
    assert marks == {
        "teacher": "", "switch-kd-seed0-hybrid": "", "Switch-KD": "best", "kl": "second", "SFT": "",
    }  # fmt: skip
    ranks = {row["Model"]: row["Rank"] for row in terminal_rows(printed(results), "Rank")}
    assert {name_of(name): rank for name, rank in ranks.items()} == {
        "teacher": "–", "switch-kd-seed0-hybrid": "–", "Switch-KD": "1", "kl": "2", "SFT": "3",
    }  # fmt: skip


def terminal_rows(text: str, heading: str) -> list[dict[str, str]]:
    """The rows of the block of the terminal that has this heading."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if heading in re.split(r"\s{2,}", line.strip()))
    heads = re.split(r"\s{2,}", lines[start].strip())
    end = re.compile(rf"{re.escape(heads[0])}\s{{2,}}|\(")  # the next block, or the notes
    block = itertools.takewhile(lambda line: not end.match(line), lines[start + 1 :])
    rows = (re.split(r"\s{2,}", line.strip()) for line in block)
    return [dict(zip(heads, row, strict=True)) for row in rows if len(row) == len(heads) > 1]


@pytest.mark.slow
def test_terminal(results: Path) -> None:
    truth = expected(results)
    text = printed(results)
    for heading, key in HEADINGS.items():
        rows = terminal_rows(text, heading)
        assert {name_of(row["Model"]) for row in rows} == set(truth), heading
        for row in rows:
            name = name_of(row["Model"])
            where = f"{name}, {heading}"
            say(row[heading], truth[name][key], where, whole=key not in TASKS)


def test_categories(results: Path, report: Path) -> None:
    """Each subset by its own samples: accuracy, F1 for POPE, accuracy plus accuracy+ for MME."""
    import pandas as pd

    tables = json.loads((report / "categories.json").read_text(encoding="utf-8"))["tables"]
    titles = {table["title"]: table for table in tables}
    assert len(titles) == 3  # MME, MMMU, POPE
    rows = {row.label: row for row in truths(results)}
    seen = 0
    for table in tables:
        task = next(t for t in TASKS if load_task(t).title in table["title"])
        names = {c["key"]: name_of(c["title"]) for c in table["columns"][2:]}
        for line in table["rows"]:
            category = line["cells"]["category"]["value"]
            for key, name in names.items():
                scores = []
                for path in rows[name].runs:
                    frame = pd.read_parquet(path / "tasks" / f"{task}.samples.parquet")
                    part = frame[frame["category"] == category]
                    assert line["cells"]["n"]["value"] == len(part)
                    scores.append(_subset_score(task, part))
                where = f"{task}, {category}, {name}"
                assert line["cells"][key]["value"] == pytest.approx(np.mean(scores)), where
                seen += 1
    assert seen == (4 + 2 + 3) * len(rows)


def _subset_score(task: str, part: Any) -> float:
    if task == "pope":
        said, true = part["parsed"] == "yes", part["target"] == "yes"
        return 200 * float((said & true).sum()) / float(said.sum() + true.sum())
    if task == "mme":
        both = part.groupby("unit_id")["score"].min().mean()
        return 100 * float(part["score"].mean() + both) / 2
    return 100 * float(part["score"].mean())


# --- plots -------------------------------------------------------------------------------------


def plot(report: Path, name: str) -> tuple[list[Panel], dict[str, str]]:
    return read_svg(report / "plots" / f"{name}.svg")


@pytest.mark.parametrize("name,mode", [("forest", "differences"), ("retention", "retention")])
def test_intervals_side_by_side(results: Path, report: Path, name: str, mode: str) -> None:
    (panel,), colors = plot(report, name)
    truth = expected(results, mode)
    rows = {AVERAGE_TITLE: AVERAGE} | {title: task for task, title in TITLES.items()}
    shown = {"forest": {"Switch-KD", "kl"}, "retention": {"Switch-KD", "kl", "SFT"}}[name]
    assert {name_of(label) for label in colors} == shown
    for label, color in colors.items():
        points = {panel.row(y, list(rows)): (x, y) for x, y in panel.markers(color)}
        assert set(points) == set(rows)
        for title, (x, _) in points.items():
            value = truth[name_of(label)][rows[title]].value
            assert panel.x(x) == pytest.approx(value, abs=0.05), f"{label}, {title}"
        lines = {panel.row(line[0][1], list(rows)): line for line in panel.lines(color)}
        for title, line in lines.items():
            interval = truth[name_of(label)][rows[title]].interval
            assert interval is not None
            ends = [panel.x(x) for x, _ in line]
            assert ends == pytest.approx([interval.low, interval.high], abs=0.05), title


def test_gaps_bars(results: Path, report: Path) -> None:
    (panel,), colors = plot(report, "gaps")
    rows = {row.label: row for row in truths(results)}
    teacher, hybrid, student = (
        rows[name].scores for name in ("teacher", "switch-kd-seed0-hybrid", "Switch-KD")
    )
    titles = {AVERAGE_TITLE: AVERAGE} | {title: task for task, title in TITLES.items()}
    for label, color in colors.items():
        over, under = (teacher, hybrid) if label.startswith("Vision") else (hybrid, student)
        bars = panel.filled(color)
        assert len(bars) == len(titles)
        for corners in bars:
            middle = sum(y for _, y in corners) / len(corners)
            key = titles[panel.row(middle, list(titles))]
            ends = {panel.x(x) for x, _ in corners}
            far = max(ends, key=abs)
            assert far == pytest.approx(over[key] - under[key], abs=0.05), f"{label}, {key}"


def test_bars(results: Path, report: Path) -> None:
    panels, _ = plot(report, "bars")
    rows = truths(results)
    names = [row.label for row in rows]
    titles = {title: task for task, title in TITLES.items()}
    heights: dict[float, str] = {}
    scales = []
    seen = set()
    for panel in panels:
        (title,) = [t.text for t in panel.texts if t.text in titles]
        bars = sorted(
            (s.points for s in panel.shapes if s.filled and s.clipped), key=lambda p: p[0][1]
        )
        assert len(bars) == len(rows)
        if any(t.text in names for t in panel.texts):
            heights = {_middle(b): panel.row(_middle(b), names) for b in bars}
        for corners in bars:
            name = heights[min(heights, key=lambda y: abs(y - _middle(corners)))] \
                if _in_row(heights, corners) else names[bars.index(corners)]  # fmt: skip
            row = next(r for r in rows if r.label == name)
            value = row.scores[titles[title]]
            (label,) = [
                text.text
                for text in panel.texts
                if re.fullmatch(r"\d+\.\d", text.text) and abs(text.y - 3 - _middle(corners)) < 4
            ]
            close(float(label), value, f"{name}, {title}", label)
            length = max(x for x, _ in corners) - min(x for x, _ in corners)
            scales.append(length / value)
            seen.add((name, title))
    assert len(seen) == len(rows) * len(titles)
    assert max(scales) / min(scales) < 1.001  # every bar is as long as its number


def _middle(corners: list[Point]) -> float:
    return sum(y for _, y in corners) / len(corners)


def _in_row(heights: dict[float, str], corners: list[Point]) -> bool:
    return any(abs(y - _middle(corners)) < 0.5 for y in heights)


def test_radar(results: Path, report: Path) -> None:
    (panel,), colors = plot(report, "radar")
    rings = [p for p in panel.lines("line") if len(p) > 2]
    spokes = [p for p in panel.lines("line") if len(p) == 2]
    center = spokes[0][0]
    assert all(p[0] == center for p in spokes)
    ticks = sorted(int(t.text) for t in panel.texts if t.text.isdigit())
    radii = sorted(center[1] - ring[0][1] for ring in rings)
    assert len(ticks) == len(radii)
    scale = np.polyfit(radii, ticks, 1)
    groups: dict[str, list[str]] = {}
    for task in TASKS:
        skill = load_task(task).skill
        groups.setdefault("OCR" if skill == "ocr" else skill, []).append(task)
    spoke_of = {}
    for text in panel.texts:
        if text.text in groups:
            tips = [p[1] for p in spokes]
            spoke_of[text.text] = min(tips, key=lambda p: np.hypot(p[0] - text.x, p[1] - text.y))
    assert len(set(spoke_of.values())) == len(spoke_of) == len(spokes)
    rows = {row.label: row for row in truths(results)}
    assert {name_of(label) for label in colors} == set(rows)
    for label, color in colors.items():
        points = panel.markers(color)
        for group, tip in spoke_of.items():
            own = min(points, key=lambda point, tip=tip: _turn(point, tip, center))
            radius = np.hypot(own[0] - center[0], own[1] - center[1])
            value = np.mean([rows[name_of(label)].scores[task] for task in groups[group]])
            assert np.polyval(scale, radius) == pytest.approx(value, abs=0.1), f"{label}, {group}"


def _turn(one: Point, other: Point, center: Point) -> float:
    """The angle between two points, seen from the center."""
    a, b = (np.arctan2(p[1] - center[1], p[0] - center[0]) for p in (one, other))
    return float(abs((a - b + np.pi) % (2 * np.pi) - np.pi))


def test_pareto(results: Path, report: Path) -> None:
    panels, _ = plot(report, "pareto")
    rows = truths(results)
    keys = []
    for panel in panels:
        key = next(
            key
            for text in panel.texts
            for start, key in (("Latency", "latency_ms"), ("Parameters", "parameters"))
            if text.text.startswith(start)
        )
        keys.append(key)
        true = {row.label: (row.costs[key], row.scores[AVERAGE]) for row in rows}
        points = [s for s in panel.shapes if s.marker and s.clipped]
        found = {}
        for point in points:
            x, y = panel.x(point.points[0][0]), panel.y(point.points[0][1])
            name = min(true, key=lambda n: abs(true[n][1] - y))
            assert (x, y) == pytest.approx(true[name], rel=0.02), f"{key}, {name}"
            found[name] = point.color
        assert set(found) == set(true)
        assert len(set(found.values())) == len(found)
        (front,) = panel.lines("muted")
        corners = {(round(panel.x(x), 6), round(panel.y(y), 1)) for x, y in front}
        best = [n for n, (cost, score) in true.items()
                if not any(c <= cost and s > score for c, s in true.values())]  # fmt: skip
        for name in true:
            on_line = any(
                x == pytest.approx(true[name][0], rel=0.02) and abs(y - true[name][1]) < 0.3
                for x, y in corners
            )
            assert on_line == (name in best), f"{key}: {name} on the front: {on_line}"
    assert "latency_ms" in keys or "parameters" in keys


def test_pareto_summary_names_the_front(results: Path, report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    rows = truths(results)
    assert "up and left is better" in page
    front = re.search(r"On the front: ([^.]*)\.", page)
    assert front is not None
    best = {
        row.label
        for row in rows
        if not any(
            other.costs["latency_ms"] <= row.costs["latency_ms"]
            and other.scores[AVERAGE] > row.scores[AVERAGE]
            for other in rows
        )
    }
    assert set(front[1].split(", ")) == best


def test_training_curves(results: Path, report: Path) -> None:
    """Losses by term and knees by side, against the log's lines."""
    logs: dict[str, list[list[dict[str, Any]]]] = {}
    for row in truths(results):
        for path in row.runs:
            checkpoint = json.loads((path / "manifest.json").read_text())["model"]["path"]
            log = Path(checkpoint).parent / "train_log.jsonl"
            if log.is_file():
                lines = [json.loads(line) for line in log.read_text().splitlines()]
                logs.setdefault(row.label, []).append(lines)
    panels, colors = plot(report, "losses")
    for panel in panels:
        (title,) = [t.text for t in panel.texts if t.text in ("total loss", "ce", "dbild", "vsd")]
        for label, color in colors.items():
            wanted = [
                [line["loss"] if title == "total loss" else line["terms"][title] for line in lines]
                for lines in logs[name_of(label)]
                if title in ("total loss", *lines[0]["terms"])
            ]
            drawn = panel.lines(color)
            assert len(drawn) == len(wanted), f"{title}, {label}"
            for line, values in zip(drawn, wanted, strict=True):
                assert panel.y(line[0][1]) == pytest.approx(values[0], abs=0.03), (
                    f"{title}, {label}"
                )
                assert panel.y(line[-1][1]) == pytest.approx(values[-1], abs=0.03)
    panels, colors = plot(report, "knees")
    for panel in panels:
        (side,) = [t.text for t in panel.texts if t.text in ("teacher", "student")]
        for label, color in colors.items():
            for line, lines in zip(panel.lines(color), logs[name_of(label)], strict=True):
                first = lines[0][f"knee_{side}_p50"]
                assert panel.y(line[0][1]) == pytest.approx(first, rel=0.02), f"{side}, {label}"
            for area, lines in zip(panel.filled(color), logs[name_of(label)], strict=True):
                start = min(x for x, _ in area)
                edge = [panel.y(y) for x, y in area if x == start]
                low, high = lines[0][f"knee_{side}_p10"], lines[0][f"knee_{side}_p90"]
                assert (min(edge), max(edge)) == pytest.approx((low, high), rel=0.03), side


def test_reliability(results: Path, report: Path) -> None:
    """Bins of ten percent, by hand from the stored answers of MME and POPE."""
    import pandas as pd

    (panel,), colors = plot(report, "reliability")
    rows = {row.label: row for row in truths(results)}
    labels = {re.sub(r" \([\d.]+\)$", "", label): label for label in colors}
    assert {name_of(label) for label in labels} == set(rows)
    for name, label in labels.items():
        frames = [
            pd.read_parquet(path / "tasks" / f"{task}.samples.parquet")
            for path in rows[name].runs
            for task in ("mme", "pope")
        ]
        frame = pd.concat(frames)
        bins = frame.groupby((frame["answer_confidence"] * 10).astype(int).clip(0, 9))
        points = [
            (100 * b["answer_confidence"].mean(), 100 * b["score"].mean())
            for _, b in bins
            if len(b) >= 5
        ]
        drawn = [(panel.x(x), panel.y(y)) for x, y in panel.markers(colors[label])]
        assert np.array(drawn) == pytest.approx(np.array(points), abs=0.1), name
        error = sum(len(b) * abs(100 * b["answer_confidence"].mean() - 100 * b["score"].mean())
                    for _, b in bins) / len(frame)  # fmt: skip
        assert label.endswith(f"({error:.1f})"), f"{label}: {error}"


# --- the head of the page ----------------------------------------------------------------------


def test_truth_helper_reads_what_it_says(results: Path) -> None:
    """The expectations are not empty."""
    row: Truth = next(r for r in truths(results) if r.label == "Switch-KD")
    assert len(row.runs) == row.seeds == 2
    assert set(row.scores) == {*TASKS, AVERAGE}


# --- compare and check -------------------------------------------------------------------------

# Two runs whose scores are all apart; the first named is the reference of `compare`.
BASELINE, CANDIDATE = "sft-seed1", "switch-kd-seed0"


def pair(results: Path) -> dict[str, tuple[float, float]]:
    """(baseline, candidate) by benchmark and for the average, as the files have them."""
    one, other = run_named(results, BASELINE), run_named(results, CANDIDATE)
    found = {task: (raw_score(one, task), raw_score(other, task)) for task in TASKS}
    columns = list(zip(*found.values(), strict=True))
    return found | {AVERAGE: (float(np.mean(columns[0])), float(np.mean(columns[1])))}


def changes(results: Path) -> dict[str, tuple[int, int]]:
    """(fixed, broken) documents of the benchmarks that count documents, by hand."""
    one, other = run_named(results, BASELINE), run_named(results, CANDIDATE)
    found = {}
    for task in ("scienceqa_img", "mmmu", "textvqa"):
        old, new = one.samples(task)["score"].to_numpy(), other.samples(task)["score"].to_numpy()
        found[task] = int((new > old).sum()), int((new < old).sum())
    return found


def command(*words: str, code: int | None = 0) -> str:
    """What a command prints."""
    from typer.testing import CliRunner

    from kd_bench.cli import app

    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "220"})
    assert code is None or done.exit_code == code, done.output
    return done.output


@pytest.mark.slow
def test_compare_on_the_terminal(results: Path) -> None:
    text = command("compare", BASELINE, CANDIDATE, "--results", str(results))
    rows = terminal_rows(text, "Benchmark")
    true, moved = pair(results), changes(results)
    assert {row["Benchmark"] for row in rows} == set(true)
    for row in rows:
        task = row["Benchmark"]
        old, new = true[task]
        close(number(row[BASELINE]), old, f"{task}, {BASELINE}", row[BASELINE])
        close(number(row[CANDIDATE]), new, f"{task}, {CANDIDATE}", row[CANDIDATE])
        say(row["Difference"], Value(new - old, None, _interval(results, task)), task)
        if task in moved:
            assert (int(row["Fixed"]), int(row["Broken"])) == moved[task], task


def _interval(results: Path, task: str) -> Interval:
    from kd_bench.compare import compare

    runs = [run_named(results, name) for name in (BASELINE, CANDIDATE)]
    found = compare(runs, categories=False)
    if task == AVERAGE:
        return found.average_differences[0].interval
    return next(t for t in found.tasks if t.task == task).differences[0].interval


def test_compare_as_json(results: Path) -> None:
    text = command("compare", BASELINE, CANDIDATE, "--json", "--results", str(results))
    value = json.loads(text)
    true, moved = pair(results), changes(results)
    assert [run["name"] for run in value["runs"]] == [BASELINE, CANDIDATE]
    shown = {task["task"]: task for task in value["tasks"]}
    assert set(shown) == set(TASKS)
    for name, task in shown.items():
        assert [s["value"] for s in task["scores"]] == pytest.approx(true[name])
        (change,) = task["differences"]
        assert change["value"] == pytest.approx(true[name][1] - true[name][0])
        if name in moved:
            assert (change["fixed"], change["broken"]) == moved[name]
    assert [s["value"] for s in value["average"]] == pytest.approx(true[AVERAGE])


def test_flips_stand_in_their_columns(results: Path) -> None:
    words = ("compare", BASELINE, CANDIDATE, "--flips", "textvqa", "--results", str(results))
    one, other = (run_named(results, n).samples("textvqa").set_index("question")
                  for n in (BASELINE, CANDIDATE))  # fmt: skip
    flips = json.loads(command(*words, "--json"))
    assert len(flips) == sum(changes(results)["textvqa"])
    for flip in flips:
        question = flip["question"]
        assert flip["target"] == one["target"][question]
        assert flip["reference_answer"] == one["answer"][question]
        assert flip["other_answer"] == other["answer"][question]
        better = other["score"][question] > one["score"][question]
        assert flip["change"] == ("fixed" if better else "broken")
    text = command(*words).replace("Image", "")  # nothing is stored there
    rows = terminal_rows(text, BASELINE)
    assert len(rows) == len(flips)
    for row in rows:
        question = row["Question"]
        assert (row["Target"], row[BASELINE], row[CANDIDATE]) == (
            one["target"][question], one["answer"][question], other["answer"][question],
        )  # fmt: skip


@pytest.fixture(scope="module")
def checked(results: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every rendering of one verdict, and of the one with the runs the other way round."""
    found = {}
    for name, new, old in (("up", CANDIDATE, BASELINE), ("down", BASELINE, CANDIDATE)):
        folder = tmp_path_factory.mktemp("check")
        words = ["check", new, "--against", old, "--results", str(results)]
        words += ["--junit", str(folder / "j.xml"), "--summary", str(folder / "s.md")]
        found[f"{name} terminal"] = command(*words, code=0 if name == "up" else 1)
        found[f"{name} junit"] = (folder / "j.xml").read_text(encoding="utf-8")
        found[f"{name} summary"] = (folder / "s.md").read_text(encoding="utf-8")
        found[f"{name} json"] = command("check", new, "--against", old, "--json",
                                        "--results", str(results), code=None)  # fmt: skip
    return found


def sides(results: Path, way: str) -> dict[str, tuple[float, float]]:
    """(baseline, candidate); `down` takes the better run for the baseline."""
    true = pair(results)
    return true if way == "up" else {task: (new, old) for task, (old, new) in true.items()}


@pytest.mark.parametrize("way", ["up", "down"])
@pytest.mark.slow
def test_check_on_the_terminal(results: Path, checked: dict[str, str], way: str) -> None:
    true = sides(results, way)
    rows = terminal_rows(checked[f"{way} terminal"], "Benchmark")
    assert {row["Benchmark"] for row in rows} == set(true)
    for row in rows:
        old, new = true[row["Benchmark"]]
        close(number(row["Baseline"]), old, row["Benchmark"], row["Baseline"])
        close(number(row["Candidate"]), new, row["Benchmark"], row["Candidate"])
        shown = re.match(r"[+−-]?[\d.]+", row["Difference"])
        assert shown is not None
        close(number(shown[0]), new - old, row["Benchmark"], shown[0])


@pytest.mark.parametrize("way", ["up", "down"])
def test_check_as_json(results: Path, checked: dict[str, str], way: str) -> None:
    true = sides(results, way)
    value = json.loads(checked[f"{way} json"])
    names = [CANDIDATE, BASELINE] if way == "up" else [BASELINE, CANDIDATE]
    for key, name in zip(("candidate", "baseline"), names, strict=True):
        assert value[key].startswith(name)
    for verdict in value["verdicts"]:
        old, new = true[verdict["name"]]
        assert (verdict["baseline"], verdict["candidate"]) == pytest.approx((old, new))
        assert verdict["difference"]["value"] == pytest.approx(new - old)


@pytest.mark.parametrize("way", ["up", "down"])
def test_check_in_the_job_summary(results: Path, checked: dict[str, str], way: str) -> None:
    true, moved = sides(results, way), changes(results)
    text = checked[f"{way} summary"]
    rows = markdown_rows(text.replace("\\_", "_"))
    assert {row["benchmark"] for row in rows} == set(true)
    for row in rows:
        task = row["benchmark"]
        old, new = true[task]
        close(number(row["baseline"]), old, task, row["baseline"])
        close(number(row["candidate"]), new, task, row["candidate"])
        close(number(row["difference"]), new - old, task, row["difference"])
        if task in moved:
            counts = int(row["fixed"]), int(row["broken"])
            assert counts == (moved[task] if way == "up" else moved[task][::-1]), task
    head = [CANDIDATE, BASELINE] if way == "up" else [BASELINE, CANDIDATE]
    assert re.search(rf"{head[0]}.* against {head[1]}", text)


@pytest.mark.parametrize("way", ["up", "down"])
def test_check_in_junit(results: Path, checked: dict[str, str], way: str) -> None:
    """The sentence of each case tells its own benchmark's numbers, in this order."""
    from xml.etree import ElementTree

    true = sides(results, way)
    suite = ElementTree.fromstring(checked[f"{way} junit"])
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert set(true) <= set(cases)
    for task, (old, new) in true.items():
        sentence = cases[task].findtext("system-out") or ""
        numbers = re.search(r"([\d.]+) -> ([\d.]+) \(([+−-][\d.]+)", sentence)
        assert numbers is not None, sentence
        for text, value in zip(numbers.groups(), (old, new, new - old), strict=True):
            close(number(text), value, task, text)
        failed = cases[task].find("failure") is not None
        assert failed == (way == "down" and "regressed" in sentence), sentence
