"""Keys and values of a batch of questions, in room that is set aside once.

transformers' own layers join old and new tensors at every token, which copies the whole cache; and
a batch that is prefilled a few rows at a time would have to be joined again.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer


def grows_by_column(cache: DynamicCache) -> bool:
    """Whether every layer keeps every token: no sliding windows, no recurrent states."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)


class BatchCache(Cache):
    """The cache of one batch; `part` gives a few of its rows to the language model.

    Args:
        layers: of the language model.
        rows: questions.
        columns: tokens of the longest prompt and of its answer.
    """

    def __init__(self, layers: int, rows: int, columns: int) -> None:
        rooms = [_Room(rows, columns) for _ in range(layers)]
        super().__init__(layers=[_RoomLayer(room, slice(None), 0) for room in rooms])

    def put(self, prefixes: DynamicCache, which: Tensor) -> None:
        """Let row n begin with what prefix `which[n]` left behind."""
        for layer, prefix in zip(self.layers, prefixes.layers, strict=True):
            layer.update(prefix.keys[which], prefix.values[which])

    def part(self, rows: slice, filled: int) -> Cache:
        """Some rows, of which the first columns count as filled; the room stays the same."""
        return Cache(layers=[layer.part(rows, filled) for layer in self.layers])


class _Room:
    """Room of one layer, [rows, heads, columns, head size] for keys and for values."""

    def __init__(self, rows: int, columns: int) -> None:
        self._rows = rows
        self._columns = columns
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def for_like(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, set aside when the first ones show their sizes."""
        if self.keys is None or self.values is None:
            # Zeros: columns that no token takes are masked, and a masked NaN would still be one.
            self.keys, self.values = (
                like.new_zeros(self._rows, like.shape[1], self._columns, like.shape[3])
                for like in (keys, values)
            )
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class _RoomLayer(DynamicLayer):
    """Some rows of a room, the way transformers' attention sees a layer of a cache."""

    def __init__(self, room: _Room, rows: slice, filled: int) -> None:
        super().__init__()
        self._room = room
        self._rows = rows
        self._filled = filled
        self.is_initialized = True

    def part(self, rows: slice, filled: int) -> "_RoomLayer":
        """Other rows of the same room."""
        return _RoomLayer(self._room, rows, filled)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [rows, heads, new, head size] behind what is filled; all filled columns."""
        keys, values = self._room.for_like(key_states, value_states)
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
        """Keep some rows of the whole room."""
        self._room.keep(indices)
