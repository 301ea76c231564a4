"""Batched greedy decoding on a KV cache, with a common prefix computed once.

    prefixes  [P, Lp]  system text + image, one row a distinct image
        |  prefill, on a CPU a few rows at a time
    suffixes  [B, Ls]  the question behind its prefix, which is held once for all of them
        |  prefill
    answers   [B, 1]   one token a step, finished rows dropped

Rows are padded behind, where causal attention does not look: no mask, so the fast kernels serve.
Positions count real tokens only, so a row's answer does not depend on its neighbours.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache
from transformers.generation import logits_process as logits

from kd_bench.distill.vision_language import PLAIN_LAYERS
from kd_bench.errors import UsageError, one_line
from kd_bench.evals.benchmark import Settings
from kd_bench.evals.cache import BatchCache, Beginnings, SharedPrefixes, attending, is_plain


@dataclass(frozen=True)
class _Row:
    """What a processor may need to know: prompt tokens, tokens with the answer, end marks."""

    prompt: int
    longest: int
    ends: Tensor

    @property
    def device(self) -> str:
        return str(self.ends.device)


# In the order in which `generate` applies them.
_MAKERS: dict[str, Callable[[Any, _Row], LogitsProcessor]] = {
    "sequence_bias": lambda value, row: logits.SequenceBiasLogitsProcessor(value),
    "repetition_penalty": lambda value, row: logits.RepetitionPenaltyLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, row: logits.NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, row: logits.NoBadWordsLogitsProcessor(value, row.ends),
    "min_length": lambda value, row: logits.MinLengthLogitsProcessor(value, row.ends, row.device),
    "min_new_tokens": lambda value, row: logits.MinNewTokensLengthLogitsProcessor(
        row.prompt, value, row.ends, row.device
    ),
    "forced_bos_token_id": lambda value, row: logits.ForcedBOSTokenLogitsProcessor(value),
    "forced_eos_token_id": lambda value, row: logits.ForcedEOSTokenLogitsProcessor(
        row.longest, value, row.device
    ),
    "remove_invalid_values": lambda value, row: logits.InfNanRemoveLogitsProcessor(),
    "exponential_decay_length_penalty": lambda value, row: logits.ExponentialDecayLengthPenalty(
        tuple(value), row.ends, row.prompt
    ),
    "suppress_tokens": lambda value, row: logits.SuppressTokensLogitsProcessor(value, row.device),
    "begin_suppress_tokens": lambda value, row: logits.SuppressTokensAtBeginLogitsProcessor(
        value, row.prompt, row.device
    ),
}


class Constraints:
    """What a checkpoint's generation_config.json changes about greedy decoding.

    The rule is that of lmms-eval's own models, which call `generate` of transformers: everything
    that acts on the scores of the next token counts (`repetition_penalty`, ...); what only matters
    for sampling (`temperature`, `top_p`, ...) and beams does not.

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

    def of_rows(self, prompts: Sequence[int], new_tokens: int) -> list[LogitsProcessorList]:
        """The processors of rows with that many tokens of prompt."""
        rows = [_Row(prompt, prompt + new_tokens, self._ends) for prompt in prompts]
        return [self._make(list(self.settings), row) for row in rows]

    def _make(self, names: list[str], row: _Row) -> LogitsProcessorList:
        return LogitsProcessorList([_MAKERS[name](self.settings[name], row) for name in names])

    def constrain(
        self, scores: Tensor, rows: Sequence[LogitsProcessorList], ids: Iterable[Any]
    ) -> Tensor:
        """Scores [rows, vocabulary] under the settings, each row as if it were alone.

        Args:
            rows: their processors, from `of_rows`.
            ids: their tokens so far, without padding.
        """
        if not self.settings:
            return scores
        done = []
        for place, (own, tokens) in enumerate(zip(rows, ids, strict=True)):
            tensor = torch.as_tensor(tokens, device=scores.device)[None]
            done.append(own(tensor, scores[place : place + 1].float()))
        return torch.cat(done)


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


PREFILL_ROWS = {"cpu": 8, "cuda": 64}
"""On a CPU the activations of more rows leave its caches; a GPU is busy with so many."""


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        ids: token ids.
        embeddings: [length, hidden], image features already at their places.
        positions: [axes, length]; some families count on several axes.
        prefix: number of leading tokens that equal prompts share; 0 for none.
        prefix_key: equal for rows whose prefixes are equal.
        deep: features that enter deeper layers (DeepStack), [image tokens, hidden] each.
        places: bool [length], where the image tokens are; needed with `deep` only.
    """

    ids: Sequence[int]
    embeddings: Tensor
    positions: Tensor
    prefix: int = 0
    prefix_key: str = ""
    deep: tuple[Tensor, ...] = ()
    places: Tensor | None = None

    def part(self, start: int, end: int) -> "Row":
        """Tokens `start` to `end`; the image tokens must lie wholly inside or outside."""
        inside = start < self.prefix  # it reaches to behind the last image token
        return Row(
            self.ids[start:end],
            self.embeddings[start:end],
            self.positions[:, start:end],
            deep=self.deep if inside else (),
            places=None if self.places is None else self.places[start:end],
        )


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
        self._constraints = constraints or Constraints(None, (), torch.device("cpu"))
        self._piece = functools.cache(self._decoded)
        self._plain = is_plain(language_model)

    def decode(self, rows: Sequence[Row], settings: Settings, share: bool = True) -> list[Decoded]:
        """Answers of rows with equal settings, in order."""
        # Rows near in length stand together: the parts of a batch are padded less.
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
        near = [rows[number] for number in order]
        with torch.inference_mode():
            if self._plain:
                shared = worth_sharing(near) if share else {}
                state = self._prefill(near, settings, shared)
            else:
                state = self._prefill_masked(near)
            found = self._continue(state, near, settings)
        answers = dict(zip(order, found, strict=True))
        return [answers[number] for number in range(len(rows))]

    def _prefill(self, rows: Sequence[Row], settings: Settings, shared: dict[str, Row]) -> "_State":
        """The state behind all prompts.

        Args:
            shared: by prefix key, a row of each prefix that is computed once for all its rows.
        """
        prefixes = None
        begins = [-1] * len(rows)
        if shared:
            numbers = {key: number for number, key in enumerate(shared)}
            begins = [numbers.get(row.prefix_key, -1) if shares(row) else -1 for row in rows]
            own = zip(rows, begins, strict=True)
            rows = [row.part(row.prefix, len(row.ids)) if n >= 0 else row for row, n in own]
            whole = [row.part(0, row.prefix) for row in shared.values()]
            room = self._room(whole, 0)
            for _ in self._fill(room, whole):
                pass
            prefixes = SharedPrefixes(room, [len(row.ids) for row in whole])
        room = self._room(rows, settings.max_new_tokens)
        hidden, positions = zip(*self._fill(room, rows, prefixes, begins), strict=True)
        lengths = [len(row.ids) for row in rows]
        axes = max(map(len, positions))
        return _State(
            room.part(0, len(rows), max(lengths)),
            _padding_mask(lengths, positions[0].device),
            torch.cat([each[:1] for each in positions], dim=1).expand(axes, -1),
            self._lm_head(torch.cat(hidden)),
            prefixes,
            begins,
        )

    def _room(self, rows: Sequence[Row], more: int) -> BatchCache:
        longest = max(len(row.ids) for row in rows) + more
        return BatchCache(self._language_model.config.num_hidden_layers, len(rows), longest)

    def _fill(
        self,
        room: BatchCache,
        rows: Sequence[Row],
        prefixes: SharedPrefixes | None = None,
        begins: Sequence[int] = (),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Prefill; yields last hidden states [some, hidden] and positions [axes, some]."""
        size = PREFILL_ROWS.get(rows[0].embeddings.device.type, len(rows))
        for start in range(0, len(rows), size):
            block = _side_by_side(rows[start : start + size])
            end = start + len(block.last)
            beginnings = None if prefixes is None else prefixes.under(begins[start:end])
            cache = room.part(start, end, 0)
            yield self._forward(block, None, cache, beginnings), block.last_positions()

    def _prefill_masked(self, rows: Sequence[Row]) -> "_State":
        """The same where a layer sees more or less than all tokens before: padded in front."""
        block = _side_by_side(rows, in_front=True)
        mask = _padding_mask([len(row.ids) for row in rows], block.embeddings.device)
        mask = None if mask is None else mask.flip(1)
        cache = DynamicCache(config=self._language_model.config)
        hidden = self._forward(block, mask, cache)
        return _State(cache, mask, block.last_positions(), self._lm_head(hidden))

    def _continue(self, state: "_State", rows: Sequence[Row], settings: Settings) -> list[Decoded]:
        """Append one token a step until every row has ended."""
        results = [Decoded() for _ in rows]
        own = self._constraints.of_rows([len(row.ids) for row in rows], settings.max_new_tokens)
        active = list(range(len(results)))  # result of each row of the state
        for step in range(settings.max_new_tokens):
            ids = ([*rows[row].ids, *results[row].tokens] for row in active)
            scores = self._constraints.constrain(state.logits, [own[row] for row in active], ids)
            best, tokens = scores.max(dim=-1)  # [rows]
            if step == 0:
                chances = scores.float().softmax(dim=-1).amax(dim=-1)
                for result, probability in zip(results, chances.tolist(), strict=True):
                    result.confidence = probability
            going = []
            # One transfer a token: a device is waited for once.
            found = torch.stack([tokens, best.isfinite().to(tokens)], dim=1).tolist()
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
                order = state.keep(going)
                tokens = tokens[torch.tensor(order, device=tokens.device)]
                active = [active[row] for row in order]
            state.grow()
            last = torch.zeros_like(tokens)
            block = _Block(self._embed(tokens[:, None]), state.positions[..., None], last)
            hidden = self._forward(block, state.mask, state.cache, state.beginnings)
            state.logits = self._lm_head(hidden)
        return results

    def _forward(
        self,
        block: "_Block",
        mask: Tensor | None,
        cache: Cache,
        beginnings: Beginnings | None = None,
    ) -> Tensor:
        """Hidden states of each row's last token [rows, hidden]; the cache grows."""
        positions = block.positions  # [axes, rows, columns]
        one = block.embeddings.shape[1] == 1
        last = _last_tokens_alone(self._language_model, None if one else block.last)
        kind = self._language_model.config._attn_implementation
        if one and self._plain and mask is not None and (beginnings or kind == "sdpa"):
            mask = mask[:, None, None].bool()  # as sdpa takes it: nobody asks what is in it
        with attending(self._language_model, beginnings) as more, last:
            output = self._language_model(
                inputs_embeds=block.embeddings,
                attention_mask=mask,
                position_ids=positions[0] if len(positions) == 1 else positions,
                past_key_values=cache,
                use_cache=True,
                **block.deep,
                **more,
            )
        hidden = output.last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, block.last.to(hidden.device)]

    def _stopped(self, tokens: list[int], settings: Settings) -> bool:
        """Whether the newest token completed a stop string."""
        # Most tokens cannot end a stop string: look at the text only where one can.
        near = [stop for stop in settings.until if stop and stop[-1] in self._piece(tokens[-1])]
        windows = (tokens[-(len(stop.encode()) + 4) :] for stop in near)
        return any(
            stop in self._tokenizer.decode(window, skip_special_tokens=True)
            for stop, window in zip(near, windows, strict=True)
        )

    def _decoded(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=True))


@contextlib.contextmanager
def _last_tokens_alone(language_model: Any, last: Tensor | None) -> Iterator[None]:
    """Let the last layer's MLP run at the last token of each row: nothing else is read from it.

    Args:
        last: [rows], their columns; None where there is one.
    """
    layer = getattr(language_model, "layers", [None])[-1]
    plain = type(layer).__name__ in PLAIN_LAYERS and "forward" not in vars(layer.mlp)  # accelerate
    if last is None or not plain:
        yield
        return
    whole = layer.mlp.forward

    def forward(hidden: Tensor) -> Tensor:  # [rows, columns, width]
        at = (torch.arange(len(hidden), device=hidden.device), last.to(hidden.device))
        hidden[at] = whole(hidden[at])
        return hidden

    layer.mlp.forward = forward
    try:
        yield
    finally:
        del layer.mlp.forward


@dataclass
class _State:
    """Rows that are being continued.

    Attributes:
        mask: [rows, length so far], 1 for real tokens; None where there is no padding.
        positions: of the newest token [axes, rows].
        logits: [rows, vocabulary] of the next token.
        begins: which of the prefixes each row begins with, -1 for none.
    """

    cache: Cache
    mask: Tensor | None
    positions: Tensor
    logits: Tensor
    prefixes: SharedPrefixes | None = None
    begins: Sequence[int] = ()
    beginnings: Beginnings | None = None

    def __post_init__(self) -> None:
        if self.prefixes is not None:
            self.beginnings = self.prefixes.under(self.begins)

    def keep(self, going: Sequence[int]) -> list[int]:
        """Drop all other rows; returns which old row now stands at each place."""
        device = self.positions.device
        if isinstance(self.cache, BatchCache):
            order = self.cache.keep(going)
        else:
            order = list(going)
            self.cache.batch_select_indices(torch.tensor(order, device=device))
        rows = torch.tensor(order, device=device)
        self.mask = None if self.mask is None else self.mask[rows]
        self.positions = self.positions[:, rows]
        if self.prefixes is not None:
            self.begins = [self.begins[row] for row in order]
            self.beginnings = self.prefixes.under(self.begins)
        return order

    def grow(self) -> None:
        """Make place for one more token."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions + 1


@dataclass
class _Block:
    """Rows side by side.

    Attributes:
        embeddings: [rows, longest, hidden].
        positions: [axes, rows, longest].
        last: [rows], the column of the last real token.
        deep: arguments of language models that take image features at deeper layers.
    """

    embeddings: Tensor
    positions: Tensor
    last: Tensor
    deep: dict[str, Any] = field(default_factory=dict)

    def last_positions(self) -> Tensor:
        """Where the newest token stands [axes, rows]; the next one stands behind the furthest."""
        furthest = self.positions.amax(dim=(0, 2))  # [rows]
        return furthest.expand(len(self.positions), -1)


def _side_by_side(rows: Sequence[Row], in_front: bool = False) -> _Block:
    """The rows, padded behind or in front."""
    lengths = [len(row.ids) for row in rows]
    longest = max(lengths)
    like = rows[0].embeddings
    axes = max(len(row.positions) for row in rows)
    embeddings = like.new_zeros(len(rows), longest, like.shape[-1])
    positions = like.new_zeros(axes, len(rows), longest, dtype=torch.long)
    places = like.new_zeros(len(rows), longest, dtype=torch.bool)
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = longest - length if in_front else 0
        embeddings[number, start : start + length] = row.embeddings
        positions[:, number, start : start + length] = row.positions
        if row.deep and row.places is not None:
            places[number, start : start + length] = row.places
    ends = [longest] * len(rows) if in_front else lengths
    block = _Block(embeddings, positions, torch.tensor(ends, device=like.device) - 1)
    if layers := list(zip(*(row.deep for row in rows if row.deep), strict=True)):
        block.deep = {
            "visual_pos_masks": places,
            "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
        }
    return block


def _padding_mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """[rows, longest], 1 for real tokens in front of the padding; None where there is none."""
    if min(lengths) == max(lengths):
        return None
    columns = torch.arange(max(lengths), device=device)
    return (columns < torch.tensor(lengths, device=device)[:, None]).long()


def shares(row: Any) -> bool:
    """Whether it has a prefix with something behind it."""
    return 0 < row.prefix < len(row.ids)


def worth_sharing(rows: Sequence[Any]) -> dict[str, Any]:
    """By its key, a row of each prefix; empty unless enough rows share one to pay for two prefills.

    A row without an image, or with nothing behind it, is prefilled whole beside the others.

    Args:
        rows: with `ids`, `prefix` and `prefix_key`, as `Row` has them.
    """
    sharing = [row for row in rows if shares(row)]
    counts = Counter(row.prefix_key for row in sharing)
    distinct = {row.prefix_key: row for row in sharing}
    saved = sum(row.prefix for row in sharing) - sum(row.prefix for row in distinct.values())
    if saved <= 0.15 * sum(len(row.ids) for row in rows):
        return {}
    # Prefixes of equal length and as many rows lie side by side: one product serves them.
    order = sorted(distinct.items(), key=lambda item: (item[1].prefix, counts[item[0]]))
    return dict(order)


class PlainDecoder:
    """`generate` of transformers on left-padded batches, for families that allow nothing quicker.

    Args:
        ends: tokens that end an answer.
        constraints: what the checkpoint's generation settings do to the scores.
    """

    def __init__(
        self, model: Any, tokenizer: Any, ends: Sequence[int], constraints: Constraints
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._ends = list(ends)
        self._constraints = constraints

    def decode(
        self, inputs: dict[str, Any], settings: Settings, share: bool = False
    ) -> list[Decoded]:
        """Answers in order; stop strings end a row, probabilities are not given.

        Args:
            inputs: of the model, padded in front, [rows, longest] each.
            share: has no meaning here.
        """
        del share
        options: dict[str, Any] = {}
        if settings.until:
            options = {"stop_strings": list(settings.until), "tokenizer": self._tokenizer}
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
        pad = self._tokenizer.pad_token_id
        self._model.generation_config = GenerationConfig(
            eos_token_id=self._ends or None,
            bos_token_id=kept.bos_token_id,
            pad_token_id=pad if pad is not None else (self._ends or [0])[0],
        )
        try:
            yield
        finally:
            self._model.generation_config = kept

    def _decoded(self, tokens: list[int], settings: Settings) -> Decoded:
        """One row without the padding behind its end."""
        for place, token in enumerate(tokens):
            if token in self._ends:
                return Decoded(tokens[: place + 1], finished=True)
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        stopped = any(stop in text for stop in settings.until if stop)
        return Decoded(tokens, finished=stopped)


class _RowByRow(LogitsProcessor):
    """Applies a checkpoint's generation settings to each row as if it were alone.

    Attributes:
        broken: rows whose scores were not finite.
    """

    def __init__(self, mask: Tensor, constraints: Constraints, new_tokens: int) -> None:
        self._starts = (mask != 0).int().argmax(dim=1).tolist()  # first real token of each row
        self._constraints = constraints
        prompts = [mask.shape[1] - start for start in self._starts]
        self._own = constraints.of_rows(prompts, new_tokens)
        self.broken: set[int] = set()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [rows, vocabulary]."""
        ids = (row[start:] for row, start in zip(input_ids, self._starts, strict=True))
        found = self._constraints.constrain(scores, self._own, ids)
        unsound = ~found.amax(dim=-1).isfinite()
        self.broken.update(unsound.nonzero().flatten().tolist())
        return found
