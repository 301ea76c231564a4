"""Turn result folders of lmms-eval (`--log_samples --output_path`) into runs, marked imported.

    <time>_results.json      <time>_samples_<task>.jsonl

The log holds no pictures and no rows of the data set. With the data folder beside it, units,
questions and categories are those of a run of our own; without it, a picture's questions count as
independent documents, and the note says so.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_bench.aggregators import aggregate
from kd_bench.errors import IncompleteRunError, UsageError
from kd_bench.evals.scoring import rates
from kd_bench.files import digest_files, digest_text, read_json
from kd_bench.provenance import collect
from kd_bench.records import SAMPLE_COLUMNS, ModelRef, Protocol, Role, TaskResult
from kd_bench.registry import TaskSpec, load_tasks
from kd_bench.stats import score_interval
from kd_bench.store import Run, open_run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["import_results"]

Entry = dict[str, Any]


def import_results(
    path: Path,
    results: Path,
    *,
    name: str | None = None,
    role: Role = "baseline",
    method: str = "",
    seed: int | None = None,
    data: Path | None = None,
) -> list[Run]:
    """Import every `*_results.json` at or below `path`; one run each.

    Args:
        data: folder of the documents, for units and questions.

    Raises:
        UsageError: nothing there, or no sample log of a known benchmark beside it.
        IncompleteRunError: a file is damaged, or samples and aggregate disagree.
    """
    found = [path] if path.is_file() else sorted(path.rglob("*_results.json"))
    # MMBench's own aggregation leaves a file of that name, too.
    files = [file for file in found if file.parent.name != "submissions"]
    if not files:
        raise UsageError(f"{path} holds no *_results.json.", "Give lmms-eval's --output_path.")
    labels: dict[str, Any] = {"name": name, "role": role, "method": method, "seed": seed}
    return [_import_one(file, results, labels, data) for file in files]


def _import_one(file: Path, results: Path, labels: dict[str, Any], data: Path | None) -> Run:
    try:
        outcome = read_json(file)
        config = outcome["config"]
        aggregates = dict(outcome["results"])
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{file} is not lmms-eval's results: {error}."
        raise IncompleteRunError(problem, "Give a *_results.json of lmms-eval.") from None
    logs = _sample_logs(file)
    specs = [spec for spec in load_tasks() if spec.upstream in logs or _cn(spec) in logs]
    if not specs:
        raise UsageError(
            f"{file} has no sample log of a known benchmark beside it.",
            "Run lmms-eval with --log_samples.",
        )
    model = _model(file, config, labels, list(logs.values()))
    protocol = Protocol("imported", limit=config.get("limit"), engine="lmms-eval, imported")
    run = open_run(results, model, protocol, [spec.id for spec in specs])
    with run.locked():
        for spec in specs:
            upstream = spec.upstream if spec.upstream in logs else _cn(spec)
            entries = sorted(_read_log(logs[upstream]), key=lambda entry: int(entry["doc_id"]))
            samples = _samples(spec, entries, data)
            metrics = _metrics(aggregates.get(upstream, {}))
            run.commit(_result(spec, samples, entries, metrics, data), samples)
        versions = {"lmms-eval": str(outcome.get("lmms_eval_version", "unknown"))}
        run.finish(
            "complete",
            notes=[f"imported from {file.name}"],
            provenance=collect() | {"imported": {"file": file.name, "versions": versions}},
        )
    return run


def _cn(spec: TaskSpec) -> str:
    """MMBench EN is usually logged under its judged task; the answers are the same."""
    return {"mmbench_en": "mmbench_en_dev"}.get(spec.id, spec.upstream)


def _sample_logs(file: Path) -> dict[str, Path]:
    stamp = file.name.removesuffix("_results.json")
    found = {}
    for log in sorted(file.parent.glob(f"{stamp}_samples_*.jsonl")):
        found[log.name.removeprefix(f"{stamp}_samples_").removesuffix(".jsonl")] = log
    return found


def _model(file: Path, config: Entry, labels: dict[str, Any], logs: list[Path]) -> ModelRef:
    arguments = str(config.get("model_args") or "")
    pretrained = re.search(r"pretrained=([^,]+)", arguments)
    told = pretrained.group(1).rstrip("/").split("/")[-1] if pretrained else config.get("model")
    return ModelRef(
        name=labels["name"] or str(told or file.parent.name),
        role=labels["role"],
        path=f"lmms-eval {config.get('model', '')} {arguments}".strip(),
        # The weights are not known; the answers stand for them, so that two imports differ.
        weights_digest=digest_files(logs),
        method=labels["method"],
        seed=labels["seed"],
        architecture=str(config.get("model") or ""),
    )


def _read_log(path: Path) -> Iterator[Entry]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entry["doc_id"]
        except (ValueError, KeyError, TypeError):
            problem = f"{path} line {number} is not a logged sample."
            raise IncompleteRunError(problem, "Was the log cut short?") from None
        yield entry


def _answer(entry: Entry) -> str:
    """The model's text, whatever nesting lmms-eval gave it."""
    value = entry.get("filtered_resps", entry.get("resps", ""))
    while isinstance(value, list):
        value = value[0] if value else ""
    return str(value)


def _samples(spec: TaskSpec, entries: list[Entry], data: Path | None) -> "pd.DataFrame":
    """Samples from the log; the documents' own columns where there is a data folder."""
    import pandas as pd

    if data is not None:
        return _samples_with_documents(spec, entries, data)
    rows = []
    for entry in entries:
        answer = _answer(entry)
        row = _ROWS.get(spec.id, _plain)(spec, entry, answer)
        rows.append(
            {
                "document_id": str(entry["doc_id"]),
                "unit_id": str(entry["doc_id"]),
                "category": "",
                "question": str(entry.get("input", "")),
                "answer": answer,
                "status": "ok" if answer.strip() else "empty",
                "image_digest": "",
                "answer_confidence": float("nan"),
                **row,
            }
        )
    return pd.DataFrame(rows, columns=list(SAMPLE_COLUMNS))


def _samples_with_documents(spec: TaskSpec, entries: list[Entry], data: Path) -> "pd.DataFrame":
    """Score the logged answers again, on the documents themselves."""
    from kd_bench.evals.questions import Answer
    from kd_bench.evals.scoring import samples_frame
    from kd_bench.evals.tasks import prepare

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
    return samples_frame(prepared, answers)


def _plain(spec: TaskSpec, entry: Entry, answer: str) -> Entry:
    return {
        "target": str(entry.get("target", "")),
        "parsed": answer.strip().lower(),
        "score": float(entry[spec.metric]),
    }


def _mme(spec: TaskSpec, entry: Entry, answer: str) -> Entry:
    (logged,) = [value for key, value in entry.items() if key.startswith("mme_")]
    from lmms_eval.tasks.mme.utils import parse_pred_ans

    said = parse_pred_ans(answer)
    return {
        "unit_id": f"{logged['category']}/{logged['question_id']}",
        "category": logged["category"],
        "target": str(entry.get("target", "")).lower(),
        "parsed": said if said in ("yes", "no") else "",
        "score": float(logged["score"]),
    }


def _pope(spec: TaskSpec, entry: Entry, answer: str) -> Entry:
    logged = entry["pope_accuracy"]
    said = logged["prediction"]
    return {
        "target": logged["ground_truth"],
        "parsed": said if said in ("yes", "no") else "",
        "score": float(logged["score"]),
    }


def _mmbench(spec: TaskSpec, entry: Entry, answer: str) -> Entry:
    from kd_bench.evals.scoring import mmbench_letter

    logged = entry["gpt_eval_score"]
    said = mmbench_letter(logged)
    return {
        "document_id": str(logged["index"]),
        "unit_id": str(int(logged["index"]) % 1_000_000),
        "category": str(logged["category"]),
        "target": str(logged["answer"]),
        "parsed": said,
        "score": float(bool(said) and said == logged["answer"]),
    }


def _mmmu(spec: TaskSpec, entry: Entry, answer: str) -> Entry:
    from kd_bench.evals.scoring import mmmu_right

    logged = entry["mmmu_acc"]
    said = logged["parsed_pred"][0]
    return {
        "document_id": logged["id"],
        "category": logged["subdomain"],
        "target": str(logged["answer"]),
        # Whether upstream read or drew this letter is not in the log.
        "parsed": said if isinstance(said, str) else answer.strip().lower(),
        "score": mmmu_right(logged, said),
    }


_ROWS = {
    "mme": _mme,
    "mmbench_en": _mmbench,
    "mmbench_cn": _mmbench,
    "mmmu": _mmmu,
    "pope": _pope,
}


def _metrics(aggregates: Entry) -> dict[str, float]:
    found = {}
    for key, value in aggregates.items():
        name, _, filtered = key.partition(",")
        if filtered and "_stderr" not in name and isinstance(value, int | float):
            found[name] = float(value)
    return found


def _result(
    spec: TaskSpec,
    samples: "pd.DataFrame",
    entries: list[Entry],
    metrics: dict[str, float],
    data: Path | None,
) -> TaskResult:
    notes = ["imported"]
    if data is None and spec.unit == "picture":
        notes.append("a picture's questions are counted as independent: the interval is too short")
    prompts = [str(entry.get("input", "")) for entry in entries]
    return TaskResult(
        task=spec.id,
        # Prompts and their number are known, data and settings are not: equal only to itself.
        fingerprint=digest_text("imported", spec.id, *prompts),
        metric=spec.metric,
        score=aggregate(spec.aggregator, samples),
        metrics=metrics,
        documents=len(samples),
        units=int(samples["unit_id"].nunique()),
        rates=rates(samples),
        interval=score_interval(spec.aggregator, samples),
        profile="imported",
        notes=notes,
        settings={"aggregator": spec.aggregator, "engine": "lmms-eval, imported"},
    )
