"""Prefixes that are held once, rows that are not copied, prefills without a mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from kd_bench.evals.benchmark import Question, Settings
from kd_bench.evals.cache import BatchCache, SharedPrefixes, attend, is_plain
from kd_bench.evals.engine import Engine
from tests.evals.test_engine import SHORT, ask, facts, question
from tests.support.counting import counted
from tests.support.eval_world import processor, talker
from tests.support.tiny_families import make


class Written(TorchDispatchMode):
    """Bytes that are written into existing tensors, or copied out of some by index."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("index_put_", "_index_put_impl_"):
            self.bytes += args[2].nbytes
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "index_select":
            self.bytes += made.nbytes
        return made


def filled(rows: int, columns: int, keys: int = 2, size: int = 4, layers: int = 1) -> BatchCache:
    cache = BatchCache(layers, rows, columns)
    for layer in range(layers):
        cache.update(*(torch.randn(rows, keys, columns, size) for _ in range(2)), layer)
    return cache


@pytest.mark.parametrize("begins", [(0, 0, 1, 1, 2, 2), (2, 0, 0, -1, 0, 1, 2, 0), (-1, -1), (1,)])
@pytest.mark.parametrize("queries", [1, 3])
def test_two_parts_of_attention_give_what_one_gives(begins: tuple[int, ...], queries: int) -> None:
    """Grouped heads, uneven groups, prefixes of two lengths, rows without one; within 1e-6."""
    torch.manual_seed(0)
    lengths, rows = [5, 7, 7], len(begins)
    room = filled(3, 7)
    query = torch.randn(rows, 6, queries, 4)
    key, value = torch.randn(2, rows, 2, queries, 4)
    prefixes = SharedPrefixes(room, lengths)
    module: Any = SimpleNamespace(layer_idx=0)
    found, _ = attend(module, query, key, value, None, beginnings=prefixes.under(begins))
    keys, values = room.layers[0].buffer
    for row, begin in enumerate(begins):
        length = 0 if begin < 0 else lengths[begin]
        own = (keys[begin, :, :length], key[row]), (values[begin, :, :length], value[row])
        whole = [torch.cat(each, dim=1).repeat_interleave(3, dim=0)[None] for each in own]
        mask = torch.ones(queries, length + queries, dtype=torch.bool).tril(length)
        expected = functional.scaled_dot_product_attention(query[[row]], *whole, attn_mask=mask)
        torch.testing.assert_close(found[row], expected[0].transpose(0, 1), atol=1e-6, rtol=1e-6)


def test_rows_that_end_cost_a_copy_of_those_that_take_their_places() -> None:
    cache = filled(20, 30, layers=2).part(0, 20, 12)
    before = [[each.clone() for each in layer.buffer] for layer in cache.layers]
    going = [row for row in range(20) if row not in (3, 11, 19)]
    with Written() as written:
        order = cache.keep(going)
    assert sorted(order) == going
    assert order == [0, 1, 2, 17, 4, 5, 6, 7, 8, 9, 10, 18, 12, 13, 14, 15, 16]
    for layer, old in zip(cache.layers, before, strict=True):
        for each, was in zip(layer.buffer, old, strict=True):
            assert torch.equal(each[:17, :, :12], was[order][:, :, :12])
    row = 2 * 12 * 4 * 4  # heads, filled columns, head size, float32
    assert written.bytes == 2 * 2 * 2 * row  # two rows, keys and values, two layers
    with Written() as written:
        assert cache.keep(range(10)) == list(range(10))
    assert written.bytes == 0


@pytest.fixture(scope="module")
def model() -> Any:
    return talker()


def counting(monkeypatch: pytest.MonkeyPatch, model: Any) -> dict[str, int]:
    """Tokens that are prefilled, padding included, and attentions with a mask in a prefill."""
    counts = {"tokens": 0, "masked": 0, "kernels": 0}
    kind = type(model.model.language_model)
    forward, kernel = kind.forward, functional.scaled_dot_product_attention

    def counted(self: Any, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        rows, columns = inputs_embeds.shape[:2]
        counts["tokens"] += rows * columns if columns > 1 else 0
        return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    def watched(query: Tensor, *args: Any, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        if more.get("is_causal") or (attn_mask is not None and query.shape[2] > 1):
            counts["kernels"] += 1
            counts["masked"] += attn_mask is not None
        return kernel(query, *args, attn_mask=attn_mask, **more)

    monkeypatch.setattr(kind, "forward", counted)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", watched)
    return counts


@pytest.mark.parametrize("share", [True, False])
def test_a_prefill_of_uneven_prompts_has_no_mask(
    model: Any, monkeypatch: pytest.MonkeyPatch, share: bool
) -> None:
    asked = [question(index, index // 6, index % 23) for index in range(24)]
    alone = ask(Engine(model, processor(), batch_size=1, share=False), asked)
    counts = counting(monkeypatch, model)
    found = ask(Engine(model, processor(), batch_size=24, share=share), asked)
    assert facts(found) == facts(alone)
    assert counts["kernels"] > 0
    assert counts["masked"] == 0


def test_a_text_only_row_does_not_end_sharing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [question(index, index // 20, 6 + index % 7) for index in range(60)]
    text = Question(60, "no image at all", lambda: [], SHORT, "none")
    alone = ask(Engine(model, processor(), batch_size=1, share=False), [*asked, text])
    counts = counting(monkeypatch, model)
    ask(Engine(model, processor(), batch_size=61), asked)
    without, counts["tokens"] = counts["tokens"], 0
    found = ask(Engine(model, processor(), batch_size=61), [*asked, text])
    assert facts(found) == facts(alone)
    assert counts["tokens"] < without + 100  # its own, and some padding; 1,000 more if it ended


@pytest.mark.parametrize(
    "setting",
    [
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"is_causal": False},
        {"use_bidirectional_attention": True},
        {"attn_logit_softcapping": 30.0},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_only_plain_causal_attention_goes_without_a_mask(setting: dict[str, Any]) -> None:
    language = make("llava-siglip").model.language_model
    assert is_plain(language)
    for name, value in setting.items():
        setattr(language.config, name, value)
    assert not is_plain(language)


def test_an_attention_that_drops_what_it_is_given_is_no_silent_error() -> None:
    query = torch.randn(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match="does not hand on"):
        attend(SimpleNamespace(layer_idx=0), query, query, query, None)


def test_the_last_layer_runs_its_mlp_where_it_is_read(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [question(index, index // 6, index % 23) for index in range(24)]
    alone = ask(Engine(model, processor(), batch_size=1, share=False), asked)
    layers = model.model.language_model.layers
    tokens = [0] * len(layers)
    kind = type(layers[0].mlp)
    forward = kind.forward

    def counted(self: Any, hidden: Tensor) -> Tensor:
        number = next(n for n, layer in enumerate(layers) if layer.mlp is self)
        tokens[number] += hidden[..., 0].numel()
        return forward(self, hidden)

    monkeypatch.setattr(kind, "forward", counted)
    found = ask(Engine(model, processor(), batch_size=24), asked)
    assert facts(found) == facts(alone)
    generated = sum(answer.tokens for answer in found.values())
    assert tokens[-1] <= 4 + generated  # prefixes, then each token that is read
    assert tokens[0] > tokens[-1] + 4 * 16


@pytest.mark.parametrize("share", [True, False])
def test_a_device_is_waited_for_once_a_token(model: Any, share: bool) -> None:
    asked = [
        question(index, index // 6, index % 23, Settings(12)) for index in range(24)
    ]  # uneven: a mask is there
    engine = Engine(model, processor(), batch_size=24, share=share)
    [(ready, _)] = engine._batches(asked)
    with torch.inference_mode():
        rows = engine._rows(ready)
    with counted() as operations:
        found = engine._decoder.decode(rows, Settings(12), share)
    steps = max(len(each.tokens) for each in found)
    assert steps == 12
    assert operations.waits.total() == steps + 1  # and once for the probabilities
