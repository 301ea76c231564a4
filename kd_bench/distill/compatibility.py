"""Do this student and this teacher fit each other? Asked before anything is trained."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from kd_bench.distill.methods import Term, needs_switch, needs_teacher
from kd_bench.distill.pathways import pathway_for
from kd_bench.errors import UsageError

__all__ = ["check_pair", "check_terms"]


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

    Returns:
        Rows that both LM heads are cut to, or None where they are equal.

    Raises:
        UsageError: tokenizers, vocabularies, image-token counts, widths or pictures do not fit.
    """
    if not needs_teacher(tuple(terms)):
        return None
    _check_tokenizers(student_processor.tokenizer, teacher_processor.tokenizer)
    _check_pictures(student_processor, teacher_processor)
    learner, master = pathway_for(student), pathway_for(teacher)
    _equal(
        "image token id",
        learner.image_token_id,
        master.image_token_id,
        "Give both the same processor.",
    )
    _equal(
        "number of image tokens a picture",
        learner.image_token_count,
        master.image_token_count,
        "Use vision towers of one picture size, patch size and feature selection.",
    )
    for name in sorted(learner.geometry.keys() & master.geometry.keys()):
        _equal(name, learner.geometry[name], master.geometry[name], "Make the two configs agree.")
    if needs_switch(tuple(terms)):
        _equal(
            "vision width",
            learner.vision_width,
            master.vision_width,
            "The switch feeds the student's vision tower into the teacher's projector: use a "
            "tower of the teacher's width, or a method without a switch term (method=dbild).",
        )
    return _vocabulary(learner.vocabulary_size, master.vocabulary_size, truncate_vocabulary)


def _equal(what: str, student: Any, teacher: Any, way_out: str) -> None:
    if student != teacher:
        raise UsageError(f"The {what} differs: student {student}, teacher {teacher}.", way_out)


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


def _check_pictures(student: Any, teacher: Any) -> None:
    """One batch of pixels serves both models, so both must want the same pixels."""
    ours, theirs = student.image_processor.to_dict(), teacher.image_processor.to_dict()
    for name in (
        "size",
        "crop_size",
        "do_resize",
        "do_center_crop",
        "do_rescale",
        "do_normalize",
        "image_mean",
        "image_std",
        "resample",
        "patch_size",
        "do_pad",
    ):
        left, right = ours.get(name), theirs.get(name)
        if left is not None and right is not None and _plain(left) != _plain(right):
            raise UsageError(
                f"The image processors differ in {name}: student {_plain(left)}, "
                f"teacher {_plain(right)}.",
                "Both models are given one batch of pixels: make the two agree.",
            )


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
