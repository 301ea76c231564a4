"""Methods over their training seeds, any against any, and what one seed does not tell."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kd_bench.compare import compare
from kd_bench.compare.methods import compare_all_methods, noise_of
from kd_bench.errors import UsageError
from kd_bench.files import digest_text
from kd_bench.records import AVERAGE
from tests.support.report_store import Model, add_run
from tests.support.seeds import command, named, right, store_of_methods


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_of_methods(tmp_path_factory.mktemp("seeds"))


def lineage(recipe: str) -> dict[str, object]:
    return {"recipe": recipe, "recipe_digest": digest_text(recipe)}


@pytest.mark.parametrize(
    "seeds, recipes, one",
    [
        ((0, 1), ("a", "a"), True),
        ((0, 1), ("a", "b"), False),
        ((0, 0), ("a", "a"), False),
        ((0, 1), ("a", None), False),
        ((0, 1), (None, None), False),
    ],
)
def test_one_recipe_is_said_of_equal_stored_recipes_only(
    tmp_path: Path, seeds: tuple[int, int], recipes: tuple[str | None, str | None], one: bool
) -> None:
    runs = [
        add_run(
            tmp_path,
            Model(name, "kd", "switch-kd", 0.5, seed),
            tasks=["pope"],
            training=lineage(recipe) if recipe else None,
        )
        for name, seed, recipe in zip("xy", seeds, recipes, strict=True)
    ]
    (warning,) = compare(runs, categories=False).warnings
    assert ("ONE RECIPE" in warning) == one
    pooled = noise_of(runs[0])
    assert (pooled is not None) == (seeds == (0, 1) and recipes[0] == recipes[1])


def test_seeds_of_one_recipe_share_a_digest(tmp_path: Path) -> None:
    """A recipe's own digest holds its seed: the lineage needs one without."""
    from kd_bench.distill.recipe import Recipe
    from kd_bench.distill.train import new_lineage

    stage = {"method": "sft", "steps": 1}
    made = [
        new_lineage(Recipe.model_validate({"name": f"r{seed}", "student": "s", "seed": seed,
                                        "data": {"path": data}, "stages": [stage]}))
        for seed, data in ((0, "d"), (1, "d"), (2, "other"))
    ]  # fmt: skip
    assert made[0]["recipe_digest"] != made[1]["recipe_digest"]
    assert made[0]["seedless_digest"] == made[1]["seedless_digest"] != made[2]["seedless_digest"]


def test_methods_name_the_runs_that_they_pass_over(tmp_path: Path) -> None:
    for name, method, seed, minute in (
        ("a0", "a", 0, 0), ("a0b", "a", 0, 1), ("a1", "a", 1, 2), ("a2", "a", 2, 3),
        ("b0", "b", 0, 4),
    ):  # fmt: skip
        run = add_run(
            tmp_path,
            Model(name, "kd", method, 0.5, seed),
            tasks=["pope"],
            created=f"2026-05-01T10:{minute:02d}:00+00:00",
        )
        if name == "a2":
            protocol = replace(run.manifest.protocol, limit=8)
            run.write_manifest(replace(run.manifest, protocol=protocol))
    found = compare_all_methods(tmp_path, ["a", "b"], resamples=1000)
    assert found.methods == {"a": 2, "b": 1}
    told = " ".join(found.warnings)
    assert "a0 (" in told
    assert "newer and also seed 0" in told
    assert "limited to 8 documents" in told
    assert compare_all_methods(tmp_path, ["a", "b"], allow_different=True, resamples=1000)


def test_the_known_churn_is_that_of_the_stored_seeds(store: Path) -> None:
    (warning,) = compare(named(store, "sft-seed0", "kl-seed0"), categories=False).warnings
    pairs = [(0, 1), (0, 2), (1, 2)]
    answers = [[right(10 * seed + n, 0.4) for n in range(3)] for seed in range(3)]
    churn = np.mean([np.mean(np.array(answers[a]) != np.array(answers[b])) for a, b in pairs])
    assert f"change {churn:.1%} of the answers" in warning


@pytest.mark.slow
def test_methods_against_methods_with_multiplicity(store: Path) -> None:
    words = ("compare", "--methods", "sft", "switch-kd", "kl", "--results", store)
    value = json.loads(command(*words, "--json"))
    assert value["methods"] == {"sft": 3, "switch-kd": 3, "kl": 1}
    pairs = {(pair["first"], pair["second"]): pair for pair in value["pairs"]}
    assert set(pairs) == {("sft", "switch-kd"), ("sft", "kl"), ("switch-kd", "kl")}
    for pair in pairs.values():
        found = pair["estimates"][AVERAGE]
        assert pair["p_holm"][AVERAGE] >= found["p"]
        assert found["interval"]["level"] == 0.95
    assert pairs["sft", "switch-kd"]["p_holm"][AVERAGE] < 0.05
    assert value["warnings"] == ["kl has one training seed here: its training noise is unknown."]
    assert "switch-kd - sft" in command(*words)


def test_a_method_that_is_not_there(store: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'switch-kd'"):
        compare_all_methods(store, ["sft", "swich-kd"])
    with pytest.raises(UsageError, match="two or more different methods"):
        compare_all_methods(store, ["sft", "sft"])
