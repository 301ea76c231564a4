"""From upstream's scoring of a document to a stored sample.

Scores come from upstream's `process_results`, and where that gives none for a row (MMBench, MMMU)
from upstream's own judging functions. What is ours: ids, units, targets and the parsed answer.
"""

import ast
import re
import string
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kd_bench.aggregators import MME_PERCEPTION, aggregate, by_content
from kd_bench.errors import IncompleteRunError
from kd_bench.evals.content import Thinking, read_choice, read_short, read_yes_no
from kd_bench.evals.documents import Document
from kd_bench.evals.questions import Answer
from kd_bench.evals.tasks import PreparedTask, unit_ids
from kd_bench.records import CONTENT_COLUMNS, SAMPLE_COLUMNS

if TYPE_CHECKING:
    import pandas as pd


# A row's score, its target and the answer as the scorer understood it ("" when it could not).
Judged = tuple[float, str, str]


NO_THINKING = Thinking("none")


def samples_frame(
    prepared: PreparedTask,
    answers: dict[int, Answer],
    thinking: Thinking = NO_THINKING,
    count_tokens: Callable[[str], int] | None = None,
) -> "pd.DataFrame":
    """One row a document, in document order.

    Columns are `records.SAMPLE_COLUMNS` and `records.CONTENT_COLUMNS`.

    Args:
        thinking: the raw answer is stored; what is scored is the answer without its thoughts.
        count_tokens: of a text; None takes a thought's share of the characters.
    """
    import pandas as pd

    judge = _judge(prepared)
    spec = prepared.spec
    units = unit_ids(spec, prepared.documents)
    seen: Counter[str] = Counter()
    rows = []
    for document in prepared.documents:
        answer = answers[document.index]
        text = thinking.answer(answer.text)
        score, target, parsed = judge(document, text)
        said, content = _content(prepared, document, text, target, float(score))
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
                _status(answer, thinking),
                answer.image_digest,
                float("nan") if answer.confidence is None else answer.confidence,
                said,
                0.0 if answer.status == "error" else content,
                answer.tokens,
                _thinking_tokens(answer, thinking, count_tokens),
            )
        )
    return pd.DataFrame(rows, columns=[*SAMPLE_COLUMNS, *CONTENT_COLUMNS])


def _status(answer: Answer, thinking: Thinking) -> str:
    """A thought that never ends was cut off, whatever the last token was."""
    return "truncated" if thinking.is_unfinished(answer.text) else answer.status


def _thinking_tokens(
    answer: Answer, thinking: Thinking, count_tokens: Callable[[str], int] | None
) -> int:
    thought = thinking.thought(answer.text)
    if not thought:
        return 0
    if count_tokens is not None:
        return min(count_tokens(thought), answer.tokens)
    return round(answer.tokens * len(thought) / len(answer.text))


def rates(samples: "pd.DataFrame") -> dict[str, float]:
    """Shares of answers that were not understood, empty, cut off, or failed."""
    if samples.empty:
        return dict.fromkeys(("unparsed", "empty", "truncated", "error"), 0.0)
    result = {"unparsed": float((samples["parsed"] == "").mean())}
    for status in ("empty", "truncated", "error"):
        result[status] = float((samples["status"] == status).mean())
    return result


def headline(prepared: PreparedTask, samples: "pd.DataFrame") -> float:
    """The score on the papers' 0-100 scale; NaN for a profile that only writes a submission."""
    return aggregate(prepared.aggregator, samples) if prepared.variant.scored else float("nan")


def rescored(
    prepared: PreparedTask, samples: "pd.DataFrame", thinking: Thinking = NO_THINKING
) -> "pd.DataFrame":
    """The samples under a profile's own rule over the answers without their thoughts."""
    rule = prepared.variant.rescore
    if rule is None:
        return samples
    result = samples.copy()
    result["parsed"] = [RULES[rule](thinking.answer(answer)) for answer in samples["answer"]]
    result["score"] = (result["parsed"] == result["target"]).astype(float)
    result.loc[result["status"] == "error", "score"] = 0.0
    return result


def own_metrics(
    prepared: PreparedTask, samples: "pd.DataFrame", thinking: Thinking = NO_THINKING
) -> dict[str, float]:
    """Numbers beside upstream's, on the scale 0-1, under names that say whose they are."""
    if not prepared.variant.scored:
        return {}
    found = {CONTENT_SCORE: aggregate(prepared.aggregator, by_content(samples)) / 100}
    if prepared.spec.id == "mmmu":
        found["kd_bench_mmmu_acc_strict"] = aggregate("strict", samples) / 100
    if prepared.spec.id == "pope":
        said = [thinking.answer(answer) for answer in samples["answer"]]
        bare = samples.assign(parsed=[_bare_word(answer) for answer in said])
        first = samples.assign(parsed=[_pope_llava(answer) for answer in said])
        found["kd_bench_pope_f1_normalised"] = aggregate("f1", bare) / 100
        found["kd_bench_pope_f1_llava"] = aggregate("f1_mean", first) / 100
    return found


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


CONTENT_SCORE = "kd_bench_content"
"""The metric whose difference from the score is the form gap."""

OWN_WORDS = re.compile(r"[\w' -]+")


def _content(
    prepared: PreparedTask, document: Document, text: str, target: str, score: float
) -> tuple[str, float]:
    """What an answer says whatever its form, and what that is worth."""
    spec = prepared.spec
    if not prepared.variant.scored:
        return "", float("nan")
    if spec.answer == "yes_no":
        said = read_yes_no(text).said
        return said, float(bool(said) and said == target.strip().lower())
    options = _options(spec.id, document) if spec.answer == "letter" else {}
    if options:
        said = read_choice(text, options).said
        return said, float(bool(said) and said == target.strip().upper())
    said = read_short(text).said
    if said == text.strip() or (said.lower() == text.strip().lower() and OWN_WORDS.fullmatch(said)):
        return said, score  # nothing to take off: upstream has scored these very words
    return said, prepared.task.score_of(document, said, spec.metric)


def _options(task: str, document: Document) -> dict[str, str]:
    """Text of each option by its letter; nothing where the answer is open."""
    if task.startswith("mmbench"):
        named = {letter: document.get(letter) for letter in "ABCDE"}
        return {
            letter: str(text)
            for letter, text in named.items()
            if text is not None and str(text) not in ("", "nan")
        }
    choices = document.get("choices")
    if task == "mmmu":
        if document["question_type"] != "multiple-choice":
            return {}
        choices = ast.literal_eval(str(document["options"]))
    return dict(zip(string.ascii_uppercase, map(str, choices or ()), strict=False))


RULES: dict[str, Callable[[str], str]] = {"pope_llava": _pope_llava}


def agree(prepared: PreparedTask, samples: "pd.DataFrame", upstream: dict[str, float]) -> None:
    """Check that the stored samples give upstream's own number again.

    Raises:
        IncompleteRunError: they do not; the result must not be stored.
    """
    spec = prepared.spec
    if not prepared.variant.scored or spec.metric not in upstream:  # MME cut to cognition
        return
    expected = upstream[spec.metric] * spec.scale
    if spec.aggregator == "mme":
        # Upstream sums the present categories; the papers' scale is that of ten.
        present = samples["category"][samples["category"].isin(MME_PERCEPTION)].nunique()
        expected *= len(MME_PERCEPTION) / max(1, present)
    ours = aggregate(spec.aggregator, samples)
    tolerance = 1e-3 if spec.id == "mmmu" else 1e-6  # MMMU's is rounded to five digits
    if not abs(ours - expected) <= tolerance:
        raise IncompleteRunError(
            f"{spec.id}: the stored samples give {ours:.6f}, lmms-eval says {expected:.6f}.",
            "This is a bug in kd-bench or a change in lmms-eval; please report it.",
        )


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


def _judge(prepared: PreparedTask) -> Callable[[Document, str], Judged]:
    """How a row of this benchmark is read; unknown benchmarks use their headline metric."""
    special = _JUDGES.get(prepared.spec.id)
    if not prepared.variant.scored:
        special = _unscored

    def judge(document: Document, answer: str) -> Judged:
        if document.index not in prepared.task.recorded:  # scored by another process
            prepared.task.process_results(document, [answer])
        metrics = prepared.task.recorded[document.index]
        if special is None:
            target = prepared.task.doc_to_target(document)
            return float(metrics[prepared.spec.metric]), str(target), answer.strip().lower()
        judged = special(document, answer, metrics)
        if document.index in prepared.task.guessed:
            return judged[0], judged[1], ""
        return judged

    return judge


def _mme(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
    from lmms_eval.tasks.mme.utils import parse_pred_ans

    (entry,) = metrics.values()
    said = parse_pred_ans(answer)
    target = document["answer"].lower().strip().replace(".", "")
    return entry["score"], target, said if said in ("yes", "no") else ""


def _pope(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
    entry = metrics["pope_accuracy"]
    said = entry["prediction"]
    return entry["score"], entry["ground_truth"], said if said in ("yes", "no") else ""


def _mmbench(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
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


def _scienceqa(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
    letters = string.ascii_uppercase[: len(document["choices"])]
    found = re.fullmatch(r"([A-Za-z])|([A-Z])\..*", answer.strip(), re.DOTALL)
    said = (found.group(1) or found.group(2)).upper() if found else ""
    target = letters[int(document["answer"])]
    return metrics["exact_match"], target, said if said in letters else ""


def _mmmu(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
    entry = metrics["mmmu_acc"]
    (said,) = entry["parsed_pred"]
    letter = str(said) if isinstance(said, str) else answer.strip().lower()
    return mmmu_right(entry, said), str(entry["answer"]), letter


def mmmu_right(logged: dict[str, Any], said: Any) -> float:
    """Whether a parsed answer is right, by upstream's functions."""
    from lmms_eval.tasks.mmmu.utils import eval_multi_choice, eval_open

    choice = logged["question_type"] == "multiple-choice"
    return float((eval_multi_choice if choice else eval_open)(logged["answer"], said))


def _gqa(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
    strip = str.maketrans("", "", string.punctuation)
    said = answer.strip().lower().translate(strip)
    return float(metrics["exact_match"]), str(document["answer"]), said


def _unscored(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
    return float("nan"), "", str(metrics["submission"]["answer"])


def _soft(document: Document, answer: str, metrics: dict[str, Any]) -> Judged:
    """Ten annotators: the target is what most of them said."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    given = document["answers"] or []
    texts = [entry["answer"] if isinstance(entry, dict) else entry for entry in given]
    target = Counter(texts).most_common(1)[0][0] if texts else ""
    return float(metrics["exact_match"]), str(target), str(EvalAIAnswerProcessor()(answer))


_JUDGES: dict[str, Callable[[Document, str, dict[str, Any]], Judged]] = {
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
