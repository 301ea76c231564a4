"""Turn result folders of lmms-eval (`--log_samples --output_path`) into runs, marked imported.

    <time>_results.json      <time>_samples_<task>.jsonl      since 0.2.4
    results.json             <task>.json                      before: a folder an evaluation
    results_<time>.json      samples_<task>_<time>.jsonl      as lm-evaluation-harness names them

The logs lie beside the results or in a folder `samples`. The log holds no images and no rows of
the data set, or is read as if it held none. With the data folder beside it, units,
questions and categories are those of a run of our own; without it, an image's questions count as
independent documents, and the note says so.

MMMU may be asked several times a document; upstream takes the answer that is right, if one is
(pass@k), and so does the run, which says so. What the answers say whatever their form is read
from the log, too, where it holds what that needs: options, annotators' answers.

A log is believed as far as it can be checked: every document once, scores between 0 and 1, and
samples that give the score which lmms-eval wrote beside them. All that is done before a run exists.
"""

import codecs
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

from kd_bench.aggregators import aggregate, by_content
from kd_bench.errors import IncompleteRunError, KdBenchError, UsageError, one_line
from kd_bench.evals.benchmark import REASONING_TAGS, mmmu_right, task_config, upstream_metrics
from kd_bench.evals.checkpoint import trained_name
from kd_bench.evals.scoring import (
    CONTENT_SCORE,
    JUDGES,
    Thinking,
    content_of,
    points_of,
    rates,
    tokens,
)
from kd_bench.files import digest_files, digest_text, read_json
from kd_bench.provenance import collect
from kd_bench.records import (
    CONTENT_COLUMNS,
    SAMPLE_COLUMNS,
    ModelRef,
    Protocol,
    Role,
    Status,
    TaskResult,
)
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
UTF8 = ("utf-8", "surrogatepass")
ROUNDING = 0.01
"""Points between upstream's score and that of the samples: MMMU's is rounded to five digits."""
REPLACED = "kd_bench: replaced"
"""Key of a read sample: whether half a character, which no file can hold, was replaced in it."""
SCORED, GENERATED = "kd_bench: scored", "kd_bench: generated"
"""Keys of a read sample: the text that upstream scored, and what the model wrote."""
RESPONSES = "kd_bench: responses"
"""Key of a read sample: of each response that upstream scored, the two texts."""
NEEDED = ("answer", "answers", "choices", "options", "question_type")
"""Columns of a logged document that upstream's scoring reads."""
THOUGHTS = Thinking(REASONING_TAGS)
"""lmms-eval's own tags, which it takes out since 0.7."""
SPELLINGS = {"mme_percetion_score": "mme_perception_score"}
"""Names of metrics before 0.2.4, and today's."""
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
    files = [path] if path.is_file() else _results_files(path)
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
        metrics = _metrics(told)
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
        scored = names & {k for k, v in outcome["results"].items() if _metrics(v)}
        if scored and not names & logs.keys():
            notes.append(f"{spec.id} has a score and no sample log: it is not imported")
        if names & logs.keys() and not scored:
            notes.append(f"{spec.id} has a sample log and no score in results.json")
    return notes


def _metrics(told: Any) -> dict[str, float]:
    """The numbers of one benchmark by today's names."""
    found = upstream_metrics(told) if isinstance(told, dict) else {}
    return {SPELLINGS.get(name, name): value for name, value in found.items()}


def _read_results(file: Path) -> Entry:
    if file.stat().st_size > RESULTS_BYTES:
        raise IncompleteRunError(
            f"{file} has {file.stat().st_size >> 20:,} MiB, which no results file has.",
            "Give a *_results.json of lmms-eval.",
        )
    try:
        outcome = read_json(file)
        if isinstance(outcome, dict) and "config" not in outcome and "model_configs" in outcome:
            outcome = outcome | {"config": outcome["model_configs"]}  # before 0.2.4
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


def _results_files(folder: Path) -> list[Path]:
    """Results files at any depth; one without a time is taken where its logs are there."""
    # MMBench's own aggregation leaves a file of that name, too.
    found = {
        file
        for pattern in ("*_results.json", "results_*.json", "results.json")
        for file in folder.rglob(pattern)
        if file.parent.name != "submissions"
    }
    return sorted(file for file in found if file.match("*_results.json") or _sample_logs(file))


def _sample_logs(file: Path) -> dict[str, Path]:
    """The logs of a results file by their task.

    Raises:
        UsageError: two files are logs of one task.
    """
    stamp = re.fullmatch(r"(.*)_results\.json|results_(.*)\.json", file.name)
    time = "" if stamp is None else stamp[1] or stamp[2]
    of_time = rf"{re.escape(time)}_samples_(.+)\.jsonl|samples_(.+)_{re.escape(time)}\.jsonl"
    named = re.compile(of_time if time else r"samples_(.+)\.jsonl?|(.+)\.jsonl?")
    inside = [folder for folder in file.parent.glob("samples/**") if folder.is_dir()]
    beside = file.parent.parent / "samples"
    folders = [file.parent, *inside, *([beside] if file.parent.name == "results" else [])]
    found: dict[str, Path] = {}
    for log in sorted(each for folder in folders for each in folder.glob("*.json*")):
        match = named.fullmatch(log.name)
        if match is None or log == file or (log.suffix == ".json" and not _is_log(log)):
            continue
        task = match[1] or match[2]
        if task in found:
            raise UsageError(
                f"{found[task]} and {log} are both logs of {task}.", "Remove the wrong one."
            )
        found[task] = log
    return found


def _is_log(file: Path) -> bool:
    """Whether a JSON file begins as the logs of lmms-eval before 0.2.4 do."""
    with file.open("rb") as stream:
        return re.match(rb'\s*{\s*"(?:args|model_configs|logs)"\s*:', stream.read(200)) is not None


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
    read = _read_old_log(log) if log.suffix == ".json" else _read_log(log)
    entries = sorted(read, key=lambda entry: entry["doc_id"])
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
    for entry in entries:
        try:
            entry[RESPONSES] = _responses(entry)
            _choose(spec, entry)
        except Exception as error:  # the log's values run through upstream's own functions
            raise IncompleteRunError(
                f"{log}: the answer to document {entry['doc_id']} cannot be read: "
                f"{one_line(error)}.",
                "Give the log as it was written.",
            ) from None
    counted = Counter(len(entry[RESPONSES]) for entry in entries)
    if spec.id == "mmmu" and len(counted) > 1:
        raise IncompleteRunError(
            f"{log} has {min(counted)} to {max(counted)} responses a document, which is no "
            "pass@k of any k.",
            "Give the log of one evaluation.",
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


def _read_old_log(path: Path) -> Iterator[Entry]:
    """Samples of a log that is one JSON object, `{"args": ..., "logs": [sample, ...], ...}`."""
    decoder = json.JSONDecoder()
    text, number, place = "", 0, None
    with path.open("rb") as stream:
        decode = codecs.getincrementaldecoder("utf-8")("surrogatepass").decode
        while chunk := stream.read(BLANK_BYTES):
            try:
                text += decode(chunk)
            except UnicodeDecodeError:
                problem = f"{path} is no text in UTF-8."
                raise IncompleteRunError(problem, "Give the log as it was written.") from None
            place = place if place is not None else _end_of(r'"logs"\s*:\s*\[', text, 0)
            while place is not None:
                start = _end_of(r"[\s,]*(?=[^\s,])", text, place)
                if start is not None and text[start] == "]":
                    return
                try:
                    _, end = decoder.raw_decode(text, len(text) if start is None else start)
                except (ValueError, RecursionError):
                    break  # the sample goes on in what is not read yet
                yield _sample(path, number := number + 1, text[start:end].encode(*UTF8), "sample")
                text, place = text[end:], 0
            if len(text) > LINE_BYTES:
                break
    problem = f"{path} ends, or goes on without an end, behind sample {number}."
    raise IncompleteRunError(problem, "Was the log cut short?")


def _end_of(pattern: str, text: str, start: int) -> int | None:
    found = re.compile(pattern).search(text, start)
    return found.end() if found else None


def _sample(path: Path, number: int, line: bytes, kind: str = "line") -> Entry:
    """One sample without what is not used of it: most of the document, the prompt's settings."""
    try:
        entry = json.loads(line.decode(*UTF8))
        if type(entry["doc_id"]) is not int or entry["doc_id"] < 0:
            raise TypeError(f"doc_id is {entry['doc_id']!r:.40}, not a number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f": {one_line(error)[:120]}" if isinstance(error, TypeError) else ""
        problem = f"{path} {kind} {number} is not a logged sample{why}."
        raise IncompleteRunError(problem, "Was the log cut short?") from None
    kept = {key: value for key, value in entry.items() if key not in ("doc", "arguments")}
    kept["input"] = _prompt(entry)
    kept["doc"] = _needed(entry.get("doc"))
    if b"\\ud" not in line.lower() and b"\xed" not in line:  # no surrogate, escaped or encoded
        return kept
    text = json.dumps(kept, ensure_ascii=False)
    whole: Entry = json.loads(_text(text))
    return whole | {REPLACED: _text(text) != text}


def _prompt(entry: Entry) -> str:
    """The question as it was asked; the document's own where the log does not tell."""
    given = entry.get("input")
    if given is None:  # before 0.2.4: [[prompt, document, task, split]]
        given = entry.get("arguments")
        while isinstance(given, list):
            given = given[0] if given else None
    if isinstance(given, str) or given:
        return str(given)
    document = entry.get("doc")
    return str(document.get("question", "")) if isinstance(document, dict) else ""


def _needed(document: Any) -> Entry:
    """What scoring reads of a logged document; ten annotators' answers as their words alone."""
    if not isinstance(document, dict):
        return {}
    kept = {key: document[key] for key in NEEDED if key in document}
    if isinstance(given := kept.get("answers"), list):
        texts = [each.get("answer") if isinstance(each, dict) else each for each in given]
        kept["answers"] = [sys.intern(str(text)) for text in texts]
    return kept


def _responses(entry: Entry) -> list[tuple[str, str]]:
    """Of each response that upstream took: what it scored, and what the model wrote.

    A thought is taken out of `filtered_resps` since 0.7; `resps`, the whole, is there only where
    it differs, and holds all responses where a filter took one or some of them. Both are nested
    in a list before 0.7, and in two where a filter leaves several responses.

    Raises:
        TypeError: there is no answer, or one that is no text.
    """
    told = [entry[key] for key in ("filtered_resps", "resps") if entry.get(key) not in (None, [])]
    if not told:
        if not entry.keys() & {"filtered_resps", "resps"}:
            raise TypeError("neither filtered_resps nor resps is there")
        return [("", "")]
    scored, whole = _texts(told[0]), _texts(told[-1])
    if entry.get("filtered_resps") in (None, []):
        return [(scored[0], scored[0])]  # the filter that every task has takes the first
    # A vote may have taken any of the responses.
    left = list(whole)
    generated = []
    for number, text in enumerate(scored):
        same = [each for each in left if text in (each, THOUGHTS.answer(each))]
        if same:
            left.remove(same[0])
        generated.append(same[0] if same else whole[number] if len(whole) == len(scored) else text)
    return list(zip(scored, generated, strict=True))


def _texts(value: Any) -> list[str]:
    """The responses to a document, however deep the lists around them are."""
    while isinstance(value, list) and value and isinstance(value[0], list):
        value = value[0]
    texts = []
    for each in value if isinstance(value, list) else [value]:
        if isinstance(each, dict | bool | list):
            raise TypeError(f"{each!r:.40} is no text")
        texts.append("" if each is None else str(each))
    return texts or [""]


def _choose(spec: TaskSpec, entry: Entry) -> None:
    """Take the response that upstream's score is of: the first; of MMMU's, the first right one.

    Raises:
        ValueError: the log does not tell which one that is.
    """
    chosen, count = 0, len(entry[RESPONSES])
    if spec.id == "mmmu" and isinstance(told := entry.get("mmmu_acc"), dict):
        readings = told["parsed_pred"]
        # Before 0.3.1 there was one reading of one response: a letter, or candidates of a number.
        is_open = told["question_type"] == "open"
        if isinstance(readings, str) or (is_open and "mmmu_acc_pass_at_k" not in entry):
            readings = [readings]
        if len(readings) != count:
            raise ValueError(f"it has {count} responses and {len(readings)} readings")
        right = [number for number, said in enumerate(readings) if mmmu_right(told, said)]
        chosen = right[0] if right else 0
        entry["mmmu_acc"] = told | {"parsed_pred": [readings[chosen]]}
    elif count > 1 and spec.answer == "text":
        raise ValueError(f"it has {count} responses, and its score may be of any of them")
    entry[SCORED], entry[GENERATED] = entry[RESPONSES][chosen]


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
    notes += _thoughts(entries)
    asked = len(entries[0][RESPONSES]) if spec.id == "mmmu" else 1
    if asked > 1:
        notes.append(f"{asked} responses a document: right where one of them is (pass@{asked})")
    unknown = int(samples["score_by_content"].isna().sum())
    if unknown:
        notes.append(
            f"the score by content is not known: the log lacks what {unknown:,} of it need"
        )
    else:
        content = aggregate(spec.aggregator, by_content(samples))
        metrics = metrics | {CONTENT_SCORE: content / 100}
    prompts = [entry["input"] for entry in entries]
    return TaskResult(
        task=spec.id,
        # Prompts and their number are known, data and settings are not: equal only to itself.
        fingerprint=digest_text("imported", spec.id, *["again"] * (asked - 1), *prompts),
        metric=spec.metric,
        score=aggregate(spec.aggregator, samples),
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        documents=len(samples),
        units=int(samples["unit_id"].nunique()),
        rates=rates(samples),
        tokens=tokens(samples),
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


def _status(entry: Entry) -> Status:
    """A thought that never ends was cut off."""
    if THOUGHTS.is_unfinished(entry[GENERATED]):
        return "truncated"
    return "ok" if entry[SCORED].strip() else "empty"


def _thoughts(entries: list[Entry]) -> list[str]:
    """What to note about thoughts in the answers."""
    counts = Counter(
        "without" if THOUGHTS.thought(entry[SCORED]) == "" else "with"
        for entry in entries
        if THOUGHTS.thought(entry[GENERATED])
    )
    return [
        f"{counts[kind]:,} answers were scored {kind} the thoughts in them"
        for kind in ("with", "without")
        if counts[kind]
    ]


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
        answer = entry[SCORED]
        row = {
            "document_id": str(entry["doc_id"]),
            "unit_id": str(entry["doc_id"]),
            "category": "",
            "question": entry["input"],
            "answer": entry[GENERATED],
            "status": _status(entry),
            "image_digest": "",
            "answer_confidence": float("nan"),
        }
        target, parsed = str(entry.get("target", "")), answer.strip().lower()
        logged: Entry = {}
        if spec.id in _LOGGED:  # read by the judge that reads rows of our own
            prefix, names = _LOGGED[spec.id]
            logged = next(value for key, value in entry.items() if key.startswith(prefix))
            score, target, parsed = JUDGES[spec.id]({"answer": target, **logged}, answer, entry)
            row |= names(logged)
        else:
            score = float(entry[spec.metric])
        row |= {"target": target, "parsed": parsed, "score": float(score), **_tokens(entry)}
        document = {"answer": target, **entry["doc"], **logged}
        row["content"], row["score_by_content"] = _content(spec, entry, document, row)
        rows.append(row)
    return pd.DataFrame(rows, columns=[*SAMPLE_COLUMNS, *CONTENT_COLUMNS])


def _tokens(entry: Entry) -> dict[str, int]:
    """Generated tokens and those of a thought among them, where the log has them, as since 0.7."""
    told = entry.get("token_counts")
    counted = told[0] if isinstance(told, list) and told and isinstance(told[0], dict) else {}
    of_thought, tokens = (
        value if type(value := counted.get(key)) is int and value > 0 else 0
        for key in ("reasoning_tokens", "output_tokens")
    )
    thought = THOUGHTS.thought(entry[GENERATED])
    if thought and not of_thought:
        of_thought = round(tokens * len(thought) / len(entry[GENERATED]))
    return {"tokens": tokens, "thinking_tokens": min(of_thought, tokens)}


def _content(spec: TaskSpec, entry: Entry, document: Entry, row: Entry) -> tuple[str, float]:
    """What an answer says and what that is worth; NaN where the log does not hold what it needs."""
    if spec.answer == "letter" and document.get("question_type") != "open":
        options = document.get("options", document.get("choices")) or _options(entry["input"])
        if not options and not spec.id.startswith("mmbench"):
            return "", float("nan")
        document = document | {"options": options, "choices": options}

    def again(said: str) -> float:
        if spec.id == "mmmu":
            from lmms_eval.tasks.mmmu.utils import parse_open_response

            return mmmu_right(document, parse_open_response(said))
        score_of = _upstream_score(spec.upstream, spec.metric)
        if score_of(document, entry[SCORED].strip()) != row["score"]:
            return float("nan")  # not the words that upstream has compared with
        return score_of(document, said)

    responses = entry[RESPONSES] if spec.id == "mmmu" else [(entry[SCORED], "")]
    read = []
    for scored, _ in responses:
        text = THOUGHTS.answer(scored).strip()
        is_scored = text == scored.strip() and len(responses) == 1
        score = row["score"] if is_scored else None
        try:
            read.append(content_of(spec, document, text, row["target"], score, again))
        except Exception:  # a column is not there, or not what upstream's functions take
            return "", float("nan")
    return max(read, key=lambda each: each[1])


@cache
def _upstream_score(upstream: str, metric: str) -> Callable[[Entry, str], float]:
    """Upstream's score of an answer to a document.

    It raises KeyError where the document lacks a column.
    """
    config = task_config(upstream)
    process = config.get("process_results")
    if callable(process):

        def processed(document: Entry, said: str) -> float:
            given = list(document["answers"])
            if upstream == "vqav2_val":
                given = [{"answer": text, "answer_id": n} for n, text in enumerate(given)]
            return float(process({"question_id": "", "answers": given}, [said])[metric])

        return processed
    from lmms_eval.api.registry import get_metric

    (entry,) = [each for each in config["metric_list"] if each["metric"] == metric]
    chosen = ("metric", "aggregation", "higher_is_better")
    settings = {key: value for key, value in entry.items() if key not in chosen}
    compare = get_metric(metric)
    return lambda document, said: float(
        compare(references=[document["answer"]], predictions=[said], **settings)[metric]
    )


def _options(prompt: str) -> list[str]:
    r"""Options that a prompt names one a line, `A. red`; none where the lines can be read twice.

    >>> _options("Which? A. is odd.\nA. red\nB. blue\n\nAnswer with the letter.")
    ['red', 'blue']
    """
    found = re.search(r"^A\. .*(?:\n[B-Z]\. .*)+", prompt, re.MULTILINE)
    lines = found[0].split("\n") if found else []
    after = prompt[found.end() :] if found else ""
    in_order = all(line[0] == letter for line, letter in zip(lines, ascii_uppercase, strict=False))
    # A text of several lines would end the list, or an option's text, too early.
    is_whole = re.match(r"(?:\s*$|\n\s*\n|\nAnswer\b)", after) is not None
    alone = len(re.findall(r"^[A-Z]\. ", prompt, re.MULTILINE)) == len(lines)
    return [line[3:] for line in lines] if in_order and is_whole and alone else []


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
    from kd_bench.evals.scoring import samples_frame

    prepared = prepare(spec, data)
    by_index = {int(entry["doc_id"]): entry for entry in entries}
    missing = set(range(len(prepared.documents))) ^ set(by_index)
    if missing:
        raise UsageError(
            f"{spec.id}: the log has {len(by_index)} documents, {data} has "
            f"{len(prepared.documents)}.",
            "Give the data that was evaluated, or leave --data out.",
        )
    answers = {}
    for document in prepared.documents:
        entry = by_index[document.index]
        if len(entry[RESPONSES]) > 1 and spec.id == "mmmu":  # today's reading may be another
            scores = [
                prepared.task.score_of(document, said.strip(), spec.metric)
                for said, _ in entry[RESPONSES]
            ]
            entry[SCORED], entry[GENERATED] = entry[RESPONSES][scores.index(max(scores))]
        text, tokens = entry[SCORED].strip(), _tokens(entry)["tokens"]
        answers[document.index] = Answer(document.index, text, _status(entry), tokens)
        prepared.task.process_results(document, [text])
    samples = samples_frame(prepared, answers, Thinking("none"), bare=THOUGHTS)
    return samples.assign(
        answer=[entry[GENERATED].strip() for entry in entries],
        thinking_tokens=[_tokens(entry)["thinking_tokens"] for entry in entries],
    )
