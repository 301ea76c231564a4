"""transformers' own forward with the vision module swapped, against the pathways written before."""

import pytest
import torch

from kd_bench.distill import pathways as old
from kd_bench.distill.vision_language import (
    VisionLanguageModel,
    answer_positions,
    keeping_vision,
    seeing_with,
)
from tests.test_pathways import token_counts
from tests.tiny_families import FAMILIES, batch_for, kinds_for, make


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_module_equals_pathways(family):
    student, teacher = make(family, 32, seed=1), make(family, 64, seed=2)
    teacher.requires_grad_(False)
    batch = batch_for(family, token_counts(family, old.pathway_for(student)))
    batch |= kinds_for(family, batch)
    answers = answer_positions(batch["labels"])
    eyes, words = old.pathway_for(student), old.pathway_for(teacher)
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    before = old.switch_hidden_states(eyes, words, batch, answers)
    with keeping_vision(ours) as kept:
        own = ours.hidden_states(batch)[answers]
    assert torch.equal(
        own, eyes.decode(eyes.project(eyes.encode_image(batch), batch), batch, answers)
    )
    tower = list(ours.vision_tower.parameters())
    expected = torch.autograd.grad(before.square().sum(), tower, allow_unused=True)
    for given in (kept, None):
        with seeing_with(theirs, ours, given):
            now = theirs.hidden_states(batch)[answers]
        assert torch.equal(now, before)
        found = torch.autograd.grad(now.square().sum(), tower, allow_unused=True)
        for left, right in zip(found, expected, strict=True):
            assert (left is None) == (right is None)
            if left is not None:  # sums of branches may be taken in another order
                torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-9)
