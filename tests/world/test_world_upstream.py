"""lmms-eval's own prompts and scoring code on the world's rows."""

import argparse
import copy
import importlib
import statistics
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from kd_bench.world.benchmarks import BENCHMARKS, oracle_answer, prompt
from kd_bench.world.build import rows

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接使用所提供的选项字母作为答案回答。"
BLIND = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

# benchmark -> (module of lmms_eval.tasks, prefix of its functions, lmms_eval_specific_kwargs)
UPSTREAM: dict[str, tuple[str, str, dict[str, str]]] = {
    "mme": ("mme.utils", "mme", {"pre_prompt": "", "post_prompt": SHORT}),
    "mmbench_en": ("mmbench.en_utils", "mmbench", {"pre_prompt": "", "post_prompt": LETTER}),
    "mmbench_cn": ("mmbench.cn_utils", "mmbench", {"pre_prompt": "", "post_prompt": LETTER_CN}),
    "vqav2": ("vqav2.utils", "vqav2", {"pre_prompt": "", "post_prompt": SHORT}),
    "gqa": ("gqa.utils", "gqa", {"pre_prompt": "", "post_prompt": SHORT}),
    "scienceqa_img": (
        "scienceqa.utils",
        "sqa",
        {"format": "default", "pre_prompt": "", "post_prompt": LETTER},
    ),
    "mmmu": (
        "mmmu.utils",
        "mmmu",
        {
            "prompt_type": "format",
            "multiple_choice_prompt": LETTER.strip(),
            "open_ended_prompt": SHORT.strip(),
        },
    ),
    "textvqa": ("textvqa.utils", "textvqa", {"pre_prompt": "", "post_prompt": SHORT}),
    "vizwiz_vqa": (
        "vizwiz_vqa.utils",
        "vizwiz_vqa",
        {"pre_prompt": "", "post_prompt": BLIND + SHORT},
    ),
    "pope": ("pope.utils", "pope", {"pre_prompt": "", "post_prompt": SHORT}),
}


def upstream(benchmark: str, name: str) -> Any:
    module, prefix, _ = UPSTREAM[benchmark]
    return getattr(importlib.import_module(f"lmms_eval.tasks.{module}"), f"{prefix}_{name}")


def score(benchmark: str, answers: list[str], folder: Path) -> float:
    """Score one answer a row with upstream's functions, on the scale of the table's columns."""
    table = copy.deepcopy(rows(benchmark, "test"))
    if benchmark == "gqa":
        return 100 * statistics.mean(
            row["answer"] == answer for row, answer in zip(table, answers, strict=True)
        )
    process = upstream(benchmark, "process_results_val" if benchmark == "vqav2" else
                       "process_results")  # fmt: skip
    made = [process(row, [answer]) for row, answer in zip(table, answers, strict=True)]
    if benchmark == "mme":
        kept = [m["mme_perception_score"] for m in made if "mme_perception_score" in m]
        return float(upstream("mme", "aggregate_results")(kept)) / 20
    if benchmark.startswith("mmbench"):
        static = upstream("mmbench_en", "aggregate_dev_results_static")
        arguments = argparse.Namespace(output_path=str(folder))
        return float(static([m["gpt_eval_score"] for m in made], arguments))
    if benchmark == "mmmu":
        return 100 * float(upstream("mmmu", "aggregate_results")([m["mmmu_acc"] for m in made]))
    if benchmark == "pope":
        return 100 * float(
            upstream("pope", "aggregate_f1_score")([m["pope_f1_score"] for m in made])
        )
    return 100 * statistics.mean(m["exact_match"] for m in made)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_prompts_are_upstreams(benchmark: str) -> None:
    for row in rows(benchmark, "validation"):
        assert upstream(benchmark, "doc_to_text")(row, UPSTREAM[benchmark][2]) == prompt(
            benchmark, row
        )


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_oracle_gets_the_maximum(benchmark: str, tmp_path: Path) -> None:
    answers = [oracle_answer(benchmark, row) for row in rows(benchmark, "test")]
    assert score(benchmark, answers, tmp_path) == pytest.approx(100)


@pytest.mark.parametrize(
    "benchmark, answer, expected",
    [("mme", "yes", 25), ("pope", "yes", 200 / 3), ("pope", "no", 0), ("mmbench_en", "A", 0)],
)
def test_a_constant_answer_gets_what_arithmetic_says(
    benchmark: str, answer: str, expected: float, tmp_path: Path
) -> None:
    answers = [answer] * len(rows(benchmark, "test"))
    assert score(benchmark, answers, tmp_path) == pytest.approx(expected)
