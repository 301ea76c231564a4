"""Batched greedy decoding on a KV cache, with a common prefix computed once.

    prefixes  [P, Lp]  system text + picture, one row a distinct picture
        |  prefill, then each row copied to its questions' places in the cache of the batch
    suffixes  [B, Ls]  the question, left-padded behind its prefix
        |  prefill, on a processor a few rows at a time
    answers   [B, 1]   one token a step, finished rows dropped

Padding is masked and positions count real tokens only, so a row's answer does not depend on its
neighbours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kd_bench.evals.cache import BatchCache, grows_by_column
from kd_bench.evals.constraints import Constraints
from kd_bench.evals.questions import Settings

PREFILL_ROWS = {"cpu": 8}
"""On a processor the activations of more rows leave its caches; a GPU takes the whole batch."""


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        ids: token ids.
        embeddings: [length, hidden], image features already at their places.
        prefix: number of leading tokens that equal prompts share; 0 for none.
        prefix_key: equal for rows whose prefixes are equal.
        positions: [axes, length] where a family counts them its own way; None counts tokens.
        deep: features that enter deeper layers (DeepStack), [image tokens, hidden] each.
        places: bool [length], where the image tokens are; needed with `deep` only.
    """

    ids: Sequence[int]
    embeddings: Tensor
    prefix: int = 0
    prefix_key: str = ""
    positions: Tensor | None = None
    deep: tuple[Tensor, ...] = ()
    places: Tensor | None = None

    def part(self, start: int, end: int) -> "Row":
        """Tokens `start` to `end`; the image tokens must lie wholly inside or outside."""
        positions = self.counted()[:, start:end]
        inside = self.places is not None and bool(self.places[start:end].any())
        return Row(
            self.ids[start:end],
            self.embeddings[start:end],
            positions=positions,
            deep=self.deep if inside else (),
            places=None if self.places is None else self.places[start:end],
        )

    def counted(self) -> Tensor:
        """Positions [axes, length]."""
        if self.positions is not None:
            return self.positions
        return torch.arange(len(self.ids), device=self.embeddings.device)[None]


@dataclass
class Decoded:
    """What was generated for one row.

    Attributes:
        tokens: generated ids, the end mark included when there was one.
        finished: whether an end mark or a stop string was met within the cap.
        confidence: probability of the first token.
        broken: the scores were not finite, so there is no next token.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    confidence: float = float("nan")
    broken: bool = False


class Decoder:
    """Greedy decoding with one language model."""

    def __init__(
        self,
        language_model: Any,
        lm_head: Callable[[Tensor], Tensor],
        embed: Callable[[Tensor], Tensor],
        tokenizer: Any,
        end_ids: Sequence[int],
        constraints: Constraints | None = None,
    ) -> None:
        self._language_model = language_model
        self._lm_head = lm_head
        self._embed = embed
        self._tokenizer = tokenizer
        self._end_ids = frozenset(end_ids)
        self._constraints = constraints if constraints and constraints.settings else None
        self._pieces: dict[int, str] = {}

    def decode(self, rows: Sequence[Row], settings: Settings, share: bool = True) -> list[Decoded]:
        """Answers of rows with equal settings, in order."""
        # Rows near in length stand together: the parts of a batch are padded less.
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
        near = [rows[number] for number in order]
        with torch.inference_mode():
            state = self._prefill(near, settings, share and _worth_sharing(rows))
            found = self._continue(state, near, settings)
        answers = dict(zip(order, found, strict=True))
        return [answers[number] for number in range(len(rows))]

    def _prefill(self, rows: Sequence[Row], settings: Settings, share: bool) -> "_State":
        """The state behind all prompts; with `share` each distinct prefix is computed once."""
        first = self._new_cache()
        device = rows[0].embeddings.device
        lead = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
        which = None
        if share:
            prefixes, which = _distinct_prefixes(rows)
            self._forward(prefixes, prefixes.mask, first)
            lead = prefixes.mask[which]  # [B, Lp]
            rows = [row.part(row.prefix, len(row.ids)) for row in rows]
        width = lead.shape[1] + max(len(row.ids) for row in rows)
        mask = torch.cat([lead, lead.new_zeros(len(rows), width - lead.shape[1])], dim=1)
        if not grows_by_column(first):
            if which is not None:
                first.batch_select_indices(which)
            hidden, positions = self._prefill_part(rows, mask, lambda _: first)
            return _State(first, mask, positions, self._lm_head(hidden))
        whole = BatchCache(len(first.layers), len(rows), width + settings.max_new_tokens)
        if which is not None:
            whole.put(first, which)
        size = PREFILL_ROWS.get(device.type, len(rows))
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        done = [
            self._prefill_part(rows[part], mask[part], partial(whole.part, part)) for part in parts
        ]
        hidden = torch.cat([hidden for hidden, _ in done])
        axes = max(len(positions) for _, positions in done)
        positions = torch.cat([positions[:1] for _, positions in done], dim=1).expand(axes, -1)
        return _State(whole.part(slice(None), width), mask, positions, self._lm_head(hidden))

    def _prefill_part(
        self, rows: Sequence[Row], mask: Tensor, cache: Callable[[int], Cache]
    ) -> tuple[Tensor, Tensor]:
        """Last hidden states [rows, hidden] and positions [axes, rows]; fills in the mask.

        Args:
            cache: gives the cache to fill from a column on.
        """
        block = _Block(rows)
        start = mask.shape[1] - block.mask.shape[1]
        mask[:, start:] = block.mask
        return self._forward(block, mask, cache(start)), block.last_positions()

    def _new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._language_model.config)

    def _continue(self, state: "_State", rows: Sequence[Row], settings: Settings) -> list[Decoded]:
        """Append one token a step until every row has ended."""
        results = [Decoded() for _ in rows]
        constrain = self._constrained(rows, settings)
        active = list(range(len(results)))  # result of each row of the state
        for step in range(settings.max_new_tokens):
            scores = constrain(state.logits, [(row, results[row].tokens) for row in active])
            best, tokens = scores.max(dim=-1)  # [rows]
            if step == 0:
                chances = scores.float().softmax(dim=-1).amax(dim=-1)
                for result, probability in zip(results, chances.tolist(), strict=True):
                    result.confidence = probability
            going = []
            found = zip(tokens.tolist(), best.isfinite().tolist(), strict=True)
            for row, (token, sound) in enumerate(found):
                result = results[active[row]]
                if not sound:
                    result.broken = True
                    continue
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
            state.logits = self._lm_head(self._step(state, tokens))
        return results

    def _constrained(
        self, rows: Sequence[Row], settings: Settings
    ) -> Callable[[Tensor, list[tuple[int, list[int]]]], Tensor]:
        """Scores [active, vocabulary] under the checkpoint's own generation settings.

        What is returned takes the logits and, for each of their rows, its number among all rows and
        what was generated for it.
        """
        constraints = self._constraints
        if constraints is None:
            return lambda logits, _: logits
        own = [constraints.for_row(len(row.ids), settings.max_new_tokens) for row in rows]

        def constrain(logits: Tensor, active: list[tuple[int, list[int]]]) -> Tensor:
            scores = logits.float()
            done = []
            for place, (row, tokens) in enumerate(active):
                ids = torch.tensor([[*rows[row].ids, *tokens]], device=scores.device)
                done.append(own[row](ids, scores[place : place + 1]))
            return torch.cat(done)

        return constrain

    def _step(self, state: "_State", tokens: Tensor) -> Tensor:
        """Hidden states [rows, hidden] behind one more token a row."""
        ones = state.mask.new_ones(len(tokens), 1)
        state.mask = torch.cat([state.mask, ones], dim=1)
        state.positions = state.positions + 1
        block = _Block([], self._embed(tokens[:, None]), state.positions[..., None], ones)
        return self._forward(block, state.mask, state.cache)

    def _forward(self, block: "_Block", mask: Tensor, cache: Cache) -> Tensor:
        """Hidden states of the last column [rows, hidden]; the cache grows."""
        positions = block.positions  # [axes, rows, columns]
        output = self._language_model(
            inputs_embeds=block.embeddings,
            attention_mask=mask,
            position_ids=positions[0] if len(positions) == 1 else positions,
            past_key_values=cache,
            use_cache=True,
            **block.deep,
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
        positions: of the newest token [axes, rows].
        logits: [rows, vocabulary] of the next token.
    """

    cache: Cache
    mask: Tensor
    positions: Tensor
    logits: Tensor

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]
        self.positions = self.positions[:, rows]


class _Block:
    """Rows side by side, padded in front.

    Attributes:
        embeddings: [rows, longest, hidden].
        positions: [axes, rows, longest].
        mask: [rows, longest], 1 for real tokens.
        deep: arguments of language models that take image features at deeper layers.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        embeddings: Tensor | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        self.deep: dict[str, Any] = {}
        if embeddings is not None and positions is not None and mask is not None:
            self.embeddings, self.positions, self.mask = embeddings, positions, mask
            return
        longest = max(len(row.ids) for row in rows)
        like = rows[0].embeddings
        axes = max(len(row.counted()) for row in rows)
        self.embeddings = like.new_zeros(len(rows), longest, like.shape[-1])
        self.mask = torch.zeros(len(rows), longest, dtype=torch.long, device=like.device)
        self.positions = self.mask.new_zeros(axes, len(rows), longest)
        for number, row in enumerate(rows):
            start = longest - len(row.ids)
            self.embeddings[number, start:] = row.embeddings
            self.positions[:, number, start:] = row.counted()
            self.mask[number, start:] = 1
        self._collect_deep(rows, longest)

    def _collect_deep(self, rows: Sequence[Row], longest: int) -> None:
        with_deep = [row for row in rows if row.deep]
        if not with_deep:
            return
        places = self.mask.new_zeros(self.mask.shape, dtype=torch.bool)
        for number, row in enumerate(rows):
            if row.deep and row.places is not None:
                places[number, longest - len(row.ids) :] = row.places
        layers = zip(*(row.deep for row in with_deep), strict=True)
        self.deep = {
            "visual_pos_masks": places,
            "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
        }

    def last_positions(self) -> Tensor:
        """Where the newest token stands [axes, rows]; the next one stands behind the furthest."""
        furthest = self.positions.amax(dim=(0, 2))  # [rows]
        return furthest.expand(len(self.positions), -1)


def _distinct_prefixes(rows: Sequence[Row]) -> tuple[_Block, Tensor]:
    """Each distinct prefix once, and which of them every row begins with [B]."""
    distinct = {row.prefix_key: row for row in rows}
    places = {key: place for place, key in enumerate(distinct)}
    block = _Block([row.part(0, row.prefix) for row in distinct.values()])
    which = torch.tensor([places[row.prefix_key] for row in rows], device=block.mask.device)
    return block, which


def _worth_sharing(rows: Sequence[Row]) -> bool:
    """Whether enough rows have a prefix in common to pay for a second prefill."""
    if any(row.prefix == 0 or row.prefix >= len(row.ids) for row in rows):
        return False
    alone = sum(len(row.ids) for row in rows)
    distinct = {row.prefix_key: row.prefix for row in rows}
    together = sum(distinct.values()) + sum(len(row.ids) - row.prefix for row in rows)
    return together < 0.85 * alone
