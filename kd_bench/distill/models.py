"""Load checkpoints, know them by their weights, and freeze what shall not learn."""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from kd_bench.distill.pathways import Pathway, pathway_for
from kd_bench.errors import UsageError
from kd_bench.files import digest_files

__all__ = [
    "PARTS",
    "checkpoint_activations",
    "load_model",
    "load_processor",
    "parameter_counts",
    "quiet",
    "set_trainable",
    "weights_digest",
]

PARTS: tuple[str, ...] = ("vision_tower", "projector", "language_model")
PICKLES: tuple[str, ...] = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TINY = 10_000_000  # parameters


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Any:
    """A vision-language model of transformers, in evaluation mode.

    Args:
        path: folder written by `save_pretrained`, or a hub name.

    Raises:
        UsageError: no checkpoint there, only pickled weights, or code of its own.
    """
    from transformers import AutoModelForImageTextToText

    _check_checkpoint(path, allow_pickle, trust_remote_code)
    settings: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if not allow_pickle:
        settings["use_safetensors"] = True
    try:
        model = AutoModelForImageTextToText.from_pretrained(str(path), **settings)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{path} could not be loaded as a vision-language model: {reason[0]}",
            "It must be a transformers checkpoint of an image-text-to-text class.",
        ) from error
    model.eval()
    _spare_threads(model)
    return model if device is None else model.to(device)


def _spare_threads(model: nn.Module) -> None:
    """Give a tiny model one thread, unless the user chose: waking more costs many times the work.

    Measured on two cores with half a million parameters: 30 times slower with two threads.
    """
    tiny = sum(parameter.numel() for parameter in model.parameters()) < TINY
    if tiny and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def quiet() -> None:
    """Keep the libraries' progress bars and reminders out of our own output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_processor(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The processor (tokenizer, image processor, chat template) beside a checkpoint.

    Raises:
        UsageError: it is missing or broken.
    """
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"{path} has no usable processor: {reason[0]}",
            "Save it there with processor.save_pretrained.",
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UsageError(
            f"{path} has a {type(processor).__name__}, not a processor for text and pictures.",
            "Save tokenizer, image processor and processor_config.json there.",
        )
    return processor


def _check_checkpoint(path: str | Path, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Refuse, in plain words, what `from_pretrained` would refuse in pages of them."""
    folder = Path(path).expanduser()
    if not folder.exists():
        if str(path).count("/") == 1 and not str(path).startswith((".", "~", "/")):
            return  # may be a hub name
        raise UsageError(f"There is no checkpoint at {path}.", "Check the path.")
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UsageError(
            f"{path} is not a checkpoint: it has no config.json.",
            "Give the folder that save_pretrained wrote (after `kd-bench train`: its final/).",
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"{config_file} is not valid JSON.", "Restore the file.") from None
    if config.get("auto_map") and not trust_remote_code and not _is_native(config):
        raise UsageError(
            f"{path} brings its own model code, which would run on loading.",
            "Read it first; then allow it with trust_remote_code=true.",
        )
    if any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for kind in PICKLES for file in folder.glob(kind))
    if not pickled:
        raise UsageError(
            f"{path} holds no weights (*.safetensors).", "Was the download or the save cut short?"
        )
    if not allow_pickle:
        raise UsageError(
            f"{path} holds pickled weights ({pickled[0]}), which can run code on loading.",
            "Convert them to safetensors, or allow them with allow_pickle=true.",
        )


def _is_native(config: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING


def weights_digest(folder: str | Path) -> str:
    """sha256 over the names, types, shapes and bytes of all tensors, hexadecimal.

    Does not depend on how the tensors are spread over files or on metadata; needs no torch.
    Pickled checkpoints are digested file by file.

    Raises:
        UsageError: no weights there, or a damaged file.
    """
    path = Path(folder).expanduser()
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickled = [file for kind in PICKLES for file in path.glob(kind)]
        if not pickled:
            raise UsageError(f"{folder} holds no weights.", "Check the path.")
        return digest_files(pickled)
    tensors: dict[str, str] = {}
    for file in files:
        tensors.update(_tensor_digests(file))
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0{tensors[name]}\n".encode())
    return digest.hexdigest()


def _tensor_digests(file: Path) -> dict[str, str]:
    """Digest of each tensor in one safetensors file (8-byte header length, JSON header, data)."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            start = 8 + length
            if not header:
                return {}
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                view = memoryview(content)
                try:
                    return {name: _one_tensor(view, start, entry) for name, entry in header.items()}
                finally:
                    view.release()
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(f"{file} is damaged: {error}.", "Copy or train it again.") from None


def _one_tensor(view: memoryview, start: int, entry: dict[str, Any]) -> str:
    first, last = entry["data_offsets"]
    if start + last > len(view):
        raise ValueError("the file ends inside a tensor")
    digest = hashlib.sha256(f"{entry['dtype']}{entry['shape']}".encode())
    with view[start + first : start + last] as data:
        digest.update(data)
    return digest.hexdigest()


def part(pathway: Pathway, name: str) -> nn.Module:
    """The module behind one of `PARTS`."""
    module: nn.Module = getattr(pathway, name)
    return module


def set_trainable(model: nn.Module, names: Iterable[str]) -> None:
    """Let the named parts learn and freeze everything else.

    The LM head and the token embeddings belong to `language_model`.
    """
    pathway = pathway_for(model)
    wanted = set(names)
    model.requires_grad_(False)
    for name in PARTS:
        if name in wanted:
            part(pathway, name).requires_grad_(True)
    if "language_model" in wanted:
        whole: Any = model
        head = whole.get_output_embeddings()
        if head is not None:
            head.requires_grad_(True)


def checkpoint_activations(model: Any, *, frozen: bool = False) -> None:
    """Recompute each layer's activations in the backward pass instead of keeping them.

    Args:
        frozen: a teacher that the switch's gradient passes through. Its layers alone are marked
            as training, which is what makes them recompute; dropout inside them stays off.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable({"use_reentrant": False})
    else:  # the name before transformers 5.20 or so
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if frozen:
        model.disable_input_require_grads()  # only pictures carry a gradient here
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of weights in all, by part, and of those that learn; tied weights count once."""
    pathway = pathway_for(model)
    counts = {name: _count(part(pathway, name).parameters()) for name in PARTS}
    counts["total"] = _count(model.parameters())
    counts["trainable"] = _count(p for p in model.parameters() if p.requires_grad)
    return counts


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum({id(p): p.numel() for p in parameters}.values())
