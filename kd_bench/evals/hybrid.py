"""The visual switch as a model of its own: z_SW = L_T(P_T(V_S(x_v)), x_t), arXiv 2604.14629.

teacher - switch is what the student's eyes lost, switch - student what its language model lost.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kd_bench.distill.compatibility import check_pair
from kd_bench.distill.methods import Term
from kd_bench.distill.models import load_model, load_processor
from kd_bench.distill.pathways import Features, Inputs, Pathway, pathway_for

__all__ = ["SwitchPathway", "load_hybrid"]


class SwitchPathway:
    """The student's eyes before everything else of the teacher's.

    Attributes:
        base: the teacher's own pathway.
    """

    def __init__(self, student: Pathway, teacher: Pathway) -> None:
        self._student = student
        self.base = teacher

    def encode_image(self, inputs: Inputs) -> Features | None:
        """What the student's vision tower sees, in the form the teacher's projector takes."""
        return self._student.encode_image(inputs)

    def __getattr__(self, name: str) -> Any:
        if name == "base":  # while the object is being copied
            raise AttributeError(name)
        return getattr(self.base, name)


class _Whole(nn.Module):
    """The parts that run in a hybrid, so that they are counted; the rest of the student is not."""

    def __init__(self, student: Pathway, teacher: Pathway) -> None:
        super().__init__()
        self.vision_tower = student.vision_tower
        self.projector = teacher.projector
        self.language_model = teacher.language_model
        self.generation_config = getattr(teacher.model, "generation_config", None)
        head: Any = teacher.model.get_output_embeddings()  # type: ignore[operator]
        self.head = head
        self.config = teacher.model.config
        self._embeddings = [teacher.model.get_input_embeddings()]  # type: ignore[operator]

    def get_input_embeddings(self) -> Any:
        """The teacher's token embeddings."""
        return self._embeddings[0]


def load_hybrid(vision: Path, language: Path, dtype: str, quantize: str = "") -> dict[str, Any]:
    """Model, processor and pathway of a hybrid, as `KdBench` takes them.

    Raises:
        UsageError: the two do not fit each other; both values are named.
    """
    from kd_bench.evals.adapter import torch_dtype

    place = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch_dtype(dtype)
    student = load_model(vision, dtype=kind, device=place, quantize=quantize)
    teacher = load_model(language, dtype=kind, device=place, quantize=quantize)
    eyes, words = load_processor(vision), load_processor(language)
    switch = [Term(loss="dbild", of="switch")]
    check_pair(student, teacher, eyes, words, switch, truncate_vocabulary=True)
    sides = pathway_for(student), pathway_for(teacher)
    whole = _Whole(*sides).eval()
    return {"model": whole, "processor": words, "pathway": SwitchPathway(*sides)}
