"""What the engine is asked and what it answers; no torch here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd_bench.records import Status

if TYPE_CHECKING:
    from PIL.Image import Image


PLACEHOLDER = "<image>"
"""Where a picture stands inside a question; a question without it has its pictures in front."""


@dataclass(frozen=True, order=True)
class Settings:
    """Greedy generation: at most `max_new_tokens`, stopped before the first of `until`."""

    max_new_tokens: int
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        index: the asker's number for it; comes back with the answer.
        text: the question as the benchmark words it, without chat template.
        pictures: decodes its pictures, in the order of their placeholders.
        picture_key: equal for questions about the same pictures; empty means "do not share".
    """

    index: int
    text: str
    pictures: Callable[[], Sequence["Image"]]
    settings: Settings
    picture_key: str = ""


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        tokens: generated tokens, the end mark included.
        confidence: probability of the first token, None where there was none.
        image_digest: of the decoded pixels of the first picture; empty without one.
        error: what went wrong, when the status is `error`.
    """

    index: int
    text: str
    status: Status
    tokens: int = 0
    confidence: float | None = None
    image_digest: str = ""
    error: str = ""


def settings_of(generation: dict[str, Any]) -> Settings:
    """Settings from lmms-eval's `generation_kwargs`; without a cap, 1024 as its own models do."""
    until = generation.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Settings(int(generation.get("max_new_tokens") or 1024), stops)
