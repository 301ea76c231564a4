"""Padding, what cannot be read, and the order of batches."""

import pytest
import torch

from kd_bench.distill.conversations import read_conversations
from kd_bench.distill.encoding import BatchOrder, Collator, ConversationDataset, Encoder, joined
from kd_bench.distill.recipe import DataSource
from kd_bench.errors import TrainingError, UsageError
from tests.support import tiny


@pytest.fixture(scope="module")
def processor():
    return tiny.processor()


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = tiny.write_data(tmp_path_factory.mktemp("data"), count=24)
    return read_conversations(DataSource(path=str(path)))[0]


def test_batches_are_padded_on_the_right(processor, conversations):
    encoder = Encoder(processor)
    samples = encoder.encode_many([conversations[0], conversations[3]])
    for index, sample in enumerate(samples):
        sample["sample_index"] = torch.tensor(index)
    batch = Collator(0)(samples)
    short = len(samples[1]["input_ids"])
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    assert (batch["input_ids"][1, short:] == 0).all()
    assert (batch["labels"][1, short:] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(s["input_ids"]) for s in samples]
    assert batch["pixel_values"].shape[0] == 1
    assert batch["sample_index"].tolist() == [0, 1]


def test_pictures_of_several_sizes_are_joined_with_zeros():
    left, right = torch.ones(1, 2, 3, 4), 2 * torch.ones(2, 1, 5, 2)
    whole = joined([left, right])
    assert whole.shape == (3, 2, 5, 4)
    assert torch.equal(whole[:1, :2, :3, :4], left)
    assert torch.equal(whole[1:, :1, :5, :2], right)
    assert whole.sum() == left.sum() + right.sum()


@pytest.fixture(scope="module")
def dataset(processor, conversations):
    made = ConversationDataset(conversations, Encoder(processor))
    made.prepare()
    return made


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("size", [1, 4, 5, 24])
def test_every_epoch_is_another_order_of_whole_batches(dataset, size, grouped):
    order = BatchOrder(dataset, size, size, seed=0, group_by_length=grouped)
    epochs = [order.batches(epoch) for epoch in range(3)]
    for batches in epochs:
        assert all(len(batch) == size for batch in batches)
        flat = [index for batch in batches for index in batch]
        assert len(flat) == len(set(flat)) == len(dataset) // size * size
    assert len({str(batches) for batches in epochs}) == 3
    again = BatchOrder(dataset, size, size, seed=0, group_by_length=grouped)
    assert [again.batches(epoch) for epoch in range(3)] == epochs
    other = BatchOrder(dataset, size, size, seed=1, group_by_length=grouped)
    assert other.batches(0) != epochs[0]


def test_pieces_make_up_the_same_batches_whatever_their_size(dataset):
    whole = [list(b) for b in BatchOrder(dataset, 6, 6, seed=3)]
    pieces = [list(b) for b in BatchOrder(dataset, 6, 2, seed=3)]
    assert [[*a, *b, *c] for a, b, c in zip(*[iter(pieces)] * 3, strict=True)] == whole
    assert len(BatchOrder(dataset, 6, 2, seed=3)) == len(pieces)


def test_text_only_samples_share_batches(dataset):
    batches = BatchOrder(dataset, 3, 3, seed=0).batches(0)
    kinds = [{bool(dataset.conversations.images[index]) for index in batch} for batch in batches]
    assert kinds.count({False}) == 2  # six text-only samples
    assert kinds.count({True}) == 6


def test_fewer_samples_than_a_batch_are_refused(dataset):
    with pytest.raises(UsageError, match="24 usable samples, fewer than one batch of 25"):
        BatchOrder(dataset, 25, 25, seed=0)


def test_the_list_of_unreadable_samples_is_kept_short(dataset):
    bad = [(str(i), "broken") for i in range(100)]
    with pytest.raises(TrainingError, match=r"100 samples .* 19: broken; and 80 more"):
        ConversationDataset([], dataset.encoder, unreadable=bad)
