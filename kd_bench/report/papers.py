"""Papers: their published numbers beside the measured ones, and the leaderboard as a paper's table.

In a paper's table few benchmarks stand as columns. Many stand as rows, the models beside each
other, five in a block, blocks below each other; so the type stays readable in a column of 8 cm.
What is still wider than the line is scaled down to it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from kd_bench.compare.estimates import Evidence
from kd_bench.errors import NotComparableError, UsageError, closest
from kd_bench.records import AVERAGE
from kd_bench.registry import Published, TaskSpec, load_suite, load_tasks, published
from kd_bench.report.board import Board, Entry, TaskInfo, average, task_info
from kd_bench.report.leaderboard import leaderboard
from kd_bench.report.relations import relate
from kd_bench.report.tables import (
    Cell,
    Column,
    Notes,
    Row,
    Table,
    clean,
    format_number,
    tex,
    to_latex,
)

if TYPE_CHECKING:
    import pandas as pd

# --- published numbers ---------------------------------------------------------------------------


def published_tables() -> tuple[Table | None, Table | None]:
    """The Switch-KD paper's rows, and all others, on the papers' 0-100 scale.

    Each benchmark's heading says how far its column may be compared with measured rows.
    """
    try:
        frame = published()
        known = {spec.id: spec for spec in load_tasks()}
        specs = [known[name] for name in load_suite("ten").tasks]
    except (UsageError, OSError, ValueError):
        return None, None
    if frame.empty:
        return None, None
    paper = frame["source"].str.contains("Switch-KD", na=False)
    first = _published(frame[paper], specs, "Rows of the Switch-KD paper's tables")
    rest = _published(frame[~paper], specs, f"{int((~paper).sum())} rows of related work")
    return first, rest


def _published(frame: "pd.DataFrame", specs: list[TaskSpec], title: str) -> Table:
    notes = Notes()
    columns = [
        Column("method", "Method", "text"),
        Column("llm", "Language model", "text"),
        *(
            Column(s.id, task_info(s).short, "score", notes=notes(*_doubts(s.published)))
            for s in specs
        ),
        Column(AVERAGE, "Avg", "score"),
        Column("source", "Source", "text"),
    ]
    rows = []
    for number, record in enumerate(frame.to_dict("records")):
        model, _, remark = str(record["llm"]).partition(" (")
        kind = _text(record.get("avg_kind"))
        fewer = [f"{kind}: a mean over fewer benchmarks"] * (kind not in ("", "avg10"))
        row = Row.of(
            f"published-{number}",
            str(record["method"]),
            Cell(model, notes=notes(*[remark.rstrip(")")] * bool(remark))),
            *(_on_scale(record, spec.published.column) for spec in specs),
            Cell(_value(record.get("avg")), notes=notes(*fewer)),
            _text(record["source"]),
        )
        rows.append(row)
    return Table(title, tuple(columns), tuple(rows), notes=tuple(notes.texts))


def paper_table(board: Board) -> Table | None:
    """Measured rows beside the Switch-KD paper's 0.5B rows; None where that would mislead.

    The average is over the benchmarks that the paper has and whose protocols, by the profiles of
    the measured rows, allow the comparison; for both sides. Mini scores are never put beside
    published ones.
    """
    if board.mini or not board.entries:
        return None
    try:
        frame = published()
    except (UsageError, OSError, ValueError):
        return None
    said = {task.id: _said(board, task) for task in board.tasks}
    fair = [
        task
        for task, about in said.items()
        if about is not None and about.verdict != "not comparable" and about.column in frame
    ]
    notes = Notes()
    columns = (
        Column("method", "Method", "text"),
        *(
            Column(task.id, task.short, "score", task.group, notes(*_doubts(said[task.id])))
            for task in board.tasks
        ),
        Column(AVERAGE, f"Avg of {len(fair)} comparable", "score"),
    )
    rows = []
    for entry in board.entries:
        values = [entry.score(task.id) for task in board.tasks]
        cells = [Cell(s.value if s.known else None, s.spread) for s in values]
        mean = _mean([entry.score(task).value for task in fair])
        rows.append(Row.of(entry.key, entry.label, *cells, mean, section="Measured here"))
    # The 0.5B rows of the Switch-KD repository's ten-benchmark table.
    paper = frame["source"].str.contains("Switch-KD", na=False)
    small = frame["params_llm_b"].astype(str).isin(["0.5", ".5"])
    for number, record in enumerate(frame[paper & small].to_dict("records")):
        scores = {
            task: None if about is None else _on_scale(record, about.column)
            for task, about in said.items()
        }
        mean = _mean([scores[task] for task in fair])
        method = str(record["method"])
        rows.append(Row.of(f"paper-{number}", method, *scores.values(), mean, section=PAPER))
    return Table("Beside the paper", columns, tuple(rows), notes=tuple(notes.texts))


def comparison(board: Board, with_what: str) -> Table:
    """The table behind `--compare`.

    Raises:
        UsageError: there is nothing of that name to compare with.
        NotComparableError: the board is of the embedded mini world.
    """
    if with_what != "paper":
        raise UsageError(f"Nothing called {with_what!r} to compare with.", "Known: paper.")
    table = paper_table(board)
    if table is None:
        raise NotComparableError(
            "These runs cannot stand beside the paper's: they are of the embedded mini world.",
            "Evaluate with --suite ten.",
        )
    return table


PAPER = "Switch-KD paper, 0.5B students"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _said(board: Board, task: TaskInfo) -> Published | None:
    """What the registry says about published numbers, by the profile that the rows share.

    Rows of several profiles get the benchmark's own word, which is that of its default profile.
    """
    if task.spec is None:
        return None
    found = [results.get(task.id) for entry in board.entries for results in entry.results]
    profiles = {result.profile for result in found if result is not None}
    variant = task.spec.profiles.get(profiles.pop()) if len(profiles) == 1 else None
    return (variant.published if variant is not None else None) or task.spec.published


def _doubts(about: Published | None) -> list[str]:
    """Why a published number may not quite stand beside a measured one."""
    if about is None or about.verdict == "comparable":
        return []
    return [f"{about.verdict.capitalize()}: {about.why}"]


def _on_scale(record: dict[Any, Any], column: str) -> float | None:
    value = _value(record.get(column))
    raw = column == "mme" and _text(record.get("mme_unit")).startswith("perception raw")
    return value / 20 if raw and value is not None else value


def _value(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)


# --- a paper's table ----------------------------------------------------------------------------

ACROSS = 5  # columns of numbers that a narrow column of a paper holds


@dataclass(frozen=True)
class Paper:
    """What a paper's table shows; nothing named is everything.

    Attributes:
        benchmarks: ids or short titles.
        methods: rows by name, method or role.
    """

    benchmarks: Sequence[str] = ()
    methods: Sequence[str] = ()


def _choose(board: Board, benchmarks: Sequence[str], methods: Sequence[str]) -> Board:
    """The board of some benchmarks and rows alone, its average over these; nothing is all.

    Intervals and ranks are not of this choice until `relate` has been asked again.

    Raises:
        UsageError: no benchmark, or no row, has such a name.
    """
    tasks = board.tasks
    if benchmarks:
        known = {name: task for task in tasks for name in (task.short, task.id)}
        tasks = tuple(task for task in tasks if task in _find("benchmark", benchmarks, known))
    entries = board.entries
    if methods:
        named: dict[str, list[Entry]] = {}
        for entry in entries:
            for name in {entry.role, entry.method, entry.name, entry.key} - {""}:
                named.setdefault(name, []).append(entry)
        kept = [entry.key for found in _find("row", methods, named) for entry in found]
        entries = tuple(entry for entry in entries if entry.key in kept)
    chosen = []
    for entry in entries:
        scores = {task.id: entry.score(task.id) for task in tasks}
        if tasks == board.tasks:
            mean = entry.score(AVERAGE)
        else:
            mean = average(list(scores.values()))
            if not all(score.comparable for score in scores.values()):
                mean = replace(mean, comparable=False)
        chosen.append(replace(entry, scores=scores | {AVERAGE: mean}))
    return replace(board, tasks=tasks, entries=tuple(chosen))


Found = TypeVar("Found")


def _find(what: str, names: Sequence[str], known: Mapping[str, Found]) -> list[Found]:
    folded = {name.casefold(): value for name, value in known.items()}
    for name in names:
        if name.casefold() not in folded:
            raise UsageError(
                f"No {what} of this report is called {name!r}.{closest(name, list(known))}",
                f"There are: {', '.join(known)}.",
            )
    return [folded[name.casefold()] for name in names]


def to_paper(board: Board, evidence: Evidence, paper: Paper) -> str:
    """A `table` float with caption and label; its ranks and its average are of what it shows.

    Raises:
        UsageError: no benchmark, or no row, has such a name.
    """
    board = _choose(board, paper.benchmarks, paper.methods)
    kept = {task.id: evidence.tasks[task.id] for task in board.tasks if task.id in evidence.tasks}
    board = relate(board, Evidence(kept))
    table = leaderboard(board)
    count = len(board.tasks) + 1
    columns, rows = table.columns[1 : count + 1], table.rows
    numbers = [row.cells[1 : count + 1] for row in rows]
    across = _models_across if count > ACROSS else _benchmarks_across
    notes = [f"Note: {note}." for note in _notes(table)]
    caption = _caption(board, table, _uncertainty(board, table), notes)
    tight = "\\setlength{\\tabcolsep}{3pt}"
    return _float("table", caption, board.suite, across(rows, columns, numbers), tight)


def to_whole(board: Board, table: Table) -> str:
    """Every column of a leaderboard as a `table*` float with caption, label and legend."""
    plain = to_latex(replace(table, warning="", legend="", notes=())).splitlines()
    notes = [f"({number}) {note.rstrip('.')}." for number, note in enumerate(table.notes, 1)]
    caption = _caption(board, table, [tex(table.caption)], notes)
    return _float("table*", caption, f"{board.suite}-leaderboard", plain[1:])


def _float(kind: str, caption: str, label: str, tabular: Iterable[str], *settings: str) -> str:
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in label)
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
        f"\\begin{{{kind}}}[t]",
        "\\centering",
        f"\\caption{{{caption}}}",
        f"\\label{{tab:kd-bench-{label}}}",
        "\\footnotesize",
        *settings,
        "\\resizebox{\\ifdim\\width>\\linewidth \\linewidth\\else \\width\\fi}{!}{%",
        *tabular,
        "}",
        f"\\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"


def _benchmarks_across(
    rows: Sequence[Row], columns: Sequence[Column], numbers: Sequence[Sequence[Cell]]
) -> Iterator[str]:
    yield f"\\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}"
    yield "\\toprule"
    yield " & ".join(["Model", *(tex(column.title) for column in columns)]) + r" \\"
    section = ""
    for row, cells in zip(rows, numbers, strict=True):
        if row.section != section:
            yield "\\midrule"
        section = row.section
        yield " & ".join([tex(str(row.cells[0].value)), *map(_number, cells)]) + r" \\"
    yield "\\bottomrule"
    yield "\\end{tabular}"


def _models_across(
    rows: Sequence[Row], columns: Sequence[Column], numbers: Sequence[Sequence[Cell]]
) -> Iterator[str]:
    """Benchmarks from top to bottom, models beside each other, in blocks of equal width."""
    blocks = -(-len(rows) // ACROSS)
    width = -(-len(rows) // blocks)
    yield f"\\begin{{tabular}}{{@{{}}l{'r' * width}@{{}}}}"
    yield "\\toprule"
    for start in range(0, len(rows), width):
        places = range(start, min(start + width, len(rows)))
        blank = [""] * (width - len(places))
        if start:
            yield "\\midrule\\addlinespace"
        names = [_stacked(str(rows[place].cells[0].value)) for place in places]
        yield " & ".join(["Benchmark", *names, *blank]) + r" \\"
        yield "\\midrule"
        for number, column in enumerate(columns):
            if column.key == AVERAGE:
                yield "\\cmidrule(l){1-" + str(width + 1) + "}"
            cells = [_number(numbers[place][number]) for place in places]
            yield " & ".join([tex(column.title), *cells, *blank]) + r" \\"
    yield "\\bottomrule"
    yield "\\end{tabular}"


def _stacked(name: str, most: int = 11) -> str:
    """A heading of several short lines, broken at spaces and dashes."""
    lines = [""]
    for part in clean(name).replace("-", "-\0").replace(" ", " \0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    texts = [tex(line.strip()) for line in lines]
    joined = r" \\ ".join(texts)
    return joined if len(texts) == 1 else rf"\shortstack[r]{{{joined}}}"


def _number(cell: Cell) -> str:
    r"""`66.2_{\pm 2.4}` over seeds, `53.7^{+5.1}_{-5.3}` of one seed over samples."""
    text = format_number(cell.value, "score")
    if text == "–" or not isinstance(cell.value, float):
        return "--"
    mark = {"best": r"\mathbf{%s}", "second": r"\underline{%s}", "": "%s"}[cell.emphasis]
    text = mark % text.replace("−", "-")
    if cell.spread is not None:
        text += rf"_{{\pm {cell.spread:.1f}}}"
    elif cell.interval is not None:
        up, down = cell.interval.high - cell.value, cell.value - cell.interval.low
        text += f"^{{+{max(up, 0):.1f}}}_{{-{max(down, 0):.1f}}}"
    return f"${text}$"


def _caption(board: Board, table: Table, uncertainty: list[str], notes: list[str]) -> str:
    """What was measured and how, on how much, with how many seeds, and what the marks mean."""
    average = f"{board.average_title} is the mean of {len(board.tasks)}"
    told = [
        f"\\textbf{{{tex(table.warning)}}}" if table.warning else "",
        tex(f"Scores from 0 to 100; {average}."),
        *map(tex, (_documents(board), _protocol(board), _seeds(board))),
        *uncertainty,
        *map(tex, notes),
        tex(table.legend.format(second="underlined")),
    ]
    return " ".join(filter(None, told))


def _uncertainty(board: Board, table: Table) -> list[str]:
    """What stands behind a number of the paper's table, in LaTeX."""
    parts = []
    if any(cell.spread is not None for row in table.rows for cell in row.cells):
        parts.append(r"$\pm$: standard deviation over training seeds.")
    single = (score for e in board.entries if len(e.runs) == 1 for score in e.scores.values())
    levels = {score.interval.level for score in single if score.interval is not None}
    if levels:
        level = " and ".join(f"{100 * each:g}" for each in sorted(levels))
        parts.append(
            rf"$^{{+}}_{{-}}$: {level}\,\% interval over test samples of one seed, in which "
            "training noise is unknown."
        )
    return parts


def _notes(table: Table) -> list[str]:
    """Which rows carry a note of the leaderboard, and what it says."""
    found = []
    for number, note in enumerate(table.notes):
        rows = [
            str(row.cells[0].value)
            for row in table.rows
            if any(number in cell.notes for cell in row.cells)
        ]
        who = "all rows" if len(rows) == len(table.rows) > 1 else ", ".join(rows)
        found.append(f"{who}: {note.rstrip('.')}" if who else note.rstrip("."))
    return found


def _documents(board: Board) -> str:
    """`n = 600 samples a benchmark`, or each benchmark's own."""
    counts = {
        task.short: max((e.score(task.id).documents for e in board.entries), default=0)
        for task in board.tasks
    }
    if len(set(counts.values())) == 1:
        return f"n = {next(iter(counts.values())):,} samples a benchmark."
    return "n: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()) + "."


def _protocol(board: Board) -> str:
    """Suite, evaluator, profiles and limit, as most runs have them."""
    manifests = [manifest for entry in board.entries for manifest in entry.manifests]
    if not manifests:
        return ""
    protocol = manifests[0].protocol
    versions = manifests[0].provenance.get("versions")
    version = versions.get("lmms-eval") if isinstance(versions, dict) else None
    kinds = Counter(manifest.protocol.dtype for manifest in manifests)
    parts = [f"suite {board.suite}", f"lmms-eval {version}" if version else ""]
    parts += [f"{task} {profile}" for task, profile in sorted(protocol.profiles.items())]
    parts.append(" and ".join(kinds))
    if protocol.limit is not None:
        parts.append(f"only the first {protocol.limit} samples")
    return f"Protocol: {', '.join(part for part in parts if part)}."


def _seeds(board: Board) -> str:
    trained = [entry for entry in board.entries if entry.role not in ("teacher", "switch")]
    counts = Counter(len(entry.runs) for entry in trained)
    if not counts:
        return ""
    if len(counts) == 1:
        count = next(iter(counts))
        return "One training seed each." if count == 1 else f"{count} training seeds each."
    names = (f"{clean(entry.name)} {len(entry.runs)}" for entry in trained)
    return f"Training seeds: {', '.join(names)}."
