"""What a training leaves on disk, and how a folder tells which training it holds."""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kd_bench.distill.checkpoints import locate, weights_digest
from kd_bench.distill.recipe import NEW, Recipe, Stage, load_recipe
from kd_bench.errors import TrainingError, UsageError
from kd_bench.files import atomic_folder, claim_folder, locked, read_json, unsound, write_digests

LINEAGE = "lineage.json"
NAMES = ("recipe.yaml", LINEAGE, "train_log.jsonl", "init", "stages", "final")
ELSEWHERE = "Set output= to another folder, or delete that one."

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


def training_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Keep a second process from writing into the same folder.

    Raises:
        UsageError: another process holds it.
    """
    problem = f"Another process is training in {folder}."
    return locked(Path(f"{folder}.lock"), problem, "Wait for it, or set output=.")


def claim(folder: Path) -> None:
    """Make sure that what a training replaces is a training's.

    Raises:
        UsageError: files or folders of the same names are somebody else's.
    """
    final = folder / "final"
    if final.exists() and not (final / LINEAGE).is_file():
        raise UsageError(
            f"{final} was not made by kd-bench and would be replaced.",
            "Set output= to another folder, or move it away.",
        )
    made_before = (folder / "recipe.yaml").is_file() and (folder / LINEAGE).is_file()
    claim_folder(folder, "training", NAMES, made_before=made_before)


def stage_folder(folder: Path, index: int, stage: Stage) -> Path:
    """Where the stage's checkpoints lie, and its model once it is done."""
    return folder / "stages" / f"{index + 1:02d}-{stage.name}"


def done_stages(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> int:
    """How many stages need no training: up to the last one whose model is there and sound."""
    for index in reversed(range(len(recipe.stages))):
        model = stage_folder(folder, index, recipe.stages[index]) / "model"
        if not model.exists():
            continue
        problem = unsound(model)
        if problem is None:
            return index + 1
        say(f"{problem}: the stage is trained again.")
    return 0


def begun_stages(recipe: Recipe, folder: Path) -> list[int]:
    """The stages, by number from 0, that have left something to go on from."""
    folders = (stage_folder(folder, *each) for each in enumerate(recipe.stages))
    return [
        index
        for index, own in enumerate(folders)
        if (own / "model").exists() or any(own.glob("checkpoint-*"))
    ]


def is_done(
    recipe: Recipe,
    folder: Path,
    digest: Callable[[Stage, int], dict[str, Any]],
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Whether the folder holds this very training, finished.

    What no stage has begun with may still be changed: where nothing was trained yet, everything.

    Args:
        digest: of what a stage learns from, in a version.
        say: is told what is not as it was written.

    Raises:
        UsageError: it holds a different one.
        TrainingError: its finished student is damaged and cannot be made again from its stages.
    """
    written, final = folder / "recipe.yaml", folder / "final"
    if not written.exists():
        return False
    before = load_recipe(written)
    everything = len(before.stages) - 1
    last = everything if final.exists() else max(begun_stages(before, folder), default=-1)
    if last < 0:
        shutil.rmtree(folder / "init", ignore_errors=True)  # of a student that may have changed
        return False
    finished = (final / "config.json").exists()
    old, new = _identity(before), _identity(recipe)
    if not finished:  # a stage to come is free; what it read from the recipe's own data too
        old["stages"], new["stages"] = old["stages"][: last + 1], new["stages"][: last + 1]
    if old != new:
        raise UsageError(
            f"{folder} holds a training with another recipe ({_difference(old, new)}).", ELSEWHERE
        )
    told = read_lineage(folder, say)
    _check_models(recipe, folder, told)
    _check_data(recipe.stages[: last + 1], folder, told, digest)
    if not finished or (problem := unsound(final)) is None:
        return finished
    if done_stages(recipe, folder, lambda line: None) < len(recipe.stages):
        raise TrainingError(
            f"{problem}, and no sound model of its last stage is left.",
            f"Delete {final} to train it again, or put that file back.",
        )
    say(f"{problem}: written again from its last stage.")
    return False


def read_lineage(folder: Path, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """A training's lineage, or where that is damaged the newest sound copy; empty without one.

    Raises:
        TrainingError: it is damaged, and no checkpoint has a copy.
    """
    path = folder / LINEAGE
    if not path.exists():
        return {}
    copies = [folder / "final", *folder.glob("stages/*/checkpoint-*")]
    newest = sorted(copies, key=lambda copy: copy.stat().st_mtime if copy.exists() else 0)
    for place in (folder, *reversed(newest)):
        with contextlib.suppress(OSError, ValueError):
            told = read_json(place / LINEAGE)
            if isinstance(told, dict) and isinstance(told.get("stages"), dict):
                if place != folder:
                    say(f"{path} is damaged: the copy in {place} is used.")
                return told
    raise TrainingError(
        f"{path} is damaged: what the training began with is not known.",
        "Put it back, or delete the folder and train again.",
    )


def _check_models(recipe: Recipe, folder: Path, told: dict[str, Any]) -> None:
    """The same paths may hold other weights than those that the folder's training began with."""
    for role in ("student", "teacher"):
        path, before = getattr(recipe, role), told.get(role)
        if before is None or not isinstance(path, str) or path.startswith(NEW):
            continue
        if weights_digest(locate(path)) != before["weights_sha256"]:
            raise UsageError(
                f"{folder} holds a training with other weights of the {role}: {path} has changed.",
                ELSEWHERE,
            )


def _check_data(
    stages: list[Stage],
    folder: Path,
    told: dict[str, Any],
    digest: Callable[[Stage, int], dict[str, Any]],
) -> None:
    """The same paths may hold other conversations or images than a stage learnt from."""
    for stage in stages:
        before = told.get("stages", {}).get(stage.name, {}).get("data")
        if before is None:
            continue
        now = digest(stage, before.get("version", 1))
        if now["sha256"] != before["sha256"]:
            counts = f"{before['conversations']} conversations then, {now['conversations']} now"
            raise UsageError(
                f"{folder} holds a training on other data: that of stage {stage.name!r} has "
                f"changed ({counts}).",
                "Put the data back, set output= to another folder, or delete that one.",
            )


def _identity(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what only changes how it is watched, each stage with its own data."""
    mapping = recipe.model_dump(mode="json", exclude={*WATCHING, "data"})
    for stage, settings in zip(recipe.stages, mapping["stages"], strict=True):
        data = [source.model_dump(mode="json") for source in recipe.data_of(stage)]
        settings["data"] = data[0] if len(data) == 1 else data
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
    if not isinstance(value, dict | list):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
        flat.update(_flat(entry, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def save_whole(student: Any, processor: Any, folder: Path, notes: Iterable[Path] = ()) -> None:
    """Save a checkpoint so that its folder appears only when everything in it is on disk.

    Args:
        notes: files that are copied into it.

    Raises:
        TrainingError: it cannot be written; nothing that was there is touched.
    """
    try:
        with atomic_folder(folder) as aside:
            student.save_pretrained(aside)
            processor.save_pretrained(aside)
            for note in notes:
                shutil.copyfile(note, aside / note.name)
            write_digests(aside)
    except OSError as error:
        raise TrainingError(
            f"The model could not be written to {folder}: {error.strerror or error}.",
            "Make room and run the same command again.",
        ) from error
