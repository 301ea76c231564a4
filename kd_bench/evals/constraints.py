"""What a checkpoint's generation_config.json changes about greedy decoding.

The rule is that of lmms-eval's own models, which call `generate` of transformers: everything that
acts on the scores of the next token counts (`repetition_penalty`, `no_repeat_ngram_size`, ...);
what only matters for sampling (`temperature`, `top_p`, ...) and beams does not, because greedy
decoding of one beam is asked for. Each row is treated as it would be alone: padding is no token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from kd_bench.errors import UsageError, one_line


@dataclass(frozen=True)
class _Row:
    """What a processor may need to know: prompt tokens, tokens with the answer, end marks."""

    prompt: int
    longest: int
    ends: Tensor


# In the order in which `generate` applies them.
_MAKERS: dict[str, Callable[[Any, _Row], LogitsProcessor]] = {
    "sequence_bias": lambda value, row: transformers.SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda value, row: transformers.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, row: transformers.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, row: transformers.NoBadWordsLogitsProcessor(value, row.ends),
    "min_length": lambda value, row: transformers.MinLengthLogitsProcessor(
        value, row.ends, device=str(row.ends.device)
    ),
    "min_new_tokens": lambda value, row: transformers.MinNewTokensLengthLogitsProcessor(
        row.prompt, value, row.ends, device=str(row.ends.device)
    ),
    "forced_bos_token_id": lambda value, row: transformers.ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, row: transformers.ForcedEOSTokenLogitsProcessor(
        row.longest, value, device=str(row.ends.device)
    ),
    "remove_invalid_values": lambda value, row: transformers.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda value, row: (
        transformers.ExponentialDecayLengthPenalty(tuple(value), row.ends, row.prompt)
    ),
    "suppress_tokens": lambda value, row: transformers.SuppressTokensLogitsProcessor(
        value, device=str(row.ends.device)
    ),
    "begin_suppress_tokens": lambda value, row: transformers.SuppressTokensAtBeginLogitsProcessor(
        value, row.prompt, device=str(row.ends.device)
    ),
}


class Constraints:
    """The score processors of one model.

    Attributes:
        settings: those of the generation config that count, for the run's record; mostly empty.

    Raises:
        UsageError: a setting makes no sense.
    """

    def __init__(self, config: Any, ends: Sequence[int], device: torch.device) -> None:
        self.settings = {
            name: value
            for name in _MAKERS
            if (value := getattr(config, name, None)) not in (None, False, 0, [], {})
            and not (name == "repetition_penalty" and value == 1)
        }
        self._ends = torch.tensor(list(ends), device=device)
        for name in self.settings:
            try:
                self._make([name], _Row(1, 2, self._ends))
            except Exception as error:  # each processor checks its value in its own way
                raise UsageError(
                    f"generation_config.json: {name} {self.settings[name]!r} cannot be used: "
                    f"{one_line(error)[:200]}.",
                    "Correct or remove it.",
                ) from None

    def for_row(self, prompt: int, new_tokens: int) -> LogitsProcessorList:
        """The processors of one row with that many tokens of prompt."""
        return self._make(list(self.settings), _Row(prompt, prompt + new_tokens, self._ends))

    def _make(self, names: list[str], row: _Row) -> LogitsProcessorList:
        return LogitsProcessorList([_MAKERS[name](self.settings[name], row) for name in names])


def end_ids(model: Any, tokenizer: Any, stop_ids: Sequence[int]) -> list[int]:
    """Tokens that end an answer: of the generation settings, the tokenizer, the chat template.

    Raises:
        UsageError: they are no token ids.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = {each for each in [*ids, tokenizer.eos_token_id, *stop_ids] if each is not None}
    if any(not isinstance(each, int) or each < 0 for each in found):
        raise UsageError(
            f"generation_config.json: eos_token_id {configured!r} is no token id.", "Correct it."
        )
    return sorted(found)
