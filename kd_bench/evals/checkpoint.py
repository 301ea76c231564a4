"""What is known about a model before it is loaded: identity, lineage, role and name."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_bench.config import read_yaml
from kd_bench.errors import UsageError, closest
from kd_bench.files import digest_files, digest_text, read_json
from kd_bench.records import ROLES, ModelRef, Role

# Files that change answers although the weights stay the same.
SETUP_FILES = (
    "config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json",
    "chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class VisualSwitch:
    """The vision tower of one checkpoint before projector and language model of another."""

    vision: str | Path
    language: str | Path


@dataclass(frozen=True)
class StockModel:
    """A model that lmms-eval brings: its name there, and `key=value,...` arguments."""

    name: str
    arguments: str = ""


Model = str | Path | VisualSwitch | StockModel
"""What can be evaluated; text or path is a checkpoint: a folder, an adapter folder of peft, a hub
name, or `embedded:weights/...`."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be evaluated, as far as it is known without its weights in memory.

    Attributes:
        path: its folder; of a visual switch, that of the language side.
        setup_digest: of configuration, tokenizer and processor files, of an adapter its base's too.
        lineage: what `kd-bench train` wrote beside the weights; None for foreign checkpoints.
        vision: of a visual switch, the folder whose vision tower sees.
        stock: what was asked for, when it is a model of lmms-eval.
    """

    path: Path
    ref: ModelRef
    setup_digest: str
    lineage: dict[str, Any] | None = None
    vision: Path | None = None
    stock: StockModel | None = None


def inspect_model(
    given: Model,
    *,
    role: str | None = None,
    name: str | None = None,
    method: str | None = None,
    seed: int | None = None,
) -> Checkpoint:
    """Identity of a model; what the caller leaves open is read from its lineage.

    A visual switch has its role by how it is made, and its method from the vision side. Of a stock
    model the weights are digested where `pretrained` is a folder; otherwise its name and arguments
    stand for them, and a model that changes behind them would not be noticed.

    Raises:
        UsageError: no checkpoint there, or an unknown role.
    """
    if isinstance(given, VisualSwitch):
        return _inspect_switch(given, name, seed)
    if isinstance(given, StockModel):
        return _inspect_stock(given, role, name, method, seed)
    from kd_bench.distill.checkpoints import (
        base_of,
        check_files,
        locate,
        read_config,
        weights_digest,
    )

    path = locate(given)
    base = base_of(path)
    check_files(base or path)
    classes = read_config(base or path).get("architectures")
    lineage = _lineage(path)
    told = lineage or {}
    text = str(given)
    named = Path(text).expanduser().exists() or text.startswith("embedded:")
    own = trained_name(str(path.resolve())) if named else text.partition("@")[0].rpartition("/")[2]
    method = method or str(told.get("method") or "")
    seed = seed if seed is not None else told.get("seed")
    reference = ModelRef(
        name=name or str(told.get("name") or "") or own,
        role=_role(role or _told_role(path, told)),
        path=str(given),
        weights_digest=weights_digest(path),
        method=method,
        seed=None if seed is None else int(seed),
        architecture=str(classes[0]) if isinstance(classes, list) and classes else "",
    )
    folders = [path] if base is None else [path, base]
    files = [folder / file for folder in folders for file in SETUP_FILES]
    present = [file for file in files if file.is_file()]
    return Checkpoint(path, reference, digest_files(present), lineage)


def _inspect_switch(given: VisualSwitch, name: str | None, seed: int | None) -> Checkpoint:
    vision = inspect_model(given.vision, seed=seed)
    language = inspect_model(given.language)
    weights = (vision.ref.weights_digest, language.ref.weights_digest)
    reference = ModelRef(
        name=name or f"{vision.ref.name}-switch",
        role="switch",
        path=f"{given.vision} + {given.language}",
        weights_digest=digest_text("switch", *weights),
        method=vision.ref.method,
        seed=vision.ref.seed,
        architecture=language.ref.architecture,
    )
    setup = digest_text(vision.setup_digest, language.setup_digest)
    return Checkpoint(language.path, reference, setup, vision.lineage, vision=vision.path)


def _inspect_stock(
    given: StockModel, role: str | None, name: str | None, method: str | None, seed: int | None
) -> Checkpoint:
    from kd_bench.distill.checkpoints import weights_digest

    model, arguments = given.name, given.arguments
    told = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    place = Path(told.get("pretrained", ""))
    local = place.is_dir() and any(place.glob("*.safetensors"))
    reference = ModelRef(
        name=name or trained_name(told.get("pretrained", "")) or model,
        role=_role(role or "baseline"),
        path=f"lmms-eval {model} {arguments}".strip(),
        weights_digest=weights_digest(place) if local else digest_text(model, arguments),
        method=method or "",
        seed=seed,
        architecture=model,
    )
    return Checkpoint(place, reference, digest_text("stock", model, arguments), stock=given)


DTYPES = ("float32", "bfloat16", "float16")


def best_device() -> str:
    """An accelerator where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def chosen_dtype(path: str | Path, dtype: str, device: str | None = None) -> str:
    """The float type of an evaluation, `auto` resolved.

    `auto` is the checkpoint's own type on an accelerator, and float32 on a CPU, where the short
    types are slower and no closer to what the training saw.

    Raises:
        UsageError: the type is not known.
    """
    from kd_bench.distill.checkpoints import locate, stored_dtype

    if dtype == "auto":
        on_cpu = (device or best_device()) == "cpu"
        return "float32" if on_cpu else stored_dtype(locate(path))
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known.", f"Use one of auto, {', '.join(DTYPES)}.")
    return dtype


def _lineage(path: Path) -> dict[str, Any] | None:
    for file in (path / "lineage.json", path.parent / "lineage.json"):
        if file.is_file():
            try:
                value = read_json(file)
            except ValueError as error:
                raise UsageError(f"{error}.", "Restore or delete that file.") from None
            return value if isinstance(value, dict) else None
    return None


def _told_role(path: Path, lineage: dict[str, Any]) -> str:
    """The role that a checkpoint's lineage tells; `model` where it tells none.

    A model trained by SFT is the floor only where its recipe has a teacher that it did without:
    teachers are trained by SFT as well.
    """
    role, method = lineage.get("role"), lineage.get("method")
    if role in ROLES:
        return str(role)
    if not method:
        return "model"
    if method != "sft":
        return "kd"
    recipe = path / "recipe.yaml"
    teacher = read_yaml(recipe).get("teacher") if recipe.is_file() else None
    return "sft" if teacher else "model"


def _role(role: str) -> Role:
    if role not in ROLES:
        raise UsageError(
            f"There is no role {role!r}.{closest(role, list(ROLES))}", f"Roles: {', '.join(ROLES)}."
        )
    return role  # type: ignore[return-value]


def trained_name(path: str) -> str:
    """Of a path, also one of another machine, the part that names the training."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")] or [path]
    generic = r"final|checkpoint|model|checkpoint-\d+"
    while len(parts) > 1 and re.fullmatch(generic, parts[-1]):
        parts.pop()
    return parts[-1]
