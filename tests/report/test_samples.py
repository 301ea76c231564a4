"""Which samples a page keeps, and that images come only from the run's own folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kd_bench.report.board import load_board
from kd_bench.report.samples import (
    better,
    bounded,
    choose_samples,
    embed_json,
    pick,
    thumbnail,
    within,
    write_samples,
)
from tests.support.report_store import Model, add_pictures, add_run, samples

SCORES = st.lists(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, float("nan")]), min_size=3, max_size=3),
    min_size=1,
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(SCORES, st.integers(1, 50))
def test_as_many_as_asked_each_once(rows: list[list[float]], count: int) -> None:
    documents = [f"d{i}" for i in range(len(rows))]
    categories = ["ab"[i % 2] for i in range(len(rows))]
    picked = pick(documents, categories, np.array(rows), (0, 1), count)
    assert len(picked) == len(set(picked)) == min(count, len(rows))


def test_disputed_samples_come_first_and_categories_in_turn() -> None:
    scores = np.zeros((100, 2))
    disputed = [7, 20, 33, 64]
    scores[disputed, 1] = 1.0
    categories = ["odd" if i % 2 else "even" for i in range(100)]
    documents = [f"d{i}" for i in range(100)]
    assert sorted(pick(documents, categories, scores, (0, 1), 4)) == disputed


def test_counts_of_better_samples_ignore_what_was_not_measured() -> None:
    scores = np.array([[0.0, 1.0], [0.0, np.nan], [1.0, 0.5], [0.0, 0.3]])
    assert better(scores) == [[0, 2], [1, 0]]


def test_the_choice_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    models = [Model("a", "sft", "sft", 0.0, 0), Model("b", "kd", "kl", 0.6, 0)]
    chosen = []
    for turn in range(2):
        store = tmp_path / str(turn)
        for model in models:
            frame = samples("gqa", model, 20)
            if turn:
                frame = frame.sample(frac=1, random_state=3)
            add_run(store, model, tasks=("gqa",), change={"gqa": frame})
        found = choose_samples(load_board(store), kept=15)
        assert found is not None
        chosen.append(found)
    assert chosen[0] == chosen[1]


def test_text_is_bounded_and_keeps_its_lines() -> None:
    assert bounded("a\n\x1b[2Jb\n") == "a\n[2Jb"
    assert len(bounded("x" * 10_000)) < 700


def test_the_text_budget_thins_evenly() -> None:
    rows = [{"q": "x" * 100, "n": i} for i in range(100)]
    kept = within(rows, 3_000)
    assert [row["n"] for row in kept] == list(range(0, 100, 4))


@given(st.text(max_size=60))
def test_embedded_json_cannot_leave_its_element(text: str) -> None:
    encoded = embed_json({"t": text + "</script><!--"})
    assert "<" not in encoded
    assert "\u2028" not in encoded
    assert json.loads(encoded) == {"t": text + "</script><!--"}


def test_images_are_found_by_digest(tmp_path: Path) -> None:
    run = add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=4)
    add_pictures(run, ("gqa",), size=32)
    found = choose_samples(load_board(tmp_path))
    assert found is not None
    assert len(found["images"]) == 4
    assert {s["i"] for s in found["samples"]} == set(found["images"])


@pytest.mark.parametrize(
    "digest", ["../../secret0000", "..%2f..%2fsecret", "ABCDEF0123456789", "", "12"]
)
def test_a_digest_that_is_none_names_no_file(tmp_path: Path, digest: str) -> None:
    model = Model("a", "sft", "sft", 0.0, 0)
    frame = samples("gqa", model, 2).assign(image_digest=digest)
    run = add_run(tmp_path, model, tasks=("gqa",), change={"gqa": frame})
    run.images.mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "runs" / "secret0000.png")
    found = choose_samples(load_board(tmp_path))
    assert found is not None
    assert found["images"] == {}


def test_broken_and_huge_images_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    assert thumbnail(tmp_path / "torn.png", 64, 80) == ""
    Image.new("1", (9_000, 9_000)).save(tmp_path / "huge.png")
    assert thumbnail(tmp_path / "huge.png", 64, 80) == ""
    Image.new("RGB", (10, 10)).save(tmp_path / "disguised.png", "JPEG")
    assert thumbnail(tmp_path / "disguised.png", 64, 80) == ""


def test_large_images_become_small_jpegs(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (400, 600, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    uri = thumbnail(tmp_path / "photo.png", 192, 82)
    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 40_000


def test_no_samples_no_browser(tmp_path: Path) -> None:
    run = add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=4)
    (run.path / "tasks" / "gqa.samples.parquet").unlink()
    board = load_board(tmp_path)
    assert choose_samples(board) is None
    assert write_samples(board, tmp_path / "all.parquet") == 0
