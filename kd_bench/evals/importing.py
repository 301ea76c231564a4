"""Turn what lmms-eval wrote (`logs`) into runs, marked imported.

The log holds no images and no rows of the data set, or is read as if it held none. With the data
folder beside it, units, questions and categories are those of a run of our own; without it, an
image's questions count as independent documents, and the note says so.

MMMU may be asked several times a document; upstream takes the answer that is right, if one is
(pass@k), and so does the run, which says so. What the answers say whatever their form is read
from the log, too, where it holds what that needs: options, annotators' answers.

A log is believed as far as it can be checked: every document once, scores between 0 and 1, and
samples that give the score which lmms-eval wrote beside them. All that is done before a run exists.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

from kd_bench.aggregators import aggregate, by_content
from kd_bench.errors import IncompleteRunError, KdBenchError, UsageError, one_line
from kd_bench.evals.benchmark import Answer, mmmu_right, prepare, task_config, unit_of
from kd_bench.evals.checkpoint import trained_name
from kd_bench.evals.content import CONTENT_SCORE, Thinking, content_of
from kd_bench.evals.logs import (
    THOUGHTS,
    Entry,
    LoggedSample,
    Results,
    log_names,
    read_results,
    read_samples,
    results_files,
    valid_text,
)
from kd_bench.evals.scoring import JUDGES, points_of, rates, samples_frame, tokens
from kd_bench.files import digest_files, digest_text
from kd_bench.provenance import collect
from kd_bench.records import (
    CONTENT_COLUMNS,
    SAMPLE_COLUMNS,
    ModelRef,
    Protocol,
    Role,
    TaskResult,
)
from kd_bench.registry import TaskSpec, load_tasks
from kd_bench.stats import score_interval
from kd_bench.store import Run, catalogue, held_run, wanted_run

if TYPE_CHECKING:
    import pandas as pd


ROUNDING = 0.01
"""Points between upstream's score and that of the samples: MMMU's is rounded to five digits."""
JUDGED = ("mmbench_en_dev", "mmbench_cn_dev")
"""Upstream asks a judge, or draws a letter, where an answer names none: that is not in the log."""


@dataclass(frozen=True)
class _Import:
    """One results file, its logs checked and scored, nothing stored yet."""

    results: Results
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
    files = [path] if path.is_file() else results_files(path)
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
    results = read_results(file)
    logs = results.logs
    specs = [spec for spec in load_tasks() if set(log_names(spec)) & logs.keys()]
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
        upstream = next(each for each in log_names(spec) if each in logs)
        log, counts, metrics = logs[upstream], results.counts(upstream), results.metrics(upstream)
        logged = read_samples(spec, log, counts)
        if (
            results.config.get("limit") not in (None, -1, 0)
            or counts.get("effective", 0) < counts.get("original", 0)
            or len(logged) < spec.documents
        ):
            limits.append(len(logged))
        samples = _samples(spec, logged, data, log)
        notes = _agreement(spec, upstream, samples, metrics, log, trust_samples)
        scored.append((_result(spec, logged, samples, metrics, notes, data is None), samples))
    model = _model(results, name, labels)
    protocol = Protocol("imported", limit=max(limits, default=None), engine="lmms-eval, imported")
    return _Import(results, model, protocol, scored)


def _unknown(logs: dict[str, Path]) -> list[str]:
    return sorted(logs.keys() - {name for spec in load_tasks() for name in log_names(spec)})


def _unmatched(results: Results) -> list[str]:
    """Benchmarks that are not known, or have a score without a log, or a log without a score."""
    unknown = _unknown(results.logs)
    notes = [f"{name} is no benchmark that kd-bench knows: not imported" for name in unknown]
    for spec in load_tasks():
        is_logged = any(name in results.logs for name in log_names(spec))
        is_scored = any(results.metrics(name) for name in log_names(spec))
        if is_scored and not is_logged:
            notes.append(f"{spec.id} has a score and no sample log: it is not imported")
        if is_logged and not is_scored:
            notes.append(f"{spec.id} has a sample log and no score in results.json")
    return notes


def _model(results: Results, name: str | None, labels: Entry) -> ModelRef:
    config = results.config
    arguments = config.get("model_args") or ""
    if isinstance(arguments, dict):
        arguments = ",".join(f"{key}={value}" for key, value in arguments.items())
    pretrained = re.search(r"(?:pretrained|model|model_name|path)=([^,]+)", str(arguments))
    told = trained_name(pretrained.group(1)) if pretrained else config.get("model")
    return ModelRef(
        name=name or valid_text(told or results.file.parent.name),
        path=valid_text(f"lmms-eval {config.get('model', '')} {arguments}".strip()),
        # The weights are not known; the answers stand for them, so that two imports differ.
        weights_digest=digest_files(results.logs.values()),
        architecture=valid_text(config.get("model") or ""),
        **labels,
    )


def _store(checked: _Import, store: Path, named: bool) -> Run:
    """Store the run under a name that no other answers to the same benchmarks have."""
    results, model = checked.results, checked.model
    tasks = [result.task for result, _ in checked.scored]
    if any(
        other.model.name == model.name
        and other.model.weights_digest != model.weights_digest
        and set(other.tasks) & set(tasks)
        for _, other in catalogue(store).runs
    ):
        if named:
            raise UsageError(
                f"A run named {model.name!r} with other answers is there already.",
                "Give this one another --name.",
            )
        model = replace(model, name=f"{model.name}-{model.weights_digest[:6]}")
    wanted = wanted_run(model, checked.protocol, tasks)
    versions = {"lmms-eval": str(results.told.get("lmms_eval_version", "unknown"))}
    with held_run(store, wanted) as run:
        run.begin(wanted, "running")
        for result, samples in checked.scored:
            run.commit(result, samples)
        run.finish(
            "complete",
            notes=[f"imported from {results.file.name}", *_unmatched(results)],
            provenance=collect() | {"imported": {"file": results.file.name, "versions": versions}},
        )
    return run


# --- samples and score ---------------------------------------------------------------------------


def _result(
    spec: TaskSpec,
    logged: list[LoggedSample],
    samples: "pd.DataFrame",
    metrics: dict[str, float],
    told: list[str],
    alone: bool,
) -> TaskResult:
    """One benchmark's result; `alone` without the documents."""
    notes = ["imported", *told]
    if replaced := sum(sample.replaced for sample in logged):
        notes.append(f"{replaced} samples hold half a character, which is shown as \ufffd")
    if len(samples) < spec.documents:
        notes.append(f"{len(samples):,} of the benchmark's {spec.documents:,} documents")
    if alone and spec.unit == "picture":
        notes.append("an image's questions are counted as independent: the interval is too short")
    notes += _thoughts(logged)
    asked = len(logged[0].responses) if spec.id == "mmmu" else 1
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
    prompts = [sample.prompt for sample in logged]
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


def _thoughts(logged: list[LoggedSample]) -> list[str]:
    """What to note about thoughts in the answers."""
    counts = Counter(
        "without" if THOUGHTS.thought(sample.scored) == "" else "with"
        for sample in logged
        if THOUGHTS.thought(sample.generated)
    )
    return [
        f"{counts[kind]:,} answers were scored {kind} the thoughts in them"
        for kind in ("with", "without")
        if counts[kind]
    ]


def _samples(
    spec: TaskSpec, logged: list[LoggedSample], data: Path | None, log: Path
) -> "pd.DataFrame":
    """Samples from the log; the documents' own columns where there is a data folder."""
    try:
        samples = _from_log(spec, logged) if data is None else _from_data(spec, logged, data)
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


def _from_log(spec: TaskSpec, logged: list[LoggedSample]) -> "pd.DataFrame":
    import pandas as pd

    rows = []
    for sample in logged:
        name, answer = str(sample.index), sample.scored
        row: Entry = {
            "document_id": name,
            "unit_id": name,
            "category": "",
            "question": sample.prompt,
            "answer": sample.generated,
            "status": sample.status,
            "image_digest": "",
            "answer_confidence": float("nan"),
            "tokens": sample.tokens,
            "thinking_tokens": sample.thinking_tokens,
        }
        target, parsed = str(sample.entry.get("target", "")), answer.strip().lower()
        told: Entry = {}
        if spec.id in _RECORDS:  # read by the judge that reads rows of our own
            prefix, columns = _RECORDS[spec.id]
            told = next(value for key, value in sample.entry.items() if key.startswith(prefix))
            document = {"answer": target, **told}
            score, target, parsed = JUDGES[spec.id](document, answer, sample.entry)
            row |= {key: str(told[column]) for key, column in columns.items()}
            if spec.unit in ("pair", "circular"):
                row["unit_id"] = unit_of(spec, told)
        else:
            score = float(sample.entry[spec.metric])
        row |= {"target": target, "parsed": parsed, "score": float(score)}
        document = {"answer": target, **sample.document, **told}
        row["content"], row["score_by_content"] = _content(spec, sample, document, row)
        rows.append(row)
    return pd.DataFrame(rows, columns=[*SAMPLE_COLUMNS, *CONTENT_COLUMNS])


# Under which metric upstream logs its own record of a row, and where that names what we store.
_RECORDS: dict[str, tuple[str, dict[str, str]]] = {
    "mme": ("mme_", {"category": "category"}),
    "mmbench_en": ("gpt_eval_score", {"document_id": "index", "category": "category"}),
    "mmbench_cn": ("gpt_eval_score", {"document_id": "index", "category": "category"}),
    # Whether upstream read or drew a letter of MMMU is not in the log.
    "mmmu": ("mmmu_acc", {"document_id": "id", "category": "subdomain"}),
    "pope": ("pope_accuracy", {}),
}


def _from_data(spec: TaskSpec, logged: list[LoggedSample], data: Path) -> "pd.DataFrame":
    """Score the logged answers again, on the documents themselves."""
    prepared = prepare(spec, data)
    by_index = {sample.index: sample for sample in logged}
    missing = set(range(len(prepared.documents))) ^ set(by_index)
    if missing:
        raise UsageError(
            f"{spec.id}: the log has {len(by_index)} documents, {data} has "
            f"{len(prepared.documents)}.",
            "Give the data that was evaluated, or leave --data out.",
        )
    answers = {}
    for document in prepared.documents:
        sample = by_index[document.index]
        if len(sample.responses) > 1 and spec.id == "mmmu":  # today's reading may be another
            scores = [
                prepared.task.score_of(document, said.strip(), spec.metric)
                for said, _ in sample.responses
            ]
            sample.chosen = scores.index(max(scores))
        text = sample.scored.strip()
        answers[document.index] = Answer(document.index, text, sample.status, sample.tokens)
        prepared.task.process_results(document, [text])
    samples = samples_frame(prepared, answers, Thinking("none"), bare=THOUGHTS)
    return samples.assign(
        answer=[sample.generated.strip() for sample in logged],
        thinking_tokens=[sample.thinking_tokens for sample in logged],
    )


# --- what an answer says, as far as the log can tell ---------------------------------------------


def _content(
    spec: TaskSpec, sample: LoggedSample, document: Entry, row: Entry
) -> tuple[str, float]:
    """What an answer says and what that is worth; NaN where the log does not hold what it needs."""
    if spec.answer == "letter" and document.get("question_type") != "open":
        options = document.get("options", document.get("choices")) or _options(sample.prompt)
        if not options and not spec.id.startswith("mmbench"):
            return "", float("nan")
        document = document | {"options": options, "choices": options}

    def again(said: str) -> float:
        if spec.id == "mmmu":
            from lmms_eval.tasks.mmmu.utils import parse_open_response

            return mmmu_right(document, parse_open_response(said))
        score_of = _upstream_score(spec.upstream, spec.metric)
        if score_of(document, sample.scored.strip()) != row["score"]:
            return float("nan")  # not the words that upstream has compared with
        return score_of(document, said)

    responses = sample.responses if spec.id == "mmmu" else [(sample.scored, "")]
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
