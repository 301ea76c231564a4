"""The visual switch as a model of its own: z_SW = L_T(P_T(V_S(x_v)), x_t), arXiv 2604.14629.

teacher - switch is what the student's eyes lost, switch - student what its language model lost.
"""

from pathlib import Path
from typing import Any

import torch

from kd_bench.distill.compatibility import check_pair
from kd_bench.distill.models import check_image_token, load_model, load_processor
from kd_bench.distill.recipe import Term
from kd_bench.distill.vision_language import VisionLanguageModel, put_vision


def load_hybrid(vision: Path, language: Path, dtype: str, quantize: str = "") -> dict[str, Any]:
    """Model and processor of a hybrid, as `KdBench` takes them: the teacher with another tower.

    Raises:
        UsageError: the two do not fit each other; both values are named.
    """
    from kd_bench.evals.adapter import torch_dtype

    place = "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch_dtype(dtype)
    student = load_model(vision, dtype=kind, device=place, quantize=quantize)
    teacher = load_model(language, dtype=kind, device=place, quantize=quantize)
    eyes, words = load_processor(vision), load_processor(language)
    check_image_token(language, teacher, words)
    switch = [Term(loss="dbild", of="switch")]
    check_pair(student, teacher, eyes, words, switch, truncate_vocabulary=True)
    put_vision(VisionLanguageModel(student), into=VisionLanguageModel(teacher))
    return {"model": teacher, "processor": words}
