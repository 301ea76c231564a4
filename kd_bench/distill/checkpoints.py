"""A checkpoint as it lies on disk: where it is, whether it is whole, what identifies it. No torch.

locate         folder, `embedded:weights/...` or hub name -> the folder that holds the files
check_files    config, weights, shards and stored types, refused in plain words
base_of        of an adapter folder (peft), the checkpoint that the adapter belongs to
weights_digest identity of the weights, however they are spread over files
"""

import hashlib
import json
import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_bench.errors import UsageError, one_line
from kd_bench.files import digest_files, digest_text

PICKLES: tuple[str, ...] = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
INDEX = "model.safetensors.index.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Stored types that mean what they say; others need a `quantization_config` beside them."""


def locate(
    reference: str | Path, *, allow_pickle: bool = False, trust_remote_code: bool = False
) -> Path:
    """The folder of a checkpoint or adapter; a hub name (ORG/NAME, ORG/NAME@REVISION) is fetched.

    Raises:
        UsageError: nothing of that name is embedded, lies there, or can be fetched.
    """
    from kd_bench.world.build import resolve

    folder = resolve(str(reference))
    if folder.exists():
        if not folder.is_dir():
            raise UsageError(f"{reference} is a file, not a checkpoint.", "Give its folder.")
        return folder
    if not HUB_NAME.fullmatch(str(reference)) or str(reference).startswith("."):
        raise UsageError(f"There is no checkpoint at {reference}.", "Check the path.")
    patterns = [*HUB_FILES, *(PICKLES if allow_pickle else ())]
    return _fetch(str(reference), [*patterns, "*.py"] if trust_remote_code else patterns)


def _fetch(reference: str, patterns: list[str]) -> Path:
    """The hub's newest snapshot in the local cache, downloaded where it is not there."""
    from huggingface_hub import constants, snapshot_download

    name, _, revision = reference.partition("@")
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
    headers = (_header(file)[0] for file in folder.glob("*.safetensors"))
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())


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
    for file in folder.glob("*.safetensors"):
        for entry in _header(file)[0].values():
            kind = FLOATS.get(entry["dtype"], "float32")
            first, last = entry["data_offsets"]
            sizes[kind] = sizes.get(kind, 0) + last - first
    return max(sizes, key=lambda kind: sizes[kind], default="float32")


def stored_dtypes(folder: Path) -> dict[str, str]:
    """Float type of every tensor in a checkpoint's safetensors files, by name."""
    folder = base_of(folder) or folder
    return {
        name: FLOATS[entry["dtype"]]
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in _header(file)[0].items()
        if entry["dtype"] in FLOATS
    }


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
    if config.get("auto_map") and not trust_remote_code and not _is_native(config):
        raise UsageError(
            f"{folder} brings its own model code, which would run on loading.",
            "Read it first; then allow it with trust_remote_code=true.",
        )
    if not any(folder.glob("*.safetensors")):
        _check_pickles(folder, allow_pickle)
        return
    _check_shards(folder)
    if not quantization_of(config):
        _check_types(folder)


def _is_native(config: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def _check_pickles(folder: Path, allow_pickle: bool) -> None:
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
        for file in sorted(folder.glob("*.safetensors"))
        for name, entry in _header(file)[0].items()
        if entry["dtype"] not in FLOATS and not _is_buffer(name)
    ]
    if strange:
        raise UsageError(
            f"{folder} stores {len(strange)} of its weights in types that are no plain floats, and "
            f"its config names no quantization: {', '.join(strange[:5])}.",
            "Restore quantization_config in config.json, or save the weights as floats.",
        )


def _is_buffer(name: str) -> bool:
    return name.endswith(("position_ids", "num_batches_tracked", "_index"))


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


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Entries of a safetensors file by tensor name, and where the data begins.

    Layout: 8-byte header length, JSON header, data.

    Raises:
        UsageError: the file is damaged.
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
