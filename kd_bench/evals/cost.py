"""What a model costs to run: parameters, bytes, latency of one answer, peak memory."""

import contextlib
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd_bench.distill.models import weight_count
from kd_bench.evals.questions import Question, Settings
from kd_bench.records import Cost

if TYPE_CHECKING:
    from kd_bench.evals.engine import Engine


REPEATS = 15


class MemoryMeter:
    """Peak memory since the meter was made: the accelerator's own, or this process's growth."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        # Linux forgets its high-water mark when asked to; elsewhere nothing is measured.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._before = _status_bytes("VmRSS:")

    def peak(self) -> int | None:
        """Bytes, None where it cannot be told."""
        if torch.cuda.is_available():
            return int(torch.cuda.max_memory_allocated())
        peak = _status_bytes("VmHWM:")
        return None if peak is None or self._before is None else max(0, peak - self._before)


def measure(engine: "Engine", memory: MemoryMeter, repeats: int = REPEATS) -> Cost:
    """Measure a loaded model on a fixed question about a fixed picture, four tokens an answer.

    The latency is the median of `repeats` answers at batch 1, picture encoding included. On an
    accelerator the peak memory is the evaluation's. On a CPU it is the weights and what the answers
    need: the evaluation's would count the libraries that a process loads with its first model.
    """
    weights = {id(weight): weight for weight in engine.model.parameters()}.values()
    weight_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    on_cpu = not torch.cuda.is_available()
    meter = MemoryMeter() if on_cpu else memory
    latency = _latency(engine, repeats)
    peak = meter.peak()
    return Cost(
        parameters=sum(weight_count(weight) for weight in weights),
        weight_bytes=weight_bytes,
        latency_ms=round(latency, 3),
        peak_memory_bytes=peak + weight_bytes if on_cpu and peak is not None else peak,
    )


def _latency(engine: "Engine", repeats: int) -> float:
    from PIL import Image

    settings = Settings(max_new_tokens=4)
    times = []
    for number in range(repeats + 2):
        shade = (number * 7) % 256  # a new picture each time: nothing is read from a cache
        picture = Image.new("RGB", (64, 64), (shade, 128, 255 - shade))
        question = Question(number, "What is this?", _once(picture), settings)
        started = time.perf_counter()
        for _ in engine.answers([question]):
            pass
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])  # the first two warm up


def _once(picture: Any) -> Any:
    return lambda: [picture]


def _status_bytes(field: str) -> int | None:
    """One of the memory lines of Linux's /proc/self/status."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return None
