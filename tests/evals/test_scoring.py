"""The ten benchmarks through upstream's own scoring: oracles, constants, traps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_bench.evals.benchmark import PreparedTask, prepare
from kd_bench.evals.documents import Document
from kd_bench.evals.run import ScoredTask, answer_keys, ask
from kd_bench.evals.scoring import headline, rates
from kd_bench.registry import load_task
from tests.support.eval_world import TEN, Parrot, oracle, write_replicas


@pytest.fixture(scope="session")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replicas(tmp_path_factory.mktemp("replicas"))


def run(
    task: str, folder: Path, rule: Callable[[Document], str], **options: Any
) -> tuple[PreparedTask, ScoredTask, float]:
    prepared = prepare(load_task(task), folder, **options)
    asked = ask(prepared, Parrot(prepared, rule), answer_keys(prepared, "parrot"))
    assert asked is not None
    return prepared, asked, headline(prepared, asked.samples)


@pytest.mark.parametrize("task", TEN)
@pytest.mark.slow
def test_an_oracle_gets_the_maximum(task: str, replicas: Path) -> None:
    prepared, asked, score = run(task, replicas, oracle(task))
    assert score == pytest.approx(100)
    assert (asked.samples["score"] == 1).all()
    assert rates(asked.samples) == {"unparsed": 0, "empty": 0, "truncated": 0, "error": 0}
    assert len(asked.samples) == len(prepared.documents)
    assert asked.samples["document_id"].is_unique
    assert (asked.samples["question"] != "").all()


def share(prepared: PreparedTask, right: Callable[[Document], bool]) -> float:
    return 100 * sum(map(right, prepared.documents)) / len(prepared.documents)


@pytest.mark.slow
def test_constants_get_what_arithmetic_says(replicas: Path) -> None:
    """Yes to everything, A to everything, a word to everything."""
    _, asked, score = run("mme", replicas, lambda document: "Yes")
    assert score == pytest.approx(25)  # half of acc, none of acc+
    assert asked.metrics["mme_perception_score"] > 0
    _, asked, score = run("pope", replicas, lambda document: "yes")
    assert score == pytest.approx(100 * 2 / 3)  # precision 1/2, recall 1
    assert asked.metrics["pope_accuracy"] == pytest.approx(0.5)
    for task in ("mmbench_en", "mmbench_cn"):
        prepared, asked, score = run(task, replicas, lambda document: "A")
        assert score == 0  # no question keeps its answer at A in every rotation
        assert asked.samples["score"].mean() == pytest.approx(
            share(prepared, lambda document: document["answer"] == "A") / 100
        )
    prepared, _, score = run("scienceqa_img", replicas, lambda document: "B")
    assert score == pytest.approx(share(prepared, lambda document: document["answer"] == 1))
    _, asked, score = run("mmmu", replicas, lambda document: "C")
    read = asked.samples[asked.samples["parsed"] == "C"]
    assert (read["score"] == (read["target"] == "C")).all()
    assert len(read) > 100  # the others have no third option, or none at all
    prepared, _, score = run("gqa", replicas, lambda document: "left")
    assert score == pytest.approx(share(prepared, lambda d: d["answer"] == "left"))
    prepared, _, score = run("vizwiz_vqa", replicas, lambda document: "unanswerable")

    def soft(document: Document) -> float:
        said = document["answers"].count("unanswerable")
        return sum(min(1, (said - (a == "unanswerable")) / 3) for a in document["answers"]) / 10

    assert score == pytest.approx(
        100 * sum(map(soft, prepared.documents)) / len(prepared.documents)
    )


@pytest.mark.parametrize("task", TEN)
def test_nothing_understood_is_unparsed_or_wrong(task: str, replicas: Path) -> None:
    _, asked, _ = run(task, replicas, lambda document: "", limit=24)
    assert rates(asked.samples)["empty"] == 1
    if task == "mmmu":  # upstream draws a letter
        choices = asked.samples[asked.samples["target"].isin(list("ABCDEFGH"))]
        assert (choices["parsed"] == "").all()
    else:
        assert asked.samples["score"].sum() == 0
        assert rates(asked.samples)["unparsed"] == 1


def test_an_unparsable_choice_is_drawn_by_the_document_alone(replicas: Path) -> None:
    first = run("mmmu", replicas, lambda document: "qqq")[1].samples
    half = run("mmmu", replicas, lambda document: "qqq", limit=100)[1].samples
    assert first["score"][: len(half)].tolist() == half["score"].tolist()
    assert 0.1 < first["score"].mean() < 0.5
    assert rates(first)["unparsed"] > 0.9


def test_a_limit_keeps_pairs_and_rotations_whole(replicas: Path) -> None:
    for task, size in (("mme", 2), ("mmbench_en", 4)):
        _, asked, _ = run(task, replicas, oracle(task), limit=15)
        assert 15 <= len(asked.samples) < 15 + size
        assert asked.samples.groupby("unit_id").size().min() >= 2
    assert len(run("pope", replicas, oracle("pope"), limit=15)[1].samples) == 15


def test_units_are_pairs_rotations_and_pictures(replicas: Path) -> None:
    for task, rows in (("mme", 2), ("mmbench_en", 4), ("pope", 6)):
        samples = run(task, replicas, oracle(task))[1].samples
        assert samples.groupby("unit_id").size().max() == rows
    samples = run("gqa", replicas, oracle("gqa"))[1].samples
    assert samples.groupby("image_digest")["unit_id"].nunique().max() == 1


def test_the_fingerprint_follows_data_prompts_and_number(replicas: Path) -> None:
    def fingerprint(**options: Any) -> str:
        return prepare(load_task("gqa"), replicas, **options).fingerprint

    assert fingerprint() == fingerprint()
    assert fingerprint() != fingerprint(limit=40)
    spec = load_task("gqa")
    shorter = spec.model_copy(
        update={"generation": spec.generation.model_copy(update={"max_new_tokens": 8})}
    )
    assert prepare(shorter, replicas).fingerprint != fingerprint()


def test_no_upstream_file_is_left_behind(
    replicas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("mmbench_cn", replicas, oracle("mmbench_cn"), limit=8)
    run("textvqa", replicas, lambda document: "a\x01b", limit=8)  # upstream's writer would raise
    assert list(tmp_path.iterdir()) == []


@given(st.text(alphabet="ab1,.?!-/' \t", max_size=12))
def test_remembered_normalisation_is_upstreams_own(text):
    from kd_bench.evals.benchmark import lmms_eval

    lmms_eval()
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    remembered = EvalAIAnswerProcessor.process_punctuation
    plain = remembered.__wrapped__
    for _ in range(2):
        assert EvalAIAnswerProcessor().process_punctuation(text) == plain(
            EvalAIAnswerProcessor(), text
        )
