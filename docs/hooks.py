"""What mkdocs makes at build time: tables of settings and messages, and links out of `docs/`.

A page asks for a table with a comment, `<!-- settings: Stage -->`, so that it reads the same on a
forge; files outside of `docs/` that a page links to become part of the site, below `source/`.
"""

import ast
import posixpath
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# --------------------------------------------------------------------------------------- settings

UNITS = {
    "Recipe": {"seed": "draws", "device_memory": "GB"},
    "DataSource": {
        "weight": "times an epoch",
        "limit": "conversations",
        "skip": "conversations",
        "unreadable_limit": "samples",
        "max_image_pixels": "pixels",
    },
    "Stage": {
        "steps": "optimizer steps",
        "epochs": "passes over the data",
        "batch_size": "samples",
        "gradient_accumulation": "micro-batches",
        "learning_rate": "per step",
        "vision_tower_learning_rate": "per step",
        "warmup": "steps, or share of them",
        "weight_decay": "per learning rate",
        "betas": "decay per step",
        "max_grad_norm": "L2 norm",
        "max_length": "tokens",
        "workers": "processes a device",
        "save_every": "steps",
        "log_every": "steps",
        "head_chunk": "answer positions",
    },
    "LoraSettings": {"r": "rank", "alpha": "factor, over r", "dropout": "probability"},
    "StudentParts": {"vision_feature_layer": "layer"},
    "Term": {
        "weight": "factor",
        "temperature": "factor of logits",
        "beta": "share of the teacher",
        "top_k": "logits",
        "candidates": "logits",
        "k_min": "logits",
        "k_max": "logits",
    },
    "Policy": {
        "alpha": "probability",
        "resamples": "draws",
        "seed": "draws",
        "broken_per_thousand": "documents",
    },
    "Margins": {"average": "points of 100", "default": "points of 100", "tasks": "points of 100"},
    "Retention": {"floor": "share of the teacher"},
    "HealthLimits": dict.fromkeys(("error", "empty", "truncated", "unparsed"), "share of answers"),
    "CostLimits": dict.fromkeys(
        ("parameters", "weight_bytes", "latency_ms", "peak_memory_bytes"), "ratio to the baseline"
    ),
}
"""Of every setting that is a number; a number without a unit stops the build."""


def settings_table(name: str) -> str:
    """Every setting of a model of recipes or policies: type, unit, default, meaning (Markdown)."""
    from kd_bench.cli.train import attribute_lines

    model = _models()[name]
    meanings = attribute_lines(model)
    lines = ["| setting | type | unit | default | meaning |", "|---|---|---|---|---|"]
    for key, field in model.model_fields.items():
        unit = UNITS.get(name, {}).get(key, "")
        if _is_number(field.annotation) and not unit:
            raise ValueError(f"docs/hooks.py: {name}.{key} is a number without a unit.")
        default = "required" if field.is_required() else _default(field)
        meaning = " ".join(meanings.get(key, "").split()).replace("|", "\\|")
        kind = _type_name(field.annotation).replace("|", "\\|")
        lines.append(f"| `{key}` | {kind}{_bounds(field)} | {unit} | {default} | {meaning} |")
    return "\n".join(lines)


def _models() -> dict[str, Any]:
    """Everything that a user can write in YAML, by class name."""
    import kd_bench.distill.recipe
    import kd_bench.policy
    from kd_bench.config import StrictModel

    assert kd_bench.distill.recipe  # imported for the models in it
    assert kd_bench.policy
    found, pending = {}, [StrictModel]
    while pending:
        kind = pending.pop()
        found[kind.__name__] = kind
        pending.extend(kind.__subclasses__())
    return found


def _default(field: Any) -> str:
    from pydantic import BaseModel

    value = field.get_default(call_default_factory=True)
    if value is None or value in ([], {}, "") or isinstance(value, BaseModel):
        return ""
    written = {True: "true", False: "false"}.get(value) if isinstance(value, bool) else None
    return f"`{written or value}`"


def _bounds(field: Any) -> str:
    """Limits of a number, in words: `, from 1`."""
    found = {"ge": "from", "gt": "above", "le": "to", "lt": "below"}
    metadata = [*field.metadata, *_inner_metadata(field.annotation)]
    words = []
    for one in metadata:
        for name in found:
            limit = getattr(one, name, None)
            if limit is not None:
                words.append(f"{found[name]} {limit:g}")
    return f", {' '.join(dict.fromkeys(words))}" if words else ""


def _inner_metadata(annotation: Any) -> list[Any]:
    inner: list[Any] = []
    for argument in typing.get_args(annotation):
        if typing.get_origin(argument) is typing.Annotated:
            inner.extend(typing.get_args(argument)[1:])
    flat: list[Any] = []
    for one in inner:  # a pydantic Field keeps its limits in `metadata`
        flat.extend(getattr(one, "metadata", [one]))
    return flat


def _type_name(annotation: Any) -> str:
    """A type as a writer of YAML would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(f"`{choice}`" for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(one) for one in arguments if one is not type(None))
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    words = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return words.get(annotation, "settings" if hasattr(annotation, "model_fields") else "any")


def _is_number(annotation: Any) -> bool:
    if annotation in (int, float):
        return True
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal or (origin is dict and str in typing.get_args(arguments[1])):
        return False  # one of a few, or whatever a template asks for
    return any(_is_number(one) for one in arguments)


def methods_table() -> str:
    """Every method with its weighted terms (Markdown)."""
    from kd_bench.distill.recipe import METHODS

    lines = ["| method | minimises |", "|---|---|"]
    for name, terms in METHODS.items():
        parts = []
        for term in terms:
            weight = "" if term.weight == 1 else f"{term.weight:g} · "
            of = " of the switch" if term.of == "switch" else ""
            parts.append(f"{weight}`{term.loss}`{of}")
        lines.append(f"| `{name}` | {' + '.join(parts)} |")
    return "\n".join(lines)


def terms_table() -> str:
    """Every loss with the options that it reads (Markdown)."""
    from kd_bench.distill.recipe import OPTIONS

    lines = ["| loss | options |", "|---|---|"]
    for name, options in OPTIONS.items():
        lines.append(f"| `{name}` | {', '.join(f'`{option}`' for option in options) or '–'} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class Message:
    """One place of the code that tells a user about a problem.

    Attributes:
        kind: the error's class.
        text: what is said, `…` where a value stands.
    """

    kind: str
    text: str


@cache
def messages() -> tuple[Message, ...]:
    """Every message of kd_bench's errors, read from the code."""
    trees = [
        ast.parse(path.read_text("utf-8")) for path in sorted((ROOT / "kd_bench").rglob("*.py"))
    ]
    bases = {
        node.name: {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    errors, models = _below("KdBenchError", bases), _below("StrictModel", bases)
    found: dict[Message, None] = {}
    for tree in trees:
        for call, scope, owner in _calls(tree, tree, ""):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if (
                name not in errors
                and name != "explained"
                and not (name == "ValueError" and owner in models)
            ):
                continue
            parts = [_text(argument, scope).strip() for argument in call.args]
            if name == "MissingExtraError" and call.args:
                parts = ["`kd-bench …` needs the package …, which is not installed."]
            text = re.sub(r"[…. ]*…[…. ]*…", "…", " ".join(part for part in parts if part))
            kind = {"explained": "UsageError", "ValueError": "UsageError"}.get(name, name)
            if len(re.sub(r"[^A-Za-z]", "", text)) > 3:
                found[Message(kind, text)] = None
    return tuple(found)


def error_classes() -> set[str]:
    """Names of all classes of the error tree."""
    from kd_bench import errors

    found, pending = set(), [errors.KdBenchError]
    while pending:
        kind = pending.pop()
        found.add(kind.__name__)
        pending.extend(kind.__subclasses__())
    return found


def _below(root: str, bases: dict[str, set[str]]) -> set[str]:
    found = {root}
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def _calls(node: ast.AST, scope: ast.AST, owner: str) -> Iterator[tuple[ast.Call, ast.AST, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield child, scope, owner
        inner = child if isinstance(child, ast.FunctionDef) else scope
        name = child.name if isinstance(child, ast.ClassDef) else owner
        yield from _calls(child, inner, name)


def _text(node: ast.AST | None, scope: ast.AST | None) -> str:
    """A message's expression as a reader sees it, `…` for what is known only when it is said."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, scope) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, scope) + _text(node.right, scope)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body, scope)} / {_text(node.orelse, scope)}"
    if isinstance(node, ast.Name) and scope is not None:
        for one in ast.walk(scope):
            if isinstance(one, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == node.id for target in one.targets
            ):
                return _text(one.value, None)
    return "…"


def entries(page: str) -> dict[str, re.Pattern[str]]:
    """The entries of the page of troubles: their titles and what messages they are about."""
    found = {}
    for part in re.split(r"^(?=### )", page, flags=re.M)[1:]:
        title = part.split("\n", 1)[0].removeprefix("### ").strip()
        for pattern in re.findall(r"<!-- messages: (.+) -->", part):
            found[title] = re.compile(pattern)
    return found


def messages_of(title: str, page: str) -> list[Message]:
    """The messages of one entry: those that no earlier entry matches."""
    earlier: list[re.Pattern[str]] = []
    for name, pattern in entries(page).items():
        if name == title:
            return [
                message
                for message in messages()
                if pattern.search(message.text)
                and not any(one.search(message.text) for one in earlier)
            ]
        earlier.append(pattern)
    raise KeyError(title)


def _with_messages(part: str, page: str) -> str:
    """An entry with the list of its messages behind its explanation; other parts as they are."""
    if "<!-- messages: " not in part:
        return part
    title = part.split("\n", 1)[0].removeprefix("### ").strip()
    text = re.sub(r"^<!-- messages: .+ -->\n", "", part, flags=re.M)
    return f"{text.rstrip()}\n\n{_messages_list(title, page)}\n\n"


def _messages_list(title: str, page: str) -> str:
    from kd_bench import errors

    lines = ['??? note "Messages of this kind"', "", "    | exit code | message |", "    |---|---|"]
    for message in messages_of(title, page):
        code = int(getattr(errors, message.kind).exit_code)
        text = message.text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
        text = text.replace("`", "").replace("[", "\\[")
        lines.append(f"    | {code} | {text} |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ layers


def layers_table() -> str:
    """The layers as the test has them, lowest first, with what each module says of itself."""
    test = ast.parse((ROOT / "tests" / "test_layers.py").read_text("utf-8"))
    order = next(
        ast.literal_eval(node.value)
        for node in test.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ORDER"
    )
    lines = ["| layer | package | what it is |", "|---|---|---|"]
    for level, packages in enumerate(order, start=1):
        lines.extend(
            f"| {level} | `kd_bench.{package}` | {_first_sentence(package)} |"
            for package in sorted(packages)
        )
    return "\n".join(lines)


def _first_sentence(package: str) -> str:
    folder = ROOT / "kd_bench" / package
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return " ".join(doc.partition("\n\n")[0].split()).replace("|", "\\|")


# -------------------------------------------------------------------------------------------- site

TABLES = {"settings": settings_table, "methods": methods_table, "terms": terms_table,
          "layers": layers_table}  # fmt: skip
PLACE = re.compile(r"<!-- (?P<table>settings|methods|terms|layers)(?:: (?P<of>\w+))? -->")
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
EXTRA = (
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "results/README.md",
    "tasks/README.md",
    "kd_bench/world/TUNING.md",
)


def _is_local(target: str) -> bool:
    return "://" not in target and not target.startswith(("mailto:", "/"))


def on_files(files: Any, config: Any) -> Any:
    """Add the files outside of `docs/` that pages link to, as `source/<path in the repository>`."""
    from mkdocs.structure.files import File

    pending = [(ROOT / "docs" / file.src_uri) for file in files.documentation_pages()]
    pending += [ROOT / name for name in EXTRA]
    seen: set[Path] = set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        if not path.is_relative_to(ROOT / "docs") and files.get_file_from_path(_site(path)) is None:
            files.append(File.generated(config, _site(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            for _, target, _, _ in LINK.findall(path.read_text("utf-8")):
                linked = Path(posixpath.normpath(path.parent / target))
                if _is_local(target) and linked.is_file() and linked.is_relative_to(ROOT):
                    pending.append(linked)
    return files


def _site(path: Path) -> str:
    """Where a file of the repository lies in the site."""
    inside = ROOT / "docs"
    if path.is_relative_to(inside):
        return path.relative_to(inside).as_posix()
    return f"source/{path.relative_to(ROOT).as_posix()}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill the tables in and turn links in the repository into links in the site."""
    uri = page.file.src_uri
    origin = (
        ROOT / uri.removeprefix("source/") if uri.startswith("source/") else ROOT / "docs" / uri
    )

    def move(match: re.Match[str]) -> str:
        before, target, anchor, after = match.groups()
        if not _is_local(target):
            return match.group(0)
        linked = Path(posixpath.normpath(origin.parent / target))
        if not linked.is_file() or not linked.is_relative_to(ROOT):
            return match.group(0)  # mkdocs says what is dead
        there = posixpath.relpath(_site(linked), posixpath.dirname(uri) or ".")
        return f"{before}{there}{anchor or ''}{after}"

    def fill(match: re.Match[str]) -> str:
        return TABLES[match["table"]](*filter(None, [match["of"]]))

    parts = re.split(r"^(?=##)", markdown, flags=re.M)
    markdown = "".join(_with_messages(part, markdown) for part in parts)
    text = re.sub(r"<!-- needs: (.+?) -->", r"*Needs \1.*", markdown)
    text = re.sub(
        r"<!-- (?P<table>settings|methods|terms|layers)(?:: (?P<of>\w+))? -->", fill, text
    )
    return LINK.sub(move, text)
