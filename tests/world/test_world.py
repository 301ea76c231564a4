"""The embedded world: pixels, splits, rows, and upstream's own prompts and scoring on them."""

import hashlib
import json
import multiprocessing
from collections import Counter, defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pytest

pytest.importorskip("PIL")
datasets = pytest.importorskip("datasets")

from kd_bench.world.benchmarks import BENCHMARKS, CATEGORIES, oracle_answer  # noqa: E402
from kd_bench.world.build import UPSTREAM_SPLITS, build_world, rows  # noqa: E402
from kd_bench.world.scenes import Scene, pixels, png, sample_scene  # noqa: E402
from kd_bench.world.training import MAKERS, conversations  # noqa: E402

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "world.json").read_text())


def fingerprint(split: str, seed: int = 0) -> str:
    """The rows of a split's ten test sets as canonical JSON, scenes by their content."""
    content = {name: rows(name, split, seed) for name in BENCHMARKS}
    return json.dumps(content, default=repr, sort_keys=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build_world(folder)
    return folder


def load(world: Path, benchmark: str, split: str = "test") -> Any:
    name = UPSTREAM_SPLITS[benchmark.removesuffix("_images")]
    path = world / split / benchmark / f"{name}-00000-of-00001.parquet"
    return datasets.Dataset.from_parquet(str(path), cache_dir=str(world / "cache"))


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sampled(split: str) -> list[Scene]:
    rng = Random("golden")
    return [sample_scene(rng, split, kind, blur) for kind, blur in
            (("full", 0), ("single", 1), ("sign", 5)) for _ in range(20)]  # fmt: skip


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_pixels_are_the_same_on_every_machine(split: str) -> None:
    drawn = b"".join(pixels(scene).tobytes() for scene in sampled(split))
    assert sha(drawn) == GOLDEN[f"pixels {split}"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_rows_are_the_same_on_every_machine(split: str) -> None:
    assert sha(fingerprint(split).encode()) == GOLDEN[f"rows {split}"]


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_conversations_are_the_same_on_every_machine(kind: str) -> None:
    assert sha(repr(conversations("golden", kind, 200)).encode()) == GOLDEN[f"train {kind}"]


def test_another_seed_is_another_world() -> None:
    assert fingerprint("validation", 1) != fingerprint("validation", 0)


@pytest.mark.slow
def test_splits_share_no_scene() -> None:
    seen: dict[str, set[str]] = defaultdict(set)
    for kind in MAKERS:
        for scenes, _ in conversations("train", kind, 400):
            seen["train"].update(scene.canonical() for scene in scenes)
            assert {scene.split() for scene in scenes} <= {"train"}
    for split in ("validation", "test"):
        for benchmark in BENCHMARKS:
            for row in rows(benchmark, split):
                shown = [value for value in row.values() if isinstance(value, Scene)]
                assert {scene.split() for scene in shown} == {split}
                seen[split].update(scene.canonical() for scene in shown)
    assert not seen["validation"] & seen["test"]
    assert not seen["train"] & (seen["validation"] | seen["test"])


def test_every_scene_has_one_split_whatever_its_noise() -> None:
    scene = sample_scene(Random(1), "test")
    noisier = Scene(scene.background, scene.shapes, scene.signs, scene.frame, 0, scene.grain + 1)
    assert noisier.split() == "test"
    assert (pixels(noisier) != pixels(scene)).any()


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_sizes_and_shared_pictures(benchmark: str) -> None:
    table = rows(benchmark, "test")
    assert 200 <= len(table) <= 400
    if benchmark != "mmmu":
        shown = {row.get("image", row.get("imageId")) for row in table}
        assert len(shown) <= 0.75 * len(table)


def test_mme_has_two_rows_for_each_id_and_category() -> None:
    table = rows("mme", "test")
    groups = defaultdict(list)
    for row in table:
        groups[row["category"], row["question_id"]].append(row)
    assert {category for category, _ in groups} == set(CATEGORIES)
    for pair in groups.values():
        assert sorted(row["answer"] for row in pair) == ["No", "Yes"]
        assert pair[0]["image"] == pair[1]["image"]


@pytest.mark.parametrize("benchmark", ["mmbench_en", "mmbench_cn"])
def test_mmbench_rotates_every_question_through_its_options(benchmark: str) -> None:
    groups = defaultdict(list)
    for row in rows(benchmark, "test"):
        groups[row["index"] % 1_000_000].append(row)
    for group in groups.values():
        options = [row[letter] for letter in "ABCD" if (row := group[0])[letter] is not None]
        assert len(group) == len(options) == len(set(options))
        assert len({row[row["answer"]] for row in group}) == 1
        assert sorted(row["answer"] for row in group) == sorted("ABCD"[: len(options)])
        assert [row["index"] // 1_000_000 for row in group] == list(range(len(group)))


def test_vqa_answers_are_ten_and_disagree_a_little() -> None:
    table = rows("vqav2", "test")
    for row in table:
        assert [answer["answer_id"] for answer in row["answers"]] == list(range(1, 11))
        counts = Counter(answer["answer"] for answer in row["answers"])
        assert counts.most_common(1)[0][1] >= 6
    assert any(len({a["answer"] for a in row["answers"]}) > 1 for row in table)


def test_vizwiz_has_unanswerable_rows_and_answerable_blur() -> None:
    table = rows("vizwiz_vqa", "test")
    lost = [oracle_answer("vizwiz_vqa", row) == "unanswerable" for row in table]
    assert 0.2 < sum(lost) / len(lost) < 0.5
    assert all(gone for row, gone in zip(table, lost, strict=True) if row["image"].blur > 2)
    assert any(row["image"].blur and not gone for row, gone in zip(table, lost, strict=True))


def test_pope_balances_answers_in_each_category() -> None:
    counts = Counter((row["category"], row["answer"]) for row in rows("pope", "test"))
    assert set(counts.values()) == {50}
    assert {category for category, _ in counts} == {"random", "popular", "adversarial"}


def test_mmmu_has_one_to_three_pictures() -> None:
    table = rows("mmmu", "test")
    pictures = Counter(sum(f"<image {k}>" in row["question"] for k in range(1, 8)) for row in table)
    assert set(pictures) == {1, 2, 3}
    assert {row["question_type"] for row in table} == {"multiple-choice", "open"}


@pytest.mark.slow
def test_parquet_files_decode_as_pictures(world: Path) -> None:
    for benchmark in (*BENCHMARKS, "gqa_images"):
        table = load(world, benchmark)
        column = "image_1" if benchmark == "mmmu" else "image"
        if benchmark == "gqa":
            assert "image" not in table.column_names
            continue
        assert table[0][column].size == (32, 32)
    known = set(load(world, "gqa_images")["id"])
    assert set(load(world, "gqa")["imageId"]) == known


def test_training_files_are_llava_json(world: Path) -> None:
    items = json.loads((world / "train" / "conversations.json").read_text())
    for item in items:
        names = item.get("image", [])
        names = [names] if isinstance(names, str) else names
        marks = sum(turn["value"].count("<image>") for turn in item["conversations"])
        assert marks == len(names)
        assert all((world / "train" / name).is_file() for name in names)
        assert [t["from"] for t in item["conversations"][:2]] == ["human", "gpt"]
    assert any("image" not in item for item in items)
    assert any(len(item["conversations"]) > 2 for item in items)


def _build(folder: str) -> None:
    build_world(Path(folder))


@pytest.mark.slow
def test_two_processes_and_a_second_call_leave_one_world(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    pair = [context.Process(target=_build, args=(str(tmp_path),)) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    build_world(tmp_path)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert before == {path: after[path] for path in before}


def test_png_keeps_the_pixels() -> None:
    import io

    import numpy as np
    from PIL import Image

    scene = sample_scene(Random(2), "train")
    assert (np.asarray(Image.open(io.BytesIO(png(scene)))) == pixels(scene)).all()
