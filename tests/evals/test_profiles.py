"""Every protocol profile through `evaluate`: named, scored by its own rule, stored, reported.

The rules themselves are checked on hand-written rows in test_evals_golden.py; here the model's
own answers are scored again by the few lines that each rule takes.
"""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kd_bench.evals.run import EvalSettings, evaluate
from kd_bench.registry import load_task, load_tasks
from kd_bench.report.board import load_board
from kd_bench.store import Run
from tests.support.eval_world import save_talker, write_replicas
from tests.support.report_store import printed

VARIANTS = [
    (spec.id, name)
    for spec in load_tasks()
    for name in spec.profiles
    if len(spec.profiles) > 1 or name == "static"
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded test sets, with test-dev splits that nobody has the answers of."""
    folder = write_replicas(tmp_path_factory.mktemp("data"))
    for task in ("vqav2", "vizwiz_vqa"):
        spec = load_task(task)
        (file,) = (folder / task).glob(f"{spec.dataset.split}-*.parquet")
        hidden = ["answers", "multiple_choice_answer", "answer_type", "category"]
        table = pq.read_table(file)
        table = table.drop_columns([name for name in hidden if name in table.column_names])
        split = spec.profile("test-dev").split
        pq.write_table(table, folder / task / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run_of(
    data: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Run]:
    """One run a profile; benchmarks that have one number of profiles share a run."""
    results = tmp_path_factory.mktemp("results")
    found = {}
    for place in range(max(len(spec.profiles) for spec in load_tasks())):
        chosen = {
            spec.id: list(spec.profiles)[place]
            for spec in load_tasks()
            if place < len(spec.profiles) and (spec.id, list(spec.profiles)[place]) in VARIANTS
        }
        if not chosen:
            continue
        settings = EvalSettings(
            tasks=list(chosen), profiles=chosen, data=data, limit=8,
            name=f"profile-{place}", results=results, progress=False, truncated_limit=1.0,
        )  # fmt: skip
        run = evaluate(checkpoint, settings)
        assert run.manifest.status == "complete", run.manifest.notes
        found |= dict.fromkeys(chosen.items(), run)
    return found


def test_the_profiles_are_those_that_are_promised() -> None:
    offered = {
        spec.id: [name for name in spec.profiles if name != "thinking"] for spec in load_tasks()
    }
    assert all("thinking" in spec.profiles for spec in load_tasks())
    assert {task: names for task, names in offered.items() if len(names) > 1} == {
        "vqav2": ["val", "test-dev"],
        "mmmu": ["upstream", "strict"],
        "textvqa": ["plain", "ocr"],
        "vizwiz_vqa": ["val", "test-dev"],
        "pope": ["pooled-f1", "llava", "accuracy"],
    }
    assert list(load_task("mmbench_en").profiles) == list(load_task("mmbench_cn").profiles)
    assert load_task("mmbench_en").default_profile == "static"


@pytest.mark.parametrize("task,profile", VARIANTS)
@pytest.mark.slow
def test_each_is_reached_by_name(
    task: str, profile: str, run_of: dict[tuple[str, str], Run]
) -> None:
    run = run_of[task, profile]
    result = run.result(task)
    assert result.profile == profile
    assert run.manifest.protocol.profiles[task] == profile
    assert len(run.samples(task)) == result.documents >= 8
    spec = load_task(task)
    others = [run_of[task, name].result(task).fingerprint for name in spec.profiles]
    assert len(set(others)) == len(spec.profiles)  # never compared with one another


def test_pope_by_three_rules(run_of: dict[tuple[str, str], Run]) -> None:
    pooled, llava, accuracy = (
        run_of["pope", name].result("pope").score for name in ("pooled-f1", "llava", "accuracy")
    )
    rows = run_of["pope", "pooled-f1"].samples("pope").to_dict("records")
    assert accuracy == pytest.approx(100 * share(r["answer"].lower() == r["target"] for r in rows))
    assert pooled == pytest.approx(f1([(r["answer"].lower(), r["target"]) for r in rows]))
    subsets: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        words = row["answer"].split(".")[0].replace(",", "").split(" ")
        said = "no" if {"No", "not", "no"} & set(words) else "yes"
        subsets.setdefault(row["category"], []).append((said, row["target"]))
    assert llava == pytest.approx(sum(map(f1, subsets.values())) / len(subsets))
    assert llava > pooled  # a talker that says neither word is taken to say yes


def share(right: Any) -> float:
    values = list(right)
    return sum(values) / len(values)


def f1(pairs: list[tuple[str, str]]) -> float:
    right = pairs.count(("yes", "yes"))
    return 200 * right / max(1, 2 * right + pairs.count(("yes", "no")) + pairs.count(("no", "yes")))


def test_mmmu_strict_takes_the_drawn_letters_away(run_of: dict[tuple[str, str], Run]) -> None:
    upstream, strict = (run_of["mmmu", name] for name in ("upstream", "strict"))
    rows = upstream.samples("mmmu")
    assert (rows["parsed"] == "").any()
    known = rows["score"].where(rows["parsed"] != "", 0.0)
    assert strict.result("mmmu").score == pytest.approx(100 * known.mean())
    assert upstream.result("mmmu").score == pytest.approx(100 * rows["score"].mean())
    assert strict.result("mmmu").rates["unparsed"] == pytest.approx((rows["parsed"] == "").mean())


def test_textvqa_reads_the_tokens(run_of: dict[tuple[str, str], Run]) -> None:
    plain, tokens = (run_of["textvqa", name].samples("textvqa") for name in ("plain", "ocr"))
    assert list(plain["document_id"]) == list(tokens["document_id"])
    assert list(plain["answer"]) != list(tokens["answer"])


@pytest.mark.parametrize("task", ["vqav2", "vizwiz_vqa"])
def test_test_dev_leaves_a_file_for_the_server(
    task: str, run_of: dict[tuple[str, str], Run]
) -> None:
    run = run_of[task, "test-dev"]
    result = run.result(task)
    assert math.isnan(result.score)
    assert result.interval is None
    samples = run.samples(task)
    assert samples["score"].isna().all()
    sent = json.loads((run.path / "submissions" / f"{task}.json").read_text())
    assert len(sent) == len(samples) == result.documents
    ids = [str(name) for name in samples["document_id"]]
    if task == "vqav2":
        assert [str(entry["question_id"]) for entry in sent] == ids
        assert all(isinstance(entry["question_id"], int) for entry in sent)
        assert [entry["answer"] for entry in sent] == [a.strip() for a in samples["answer"]]
    else:
        assert [entry["image"] for entry in sent] == [f"{name}.jpg" for name in ids]


def test_unscored_profiles_are_missing_on_a_board(run_of: dict[tuple[str, str], Run]) -> None:
    run = run_of["vqav2", "test-dev"]
    results = run.path.parent.parent
    (entry,) = load_board(results, [run.manifest.model.name]).entries
    assert not entry.score("vqav2").known
    assert entry.score("textvqa").known
    assert "VQAv2" in printed(results, [run.manifest.model.name])


def test_a_finished_test_dev_run_is_returned(
    data: Path, checkpoint: Path, run_of: dict[tuple[str, str], Run]
) -> None:
    run = run_of["vqav2", "test-dev"]
    settings = EvalSettings(
        tasks=list(run.manifest.tasks), profiles=dict(run.manifest.protocol.profiles),
        data=data, limit=8, name=run.manifest.model.name, results=run.path.parent.parent,
        progress=False,
    )  # fmt: skip
    again = evaluate(checkpoint, settings)
    assert again.path == run.path
    assert again.result("vqav2").computed == run.result("vqav2").computed
