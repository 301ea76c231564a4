"""What a training leaves on disk, and how a folder tells which training it holds."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kd_bench.distill.checkpoints import locate, weights_digest
from kd_bench.distill.recipe import NEW, Recipe, Stage, load_recipe
from kd_bench.errors import TrainingError, UsageError
from kd_bench.files import read_json

__all__ = ["is_done", "only_one", "save_whole", "stage_folder", "sync_folder"]

# Settings that change how a training is watched or spread, not what it computes.
WATCHING = ("output", "report_to", "teacher_cache")
WATCHING_STAGE = (
    "new_projector_only",
    "log_every",
    "save_every",
    "workers",
    "head_chunk",
    "gradient_checkpointing",
)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second process from writing into the same folder.

    Raises:
        UsageError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder) + ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"Another process is training in {folder}.", "Wait for it, or set output=."
        ) from None
    try:
        yield
    finally:
        lock.release()


def stage_folder(folder: Path, index: int, stage: Stage) -> Path:
    """Where the stage's checkpoints lie, and its model once it is done."""
    return folder / "stages" / f"{index + 1:02d}-{stage.name}"


def _begun(recipe: Recipe, folder: Path) -> int:
    """How many stages have left something that the same command would go on from."""
    if (folder / "final").exists():
        return len(recipe.stages)
    for index, stage in reversed(list(enumerate(recipe.stages))):
        own = stage_folder(folder, index, stage)
        if (own / "model").exists() or any(own.glob("checkpoint-*")):
            return index + 1
    return 0


def is_done(recipe: Recipe, folder: Path) -> bool:
    """Whether the folder holds this very training, finished.

    What no stage has begun with may still be changed: where nothing was trained yet, everything.

    Raises:
        UsageError: it holds a different one.
    """
    written = folder / "recipe.yaml"
    if not written.exists():
        return False
    before = load_recipe(written)
    begun = _begun(before, folder)
    if not begun:
        shutil.rmtree(folder / "init", ignore_errors=True)  # of a student that may have changed
        return False
    finished = (folder / "final" / "config.json").exists()
    old, new = _identity(before), _identity(recipe)
    if not finished:  # a stage to come is free; what it read from the recipe's own data too
        old["stages"], new["stages"] = old["stages"][:begun], new["stages"][:begun]
    if old != new:
        raise UsageError(
            f"{folder} holds a training with another recipe ({_difference(old, new)}).",
            "Set output= to another folder, or delete that one.",
        )
    _check_models(recipe, folder)
    return finished


def _check_models(recipe: Recipe, folder: Path) -> None:
    """The same paths may hold other weights by now.

    Raises:
        UsageError: student or teacher are not those that the folder's training began with.
    """
    lineage = folder / "lineage.json"
    told = read_json(lineage) if lineage.exists() else {}
    for role in ("student", "teacher"):
        path, before = getattr(recipe, role), told.get(role)
        if before is None or not isinstance(path, str) or path.startswith(NEW):
            continue
        if weights_digest(locate(path)) != before["weights_sha256"]:
            raise UsageError(
                f"{folder} holds a training with other weights of the {role}: {path} has changed.",
                "Set output= to another folder, or delete that one.",
            )


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what only changes how it is watched, each stage with its own data."""
    mapping = recipe.model_dump(mode="json", exclude={*WATCHING, "data"})
    for stage, settings in zip(recipe.stages, mapping["stages"], strict=True):
        settings["data"] = recipe.data_of(stage).model_dump(mode="json")
        for name in WATCHING_STAGE:
            settings.pop(name, None)
    return mapping


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first setting that differs, with both values."""
    old, new = _flat(before), _flat(now)
    first = min(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return f"{first}: {old.get(first)} there, {new.get(first)} now"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings and lists by dotted key."""
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in entries:
        flat.update(_flat(entry, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def save_whole(student: Any, processor: Any, folder: Path) -> None:
    """Save a checkpoint so that its folder appears only when everything in it is on disk.

    Raises:
        TrainingError: it cannot be written; nothing that was there is touched.
    """
    staging = folder.with_name(f".{folder.name}.saving")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        student.save_pretrained(staging)
        processor.save_pretrained(staging)
        sync_folder(staging)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise TrainingError(
            f"The model could not be written to {folder}: {error.strerror or error}.",
            "Make room and run the same command again.",
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def sync_folder(folder: Path) -> None:
    """Wait until every file of a folder is on disk, so that its rename means it is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
