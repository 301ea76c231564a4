"""Several processes on one evaluation: whole images each, read and hashed once."""

import io
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kd_bench.distill import processes
from kd_bench.evals.documents import Documents, _Images
from kd_bench.evals.engine import Engine
from kd_bench.evals.models import own_share
from tests.evals.test_engine import ask, facts, question
from tests.support.eval_world import processor, talker


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, count: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def test_a_process_answers_whole_images_and_prefills_what_one_alone_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twelve questions an image; lmms-eval deals them out one by one: 1.5 x the tokens."""
    model = talker()
    asked = [question(index, index // 12, 4 + index % 7) for index in range(192)]
    prefilled = [0]
    kind = type(model.model.language_model)
    forward = kind.forward

    def counted(self: Any, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> Any:
        if inputs_embeds.shape[1] > 1:
            prefilled[0] += inputs_embeds.shape[0] * inputs_embeds.shape[1]
        return forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    options: dict[str, Any] = {"batch_size": 12}
    whole = ask(Engine(model, processor(), **options), asked)
    alone, prefilled[0] = prefilled[0], 0
    together: dict[int, Any] = {}
    shares = []
    for rank in range(8):
        as_process(monkeypatch, rank, 8)
        share = own_share(range(len(asked)), lambda place: asked[place].image_key)
        shares.append(share)
        together |= ask(Engine(model, processor(), **options), [asked[place] for place in share])
    assert facts(together) == facts(whole)
    assert prefilled[0] == alone
    assert sorted(chain(*shares)) == list(range(len(asked)))
    assert {len(share) for share in shares} == {24}
    images = [{asked[place].image_key for place in share} for share in shares]
    assert sum(map(len, images)) == len(set.union(*images)) == 16


def test_shares_are_even_in_cost_and_neighbours_stay_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An image with one question costs nearly what one with twenty does."""
    keys = [f"many {number // 20}" for number in range(400)] + [f"one {n}" for n in range(100)]
    shares = []
    for rank in range(4):
        as_process(monkeypatch, rank, 4)
        shares.append(own_share(range(500), keys.__getitem__))
    assert list(chain(*shares)) == list(range(500))
    costs = [len(share) + 15 * len({keys[place] for place in share}) for share in shares]
    assert max(costs) - min(costs) <= 2 * 35
    as_process(monkeypatch, 3, 4)
    assert own_share([], keys.__getitem__) == []
    assert own_share([7], lambda place: "") == []
    as_process(monkeypatch, 2, 4)
    assert own_share([7], lambda place: "") == [7]


def test_each_image_is_hashed_in_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoded = []
    for number in range(30):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(stream, format="png")
        encoded.append(stream.getvalue())
    table = pa.table({"image": pa.array(encoded, pa.binary())})
    file = tmp_path / "test-00000-of-00001.parquet"
    pq.write_table(table, file, row_group_size=3)
    read: list[int] = []
    read_group = _Images._read_group

    def counted(self: _Images, group: int) -> Any:
        read.append(group)
        return read_group(self, group)

    monkeypatch.setattr(_Images, "_read_group", counted)
    # Two questions an image, as in GQA: the images lie once, in another order.
    rows = pa.table({"question": [f"q{number}" for number in range(60)]})
    order = [(number * 7) % 30 for number in range(60)]

    def fresh() -> Documents:
        return Documents(rows, {"image": _Images([file], "image", order)})

    alone = fresh().image_digests("image")
    told: list[dict[int, str]] = []

    def gathered(found: dict[int, str]) -> list[dict[int, str]]:
        told.append(found)
        return told

    monkeypatch.setattr(processes, "gather", gathered)
    read.clear()
    for rank in range(4):
        as_process(monkeypatch, rank, 4)
        documents = fresh()
        documents.hash_together()
    assert [len(found) for found in told] == [7, 8, 7, 8]
    assert len(read) <= 10 + 3  # a group that two processes share is read by both
    read.clear()
    assert documents.image_digests("image") == alone
    assert read == []
    places = [documents.image_place(index) for index in range(60)]
    assert places == order
