"""The embedded visual world: procedural pictures, ten benchmarks about them, training data."""

from kd_bench.world.benchmarks import BENCHMARKS
from kd_bench.world.build import build_world
from kd_bench.world.prompts import oracle_answer, prompt
from kd_bench.world.testsets import UPSTREAM_SPLITS

__all__ = ["BENCHMARKS", "UPSTREAM_SPLITS", "build_world", "oracle_answer", "prompt"]
