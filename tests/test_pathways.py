"""Every family taken apart equals the family whole, and the switch does what it is for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_bench.distill.pathways import (
    SUPPORTED,
    answer_positions,
    pathway_for,
    switch_hidden_states,
)
from kd_bench.distill.pathways.base import first
from kd_bench.distill.pathways.qwen import window_order
from kd_bench.errors import UsageError
from tests.tiny_families import FAMILIES, IMAGE, batch_for, kinds_for, make, text_batch


def token_counts(family: str, pathway: Any) -> list[int]:
    """Image tokens of the three samples that `batch_for` makes, by hand."""
    if family == "llava-next":
        # 16 tokens of overview, then 4x8 / 8x4 / 8x8 patches less padding, each row ended by one:
        # [16, 30] fits 16 x 32 with 4 rows; [28, 13] fits 32 x 16, unpadded to 4 - 1 = 3 columns.
        return [16 + 4 * (8 + 1), 16 + 8 * (4 + 1), 16 + 8 * (8 + 1)]
    if family.startswith("qwen"):
        return [12, 10, 1]
    if family in ("smolvlm", "idefics3"):
        return [4, 8, 8]
    if family == "llava-onevision":
        return [16 + 4 * (8 + 1), 16 + 8 * (4 + 1), 16 + 5 * (5 + 1)]
    return [pathway.image_token_count] * 3


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request) -> tuple[str, Any, Any, dict[str, Tensor]]:
    """Family, student, teacher and a batch of three pictures."""
    family = request.param
    student, teacher = make(family, 32, seed=1), make(family, 64, seed=2)
    batch = batch_for(family, token_counts(family, pathway_for(student)))
    return family, student, teacher, batch | kinds_for(family, batch)


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def logits_in_parts(model: nn.Module, batch: dict[str, Tensor], positions: Tensor) -> Tensor:
    pathway = pathway_for(model)
    embeddings = pathway.project(pathway.encode_image(batch), batch)
    return pathway.lm_head(pathway.decode(embeddings, batch, positions))


@torch.no_grad()
def test_parts_equal_the_whole(case):
    _, student, teacher, batch = case
    for model in (student, teacher):
        whole = model(**without_labels(batch)).logits
        for positions in (batch["attention_mask"].bool(), answer_positions(batch["labels"])):
            parts = logits_in_parts(model, batch, positions)
            torch.testing.assert_close(parts, whole[positions], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_pictures_matter(case):
    """Otherwise the tests around this one would prove nothing."""
    _, student, _, batch = case
    positions = answer_positions(batch["labels"])
    other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
    difference = logits_in_parts(student, batch, positions) - logits_in_parts(
        student, other, positions
    )
    assert (difference.abs().amax(dim=-1) > 1e-4).all()


@torch.no_grad()
def test_switch_with_equal_vision_weights_is_the_teacher(case):
    _, student, teacher, batch = case
    ours, theirs = pathway_for(student), pathway_for(teacher)
    positions = answer_positions(batch["labels"])
    kept = {name: value.clone() for name, value in ours.vision_tower.state_dict().items()}
    seen = theirs.decode(theirs.project(theirs.encode_image(batch), batch), batch, positions)
    assert not torch.equal(switch_hidden_states(ours, theirs, batch, positions), seen)
    ours.vision_tower.load_state_dict(theirs.vision_tower.state_dict())
    try:
        assert torch.equal(switch_hidden_states(ours, theirs, batch, positions), seen)
    finally:
        ours.vision_tower.load_state_dict(kept)


def test_switch_gradient_reaches_the_students_encoder_and_nothing_else(case):
    _, student, teacher, batch = case
    ours, theirs = pathway_for(student), pathway_for(teacher)
    teacher.requires_grad_(False)
    try:
        hidden = switch_hidden_states(ours, theirs, batch, answer_positions(batch["labels"]))
        theirs.lm_head(hidden).square().sum().backward()
        encoder = {id(parameter) for parameter in ours.vision_tower.parameters()}
        reached = {n for n, p in student.named_parameters() if p.grad is not None}
        assert reached
        for name, parameter in student.named_parameters():
            if id(parameter) not in encoder:
                assert parameter.grad is None, name
        assert all(parameter.grad is None for parameter in teacher.parameters())
        patches = [n for n in reached if "patch_embed" in n or "patch_embedding" in n]
        assert patches, "the gradient must arrive at the encoder's first layer"
        moved = dict(student.named_parameters())
        assert all(moved[name].grad.abs().sum() > 0 for name in patches if "weight" in name)
    finally:
        teacher.requires_grad_(True)
        student.zero_grad(set_to_none=True)


@torch.no_grad()
def test_text_only_batches_do_not_reach_the_vision_tower(case):
    family, student, teacher, _ = case
    torch.manual_seed(3)
    batch = text_batch([torch.randint(5, 80, (length,)) for length in (9, 6)])
    batch |= kinds_for(family, batch)
    ours, theirs = pathway_for(student), pathway_for(teacher)

    def refuse(*_: Any) -> None:
        raise AssertionError("the vision tower was called")

    hooks = [module.register_forward_pre_hook(refuse) for module in ours.vision_tower.modules()]
    try:
        positions = answer_positions(batch["labels"])
        assert ours.encode_image(batch) is None
        assert ours.project(None, batch) is None
        parts = logits_in_parts(student, batch, positions)
        switched = switch_hidden_states(ours, theirs, batch, positions)
    finally:
        for hook in hooks:
            hook.remove()
    whole = student(**without_labels(batch)).logits
    torch.testing.assert_close(parts, whole[positions], rtol=1e-5, atol=1e-5)
    assert torch.equal(switched, theirs.decode(None, batch, positions))
    nothing = torch.zeros(0, theirs.language_model.config.hidden_size)
    assert torch.equal(switched, theirs.decode(nothing, batch, positions))


@torch.no_grad()
def test_what_a_pathway_says_of_itself(case):
    family, student, teacher, batch = case
    ours, theirs = pathway_for(student), pathway_for(teacher)
    features = ours.encode_image(batch)
    assert first(features).shape[-1] == ours.vision_width == theirs.vision_width
    assert ours.image_token_id == IMAGE
    assert ours.vocabulary_size == 99
    assert ours.geometry == theirs.geometry
    assert ours.geometry["patch_size"]
    count = ours.image_token_count
    if count is not None and isinstance(features, Tensor) and family != "llava-next":
        embeddings = first(ours.project(features, batch))
        assert embeddings.dim() == 2 or embeddings.shape[1] == count
    assert (count is None) == family.startswith("qwen")
    assert ours.language_model.config.hidden_size == 32
    parts = [ours.vision_tower, ours.projector, ours.language_model]
    owners = [id(p) for part in parts for p in part.parameters()]
    assert len(owners) == len(set(owners))
    head = {id(p) for p in student.get_output_embeddings().parameters()}
    assert {id(p) for p in student.parameters()} == set(owners) | head


@torch.no_grad()
def test_wrong_number_of_image_tokens_is_named(case):
    _, student, _, batch = case
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == IMAGE).nonzero()[0]] = 7
    short = batch | {"input_ids": ids}
    with pytest.raises(UsageError, match=r"image tokens, the text has \d+ places"):
        logits_in_parts(student, short, answer_positions(batch["labels"]))


@torch.no_grad()
def test_a_student_in_float32_switches_into_a_teacher_in_bfloat16():
    student, teacher = make("llava-siglip"), make("llava-siglip", 64).bfloat16()
    ours, theirs = pathway_for(student), pathway_for(teacher)
    batch = batch_for("llava-siglip", [ours.image_token_count] * 2)
    hidden = switch_hidden_states(ours, theirs, batch, answer_positions(batch["labels"]))
    assert hidden.dtype == torch.bfloat16
    assert hidden.isfinite().all()


def test_adapters_stay_in_effect():
    peft = pytest.importorskip("peft")
    model = make("llava-siglip")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    pathway = pathway_for(adapted)
    assert pathway.model is adapted
    batch = batch_for("llava-siglip", [pathway.image_token_count] * 2)
    positions = answer_positions(batch["labels"])
    with torch.no_grad():
        parts = logits_in_parts(adapted, batch, positions)
        whole = adapted(**without_labels(batch)).logits
        torch.testing.assert_close(parts, whole[positions], rtol=1e-5, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(parts, logits_in_parts(adapted, batch, positions))


def test_hidden_states_come_from_answer_positions_only():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [7, -100, -100, -100, 8]])
    expected = [[False, True, True, False, False], [False, False, False, True, False]]
    assert answer_positions(labels).tolist() == expected
    model = make("llava-siglip")
    pathway = pathway_for(model)
    batch = batch_for("llava-siglip", [pathway.image_token_count] * 2)
    positions = answer_positions(batch["labels"])
    assert positions.sum() == 6
    targets = batch["labels"][:, 1:][positions[:, :-1]]
    assert (targets != -100).all()
    embeddings = pathway.project(pathway.encode_image(batch), batch)
    assert pathway.decode(embeddings, batch, positions).shape == (6, 32)


def test_other_architectures_are_refused_by_name():
    with pytest.raises(UsageError, match=r"Linear .*Supported: Llava"):
        pathway_for(nn.Linear(2, 2))


def test_every_supported_class_exists_in_transformers_and_is_tested():
    import transformers

    tested = {type(make(family)).__name__ for family in FAMILIES}
    assert tested == set(SUPPORTED)
    assert all(hasattr(transformers, name) for name in SUPPORTED)


def test_videos_are_refused():
    pathway = pathway_for(make("llava-onevision"))
    with pytest.raises(UsageError, match="video"):
        pathway.encode_image({"pixel_values_videos": torch.zeros(1)})


def test_window_order_covers_every_token_once():
    grids = torch.tensor([[1, 6, 8], [2, 4, 10], [1, 2, 2]])
    order = window_order(grids, merged=2, window=2)
    assert sorted(order.tolist()) == list(range(12 + 20 + 1))
    # 3 rows and 4 columns of tokens in windows of 2 x 2.
    assert order[:12].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 10, 11]
