"""Paths of what comes with kd-bench: `embedded:weights/teacher`, `embedded:data/train`, ...

Weights lie in the package. Data is drawn into the user's cache folder on first use.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from platformdirs import user_cache_path

from kd_bench.errors import UsageError
from kd_bench.world.build import VERSION, build_world

PREFIX = "embedded:"
WEIGHTS = Path(__file__).parent / "weights"
SEED = 0


def resolve(reference: str) -> Path:
    """The path of `embedded:weights/<model>` or `embedded:data/<folder>`; others stay as they are.

    Raises:
        UsageError: nothing of that name is embedded.
    """
    if not reference.startswith(PREFIX):
        return Path(reference).expanduser()
    kind, _, name = reference.removeprefix(PREFIX).partition("/")
    if kind == "weights" and (WEIGHTS / name).is_dir():
        return WEIGHTS / name
    if kind == "data":
        first = name.partition("/")[0]
        path = world_folder(teacher=first == "teacher", study=first == "study") / name
        if path.exists():
            return path
    known = ", ".join(sorted(path.name for path in WEIGHTS.glob("*")))
    raise UsageError(
        f"Nothing is embedded as {reference!r}.",
        f"There is embedded:weights/ ({known}) and embedded:data/ (train, test, ...).",
    )


def world_folder(*, teacher: bool = False, study: bool = False) -> Path:
    """The embedded world, drawn on first use; `teacher` and `study` add files of `build_world`."""
    folder = _cache() / f"world-{VERSION}"
    build_world(folder, SEED, teacher=teacher, study=study)
    return folder


def wanted_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """`$KD_BENCH_CACHE`, or the user's cache folder."""
    chosen = environment.get("KD_BENCH_CACHE")
    return Path(chosen) if chosen else user_cache_path("kd-bench")


def _cache() -> Path:
    """The wanted cache, or a temporary one where the user's is not writable."""
    cache = wanted_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError:
        if chosen := os.environ.get("KD_BENCH_CACHE"):
            raise UsageError(f"KD_BENCH_CACHE={chosen} cannot be written.", "Change it.") from None
        return Path(tempfile.gettempdir()) / "kd-bench"
