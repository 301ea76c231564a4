"""From upstream's scoring of a document to a stored sample.

Scores come from upstream's `process_results`, and where that gives none for a row (MMBench, MMMU)
from upstream's own judging functions. What is ours: ids, units, targets and the parsed answer.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from kd_bench.aggregators import MME_PERCEPTION, aggregate, by_content
from kd_bench.errors import IncompleteRunError
from kd_bench.evals.benchmark import Answer, PreparedTask, mmmu_right, unit_ids
from kd_bench.evals.content import CONTENT_SCORE, Thinking, content_of
from kd_bench.evals.documents import Document
from kd_bench.records import AMBIGUOUS, CONTENT_COLUMNS, SAMPLE_COLUMNS
from kd_bench.registry import TaskSpec

if TYPE_CHECKING:
    import pandas as pd


# A row's score, its target and the answer as the scorer understood it ("" when it could not).
Judged = tuple[float, str, str]
Row = Mapping[str, Any]


def score(
    prepared: PreparedTask,
    answers: dict[int, Answer],
    upstream: dict[str, float],
    thinking: Thinking,
    count_tokens: Callable[[str], int] | None = None,
) -> "tuple[pd.DataFrame, dict[str, float]]":
    """Samples as they are stored, and upstream's metrics with ours beside them, on the scale 0-1.

    A profile's own rule reads the answers without their thoughts.

    Raises:
        IncompleteRunError: samples and upstream disagree.
    """
    samples = samples_frame(prepared, answers, thinking, count_tokens)
    spec, variant = prepared.spec, prepared.variant
    if not variant.scored:
        return samples, upstream
    if spec.metric in upstream:  # MME may be cut to cognition
        ours, theirs = aggregate(spec.aggregator, samples), points_of(spec, samples, upstream)
        tolerance = 1e-3 if spec.id == "mmmu" else 1e-6  # MMMU's is rounded to five digits
        if not abs(ours - theirs) <= tolerance:
            raise IncompleteRunError(
                f"{spec.id}: the stored samples give {ours:.6f}, lmms-eval says {theirs:.6f}.",
                "This is a bug in kd-bench or a change in lmms-eval; please report it.",
            )
    metrics = {**upstream, CONTENT_SCORE: aggregate(prepared.aggregator, by_content(samples)) / 100}
    if spec.id == "mmmu":
        metrics["kd_bench_mmmu_acc_strict"] = aggregate("strict", samples) / 100
    said = [thinking.answer(answer) for answer in samples["answer"]]
    if spec.id == "pope":
        bare = samples.assign(parsed=[_bare_word(answer) for answer in said])
        first = samples.assign(parsed=[_pope_llava(answer) for answer in said])
        metrics["kd_bench_pope_f1_normalised"] = aggregate("f1", bare) / 100
        metrics["kd_bench_pope_f1_llava"] = aggregate("f1_mean", first) / 100
    if variant.rescore is not None:
        samples["parsed"] = [RULES[variant.rescore](answer) for answer in said]
        samples["score"] = (samples["parsed"] == samples["target"]).astype(float)
        samples.loc[samples["status"] == "error", "score"] = 0.0
    return samples, metrics


def samples_frame(
    prepared: PreparedTask,
    answers: dict[int, Answer],
    thinking: Thinking,
    count_tokens: Callable[[str], int] | None = None,
    *,
    bare: Thinking | None = None,
) -> "pd.DataFrame":
    """One row a document, in document order.

    Columns are `records.SAMPLE_COLUMNS` and `records.CONTENT_COLUMNS`.

    Args:
        thinking: the raw answer is stored; what is scored is the answer without its thoughts.
        count_tokens: of a text; None takes a thought's share of the characters.
        bare: thoughts that are scored, and yet no part of what an answer says.
    """
    import pandas as pd

    spec, bare = prepared.spec, bare or thinking
    units = unit_ids(spec, prepared.documents)
    seen: Counter[str] = Counter()
    rows = []
    for document in prepared.documents:
        answer = answers[document.index]
        text = thinking.answer(answer.text)
        score, target, parsed = _judged(prepared, document, text)
        again = partial(prepared.task.score_of, document, metric=spec.metric)
        said, content = "", float("nan")
        if prepared.variant.scored:
            saying = bare.answer(text)
            worth = float(score) if saying == text else None
            said, content = content_of(spec, document, saying, target, worth, again)
        rows.append(
            (
                _document_id(prepared, document, seen),
                units[document.index],
                _category(prepared, document),
                str(document["question"]),
                target,
                answer.text,
                parsed,
                float(score),
                # A thought that never ends was cut off, whatever the last token was.
                "truncated" if thinking.is_unfinished(answer.text) else answer.status,
                answer.image_digest,
                float("nan") if answer.confidence is None else answer.confidence,
                said,
                0.0 if answer.status == "error" else content,
                answer.tokens,
                _thinking_tokens(answer, thinking, count_tokens),
            )
        )
    return pd.DataFrame(rows, columns=[*SAMPLE_COLUMNS, *CONTENT_COLUMNS])


def _thinking_tokens(
    answer: Answer, thinking: Thinking, count_tokens: Callable[[str], int] | None
) -> int:
    thought = thinking.thought(answer.text)
    if count_tokens is None or not thought:
        return thinking.share(answer.text, answer.tokens)
    return min(count_tokens(thought), answer.tokens)


def rates(samples: "pd.DataFrame") -> dict[str, float]:
    """Shares of answers that were not understood, empty, cut off, or failed.

    Also of those that can be read in two ways, where there are any.
    """
    if samples.empty:
        return dict.fromkeys(("unparsed", "empty", "truncated", "error"), 0.0)
    result = {"unparsed": float((samples["parsed"] == "").mean())}
    for status in ("empty", "truncated", "error"):
        result[status] = float((samples["status"] == status).mean())
    if (ambiguous := float((samples["content"] == AMBIGUOUS).mean())) > 0:
        result["ambiguous"] = ambiguous
    return result


def tokens(samples: "pd.DataFrame") -> dict[str, float]:
    """Generated tokens an answer, of its thought and of the rest; empty if none were counted."""
    every, thinking = (float(samples[name].mean()) for name in ("tokens", "thinking_tokens"))
    return {"answer": every - thinking, "thinking": thinking} if every > 0 else {}


def headline(prepared: PreparedTask, samples: "pd.DataFrame") -> float:
    """The score on the papers' 0-100 scale; NaN for a profile that only writes a submission."""
    return aggregate(prepared.aggregator, samples) if prepared.variant.scored else float("nan")


def submission(prepared: PreparedTask) -> list[dict[str, Any]]:
    """What the evaluation server wants, one entry a document, in document order."""
    recorded = prepared.task.recorded
    entries = [dict(recorded[index]["submission"]) for index in sorted(recorded)]
    for entry in entries:
        if str(entry.get("image", "")).endswith(".jpg.jpg"):
            # Upstream adds the ending to VizWiz ids; some copies of the data have it already.
            entry["image"] = entry["image"].removesuffix(".jpg")
    return entries


def _bare_word(answer: str) -> str:
    """yes or no behind any case and punctuation, when the answer begins with it."""
    words = re.findall(r"[a-z]+", answer.lower())
    return words[0] if words and words[0] in ("yes", "no") else ""


def _pope_llava(answer: str) -> str:
    """LLaVA's eval_pope.py: the first sentence without commas; no, not or No say no, else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if any(word in ("No", "not", "no") for word in words) else "yes"


RULES: dict[str, Callable[[str], str]] = {"pope_llava": _pope_llava}


def points_of(spec: TaskSpec, samples: "pd.DataFrame", upstream: dict[str, float]) -> float:
    """Upstream's headline number on the papers' 0-100 scale."""
    points = upstream[spec.metric] * spec.scale
    if spec.aggregator == "mme":
        # Upstream sums the present categories; the papers' scale is that of ten.
        present = samples["category"][samples["category"].isin(MME_PERCEPTION)].nunique()
        points *= len(MME_PERCEPTION) / max(1, present)
    return points


def _document_id(prepared: PreparedTask, document: Document, seen: Counter[str]) -> str:
    columns = prepared.spec.id_columns
    name = "/".join(str(document.get(column, "")) for column in columns) if columns else ""
    if not name.strip("/"):
        return str(document.index)
    seen[name] += 1
    return name if seen[name] == 1 else f"{name}#{seen[name]}"


def _category(prepared: PreparedTask, document: Document) -> str:
    if prepared.spec.id == "mmmu":
        from lmms_eval.tasks.mmmu.utils import extract_subset_name

        return str(extract_subset_name(document["id"]))
    column = prepared.spec.category_column
    return str(document.get(column, "") or "") if column else ""


def _judged(prepared: PreparedTask, document: Document, answer: str) -> Judged:
    """How a row of this benchmark is read; unknown benchmarks use their headline metric."""
    spec, task = prepared.spec, prepared.task
    if document.index not in task.recorded:  # scored by another process
        task.process_results(document, [answer])
    metrics = task.recorded[document.index]
    judge = JUDGES.get(spec.id) if prepared.variant.scored else _unscored
    if judge is None:
        target = str(task.doc_to_target(document))
        return float(metrics[spec.metric]), target, answer.strip().lower()
    score, target, parsed = judge(document, answer, metrics)
    return score, target, "" if document.index in task.guessed else parsed


def _mme(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    from lmms_eval.tasks.mme.utils import parse_pred_ans

    entry = next(value for name, value in metrics.items() if name.startswith("mme_"))
    said = parse_pred_ans(answer)
    target = document["answer"].lower().strip().replace(".", "")
    return entry["score"], target, said if said in ("yes", "no") else ""


def _pope(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    entry = metrics["pope_accuracy"]
    said = entry["prediction"]
    return entry["score"], entry["ground_truth"], said if said in ("yes", "no") else ""


def _mmbench(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    said = mmbench_letter(metrics["gpt_eval_score"])
    target = str(document["answer"])
    return float(bool(said) and said == target), target, said


def mmbench_letter(logged: dict[str, Any]) -> str:
    """One rotation, read as MMBench_Evaluator.eval_sub_data reads it with `static_only`."""
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    item = {**logged, "prediction": str(logged["prediction"])}
    said = mmbench_evaluator.prefetch_answer(item)
    if not said:
        letters = sorted(mmbench_evaluator.build_choices(item))
        said = extract_mcq_answer(item["prediction"], choices=letters)
    return str(said or "")


def _scienceqa(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    letters = string.ascii_uppercase[: len(document["choices"])]
    found = re.fullmatch(r"([A-Za-z])|([A-Z])\..*", answer.strip(), re.DOTALL)
    said = (found.group(1) or found.group(2)).upper() if found else ""
    target = letters[int(document["answer"])]
    return metrics["exact_match"], target, said if said in letters else ""


def _mmmu(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    entry = metrics["mmmu_acc"]
    (said,) = entry["parsed_pred"]
    letter = str(said) if isinstance(said, str) else answer.strip().lower()
    return mmmu_right(entry, said), str(entry["answer"]), letter


def _gqa(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    strip = str.maketrans("", "", string.punctuation)
    said = answer.strip().lower().translate(strip)
    return float(metrics["exact_match"]), str(document["answer"]), said


def _unscored(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    return float("nan"), "", str(metrics["submission"]["answer"])


def _soft(document: Row, answer: str, metrics: dict[str, Any]) -> Judged:
    """Ten annotators: the target is what most of them said."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    given = document["answers"] or []
    texts = [entry["answer"] if isinstance(entry, dict) else entry for entry in given]
    target = Counter(texts).most_common(1)[0][0] if texts else ""
    return float(metrics["exact_match"]), str(target), str(EvalAIAnswerProcessor()(answer))


JUDGES: dict[str, Callable[[Row, str, dict[str, Any]], Judged]] = {
    "mme": _mme,
    "mmbench_en": _mmbench,
    "mmbench_cn": _mmbench,
    "vqav2": _soft,
    "gqa": _gqa,
    "scienceqa_img": _scienceqa,
    "mmmu": _mmmu,
    "textvqa": _soft,
    "vizwiz_vqa": _soft,
    "pope": _pope,
}
