"""Keys and values of a batch: buffers that are allocated once, prefixes that are held once.

    prefixes  [P, key heads, Lp, head size]   one a distinct image, for all questions about it
    own       [B, key heads, Lo, head size]   what each row has behind its prefix

A row attends to the two parts one after the other; their sums are joined as in FlashAttention
(arXiv 2205.14135), which gives what one softmax over both gives. vLLM shares blocks of a prefix in
the same way (arXiv 2309.06180). All rows are padded behind: causal attention hides what follows.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask


def is_plain(language_model: Any) -> bool:
    """Whether each token attends to all before it and to nothing else, in every layer.

    No sliding windows, no recurrent states, no tokens that look ahead, no capped scores; and an
    attention that `attend` can stand in for.
    """
    config = language_model.config
    causal = getattr(config, "is_causal", True)
    ahead = getattr(config, "use_bidirectional_attention", None)
    capped = getattr(config, "attn_logit_softcapping", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if not causal or ahead or capped or kinds:
        return False
    if not type(language_model)._supports_attention_backend:
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


class BatchCache(Cache):
    """Keys and values of the rows of a batch.

    transformers' own layers join old and new tensors at every token, which copies the whole cache;
    and a batch that is prefilled a few rows at a time would have to be joined again.

    Args:
        layers: of the language model.
        rows: questions, or prefixes.
        columns: most tokens of a row.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        super().__init__(layers=[_Part([], (rows, columns), 0, rows, 0) for _ in range(layers)])

    def part(self, start: int, end: int, filled: int) -> "BatchCache":
        """Some rows, of which the first columns count as filled; the buffers stay the same."""
        part = BatchCache(0, 0, 0)
        part.layers = [_Part(each.buffer, each.size, start, end, filled) for each in self.layers]
        return part

    def keep(self, going: Sequence[int]) -> list[int]:
        """Drop all other rows of a whole batch; returns which old row now lies at each place.

        Only rows from the end move, into the places that became free.
        """
        order = list(range(len(going)))
        free = sorted(set(order) - set(going))
        moving = [row for row in going if row >= len(order)]
        for place, row in zip(free, moving, strict=True):
            order[place] = row
        into, out_of = torch.tensor(free), torch.tensor(moving)
        for layer in self.layers:
            layer.end = len(order)
            if moving and into.device != layer.buffer[0].device:  # layers may lie on several
                into, out_of = (rows.to(layer.buffer[0].device) for rows in (into, out_of))
            for each in layer.buffer if moving else ():
                filled = each[:, :, : layer.get_seq_length()]
                filled[into] = filled[out_of]
        return order


class _Part(DynamicLayer):
    """Some rows of one layer's buffer, the way transformers' attention sees a layer of a cache.

    Attributes:
        buffer: keys and values, [rows, heads, columns, head size] each, shared by all parts;
            empty until the first ones show their sizes.
        end: behind its last row.
    """

    def __init__(
        self, buffer: list[Tensor], size: tuple[int, int], start: int, end: int, filled: int
    ) -> None:
        super().__init__()
        self.buffer = buffer
        self.size = size
        self.end = end
        self._start = start
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
        start, self._filled = self._filled, self._filled + key_states.shape[2]
        keys, values = (each[self._start : self.end] for each in self.buffer)
        keys[:, :, start : self._filled] = key_states
        values[:, :, start : self._filled] = value_states
        self.keys, self.values = keys[:, :, : self._filled], values[:, :, : self._filled]
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Filled columns, padding included."""
        return self._filled


# Prefixes that rows share


@dataclass(frozen=True)
class _Block:
    """Prefixes of one length that lie side by side, and the rows that begin with them.

    Attributes:
        prefixes: which they are; each has `width` places for rows.
        indices: the row at each place [prefixes x width], where a prefix has fewer rows any of
            them; the rows, each once; and their places.
    """

    prefixes: slice
    length: int
    width: int
    indices: tuple[Tensor, ...]


class SharedPrefixes:
    """The prefixes of a batch.

    Args:
        cache: their keys and values.
        lengths: tokens of each.
    """

    def __init__(self, cache: BatchCache, lengths: Sequence[int]) -> None:
        self._cache = cache
        self._lengths = lengths

    def under(self, prefix_of_row: Sequence[int]) -> "Beginnings":
        """How some rows begin; a row of the prefix -1 has none."""
        rows_of: dict[int, list[int]] = {}
        for row, prefix in enumerate(prefix_of_row):
            rows_of.setdefault(prefix, []).append(row)
        rows_of.pop(-1, None)
        runs: list[list[int]] = []
        for prefix in sorted(rows_of):
            run = [*runs[-1], prefix] if runs else [prefix]
            counts = [len(rows_of[each]) for each in run]
            equal = self._lengths[run[0]] == self._lengths[prefix]
            # Side by side, and not much of the block empty.
            if (
                run[-2:] == [prefix - 1, prefix]
                and equal
                and max(counts) * len(run) < 1.5 * sum(counts)
            ):
                runs[-1] = run
            else:
                runs.append([prefix])
        return Beginnings(self._cache, [self._block(run, rows_of) for run in runs])

    def _block(self, run: list[int], rows_of: dict[int, list[int]]) -> _Block:
        width = max(len(rows_of[prefix]) for prefix in run)
        device = self._cache.layers[0].buffer[0].device
        rows: list[int] = []
        own: list[int] = []
        places: list[int] = []
        for number, prefix in enumerate(run):
            those = rows_of[prefix]
            own += those
            places += range(number * width, number * width + len(those))
            rows += those + those[:1] * (width - len(those))
        indices = tuple(torch.tensor(each, device=device) for each in (rows, own, places))
        return _Block(slice(run[0], run[-1] + 1), self._lengths[run[0]], width, indices)


class Beginnings:
    """What the rows of one forward pass attend to before their own tokens."""

    def __init__(self, cache: BatchCache, blocks: Sequence[_Block]) -> None:
        self._layers = cache.layers
        self._blocks = blocks
        self.seen = False

    def sums(self, layer: int, query: Tensor, scaling: float) -> Iterator[tuple[Tensor, Any]]:
        """Rows and their `_sums` over the prefixes.

        Args:
            query: [rows, key heads, queries, head size].
        """
        self.seen = True
        keys, values = self._layers[layer].buffer
        for block in self._blocks:
            rows, own, places = (each.to(query.device) for each in block.indices)
            asked = query[rows].unflatten(0, (-1, block.width)).transpose(1, 2)
            shape = asked.shape  # [prefixes, key heads, width, queries, head size]
            part = (block.prefixes, slice(None), slice(block.length))
            found = _sums(asked.flatten(2, 3), keys[part], values[part], scaling)
            apart = (each.unflatten(2, shape[2:4]).transpose(1, 2).flatten(0, 1) for each in found)
            yield own, tuple(each[places] for each in apart)


def _sums(
    query: Tensor, keys: Tensor, values: Tensor, scaling: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """An attention's parts before its division: weighted values, weights, largest score.

    Args:
        query: [..., queries, head size].
        mask: bool, broadcast to the scores; False hides.
    """
    scores = (query @ keys.transpose(-1, -2)).float().mul_(scaling)
    if mask is not None:
        scores = scores.masked_fill_(~mask, torch.finfo(torch.float32).min)
    largest = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    return (weights.to(values.dtype) @ values).float(), weights.sum(-1, keepdim=True), largest


_NOT_PLAIN = ("softcap", "sliding_window", "s_aux", "position_bias")


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    beginnings: Beginnings | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention over prefixes and own tokens, as transformers calls it.

    Args:
        query: [rows, heads, queries, head size].
        key, value: of the rows' own tokens, [rows, key heads, columns, head size].
        attention_mask: bool [rows, 1, queries, columns]; None for plain causal.

    Returns:
        [rows, queries, heads, head size].
    """
    if beginnings is None:
        raise RuntimeError(f"{type(module).__name__} does not hand on what its attention needs")
    if strange := [name for name in _NOT_PLAIN if more.get(name) is not None]:
        raise RuntimeError(f"attention of {type(module).__name__} has {strange[0]}")
    rows, heads, queries, size = query.shape
    scale = size**-0.5 if scaling is None else scaling
    each_key = heads // key.shape[1]
    if attention_mask is None and queries > 1:
        attention_mask = query.new_ones(queries, key.shape[2], dtype=torch.bool).tril()[None, None]
    if attention_mask is not None:
        attention_mask = attention_mask.repeat(1, 1, each_key, 1)
    # Heads that read the same keys lie side by side: the keys need not be repeated.
    folded = query.reshape(rows, key.shape[1], each_key * queries, size)
    values, weights, largest = _sums(folded, key, value, scale, attention_mask)
    for those, (more, weight, top) in beginnings.sums(module.layer_idx, folded, scale):
        highest = torch.maximum(largest[those], top)
        old, new = (largest[those] - highest).exp_(), (top - highest).exp_()
        values[those] = values[those] * old + more * new
        weights[those] = weights[those] * old + weight * new
    made = (values / weights).to(query.dtype).view(rows, heads, queries, size)
    return made.transpose(1, 2).contiguous(), None


_NAME = "kd_bench_prefixes"
AttentionInterface.register(_NAME, attend)
AttentionMaskInterface.register(_NAME, sdpa_mask)


@contextlib.contextmanager
def attending(language_model: Any, beginnings: Beginnings | None) -> Iterator[dict[str, Any]]:
    """Let the language model's attention see the beginnings; yields what its forward is given."""
    if beginnings is None:
        yield {}
        return
    config = language_model.config
    usual = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield {"beginnings": beginnings}
    finally:
        config._attn_implementation = usual
    if not beginnings.seen:
        raise RuntimeError(f"{type(language_model).__name__} has an attention of its own")
