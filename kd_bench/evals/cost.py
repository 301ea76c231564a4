"""What a model costs to run: parameters, bytes, latency of one answer, peak memory."""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kd_bench.evals.questions import Question, Settings
from kd_bench.records import Cost

if TYPE_CHECKING:
    from kd_bench.evals.engine import Engine

__all__ = ["measure"]

REPEATS = 15


def measure(engine: "Engine", repeats: int = REPEATS) -> Cost:
    """Measure a loaded model on a fixed question about a fixed picture, four tokens an answer.

    The latency is the median of `repeats` answers at batch 1, picture encoding included.
    """
    weights = {id(weight): weight for weight in engine.model.parameters()}.values()
    return Cost(
        parameters=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in weights),
        latency_ms=round(_latency(engine, repeats), 3),
        peak_memory_bytes=_peak_memory(),
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


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
