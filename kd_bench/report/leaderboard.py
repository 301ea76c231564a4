"""Tables of measured rows: the leaderboard in three views, and the runs of a store."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from kd_bench.errors import KdBenchError
from kd_bench.records import AVERAGE, Interval, RunManifest
from kd_bench.report.board import ROLE_TITLES, Board, Entry, Score
from kd_bench.report.tables import (
    Cell,
    Column,
    Kind,
    Notes,
    Row,
    Table,
    clean,
    format_interval,
    format_number,
)
from kd_bench.store import Catalogue, Run, missing_tasks

Mode = Literal["scores", "differences", "retention"]


class View(NamedTuple):
    """What the columns of benchmarks show: the button's name, the table's title, the numbers."""

    name: str
    title: str
    kind: Kind
    of: Callable[[Entry], dict[str, Score]]


VIEWS: dict[Mode, View] = {
    "scores": View("Scores", "Leaderboard", "score", lambda entry: entry.scores),
    "differences": View(
        "Difference from SFT", "Differences from SFT, in points", "difference",
        lambda entry: entry.differences,
    ),
    "retention": View(
        "Retention", "Retention: share of the teacher's score, in percent", "percent",
        lambda entry: entry.retentions,
    ),
}  # fmt: skip
MINI = "Embedded mini world: not the real benchmarks."
BOLD = "Bold: the best student, and all that are not shown to be behind it; {second}: the next."
# Relations and costs: the same in every view.
SUMMARY = (
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


def leaderboard(board: Board, mode: Mode = "scores") -> Table:
    """Every column of the leaderboard: benchmarks, average, relations, cost."""
    view = VIEWS[mode]
    benchmarks = [
        Column(task.id, task.short, view.kind, task.group, (), True, task.title)
        for task in board.tasks
    ]
    return _table(board, view.title, mode, [*benchmarks, _average(board, view.kind)])


def terminal_tables(board: Board) -> list[Table]:
    """What a terminal shows: the leaderboard without benchmarks, then these alone."""
    rank = Column("rank", "Rank", "rank", "overall")
    summary = _table(board, "Summary", "scores", [rank, _average(board, "score")])
    if not board.entries:
        return [summary]
    notes = Notes()
    columns = [Column("name", "Model", "text")]
    columns += [Column(task.id, task.short, "score", task.group) for task in board.tasks]
    rows = _rows(board, columns, "scores", notes)
    return [summary, Table("Benchmarks", tuple(columns), rows, notes=tuple(notes.texts))]


def _average(board: Board, kind: Kind) -> Column:
    title = board.average_title
    return Column(AVERAGE, title, kind, "overall", (), True, "Mean of all benchmarks")


def _table(board: Board, title: str, mode: Mode, scores: list[Column]) -> Table:
    notes = Notes()
    columns = (Column("model", "Model", "text"), *scores, *SUMMARY, *_token_columns(board))
    columns += _training_columns(board)
    rows = _rows(board, columns, mode, notes)
    return Table(
        title,
        columns,
        rows,
        _caption(board),
        (*notes.texts, *_remarks(board)),
        MINI if board.mini else "",
        BOLD if any(cell.emphasis for row in rows for cell in row.cells) else "",
    )


def _token_columns(board: Board) -> tuple[Column, ...]:
    """What a thought costs beside the answer; only where some model thinks."""
    if not any(entry.tokens("thinking") for entry in board.entries):
        return ()
    return (
        Column("thinking", "Thinking", "count", "tokens an answer",
               description="Tokens of thoughts that were generated an answer, on average"),
        Column("answer", "Answer", "count", "tokens an answer",
               description="Other tokens that were generated an answer, on average"),
    )  # fmt: skip


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


# --- cells ---------------------------------------------------------------------------------------


def _rows(board: Board, columns: Sequence[Column], mode: Mode, notes: Notes) -> tuple[Row, ...]:
    rows = []
    for entry in board.entries:
        section, role = ROLE_TITLES.get(entry.role, entry.role), entry.role
        if role == "sft" and board.floor is not None and entry.key != board.floor.key:
            section, role = "SFT, not the floor", "sft-other"  # the page filters them apart
        cells = tuple(_cell(board, entry, column, mode, notes) for column in columns)
        flag = entry.status if entry.health else ""
        rows.append(Row(entry.key, cells, section, role, board.colours[entry.key], flag))
    return tuple(rows)


def _cell(board: Board, entry: Entry, column: Column, mode: Mode, notes: Notes) -> Cell:
    key = column.key
    if key in ("model", "name"):
        seeds = f"{len(entry.runs)} seeds" if len(entry.runs) > 1 else ""
        health = entry.health if key == "model" else ()
        return Cell(entry.name, notes=notes(*health), remark=seeds, detail=health)
    if key == "rank":
        return Cell(entry.score(AVERAGE).rank)
    if column.group == "tokens an answer":
        return Cell(entry.tokens(key))
    if column.group == "training":
        return Cell(getattr(entry, key))
    if column.group == "cost":
        interval = _range(board, entry, key) if column.interval else None
        return Cell(getattr(entry.cost, key), interval=interval)
    if column.group == "relation":
        averages = {"difference": entry.differences, "retention": entry.retentions}
        found = averages[key].get(AVERAGE) if key in averages else entry.gap_closed
        if found is None or not found.known:
            return Cell()
        detail = (interval_text(found, column.kind),)
        return Cell(found.value, None, found.interval, detail=detail)
    score = VIEWS[mode].of(entry).get(key)
    doubt = not entry.score(key).comparable
    if score is None or not score.known:
        return Cell(None, doubt=doubt)
    return Cell(
        score.value,
        score.spread,
        score.interval,
        _emphasis(board, entry, key) if mode == "scores" else "",
        notes(*score.marks),
        detail=_detail(board, entry, key, mode),
        doubt=doubt,
    )


def _range(board: Board, entry: Entry, cost: str) -> Interval | None:
    """From the least to the most that models of this size were measured to cost.

    None where nothing was measured twice, or where it came out alike (within 2 %).
    """
    values = board.measured(entry, cost)
    if len(values) < 2 or values[-1] <= 1.02 * values[0]:
        return None
    return Interval(values[0], values[-1], 1.0)


def _emphasis(board: Board, entry: Entry, key: str) -> Literal["", "best", "second"]:
    """Best and second by rank among the students; none where nobody can be told apart."""
    ranks = sorted({r for e in board.students if (r := e.score(key).rank) is not None})
    rank = entry.score(key).rank
    if rank is None or len(ranks) < 2 or rank not in ranks[:2]:
        return ""
    return "best" if rank == ranks[0] else "second"


def _detail(board: Board, entry: Entry, key: str, mode: Mode) -> tuple[str, ...]:
    """Interval, n, seeds, protocol, health."""
    score = VIEWS[mode].of(entry)[key]
    task = next((t for t in board.tasks if t.id == key), None)
    name = task.short if task else board.average_title
    lines = [f"{clean(entry.name)}, {clean(name)}", interval_text(score, VIEWS[mode].kind)]
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


# --- runs of a store -----------------------------------------------------------------------------


def run_table(there: Catalogue) -> tuple[Table, list[KdBenchError]]:
    """One row a run, oldest first, and the errors of damaged ones.

    A run that does not stand for its model has a note that says why. The average is over the
    whole suite or not at all.
    """
    titles = "Model", "Role", "Suite", "Average", "Documents", "Limit", "Status", "Date", "Run"
    columns = tuple(
        Column(title.lower(), title, "score" if title == "Average" else "text") for title in titles
    )
    rows: list[Row] = []
    notes = Notes()
    errors: list[KdBenchError] = []
    for run, manifest in there.runs:
        why, status = there.reason(run, manifest), str(manifest.status)
        average, documents = None, "–"
        try:
            average, documents = _numbers(run, manifest)
        except KdBenchError as error:
            errors.append(error)
            status, why = "damaged", error.problem
        unverified = "" if manifest.verified else "not verified by digests"
        model, protocol = manifest.model, manifest.protocol
        limit = "–" if protocol.limit is None else str(protocol.limit)
        date = manifest.created[:16].replace("T", " ")
        marked = Cell(status, notes=notes(*filter(None, (why, unverified))))
        name = run.path.name
        row = Row.of(name, model.name, model.role, protocol.suite, average, documents, limit,
                     marked, date, name)  # fmt: skip
        rows.append(row)
    for run, lost in there.damaged:
        errors.append(lost)
        marked = Cell("damaged", notes=notes(lost.problem))
        rows.append(Row.of(run.path.name, *["–"] * 6, marked, "–", run.path.name))
    return Table("Runs", columns, tuple(rows), notes=tuple(notes.texts)), errors


def _numbers(run: Run, manifest: RunManifest) -> tuple[float | None, str]:
    """The average, and how many documents it is over: `8 of 636` where a limit left some out."""
    results = [run.result(task) for task in run.done_tasks(manifest)]
    documents = sum(result.documents for result in results)
    total = sum(result.total or result.documents for result in results)
    told = f"{documents:,}" if total == documents else f"{documents:,} of {total:,}"
    if not results or missing_tasks(run, manifest):
        return None, told
    return sum(result.score for result in results) / len(results), told
