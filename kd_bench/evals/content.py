"""What an answer says, whatever form it was written in: the reading behind `score_by_content`.

Upstream scores an answer as its benchmark's script reads it: POPE takes `Yes.` for wrong, ScienceQA
takes `(B)` for wrong. Beside upstream's score, every sample has a second one of what was said, so
that a gain of form and a gain of knowledge can be told apart (form gap = content - upstream).

One rule for all benchmarks. It reads only what is stated outright; where two readings are possible
there is none (`Reading.ambiguous`), and no reading is a wrong answer.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from kd_bench.errors import UsageError


class Thinking:
    """The tags around what a model thinks before it answers.

    Args:
        tags: JSON list of [open, close] pairs, or `none`.

    Raises:
        UsageError: not of that form.
    """

    def __init__(self, tags: str) -> None:
        self.pairs: list[list[str]] = []
        if tags == "none":
            return
        try:
            pairs = json.loads(tags)
        except ValueError:
            pairs = None
        sound = isinstance(pairs, list) and all(
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(t, str) and t for t in pair)
            for pair in pairs
        )
        if not sound:
            raise UsageError(
                f"--reasoning-tags {tags!r} is no list of [open, close] pairs.",
                """Write none, or e.g. '[["<think>", "</think>"]]'.""",
            )
        self.pairs = pairs

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


@dataclass(frozen=True)
class Reading:
    """What was understood.

    Attributes:
        said: `yes`, `no`, an option's letter, or the short answer; "" where nothing was.
        ambiguous: more than one reading was possible.
    """

    said: str = ""
    ambiguous: bool = False


NOTHING = Reading()
AMBIGUOUS = Reading(ambiguous=True)

_BOXED = re.compile(r"\$?\\(?:boxed|fbox)\{((?:[^{}]|\{[^{}]*\})*)\}\$?")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}")
_TAGS = re.compile(r"</?(?:answer|final_answer|result)>", re.IGNORECASE)
_EMPHASIS = re.compile(r"[*_`#]{1,3}(?=\S)|(?<=\S)[*_`]{1,3}|^[#>*-]+\s+", re.MULTILINE)

# "The correct answer is:", "Answer:", "答案是": what follows is the answer.
_STATED = re.compile(
    r"""(?:
        \b(?:the|my|our|so|thus)?\s*
          (?:final|correct|right|best|most\ likely)?\s*
          \b(?:answer|option|choice)\b(?:\s+(?:to|for)\s+[^.:\n]*?)?
          \s*(?:\bis\b\s*:?|\bwould\ be\b|:|-)\s*
      | \b(?:I|we)\s+(?:would\s+|will\s+)?(?:choose|pick|select)\s+
      | \b(?:option|choice)\s+(?=\(?[A-Z]\b)
      | (?:正确)?的?(?:答案|选项)\s*(?:应该|应)?\s*(?:是|为|:)\s*:?\s*
      | 选项\s*(?=[A-Z])
      | (?<!不)(?:应该?|故|我)?选择?\s*(?:选项)?\s*
    )(?:(?:option|choice)\s+)?""",
    re.IGNORECASE | re.VERBOSE,
)
_CLOSERS = " \t\n.,;:!?\"'()[]{}<>、。$-【】「」“”‘’"
_LEAD = re.compile(r"^(?:a|correct|based on [^,]*|looking at [^,]*)\s*[:,]\s*", re.IGNORECASE)
_UNSURE = re.compile(
    r"\b(?:no idea|no information|no way|no doubt|not (?:sure|certain|clear|possible))\b",
    re.IGNORECASE,
)
_YES = {"yes", "yep", "yeah", "是", "是的", "对", "有", "正确"}
_NO = {"no", "nope", "否", "不是", "不", "没有", "不对", "错误"}
_THERE = re.compile(
    r"there (?:is|are)(n't| not| no\b)?(?: (?:a|an|one|two|three|several|some|many)\b)?", re.I
)
_HEDGED = re.compile(r"\b(?:chance|may|might|maybe|perhaps|possibl\w+|probabl\w+|seems?)\b", re.I)


def read_yes_no(answer: str) -> Reading:
    """`yes` or `no` out of the first sentence, or out of a stated answer.

    >>> read_yes_no("**No**, there is none.").said
    'no'
    """
    text = _plain(answer)
    sentence = re.split(r"[.!?。\n]", text.lstrip(_CLOSERS), maxsplit=1)[0]
    opening = _polarity(_LEAD.sub("", sentence))
    stated = {_polarity(text[match.end() :]).said for match in _STATED.finditer(text)} - {""}
    if opening.said or opening.ambiguous:
        return opening
    if len(stated) > 1:
        return AMBIGUOUS
    if stated and not _HEDGED.search(text):
        return Reading(stated.pop())
    there = _THERE.match(sentence)
    if there and not _HEDGED.search(sentence) and not _UNSURE.search(sentence):
        if there.group(1):
            return Reading("no")
        return Reading("yes") if there.group(0).split()[-1] not in ("is", "are") else NOTHING
    return NOTHING


def _polarity(text: str) -> Reading:
    """yes or no where a text begins with it."""
    text = text.lstrip(_CLOSERS)
    if _UNSURE.match(text):
        return NOTHING
    found = re.match(r"[a-z]+|[\u4e00-\u9fff]+?(?=[,，]|$|[^\u4e00-\u9fff])", text, re.IGNORECASE)
    if found is None:
        return NOTHING
    word, rest = found.group(0).lower(), text[found.end() :]
    if word not in _YES | _NO:
        return NOTHING
    other = re.match(r"\s*(?:/|\bor\b|\band\b|或|和)\s*(\w+)", rest, re.IGNORECASE)
    if other and other.group(1).lower() in _YES | _NO:
        return AMBIGUOUS
    return Reading("yes" if word in _YES else "no")


def read_choice(answer: str, options: Mapping[str, str]) -> Reading:
    """An option's letter, stated as a letter or by the option's own text.

    Args:
        options: text by letter, in order.

    >>> read_choice("The answer is (B).", {"A": "red", "B": "blue"}).said
    'B'
    """
    text = _plain(answer)
    stated = [_choice_at(text[match.end() :], options) for match in _STATED.finditer(text)]
    if re.search(r"final answer", text, re.IGNORECASE):
        stated = stated[-1:]
    found = {each.said for each in stated if each.said}
    if any(each.ambiguous for each in stated) or len(found) > 1:
        return AMBIGUOUS
    opening = _choice_at(text, options)
    if opening.ambiguous:
        return opening
    if found and opening.said and opening.said not in found:
        return AMBIGUOUS
    return Reading(found.pop()) if found else opening


def _choice_at(text: str, options: Mapping[str, str]) -> Reading:
    """The option that a text begins with."""
    text = text.strip().lstrip("\"'([{<【「“‘").lstrip()
    by_text = _letters_of(text, options)
    if len(by_text) > 1:
        return AMBIGUOUS
    without_letter = Reading(by_text[0]) if by_text else NOTHING
    letters = "".join(options)
    found = re.match(rf"([{letters}])(?![A-Za-z0-9'])", text, re.IGNORECASE)
    if found is None:
        return without_letter
    letter, rest = found.group(1).upper(), text[found.end() :]
    is_capital, is_alone = found.group(1).isupper(), not rest.strip(_CLOSERS)
    if is_capital and re.match(r"[\s)\]]*(?:/|(?:or|and)\b|或|和|&)", rest):
        return AMBIGUOUS  # "A or B"
    is_closed = is_alone or rest.lstrip(" \t").startswith(tuple(")]}】」.:,、-\n\"'"))
    is_confirmed = re.match(r"\s*(?:选项|是?正确|is (?:correct|right|the)\b)", rest, re.IGNORECASE)
    if not is_closed and not is_confirmed:
        return without_letter  # "A dog", "A is wrong"
    if not is_capital and not is_alone:
        return NOTHING  # a word of one letter
    mark = rf"(?<![A-Za-z0-9])([{letters}])(?:[.):、]\s*\S|\s*$)"  # "A. red B. blue", "A, B"
    if set(re.findall(mark, rest)) - {letter}:
        return AMBIGUOUS
    beside = _letters_of(re.sub(r"^\s*is\s+", "", rest).strip(_CLOSERS), options)
    return AMBIGUOUS if beside and letter not in beside else Reading(letter)


def _letters_of(text: str, options: Mapping[str, str]) -> list[str]:
    """Options whose own text stands alone, or before a comma, a line break or a full stop."""
    first = re.split(r"[,，;；\n。]|\.(?:\s|$)", text, maxsplit=1)[0]
    texts = {letter: _words(own) for letter, own in options.items()}
    named = [
        letter for letter, own in texts.items() if own and own in (_words(text), _words(first))
    ]
    inside = f" {_words(text)} "
    others = [letter for letter, own in texts.items() if f" {own} " in inside]
    return [*named, *(letter for letter in others if letter not in named)] if named else []


def read_short(answer: str) -> Reading:
    """A short answer without its wrapping, for upstream's own normaliser.

    >>> read_short("The answer is **red**.").said
    'red'
    """
    text = _plain(answer)
    stated = list(_STATED.finditer(text))
    if stated:
        text = text[stated[-1].end() :]
    text = re.sub(r"^(?:it\s+is|it's)\s+", "", text.strip(), flags=re.IGNORECASE)
    text = text.strip(" \t\n\"'“”‘’")
    text = re.sub(r"^\((.*)\)$", r"\1", text, flags=re.DOTALL)
    if not re.search(r"\b[A-Za-z]\.[A-Za-z]\.$|\d\.\d+$", text):
        text = text.rstrip(".!,;:")
    return Reading(text.strip(" \"'"))


def _plain(answer: str) -> str:
    """The answer without full-width forms, LaTeX boxes, answer tags and emphasis."""
    text = unicodedata.normalize("NFKC", answer).replace("。", ".").strip()
    text = _BOXED.sub(r" \1 ", text)
    text = _LATEX_TEXT.sub(r"\1", text)
    text = _TAGS.sub(" ", text)
    return _EMPHASIS.sub("", text).strip(" \t\n")


def _words(text: str) -> str:
    """Letters and digits in lower case, single spaces between."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"[^\W_]+(?:[.'][^\W_]+)*", text))
