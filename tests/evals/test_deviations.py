"""Answers are scored as the stock `lmms-eval` command scores them, but for tasks/README.md's list.

Each embedded test set goes twice through a model that says what hypothesis drew: through our
scoring, and through lmms-eval's own loader, task and `simple_evaluate` with the command's own
defaults (reasoning tags among them).
"""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kd_bench.evals.benchmark import REASONING_TAGS, lmms_eval, prepare
from kd_bench.evals.run import answer_keys, ask
from kd_bench.registry import load_task
from tests.evals.test_answers import WRAPPINGS
from tests.evals.test_scoring import Parrot, oracle
from tests.support.eval_world import TEN, write_replicas
from tests.support.stock import stock

THOUGHTS = [
    "<think>Hm, no.</think>{}",
    "<analysis>(C)?</analysis>\n{}",
    "<think>\nyes {}",
    "{}</think>",
]
FILLED = [*WRAPPINGS.values(), *THOUGHTS, "{} or {}", "not {}", "I see {}, then nothing", "{}\n\nB"]
SAID = ["yes", "No", "A", "b.", "(C)", "D. no", "unanswerable", "two", "2", " ", "I cannot say"]
DRAWN = st.lists(st.text(max_size=30), min_size=60, max_size=80)
NOT_STORED = {"\0"}  # no file format of the sample store holds it
RANDOM = "mmmu"  # upstream draws a letter where it finds none: in the table of deviations


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replicas(tmp_path_factory.mktemp("replicas"))


def said(prepared: Any, task: str, drawn: list[str]) -> list[str]:
    """An answer for each document: forms of the right one, usual ones, and what was drawn."""
    right, pool = oracle(task), [*FILLED, *SAID, *drawn]
    texts = [
        pool[document.index % len(pool)].replace("{}", right(document))
        for document in prepared.documents
    ]
    return ["".join(letter for letter in text if letter not in NOT_STORED) for text in texts]


def one_score(logged: dict[str, Any], metrics: tuple[str, ...]) -> float | str:
    """A sample's score by upstream's own record of it; for MMMU's options the letter it read."""
    value = next(logged[name] for name in metrics if name in logged)
    if not isinstance(value, dict):
        return float(value)
    if "parsed_pred" not in value:
        return float(value["score"])
    from lmms_eval.tasks.mmmu.utils import eval_open

    (read,) = value["parsed_pred"]
    return read if isinstance(read, str) else float(eval_open(value["answer"], read))


METRIC = {
    "vqav2": ("exact_match",),
    "gqa": ("exact_match",),
    "scienceqa_img": ("exact_match",),
    "textvqa": ("exact_match",),
    "vizwiz_vqa": ("exact_match",),
    "pope": ("pope_accuracy",),
    "mme": ("mme_perception_score", "mme_cognition_score"),
    "mmmu": ("mmmu_acc",),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", METRIC)
@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=DRAWN)
def test_answers_are_scored_as_the_stock_command_scores_them(task, drawn, replicas, tmp_path):
    prepared = prepare(load_task(task), replicas)
    texts = said(prepared, task, drawn)
    parrot = Parrot(prepared, lambda document: texts[document.index])
    ours = ask(prepared, parrot, answer_keys(prepared, "x"), reasoning_tags=REASONING_TAGS)
    theirs = stock(task, replicas, texts, tmp_path)
    logged = sorted(next(iter(theirs["samples"].values())), key=lambda each: each["doc_id"])
    for text, sample, upstream in zip(texts, ours.samples.to_dict("records"), logged, strict=True):
        score = one_score(upstream, METRIC[task])
        if isinstance(score, str):
            assert sample["parsed"] in ("", score), text
        else:
            assert sample["score"] == pytest.approx(score), text
    numbers = next(iter(theirs["results"].values()))
    for name, value in ours.metrics.items():
        if not name.startswith("kd_bench_") and task != RANDOM:
            assert value == pytest.approx(numbers[f"{name},none"]), name


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mmbench_en", "mmbench_cn"])
@settings(
    max_examples=3,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(drawn=DRAWN)
def test_mmbenchs_letters_are_read_by_upstreams_rules(task, drawn, replicas):
    """Those of its static tasks: the judged ones ask a model where the rules find no letter."""
    lmms_eval()
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    rules = MMBench_Evaluator(sys_prompt="", API_KEY="", API_URL="", model_version="")
    prepared = prepare(load_task(task), replicas)
    texts = said(prepared, task, drawn)
    parrot = Parrot(prepared, lambda document: texts[document.index])
    ours = ask(prepared, parrot, answer_keys(prepared, "x"), reasoning_tags="none")
    for document, sample in zip(prepared.documents, ours.samples.to_dict("records"), strict=True):
        choices = {c: document[c] for c in "ABCDE" if document.get(c) not in (None, "nan")}
        text = texts[document.index]
        found = rules.can_infer(text, dict(choices))
        found = found or extract_mcq_answer(text, choices=sorted(choices))
        assert sample["parsed"] == (found or ""), text


def test_every_benchmark_is_compared():
    assert {*METRIC, "mmbench_en", "mmbench_cn"} == set(TEN)
