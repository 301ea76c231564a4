"""Teacher, student and switch logits of every supported vision-language family.

`pathway_for(model)` takes a model apart at its projector; `switch_hidden_states` sends the
student's view through the teacher's projector and language model.
"""

import torch
from torch import Tensor, nn

from kd_bench.distill.pathways.base import Features, Inputs, Pathway, PathwayBase, unwrap
from kd_bench.distill.pathways.gemma import Gemma3Pathway, PaliGemmaPathway
from kd_bench.distill.pathways.idefics import Idefics3Pathway
from kd_bench.distill.pathways.internvl import InternVLPathway
from kd_bench.distill.pathways.llava import (
    LlavaNextPathway,
    LlavaOnevisionPathway,
    LlavaPathway,
)
from kd_bench.distill.pathways.qwen import Qwen2_5VLPathway, Qwen3VLPathway
from kd_bench.errors import UsageError

__all__ = [
    "SUPPORTED",
    "Features",
    "Inputs",
    "Pathway",
    "answer_positions",
    "pathway_for",
    "switch_hidden_states",
]

SUPPORTED: dict[str, type[PathwayBase]] = {
    "LlavaForConditionalGeneration": LlavaPathway,
    "LlavaNextForConditionalGeneration": LlavaNextPathway,
    "LlavaOnevisionForConditionalGeneration": LlavaOnevisionPathway,
    "Qwen2_5_VLForConditionalGeneration": Qwen2_5VLPathway,
    "Qwen3VLForConditionalGeneration": Qwen3VLPathway,
    "SmolVLMForConditionalGeneration": Idefics3Pathway,
    "Idefics3ForConditionalGeneration": Idefics3Pathway,
    "InternVLForConditionalGeneration": InternVLPathway,
    "PaliGemmaForConditionalGeneration": PaliGemmaPathway,
    "Gemma3ForConditionalGeneration": Gemma3Pathway,
}
"""Pathway by the class name of the transformers model."""


def pathway_for(model: nn.Module) -> Pathway:
    """The pathway of a loaded model, which may carry adapters.

    Raises:
        UsageError: the architecture is not one of `SUPPORTED`.
    """
    inner = unwrap(model)
    for kind in type(inner).__mro__:
        if kind.__name__ in SUPPORTED:
            return SUPPORTED[kind.__name__](model)  # type: ignore[return-value]
    raise UsageError(
        f"{type(inner).__name__} is not an architecture that kd-bench can distil.",
        f"Supported: {', '.join(SUPPORTED)}.",
    )


def answer_positions(labels: Tensor) -> Tensor:
    """Positions whose next token is supervised.

    Args:
        labels: [batch, length], -100 where nothing is asked.

    Returns:
        bool [batch, length]; the last column is always False.
    """
    positions = labels.new_zeros(labels.shape, dtype=torch.bool)
    positions[:, :-1] = labels[:, 1:] != -100
    return positions


def switch_hidden_states(
    student: Pathway, teacher: Pathway, inputs: Inputs, positions: Tensor
) -> Tensor:
    """Hidden states [N, hidden of the teacher] behind z_SW: student's eyes, teacher's language.

    The graph reaches the student's vision tower through the teacher's frozen modules.
    """
    features = student.encode_image(inputs)
    return teacher.decode(teacher.project(features, inputs), inputs, positions)
