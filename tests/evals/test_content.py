"""What an answer says: agreement with hand labels, none of them read as another answer."""

import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd_bench.evals.content import content_of, read_choice, read_short, read_yes_no
from kd_bench.records import AMBIGUOUS
from kd_bench.registry import load_task

LABELLED = Path(__file__).parents[1] / "data" / "answers_labelled.tsv"
OPTIONS = {
    "colours": ("red", "blue", "green", "yellow"),
    "people": ("A pretty girl", "An old man", "A dog", "Two cats"),
    "farben": ("红色", "蓝色", "绿色", "黄色"),
    "tiere": ("一只猫", "两只狗", "一个人", "没有动物"),
    "numbers": ("12", "24", "36", "48"),
    "cities": ("Paris", "London", "Rome"),
    "yesno": ("yes", "no"),
    "places": ("left", "right", "above", "below"),
    "animals": ("cat", "dog", "a cat and a dog", "bird"),
    "counts": ("1", "2", "12", "-2"),
    "lengths": ("3 cm", "30 cm", "3.5 cm", "-3 cm"),
    "formulas": ("x = 2", "x = -2", "x > 2"),
    "both": ("red", "blue", "both A and B"),
    "moods": ("happy", "unhappy", "not happy"),
}


def labelled():
    rows = []
    for line in LABELLED.read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#"):
            options, kind, label, answer = line.split("\t")
            label = "" if label == "?" else label
            rows.append((options, kind, label, answer.replace("\\n", "\n")))
    return rows


def read(options, kind, answer):
    if kind == "yesno":
        return read_yes_no(answer)
    if kind == "short":
        return read_short(answer).lower()
    return read_choice(answer, dict(zip("ABCDEFG", OPTIONS[options], strict=False)))


def test_the_readings_agree_with_the_labels_and_none_is_another_answer():
    rows = labelled()
    read_as = [read(options, kind, answer) for options, kind, _, answer in rows]
    others = [
        (answer, found)
        for (_, kind, label, answer), found in zip(rows, read_as, strict=True)
        if found != label and (found and kind != "short")
    ]
    assert others == []  # what is not understood is empty, never another answer
    agreed = sum(found == label for found, (_, _, label, _) in zip(read_as, rows, strict=True))
    assert agreed >= 0.99 * len(rows)


@given(st.text(max_size=60), st.sampled_from(sorted(OPTIONS)))
@pytest.mark.slow
def test_any_text_is_read_or_not_understood(text, options):
    letters = dict(zip("ABCDEFG", OPTIONS[options], strict=False))
    assert read_choice(text, letters) in {"", *letters}
    assert read_yes_no(text) in {"", "yes", "no"}
    read_short(text)


WRAPPINGS = [
    "{}",
    "{}.",
    "({})",
    "**{}**",
    "Answer: {}",
    "The answer is {}.",
    "\\boxed{{{}}}",
    "{}。",
]


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("options", sorted(OPTIONS))
def test_every_option_is_read_in_every_wrapping(wrapping, options):
    letters = dict(zip("ABCDEFG", OPTIONS[options], strict=False))
    for letter in letters:
        assert read_choice(wrapping.format(letter), letters) == letter
    for said in ("yes", "No", "YES"):
        assert read_yes_no(wrapping.format(said)) == said.lower()
    for said in ("red", "10:30", "new york", "3"):
        assert read_short(wrapping.format(said)) == said


TWICE = ("yes or no", "Yes. No.", "No, yes", "Yes\nNo", "Yes. The answer is no.",
         "The answer is yes. The answer is no.", "Answer: yes/no", "有，没有")  # fmt: skip
SEVERAL = ("A or B", "A, B", "(A) (B)", "The answer is A. The answer is B.",
           "A. blue", "I choose A or B")  # fmt: skip


@pytest.mark.parametrize("answer", TWICE)
def test_an_answer_that_is_yes_and_no_is_neither_and_counted(answer):
    assert read_yes_no(answer) == ""
    spec = load_task("pope")
    for target in ("yes", "no"):
        assert content_of(spec, {}, answer, target, 1.0, float) == (AMBIGUOUS, 0.0)


@pytest.mark.parametrize("answer", SEVERAL)
def test_an_answer_that_names_two_options_is_none_and_counted(answer):
    assert read_choice(answer, {"A": "red", "B": "blue"}) == ""
    document = {"A": "red", "B": "blue"}
    for target in "AB":
        found = content_of(load_task("mmbench_en"), document, answer, target, 1.0, float)
        assert found == (AMBIGUOUS, 0.0)


def test_a_model_in_a_loop_is_read_in_time():
    started = time.perf_counter()
    assert read_choice("The answer is B. " * 1000, {"A": "red", "B": "blue"}) == "B"
    assert read_short("The answer is red. " * 1000) == "red"
    assert time.perf_counter() - started < 5  # was 46 seconds


OPEN = ("red or blue", "The answer is red or blue.", "The answer is red. Answer: blue")


@pytest.mark.parametrize("answer", OPEN)
@pytest.mark.parametrize("task", ["vqav2", "mmmu"])
def test_an_open_answer_that_says_two_things_is_wrong_and_counted(answer, task):
    document = {"question_type": "open", "options": "[]"}  # MMMU's parser takes any part of it
    found = content_of(load_task(task), document, answer, "red", None, lambda said: 1.0)
    assert found == (AMBIGUOUS, 0.0)


def test_a_score_that_is_not_known_is_not_zero():
    nan = float("nan")
    said, worth = content_of(load_task("vqav2"), {}, "It is red.", "red", 0.0, lambda said: nan)
    assert said == "red"
    assert math.isnan(worth)


@pytest.mark.parametrize("answer", ["choice: the band", "black or white", "I choose you", "_x_"])
def test_what_annotators_said_is_right_whatever_it_looks_like(answer):
    found = content_of(load_task("vqav2"), {}, answer, answer, 1.0, lambda said: 0.0)
    assert found[0] != AMBIGUOUS
    assert found[1] == 1.0


@pytest.mark.parametrize(
    "answer", ["No. There is no dog.", "No, not yes", "Yes, yes.", "maybe", ""]
)
def test_one_reading_or_none_is_not_two(answer):
    said, _ = content_of(load_task("pope"), {}, answer, "yes", 0.0, float)
    assert said == read_yes_no(answer)
