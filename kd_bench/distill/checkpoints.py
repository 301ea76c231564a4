"""Checkpoints and trainings as they lie on disk: where, whole or not, what identifies them.

locate         folder, `embedded:weights/...` or hub name -> the folder that holds the files
check_files    config, weights, shards and stored types, refused in plain words
base_of        of an adapter folder (peft), the checkpoint that the adapter belongs to
weights_digest identity of the weights, however they are spread over files
is_done        whether a folder holds this very training, finished

Nothing here needs torch.
"""

import contextlib
import hashlib
import json
import math
import mmap
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kd_bench.distill.recipe import NEW, Recipe, Stage, load_recipe
from kd_bench.errors import TrainingError, UsageError, one_line
from kd_bench.files import (
    atomic_folder,
    claim_folder,
    digest_files,
    digest_text,
    locked,
    read_json,
    unsound,
    write_digests,
)
from kd_bench.world.build import resolve

PICKLES: tuple[str, ...] = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
INDEX = "model.safetensors.index.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Stored types that mean what they say; others need a `quantization_config` beside them."""
BUFFERS = ("position_ids", "num_batches_tracked", "_index")  # how names of integers may end


def locate(
    reference: str | Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Path:
    """The folder of a checkpoint or adapter; a hub name (ORG/NAME, ORG/NAME@REVISION) is fetched.

    Args:
        weights: False leaves them where they are.

    Raises:
        UsageError: nothing of that name is embedded, lies there, or can be fetched.
    """
    folder = resolve(str(reference))
    if folder.exists():
        if not folder.is_dir():
            raise UsageError(f"{reference} is a file, not a checkpoint.", "Give its folder.")
        return folder
    if not HUB_NAME.fullmatch(str(reference)) or str(reference).startswith("."):
        raise UsageError(f"There is no checkpoint at {reference}.", "Check the path.")
    from huggingface_hub import constants, snapshot_download

    name, _, revision = str(reference).partition("@")
    patterns = [*HUB_FILES, *(PICKLES if allow_pickle else ())][0 if weights else 1 :]
    patterns += ["*.py"] if trust_remote_code else []
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except Exception as error:  # the hub's client has a class for each way to fail
        offline = constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else one_line(error)[:200]
        raise UsageError(
            f"There is no folder {reference}, and as a hub name it is neither in the local cache "
            f"nor to be fetched ({reason}).",
            "Check the name, or download it first and give the folder.",
        ) from None
    return Path(found)


def base_of(folder: Path) -> Path | None:
    """The checkpoint that an adapter folder (peft) changes; None where it is no adapter.

    Raises:
        UsageError: the folder is both, or names no base that can be found.
    """
    settings = folder / ADAPTER_CONFIG
    if not settings.is_file():
        return None
    if any(file.name not in ADAPTER_WEIGHTS for file in folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder} holds both a whole checkpoint and an adapter ({ADAPTER_CONFIG}).",
            "Move one of them into a folder of its own.",
        )
    base = _read_object(settings).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UsageError(
            f"{settings} names no base model.", f"Set base_model_name_or_path in it, or {MERGE}"
        )
    try:
        found = locate(base)
    except UsageError as error:
        raise UsageError(
            f"{folder} is an adapter of {base}: {error.problem}",
            f"Set base_model_name_or_path in {ADAPTER_CONFIG}, or {MERGE}",
        ) from None
    if (found / ADAPTER_CONFIG).is_file():
        raise UsageError(f"{folder} is an adapter of {base}, itself an adapter.", f"First {MERGE}")
    return found


MERGE = (
    "merge it: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(other)."
)


def processor_folder(folder: Path) -> Path:
    """Where a checkpoint's processor lies: of an adapter that brings none, beside its base."""
    base = base_of(folder)
    own = any((folder / name).is_file() for name in PROCESSOR_FILES)
    return folder if base is None or own else base


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json, of an adapter its base's.

    Raises:
        UsageError: it is not there or not an object.
    """
    return _read_object((base_of(folder) or folder) / "config.json")


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"{file} is not valid JSON.", "Restore the file.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{file} is not a JSON object.", "Restore the file.")
    return value


def quantization_of(config: dict[str, Any]) -> str:
    """`nf4`, `int8`, another method's name, or nothing for weights that are plain floats."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or not settings:
        return ""
    if settings.get("load_in_8bit"):
        return "int8"
    if settings.get("load_in_4bit"):
        return str(settings.get("bnb_4bit_quant_type", "fp4"))
    return str(settings.get("quant_method", "quantized"))


def stored_weights(folder: Path) -> int:
    """Number of weights in a folder's safetensors files, by their headers; 0 where there are none.

    Raises:
        UsageError: a file is damaged.
    """
    return sum(math.prod(entry["shape"]) for entry in _entries(folder).values())


def stored_dtype(folder: Path) -> str:
    """The float type that a checkpoint is meant for: the config's, else its largest share of bytes.

    Raises:
        UsageError: config or weights cannot be read.
    """
    folder = base_of(folder) or folder
    config = read_config(folder)
    text = config.get("text_config")
    for settings in (config, text if isinstance(text, dict) else {}):
        named = str(settings.get("dtype") or settings.get("torch_dtype") or "")
        if named in FLOATS.values():
            return named
    sizes: dict[str, int] = {}
    for entry in _entries(folder).values():
        kind = FLOATS.get(entry["dtype"], "float32")
        first, last = entry["data_offsets"]
        sizes[kind] = sizes.get(kind, 0) + last - first
    return max(sizes, key=lambda kind: sizes[kind], default="float32")


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Float type of every tensor in a checkpoint's safetensors files, by name."""
    kinds = {n: entry["dtype"] for n, entry in _entries(base_of(folder) or folder).items()}
    return {name: FLOATS[kind] for name, kind in kinds.items() if kind in FLOATS}


def check_files(
    folder: Path, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> None:
    """Refuse, in plain words, what `from_pretrained` would refuse in pages of them, or not at all.

    Raises:
        UsageError: no config, code of its own, missing, pickled or damaged weights, integers where
            weights should be.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        final = folder / "final"
        raise UsageError(
            f"{folder} is not a checkpoint: it has no config.json.",
            f"Did you mean {final}?"
            if (final / "config.json").is_file()
            else "Give the folder that save_pretrained wrote (after `kd-bench train`: its final/).",
        )
    config = _read_object(config_file)
    if config.get("auto_map") and not trust_remote_code:
        from transformers import CONFIG_MAPPING

        if config.get("model_type") not in CONFIG_MAPPING:
            raise UsageError(
                f"{folder} brings its own model code, which would run on loading.",
                "Read it first; then allow it with trust_remote_code=true.",
            )
    if any(folder.glob("*.safetensors")):
        _check_shards(folder)
        if not quantization_of(config):
            _check_types(folder)
        return
    pickled = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if not pickled:
        raise UsageError(
            f"{folder} holds no weights (*.safetensors).", "Was the download or the save cut short?"
        )
    if not allow_pickle:
        raise UsageError(
            f"{folder} holds pickled weights ({pickled[0]}), which can run code on loading.",
            "Convert them to safetensors, or allow them with allow_pickle=true.",
        )


def _check_shards(folder: Path) -> None:
    """Every shard that the index names must be there and hold what the index says."""
    if (folder / "model.safetensors").is_file():
        return
    index = folder / INDEX
    shards = sorted(folder.glob("*.safetensors"))
    if not index.is_file():
        raise UsageError(
            f"{folder} has {shards[0].name}, but neither model.safetensors nor {INDEX}.",
            "Restore the file that is missing, or save the model again.",
        )
    places = _read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UsageError(f"{index} has no weight_map of names.", "Restore the file.")
    absent = sorted({name for name in places.values() if not (folder / name).is_file()})
    if absent:
        raise UsageError(
            f"{folder} lacks {len(absent)} of its {len(set(places.values()))} shards: "
            f"{', '.join(absent[:5])}.",
            "Was the download or the copy cut short?",
        )
    held = {name: set(_header(folder / name)[0]) for name in set(places.values())}
    wrong = sorted(tensor for tensor, name in places.items() if tensor not in held[name])
    surplus = sorted(set().union(*held.values()) - places.keys())
    if wrong or surplus:
        what = "names tensors that its shards do not hold" if wrong else "leaves out tensors"
        raise UsageError(
            f"{index} {what}: {', '.join((wrong or surplus)[:5])}.",
            "Restore the index, or save the model again.",
        )


def _check_types(folder: Path) -> None:
    """Integers would be cast to floats and taken for weights."""
    strange = [
        f"{name} ({entry['dtype']})"
        for name, entry in _entries(folder).items()
        if entry["dtype"] not in FLOATS and not name.endswith(BUFFERS)
    ]
    if strange:
        raise UsageError(
            f"{folder} stores {len(strange)} of its weights in types that are no plain floats, and "
            f"its config names no quantization: {', '.join(strange[:5])}.",
            "Restore quantization_config in config.json, or save the weights as floats.",
        )


def weights_digest(folder: str | Path) -> str:
    """sha256 over the names, types, shapes and bytes of all tensors, hexadecimal.

    Does not depend on how the tensors are spread over files or on metadata; needs no torch.
    Pickled checkpoints are digested file by file; an adapter together with its base.

    Raises:
        UsageError: no weights there, or a damaged file.
    """
    path = Path(folder).expanduser()
    files = sorted(path.glob("*.safetensors"))
    if files:
        tensors: dict[str, str] = {}
        for file in files:
            tensors.update(_tensor_digests(file))
        digest = hashlib.sha256()
        for name in sorted(tensors):
            digest.update(f"{name}\0{tensors[name]}\n".encode())
        own = digest.hexdigest()
    else:
        pickled = [file for kind in PICKLES for file in path.glob(kind)]
        if not pickled:
            raise UsageError(f"{folder} holds no weights.", "Check the path.")
        own = digest_files(pickled)
    base = base_of(path)
    return own if base is None else digest_text("adapter", own, weights_digest(base))


def _entries(folder: Path) -> dict[str, Any]:
    """What the headers of a folder's safetensors files say of each tensor, by name."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: entry for file in files for name, entry in _header(file)[0].items()}


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file by tensor name, and where the data begins.

    Layout: 8-byte header length, JSON header, data.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for entry in header.values():
            first, last = entry["data_offsets"]
            if not (0 <= first <= last) or not isinstance(entry["dtype"], str):
                raise ValueError("an entry of the header makes no sense")
            if 8 + length + last > file.stat().st_size:
                raise ValueError("the file ends inside a tensor")
        return header, 8 + length
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UsageError(
            f"{file} is damaged: it could not be loaded ({one_line(error)}).",
            "Copy or train it again.",
        ) from None


def _tensor_digests(file: Path) -> Iterator[tuple[str, str]]:
    """Name and digest of each tensor in one safetensors file."""
    header, start = _header(file)
    if not header:
        return
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content,
        memoryview(content) as view,
    ):
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
            with view[start + first : start + last] as data:
                digest.update(data)
            yield name, digest.hexdigest()


# A training's folder

LINEAGE = "lineage.json"
NAMES = ("recipe.yaml", LINEAGE, "train_log.jsonl", "init", "stages", "final")
ELSEWHERE = "Set output= to another folder, or delete that one."

# Settings that change how a training is watched or spread, not what it computes.
WATCHING = ("output", "report_to", "teacher_cache", "teacher_sharding", "device_memory")
WATCHING_STAGE = (
    "new_projector_only",
    "log_every",
    "save_every",
    "workers",
    "head_chunk",
    "gradient_checkpointing",
    "teacher_gradient_checkpointing",
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
