"""How many questions fit into memory at once."""

from pathlib import Path
from typing import Any

import torch

from kd_bench.evals.questions import Question, Settings

MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Above this a batch gains nothing more."""


class MemoryBudget:
    """An upper bound of what a batch of questions needs, and the rows that stay below a budget.

    Args:
        model: for its language model's sizes.
        budget_bytes: memory above the model's own; None takes a quarter of what is free now, at
            most 2 GiB on a processor and half of what is free on a GPU.
    """

    def __init__(
        self, model: Any, image_tokens: int | None, budget_bytes: int | None = None
    ) -> None:
        config = model.config.get_text_config()
        weight = max(model.parameters(), key=lambda each: each.is_floating_point())
        self._size = weight.element_size()
        self._device = weight.device.type
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        pairs = getattr(config, "num_key_value_heads", None) or heads
        self._cache_token = 2 * config.num_hidden_layers * pairs * head * self._size
        # A layer's widest moment: its input, the two branches of the MLP, and copies of them.
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        self._working_token = (6 * config.hidden_size + 3 * wide) * self._size
        self._logits = 3 * config.vocab_size * 4
        self._image_tokens = image_tokens or 1024
        self.bytes = budget_bytes or _free_share(self._device)

    def row_bytes(self, text_bytes: int, settings: Settings, pictures: int = 1) -> int:
        """Memory of one question; a token is at least a byte of text."""
        prompt = text_bytes + 64 + pictures * self._image_tokens
        kept = prompt + settings.max_new_tokens
        # The prefixes' caches, then the rows that go on, stand for a moment beside the batch's own.
        return int(1.5 * kept * self._cache_token) + prompt * self._working_token + self._logits

    def rows(self, question: Question) -> int:
        """How many questions as long as this one fit, at least one."""
        pictures = max(1, question.text.count("<image>"))
        need = self.row_bytes(len(question.text.encode()), question.settings, pictures)
        return max(1, min(MOST_ROWS.get(self._device, 64), self.bytes // need))


def _free_share(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] // 2)
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(min(2 << 30, int(line.split()[1]) * 1024 // 4))
    except OSError:
        pass
    return 1 << 30
