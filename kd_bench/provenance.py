"""Where a number came from: code, versions, hardware, seed and command line.

Everything here is read without importing a heavy package, so that a bare CI runner can do it.
"""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kd_bench

PACKAGES: tuple[str, ...] = (
    "torch", "torchvision", "transformers", "accelerate", "peft", "tokenizers", "safetensors",
    "datasets", "lmms-eval", "numpy", "scipy", "pandas", "pillow",
)  # fmt: skip


def collect(*, seed: int | None = None, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything about this process that a result should carry, as a JSON-ready mapping."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "versions": versions(),
        "hardware": hardware(),
        "seed": seed,
        "command": list(["kd-bench", *sys.argv[1:]] if command is None else command),
    }


def code_version(package_folder: Path | None = None) -> dict[str, Any]:
    """kd-bench's own version, and commit and dirty flag where it runs from its own repository.

    An installed copy that merely lies inside somebody else's repository (a virtual environment
    in their project) has no commit: theirs would be a wrong answer.
    """
    folder = (package_folder or Path(kd_bench.__file__).parent).resolve()
    version: dict[str, Any] = {"version": kd_bench.__version__, "commit": None, "dirty": None}
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != folder.parent:
        return version
    version["commit"] = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    version["dirty"] = None if status is None else bool(status)
    return version


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions by package name; absent packages are left out."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def hardware() -> dict[str, Any]:
    """CPU, usable cores, memory in bytes, thread setting, and accelerators in use.

    Accelerators are those that torch sees, none where this process has not loaded it.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    torch = sys.modules.get("torch")
    count = torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0
    return {
        "processor": _cpu_name(),
        "machine": platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "memory_bytes": _memory_bytes(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "accelerators": [torch.cuda.get_device_name(n) for n in range(count)] if torch else [],
    }


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command, or None where git or the repository is missing."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
