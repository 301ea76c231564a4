"""`generate` of transformers on left-padded batches, for families that allow nothing quicker."""

from collections.abc import Sequence
from typing import Any

import torch

from kd_bench.evals.generate import Decoded
from kd_bench.evals.prompts import PromptBuilder
from kd_bench.evals.questions import Settings
from kd_bench.evals.rows import Ready

__all__ = ["PlainDecoder"]


class PlainDecoder:
    """Greedy `generate` with the model's own processor."""

    def __init__(self, model: Any, processor: Any, prompts: PromptBuilder) -> None:
        self._model = model
        self._processor = processor
        self._chat = prompts.chat

    def decode(self, ready: Sequence[Ready], settings: Settings) -> list[Decoded]:
        """Answers in order; stop strings end a row, probabilities are not given."""
        inputs = self._inputs(ready)
        options: dict[str, Any] = {}
        if settings.until:
            options = {"stop_strings": list(settings.until), "tokenizer": self._processor.tokenizer}
        with torch.inference_mode():
            output = self._model.generate(
                **inputs,
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                num_beams=1,
                **options,
            )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._decoded(tokens, settings) for tokens in new]

    def _inputs(self, ready: Sequence[Ready]) -> Any:
        inputs = self._chat.processed(
            [item.prompt for item in ready],
            [[picture.image for picture in item.pictures] for item in ready],
            padding=True,
            padding_side="left",
        )
        device = next(self._model.parameters()).device
        return {name: value.to(device) for name, value in inputs.items()}

    def _decoded(self, tokens: list[int], settings: Settings) -> Decoded:
        """One row without the padding behind its end."""
        tokenizer = self._processor.tokenizer
        configured = self._model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured])
        ends |= {tokenizer.eos_token_id, *self._chat.stop_ids}
        for place, token in enumerate(tokens):
            if token in ends:
                return Decoded(tokens[: place + 1], finished=True)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        stopped = any(stop in text for stop in settings.until if stop)
        return Decoded(tokens, finished=stopped)
