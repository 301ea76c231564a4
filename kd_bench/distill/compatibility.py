"""Do a student and a teacher fit each other, in everything that the terms compare?"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from kd_bench.distill.recipe import Term, needs_switch, needs_teacher, sharing_images
from kd_bench.distill.vision_language import TOKENS, VisionLanguageModel, plain
from kd_bench.errors import UsageError

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
        Vocabulary size that both LM heads are cut to, or None where they are equal.

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
    for name, value in ours.vision_geometry.items() if needs_switch(tuple(terms)) else ():
        if value != theirs.vision_geometry[name]:
            raise UsageError(
                f"The {name} differs: student {value}, teacher {theirs.vision_geometry[name]}.",
                "The switch feeds the student's vision tower into the teacher's projector: use a "
                "tower that gives what the teacher's gives, or a method without a switch term "
                "(method=dbild).",
            )
    sizes = ours.vocab_size, theirs.vocab_size
    if sizes[0] != sizes[1] and not truncate_vocabulary:
        raise UsageError(
            f"The LM heads differ in rows: student {sizes[0]}, teacher {sizes[1]}. The tokenizers "
            "are equal, so the surplus rows are padding.",
            "Ignore them with truncate_vocabulary=true.",
        )
    return None if sizes[0] == sizes[1] else min(sizes)


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
    told = {n: plain(value) for n, value in settings.items() if n not in NOT_OF_PIXELS}
    return {n: value for n, value in told.items() if value is not None and value is not False}
