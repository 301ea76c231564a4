"""Batched greedy decoding on a KV cache, with a common prefix computed once.

    prefixes  [P, Lp]  system text + picture, one row a distinct picture
        |  prefill, then each row repeated for its questions
    suffixes  [B, Ls]  the question, left-padded behind its prefix
        |  prefill
    answers   [B, 1]   one token a step, finished rows dropped

Padding is masked and positions count real tokens only, so a row's answer does not depend on its
neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kd_bench.evals.questions import Settings

__all__ = ["Decoded", "Decoder", "Row"]


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        ids: token ids.
        embeddings: [length, hidden], image features already at their places.
        prefix: number of leading tokens that equal prompts share; 0 for none.
        prefix_key: equal for rows whose prefixes are equal.
    """

    ids: Sequence[int]
    embeddings: Tensor
    prefix: int = 0
    prefix_key: str = ""


@dataclass
class Decoded:
    """What was generated for one row.

    Attributes:
        tokens: generated ids, the end mark included when there was one.
        finished: whether an end mark or a stop string was met within the cap.
        confidence: probability of the first token.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    confidence: float = float("nan")


class Decoder:
    """Greedy decoding with one language model."""

    def __init__(
        self,
        language_model: Any,
        lm_head: Callable[[Tensor], Tensor],
        embed: Callable[[Tensor], Tensor],
        tokenizer: Any,
        end_ids: Sequence[int],
    ) -> None:
        self._language_model = language_model
        self._lm_head = lm_head
        self._embed = embed
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._pieces: dict[int, str] = {}

    def decode(self, rows: Sequence[Row], settings: Settings, share: bool = True) -> list[Decoded]:
        """Answers of rows with equal settings, in order."""
        with torch.inference_mode():
            if share and _worth_sharing(rows):
                state = self._prefill_shared(rows)
            else:
                state = self._prefill(rows)
            return self._continue(state, settings)

    def _prefill(self, rows: Sequence[Row]) -> "_State":
        embeddings, mask = _left_pad([row.embeddings for row in rows])
        cache = DynamicCache(config=self._language_model.config)
        hidden = self._forward(embeddings, mask, cache)
        return _State(cache, mask, self._lm_head(hidden))

    def _prefill_shared(self, rows: Sequence[Row]) -> "_State":
        distinct = {row.prefix_key: row for row in rows}
        places = {key: place for place, key in enumerate(distinct)}
        embeddings, mask = _left_pad(
            [row.embeddings[: row.prefix] for row in distinct.values()]
        )  # [P, Lp, hidden], [P, Lp]
        cache = DynamicCache(config=self._language_model.config)
        self._forward(embeddings, mask, cache)
        which = torch.tensor([places[row.prefix_key] for row in rows], device=mask.device)
        cache.batch_select_indices(which)  # [P, ...] -> [B, ...]
        embeddings, suffix_mask = _left_pad([row.embeddings[row.prefix :] for row in rows])
        mask = torch.cat([mask[which], suffix_mask], dim=1)  # [B, Lp + Ls]
        hidden = self._forward(embeddings, mask, cache)
        return _State(cache, mask, self._lm_head(hidden))

    def _continue(self, state: "_State", settings: Settings) -> list[Decoded]:
        """Append one token a step until every row has ended."""
        results = [Decoded() for _ in range(len(state.mask))]
        active = list(range(len(results)))  # result of each row of the state
        for step in range(settings.max_new_tokens):
            tokens = state.logits.argmax(dim=-1)  # [rows]
            if step == 0:
                best = state.logits.float().softmax(dim=-1).amax(dim=-1)
                for result, probability in zip(results, best.tolist(), strict=True):
                    result.confidence = probability
            going = []
            for row, token in enumerate(tokens.tolist()):
                result = results[active[row]]
                result.tokens.append(token)
                result.finished = token in self._end_ids or self._stopped(result.tokens, settings)
                if not result.finished:
                    going.append(row)
            if not going or step + 1 == settings.max_new_tokens:
                break
            if len(going) < len(active):
                keep = torch.tensor(going, device=tokens.device)
                state.keep(keep)
                tokens = tokens[keep]
                active = [active[row] for row in going]
            ones = state.mask.new_ones(len(active), 1)
            state.mask = torch.cat([state.mask, ones], dim=1)
            hidden = self._forward(self._embed(tokens[:, None]), state.mask, state.cache)
            state.logits = self._lm_head(hidden)
        return results

    def _forward(self, embeddings: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Hidden states of the last column [rows, hidden]; the cache grows."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -embeddings.shape[1] :]
        output = self._language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        last: Tensor = output.last_hidden_state[:, -1]
        return last

    def _stopped(self, tokens: list[int], settings: Settings) -> bool:
        """Whether the newest token completed a stop string."""
        if not settings.until:
            return False
        piece = self._piece(tokens[-1])
        for stop in settings.until:
            # Most tokens cannot end a stop string: look at the text only where one can.
            if stop and stop[-1] in piece:
                window = tokens[-(len(stop.encode()) + 4) :]
                if stop in self._tokenizer.decode(window, skip_special_tokens=True):
                    return True
        return False

    def _piece(self, token: int) -> str:
        if token not in self._pieces:
            self._pieces[token] = self._tokenizer.decode([token], skip_special_tokens=True)
        return self._pieces[token]


@dataclass
class _State:
    """Rows that are being continued.

    Attributes:
        mask: [rows, length so far], 1 for real tokens.
        logits: [rows, vocabulary] of the next token.
    """

    cache: DynamicCache
    mask: Tensor
    logits: Tensor

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


def _worth_sharing(rows: Sequence[Row]) -> bool:
    """Whether enough rows have a prefix in common to pay for a second prefill."""
    if any(row.prefix == 0 or row.prefix >= len(row.ids) for row in rows):
        return False
    alone = sum(len(row.ids) for row in rows)
    distinct = {row.prefix_key: row.prefix for row in rows}
    together = sum(distinct.values()) + sum(len(row.ids) - row.prefix for row in rows)
    return together < 0.85 * alone


def _left_pad(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[rows, longest, hidden] with zeros in front, and the mask [rows, longest]."""
    longest = max(len(part) for part in parts)
    padded = parts[0].new_zeros(len(parts), longest, parts[0].shape[-1])
    mask = torch.zeros(len(parts), longest, dtype=torch.long, device=padded.device)
    for row, part in enumerate(parts):
        padded[row, longest - len(part) :] = part
        mask[row, longest - len(part) :] = 1
    return padded, mask
