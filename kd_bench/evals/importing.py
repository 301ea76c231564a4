"""Turn result folders of lmms-eval (`--log_samples --output_path`) into runs, marked imported.

    <time>_results.json      <time>_samples_<task>.jsonl

The log holds no images and no rows of the data set. With the data folder beside it, units,
questions and categories are those of a run of our own; without it, an image's questions count as
independent documents, and the note says so.

A log is believed as far as it can be checked: every document once, scores between 0 and 1, and
samples that give the score which lmms-eval wrote beside them. All that is done before a run exists.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench.aggregators import aggregate
from kd_bench.errors import IncompleteRunError, KdBenchError, UsageError, one_line
from kd_bench.evals.benchmark import upstream_metrics
from kd_bench.evals.checkpoint import trained_name
from kd_bench.evals.scoring import JUDGES, points_of, rates
from kd_bench.files import digest_files, digest_text, read_json
from kd_bench.provenance import collect
from kd_bench.records import SAMPLE_COLUMNS, ModelRef, Protocol, Role, TaskResult
from kd_bench.registry import TaskSpec, load_tasks
from kd_bench.stats import score_interval
from kd_bench.store import Run, catalogue, held_run, wanted_run

if TYPE_CHECKING:
    import pandas as pd


Entry = dict[str, Any]

# Far beyond what lmms-eval writes; a file of nothing must not fill the memory.
RESULTS_BYTES = 64 << 20
LINE_BYTES = 16 << 20
BLANK_BYTES = 1 << 20
ROUNDING = 0.01
"""Points between upstream's score and that of the samples: MMMU's is rounded to five digits."""
REPLACED = "kd_bench: replaced"
"""Key of a read sample: whether half a character, which no file can hold, was replaced in it."""
JUDGED = ("mmbench_en_dev", "mmbench_cn_dev")
"""Upstream asks a judge, or draws a letter, where an answer names none: that is not in the log."""


@dataclass(frozen=True)
class _Import:
    """One results file, its logs checked and scored, nothing stored yet."""

    file: Path
    outcome: Entry
    model: ModelRef
    protocol: Protocol
    scored: "list[tuple[TaskResult, pd.DataFrame]]"


def import_results(
    path: Path,
    results: Path,
    *,
    name: str | None = None,
    role: Role = "baseline",
    method: str = "",
    seed: int | None = None,
    data: Path | None = None,
    trust_samples: bool = False,
) -> list[Run]:
    """Import every `*_results.json` at or below `path`; one run each, or none at all.

    Args:
        name: in tables; by default that of the training folder or hub repository. A name that
            another import of the same benchmarks has is refused, or made another one.
        method, seed: of the training; unknown where not given.
        data: folder of the documents, for units and questions.
        trust_samples: take the samples' score where results.json says another; it is noted.

    Raises:
        UsageError: nothing there, or no sample log of a known benchmark beside it.
        IncompleteRunError: a file is damaged, documents are missing or there twice, or samples
            and aggregate disagree.
    """
    found = [path] if path.is_file() else sorted(path.rglob("*_results.json"))
    # MMBench's own aggregation leaves a file of that name, too.
    files = [file for file in found if file.parent.name != "submissions"]
    if not files:
        raise UsageError(f"{path} holds no *_results.json.", "Give lmms-eval's --output_path.")
    for key, text in (("name", name or ""), ("method", method)):
        if not text.isprintable() or (text and not text.strip()):
            raise UsageError(f"The {key} {text!r} is not a line of text.", "Give another one.")
    if seed is not None and seed < 0:
        raise UsageError(f"The seed {seed} is negative.", "Give the training's seed.")
    labels = {"role": role, "method": method, "seed": seed}
    checked = [_check(file, name, labels, data, trust_samples) for file in files]
    return [_store(each, results, named=name is not None) for each in checked]


def _check(
    file: Path, name: str | None, labels: Entry, data: Path | None, trust_samples: bool
) -> _Import:
    """Read and score everything of one results file."""
    outcome = _read_results(file)
    logs = _sample_logs(file)
    specs = [spec for spec in load_tasks() if spec.upstream in logs or _cn(spec) in logs]
    if not specs and (unknown := _unknown(logs)):
        raise UsageError(
            f"{file}: kd-bench knows no benchmark {', '.join(unknown)}.",
            "`kd-bench tasks list` names those it knows.",
        )
    if not specs:
        raise UsageError(
            f"{file} has no sample log of a known benchmark beside it.",
            "Run lmms-eval with --log_samples.",
        )
    scored, limits = [], []
    for spec in specs:
        upstream = spec.upstream if spec.upstream in logs else _cn(spec)
        counts = _counts(outcome, upstream)
        entries = _entries(spec, logs[upstream], counts)
        if (
            outcome["config"].get("limit") not in (None, -1, 0)
            or counts.get("effective", 0) < counts.get("original", 0)
            or len(entries) < spec.documents
        ):
            limits.append(len(entries))
        told = outcome["results"].get(upstream)
        metrics = upstream_metrics(told) if isinstance(told, dict) else {}
        samples = _samples(spec, entries, data, logs[upstream])
        notes = _agreement(spec, upstream, samples, metrics, logs[upstream], trust_samples)
        scored.append((_result(spec, entries, samples, metrics, notes, data is None), samples))
    model = _model(file, outcome["config"], name, labels, list(logs.values()))
    protocol = Protocol("imported", limit=max(limits, default=None), engine="lmms-eval, imported")
    return _Import(file, outcome, model, protocol, scored)


def _unmatched(outcome: Entry, logs: dict[str, Path]) -> list[str]:
    """Benchmarks that are not known, or have a score without a log, or a log without a score."""
    notes = [f"{name} is no benchmark that kd-bench knows: not imported" for name in _unknown(logs)]
    for spec in load_tasks():
        names = {spec.upstream, _cn(spec)}
        scored = names & {
            k for k, v in outcome["results"].items() if isinstance(v, dict) and upstream_metrics(v)
        }
        if scored and not names & logs.keys():
            notes.append(f"{spec.id} has a score and no sample log: it is not imported")
        if names & logs.keys() and not scored:
            notes.append(f"{spec.id} has a sample log and no score in results.json")
    return notes


def _read_results(file: Path) -> Entry:
    if file.stat().st_size > RESULTS_BYTES:
        raise IncompleteRunError(
            f"{file} has {file.stat().st_size >> 20:,} MiB, which no results file has.",
            "Give a *_results.json of lmms-eval.",
        )
    try:
        outcome = read_json(file)
        for part in ("config", "results"):
            if not isinstance(outcome[part], dict):
                raise TypeError(f"{part!r} is {outcome[part]!r:.40}")
    except (ValueError, KeyError, TypeError) as error:
        told = f"{error} is missing" if isinstance(error, KeyError) else one_line(error)
        problem = f"{file} is not lmms-eval's results: {told}."
        raise IncompleteRunError(problem, "Give a *_results.json of lmms-eval.") from None
    return outcome


def _store(checked: _Import, results: Path, named: bool) -> Run:
    """Store the run under a name that no other answers to the same benchmarks have."""
    file, outcome, model = checked.file, checked.outcome, checked.model
    tasks = [result.task for result, _ in checked.scored]
    if any(
        other.model.name == model.name
        and other.model.weights_digest != model.weights_digest
        and set(other.tasks) & set(tasks)
        for _, other in catalogue(results).runs
    ):
        if named:
            raise UsageError(
                f"A run named {model.name!r} with other answers is there already.",
                "Give this one another --name.",
            )
        model = replace(model, name=f"{model.name}-{model.weights_digest[:6]}")
    wanted = wanted_run(model, checked.protocol, tasks)
    versions = {"lmms-eval": str(outcome.get("lmms_eval_version", "unknown"))}
    with held_run(results, wanted) as run:
        run.begin(wanted, "running")
        for result, samples in checked.scored:
            run.commit(result, samples)
        run.finish(
            "complete",
            notes=[f"imported from {file.name}", *_unmatched(outcome, _sample_logs(file))],
            provenance=collect() | {"imported": {"file": file.name, "versions": versions}},
        )
    return run


def _unknown(logs: dict[str, Path]) -> list[str]:
    known = {name for spec in load_tasks() for name in (spec.upstream, _cn(spec))}
    return sorted(logs.keys() - known)


def _cn(spec: TaskSpec) -> str:
    """MMBench EN is usually logged under its judged task; the answers are the same."""
    return {"mmbench_en": "mmbench_en_dev"}.get(spec.id, spec.upstream)


def _sample_logs(file: Path) -> dict[str, Path]:
    stamp = file.name.removesuffix("_results.json")
    found = {}
    for log in sorted(file.parent.glob("*_samples_*.jsonl")):
        if log.name.startswith(f"{stamp}_samples_"):  # a stamp may hold what glob takes for more
            found[log.name.removeprefix(f"{stamp}_samples_").removesuffix(".jsonl")] = log
    return found


def _model(
    file: Path, config: Entry, name: str | None, labels: Entry, logs: list[Path]
) -> ModelRef:
    arguments = config.get("model_args") or ""
    if isinstance(arguments, dict):
        arguments = ",".join(f"{key}={value}" for key, value in arguments.items())
    pretrained = re.search(r"(?:pretrained|model|model_name|path)=([^,]+)", str(arguments))
    told = trained_name(pretrained.group(1)) if pretrained else config.get("model")
    return ModelRef(
        name=name or _text(told or file.parent.name),
        path=_text(f"lmms-eval {config.get('model', '')} {arguments}".strip()),
        # The weights are not known; the answers stand for them, so that two imports differ.
        weights_digest=digest_files(logs),
        architecture=_text(config.get("model") or ""),
        **labels,
    )


# --- the log: every document once, nothing missing -----------------------------------------------


def _counts(outcome: Entry, upstream: str) -> dict[str, int]:
    """lmms-eval's own count of documents: `original` of the data set, `effective` asked."""
    told = outcome.get("n-samples")
    told = told.get(upstream) if isinstance(told, dict) else told
    if told is None:
        return {}
    known = told if isinstance(told, dict) else {"n-samples": told}
    for key, value in known.items():
        if not isinstance(told, dict) or type(value) is not int or value < 0:
            raise IncompleteRunError(
                f"n-samples of {upstream}: {key} is {value!r:.40}, not a number of documents.",
                "Give the results file as lmms-eval wrote it.",
            )
    return dict(known)


def _entries(spec: TaskSpec, log: Path, counts: dict[str, int]) -> list[Entry]:
    """The log's samples in the order of their documents, each there once."""
    entries = sorted(_read_log(log), key=lambda entry: entry["doc_id"])
    again = "Evaluate it again into an empty folder: lmms-eval appends to a log that is there."
    if not entries:
        raise IncompleteRunError(f"{log} holds no sample.", again)
    seen = Counter(entry["doc_id"] for entry in entries)
    twice = [key for key, count in seen.items() if count > 1]
    if twice:
        raise IncompleteRunError(
            f"{log}: {len(twice):,} documents are there more than once, the first is doc_id "
            f"{twice[0]}.",
            again,
        )
    expected = counts.get("effective", entries[-1]["doc_id"] + 1)
    missing = sorted(set(range(min(expected, entries[-1]["doc_id"] + 1))) - seen.keys())
    if missing or len(entries) != expected:
        first = f", the first is doc_id {missing[0]}" if missing else ""
        raise IncompleteRunError(
            f"{log} has {len(entries):,} of {expected:,} documents{first}.",
            "Was the log cut short?",
        )
    if len(entries) > spec.documents:
        raise IncompleteRunError(
            f"{log} has {len(entries):,} documents, {spec.id} has {spec.documents:,}.", again
        )
    return entries


def _read_log(path: Path) -> Iterator[Entry]:
    r"""Samples line by line: a line ends at `\n` alone, whatever Unicode has besides."""
    blank = 0
    with path.open("rb") as stream:
        for number in range(1, 1 << 62):
            line = stream.readline(LINE_BYTES)
            if not line:
                return
            if not line.strip(b" \t\r\n\0"):
                blank += len(line)
                if blank > BLANK_BYTES:
                    problem = f"{path} holds nothing but blanks from line {number} on."
                    raise IncompleteRunError(problem, "Was the disk full?")
                continue
            yield _sample(path, number, line)


def _sample(path: Path, number: int, line: bytes) -> Entry:
    """One sample without what is not used of it: the document and the prompt's settings."""
    try:
        entry = json.loads(line.decode("utf-8", "surrogatepass"))
        if type(entry["doc_id"]) is not int or entry["doc_id"] < 0:
            raise TypeError(f"doc_id is {entry['doc_id']!r:.40}, not a number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f": {one_line(error)[:120]}" if isinstance(error, TypeError) else ""
        problem = f"{path} line {number} is not a logged sample{why}."
        raise IncompleteRunError(problem, "Was the log cut short?") from None
    kept = {key: value for key, value in entry.items() if key not in ("doc", "arguments")}
    if b"\\ud" not in line.lower() and b"\xed" not in line:  # no surrogate, escaped or encoded
        return kept
    text = json.dumps(kept, ensure_ascii=False)
    whole: Entry = json.loads(_text(text))
    return whole | {REPLACED: _text(text) != text}


# --- samples and score ---------------------------------------------------------------------------


def _result(
    spec: TaskSpec,
    entries: list[Entry],
    samples: "pd.DataFrame",
    metrics: dict[str, float],
    told: list[str],
    alone: bool,
) -> TaskResult:
    """One benchmark's result; `alone` without the documents."""
    notes = ["imported", *told]
    if replaced := sum(entry.get(REPLACED, False) for entry in entries):
        notes.append(f"{replaced} samples hold half a character, which is shown as \ufffd")
    if len(samples) < spec.documents:
        notes.append(f"{len(samples):,} of the benchmark's {spec.documents:,} documents")
    if alone and spec.unit == "picture":
        notes.append("an image's questions are counted as independent: the interval is too short")
    prompts = [str(entry.get("input", "")) for entry in entries]
    return TaskResult(
        task=spec.id,
        # Prompts and their number are known, data and settings are not: equal only to itself.
        fingerprint=digest_text("imported", spec.id, *prompts),
        metric=spec.metric,
        score=aggregate(spec.aggregator, samples),
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        documents=len(samples),
        units=int(samples["unit_id"].nunique()),
        rates=rates(samples),
        interval=score_interval(spec.aggregator, samples),
        profile="imported",
        notes=notes,
        settings={"aggregator": spec.aggregator, "engine": "lmms-eval, imported"},
    )


def _agreement(
    spec: TaskSpec,
    upstream: str,
    samples: "pd.DataFrame",
    metrics: dict[str, float],
    log: Path,
    trust_samples: bool,
) -> list[str]:
    """What to note about the samples' score beside upstream's, if a judge can explain it."""
    if spec.metric not in metrics:
        return ["results.json holds no score to compare with"]
    theirs = points_of(spec, samples, metrics)
    ours = aggregate(spec.aggregator, samples)
    allowed = ROUNDING
    if upstream in JUDGED:
        unread = samples.loc[samples["parsed"] == "", "unit_id"].nunique()
        allowed += 100 * unread / max(1, samples["unit_id"].nunique())
    if abs(ours - theirs) <= ROUNDING:
        return []
    difference = f"results.json says {theirs:.2f}, the samples give {ours:.2f}"
    if trust_samples or abs(ours - theirs) <= allowed:
        return [difference]
    raise IncompleteRunError(
        f"{log}: {difference}.",
        "Give results and log of one evaluation, or --trust-samples for the samples' score.",
    )


def _text(value: Any) -> str:
    """Text with every unpaired surrogate, which no file can hold, replaced."""
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _answer(entry: Entry) -> str:
    """The model's text, whatever nesting lmms-eval gave it."""
    value = entry.get("filtered_resps", entry.get("resps", ""))
    while isinstance(value, list):
        value = value[0] if value else ""
    return str(value)


def _samples(spec: TaskSpec, entries: list[Entry], data: Path | None, log: Path) -> "pd.DataFrame":
    """Samples from the log; the documents' own columns where there is a data folder."""
    try:
        samples = _from_log(spec, entries) if data is None else _from_data(spec, entries, data)
    except KdBenchError:
        raise
    except Exception as error:  # the log's values run through upstream's own functions
        problem = f"{log} cannot be read as {spec.id}: {type(error).__name__}: {one_line(error)}"
        raise IncompleteRunError(f"{problem[:300]}.", "Give the log as it was written.") from None
    wrong = samples.loc[~samples["score"].between(0, 1), ["document_id", "score"]]
    if len(wrong):
        name, score = wrong.iloc[0]
        raise IncompleteRunError(
            f"{log}: the score {score:g} of document {name} is not between 0 and 1.",
            "Give the log as it was written.",
        )
    return samples


def _from_log(spec: TaskSpec, entries: list[Entry]) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for entry in entries:
        answer = _answer(entry)
        row = {
            "document_id": str(entry["doc_id"]),
            "unit_id": str(entry["doc_id"]),
            "category": "",
            "question": str(entry.get("input", "")),
            "answer": answer,
            "status": "ok" if answer.strip() else "empty",
            "image_digest": "",
            "answer_confidence": float("nan"),
        }
        target, parsed = str(entry.get("target", "")), answer.strip().lower()
        if spec.id in _LOGGED:  # read by the judge that reads rows of our own
            prefix, names = _LOGGED[spec.id]
            logged = next(value for key, value in entry.items() if key.startswith(prefix))
            score, target, parsed = JUDGES[spec.id]({"answer": target, **logged}, answer, entry)
            row |= names(logged)
        else:
            score = float(entry[spec.metric])
        rows.append({**row, "target": target, "parsed": parsed, "score": float(score)})
    return pd.DataFrame(rows, columns=list(SAMPLE_COLUMNS))


def _names_of_rotation(row: Entry) -> Entry:
    index = int(row["index"])
    return {
        "document_id": str(row["index"]),
        "unit_id": str(index % 1_000_000),
        "category": str(row["category"]),
    }


# Under which metric upstream logs its own record of a row, and what the record names.
_LOGGED: dict[str, tuple[str, Callable[[Entry], Entry]]] = {
    "mme": (
        "mme_",
        lambda row: {
            "unit_id": f"{row['category']}/{row['question_id']}",
            "category": row["category"],
        },
    ),
    "mmbench_en": ("gpt_eval_score", _names_of_rotation),
    "mmbench_cn": ("gpt_eval_score", _names_of_rotation),
    # Whether upstream read or drew a letter of MMMU is not in the log.
    "mmmu": ("mmmu_acc", lambda row: {"document_id": row["id"], "category": row["subdomain"]}),
    "pope": ("pope_accuracy", lambda row: {}),
}


def _from_data(spec: TaskSpec, entries: list[Entry], data: Path) -> "pd.DataFrame":
    """Score the logged answers again, on the documents themselves."""
    from kd_bench.evals.benchmark import Answer, prepare
    from kd_bench.evals.scoring import Thinking, samples_frame

    prepared = prepare(spec, data)
    answers = {}
    for entry in entries:
        text = _answer(entry).strip()
        index = int(entry["doc_id"])
        answers[index] = Answer(index, text, "ok" if text else "empty")
    missing = set(range(len(prepared.documents))) ^ set(answers)
    if missing:
        raise UsageError(
            f"{spec.id}: the log has {len(answers)} documents, {data} has "
            f"{len(prepared.documents)}.",
            "Give the data that was evaluated, or leave --data out.",
        )
    for document in prepared.documents:
        prepared.task.process_results(document, [answers[document.index].text])
    return samples_frame(prepared, answers, Thinking("none"))
