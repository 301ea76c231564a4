"""Batched greedy decoding on a KV cache, with a common prefix computed once.

    prefixes  [P, Lp]  system text + image, one row a distinct image
        |  prefill, then each row copied to its questions' places in the cache of the batch
    suffixes  [B, Ls]  the question, left-padded behind its prefix
        |  prefill, on a CPU a few rows at a time
    answers   [B, 1]   one token a step, finished rows dropped

Padding is masked and positions count real tokens only, so a row's answer does not depend on its
neighbours.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import logits_process as logits

from kd_bench.errors import UsageError, one_line
from kd_bench.evals.benchmark import Settings


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


def grows_by_column(cache: DynamicCache) -> bool:
    """Whether every layer keeps every token: no sliding windows, no recurrent states."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


class BatchCache(Cache):
    """Keys and values of one batch in buffers that are allocated once.

    transformers' own layers join old and new tensors at every token, which copies the whole cache;
    and a batch that is prefilled a few rows at a time would have to be joined again.

    Args:
        layers: of the language model.
        rows: questions.
        columns: tokens of the longest prompt and of its answer.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        super().__init__(layers=[_Part([], (rows, columns), slice(None), 0) for _ in range(layers)])

    def put(self, prefixes: DynamicCache, which: Tensor) -> None:
        """Let row n begin with what prefix `which[n]` left behind."""
        for layer, prefix in zip(self.layers, prefixes.layers, strict=True):
            layer.update(prefix.keys[which], prefix.values[which])

    def part(self, rows: slice, filled: int) -> Cache:
        """Some rows, of which the first columns count as filled; the buffers stay the same."""
        return Cache(layers=[_Part(each.buffer, each.size, rows, filled) for each in self.layers])


class _Part(DynamicLayer):
    """Some rows of one layer's buffer, the way transformers' attention sees a layer of a cache.

    Attributes:
        buffer: keys and values, [rows, heads, columns, head size] each, shared by all parts;
            empty until the first ones show their sizes.
    """

    def __init__(
        self, buffer: list[Tensor], size: tuple[int, int], rows: slice, filled: int
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self.size = size
        self._rows = rows
        self._filled = filled
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, new, head size] behind what is filled; all filled columns."""
        if not self.buffer:
            rows, columns = self.size
            # Zeros: columns that no token takes are masked, and a masked NaN would still be one.
            self.buffer.extend(
                like.new_zeros(rows, like.shape[1], columns, like.shape[3])
                for like in (key_states, value_states)
            )
        keys, values = self.buffer
        start, self._filled = self._filled, self._filled + key_states.shape[2]
        keys[self._rows, :, start : self._filled] = key_states
        values[self._rows, :, start : self._filled] = value_states
        self.keys = keys[self._rows, :, : self._filled]
        self.values = values[self._rows, :, : self._filled]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Filled columns, padding included."""
        return self._filled

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the whole buffer."""
        self.buffer[:] = [each[indices] for each in self.buffer]


PREFILL_ROWS = {"cpu": 8}
"""On a CPU the activations of more rows leave its caches; a GPU takes the whole batch."""


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
        inside = self.places is not None and bool(self.places[start:end].any())
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
        first = DynamicCache(config=self._language_model.config)
        device = rows[0].embeddings.device
        before = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
        which = None
        if share:
            distinct = {row.prefix_key: row for row in rows}
            places = {key: place for place, key in enumerate(distinct)}
            which = torch.tensor([places[row.prefix_key] for row in rows], device=device)  # [B]
            prefixes = _side_by_side([row.part(0, row.prefix) for row in distinct.values()])
            self._forward(prefixes, prefixes.mask, first)
            before = prefixes.mask[which]  # [B, Lp]
            rows = [row.part(row.prefix, len(row.ids)) for row in rows]
        width = before.shape[1] + max(len(row.ids) for row in rows)
        mask = torch.cat([before, before.new_zeros(len(rows), width - before.shape[1])], dim=1)
        whole: BatchCache | None = None
        size = len(rows)
        if grows_by_column(first):
            whole = BatchCache(len(first.layers), len(rows), width + settings.max_new_tokens)
            size = PREFILL_ROWS.get(device.type, size)
        if which is not None and whole is None:
            first.batch_select_indices(which)
        elif which is not None and whole is not None:
            whole.put(first, which)
        hidden, positions = [], []
        for part in (slice(start, start + size) for start in range(0, len(rows), size)):
            block = _side_by_side(rows[part])
            start = width - block.mask.shape[1]
            mask[part, start:] = block.mask
            cache = first if whole is None else whole.part(part, start)
            hidden.append(self._forward(block, mask[part], cache))
            positions.append(block.last_positions())
        axes = max(map(len, positions))
        return _State(
            first if whole is None else whole.part(slice(None), width),
            mask,
            torch.cat([each[:1] for each in positions], dim=1).expand(axes, -1),
            self._lm_head(torch.cat(hidden)),
        )

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
            ones = state.mask.new_ones(len(tokens), 1)
            state.mask = torch.cat([state.mask, ones], dim=1)
            state.positions = state.positions + 1
            block = _Block(self._embed(tokens[:, None]), state.positions[..., None], ones)
            state.logits = self._lm_head(self._forward(block, state.mask, state.cache))
        return results

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
        return output.last_hidden_state[:, -1]

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


@dataclass
class _Block:
    """Rows side by side.

    Attributes:
        embeddings: [rows, longest, hidden].
        positions: [axes, rows, longest].
        mask: [rows, longest], 1 for real tokens.
        deep: arguments of language models that take image features at deeper layers.
    """

    embeddings: Tensor
    positions: Tensor
    mask: Tensor
    deep: dict[str, Any] = field(default_factory=dict)

    def last_positions(self) -> Tensor:
        """Where the newest token stands [axes, rows]; the next one stands behind the furthest."""
        furthest = self.positions.amax(dim=(0, 2))  # [rows]
        return furthest.expand(len(self.positions), -1)


def _side_by_side(rows: Sequence[Row]) -> _Block:
    """The rows padded in front."""
    longest = max(len(row.ids) for row in rows)
    like = rows[0].embeddings
    axes = max(len(row.positions) for row in rows)
    embeddings = like.new_zeros(len(rows), longest, like.shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=like.device)
    positions = mask.new_zeros(axes, len(rows), longest)
    places = mask.new_zeros(mask.shape, dtype=torch.bool)
    for number, row in enumerate(rows):
        start = longest - len(row.ids)
        embeddings[number, start:] = row.embeddings
        positions[:, number, start:] = row.positions
        mask[number, start:] = 1
        if row.deep and row.places is not None:
            places[number, start:] = row.places
    block = _Block(embeddings, positions, mask)
    if layers := list(zip(*(row.deep for row in rows if row.deep), strict=True)):
        block.deep = {
            "visual_pos_masks": places,
            "deepstack_visual_embeds": [torch.cat(layer) for layer in layers],
        }
    return block


def _worth_sharing(rows: Sequence[Row]) -> bool:
    """Whether enough rows have a prefix in common to pay for a second prefill."""
    if any(row.prefix == 0 or row.prefix >= len(row.ids) for row in rows):
        return False
    alone = sum(len(row.ids) for row in rows)
    distinct = {row.prefix_key: row.prefix for row in rows}
    together = sum(distinct.values()) + sum(len(row.ids) - row.prefix for row in rows)
    return together < 0.85 * alone


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
