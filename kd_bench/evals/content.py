"""What an answer says, whatever its form.

Upstream reads an answer as its benchmark's script does: POPE takes `Yes.` for wrong, ScienceQA
takes `(B)` for wrong. Beside upstream's score, every sample has a second one of what was said, so
that a gain of form and a gain of knowledge can be told apart (form gap = content - upstream). One
rule for all benchmarks: it reads only what is stated outright; where two readings are possible
there is none, and no reading is a wrong answer.
"""

import ast
import json
import re
import string
import unicodedata
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from kd_bench.errors import UsageError
from kd_bench.records import AMBIGUOUS
from kd_bench.registry import TaskSpec


class Thinking:
    """The tags around what a model thinks before it answers.

    Args:
        tags: JSON list of [open, close] pairs, or `none`.

    Raises:
        UsageError: not of that form.
    """

    def __init__(self, tags: str) -> None:
        self.pairs: list[tuple[str, str]] = []
        if tags != "none":
            tag = Annotated[str, Field(min_length=1)]
            try:
                self.pairs = TypeAdapter(list[tuple[tag, tag]]).validate_json(tags)
            except ValidationError:
                raise UsageError(
                    f"--reasoning-tags {tags!r} is no list of [open, close] pairs.",
                    """Write none, or e.g. '[["<think>", "</think>"]]'.""",
                ) from None
        # One writing for each meaning: runs are told apart by it.
        self.tags = json.dumps(self.pairs, ensure_ascii=False) if self.pairs else "none"

    def answer(self, text: str) -> str:
        """The text without its thoughts, as lmms_eval/api/reasoning.py leaves them out."""
        if not self.pairs:
            return text
        from lmms_eval.api.reasoning import strip_reasoning_tags

        return str(strip_reasoning_tags(text, self.pairs))

    def is_unfinished(self, text: str) -> bool:
        """Whether a thought was begun and never ended."""
        return any(text.rfind(begin) > text.rfind(end) for begin, end in self.pairs)

    def thought(self, text: str) -> str:
        """Everything up to the end of the last thought; of an unfinished one, everything."""
        if self.is_unfinished(text):
            return text
        ends = [text.rfind(end) + len(end) for _, end in self.pairs if end in text]
        return text[: max(ends, default=0)]

    def share(self, text: str, tokens: int) -> int:
        """Of a text's tokens those of its thoughts, by their share of the characters."""
        thought = self.thought(text)
        return round(tokens * len(thought) / len(text)) if thought else 0


_BOXED = re.compile(r"\$?\\(?:boxed|fbox)\{((?:[^{}]|\{[^{}]*\})*)\}\$?")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_TAGS = re.compile(r"</?(?:answer|final_answer|result)>", re.IGNORECASE)
_EMPHASIS = re.compile(  # "2*3" and "a_b" are none
    r"^[#>*-]+\s+|(?<![0-9A-Za-z])(?:[*_`]{1,3}|#{2,6})(?=\S)|(?<=\S)[*_`]{1,3}(?![0-9A-Za-z])",
    re.MULTILINE,
)

# "The correct answer is:", "Answer:", "答案是": what follows is the answer.
_STATED = re.compile(
    r"""(?:
        \b(?:the|my|our|so|thus)?\s*
          (?:final|correct|right|best|most\ likely)?\s*
          \b(?:answer|option|choice)\b(?:\s+(?:to|for)\s+[^.:\n]*?)?
          \s*(?:\bis\b\s*:?|\bwould\ be\b|:|-)\s*
      | ^\s*(?:the\s+)?(?:final\s+|correct\s+)?answer\s*\n\s* | \bans\s*[.:]\s*
      | \b(?:I|we)\s+(?:would\s+|will\s+)?(?:choose|pick|select)\s+
      | \b(?:option|choice)\s+(?=\(?[A-Z]\b)
      | (?:正确)?的?(?:答案|选项)\s*(?:\]|】)?\s*(?:应该|应)?\s*(?:(?:是|为|:)\s*:?\s*|(?<=[\]】]))
      | 选项\s*(?=[A-Z])
      | (?:应该?|故|我)?选择?\s*:?\s*(?:选项)?\s* | 我(?:认为|觉得)(?:应该)?是?\s*
    )(?:(?:option|choice)\s+)?""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_DENIED = re.compile(  # "I don't think the answer is", "the wrong answer is", "不应选"
    r"(?:\b(?:not|never|cannot|wrong|incorrect|least|worst)\b|n't|[不别勿没]|错误)"
    r"(?:(?!\b(?:so|but|thus|hence|therefore)\b)[^,.;:!?\n])*$",
    re.IGNORECASE,
)
_CLOSERS = " \t\n.,;:!?\"'()[]{}<>、。$-【】「」“”‘’"
_LEAD = re.compile(r"^(?:a|correct|sure|based on [^,]*|looking at [^,]*)\s*[:,]\s*", re.IGNORECASE)
_OPINION = re.compile(
    r"^(?:I\s+(?:think|believe|would\s+say)\s+(?:that\s+)?)?(?:it(?:\s+is|'s)\s+)?", re.IGNORECASE
)
_UNSURE = re.compile(
    r"\b(?:no (?:idea|information|way|doubt|answer|comment|image|picture|problem|longer|question"
    r"|reason|clues?|evidence|issues?)|not (?:sure|certain|clear|possible))\b",
    re.IGNORECASE,
)
_YES = {"yes", "yep", "yeah", "是", "是的", "对", "对的", "有", "有的", "正确", "存在", "肯定的"}
_NO = {"no", "nope", "否", "不是", "不是的", "不", "没有", "不对", "错误", "不存在", "否定的"}
_THERE = re.compile(
    r"there (?:is|are)(n't| not\b| no\b)?(?: (?:a|an|one|two|three|several|some|many)\b)?", re.I
)
_DOUBTED = re.compile(r"\b(?:but|not|no|lack|absence|question|doubts?|reason|evidence)\b", re.I)
_HEDGED = re.compile(r"\b(?:chance|may|might|maybe|perhaps|possib\w+|probabl\w+|seems?)\b", re.I)

_EXPLAINED = re.compile(
    r"(?<=\S)(?:[\s,;.]{1,3}because\b|\s{0,3}\n\s{0,3}(?:explanation|reason(?:ing)?|because|解释|理由|原因)\b)",
    re.IGNORECASE,
)
_EITHER = re.compile(r"(?:either\s+)?[^\n.,;]+\s(?:or|或)\s[^\n.,;]+", re.IGNORECASE)


def read_yes_no(answer: str) -> str:
    """`yes` or `no` out of the first sentence, or out of a stated answer; else nothing.

    >>> read_yes_no("**No**, there is none.")
    'no'
    """
    return _yes_or_no(answer) or ""


@lru_cache(maxsize=2**16)  # a benchmark's answers are few wordings
def _yes_or_no(answer: str) -> str | None:
    """`read_yes_no`; None where it can be read as both."""
    text = _OPINION.sub("", _plain(answer).lstrip(_CLOSERS))
    sentence = re.split(r"[.!?。\n]", text, maxsplit=1)[0]
    opening = _polarity(_LEAD.sub("", sentence))
    if opening and _polarity(_LEAD.sub("", text)) is None:
        return None  # "Yes. No."
    stated = {_polarity(each) for each in _stated(text)} - {""}
    if None in {opening, *stated} or len(stated | {opening} - {""}) > 1:
        return None
    if opening:
        return opening
    if stated and not _HEDGED.search(text):
        return stated.pop()
    there = _THERE.match(sentence)
    if there and not _HEDGED.search(sentence) and not _UNSURE.search(sentence):
        if _DOUBTED.search(sentence, there.end()) or text[len(sentence) :].startswith("?"):
            return ""
        if there.group(1):
            return "no"
        return "yes" if there.group(0).split()[-1] not in ("is", "are") else ""
    return ""


def _stated(text: str, window: int = 500) -> list[str]:
    """What follows each "the answer is" that is not denied; a loop's repetitions once."""
    found = {
        text[match.end() : match.end() + window]: None
        for match in _STATED.finditer(text)
        if not _DENIED.search(text[max(0, match.start() - window) : match.start()])
    }
    return list(found)


def _polarity(text: str) -> str | None:
    """yes or no where a text begins with it; None where it begins with both ("Yes, no.")."""
    text = text.lstrip(_CLOSERS)
    if _UNSURE.match(text):
        return ""
    found = re.match(r"[a-z]+|[\u4e00-\u9fff]+?(?=[,，]|$|[^\u4e00-\u9fff])", text, re.IGNORECASE)
    if found is None:
        return ""
    word, rest = found.group(0).lower(), text[found.end() :]
    if word not in _YES | _NO or re.match(r"[\s,]+(?:only\s+)?(?:if|unless)\b", rest, re.I):
        return ""
    if _UNSURE.match(rest.lstrip(_CLOSERS)):
        return "yes" if word in _YES else ""  # "Yes, no doubt"
    other = re.match(r"[\s,.;:!?，]*(/|\bor\b|\band\b|或|和)?\s*(\w+)", rest, re.IGNORECASE)
    if other and other.group(2).lower() in (
        _YES | _NO if other.group(1) else _NO if word in _YES else _YES
    ):
        return None
    return "yes" if word in _YES else "no"


def read_choice(answer: str, options: Mapping[str, str]) -> str:
    """An option's letter, stated as a letter or by the option's own text; else nothing.

    Args:
        options: text by letter, in order.

    >>> read_choice("The answer is (B).", {"A": "red", "B": "blue"})
    'B'
    """
    return _choice(answer, options) or ""


def _choice(answer: str, options: Mapping[str, str]) -> str | None:
    """`read_choice`; None where it can be read as several."""
    text = _plain(answer)
    stated = [_choice_at(each, options) for each in _stated(text)]
    if re.search(r"final answer", text, re.IGNORECASE):
        stated = stated[-1:]
    found = {each for each in stated if each}
    opening = _choice_at(_OPINION.sub("", text), options)
    if None in stated or opening is None or len(found | {opening} - {""}) > 1:
        return None
    return found.pop() if found else opening


def _choice_at(text: str, options: Mapping[str, str]) -> str | None:
    """The option that a text begins with; None where it may be one of several."""
    text = text.strip().lstrip("\"'([{<【「“‘$").lstrip()
    by_text = _letters_of(text, options)
    if len(by_text) > 1:
        return None
    without_letter = by_text[0] if by_text else ""
    letters = "".join(options)
    # "A. red B. blue", "A, B", "red. B"
    mark = rf"(?<![A-Za-z0-9])([{letters}])(?:[.):、]\s*\S|[.)\s]*$)"
    no_word = r"(?![A-Za-z0-9+]|'[A-Za-z]|-\S|-$|\.[A-Za-z]\.)"  # "T-shirt", "A.M."
    found = re.match(rf"([{letters}]){no_word}", text, re.IGNORECASE)
    if found is None:
        is_whole = not by_text or _said(text) == _said(options[without_letter])
        is_other = not is_whole and set(re.findall(mark, text)) - {without_letter}
        return None if is_other else without_letter
    letter, rest = found.group(1).upper(), text[found.end() :]
    others = set(re.findall(mark, rest)) - {letter}
    own = re.sub(r"^\W*?(?=[^\W_]|-\d|$)", "", rest)
    if _letters_of(own, options) == [letter] and not (
        others and _said(own) != _said(options[letter])  # "C. both A and B"
    ):
        return letter if without_letter in ("", letter) else None  # "B dog", "(b) dog"
    is_capital, is_alone = found.group(1).isupper(), not rest.strip(_CLOSERS)
    if is_capital and re.match(r"[\s)\]]*(?:/|(?:or|and)\b|或|和|&)", rest):
        return None if not by_text else without_letter  # "A or B"
    is_closed = is_alone or rest.lstrip(" \t").startswith(tuple(")]}】」.:,、-–—=\n\"'"))
    is_confirmed = re.match(
        r"\s*(?:选项(?![错不是])|(?:选项)?是?正确|is (?:correct|right|the (?:correct|right|best))\b"
        r"|because\b)",
        rest,
        re.IGNORECASE,
    )
    if not is_closed and not is_confirmed:
        return without_letter  # "A dog", "A is wrong"
    if not is_capital and not is_alone:
        return ""  # a word of one letter
    beside = _letters_of(re.sub(r"^is\s+", "", own), options)
    return None if others or (beside and letter not in beside) else letter


def _letters_of(text: str, options: Mapping[str, str]) -> list[str]:
    """Options whose own text is all of it, else those that it names.

    It names one that stands alone, or before a comma, a line break or a full stop.
    """
    same = [letter for letter, own in options.items() if _said(own) == _said(text) != ""]
    if not same:
        bare = _bare(text)
        same = [letter for letter, own in options.items() if _bare(own) == bare != ""]
    if len(same) == 1:
        return same
    first = re.split(r"[;；\n。]|[,，](?!\d)|\.(?:\s|$)", text, maxsplit=1)[0]
    texts = {letter: _words(own) for letter, own in options.items()}
    named = [
        letter for letter, own in texts.items() if own and own in (_words(text), _words(first))
    ]
    inside = f" {_words(text)} "
    others = [letter for letter, own in texts.items() if f" {own} " in inside]
    return [*named, *(letter for letter in others if letter not in named)] if named else []


def _said(text: str) -> str:
    """In lower case, with its signs, without what stands around it."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-").casefold()
    return " ".join(text.strip(" \t\n.,;:!?\"'()[]{}<>、。【】「」“”‘’$").split())


def _bare(text: str) -> str:
    """`_said` without its article; a capital A may be a letter."""
    return _said(re.sub(r"^\W*(?:a|an|An|[Tt]he)\s+(?=\S)", "", text))


def read_short(answer: str) -> str:
    """A short answer without its wrapping, for upstream's own normaliser; else nothing.

    >>> read_short("The answer is **red**.")
    'red'
    """
    return _short(answer) or ""


@lru_cache(maxsize=2**16)
def _short(answer: str) -> str | None:
    """`read_short`; None where it can be read as several."""
    text = _plain(answer)
    stated = _stated(text)
    said = _unwrapped(stated[-1] if stated else text)
    if not re.search(r"final answer", text, re.IGNORECASE):
        begin = f"{_words(said)} "
        if not all(f"{_words(each)} ".startswith(begin) for each in stated):
            return None  # "The answer is red. The answer is blue."
    return said


def _unwrapped(text: str) -> str:
    text = re.sub(r"^(?:it\s+is|it's)\s+", "", text.strip(), flags=re.IGNORECASE)
    text = _EXPLAINED.split(text.strip(" \t\n\"'“”‘’"), maxsplit=1)[0]
    text = re.sub(r"^\(([^()]*)\)$", r"\1", text)
    if not re.search(r"\b[A-Za-z]\.[A-Za-z]\.$|\d\.\d+$", text):
        text = text.rstrip(".!,;:")
    return text.strip(" \"'")


def _plain(answer: str) -> str:
    """The answer without full-width forms, LaTeX boxes, answer tags and emphasis."""
    text = unicodedata.normalize("NFKC", answer).replace("。", ".").replace("−", "-").strip()
    text = re.sub(r"^assistant\s*:\s*", "", text, flags=re.IGNORECASE)
    text = _BOXED.sub(r" \1 ", text)
    text = _LATEX_TEXT.sub(r"\1", text)
    text = _TAGS.sub(" ", text)
    return _EMPHASIS.sub("", text).strip(" \t\n")


def _words(text: str) -> str:
    """Letters and digits in lower case, single spaces between."""
    text = unicodedata.normalize("NFKC", text).casefold()
    number = r"(?<![^\W_])-?\d+(?:[.,]\d+)*%?(?![^\W_])"
    return " ".join(re.findall(rf"{number}|[^\W_]+(?:[.'][^\W_]+)*", text))


CONTENT_SCORE = "kd_bench_content"
"""The metric whose difference from the score is the form gap."""

_OWN_WORDS = re.compile(r"[\w' -]+")


def content_of(
    spec: TaskSpec,
    document: Mapping[str, Any],
    text: str,
    target: str,
    score: float | None,
    again: Callable[[str], float],
) -> tuple[str, float]:
    """What an answer says whatever its form, and what that is worth.

    Args:
        document: options are read from it.
        score: upstream's for this very text; None where it has scored another.
        again: upstream's score of another wording.
    """
    options = _options(spec.id, document) if spec.answer == "letter" else {}
    if options or spec.answer == "yes_no":
        read = _choice(text, options) if options else _yes_or_no(text)
        if read is None:
            return AMBIGUOUS, 0.0
        return read, float(bool(read) and read.lower() == target.strip().lower())
    said = _short(text)
    own = score if score is not None and spec.answer != "letter" else 0.0
    if said is None or (_EITHER.fullmatch(said) and not own):
        return (AMBIGUOUS, 0.0) if not own else (text, own)
    is_bare = said == text.strip() or (
        said.lower() == text.strip().lower() and _OWN_WORDS.fullmatch(said)
    )
    # Where nothing is to be taken off, upstream has scored these very words.
    # What was taken off may be part of the answer ("choice: the band"); NaN stays NaN.
    return said, score if is_bare and score is not None else max(again(said), own)


def _options(task: str, document: Mapping[str, Any]) -> dict[str, str]:
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
