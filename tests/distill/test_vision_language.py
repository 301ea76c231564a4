"""Every family: the switch is transformers' forward with one module swapped, to the last bit."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kd_bench.distill import vision_language
from kd_bench.distill.distiller import Distiller, FirstLayerProbe
from kd_bench.distill.models import checkpoint_activations
from kd_bench.distill.recipe import METHODS
from kd_bench.distill.vision_language import (
    VisionLanguageModel,
    answer_positions,
    entries_of,
    find_places,
    has_images,
    keeping_vision,
    places_of,
    put_vision,
    seeing_with,
)
from kd_bench.errors import UsageError
from tests.support.counting import counted
from tests.support.tiny_families import (
    FAMILIES,
    IMAGE,
    batch_for,
    kinds_for,
    make,
    text_batch,
    text_config,
)


def token_counts(family: str, parts: VisionLanguageModel) -> list[int]:
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
    count = parts.image_token_count
    assert count is not None
    return [count] * 3


Case = tuple[str, Any, Any, dict[str, Tensor]]


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    """Family, student, teacher and a batch of three images."""
    family = request.param
    student, teacher = make(family, 32, seed=1), make(family, 64, seed=2)
    batch = batch_for(family, token_counts(family, VisionLanguageModel(student)))
    return family, student, teacher, batch | kinds_for(family, batch)


def without_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def logits(model: nn.Module, batch: dict[str, Tensor], positions: Tensor) -> Tensor:
    parts = VisionLanguageModel(model)
    return parts.lm_head(parts.hidden_states(batch)[positions])


def hybrid_by_weights(student: Any, teacher: Any) -> Any:
    """A teacher that was given the student's tower weight by weight."""
    hybrid = copy.deepcopy(teacher)
    tower = VisionLanguageModel(student).vision_tower.state_dict()
    VisionLanguageModel(hybrid).vision_tower.load_state_dict(tower)
    return hybrid


@torch.no_grad()
def test_hidden_states_and_head_are_the_models_own_logits(case: Case) -> None:
    _, student, teacher, batch = case
    for model in (student, teacher):
        whole = model(**without_labels(batch)).logits
        for positions in (batch["attention_mask"].bool(), answer_positions(batch["labels"])):
            torch.testing.assert_close(
                logits(model, batch, positions), whole[positions], rtol=1e-5, atol=1e-6
            )


@torch.no_grad()
def test_images_matter(case: Case) -> None:
    """Otherwise the tests around this one would prove nothing."""
    _, student, _, batch = case
    positions = answer_positions(batch["labels"])
    other = batch | {"pixel_values": batch["pixel_values"].flip(-1)}
    difference = logits(student, batch, positions) - logits(student, other, positions)
    assert (difference.abs().amax(dim=-1) > 1e-4).all()


@torch.no_grad()
def test_the_switch_is_a_teacher_that_holds_the_students_tower(case: Case) -> None:
    _, student, teacher, batch = case
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    own = theirs.hidden_states(batch)
    expected = VisionLanguageModel(hybrid_by_weights(student, teacher)).hidden_states(batch)
    assert not torch.equal(expected, own)
    with keeping_vision(ours) as kept:
        ours.hidden_states(batch)
    for given in (kept, None):
        with seeing_with(theirs, ours, given):
            assert torch.equal(theirs.hidden_states(batch), expected)
    assert torch.equal(theirs.hidden_states(batch), own)
    for_good = copy.deepcopy(teacher)
    put_vision(ours, into=VisionLanguageModel(for_good))
    assert torch.equal(VisionLanguageModel(for_good).hidden_states(batch), expected)


@torch.no_grad()
def test_the_switch_of_equal_towers_is_the_teacher(case: Case) -> None:
    _, student, teacher, batch = case
    theirs = VisionLanguageModel(teacher)
    ours = VisionLanguageModel(hybrid_by_weights(teacher, student))
    own = theirs.hidden_states(batch)
    with keeping_vision(ours) as kept:
        ours.hidden_states(batch)
    for given in (kept, None):
        with seeing_with(theirs, ours, given):
            assert torch.equal(theirs.hidden_states(batch), own)


def test_the_switchs_gradient_reaches_the_students_tower_and_nothing_else(case: Case) -> None:
    _, student, teacher, batch = case
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    hybrid = hybrid_by_weights(student, teacher).requires_grad_(False)
    tower = VisionLanguageModel(hybrid).vision_tower.requires_grad_(True)
    positions = answer_positions(batch["labels"])
    logits(hybrid, batch, positions).square().sum().backward()
    teacher.requires_grad_(False)
    try:
        with keeping_vision(ours) as kept:
            ours.hidden_states(batch)
        with seeing_with(theirs, ours, kept):
            theirs.lm_head(theirs.hidden_states(batch)[positions]).square().sum().backward()
        reached = {n: p.grad for n, p in ours.vision_tower.named_parameters()}
        for name, parameter in tower.named_parameters():
            torch.testing.assert_close(reached[name], parameter.grad, rtol=1e-3, atol=1e-5)
        assert any(
            "patch_embed" in n and bool(g.any()) for n, g in reached.items() if g is not None
        )
        inside = {id(parameter) for parameter in ours.vision_tower.parameters()}
        assert all(p.grad is None for p in student.parameters() if id(p) not in inside)
        assert all(parameter.grad is None for parameter in teacher.parameters())
    finally:
        teacher.requires_grad_(True)
        student.zero_grad(set_to_none=True)


WHOLE = ("paligemma", "paligemma2", "gemma3")
"""Families whose last layer runs everywhere: other layers, prefixes seen in both directions."""


def states_and_gradients(parts: VisionLanguageModel, states: Any) -> list[Tensor]:
    """Hidden states at the answers, and the gradient of a sum over them at every weight."""
    parts.model.zero_grad(set_to_none=True)
    found = states()
    (parts.lm_head(found).sin() * torch.arange(1, len(found) + 1)[:, None]).sum().backward()
    weights = parts.model.named_parameters()
    return [found.detach(), *(p.grad for _, p in weights if p.grad is not None)]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_last_layer_runs_at_answers_alone_and_gives_the_same(
    case: Case, checkpointed: bool
) -> None:
    family, student, _, batch = case
    student = copy.deepcopy(student).train()
    if checkpointed:
        checkpoint_activations(student)
    parts = VisionLanguageModel(student)
    # A sample without an answer, and one with a single one.
    labels = batch["labels"].clone()
    labels[0] = -100
    labels[1, : int((labels[1] != -100).nonzero()[-1])] = -100
    batch = batch | {"labels": labels}
    positions = answer_positions(labels)
    seen: list[int] = []
    mlp = parts.language_model.layers[-1].mlp  # type: ignore[union-attr, index]
    mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:-1].numel()))
    expected = states_and_gradients(parts, lambda: parts.hidden_states(batch)[positions])
    found = states_and_gradients(parts, lambda: parts.answer_states(batch))
    # Beside the largest of all: a softmax has no gradient at the bias of its keys but rounding.
    least = 1e-3 * max(float(each.abs().max()) for each in expected[1:])
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * max(float(theirs.abs().max()), least)
    everywhere, counted = labels.numel(), int(positions.sum())
    assert set(seen) == ({everywhere} if family in WHOLE else {everywhere, counted})


def test_layers_of_the_tower_that_nobody_reads_do_not_run(case: Case) -> None:
    family, student, _, batch = case
    parts = VisionLanguageModel(student)
    ran: list[str] = []
    idle = parts._unread
    inside = [module for each in idle for module in each.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_hook(lambda *_: ran.append("idle")) for module in inside]
    try:
        with torch.no_grad():
            found = parts.image_embeddings(batch)
            assert not ran
            whole = parts.core.get_image_features(
                **parts._given(batch, parts.core.get_image_features)
            )
    finally:
        for hook in hooks:
            hook.remove()
    expected = getattr(whole, "pooler_output", whole)
    expected = [expected] if isinstance(expected, Tensor) else expected
    assert torch.equal(found[0], torch.cat([each.flatten(0, -2) for each in expected]))
    if family == "llava-siglip":  # -2: the last layer and the head
        assert len(idle) == 2
        assert ran
    elif family in ("llava-clip", "llava-next"):
        assert len(idle) == 1
    else:
        assert len(idle) == (family in ("llava-onevision",))  # the head alone, or nothing


MASKED = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", *WHOLE)
"""Families that need the padding mask: their positions or their attention depend on it."""


def test_plain_decoders_read_a_batch_padded_on_the_right_without_its_mask(case: Case) -> None:
    family, student, _, batch = case
    parts = VisionLanguageModel(student)
    positions = answer_positions(batch["labels"])
    masks: list[Any] = []
    layer = parts.language_model.layers[0]  # type: ignore[union-attr, index]
    hook = layer.register_forward_pre_hook(
        lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
    )
    collated: dict[str, Any] = batch | entries_of(places_of(batch, IMAGE))
    if "image_sizes" in batch:
        collated["image_sizes"] = batch["image_sizes"].tolist()
    try:
        with torch.no_grad(), counted() as operations:
            found = parts.answer_states(collated)
        assert len(masks) == 1
        assert (masks[0] is None) == (family not in MASKED)
        if family not in MASKED:  # and no mask: no difference at all at any real token
            real = batch["attention_mask"].bool()
            whole, bare = (
                parts.hidden_states(each)[real]
                for each in (batch, batch | {"attention_mask": None})
            )
            assert float((whole - bare).detach().abs().max()) == 0.0
            assert family in ("smolvlm", "idefics3") or not operations.waits
    finally:
        hook.remove()
    expected = parts.hidden_states(batch)[positions]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Padded on the left, the mask stays.
    given = without_labels(batch) | {"labels": batch["labels"]}
    left = {n: given[n].flip(-1) for n in ("input_ids", "labels", "attention_mask")}
    if family not in MASKED:
        masks.clear()
        hook = layer.register_forward_pre_hook(
            lambda _, __, given: masks.append(given["attention_mask"]), with_kwargs=True
        )
        parts.answer_states(given | left)
        hook.remove()
        assert masks[0] is not None


def test_answers_and_images_are_found_where_they_lie() -> None:
    labels = torch.tensor([[-100, 5, -100, 6], [-100] * 4, [-100, -100, -100, 7]])
    ids = torch.tensor([[9, 5, 3, 6], [9, 9, 0, 0], [3, 3, 3, 7]])
    places = find_places({"labels": labels, "input_ids": ids}, 9)
    assert places.answers.tolist() == [0, 2, 10]
    assert places.slots.tolist() == [0, 1, 4]
    assert places.owners.tolist() == [0, 0, 2]
    assert places.table.tolist() == [[0, 2], [3, 3], [2, 3]]
    assert places.images.tolist() == [0, 4, 5]
    assert places.padded_right
    for row, right in (([1, 1, 0, 0], True), ([0, 1, 1, 1], False), ([1, 0, 1, 0], False)):
        mask = torch.tensor([[1] * 4, row, [1] * 4])
        given = {"labels": labels, "input_ids": ids, "attention_mask": mask}
        assert find_places(given, 9).padded_right == right
    none = find_places({"labels": torch.full((2, 3), -100), "input_ids": ids[:2, :3]}, 9)
    assert len(none.answers) == 0
    assert none.table.shape == (2, 1)


def mistral(window: int | None) -> Any:
    return text_config(transformers.MistralConfig, 32, sliding_window=window)


def test_a_last_layer_that_cannot_be_narrowed_runs_everywhere() -> None:
    """Placed by accelerate, with a sliding window, or met by DeepStack."""
    parts = VisionLanguageModel(make("llava-siglip"))
    batch = batch_for("llava-siglip", token_counts("llava-siglip", parts))
    positions = answer_positions(batch["labels"])
    expected = parts.hidden_states(batch)[positions]
    layer: Any = parts.language_model.layers[-1]  # type: ignore[union-attr, index]
    assert not torch.equal(parts.answer_states(batch), expected)  # by rounding
    layer.forward = layer.forward
    assert torch.equal(parts.answer_states(batch), expected)
    assert "forward" in vars(layer)  # whose it is, keeps it
    del layer.forward
    layer.self_attn.sliding_window = 4
    assert torch.equal(VisionLanguageModel(parts.model).answer_states(batch), expected)
    for window in (None, 4):
        config = parts.config.to_dict() | {"text_config": mistral(window).to_dict()}
        torch.manual_seed(0)
        kind = type(parts.whole)
        sliding = VisionLanguageModel(kind(type(parts.config)(**config)).eval())
        assert (sliding._plain_last_layer is None) == (window is not None)
        assert sliding._plain_decoder == (window is None)
        with torch.no_grad():
            expected = sliding.hidden_states(batch)[positions]
            torch.testing.assert_close(sliding.answer_states(batch), expected)
    qwen = make("qwen3-vl")
    assert VisionLanguageModel(qwen)._plain_last_layer is not None
    qwen.model.language_model.layers = qwen.model.language_model.layers[:2]
    assert VisionLanguageModel(qwen)._plain_last_layer is None


@torch.no_grad()
def test_the_tower_runs_once_where_its_output_is_kept(case: Case) -> None:
    _, student, teacher, batch = case
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    calls: list[int] = []
    layer = next(m for m in ours.vision_tower.modules() if type(m).__name__.endswith("Attention"))
    hook = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        with keeping_vision(ours) as kept:
            ours.hidden_states(batch)
        once = len(calls)
        with seeing_with(theirs, ours, kept):
            theirs.hidden_states(batch)
        assert len(calls) == once > 0
        with seeing_with(theirs, ours):
            theirs.hidden_states(batch)
        assert len(calls) == 2 * once
    finally:
        hook.remove()


@torch.no_grad()
def test_the_probe_sees_the_attention_that_the_eager_model_reports(case: Case) -> None:
    """Also where a prefix is seen in both directions (PaliGemma) or images are (Gemma 3)."""
    family, student, _, batch = case
    parts = VisionLanguageModel(student)
    with FirstLayerProbe(parts) as probe:
        parts.hidden_states(batch)
    found = probe.weights(batch["attention_mask"])
    eager = make(family, 32, seed=1)
    eager.set_attn_implementation("eager")
    expected = eager(**without_labels(batch), output_attentions=True).attentions[0]
    for row, real in enumerate(batch["attention_mask"].bool()):
        torch.testing.assert_close(found[row][:, real], expected[row][:, real])
    places = batch["input_ids"] == IMAGE
    assert torch.equal(probe.embeddings[places], parts.image_embeddings(batch)[0])


@pytest.mark.parametrize("method", ["switch-kd", "llava-kd", "align-kd"])
@pytest.mark.slow
def test_every_method_runs_on_every_family_and_recomputes_to_the_same(
    case: Case, method: str
) -> None:
    family, _, _, batch = case
    results = []
    for recompute in (False, True):
        student, teacher = make(family, 32, seed=1), make(family, 64, seed=2)
        distiller = Distiller(student, teacher, METHODS[method])
        if recompute:
            checkpoint_activations(student)
            checkpoint_activations(teacher, frozen=True)
        distiller.train()
        torch.manual_seed(0)
        if distiller.adapter is not None:
            torch.nn.init.normal_(distiller.adapter.weight)
        loss, values = distiller(batch, float(answer_positions(batch["labels"]).sum()))
        loss.backward()
        assert all(bool(value > 0) for value in values.values())
        results.append((loss.detach(), {n: p.grad for n, p in student.named_parameters()}))
    (loss, gradients), (again, recomputed) = results
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_text_only_batches_do_not_reach_the_vision_tower(case: Case) -> None:
    family, student, _, _ = case
    torch.manual_seed(3)
    batch = text_batch([torch.randint(5, 80, (length,)) for length in (9, 6)])
    batch |= kinds_for(family, batch)
    parts = VisionLanguageModel(student)

    def refuse(*_: Any) -> None:
        raise AssertionError("the vision tower was called")

    hooks = [module.register_forward_pre_hook(refuse) for module in parts.vision_tower.modules()]
    try:
        assert not has_images(batch)
        positions = answer_positions(batch["labels"])
        found = logits(student, batch, positions)
        empty = batch | {"pixel_values": torch.zeros(0, 3, 16, 16)}
        assert torch.equal(logits(student, empty, positions), found)
    finally:
        for hook in hooks:
            hook.remove()
    whole = student(**without_labels(batch)).logits
    torch.testing.assert_close(found, whole[positions], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_what_a_model_says_of_itself(case: Case) -> None:
    family, student, teacher, batch = case
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    assert ours.image_token_id == IMAGE
    assert ours.vocab_size == 99
    assert (ours.hidden_size, theirs.hidden_size) == (32, 64)
    assert ours.image_geometry == theirs.image_geometry
    assert ours.vision_geometry == theirs.vision_geometry
    assert ours.image_geometry["patch_size"]
    assert ours.vision_geometry["vision width"] == 16
    assert (ours.image_token_count is None) == family.startswith("qwen")
    embeddings = ours.image_embeddings(batch)
    assert {e.shape for e in embeddings} == {(int((batch["input_ids"] == IMAGE).sum()), 32)}
    assert len(embeddings) == 1 + ours.vision_geometry["DeepStack layers"]
    owners = [
        id(p)
        for part in (ours.vision_tower, ours.projector, ours.language_model)
        for p in part.parameters()
    ]
    assert len(owners) == len(set(owners))
    head = {id(p) for p in student.get_output_embeddings().parameters()}
    assert {id(p) for p in student.parameters()} == set(owners) | head


@torch.no_grad()
def test_images_that_do_not_fill_their_places_are_refused(case: Case) -> None:
    _, student, _, batch = case
    ids = batch["input_ids"].clone()
    ids[0, (ids[0] == IMAGE).nonzero()[0]] = 7
    parts = VisionLanguageModel(student)
    with pytest.raises(UsageError, match=r"does not take this batch: .*tokens") as caught:
        parts.hidden_states(batch | {"input_ids": ids})
    assert "\n" not in caught.value.problem


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava-siglip", "qwen3-vl", "idefics3"])
def test_a_student_in_float32_switches_into_a_teacher_in_bfloat16(family: str) -> None:
    student, teacher = make(family), make(family, 64).bfloat16()
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    batch = batch_for(family, token_counts(family, ours))
    with keeping_vision(ours) as kept:
        ours.hidden_states(batch)
    with seeing_with(theirs, ours, kept):
        hidden = theirs.hidden_states(batch)
    assert hidden.dtype == torch.bfloat16
    assert hidden.isfinite().all()


def test_adapters_stay_in_effect() -> None:
    peft = pytest.importorskip("peft")
    model = make("llava-siglip")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    parts = VisionLanguageModel(adapted)
    assert parts.model is adapted
    batch = batch_for("llava-siglip", token_counts("llava-siglip", parts))
    positions = answer_positions(batch["labels"])
    with torch.no_grad():
        found = logits(adapted, batch, positions)
        whole = adapted(**without_labels(batch)).logits
        torch.testing.assert_close(found, whole[positions], rtol=1e-5, atol=1e-6)
        narrowed = parts.lm_head(parts.answer_states(batch))
        torch.testing.assert_close(narrowed, found, rtol=1e-4, atol=1e-5)
        with adapted.disable_adapter():
            assert not torch.allclose(found, logits(adapted, batch, positions))


def test_answer_positions_are_those_whose_next_token_is_supervised() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [7, -100, -100, -100, 8]])
    expected = [[False, True, True, False, False], [False, False, False, True, False]]
    assert answer_positions(labels).tolist() == expected


def test_other_architectures_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"Linear .*Supported: Llava"):
        VisionLanguageModel(nn.Linear(2, 2))


def test_every_supported_class_exists_in_transformers_and_is_tested() -> None:
    import transformers

    tested = {type(make(family)).__name__ for family in FAMILIES}
    assert tested == set(vision_language.FAMILIES)
    assert all(hasattr(transformers, name) for name in vision_language.FAMILIES)


def test_videos_are_refused() -> None:
    parts = VisionLanguageModel(make("llava-onevision"))
    with pytest.raises(UsageError, match="video"):
        parts.hidden_states({"pixel_values_videos": torch.zeros(1)})


def test_qwen_without_token_kinds_counts_positions_in_three_axes() -> None:
    """Left to itself transformers would fall back to positions of text."""
    model = make("qwen2.5-vl")
    parts = VisionLanguageModel(model)
    batch = batch_for("qwen2.5-vl", [12, 10, 1])
    with torch.no_grad():
        told = parts.hidden_states(batch | kinds_for("qwen2.5-vl", batch))
        assert torch.equal(parts.hidden_states(batch), told)
