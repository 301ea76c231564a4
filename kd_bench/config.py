"""YAML files and `key=value` overrides -> validated models.

Recipes, suites, task files and policies all come through here, so an unknown key, a wrong type
and a missing file read the same everywhere. YAML is read as version 1.2 (`017` is seventeen,
`1:30` and `2001-12-14` are text, a key that stands twice is an error).
"""

import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError

from kd_bench.errors import UsageError, closest


class StrictModel(BaseModel):
    """Base of everything a user can write in YAML.

    An unknown key is an error, so is a value of another type (`seed: true`), and numbers are
    finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=BaseModel)


class _Constructor(SafeConstructor):
    """YAML 1.2's core schema has no dates: what looks like one stays text."""


_Constructor.add_constructor(
    "tag:yaml.org,2002:timestamp", lambda self, node: self.construct_scalar(node)
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML 1.2 text (safe: no tags, no code).

    Raises:
        YAMLError, ValueError, RecursionError: it is none.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    try:
        return yaml.load(text)
    except (TypeError, AttributeError) as error:  # keys that cannot be hashed, odd tags
        raise ValueError(str(error)) from None


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads back to an equal value; keys keep their order."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 100
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def load(model: type[Model], path: Path, overrides: Iterable[str] = ()) -> Model:
    """Read `path`, apply overrides such as `stages.0.learning_rate=1e-3`, validate.

    Raises:
        UsageError: naming the file, the key and, where one is near, the key that was meant.
    """
    mapping = read_yaml(path)
    overrides = list(overrides)
    given = {override.partition("=")[0]: override for override in overrides}
    return validate(model, apply_overrides(mapping, overrides), str(path), given)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        UsageError: it cannot be read, is no YAML or no mapping; the line is named.
    """
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise UsageError(f"{path}: {reason}.", "Check the path.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text.", "Is it a YAML file?") from None
    except (YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or type(error).__name__)
        problem = " ".join(problem.split())
        raise UsageError(f"{path}{line}: not valid YAML: {problem}.", "Fix that line.") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected `key: value` lines.", "Write `key: value` lines.")
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
            value = parse_yaml(text)
        except (YAMLError, RecursionError, ValueError):
            raise UsageError(f"{override!r}: the value is not valid YAML.", "Quote it.") from None
        _set(result, key.split("."), value, override)
    return result


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
    if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < len(node)):
        raise UsageError(
            f"{override!r}: {key!r} is not an entry of a list of {len(node)}.", "Count from 0."
        )
    return int(key)


def validate(
    model: type[Model], mapping: dict[str, Any], where: str, given: Mapping[str, str] = {}
) -> Model:
    """Validate a mapping; the first problem becomes one clear line.

    Args:
        where: what the line names, normally the file.
        given: overrides by dotted key, as they were typed: a problem with one of them names it
            instead of the file.

    Raises:
        UsageError: naming the key and, where one is near, the key that was meant.
    """
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key often leaves the right one missing: name the cause, not the effect.
        unknown_keys = [each for each in errors if each["type"] == "extra_forbidden"]
        first = (unknown_keys or errors)[0]
        key = ".".join(_written(first["loc"], mapping))
        place = _place(where, key, given)
        if first["type"] == "extra_forbidden":
            unknown = str(first["loc"][-1])
            meant = closest(unknown, [name for name in _known_keys(model) if name != unknown])
            raise UsageError(
                f"{place}: unknown key {key!r}.{meant}", "Remove or rename it."
            ) from None
        message = _WORDS.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        subject = f"{place}: {key}" if key else place
        raise UsageError(f"{subject}: {message}.", "Correct that.") from None


# What pydantic puts into the place of a problem for the branch of a union that it tried.
_BRANCH = re.compile(r"(str|int|float|bool|none|list|dict|tuple|literal|constrained|[A-Z]).*")


def _written(location: Iterable[int | str], mapping: Any) -> list[str]:
    """The place of a problem as a file spells it."""
    keys, node = [], mapping
    for part in location:
        there = isinstance(node, dict) and part in node
        if isinstance(part, str) and not there and _BRANCH.fullmatch(part):
            continue
        keys.append(str(part))
        inside = there or (isinstance(node, list) and isinstance(part, int) and part < len(node))
        node = node[part] if inside else None
    return keys


# Where pydantic speaks of Python's types, a reader of YAML does not.
_WORDS = {
    "model_type": "expected settings below it (`key: value`)",
    "dict_type": "expected settings below it (`key: value`)",
    "list_type": "expected a list: [a, b]",
    "string_type": "expected text; put it in quotes",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
}


def _place(where: str, key: str, given: Mapping[str, str]) -> str:
    """What to name for a problem with `key`: the override that set it, else the file."""
    typed = [text for name, text in given.items() if f"{key}.".startswith(f"{name}.")]
    if typed:
        return repr(typed[-1])
    inside = [text for name, text in given.items() if f"{name}.".startswith(f"{key}.") or not key]
    return " with ".join([where, " ".join(inside)]) if inside else where


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
