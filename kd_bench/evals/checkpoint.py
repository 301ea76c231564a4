"""What is known about a model before it is loaded: identity, lineage, role and name.

Three kinds: a checkpoint; a hybrid (the student's eyes before the teacher's projector and language
model); a stock model of lmms-eval, known by its name and arguments.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd_bench.config import read_yaml
from kd_bench.errors import UsageError, closest
from kd_bench.files import digest_files, digest_text, read_json
from kd_bench.records import ROLES, ModelRef, Role

# Files that change answers although the weights stay the same.
SETUP_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be evaluated.

    Attributes:
        path: its folder; of a hybrid, that of the language side.
        setup_digest: of configuration, tokenizer and processor files, of an adapter its base's too.
        lineage: what `kd-bench train` wrote beside the weights; None for foreign checkpoints.
        vision: of a hybrid, the folder whose vision tower sees.
        stock: of a stock model, its name in lmms-eval and its arguments.
    """

    path: Path
    ref: ModelRef
    setup_digest: str
    lineage: dict[str, Any] | None = None
    vision: Path | None = None
    stock: tuple[str, str] | None = None


def inspect_checkpoint(
    given: str | Path,
    *,
    role: str | None = None,
    name: str | None = None,
    method: str | None = None,
    seed: int | None = None,
) -> Checkpoint:
    """Identity of a checkpoint; what the caller leaves open is read from its lineage.

    Args:
        given: folder, adapter folder of peft, `embedded:weights/...` or hub name.

    Raises:
        UsageError: no checkpoint there, or an unknown role.
    """
    from kd_bench.distill.checkpoints import base_of, check_files, locate, weights_digest

    path = locate(given)
    base = base_of(path)
    check_files(base or path)
    lineage = _lineage(path)
    told = lineage or {}
    method = method or str(told.get("method") or "")
    seed = seed if seed is not None else told.get("seed")
    reference = ModelRef(
        name=name or str(told.get("name") or "") or _name(given, path),
        role=_role(role or _told_role(path, told)),
        path=str(given),
        weights_digest=weights_digest(path),
        method=method,
        seed=None if seed is None else int(seed),
        architecture=_architecture(base or path),
    )
    folders = [path] if base is None else [path, base]
    files = [folder / file for folder in folders for file in SETUP_FILES]
    present = [file for file in files if file.is_file()]
    return Checkpoint(path, reference, digest_files(present), lineage)


def chosen_dtype(checkpoint: Checkpoint, wanted: str) -> str:
    """The float type of an evaluation, `auto` resolved; empty for a stock model, which has its own.

    `auto` is the checkpoint's own type on an accelerator, and float32 on a CPU, where the short
    types are slower and no closer to what the training saw.

    Raises:
        UsageError: the type is not known.
    """
    import torch

    from kd_bench.distill.checkpoints import stored_dtype
    from kd_bench.evals.adapter import torch_dtype

    if checkpoint.stock is not None:
        return ""
    if wanted != "auto":
        torch_dtype(wanted)
        return wanted
    return stored_dtype(checkpoint.path) if torch.cuda.is_available() else "float32"


def inspect_hybrid(
    vision: str | Path, language: str | Path, *, name: str | None = None, seed: int | None = None
) -> Checkpoint:
    """Identity of the visual switch: the eyes of one checkpoint, the rest of another.

    Raises:
        UsageError: one of the two is no checkpoint.
    """
    eyes = inspect_checkpoint(vision, seed=seed)
    mind = inspect_checkpoint(language)
    reference = ModelRef(
        name=name or f"{eyes.ref.name}-switch",
        role="switch",
        path=f"{vision} + {language}",
        weights_digest=digest_text("switch", eyes.ref.weights_digest, mind.ref.weights_digest),
        method=eyes.ref.method,
        seed=eyes.ref.seed,
        architecture=mind.ref.architecture,
    )
    setup = digest_text(eyes.setup_digest, mind.setup_digest)
    return Checkpoint(mind.path, reference, setup, eyes.lineage, vision=eyes.path)


def inspect_stock(
    model: str,
    arguments: str,
    *,
    role: str | None = None,
    name: str | None = None,
    method: str | None = None,
    seed: int | None = None,
) -> Checkpoint:
    """Identity of a model that lmms-eval knows, run as it is.

    The weights are digested where `pretrained` is a folder; otherwise the name and arguments stand
    for them, and a model that changes behind them would not be noticed.
    """
    from kd_bench.distill.checkpoints import weights_digest

    given = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    place = Path(given.get("pretrained", ""))
    local = place.is_dir() and any(place.glob("*.safetensors"))
    reference = ModelRef(
        name=name or trained_name(given.get("pretrained", "")) or model,
        role=_role(role or "baseline"),
        path=f"lmms-eval {model} {arguments}".strip(),
        weights_digest=weights_digest(place) if local else digest_text(model, arguments),
        method=method or "",
        seed=seed,
        architecture=model,
    )
    setup = digest_text("stock", model, arguments)
    return Checkpoint(place, reference, setup, stock=(model, arguments))


def _lineage(path: Path) -> dict[str, Any] | None:
    for file in (path / "lineage.json", path.parent / "lineage.json"):
        if file.is_file():
            try:
                value = read_json(file)
            except ValueError as error:
                raise UsageError(f"{error}.", "Restore or delete that file.") from None
            return value if isinstance(value, dict) else None
    return None


def with_role(checkpoint: Checkpoint, role: str) -> Checkpoint:
    """The same checkpoint in another role."""
    return replace(checkpoint, ref=replace(checkpoint.ref, role=_role(role)))


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


def _name(given: str | Path, path: Path) -> str:
    """A model's name in tables: of its folder, or what the hub calls it."""
    if not Path(given).expanduser().exists() and not str(given).startswith("embedded:"):
        return str(given).partition("@")[0].rpartition("/")[2]
    return trained_name(str(path.resolve()))


def trained_name(path: str) -> str:
    """Of a path, also one of another machine, the part that names the training."""
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")] or [path]
    generic = r"final|checkpoint|model|checkpoint-\d+"
    while len(parts) > 1 and re.fullmatch(generic, parts[-1]):
        parts.pop()
    return parts[-1]


def _architecture(path: Path) -> str:
    from kd_bench.distill.checkpoints import read_config

    classes = read_config(path).get("architectures")
    return str(classes[0]) if isinstance(classes, list) and classes else ""
