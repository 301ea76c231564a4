"""A run as a model card of the Hugging Face hub: scores to check, and where they are from.

Everything is read from the store and from the checkpoint's folder; only `push` needs a network.
Scores of the embedded world are named as such in every place, the metadata's too, and what was not
measured on a whole benchmark stays out of the metadata, from which the hub makes leaderboards.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench import __version__
from kd_bench.errors import UsageError, needs_extra, one_line
from kd_bench.files import write_text
from kd_bench.records import AVERAGE, RunManifest, TaskResult
from kd_bench.registry import load_suite, suite_names
from kd_bench.report.board import Board, Entry, TaskInfo
from kd_bench.report.history import training_file
from kd_bench.report.leaderboard import leaderboard
from kd_bench.report.page import refuse_among_runs
from kd_bench.report.relations import read_board
from kd_bench.report.tables import Cell, Column, Row, Table, clean, format_number, md, to_markdown
from kd_bench.store import Run, find_run, shortcomings

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

MARK = "<!-- A model card of kd-bench, which may replace this file. -->"
MINI = (
    "These are scores of kd-bench's embedded mini world: drawn pictures of a few shapes, in the "
    "form of the benchmarks whose names they bear. They are not scores of those benchmarks and "
    "cannot stand beside any that are."
)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MATTERING = ("torch", "transformers")
ABSOLUTE = re.compile(r"(?<![\w/:.~-])~?/(?:[^\s/'\"\],}]+/)+(?=[^\s/])")
"""The folders of an absolute path, which mean nothing to others."""


def model_card(results: Path, name: str, repository: str = "") -> "ModelCard":
    """The card of one run, with the store's other models of its suite beside it.

    Args:
        name: a run or a model's name.
        repository: `owner/name` on the hub that the commands name; empty: the checkpoint's name.

    Raises:
        UsageError: no such run, it has no result yet, or huggingface_hub is not installed.
        IncompleteRunError: a file of the run is damaged.
    """
    with needs_extra("A model card", "train"):
        from huggingface_hub import ModelCard, ModelCardData

    run = find_run(results, name)
    manifest, found = run.manifest, run.results()
    if not found:
        raise UsageError(f"{run.path.name} has no result yet.", "Finish it with its eval command.")
    board, _ = read_board(results, [run.path.name])
    mini = board.mini or _embedded(manifest)
    model, base = manifest.model, _told(manifest.training, "student", "path")
    tags = [
        "knowledge-distillation" if model.role in ("kd", "switch") else "",
        clean(model.method),
        "mini-world" if mini else "",
    ]
    data = ModelCardData(
        model_name=clean(model.name),
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["kd-bench", "vision-language", *filter(None, tags)],
        base_model=base if REPOSITORY.fullmatch(base) and not Path(base).exists() else None,
        eval_results=list(_eval_results(board, found, mini)) or None,
    )
    sections = [
        MARK,
        f"# {md(model.name)}",
        _introduction(manifest),
        f"> **{MINI}**" if mini else "",
        *(f"> {md(line)}." for line in _cautions(run, board, found, mini)),
        _section(_score_table(board, found, mini)),
        _verification(manifest, found, repository),
        _comparison(results, run, manifest, mini),
        _recipe(run, manifest),
        _lineage(manifest.training),
        f"Written by kd-bench {__version__} from the run `{run.path.name}`.",
    ]
    body = "\n\n".join(section.strip() for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def write_card(card: "ModelCard", folder: Path) -> Path:
    """Write README.md; returns its path.

    Raises:
        UsageError: a README.md is there that kd-bench did not write.
    """
    refuse_among_runs(folder)
    path = folder / "README.md"
    if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UsageError(
            f"{path} was not made by kd-bench and would be replaced.",
            "Give another --to, or move it away.",
        )
    write_text(path, str(card))
    return path


def push(card: "ModelCard", repository: str) -> str:
    """Upload the card to a model repository of the hub; returns the commit's address.

    Raises:
        UsageError: no token is set, there is no such repository, or the hub cannot be reached.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    if not REPOSITORY.fullmatch(repository):
        raise UsageError(f"--push {repository!r} is no repository.", "Write OWNER/NAME.")
    if get_token() is None:
        raise UsageError(
            "--push: no token of the Hugging Face hub is set.",
            "Run `hf auth login`, or set HF_TOKEN; the card is written all the same.",
        )
    try:
        return str(card.push_to_hub(repository, commit_message="Model card of kd-bench"))
    except OfflineModeIsEnabled:
        raise UsageError("--push: HF_HUB_OFFLINE is set.", "Unset it to upload.") from None
    except Exception as error:  # the client's own: no connection, a card that the hub refuses
        status = getattr(getattr(error, "response", None), "status_code", None)
        reasons = {401: "the token is not accepted", 403: "the token may not write there"}
        reasons[404] = "there is no such repository, or the token does not see it"
        reason = reasons.get(status or 0) or one_line(error)[:200]
        raise UsageError(
            f"--push {repository}: {reason.rstrip('.')}.",
            "Make it with `hf repo create`, or check the token; the card is written all the same.",
        ) from None


def _embedded(manifest: RunManifest) -> bool:
    """Whether the suite is one of the embedded world, whatever its name."""
    suite = manifest.protocol.suite
    return suite in suite_names() and load_suite(suite).data == "embedded"


def _cautions(run: Run, board: Board, found: dict[str, TaskResult], mini: bool) -> "Iterator[str]":
    """What a reader must know before the scores."""
    manifest = run.manifest
    for why in shortcomings(run, manifest):
        yield f"This evaluation is not whole: {why}"
    partly = [
        f"{task.short} on {found[task.id].documents:,} of {whole:,} documents"
        for task in board.tasks
        if task.id in found
        and found[task.id].documents < (whole := _expected(task, found[task.id], mini))
    ]
    if partly:
        yield f"Not on the whole benchmark: {', '.join(partly)}"
    if manifest.status == "complete":
        yield from manifest.notes


# --- metadata -------------------------------------------------------------------------------------


def _eval_results(board: Board, found: dict[str, TaskResult], mini: bool) -> "Iterator[EvalResult]":
    """What the hub may list: whole benchmarks, and the embedded world's under names of its own."""
    from huggingface_hub import EvalResult

    for task in board.tasks:
        result = found.get(task.id)
        if result is None or not board.entries[0].score(task.id).known or task.spec is None:
            continue
        if result.documents < _expected(task, result, mini):
            continue
        dataset = task.spec.dataset
        origin: dict[str, Any] = {
            "dataset_type": dataset.repo,
            "dataset_name": task.title.partition(":")[0],
            "dataset_config": dataset.config,
            "dataset_split": dataset.split,
            "dataset_revision": dataset.revision,
        }
        if mini:
            origin = {
                "dataset_type": "kd-bench-mini-world",
                "dataset_name": f"kd-bench mini world ({task.id} in form, not {task.short})",
                "dataset_config": f"mini-{task.id}",
            }
        yield EvalResult(
            task_type="visual-question-answering",
            **origin,
            metric_type=result.metric,
            metric_name=f"{'mini ' * mini}{task.short} ({result.profile} protocol, 0 to 100)",
            metric_value=round(result.score, 2),
            metric_config=result.fingerprint[:16],
        )


def _expected(task: TaskInfo, result: TaskResult, mini: bool) -> int:
    """Documents of the whole benchmark under the result's protocol."""
    if mini or task.spec is None:
        return result.total or result.documents
    return task.spec.profile(result.profile).documents or task.spec.documents


# --- sections -------------------------------------------------------------------------------------


def _introduction(manifest: RunManifest) -> str:
    model, teacher = manifest.model, _short(_told(manifest.training, "teacher", "path"))
    size = format_number(manifest.cost.parameters, "count")
    parts = [
        f"A vision-language model ({model.architecture})" if model.architecture else "A model",
        f"of {size} parameters" if manifest.cost.parameters else "",
        f"trained with the method {model.method}" if model.method else "",
        f"under the teacher {teacher}" if teacher else "",
    ]
    return md(" ".join(filter(None, parts)) + ", evaluated with kd-bench.")


def _told(value: Any, *keys: str) -> str:
    """The text at a place of a lineage that others may have written; empty where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return "" if value is None else str(value)


def _score_table(board: Board, found: dict[str, TaskResult], mini: bool) -> Table:
    """Score with interval, metric, documents and protocol of each benchmark, and the average."""
    entry: Entry = board.entries[0]
    titles = ("Benchmark", "Score", "Metric", "Documents", "Protocol", "Fingerprint")
    columns = [Column(title, title, "text") for title in titles]
    columns[1] = Column("Score", "Score", interval=True)
    rows = []
    for task in board.tasks:
        result, score = found.get(task.id), entry.score(task.id)
        if result is None:
            rows.append(Row.of(task.id, _named(task.short, mini), None, "–", "–", "–", "–"))
            continue
        whole = _expected(task, result, mini)
        count = f"{result.documents:,}"
        count += f" of {whole:,}" if result.documents < whole else ""
        value = Cell(score.value if score.known else None, interval=score.interval)
        name = _named(task.short, mini)
        text = (result.metric, count, result.profile, result.fingerprint[:16])
        rows.append(Row.of(task.id, name, value, *text))
    average = entry.score(AVERAGE)
    value = Cell(average.value if average.known else None, interval=average.interval)
    rows.append(Row.of(AVERAGE, _named(board.average_title, mini), value, "mean", "–", "–", "–"))
    levels = {s.interval.level for s in entry.scores.values() if s.interval}
    told = " and ".join(f"{100 * level:g} %" for level in sorted(levels))
    caption = "Points from 0 to 100" + (
        f"; in brackets {told} intervals over documents." * bool(told)
    )
    return Table("Scores", tuple(columns), tuple(rows), caption)


def _named(short: str, mini: bool) -> str:
    return f"mini {short}" if mini else short


def _verification(manifest: RunManifest, found: dict[str, TaskResult], repository: str) -> str:
    """The command that measures the same, and what must come out the same."""
    protocol, model = manifest.protocol, manifest.model
    command = ["kd-bench", "eval", *_subject(model.path, repository), "--suite", protocol.suite]
    if not _embedded(manifest):
        command += ["--data", "DATA"]
    if set(found) != set(manifest.suite_tasks or found):
        command += ["--tasks", ",".join(found)]
    for task, profile in sorted(protocol.profiles.items()):
        command += ["--profile", f"{task}={profile}"]
    for option, value in (
        ("--limit", protocol.limit),
        ("--dtype", protocol.dtype),
        ("--quantize", protocol.quantize),
        ("--reasoning-tags", protocol.reasoning_tags if "[" in protocol.reasoning_tags else None),
    ):
        if value:
            command += [option, str(value)]
    for name, value in json.loads(protocol.chat_template_kwargs or "{}").items():
        command += ["--chat-template-kwargs", f"{name}={json.dumps(value)}"]
    fetch = "" if _embedded(manifest) else "kd-bench tasks fetch --to DATA\n"
    version, commit = (_told(manifest.provenance, "code", key) for key in ("version", "commit"))
    version += f", commit {commit[:12]}" * bool(commit)
    lines = [
        "## Verify",
        md(f"With kd-bench {version or __version__}:"),
        f"```sh\n{fetch}{clean(shlex.join(command))}\n```",
        "The benchmarks' fingerprints above must be the same; they cover data, prompts, generation "
        "and scoring. The weights have the digest",
        f"`sha256:{model.weights_digest}`.",
    ]
    if protocol.prompt_template or protocol.chat_template_kwargs:
        lines.append(
            "The answers were made under a chat template that is not the checkpoint's own."
        )
    if manifest.data:
        known = sorted(manifest.data.items())
        digests = "\n".join(f"- {task}: `{digest[:16]}`" for task, digest in known)
        lines.append(f"<details><summary>Digests of the data</summary>\n\n{digests}\n\n</details>")
    return "\n\n".join(lines)


def _subject(path: str, repository: str) -> list[str]:
    """The model as `kd-bench eval` takes it."""
    stock = path.split(" ", 2) if path.startswith("lmms-eval ") else []
    if stock:
        return ["--model", stock[1], *(["--model-args", stock[2]] if len(stock) > 2 else [])]
    vision, plus, language = path.partition(" + ")
    if plus:
        return ["--vision", _short(vision), "--language", _short(language)]
    return [repository or _short(path)]


def _comparison(results: Path, run: Run, manifest: RunManifest, mini: bool) -> str:
    """The store's models of the same suite, this one among them."""
    board, _ = read_board(results, suite=manifest.protocol.suite)
    if len(board.entries) < 2:
        return ""
    table = leaderboard(board)
    tasks = {task.id for task in board.tasks} | {AVERAGE}
    if mini:
        columns = (
            replace(c, title=_named(c.title, True)) if c.key in tasks else c for c in table.columns
        )
        table = replace(table, columns=tuple(columns))
    shown = any(run.path == each.path for entry in board.entries for each in entry.runs)
    other = "" if shown else "This run is not in it: another one stands for its model.\n\n"
    return other + _section(replace(table, title="Comparison"))


def _recipe(run: Run, manifest: RunManifest) -> str:
    """The training's recipe where it lies beside the checkpoint, else what the lineage knows."""
    path = training_file(run, manifest.model.path, "recipe.yaml")
    if path is not None:
        text = ABSOLUTE.sub("", path.read_text(encoding="utf-8", errors="replace"))
        return f"## Recipe\n\n````yaml\n{text.strip()}\n````"
    name, digest = (_told(manifest.training, key) for key in ("recipe", "recipe_digest"))
    return f"## Recipe\n\n{md(name)} (sha256 `{clean(digest)[:16]}`)" if name else ""


def _lineage(training: dict[str, Any] | None) -> str:
    """Start, teacher, data and stages, each with its digest."""
    if not training:
        return ""
    rows = []
    for who, title in (("student", "Started from"), ("teacher", "Teacher")):
        if name := _short(_told(training, who, "path")):
            digest = _told(training, who, "weights_sha256")[:16]
            rows.append(Row.of(who, title, name, f"weights {digest}"))
    stages = training.get("stages")
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        counts = (("steps",), ("data", "conversations"), ("tokens",))
        numbers = [(_told(stage, *keys), keys[-1]) for keys in counts]
        spent = [f"{int(number):,} {what}" for number, what in numbers if number.isdecimal()]
        text = ", ".join(filter(None, [_told(stage, "method"), *spent]))
        digest = _told(stage, "data", "sha256")[:16]
        rows.append(Row.of(name, f"Stage {name}", text, f"data {digest}"))
    version, commit = (_told(training, "provenance", "code", k) for k in ("version", "commit"))
    packages = {name: _told(training, "provenance", "versions", name) for name in MATTERING}
    told = [f"kd-bench {version}", *(f"{name} {each}" for name, each in packages.items() if each)]
    rows.append(Row.of("code", "Code", ", ".join(told), f"commit {commit[:12] or 'unknown'}"))
    rows.append(Row.of("seed", "Seed", _told(training, "seed") or "unknown", ""))
    columns = tuple(Column(title, title, "text") for title in ("What", "Which", "Digest"))
    return _section(Table("Lineage", columns, tuple(rows)))


def _section(table: Table) -> str:
    return to_markdown(table).replace("### ", "## ", 1)


def _short(path: str) -> str:
    """A hub name or embedded reference as it is; of a path on disk, its last two parts."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path
