"""The leaderboard as a paper's table: a float with booktabs that fits a column.

Few benchmarks stand as columns. Many stand as rows, the models beside each other, five in a block,
blocks below each other; so the type stays readable in a column of 8 cm. What is still wider than
the line is scaled down to it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from kd_bench.errors import UsageError, closest
from kd_bench.records import AVERAGE
from kd_bench.report.board import Board, Entry
from kd_bench.report.board_loading import average
from kd_bench.report.leaderboard import leaderboard
from kd_bench.report.tables import Cell, Column, Row, Table, clean, format_number, tex

ACROSS = 5  # columns of numbers that a narrow column of a paper holds


def choose(board: Board, benchmarks: Sequence[str], methods: Sequence[str]) -> Board:
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


def to_paper(board: Board) -> str:
    """A `table` float of every benchmark and row of the board, with caption and label."""
    table = leaderboard(board)
    count = len(board.tasks) + 1
    columns, rows = table.columns[1 : count + 1], table.rows
    numbers = [row.cells[1 : count + 1] for row in rows]
    if count > ACROSS:
        body = _models_across(rows, columns, numbers)
    else:
        body = _benchmarks_across(rows, columns, numbers)
    return "\n".join(
        [
            "% needs \\usepackage{booktabs} and \\usepackage{graphicx}",
            "\\begin{table}[t]",
            "\\centering",
            f"\\caption{{{_caption(board, table)}}}",
            f"\\label{{tab:kd-bench-{_label(board.suite)}}}",
            "\\footnotesize",
            "\\setlength{\\tabcolsep}{3pt}",
            "\\resizebox{\\ifdim\\width>\\linewidth \\linewidth\\else \\width\\fi}{!}{%",
            *body,
            "}",
            "\\end{table}",
            "",
        ]
    )


def _label(suite: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in suite)


# --- body --------------------------------------------------------------------------------------


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


# --- caption -----------------------------------------------------------------------------------


def _caption(board: Board, table: Table) -> str:
    """What was measured and how, on how much, with how many seeds, and what the marks mean."""
    parts = [f"\\textbf{{{tex(table.warning)}}}"] if table.warning else []
    parts.append(
        tex(f"Scores from 0 to 100; {board.average_title} is the mean of {len(board.tasks)}.")
    )
    parts += [tex(_documents(board)), tex(_protocol(board)), tex(_seeds(board))]
    cells = [cell for row in table.rows for cell in row.cells]
    if any(cell.spread is not None for cell in cells):
        parts.append(r"$\pm$: standard deviation over training seeds.")
    if any(len(entry.runs) == 1 for entry in board.entries):
        levels = {
            score.interval.level
            for entry in board.entries
            if len(entry.runs) == 1
            for score in entry.scores.values()
            if score.interval is not None
        }
        if levels:
            level = " and ".join(f"{100 * each:g}" for each in sorted(levels))
            parts.append(
                rf"$^{{+}}_{{-}}$: {level}\,\% interval over test samples of one seed, in which "
                "training noise is unknown."
            )
    parts += [tex(f"Note: {note}.") for note in _notes(table)]
    if table.legend:
        parts.append(tex(table.legend.format(second="underlined")))
    return " ".join(part for part in parts if part)


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
        found.append(f"{who}: {note.rstrip('.')}")
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
