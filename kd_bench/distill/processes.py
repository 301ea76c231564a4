"""Several processes on one training or evaluation, as torchrun and accelerate start them.

The Trainer and lmms-eval share the work out; what is here keeps a run folder in one hand: process 0
writes it, and in an evaluation the others only append answers to journals of their own. Where FSDP
spreads the student's weights over the devices, the frozen teacher stays whole on each, unless the
recipe says `teacher_sharding: fsdp2`.
"""

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from kd_bench.errors import UsageError


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Let the garbage collector rest while much is imported; it would look through all of it often.

    A fifth of the time that torch, transformers and lmms-eval take.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def rank() -> int:
    """Number of this process, 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(timeout: timedelta | None = None) -> None:
    """Meet the other processes; nothing to do alone.

    Args:
        timeout: how long one may have to wait for the others; None is torch's ten minutes.
    """
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    # Without an accelerator the processes find each other only if told to stay on the CPU; and
    # lmms-eval asks this very state how many there are.
    options = {} if timeout is None else {"timeout": timeout}
    PartialState(cpu=not torch.accelerator.is_available(), **options)


def barrier() -> None:
    """Meet the others and wait until all came this far."""
    if world_size() > 1:
        from accelerate import PartialState

        join()
        PartialState().wait_for_everyone()


def broadcast(value: Any) -> Any:
    """Process 0's value, everywhere."""
    if world_size() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def gather(value: Any) -> list[Any]:
    """Every process's value, in order."""
    if world_size() == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def shards_student() -> bool:
    """Whether accelerate was told to spread the student's weights over the devices."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def begin_sharding() -> None:
    """Settle, before any checkpoint is loaded, how a sharded training loads and splits weights.

    Raises:
        UsageError: FSDP's first version was asked for.
    """
    if not shards_student():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "This training was launched with FSDP's first version, which flattens the weights.",
            "Launch it with `accelerate launch --use_fsdp --fsdp_version 2 ...`.",
        )
    from accelerate.utils import disable_fsdp_ram_efficient_loading

    # That loading leaves every process but the first with an empty model, the teacher's too.
    disable_fsdp_ram_efficient_loading()


def shard_layers(layers: Sequence[Any]) -> None:
    """Spread the weights of a frozen model's layers over all devices; each is gathered as it runs.

    Whatever lies outside of the layers stays whole on each device. From here on every process must
    run the layers as often as the others do, forward and backward.
    """
    if world_size() == 1:
        return
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    join()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (world_size(),))
    for layer in layers:
        layer.requires_grad_(False)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)


def gather_weights(model: Any) -> None:
    """Put whole weights back in place of a trained model's shards. Every process must call it.

    The model can then be merged and saved, and no longer trained.
    """
    import torch
    from torch.distributed.tensor import DTensor

    whole: dict[int, Any] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:
                with torch.no_grad():
                    whole[id(parameter)] = torch.nn.Parameter(parameter.full_tensor())
            setattr(module, name, whole[id(parameter)])
