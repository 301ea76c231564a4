"""The knee and the leading ids against a full sort in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from kd_bench.distill import knee as knee_module
from kd_bench.distill.knee import knee, top_logits
from kd_bench.errors import UsageError


def knee_by_sorting(row: np.ndarray, curve: str = "logits", prefix: int | None = None) -> int:
    """The definition, one row at a time: index of the largest gap below the chord."""
    ordered = np.sort(row.astype(np.float64))[::-1][:prefix]
    if curve == "probs":
        ordered = np.exp(ordered - ordered[0])
    if ordered[0] == ordered[-1]:
        return 0
    y = (ordered - ordered[-1]) / (ordered[0] - ordered[-1])
    x = np.arange(len(ordered)) / (len(ordered) - 1)
    gap = 1 - x - y
    return int(gap.argmax()) if gap.max() > 1e-6 else 0


def expected_knees(logits: Tensor, k_min: int = 2, **options) -> list[int]:
    return [max(k_min, knee_by_sorting(row, **options)) for row in logits.float().numpy()]


def expected_ids(logits: Tensor) -> Tensor:
    return torch.sort(logits.float(), dim=-1, descending=True, stable=True).indices


def shapes(rows: int, vocabulary: int) -> dict[str, Tensor]:
    """Curves of many shapes, named."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, vocabulary, generator=generator)
    uniform = torch.rand(rows, vocabulary, generator=generator).clamp(1e-6, 1 - 1e-6)
    outlier = normal.clone()
    outlier[:, 5] = 1e4
    return {
        "gaussian": normal * 2.5,
        "peaked": torch.where(uniform < 3e-3, normal * 2 + 12, normal * 2),
        "gumbel": -torch.log(-torch.log(uniform)),
        "heavy tails": normal / uniform.sqrt(),
        "outlier": outlier,
        "bent upwards": uniform.sqrt(),
        "uniform": uniform,
        "ties": normal.round(),
        "bfloat16": (normal * 2.5).bfloat16(),
        "float16": normal.half(),
        "huge": normal * 1e4,
        "two values": (normal > 1).float(),
    }


@pytest.fixture(params=[True, False], ids=["sorted", "binned"])
def either_way(request, monkeypatch):
    """Small vocabularies are sorted whole and large ones counted: test both on the same rows."""
    if not request.param:
        monkeypatch.setattr(knee_module, "SORT_ALL_BELOW", 0)
        monkeypatch.setattr(knee_module, "ELEMENTS_AT_A_TIME", {"cpu": 5000})


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("curve", ["logits", "probs"])
@pytest.mark.parametrize("shape", list(shapes(1, 8)))
def test_knee_is_that_of_a_full_sort(shape, curve):
    logits = shapes(7, 3000)[shape]
    assert knee(logits, curve).tolist() == expected_knees(logits, curve=curve)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", list(shapes(1, 8)))
def test_leading_ids_are_those_of_a_stable_full_sort(shape):
    logits = shapes(7, 3000)[shape]
    for top in (top_logits(logits), top_logits(logits, top_k=40), top_logits(logits, k_min=900)):
        for k, ids, expected in zip(top.k, top.ids, expected_ids(logits), strict=True):
            assert ids[:k].tolist() == expected[:k].tolist()
        assert top.ids.shape[1] == top.k.max()
        assert top.mask.sum(dim=-1).tolist() == top.k.tolist()


@pytest.mark.parametrize("curve", ["logits", "probs"])
def test_large_vocabulary(curve):
    for logits in shapes(2, 40_000).values():
        expected = expected_knees(logits, curve=curve)
        assert knee(logits, curve).tolist() == expected
        top = top_logits(logits, curve=curve, width=900)  # as an accelerator is asked
        assert top.k.tolist() == expected
        assert torch.equal(top.ids, expected_ids(logits)[:, :900])


@pytest.mark.usefixtures("either_way")
def test_prefix_of_candidates_makes_a_curve_of_its_own():
    logits = shapes(5, 3000)["gaussian"]
    assert knee(logits, candidates=256).tolist() == expected_knees(logits, prefix=256)
    assert knee(logits, candidates=9999).tolist() == knee(logits).tolist()


@pytest.mark.usefixtures("either_way")
def test_bounds_hold():
    logits = shapes(5, 3000)["gaussian"]
    free = knee(logits)
    assert free.min() > 20
    assert knee(logits, k_max=20).tolist() == [20] * 5
    assert knee(logits, k_min=2999).tolist() == [2999] * 5
    assert knee(logits, k_min=10_000).tolist() == [3000] * 5
    assert knee(logits, k_min=20, k_max=3000).tolist() == free.tolist()


@pytest.mark.usefixtures("either_way")
def test_rows_without_a_knee_have_the_smallest_k():
    flat = torch.full((1, 500), 3.0)
    line = torch.linspace(5, -5, 500)[None]
    step = torch.zeros(1, 500)
    step[0, 17] = 8.0
    arch = -torch.linspace(0, 1, 500)[None].square()
    assert knee(torch.cat([flat, line, step, arch])).tolist() == [2, 2, 2, 2]


@pytest.mark.usefixtures("either_way")
def test_a_knee_at_a_corner_is_found_exactly():
    corner = torch.cat([torch.linspace(100, 1, 33), torch.linspace(0.9, 0, 400)])[None]
    shuffled = corner[:, torch.randperm(433, generator=torch.Generator().manual_seed(1))]
    assert knee(shuffled).tolist() == [32]  # 32 values lie above the corner's


@pytest.mark.usefixtures("either_way")
def test_order_of_the_vocabulary_does_not_matter():
    logits = shapes(4, 2000)["heavy tails"]
    shuffled = logits[:, torch.randperm(2000, generator=torch.Generator().manual_seed(2))]
    assert knee(logits).tolist() == knee(shuffled).tolist()


def test_empty_and_tiny_rows():
    assert knee(torch.zeros(0, 100)).shape == (0,)
    assert knee(torch.zeros(0, 100)).dtype == torch.long
    assert knee(torch.tensor([[3.0, 1.0]])).tolist() == [2]
    assert knee(torch.tensor([[3.0]])).tolist() == [1]


def test_broken_rows_stay_alone(either_way):
    logits = shapes(3, 2000)["gaussian"]
    expected = knee(logits).tolist()
    logits[1, 4] = torch.nan
    assert [knee(logits)[0].item(), knee(logits)[2].item()] == [expected[0], expected[2]]


@pytest.mark.parametrize(
    "options",
    [
        {"curve": "entropy"},
        {"candidates": "some"},
        {"candidates": 1},
        {"k_min": 1},
        {"k_max": 1},
        {"k_min": 9, "k_max": 8},
    ],
)
def test_wrong_options_are_named(options):
    with pytest.raises(UsageError):
        knee(torch.zeros(2, 10), **options)


@settings(max_examples=80, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(2, 60)),
        elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
    ),
    st.sampled_from(["logits", "probs"]),
)
def test_both_ways_agree_on_any_row(values, curve):
    logits = torch.from_numpy(values)
    sorted_whole = top_logits(logits, curve=curve)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knee_module, "SORT_ALL_BELOW", 0)
        binned = top_logits(logits, curve=curve)
    assert sorted_whole.k.tolist() == binned.k.tolist()
    assert sorted_whole.k.tolist() == expected_knees(logits, curve=curve)
    for k, one, other in zip(sorted_whole.k, sorted_whole.ids, binned.ids, strict=True):
        assert one[:k].tolist() == other[:k].tolist()
