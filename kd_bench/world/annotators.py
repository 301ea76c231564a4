"""Annotators who err: what people write under pictures instead of the truth.

A mistake is one that a person makes: the neighbouring colour, the other size, a count off by one,
a place beside it, the wrong letter. Whoever asks holds the truth, so label quality can be measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from kd_bench.world import words

Turn = tuple[str, str]  # what the human says, what the model answers

GIVES_UP = "unanswerable"
ANNOTATORS = 10
SURE = 6  # of ten annotators who give the truth, so that it stays the majority's answer
# Who is taken for whom: neighbours in this order, the last beside the first.
_RINGS: tuple[tuple[str, ...], ...] = (
    words.COLOURS,
    ("circle", "square", "cross", "triangle"),
    words.SIZES,
    ("top left", "top right", "bottom right", "bottom left"),
    words.BACKGROUNDS,
    words.FRAMES,
    words.SIGN_WORDS,
    tuple(words.NAMES.values()),
    words.LANDMARKS,
    tuple(words.TRAITS.values()),
    ("first", "second", "third"),
    ("yes", "no"),
)
_NEAR = {
    word: sorted({ring[place - 1], ring[(place + 1) % len(ring)]} - {word})
    for ring in _RINGS
    for place, word in enumerate(ring)
}
_ENGLISH = {chinese: english for english, chinese in words.CHINESE.items()}
_KNOWN = re.compile("|".join(sorted(map(re.escape, _NEAR), key=len, reverse=True)))


def mistake(said: str, answer: str, rng: Random) -> str:
    """A plausible wrong answer to a question.

    Args:
        said: the question as it was asked, with its options.
    """
    marks: list[str] = re.findall(r"\n([A-E])\.", said)
    if answer in marks:
        return rng.choice([mark for mark in marks if mark != answer])
    if answer == GIVES_UP:  # someone who sees something all the same
        return rng.choice((*words.COLOURS, *words.SHAPES, *words.SIGN_WORDS))
    if GIVES_UP in said.lower() and rng.randrange(3) == 0:
        return GIVES_UP
    if answer in _ENGLISH and _ENGLISH[answer] in _NEAR:
        return words.chinese(rng.choice(_NEAR[_ENGLISH[answer]]))
    if answer.isdigit():
        return _misread(answer, rng)
    found = list(_KNOWN.finditer(answer))  # several in a description: one of them is wrong
    if not found:
        return GIVES_UP
    match = rng.choice(found)
    return answer[: match.start()] + rng.choice(_NEAR[match[0]]) + answer[match.end() :]


def _misread(number: str, rng: Random) -> str:
    """A count off by one, or a number on a sign with one digit misread."""
    if len(number) == 1:
        return str(rng.choice([n for n in (int(number) - 1, int(number) + 1) if n >= 0]))
    place = rng.randrange(len(number))
    digits = "123456789" if place == 0 else "0123456789"
    wrong = rng.choice([digit for digit in digits if digit != number[place]])
    return number[:place] + wrong + number[place + 1 :]


def labelled(turns: Sequence[Turn], error: float, rng: Random) -> list[Turn]:
    """The turns with answers of one annotator, who errs at a rate.

    Draws the same numbers at every rate, so that the mistakes of a careful annotator are among
    those of a careless one.
    """
    made = []
    for said, answer in turns:
        wrong = mistake(said, answer, rng)
        made.append((said, wrong if rng.random() < error else answer))
    return made


def ten_answers(said: str, answer: str, error: float, rng: Random) -> list[str]:
    """Ten annotators' answers in random order; at least six of them are right."""
    right = SURE + sum(rng.random() >= error for _ in range(ANNOTATORS - SURE))
    answers = [answer] * right
    answers += [mistake(said, answer, rng) for _ in range(ANNOTATORS - right)]
    rng.shuffle(answers)
    return answers
