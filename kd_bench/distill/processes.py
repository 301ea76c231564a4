"""Several processes on one training or evaluation, as torchrun and accelerate start them.

The Trainer and lmms-eval share the work out; what is here keeps a run folder in one hand: process 0
writes it, and in an evaluation the others only append answers to journals of their own.
"""

import os
from typing import Any


def rank() -> int:
    """Number of this process, 0 when it is alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> None:
    """Meet the other processes; nothing to do alone."""
    if world_size() == 1:
        return
    import torch
    from accelerate import PartialState

    # Without an accelerator the processes find each other only if told to stay on the CPU; and
    # lmms-eval asks this very state how many there are.
    PartialState(cpu=not torch.accelerator.is_available())


def broadcast(value: Any) -> Any:
    """Process 0's value, everywhere."""
    if world_size() == 1:
        return value
    from torch import distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every process's value at process 0, in order; empty elsewhere."""
    if world_size() == 1:
        return [value]
    from torch import distributed

    box: list[Any] | None = [None] * world_size() if rank() == 0 else None
    distributed.gather_object(value, box, dst=0)
    return box or []


def barrier() -> None:
    """Meet the others and wait until all came this far."""
    if world_size() > 1:
        join()
        from torch import distributed

        distributed.barrier()
