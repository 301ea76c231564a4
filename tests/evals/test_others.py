"""Models that are not a checkpoint of ours: stock models, the visual switch, imported results."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from kd_bench.errors import IncompleteRunError, UsageError
from kd_bench.evals.benchmark import lmms_eval, quiet, task_config
from kd_bench.evals.checkpoint import Model, StockModel, VisualSwitch
from kd_bench.evals.importing import import_results
from kd_bench.evals.run import EvalSettings, evaluate
from kd_bench.registry import load_task
from tests.support.eval_world import processor, save_talker, talker, write_replicas
from tests.support.golden_rows import ROWS, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replicas(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("talker"))


def go(model: Model, data: Path, results: Path, **options: Any) -> Any:
    settings = EvalSettings(data=data, results=results, progress=False, limit=12, **options)
    return evaluate(model, settings)


@pytest.mark.slow
def test_a_stock_model_runs_through_our_store(data: Path, tmp_path: Path) -> None:
    tasks = ["mmbench_en", "scienceqa_img", "mmmu", "gqa"]
    run = go(StockModel("dummy", "response=A"), data, tmp_path, tasks=tasks)
    manifest = run.manifest
    assert manifest.status == "complete", manifest.notes
    assert (manifest.model.name, manifest.model.role) == ("dummy", "baseline")
    for task in tasks:
        assert set(run.samples(task)["answer"]) == {"A"}
        assert run.result(task).computed == run.result(task).documents
    frame = run.samples("scienceqa_img")
    assert ((frame["target"] == "A") == (frame["score"] == 1)).all()
    again = go(StockModel("dummy", "response=A"), data, tmp_path, tasks=tasks)
    assert again.path == run.path
    other = go(StockModel("dummy", "response=B"), data, tmp_path, tasks=["gqa"])
    assert other.path != run.path


def test_mistakes_with_stock_models_are_one_line(data: Path, tmp_path: Path) -> None:
    def say(name: str, arguments: str = "") -> str:
        with pytest.raises(UsageError) as caught:
            go(StockModel(name, arguments), data, tmp_path, tasks=["gqa"])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no model 'llava_hff'. Did you mean 'llava_hf'?" in say("llava_hff")
    assert "cannot be made with 'frames=x'" in say("kd_bench", "frames=x")
    # Nothing was answered, no run is left; a lock is an empty hidden file that stays.
    assert not list((tmp_path / "runs").glob("[!.]*"))


@pytest.mark.slow
def test_our_own_adapter_by_its_name_in_lmms_eval(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = f"pretrained={checkpoint},device=cpu"
    stock = go(StockModel("kd_bench", arguments), data, tmp_path, tasks=["gqa", "mmmu"])
    own = go(checkpoint, data, tmp_path / "own", tasks=["gqa", "mmmu"])
    for task in ("gqa", "mmmu"):
        assert stock.samples(task)["answer"].tolist() == own.samples(task)["answer"].tolist()
        assert stock.result(task).score == own.result(task).score


@pytest.mark.slow
def test_the_hybrid_of_equal_eyes_is_the_teacher(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    tasks = ["gqa", "pope"]
    plain = go(checkpoint, data, tmp_path / "plain", tasks=tasks)
    switch = go(VisualSwitch(checkpoint, checkpoint), data, tmp_path / "s", tasks=tasks)
    assert switch.manifest.model.role == "switch"
    assert switch.manifest.model.weights_digest != plain.manifest.model.weights_digest
    assert switch.manifest.cost.parameters == plain.manifest.cost.parameters
    for task in tasks:
        pd.testing.assert_frame_equal(switch.samples(task), plain.samples(task))


@pytest.mark.slow
def test_the_hybrid_sees_with_the_students_eyes(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Its answers are those of the teacher with the student's vision tower put in by hand."""
    student = save_talker(tmp_path / "student", seed=5)
    by_hand = talker(0)
    by_hand.model.vision_tower.load_state_dict(talker(5).model.vision_tower.state_dict())
    by_hand.save_pretrained(tmp_path / "by_hand")
    processor().save_pretrained(tmp_path / "by_hand")
    switch = go(VisualSwitch(student, checkpoint), data, tmp_path / "s", tasks=["gqa"])
    expected = go(tmp_path / "by_hand", data, tmp_path / "h", tasks=["gqa"])
    answers = switch.samples("gqa")["answer"]
    assert answers.tolist() == expected.samples("gqa")["answer"].tolist()
    teacher = go(checkpoint, data, tmp_path / "t", tasks=["gqa"])
    assert answers.tolist() != teacher.samples("gqa")["answer"].tolist()


def test_eyes_that_do_not_fit_are_refused(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    from kd_bench.distill.build import Size, build_model

    wide = build_model(Size(width=64, layers=2, heads=4, vision_width=32), processor(), 0)
    wide.save_pretrained(tmp_path / "wide")
    processor().save_pretrained(tmp_path / "wide")
    with pytest.raises(UsageError, match=r"vision width differs: student 32, teacher 64"):
        go(VisualSwitch(tmp_path / "wide", checkpoint), data, tmp_path, tasks=["gqa"])


ANSWERS = {
    "mme": ["Yes", "Yes"],
    "mmbench_en": ["B", "A. a zebra", "C"],
    "vqav2": ["3"],
    "gqa": ["T-Shirt."],
    "scienceqa_img": ["B.", "(A)"],
    "mmmu": ["(B)", "2.5"],
    "textvqa": ["dakota digital"],
    "vizwiz_vqa": ["unanswerable"],
    "pope": ["yes", "no", "Yes.", "yes", "no", "yes no"],
}


def logged(
    folder: Path, data: Path, answers: dict[str, list[Any]] = ANSWERS, **changes: Any
) -> Path:
    """What `lmms-eval --log_samples --output_path` leaves behind for nine benchmarks.

    Args:
        answers: texts of the documents; lists of them where a document is asked several times.
        changes: of the tasks' configurations.
    """
    evaluator = lmms_eval()
    from lmms_eval.api.model import lmms
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.loggers.evaluation_tracker import EvaluationTracker
    from lmms_eval.tasks import TaskManager

    for task, texts in answers.items():
        spec = load_task(task)
        write_rows(data, task, ROWS[task])
        file = next((data / task).glob("*.parquet"))
        config = task_config(spec.upstream)
        config.update(
            dataset_path="parquet",
            dataset_name=None,
            process_docs=None,
            dataset_kwargs={
                "data_files": {spec.dataset.split: str(file)},
                "cache_dir": str(folder / "cache"),
            },
        )
        kept = [metric for metric in config["metric_list"] if metric["metric"] != "submission"]
        config |= {"metric_list": kept, **changes}

        class Fixed(lmms):
            texts: list[Any] = []  # noqa: RUF012

            def generate_until(self, requests: Any) -> list[str]:
                left = [iter([each] if isinstance(each, str) else each) for each in self.texts]
                return [next(left[request.args[3]]) for request in requests]

            def loglikelihood(self, requests: Any) -> Any:
                raise NotImplementedError

            generate_until_multi_round = loglikelihood

            def clean(self) -> None: ...

        model = Fixed()
        model.texts = texts
        tracker = EvaluationTracker(output_path=str(folder))
        tracker.general_config_tracker.model_name_sanitized = f"org__fixed-{task}"
        with quiet():
            outcome = evaluator.simple_evaluate(
                model,
                tasks=[ConfigurableTask(config=config, model_name=None)],
                task_manager=TaskManager("ERROR", include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
                cli_args=argparse.Namespace(
                    output_path=str(folder), process_with_media=False, reasoning_tags=None
                ),
            )
            samples = outcome.pop("samples")
            tracker.save_results_aggregated(outcome, samples, "2026-01-02T03:04:05")
            for name, entries in samples.items():
                tracker.save_results_samples(name, entries)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("foreign")
    return logged(folder / "out", folder / "data"), folder / "data"


@pytest.mark.parametrize("with_data", [False, True])
@pytest.mark.slow
def test_results_of_lmms_eval_become_runs(
    foreign: tuple[Path, Path], with_data: bool, tmp_path: Path
) -> None:
    folder, data = foreign
    runs = import_results(folder, tmp_path, data=data if with_data else None, name="theirs")
    assert len(runs) == len(ANSWERS)
    seen = {}
    for run in runs:
        (task,) = run.results()
        seen[task] = run
        manifest = run.manifest
        assert manifest.status == "complete"
        assert manifest.notes[0].startswith("imported from 2026-01-02T03-04-05_results.json")
        assert manifest.model.name == "theirs"
        result, spec = run.result(task), load_task(task)
        assert run.samples(task)["answer"].tolist() == [text.strip() for text in ANSWERS[task]]
        if task != "mme":  # one category of the ten: of its own maximum
            theirs = result.metrics[spec.metric] * spec.scale
            assert result.score == pytest.approx(theirs, abs=1e-3), task
    assert set(seen) == set(ANSWERS)
    assert seen["mme"].result("mme").score == pytest.approx(25)
    assert seen["mmbench_en"].result("mmbench_en").units == 1
    assert seen["pope"].result("pope").units == (1 if with_data else 6)
    content = {task: run.result(task).metrics.get("kd_bench_content") for task, run in seen.items()}
    assert content["scienceqa_img"] == 1.0  # `(A)` is what upstream does not read
    assert content["pope"] > 0.5
    assert content["gqa"] == 1.0
    assert None not in content.values()
    if with_data:
        assert seen["gqa"].samples("gqa")["question"][0].endswith("wearing?")
    else:
        assert "independent" in " ".join(seen["pope"].result("pope").notes)


@pytest.mark.slow
@pytest.mark.parametrize("thinking", [False, True])
def test_several_responses_as_the_harness_itself_logs_them(tmp_path: Path, thinking: bool) -> None:
    """MMMU asked twice with the filter of pass@k, then with the one that every task has."""
    thought = "<think>Hm.</think>" if thinking else ""
    said = [[f"{thought}A", f"{thought}(B)"], [f"{thought}7", f"{thought}2.5"]]
    pass_at_2 = [{"name": "pass@2", "filter": [{"function": "take_first_k", "k": 2}]}]
    for name, filters, score, shown in (
        ("both", pass_at_2, 100.0, [said[0][1], said[1][1]]),
        ("first", None, 0.0, [said[0][0], said[1][0]]),
    ):
        changes = {"repeats": 2, **({"filter_list": filters} if filters else {})}
        folder = logged(tmp_path / name, tmp_path / f"{name}-data", {"mmmu": said}, **changes)
        for data in (None, tmp_path / f"{name}-data"):
            (run,) = import_results(folder, tmp_path / f"store-{name}-{data is None}", data=data)
            assert run.result("mmmu").score == score
            assert run.samples("mmmu")["answer"].tolist() == shown
            assert run.result("mmmu").metrics["kd_bench_content"] == score / 100


@pytest.mark.slow
def test_an_old_folder_says_what_a_new_one_says(foreign: tuple[Path, Path], tmp_path: Path) -> None:
    """The same evaluations laid out as lmms-eval 0.2.0 did: a folder each, one JSON file a task."""
    for log in sorted(foreign[0].rglob("*_samples_*.jsonl")):
        stamp, _, task = log.stem.partition("_samples_")
        file = log.with_name(f"{stamp}_results.json")
        folder = tmp_path / "old" / file.parent.name
        folder.mkdir(parents=True)
        text = file.read_text().replace("mme_perception_score", "mme_percetion_score")
        outcome = json.loads(text)
        outcome["model_configs"] = outcome.pop("config")
        del outcome["n-samples"]
        (folder / "results.json").write_text(json.dumps(outcome))
        logs = [json.loads(line) for line in log.read_text().splitlines()]
        for entry in logs:
            entry["filtered_resps"] = [entry["filtered_resps"]]
            entry["resps"] = [entry["filtered_resps"]]
            entry["arguments"] = [[entry.pop("input"), entry["doc_id"], task]]
            if entry.pop("mmmu_acc_pass_at_k", None):
                entry["mmmu_acc"]["parsed_pred"] = entry["mmmu_acc"]["parsed_pred"][0]
        whole = {"args": {}, "model_configs": {}, "logs": logs, "time": "0102_0304"}
        renamed = json.dumps(whole, indent=4).replace("mme_perception", "mme_percetion")
        (folder / f"{task}.json").write_text(renamed)
    new = import_results(foreign[0], tmp_path / "new", name="theirs")
    old = import_results(tmp_path / "old", tmp_path / "store", name="theirs")
    assert len(old) == len(ANSWERS)
    samples = {task: run.samples(task) for run in old for task in run.results()}
    for run in new:
        ((task, result),) = run.results().items()
        pd.testing.assert_frame_equal(run.samples(task), samples[task])
        (other,) = (each.result(task) for each in old if task in each.results())
        assert (other.score, other.metrics) == (result.score, result.metrics)
        assert other.fingerprint == result.fingerprint


def test_damaged_or_foreign_folders_are_refused(foreign: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no \*_results.json"):
        import_results(tmp_path, tmp_path)
    broken = tmp_path / "x_results.json"
    broken.write_text("[]")
    with pytest.raises(IncompleteRunError, match="is not lmms-eval's results"):
        import_results(broken, tmp_path)
    good = next(foreign[0].rglob("*_results.json"))
    broken.write_text(good.read_text())
    with pytest.raises(UsageError, match="no sample log"):
        import_results(broken, tmp_path)
    (tmp_path / "x_samples_pope.jsonl").write_text('{"doc_id": 0}\n{"doc')
    with pytest.raises(IncompleteRunError, match="line 2 is not a logged sample"):
        import_results(broken, tmp_path)


@pytest.mark.slow
def test_the_stock_command_line_knows_kd_bench(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """`lmms-eval --model kd_bench` on a task of one's own gives our scores."""
    upstream = Path(lmms_eval().__file__).parent / "tasks" / "scienceqa" / "scienceqa_img.yaml"
    file = next((data / "scienceqa_img").glob("*.parquet"))
    task = {
        "include": str(upstream),
        "task": "local_sqa",
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"test": str(file)}, "cache_dir": str(tmp_path / "cache"),
        },
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_sqa.yaml").write_text(json.dumps(task))
    subprocess.run(
        [
            sys.executable, "-m", "lmms_eval", "--model", "kd_bench",
            "--model_args", f"pretrained={checkpoint},device=cpu",
            "--include_path", str(tmp_path / "tasks"), "--tasks", "local_sqa",
            "--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "8",
        ],
        check=True, capture_output=True, cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    log = next((tmp_path / "out").rglob("*_samples_local_sqa.jsonl"))
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    theirs = {entry["doc_id"]: entry["filtered_resps"] for entry in entries}
    settings = EvalSettings(
        tasks=["scienceqa_img"], data=data, results=tmp_path / "r", progress=False
    )
    run = evaluate(checkpoint, settings)
    ours = run.samples("scienceqa_img")["answer"].tolist()
    assert [str(theirs[index]).strip("[]'") for index in range(len(ours))] == ours


def test_torch_is_not_changed_by_an_evaluation(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    go(checkpoint, data, tmp_path, tasks=["gqa"])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.slow
def test_a_repetition_penalty_counts_as_it_does_in_lmms_evals_own_model(
    data: Path, tmp_path: Path
) -> None:
    import shutil

    pytest.importorskip("decord")
    plain = save_talker(tmp_path / "plain", seed=8)  # it never says nothing
    folder = Path(shutil.copytree(plain, tmp_path / "model"))
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.6}))
    tasks: dict[str, Any] = {"tasks": ["gqa", "pope"], "truncated_limit": 1.0}
    free = go(plain, data, tmp_path, **tasks)
    ours = go(folder, data, tmp_path, **tasks)
    stock = go(StockModel("llava_hf", f"pretrained={folder}"), data, tmp_path, **tasks)
    for task in ("gqa", "pope"):
        answers = [list(run.samples(task)["answer"]) for run in (free, ours, stock)]
        assert answers[1] == answers[2] != answers[0]
        settings = ours.result(task).settings["checkpoint_generation"]
        assert settings == {"repetition_penalty": 1.6}
