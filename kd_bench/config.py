"""YAML files and `key=value` overrides -> validated models.

Recipes, suites, task files and policies all come through here, so an unknown key, a wrong type
and a missing file read the same everywhere.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from kd_bench.errors import UsageError, closest

__all__ = ["StrictModel", "apply_overrides", "load", "read_yaml", "validate"]


class StrictModel(BaseModel):
    """Base of everything a user can write in YAML: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], path: Path, overrides: Iterable[str] = ()) -> Model:
    """Read `path`, apply overrides such as `stages.0.learning_rate=1e-3`, validate.

    Raises:
        UsageError: naming the file, the key and, where one is near, the key that was meant.
    """
    mapping = read_yaml(path)
    return validate(model, apply_overrides(mapping, overrides), str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader: no tags, no code)."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise UsageError(f"{path}: {reason}.", "Check the path.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text.", "Is it a YAML file?") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise UsageError(f"{path}{line}: not valid YAML: {problem}.", "Fix that line.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected `key: value` lines.", "See the examples in the README.")
    return value


def apply_overrides(mapping: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of `mapping` with dotted `key=value` pairs set; values are read as YAML."""
    import copy

    result = copy.deepcopy(mapping)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UsageError(f"{override!r} is not an override.", "Write key=value.")
        try:
            value = _scalar(text)
        except yaml.YAMLError:
            raise UsageError(f"{override!r}: the value is not valid YAML.", "Quote it.") from None
        _set(result, key.split("."), value, override)
    return result


# YAML 1.1 reads these as text; users mean the number.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    return float(text) if _EXPONENT.fullmatch(text.strip()) else value


def _set(node: Any, keys: list[str], value: Any, override: str) -> None:
    *parents, last = keys
    for key in parents:
        node = node[_index(node, key, override)] if isinstance(node, list) else _child(node, key)
    if isinstance(node, list):
        node[_index(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise UsageError(f"{override!r}: {parents[-1]!r} has no keys below it.", "Check the key.")


def _child(node: Any, key: str) -> Any:
    if not isinstance(node, dict):
        raise UsageError(f"{key!r} lies below a plain value.", "Check the override's key.")
    if not isinstance(node.get(key), dict | list):
        node[key] = {}
    return node[key]


def _index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise UsageError(
            f"{override!r}: {key!r} is not an entry of a list of {len(node)}.", "Count from 0."
        )
    return int(key)


def validate(model: type[Model], mapping: dict[str, Any], where: str) -> Model:
    """Validate a mapping; the first problem becomes one clear line."""
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        errors = error.errors()
        # A misspelt key often leaves the right one missing: name the cause, not the effect.
        unknown_keys = [each for each in errors if each["type"] == "extra_forbidden"]
        first = (unknown_keys or errors)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "extra_forbidden":
            unknown = str(first["loc"][-1])
            hint = closest(unknown, _known_keys(model))
            raise UsageError(
                f"{where}: unknown key {key!r}.{hint}", "Remove or rename it."
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{where}: {key}: {message}.", "Correct that value.") from None


def _known_keys(model: type[BaseModel]) -> list[str]:
    """Field names of a model and of the models inside it, for suggestions."""
    names: list[str] = []
    pending: list[Any] = [model]
    seen: set[Any] = set()
    while pending:
        kind = pending.pop()
        if kind in seen:
            continue
        seen.add(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names.extend(kind.model_fields)
            pending.extend(field.annotation for field in kind.model_fields.values())
        else:
            pending.extend(getattr(kind, "__args__", ()))
    return names
