"""Simulated annotators: how often they err, how plausibly, and that the truth stays known."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("PIL")

from kd_bench.world import scenes
from kd_bench.world.benchmarks import oracle_answer
from kd_bench.world.build import (
    ERROR,
    STUDY_ERRORS,
    labelled_conversations,
    rows,
    write_conversations,
)
from kd_bench.world.questions import labelled, mistake, ten_answers

OPTIONS = "What color is the cross?\nA. red\nB. blue\nC. green\nAnswer."


@pytest.mark.parametrize(
    "said, truth, plausible",
    [
        ("What color is the cross?", "red", {"yellow", "blue"}),
        ("What size is it?", "large", {"small"}),
        ("How many?", "2", {"1", "3"}),
        ("How many?", "0", {"1"}),
        ("Is it?", "yes", {"no"}),
        ("Where is it?", "top left", {"top right", "bottom left"}),
        ("圆形在哪里?", "左上", {"右上", "左下"}),
        ("图中有什么?", "红色", {"黄色", "蓝色"}),
        (OPTIONS, "A", {"B", "C"}),
        ("What is the word on the sign?", "bank", {"taxi", "cake"}),
        ("What is it called?", "Otto", {"Max", "Boris"}),
    ],
)
def test_a_mistake_is_a_near_one(said: str, truth: str, plausible: set[str]) -> None:
    rng = Random(0)
    assert {mistake(said, truth, rng) for _ in range(200)} == plausible


def test_a_misread_number_differs_in_one_digit() -> None:
    rng = Random(0)
    for _ in range(200):
        wrong = mistake("What is the number on the sign?", "47", rng)
        assert sum(a != b for a, b in zip(wrong, "47", strict=True)) == 1
        assert wrong[0] != "0"


def test_a_photograph_that_shows_nothing_is_guessed_and_others_are_given_up() -> None:
    rng = Random(0)
    said = "What shape is blue?\nWhen it is insufficient, respond with 'Unanswerable'."
    assert mistake(said, "unanswerable", rng) in {
        *scenes.COLOURS,
        *scenes.SHAPES,
        *scenes.SIGN_WORDS,
    }
    found = Counter(mistake(said, "circle", rng) for _ in range(600))
    assert 140 < found["unanswerable"] < 260


def test_a_description_gets_one_word_wrong() -> None:
    truth = "night: top left small red circle, bottom right sign bank."
    wrong = mistake("Describe the image.", truth, Random(3))
    assert wrong != truth
    assert len(wrong.split()) == len(truth.split())


@pytest.mark.parametrize("error", STUDY_ERRORS)
def test_the_stated_share_of_answers_is_wrong(error: float) -> None:
    items = labelled_conversations(error, count=600)
    pairs = [(truth[1], label[1]) for (_, turns), labels in items
             for truth, label in zip(turns, labels, strict=True)]  # fmt: skip
    share = sum(truth != label for truth, label in pairs) / len(pairs)
    assert share == pytest.approx(error, abs=0.025)  # three standard errors of 2,700 answers


def test_a_careful_annotators_mistakes_are_among_a_careless_ones() -> None:
    few, many = (labelled_conversations(error, count=200) for error in (0.1, 0.4))
    for ((_, truth), careful), (_, careless) in zip(few, many, strict=True):
        for known, one, other in zip(truth, careful, careless, strict=True):
            assert one in (known, other)


def test_every_mistake_is_a_mistake() -> None:
    for (_, truth), labels in labelled_conversations(1.0, count=600):
        assert all(known != label for known, label in zip(truth, labels, strict=True))


def test_ten_annotators_disagree_and_the_truth_stays_theirs() -> None:
    rng = Random(0)
    counts = [ten_answers("How many?", "2", 0.3, rng).count("2") for _ in range(400)]
    assert set(counts) == {6, 7, 8, 9, 10}
    assert sum(counts) / len(counts) == pytest.approx(6 + 4 * 0.7, abs=0.15)


@pytest.mark.parametrize("benchmark", ["vqav2", "textvqa", "vizwiz_vqa"])
def test_the_test_sets_truth_is_clean(benchmark: str) -> None:
    for row in rows(benchmark, "test"):
        given = [a["answer"] if isinstance(a, dict) else a for a in row["answers"]]
        assert len(given) == 10
        assert given.count(oracle_answer(benchmark, row)) >= 6


def test_the_truth_is_written_beside_the_labels(tmp_path: Path) -> None:
    items = labelled_conversations(ERROR, count=40)
    write_conversations(tmp_path, items)
    written = json.loads((tmp_path / "conversations.json").read_text(encoding="utf-8"))
    assert any("truth" in row for row in written)
    for row, ((_, truth), labels) in zip(written, items, strict=True):
        said = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        assert said == [answer for _, answer in labels]
        assert row.get("truth", said) == [answer for _, answer in truth]


def test_no_errors_are_the_truth() -> None:
    turns = [("How many?", "2"), ("Is it?", "yes")]
    assert labelled(turns, 0.0, Random(0)) == turns
