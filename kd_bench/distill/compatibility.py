"""Do this student and this teacher fit each other? Asked before anything is trained."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_bench.distill import losses
from kd_bench.distill.distiller import Distiller
from kd_bench.distill.recipe import Term, needs_switch, needs_teacher, sharing_images
from kd_bench.distill.vision_language import (
    VisionLanguageModel,
    answer_positions,
    has_images,
    seeing_with,
    teacher_inputs,
)
from kd_bench.errors import TrainingError, UsageError

TOKENS = "number of image tokens an image"
NOT_OF_PIXELS = {
    "auto_map",
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",  # images are RGB before they get there
    "image_processor_type",
    "input_data_format",
    "processor_class",
    "return_tensors",
}
UNUSED_WITHOUT = ("crop_size", "pad_size")  # do_center_crop and do_pad say whether they count


def check_terms(terms: Sequence[Term], trainable: Sequence[str], stage: str) -> None:
    """Refuse a switch term whose gradient has nowhere to go.

    Raises:
        UsageError: the vision tower is frozen, so z_SW is a constant that would be paid for.
    """
    if needs_switch(tuple(terms)) and "vision_tower" not in trainable:
        raise UsageError(
            f"Stage {stage!r} has a switch term but freezes the vision tower, the only part that "
            "the switch's gradient reaches.",
            "Add vision_tower to trainable, or take the switch term out (method=dbild).",
        )


def check_pair(
    student: nn.Module,
    teacher: nn.Module,
    student_processor: Any,
    teacher_processor: Any,
    terms: Sequence[Term],
    *,
    truncate_vocabulary: bool = False,
) -> int | None:
    """Check everything that the terms compare, and say both values where they differ.

    Args:
        student_processor, teacher_processor: None where they are not known; then only what the
            models themselves tell is compared.

    Returns:
        Rows that both LM heads are cut to, or None where they are equal.

    Raises:
        UsageError: tokenizers or vocabularies differ; or, where a term compares image tokens or
            feeds one model's into the other, images, image tokens or vision towers do.
    """
    if not needs_teacher(tuple(terms)):
        return None
    if student_processor is not None and teacher_processor is not None:
        _check_tokenizers(student_processor.tokenizer, teacher_processor.tokenizer)
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    sharing = sharing_images(tuple(terms))
    if sharing:
        difference = image_difference(student, teacher, student_processor, teacher_processor)
        if difference:
            raise UsageError(
                f"{difference} The term {sharing[0].label!r} needs both models to be given the "
                "same image tokens.",
                "Make the two agree, or use a method that compares answers only (kl, dbild).",
            )
    if needs_switch(tuple(terms)):
        for name, value in ours.vision_geometry.items():
            _equal(
                name,
                value,
                theirs.vision_geometry[name],
                "The switch feeds the student's vision tower into the teacher's projector: use a "
                "tower that gives what the teacher's gives, or a method without a switch term "
                "(method=dbild).",
            )
    return _vocabulary(ours.vocab_size, theirs.vocab_size, truncate_vocabulary)


def image_difference(
    student: nn.Module, teacher: nn.Module, student_processor: Any, teacher_processor: Any
) -> str:
    """Why one batch of pixels and image tokens cannot serve both models; empty where it can."""
    ours, theirs = VisionLanguageModel(student), VisionLanguageModel(teacher)
    pairs: dict[str, tuple[Any, Any]] = {
        "image token id": (ours.image_token_id, theirs.image_token_id)
    }
    left, right = ours.image_geometry, theirs.image_geometry
    names = sorted(left.keys() & right.keys(), key=lambda name: name != TOKENS)
    pairs |= {name: (left[name], right[name]) for name in names}
    for name, (mine, other) in pairs.items():
        if mine != other:
            return f"The {name} differs: student {mine}, teacher {other}."
    if student_processor is None or teacher_processor is None:
        return ""
    left, right = _image_settings(student_processor), _image_settings(teacher_processor)
    for name in sorted(left.keys() | right.keys()):
        mine, other = left.get(name), right.get(name)
        only_one_crops = name in UNUSED_WITHOUT and None in (mine, other)
        if mine != other and not only_one_crops:
            mine, other = ("off" if value is None else value for value in (mine, other))
            return f"The image processors differ in {name}: student {mine}, teacher {other}."
    return ""


def _equal(what: str, student: Any, teacher: Any, hint: str) -> None:
    if student != teacher:
        raise UsageError(f"The {what} differs: student {student}, teacher {teacher}.", hint)


def _check_tokenizers(student: Any, teacher: Any) -> None:
    """The same token must mean the same word; padding rows of the LM head are another matter."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    if len(ours) != len(theirs):
        difference = f"student {len(ours)} tokens, teacher {len(theirs)}"
    else:
        word = min(word for word in ours if ours[word] != theirs.get(word))
        difference = f"{word!r} is {ours[word]} for the student, {theirs.get(word)} for the teacher"
    raise UsageError(
        f"The tokenizers differ: {difference}.",
        "Logits can be compared only over one vocabulary: take a student and a teacher of one "
        "family.",
    )


def _image_settings(processor: Any) -> dict[str, Any]:
    """What an image processor was told about pixels; what is off or not set is left out."""
    settings = processor.image_processor.to_dict()
    plain = {n: _plain(value) for n, value in settings.items() if n not in NOT_OF_PIXELS}
    return {n: value for n, value in plain.items() if value is not None and value is not False}


def _plain(value: Any) -> Any:
    """Lists for tuples and numbers for enums, so that equal settings compare equal."""
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "items"):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _vocabulary(student: int, teacher: int, truncate: bool) -> int | None:
    if student == teacher:
        return None
    if not truncate:
        raise UsageError(
            f"The LM heads differ in rows: student {student}, teacher {teacher}. The tokenizers "
            "are equal, so the surplus rows are padding.",
            "Ignore them with truncate_vocabulary=true.",
        )
    return min(student, teacher)


@torch.no_grad()
def switch_gap(
    student: VisionLanguageModel, teacher: VisionLanguageModel, batch: Mapping[str, Tensor]
) -> float:
    """Largest |z_SW - z_T| over the answers' hidden states of a batch.

    Exactly zero where student and teacher have equal vision weights.
    """
    answers = answer_positions(batch["labels"])
    own = teacher.hidden_states(batch)[answers]
    with seeing_with(teacher, student) if has_images(batch) else contextlib.nullcontext():
        switched = teacher.hidden_states(batch)[answers]
    return float((switched - own).abs().max()) if switched.numel() else 0.0


@torch.no_grad()
def self_divergence(teacher: VisionLanguageModel, batch: Mapping[str, Tensor]) -> float:
    """Largest KL(T || T) over the answers of a batch: zero unless the teacher is not repeatable."""
    answers = answer_positions(batch["labels"])
    first, second = (teacher.lm_head(teacher.hidden_states(batch)[answers][:64]) for _ in range(2))
    return float(losses.kl(first, second).abs().max()) if len(first) else 0.0


def step_zero(distiller: Distiller, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Check what must hold before the first step, where it can be known.

    Raises:
        TrainingError: the switch of equal eyes differs from the teacher, or KL(T || T) is not 0.
    """
    teacher = distiller.teacher
    if teacher is None:
        return {}
    found = {"self_divergence": self_divergence(teacher, teacher_inputs(batch))}
    if needs_switch(distiller.terms) and _equal_weights(
        distiller.parts.vision_tower, teacher.vision_tower
    ):
        found["switch_gap"] = switch_gap(distiller.parts, teacher, batch)
    for name, value in found.items():
        if not value == 0:
            raise TrainingError(
                f"Before the first step {name} is {value:.3g} and must be 0.",
                "The teacher does not compute the same twice: look for dropout or remote code.",
            )
    return found


def _equal_weights(left: nn.Module, right: nn.Module) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(
        tensor.shape == theirs[name].shape
        and tensor.dtype == theirs[name].dtype
        and torch.equal(tensor.to(theirs[name].device), theirs[name])
        for name, tensor in ours.items()
    )
