"""`generate` of transformers on left-padded batches, for families that allow nothing quicker."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kd_bench.evals.constraints import Constraints
from kd_bench.evals.generate import Decoded
from kd_bench.evals.prompts import PromptBuilder
from kd_bench.evals.questions import Settings
from kd_bench.evals.rows import Ready


class PlainDecoder:
    """Greedy `generate` with the model's own processor.

    Args:
        ends: tokens that end an answer.
        constraints: what the checkpoint's generation settings do to the scores.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        prompts: PromptBuilder,
        ends: Sequence[int],
        constraints: Constraints,
    ) -> None:
        self._model = model
        self._processor = processor
        self._chat = prompts.chat
        self._ends = list(ends)
        self._constraints = constraints

    def decode(self, ready: Sequence[Ready], settings: Settings) -> list[Decoded]:
        """Answers in order; stop strings end a row, probabilities are not given."""
        inputs = self._inputs(ready)
        options: dict[str, Any] = {}
        if settings.until:
            options = {"stop_strings": list(settings.until), "tokenizer": self._processor.tokenizer}
        scores = _RowByRow(inputs["attention_mask"], self._constraints, settings.max_new_tokens)
        with torch.inference_mode(), self._own_settings():
            output = self._model.generate(
                **inputs,
                max_new_tokens=settings.max_new_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=LogitsProcessorList([scores]),
                **options,
            )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            Decoded(broken=True) if row in scores.broken else self._decoded(tokens, settings)
            for row, tokens in enumerate(new)
        ]

    @contextlib.contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Let `generate` see the end marks alone: the rest is done row by row, without padding."""
        kept = self._model.generation_config
        pad = self._processor.tokenizer.pad_token_id
        self._model.generation_config = GenerationConfig(
            eos_token_id=self._ends or None,
            bos_token_id=kept.bos_token_id,
            pad_token_id=pad if pad is not None else (self._ends or [0])[0],
        )
        try:
            yield
        finally:
            self._model.generation_config = kept

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
        for place, token in enumerate(tokens):
            if token in self._ends:
                return Decoded(tokens[: place + 1], finished=True)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        stopped = any(stop in text for stop in settings.until if stop)
        return Decoded(tokens, finished=stopped)


class _RowByRow(LogitsProcessor):
    """Applies a checkpoint's generation settings to each row as if it were alone.

    Attributes:
        broken: rows whose scores were not finite.
    """

    def __init__(self, mask: Tensor, constraints: Constraints, new_tokens: int) -> None:
        self._starts = (mask != 0).int().argmax(dim=1).tolist()  # first real token of each row
        width = mask.shape[1]
        self._own = [
            constraints.for_row(width - start, new_tokens) if constraints.settings else None
            for start in self._starts
        ]
        self.broken: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary]."""
        done = [
            scores[row : row + 1]
            if own is None
            else own(input_ids[row : row + 1, self._starts[row] :], scores[row : row + 1])
            for row, own in enumerate(self._own)
        ]
        found = torch.cat(done)
        unsound = ~found.amax(dim=-1).isfinite()
        self.broken.update(unsound.nonzero().flatten().tolist())
        return found
