"""From a question to token ids: the checkpoint's chat template, pictures at their places."""

from typing import Any

from kd_bench.distill.chat import ChatFormat
from kd_bench.evals.questions import PLACEHOLDER


class PromptBuilder:
    """Renders questions for one checkpoint, as its training does.

    Raises:
        UsageError: the checkpoint has no chat template, or one that cannot be used.

    A template that could not teach (its prompt opens a thought) is asked all the same.
    """

    def __init__(self, processor: Any) -> None:
        self.chat = ChatFormat(processor, learns=False)
        self.image_token = self.chat.image_token

    def render(self, text: str, pictures: int) -> str:
        """The conversation up to where the answer begins, one image token a picture."""
        content = _content(text, pictures, self.image_token)
        return self.chat.prompt([{"role": "user", "content": content}])

    def encode(self, rendered: list[str], counts: list[list[int]]) -> list[list[int]]:
        """Token ids of rendered conversations; `counts` holds image tokens of each picture."""
        return self.chat.prompt_ids(
            [
                _expand(text, self.image_token, sizes)
                for text, sizes in zip(rendered, counts, strict=True)
            ]
        )


def _content(text: str, pictures: int, image_token: str) -> list[dict[str, str]]:
    """Chat content with the pictures at their placeholders, else in front of the text."""
    parts = text.split(PLACEHOLDER)
    if pictures and len(parts) - 1 == pictures:
        content: list[dict[str, str]] = []
        for number, part in enumerate(parts):
            if part:
                content.append({"type": "text", "text": part})
            if number < pictures:
                content.append({"type": "image"})
        return content
    # A stray image token in the question itself must not ask for a picture.
    plain = text.replace(image_token, "").replace(PLACEHOLDER, "")
    return [{"type": "image"}] * pictures + [{"type": "text", "text": plain}]


def _expand(text: str, image_token: str, counts: list[int]) -> str:
    """Write each image token as often as its picture has features."""
    parts = text.split(image_token)
    if len(parts) - 1 != len(counts):
        raise ValueError(
            f"the chat template renders {len(parts) - 1} pictures, the question has {len(counts)}"
        )
    pieces = [parts[0]]
    for count, part in zip(counts, parts[1:], strict=True):
        pieces.append(image_token * count + part)
    return "".join(pieces)
