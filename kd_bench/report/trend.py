"""`report --trend`: the averages of a suite's runs by date, and where the baseline moved.

Every finished run has a point, an earlier one of the same model too. Its difference is from the run
that the baseline was when it finished; of older stores, which kept no moves, from today's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kd_bench.compare.estimates import Evidence
from kd_bench.errors import UsageError
from kd_bench.records import AVERAGE, Interval
from kd_bench.report.board import Board, Entry
from kd_bench.report.board_loading import load_board
from kd_bench.report.page import claim_report, write_report
from kd_bench.report.plots import trend
from kd_bench.report.relations import read_evidence
from kd_bench.report.style import plotting
from kd_bench.report.tables import (
    Cell,
    Column,
    Row,
    Table,
    clean,
    to_csv,
    to_html,
    to_json_text,
    to_markdown,
)
from kd_bench.store import Run, baseline_moves, baselines

LAYOUT = (("plots", "Trend", "The average of every finished run by date.", ("trend",)),)


@dataclass(frozen=True)
class Step:
    """One finished run on the way.

    Attributes:
        line: what it is a point of: its method, or its name.
        average: mean of all benchmarks; None where it lacks one or had another protocol.
        baseline: folder name of the run that the baseline was then; empty for none.
        change, change_interval: points beside that baseline, paired by sample.
    """

    when: datetime
    run: Run
    name: str
    line: str
    average: float | None
    interval: Interval | None
    baseline: str
    change: float | None
    change_interval: Interval | None


def render_trend(
    results: Path,
    destination: Path,
    names: Sequence[str] | None = None,
    *,
    suite: str | None = None,
    baseline: str | None = None,
) -> Path:
    """Write `index.html`, `trend.md`, `.csv`, `.json` and the plot; returns the page's path.

    Args:
        baseline: name of the baseline whose moves are shown; default: the suite's.

    Raises:
        UsageError: there is no finished run of that suite.
    """
    steps, suite = steps_of(results, names, suite, baseline)
    moves = [
        (when, run) for when, name, run in baseline_moves(results) if name == (baseline or suite)
    ]
    table = _table(steps, suite)
    files = {
        "trend.md": to_markdown(table), "trend.csv": to_csv(table),
        "trend.json": to_json_text([table]),
    }  # fmt: skip
    claim_report(destination, files, ["trend"])
    with plotting():
        plot = trend(steps, moves)
    intro = "Differences are from the baseline of that day, paired by sample, with their interval."
    context: dict[str, Any] = {
        "title": f"{len(steps)} runs of the suite {clean(suite)}",
        "eyebrow": "kd-bench report",
        "mini": suite.startswith("mini"),
        "lead": [_moved(moves, steps)],
        "trend": {"html": Markup(to_html(table)), "summary": table.title, "intro": intro},
        "downloads": [(name, "the same table") for name in files],
    }
    return write_report(destination, context, files, [plot] if plot else [], LAYOUT)


def steps_of(
    results: Path,
    names: Sequence[str] | None = None,
    suite: str | None = None,
    baseline: str | None = None,
) -> tuple[list[Step], str]:
    """The finished runs of a suite by date, and the suite's name."""
    board = load_board(results, names, suite, every=True)
    single = [
        replace(entry, key=run.path.name, name=manifest.model.name, runs=(run,),
                manifests=(manifest,), results=(found,), scores=_scores(board, entry, number))
        for entry in board.entries
        for number, (run, manifest, found) in enumerate(
            zip(entry.runs, entry.manifests, entry.results, strict=True)
        )
        if manifest.status == "complete"
    ]  # fmt: skip
    if not single:
        raise UsageError(
            f"No finished run of the suite {suite or board.suite!r} in {results}.",
            "`kd-bench runs list` shows what there is.",
        )
    board = replace(board, entries=tuple(single))
    evidence = read_evidence(board)
    name = baseline or board.suite
    moves = [(when, run) for when, known, run in baseline_moves(results) if known == name]
    today = baselines(results).get(name)
    found = []
    for entry in sorted(single, key=lambda e: (_when(e), e.key)):
        past = [run for when, run in moves if when <= _when(entry)]
        then = past[-1] if past else "" if moves or today is None else today.run
        found.append(_step(board, evidence, entry, then))
    return found, board.suite


def _scores(board: Board, entry: Entry, number: int) -> Any:
    """The scores of one seed of an entry."""
    return {
        key: replace(score, value=score.seeds[number] if score.seeds else score.value, spread=None)
        for key, score in entry.scores.items()
    }


def _step(board: Board, evidence: Evidence, entry: Entry, baseline: str) -> Step:
    score, method = entry.score(AVERAGE), entry.method
    whole = set(evidence.tasks) == {task.id for task in board.tasks}
    mine = [entry.key]
    known = whole and score.comparable and evidence.has(AVERAGE, mine)
    change = None
    if known and baseline not in ("", entry.key) and evidence.has(AVERAGE, [baseline]):
        change = evidence.difference(AVERAGE, [baseline], mine)
    return Step(
        when=_when(entry),
        run=entry.runs[0],
        name=entry.name,
        line=f"{method} ({entry.role})" if method else entry.name,
        average=score.value if score.known and score.comparable else None,
        interval=evidence.score(AVERAGE, mine).interval if known else None,
        baseline=baseline,
        change=change.value if change else None,
        change_interval=change.interval if change else None,
    )


def _when(entry: Entry) -> datetime:
    manifest = entry.manifests[0]
    when = datetime.fromisoformat(manifest.finished or manifest.created)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _moved(moves: Sequence[tuple[datetime, str]], steps: Sequence[Step]) -> str:
    if not moves:
        return "No move of the baseline was recorded: differences are from the one that is set now."
    names = {step.run.path.name: step.name for step in steps}
    told = (f"{when:%Y-%m-%d}: {clean(names.get(run, run))}" for when, run in moves)
    return f"The baseline moved {len(moves)} times: {'; '.join(told)}."


def _table(steps: Sequence[Step], suite: str) -> Table:
    columns = (
        Column("date", "Finished", "text"),
        Column("model", "Model", "text"),
        Column("run", "Run", "text"),
        Column("average", "Average", "score", interval=True),
        Column("change", "Δ baseline", "difference"),
        Column("baseline", "Baseline then", "text"),
    )
    rows = tuple(
        Row(
            step.run.path.name,
            (
                Cell(f"{step.when:%Y-%m-%d %H:%M}"),
                Cell(step.name),
                Cell(step.run.path.name),
                Cell(step.average, None, step.interval),
                Cell(step.change, None, step.change_interval),
                Cell("itself" if step.baseline == step.run.path.name else step.baseline or "none"),
            ),
        )
        for step in steps
    )
    warning = "Embedded mini world: not the real benchmarks." if suite.startswith("mini") else ""
    caption = f"Suite {suite}. In brackets: 95 % intervals over samples."
    return Table("Runs by date", columns, rows, caption, warning=warning)
