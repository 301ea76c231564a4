"""Makes the adapter known to lmms-eval (entry-point group `lmms_eval.models`).

lmms-eval --model kd_bench --model_args pretrained=CHECKPOINT --tasks pope
"""

from typing import Any


def manifests() -> list[Any]:
    """The models that kd-bench adds."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="kd_bench", simple_class_path="kd_bench.evals.models.KdBench")]
