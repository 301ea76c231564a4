"""From a question to token ids: the checkpoint's chat template, pictures at their places."""

from typing import Any

from kd_bench.evals.questions import PLACEHOLDER

__all__ = ["LLAVA_TEMPLATE", "PromptBuilder"]

# For checkpoints without a chat template: the LLaVA 1.5 conversation without its system line.
LLAVA_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}ASSISTANT:"
)


class PromptBuilder:
    """Renders questions for one checkpoint."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self.image_token = str(getattr(processor, "image_token", PLACEHOLDER))
        self.template: str | None = None
        if not getattr(processor, "chat_template", None):
            self.template = LLAVA_TEMPLATE.replace(PLACEHOLDER, self.image_token)

    def render(self, text: str, pictures: int) -> str:
        """The conversation up to where the answer begins, one image token a picture."""
        content = _content(text, pictures, self.image_token)
        arguments: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False}
        if self.template is not None:
            arguments["chat_template"] = self.template
        messages = [{"role": "user", "content": content}]
        return str(self._processor.apply_chat_template(messages, **arguments))

    def encode(self, rendered: list[str], counts: list[list[int]]) -> list[list[int]]:
        """Token ids of rendered conversations; `counts` holds image tokens of each picture."""
        expanded = [
            _expand(text, self.image_token, sizes)
            for text, sizes in zip(rendered, counts, strict=True)
        ]
        begin = self._tokenizer.bos_token
        if begin and all(text.startswith(begin) for text in expanded):
            return list(self._tokenizer(expanded, add_special_tokens=False)["input_ids"])
        return list(self._tokenizer(expanded)["input_ids"])


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
