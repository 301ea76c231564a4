"""A board -> the tables of a report: leaderboard, summary, published rows, run facts."""

from collections.abc import Iterable
from typing import Literal

from kd_bench.records import AVERAGE, Interval
from kd_bench.report.board import ROLE_TITLES, Board, Entry, Score
from kd_bench.report.tables import (
    Cell,
    Column,
    Kind,
    Row,
    Table,
    clean,
    format_interval,
    format_number,
)

Mode = Literal["scores", "differences", "retention"]
MODES: tuple[tuple[Mode, str], ...] = (
    ("scores", "Scores"),
    ("differences", "Difference from SFT"),
    ("retention", "Retention"),
)
KINDS: dict[Mode, Kind] = {"scores": "score", "differences": "difference", "retention": "percent"}
TITLES: dict[Mode, str] = {
    "scores": "Leaderboard",
    "differences": "Differences from SFT, in points",
    "retention": "Retention: share of the teacher's score, in percent",
}
MINI = "Embedded mini world: not the real benchmarks."


class _Notes:
    """Numbers each distinct note once, in order of appearance."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Iterable[str]) -> tuple[int, ...]:
        found = []
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
            found.append(self.texts.index(text))
        return tuple(found)


def leaderboard(board: Board, mode: Mode = "scores") -> Table:
    """Every column of the leaderboard: benchmarks, average, relations, cost."""
    notes = _Notes()
    kind = KINDS[mode]
    columns = [
        Column("model", "Model", "text"),
        *(
            Column(task.id, task.short, kind, task.group, (), True, task.title)
            for task in board.tasks
        ),
        Column(AVERAGE, board.average_title, kind, "overall", (), True, "Mean of all benchmarks"),
        *SUMMARY_COLUMNS,
        *_training_columns(board),
    ]
    keys = [*(task.id for task in board.tasks), AVERAGE]
    rows = [
        _row(
            board,
            entry,
            (
                _name_cell(entry, notes),
                *(_score_cell(board, entry, key, mode, notes) for key in keys),
                *_summary_cells(board, entry),
                *_training_cells(board, entry),
            ),
        )
        for entry in board.entries
    ]
    return _table(board, TITLES[mode], columns, rows, notes)


def terminal_tables(board: Board) -> list[Table]:
    """What a terminal shows: the summary, then the benchmarks."""
    return [summary(board), benchmark_table(board)] if board.entries else [summary(board)]


SUMMARY_COLUMNS = (
    Column("difference", "Δ SFT", "difference", "relation",
           description="Points above SFT on the average"),
    Column("retention", "Retention", "percent", "relation", (), True,
           "The average as a share of the teacher's"),
    Column("gap_closed", "Gap closed", "percent", "relation", (), True,
           "Share of the way from SFT to the teacher, on the average"),
    Column("parameters", "Params", "count", "cost", description="Number of weights"),
    Column("weight_bytes", "Weights", "bytes", "cost", description="Size of the weights"),
    Column("latency_ms", "Latency", "milliseconds", "cost", (), True,
           "Milliseconds for one answer, and their range over models of equal size"),
    Column("peak_memory_bytes", "Memory", "bytes", "cost", (), True,
           "Peak memory of the evaluation, and its range over models of equal size"),
)  # fmt: skip


def summary(board: Board) -> Table:
    """The leaderboard without benchmarks: rank, average, relations, cost."""
    notes = _Notes()
    columns = (
        Column("model", "Model", "text"),
        Column("rank", "Rank", "rank", "overall"),
        Column(AVERAGE, board.average_title, "score", "overall", (), True),
        *SUMMARY_COLUMNS,
        *_training_columns(board),
    )
    rows = [
        _row(
            board,
            entry,
            (
                _name_cell(entry, notes),
                Cell(entry.score(AVERAGE).rank),
                _score_cell(board, entry, AVERAGE, "scores", notes),
                *_summary_cells(board, entry),
                *_training_cells(board, entry),
            ),
        )
        for entry in board.entries
    ]
    return _table(board, "Summary", columns, rows, notes)


def benchmark_table(board: Board) -> Table:
    """The leaderboard's benchmark columns alone, for narrow places."""
    notes = _Notes()
    columns = (
        Column("model", "Model", "text"),
        *(Column(task.id, task.short, "score", task.group) for task in board.tasks),
    )
    rows = tuple(
        _row(
            board,
            entry,
            (
                Cell(entry.name, remark=_seeds(entry)),
                *(_score_cell(board, entry, task.id, "scores", notes) for task in board.tasks),
            ),
        )
        for entry in board.entries
    )
    return Table("Benchmarks", columns, rows, notes=tuple(notes.texts))


def _table(
    board: Board, title: str, columns: Iterable[Column], rows: Iterable[Row], notes: _Notes
) -> Table:
    return Table(
        title,
        tuple(columns),
        tuple(rows),
        _caption(board),
        (*notes.texts, *_remarks(board)),
        MINI if board.mini else "",
        BOLD if any(cell.emphasis for row in rows for cell in row.cells) else "",
    )


def _remarks(board: Board) -> list[str]:
    """Notes on the whole table: rows of several number types, and what is not in it."""
    notes = []
    types: dict[str, list[str]] = {}
    for entry in board.entries:
        protocols = (manifest.protocol for manifest in entry.manifests)
        kinds = {f"{p.dtype}, {p.quantize}" if p.quantize else p.dtype for p in protocols}
        types.setdefault(" and ".join(sorted(kinds)), []).append(entry.label)
    if len(types) > 1:
        told = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in types.items())
        notes.append(f"The rows were computed in different number types: {told}.")
    if board.left_out:
        notes.append("Left out: " + "; ".join(board.left_out) + ".")
    return notes


BOLD = "Bold: the best student, and all that are not shown to be behind it; {second}: the next."


def _caption(board: Board) -> str:
    parts = [f"Suite {board.suite}."]
    if any(len(entry.runs) > 1 for entry in board.entries):
        parts.append("± is the spread over training seeds.")
    if any(len(entry.runs) == 1 for entry in board.entries):
        parts.append(
            "A row of one seed has the interval of the choice of samples in its place: "
            "what another training seed would give is unknown."
        )
    if board.floor is not None:
        parts.append("Δ SFT is in points.")
    return " ".join([*parts, _levels(board)]).strip()


def _levels(board: Board) -> str:
    """The levels of the intervals in brackets; they are not all the same."""
    kinds: dict[str, set[float]] = {}
    for entry in board.entries:
        for name, scores in (
            ("scores and differences", (*entry.scores.values(), *entry.differences.values())),
            ("retention and gap closed", (*entry.retentions.values(), entry.gap_closed)),
        ):
            kinds.setdefault(name, set()).update(s.interval.level for s in scores if s.interval)
    levels = {name: found for name, found in kinds.items() if found}
    if not levels:
        return ""
    texts = {
        name: " and ".join(f"{100 * level:g} %" for level in sorted(found))
        for name, found in levels.items()
    }
    if len(set(texts.values())) == 1:
        return f"In brackets: {next(iter(texts.values()))} intervals."
    return "In brackets: " + "; ".join(f"{t} intervals of {n}" for n, t in texts.items()) + "."


# --- cells -------------------------------------------------------------------------------------


def _row(board: Board, entry: Entry, cells: tuple[Cell, ...]) -> Row:
    return Row(
        entry.key,
        cells,
        _section(board, entry),
        entry.role,
        board.colours[entry.key],
        status_of(entry) if entry.health else "",
    )


def _section(board: Board, entry: Entry) -> str:
    """The heading of a row; there is one floor, other SFT models stand beside it."""
    if entry.role == "sft" and board.floor is not None and entry.key != board.floor.key:
        return "SFT, not the floor"
    return ROLE_TITLES.get(entry.role, entry.role)


def _seeds(entry: Entry) -> str:
    return f"{len(entry.runs)} seeds" if len(entry.runs) > 1 else ""


def _name_cell(entry: Entry, notes: _Notes) -> Cell:
    return Cell(
        entry.name, notes=notes(entry.health), remark=_seeds(entry), detail=tuple(entry.health)
    )


def status_of(entry: Entry) -> str:
    """The worst status among an entry's runs, `check` where only answers failed."""
    order = ("unhealthy", "partial", "running")
    found = [s for s in order if any(m.status == s for m in entry.manifests)]
    return found[0] if found else "check"


def _values_of(entry: Entry, mode: Mode) -> dict[str, Score]:
    """An entry's numbers by benchmark in one of the three views."""
    return {
        "scores": entry.scores,
        "differences": entry.differences,
        "retention": entry.retentions,
    }[mode]


def _score_cell(board: Board, entry: Entry, key: str, mode: Mode, notes: _Notes) -> Cell:
    score = _values_of(entry, mode).get(key)
    doubt = not entry.score(key).comparable
    if score is None or not score.known:
        return Cell(None, doubt=doubt)
    return Cell(
        score.value,
        score.spread,
        score.interval,
        _emphasis(board, entry, key) if mode == "scores" else "",
        notes(score.marks),
        detail=_detail(board, entry, key, mode),
        doubt=doubt,
    )


def _emphasis(board: Board, entry: Entry, key: str) -> Literal["", "best", "second"]:
    """Best and second by rank among the students; none where nobody can be told apart."""
    ranks = sorted({r for e in board.students if (r := e.score(key).rank) is not None})
    rank = entry.score(key).rank
    if rank is None or len(ranks) < 2 or rank not in ranks[:2]:
        return ""
    return "best" if rank == ranks[0] else "second"


def _summary_cells(board: Board, entry: Entry) -> tuple[Cell, ...]:
    relations: tuple[tuple[Score | None, Kind], ...] = (
        (entry.differences.get(AVERAGE), "difference"),
        (entry.retentions.get(AVERAGE), "percent"),
        (entry.gap_closed, "percent"),
    )
    cells = [
        Cell(score.value, None, score.interval, detail=(interval_text(score, kind),))
        if score is not None and score.known
        else Cell()
        for score, kind in relations
    ]
    cost = entry.cost
    return (
        *cells,
        Cell(cost.parameters),
        Cell(cost.weight_bytes),
        Cell(cost.latency_ms, interval=_range(board, entry, "latency_ms")),
        Cell(cost.peak_memory_bytes, interval=_range(board, entry, "peak_memory_bytes")),
    )


def _training_columns(board: Board) -> tuple[Column, ...]:
    """What training cost; only where the lineage of some row says it."""
    devices = {e.training_devices for e in board.entries} - {""}
    hours = {"cuda": "GPU-hours", "cpu": "CPU-hours"}
    title = hours.get(next(iter(devices)), "Device-hours") if len(devices) == 1 else "Device-hours"
    columns = (
        Column("training_tokens", "Tokens", "count", "training",
               description="Tokens that training read, mean over seeds"),
        Column("training_hours", title, "hours", "training",
               description="Hours of training on all devices together, mean over seeds"),
    )  # fmt: skip
    return tuple(c for c in columns if any(getattr(e, c.key) is not None for e in board.entries))


def _training_cells(board: Board, entry: Entry) -> tuple[Cell, ...]:
    return tuple(Cell(getattr(entry, column.key)) for column in _training_columns(board))


def _range(board: Board, entry: Entry, cost: str) -> Interval | None:
    """From the least to the most that models of this size were measured to cost.

    None where nothing was measured twice, or where it came out alike (within 2 %).
    """
    values = board.measured(entry, cost)
    if len(values) < 2 or values[-1] <= 1.02 * values[0]:
        return None
    return Interval(values[0], values[-1], 1.0)


# --- what pointing at a cell tells -------------------------------------------------------------


def _detail(board: Board, entry: Entry, key: str, mode: Mode) -> tuple[str, ...]:
    """Interval, n, seeds, protocol, health."""
    score = _values_of(entry, mode)[key]
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
    return tuple(clean(line) for line in (*lines, *score.marks, *entry.health) if line)


def interval_text(score: Score, kind: Kind) -> str:
    """`95 % interval 1.2 to 3.4`, empty where there is none."""
    if score.interval is None:
        return ""
    sources = ", over seeds and samples" if score.holds_seeds else ""
    ends = format_interval(Cell(score.value, interval=score.interval), kind)
    return f"{round(100 * score.interval.level)} % interval {ends}{sources}"


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
