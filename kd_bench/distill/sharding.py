"""Training with the student's weights spread over the devices (FSDP), as accelerate launches it.

The teacher is frozen and stays whole on every device.
"""

import os
from typing import Any

import torch
from torch import nn

from kd_bench.errors import UsageError


def begin_sharding() -> None:
    """Settle, before any checkpoint is loaded, how a sharded training loads and splits weights.

    Raises:
        UsageError: FSDP's first version was asked for.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "This training was launched with FSDP's first version, which flattens the weights.",
            "Launch it with `accelerate launch --use_fsdp --fsdp_version 2 ...`.",
        )
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    # That loading leaves every process but the first with an empty model, the teacher's too.
    disable_fsdp_ram_efficient_loading()


def gather_weights(model: nn.Module) -> None:
    """Put whole weights back in place of a trained model's shards. Every process must call it.

    The model can then be merged and saved, and no longer trained.
    """
    from torch.distributed.tensor import DTensor

    whole: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        parameters: dict[str, Any] = dict(module.named_parameters(recurse=False))
        for name, parameter in parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:
                with torch.no_grad():
                    whole[id(parameter)] = nn.Parameter(parameter.full_tensor())
            setattr(module, name, whole[id(parameter)])
