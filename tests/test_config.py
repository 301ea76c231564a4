"""YAML files and overrides: a mistake is one line that names the file, the key, the way out."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from kd_bench.config import StrictModel, apply_overrides, load, read_yaml, validate
from kd_bench.errors import ExitCode, UsageError


class Stage(StrictModel):
    name: str
    learning_rate: float = Field(default=1e-3, gt=0)
    trainable: list[str] = Field(default=[])


class Recipe(StrictModel):
    method: str
    stages: list[Stage] = Field(default=[])
    weights: dict[str, float] = Field(default={})
    seed: int | None = None


def recipe(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load(Recipe, path, overrides)


TEXT = """
method: switch-kd
stages:
  - {name: pretrain, learning_rate: 0.001}
  - {name: distil, trainable: [vision, projector]}
weights: {switch: 1}
"""


def test_a_file_is_read_and_validated(tmp_path: Path) -> None:
    found = recipe(tmp_path, TEXT)
    assert found.stages[1].trainable == ["vision", "projector"]
    assert found.weights == {"switch": 1.0}


@pytest.mark.parametrize(
    "override, path, value",
    [
        ("method=sft", "method", "sft"),
        ("seed=3", "seed", 3),
        ("seed=null", "seed", None),
        ("stages.0.learning_rate=1e-4", "stages.0.learning_rate", 1e-4),
        ("stages.1.trainable=[vision]", "stages.1.trainable", ["vision"]),
        ("weights.align=0.5", "weights.align", 0.5),
        ("method=a=b", "method", "a=b"),
        ("method='3'", "method", "3"),
    ],
)
def test_overrides_set_one_value(tmp_path: Path, override: str, path: str, value: Any) -> None:
    found: Any = recipe(tmp_path, TEXT, override).model_dump()
    for key in path.split("."):
        found = found[int(key) if isinstance(found, list) else key]
    assert found == value


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("metod: sft", [], "unknown key 'metod'. Did you mean 'method'"),
        ("method: sft\nstages: [{name: a, learning_rat: 1}]", [], "Did you mean 'learning_rate'"),
        ("method: sft\nstages: [{name: a, learning_rate: 0}]", [], "stages.0.learning_rate"),
        ("method: [sft]", [], "method: "),
        ("stages: []", [], "method: Field required"),
        ("[method]", [], "expected `key: value` lines"),
        ("", [], "expected `key: value` lines"),
        ("method: {", [], "not valid YAML"),
        ("method: !!python/object/apply:os.system [id]", [], "not valid YAML"),
        ("method: sft\nmethod2: *x", [], "not valid YAML"),
        (TEXT, ["method"], "'method' is not an override"),
        (TEXT, ["=x"], "is not an override"),
        (TEXT, ["method={"], "the value is not valid YAML"),
        (TEXT, ["stages.7.name=x"], "'7' is not an entry of a list of 2"),
        (TEXT, ["stages.x.name=x"], "'x' is not an entry of a list of 2"),
        (TEXT, ["stages.-1.name=x"], "'-1' is not an entry"),
        (TEXT, ["stages.0.nme=x"], "Did you mean 'name'"),
        (TEXT, ["seed=many"], "seed: "),
        (TEXT, ["sed=1"], "Did you mean 'seed'"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        recipe(tmp_path, text, *overrides)
    assert message in str(caught.value)
    assert "\n" not in caught.value.problem
    assert caught.value.hint
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.yaml: No such file"):
        read_yaml(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match="directory"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["a: " + "[" * 1200, "a: " + "{x: " * 1200, "? " * 1200])
def test_deep_nesting_is_an_error_not_a_crash(tmp_path: Path, text: str) -> None:
    (tmp_path / "deep.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"deep\.yaml"):
        read_yaml(tmp_path / "deep.yaml")


def test_a_bomb_of_aliases_is_cheap(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="unknown key"):
        load(Recipe, tmp_path / "bomb.yaml", ["method=sft"])


def test_the_line_of_a_mistake_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("method: sft\nseed: 'open\n")
    with pytest.raises(UsageError, match=r"line [23]"):
        read_yaml(tmp_path / "x.yaml")


def test_models_are_frozen() -> None:
    found = validate(Recipe, {"method": "sft"}, "here")
    with pytest.raises(ValueError, match="frozen"):
        found.method = "kl"  # type: ignore[misc]


KEYS = st.sampled_from(["method", "seed", "stages", "0", "name", "weights", "x", ""])
VALUES = st.sampled_from(["1", "x", "[1, 2]", "{a: 1}", "null", "1e-3", "{", "'", ": :", "&a [*a]"])


@settings(max_examples=150, deadline=None)
@given(overrides=st.lists(st.tuples(st.lists(KEYS, min_size=1, max_size=3), VALUES), max_size=3))
@pytest.mark.slow
def test_any_override_is_applied_or_refused_and_the_file_is_not_changed(
    overrides: list[tuple[list[str], str]],
) -> None:
    mapping: dict[str, Any] = {
        "method": "sft", "stages": [{"name": "a"}], "weights": {}, "seed": 1
    }  # fmt: skip
    before = copy.deepcopy(mapping)
    texts = [f"{'.'.join(keys)}={value}" for keys, value in overrides]
    with contextlib.suppress(UsageError):
        validate(Recipe, apply_overrides(mapping, texts), "here")
    assert mapping == before
