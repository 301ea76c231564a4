"""The teacher cache gives back what was stored, or nothing."""

import os

import pytest
import torch

from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.encoding import Collator, Encoder
from kd_bench.distill.recipe import DataSource
from kd_bench.distill.teacher_states import (
    TeacherCache,
    cache_folder,
    compute_states,
    digest_samples,
)
from kd_bench.distill.vision_language import VisionLanguageModel, answer_positions, places_of
from kd_bench.errors import UsageError
from tests.support import tiny

WIDTH = 8
COUNTS = (3, 1, 4)


def states(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sum(COUNTS), WIDTH, generator=generator).to(dtype)


def opened(folder, dtype=torch.float32):
    return TeacherCache(folder, WIDTH, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_stored_comes_back(tmp_path, dtype):
    kept = states(dtype=dtype)
    first = opened(tmp_path, dtype)
    first.put((5, 6, 7), COUNTS, kept)
    for cache in (first, opened(tmp_path, dtype)):
        assert torch.equal(cache.get((5, 6, 7), COUNTS), kept)
        assert torch.equal(cache.get((7, 5), (4, 3)), torch.cat([kept[4:], kept[:3]]))
        assert cache.get((5, 8), (3, 1)) is None
        assert cache.get((5,), (2,)) is None  # another length is another entry


def test_a_sample_of_two_lengths_is_kept_twice(tmp_path):
    kept = states()
    cache = opened(tmp_path)
    cache.put((5,), (3,), kept[:3])
    cache.put((5,), (4,), kept[3:7])
    assert torch.equal(opened(tmp_path).get((5, 5), (3, 4)), kept[:7])


def test_a_sample_without_answers_needs_no_entry(tmp_path):
    cache = opened(tmp_path)
    cache.put((5, 6), (0, 3), states()[:3])
    assert torch.equal(opened(tmp_path).get((5, 6), (0, 3)), states()[:3])


def test_two_writers_and_a_process_id_given_away_again_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in every container
    one, two = opened(tmp_path), opened(tmp_path)
    one.put((1,), (3,), torch.full((3, WIDTH), 2.0))
    two.put((2,), (3,), torch.full((3, WIDTH), 1.0))
    one.put((3,), (3,), torch.full((3, WIDTH), 3.0))
    again = opened(tmp_path)
    again.put((4,), (3,), torch.full((3, WIDTH), 4.0))
    found = opened(tmp_path).get((1, 2, 3, 4), (3, 3, 3, 3))
    assert found[:, 0].tolist() == [2.0] * 3 + [1.0] * 3 + [3.0] * 3 + [4.0] * 3


@pytest.mark.parametrize("name", ["values", "samples"])
def test_no_flipped_bit_is_believed_and_what_is_wrong_is_written_again(tmp_path, name):
    kept = states()
    opened(tmp_path).put((5, 6, 7), COUNTS, kept)
    (file,) = tmp_path.glob(f"{name}-*.bin")
    sound = file.read_bytes()
    for bit in range(0, 8 * len(sound), 7):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        cache = opened(tmp_path)
        for sample, count, part in zip((5, 6, 7), COUNTS, kept.split(COUNTS), strict=True):
            found = cache.get((sample,), (count,))
            assert found is None or torch.equal(found, part)
        assert cache.get((5, 6, 7), COUNTS) is None
        if bit < 14:
            cache.put((5, 6, 7), COUNTS, kept)
            assert torch.equal(cache.get((5, 6, 7), COUNTS), kept)
            cache._values.unlink()
            cache._records.unlink()


@pytest.mark.parametrize("name", ["values", "samples", "layout"])
def test_torn_files_are_passed_over(tmp_path, name):
    kept = states()
    opened(tmp_path).put((5, 6, 7), COUNTS, kept)
    (file,) = tmp_path.glob(f"{name}*.*")
    file.write_bytes(file.read_bytes()[:-9])
    cache = opened(tmp_path)
    assert cache.get((7,), (4,)) is None or name == "layout"
    assert torch.equal(cache.get((5,), (3,)), kept[:3])
    cache.put((5, 6, 7), COUNTS, kept)
    assert torch.equal(opened(tmp_path).get((5, 6, 7), COUNTS), kept)


def test_another_teacher_data_or_length_has_another_folder(tmp_path):
    same = {"teacher": "a", "data": "b", "max_length": 512}
    folders = {cache_folder(tmp_path, **{**same, key: "other"}) for key in same}
    folders |= {cache_folder(tmp_path, **same), cache_folder(tmp_path, **same)}
    assert len(folders) == 4


def test_another_form_is_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(UsageError, match="another form"):
        opened(tmp_path, torch.bfloat16)


@torch.no_grad()
def test_states_of_all_samples_are_those_of_any_batch_and_the_same_bits_for_every_writer(tmp_path):
    data = tiny.write_data(tmp_path, count=20)
    conversations, _ = read_conversations(DataSource(path=str(data)))
    made = Encoder(tiny.processor()).encode_many(conversations)
    samples = [{**each, "sample_index": torch.tensor(i)} for i, each in enumerate(made)]
    teacher = VisionLanguageModel(tiny.model(width=48, layers=2, seed=1))
    folder = tmp_path / "states"
    folder.mkdir()
    writers = [TeacherCache(folder, 48, torch.float32) for _ in range(2)]  # at the same time
    late = TeacherCache(folder, 48, torch.float32)
    everyone = [compute_states(teacher, samples, Collator(0), each) for each in writers]
    everyone.append(compute_states(teacher, samples, Collator(0), late))
    teacher.core.forward = None  # a reader asks no teacher
    reader = TeacherCache(folder, 48, torch.float32)
    everyone.append(compute_states(teacher, samples, Collator(0), reader))
    del teacher.core.forward
    assert all(torch.equal(each.states, everyone[0].states) for each in everyone)
    for chosen in ([3], [0, 19, 7], [12, 4, 11, 5, 2]):
        batch = Collator(0)([samples[index] for index in chosen])
        expected = teacher.hidden_states(batch)[answer_positions(batch["labels"])]
        found = everyone[0].of(batch["sample_index"], places_of(batch, 2))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_full_disk_costs_the_sharing_only(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    made = Encoder(tiny.processor()).encode_many(
        read_conversations(DataSource(path=str(tiny.write_data(tmp_path, count=4))))[0]
    )
    samples = [{**each, "sample_index": torch.tensor(i)} for i, each in enumerate(made)]
    teacher = VisionLanguageModel(tiny.model(width=48, layers=2, seed=1))
    cache = TeacherCache(tmp_path, 48, torch.float32)
    monkeypatch.setattr(cache, "put", full)
    assert compute_states(teacher, samples, Collator(0), cache).states.isfinite().all()


def test_states_are_known_by_all_that_the_teacher_is_given():
    sample = {"input_ids": torch.tensor([1, 2, 3]), "pixel_values": torch.zeros(1, 2)}
    same = digest_samples([sample, sample])
    assert digest_samples([dict(sample), dict(sample)]) == same
    for name, tensor in (
        ("input_ids", torch.tensor([1, 2, 4])),
        ("input_ids", torch.tensor([[1, 2, 3]])),
        ("input_ids", torch.tensor([1, 2, 3]).int()),
        ("pixel_values", torch.tensor([[0.0, 1e-7]])),
        ("image_sizes", torch.tensor([3, 3])),
    ):
        assert digest_samples([sample, {**sample, name: tensor}]) != same
    assert digest_samples([sample]) != same
