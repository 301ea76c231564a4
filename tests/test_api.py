"""The names of `kd_bench`, used as the documentation uses them."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kd_bench
from kd_bench.files import write_text
from kd_bench.records import SAMPLE_COLUMNS
from kd_bench.store import find_run, list_runs, set_baseline
from tests.support import report_store, tiny

METHODS = ("", "sft", "kl", "switch-kd")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five models, two seeds of each method, with training logs and few documents."""
    folder = tmp_path_factory.mktemp("api")
    chosen = [m for m in report_store.demo_models((0, 1)) if m.method in METHODS]
    for model in chosen:
        trained = model.role not in ("teacher", "switch")
        path = report_store.add_training(folder / model.name, model) if trained else ""
        report_store.add_run(folder / "results", model, units=12, checkpoint=str(path))
    return folder / "results"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- the face -------------------------------------------------------------------------------------


def test_importing_costs_nothing_and_names_are_listed():
    """Measured inside one process, in its own CPU time: other processes do not count."""
    code = (
        "import sys, time; start = time.process_time(); import kd_bench\n"
        "seconds = time.process_time() - start\n"
        "heavy = {'torch', 'numpy', 'pandas', 'matplotlib', 'pydantic'} & set(sys.modules)\n"
        "print(seconds < 0.05, sorted(heavy), 'SwitchKD' in dir(kd_bench))"
    )
    assert run_python(code) == "True [] True"
    assert set(dir(kd_bench)) == set(kd_bench.__all__)


def test_every_name_is_there_and_documented():
    for name in kd_bench.__all__:
        value = getattr(kd_bench, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        kd_bench.trian  # noqa: B018


@pytest.mark.slow
def test_names_stay_functions_though_packages_are_called_the_same():
    code = (
        "import kd_bench.compare.align, kd_bench.report.page, kd_bench\n"
        "print(callable(kd_bench.compare), callable(kd_bench.report))\n"
        "from kd_bench.compare import Comparison; from kd_bench.report import render_report\n"
        "from kd_bench import compare; print(callable(compare))"
    )
    assert run_python(code).split() == ["True"] * 3


def test_a_missing_package_is_one_line_that_names_the_extra():
    code = (
        "import sys; sys.modules['torch'] = None\nimport kd_bench\n"
        "for name in ('losses', 'SwitchKD'):\n"
        "    try: getattr(kd_bench, name)\n"
        "    except kd_bench.KdBenchError as error: print(error)"
    )
    for line, name in zip(run_python(code).splitlines(), ("losses", "SwitchKD"), strict=True):
        assert line == (
            f"kd_bench.{name} needs the package torch, which is not installed. "
            'Install it with: pip install "kd-bench[train]"'
        )


# --- a store --------------------------------------------------------------------------------------


def test_a_store_is_a_frame(store):
    frame = kd_bench.load_runs(store)
    assert len(frame) == len(list_runs(store))
    row = frame[frame.model == "switch-kd-seed1"].iloc[0]
    run = find_run(store, "switch-kd-seed1")
    scores = {task: result.score for task, result in run.results().items()}
    assert {task: row[task] for task in scores} == scores
    assert row.average == pytest.approx(np.mean(list(scores.values())))
    assert (row.role, row.method, row.seed, row.status, row.why_not) == (
        "kd", "switch-kd", 1, "complete", "",
    )  # fmt: skip
    assert frame[frame.model == "teacher"].seed.isna().all()
    means = frame[frame.role == "kd"].groupby("method").average.mean()
    assert means["switch-kd"] > means["kl"]


def test_an_unfinished_run_has_no_average_and_says_why(tmp_path):
    model = report_store.demo_models()[0]
    report_store.add_run(
        tmp_path, model, tasks=["mme"], planned=["mme", "gqa"], units=4, status="partial"
    )
    row = kd_bench.load_runs(tmp_path).iloc[0]
    assert np.isnan(row.average)
    assert row.mme >= 0
    assert "partial: 1 of 2" in row.why_not
    assert kd_bench.load_runs(tmp_path / "runs").empty
    with pytest.raises(kd_bench.KdBenchError, match="There is no folder"):
        kd_bench.load_runs(tmp_path / "nowhere")


def test_samples_are_a_frame_of_all_benchmarks(store):
    run = find_run(store, "teacher")
    frame = kd_bench.samples(run)
    assert list(frame.columns[: len(SAMPLE_COLUMNS) + 1]) == ["task", *SAMPLE_COLUMNS]
    assert frame.task.unique().tolist() == run.done_tasks()
    one = kd_bench.samples("teacher", ["gqa"], results=store)
    assert one.equals(frame[frame.task == "gqa"].reset_index(drop=True))
    assert 100 * one.score.mean() == pytest.approx(run.result("gqa").score)
    with pytest.raises(kd_bench.KdBenchError, match="No run named 'taecher'"):
        kd_bench.samples("taecher", results=store)
    with pytest.raises(kd_bench.KdBenchError, match="no result for chartqa"):
        kd_bench.samples(run, ["chartqa"])


def test_runs_are_compared_and_the_frame_holds_what_the_record_holds(store):
    run, teacher = find_run(store, "switch-kd-seed0"), find_run(store, "teacher").path
    comparison = kd_bench.compare("sft-seed0", run, teacher, results=store)
    frame = comparison.to_frame()
    assert len(frame) == 3 * (len(comparison.tasks) + 1)
    average = frame[frame.task == "average"]
    found = comparison.average_differences[0]
    assert average.difference.iloc[1] == found.value
    assert average.difference_low.iloc[1] == found.interval.low
    assert np.isnan(average.difference.iloc[0])
    assert average.score.tolist() == [measure.value for measure in comparison.average]
    gqa = next(task for task in comparison.tasks if task.task == "gqa")
    row = frame[frame.task == "gqa"].iloc[1]
    assert (row.score, row.p_holm) == (gqa.scores[1].value, gqa.differences[0].p_holm)


def test_methods_are_compared_over_their_seeds(store):
    comparison = kd_bench.compare("sft", "kl", "switch-kd", methods=True, results=store)
    frame = comparison.to_frame()
    assert len(frame) == 3 * (len(report_store.TASKS) + 1)
    listed = kd_bench.compare(["sft", "kl", "switch-kd"], methods=True, results=store)
    assert listed.to_frame().equals(frame)
    row = frame[(frame.task == "average") & (frame.second == "switch-kd")].iloc[0]
    pair = next(p for p in comparison.pairs if (p.first, p.second) == (row["first"], "switch-kd"))
    assert row.difference == pair.estimates["average"].value
    assert row.low < row.difference < row.high
    assert (row.first_seeds, row.second_seeds) == (2, 2)


@pytest.mark.slow
def test_the_gate_takes_runs_names_and_policies(store, tmp_path):
    seeds = ["switch-kd-seed0", "switch-kd-seed1"]
    verdict = kd_bench.check(seeds, ["sft-seed0", "sft-seed1"], results=store)
    assert verdict.exit_code == 0
    worse = kd_bench.check("sft-seed0", "teacher", results=store)
    assert worse.exit_code == 1
    policy = tmp_path / "policy.yaml"
    write_text(policy, "benchmarks: [gqa]\nmargins:\n  default: {average: 9, default: 9}\n")
    one = kd_bench.check("sft-seed0", "teacher", policy=policy, results=store)
    assert [verdict.name for verdict in one.verdicts] == ["gqa"]
    with pytest.raises(kd_bench.KdBenchError, match="No baseline named 'mini'"):
        kd_bench.check("sft-seed0", results=store)
    set_baseline(store, "mini", find_run(store, "teacher"))
    assert kd_bench.check("sft-seed0", results=store).to_json() == worse.to_json()


def test_a_report_is_a_page(store, tmp_path):
    page = kd_bench.report(store, tmp_path / "page", ["teacher", "sft-seed0", "kl-seed0"])
    assert page == tmp_path / "page" / "index.html"
    assert "kl-seed0" in page.read_text(encoding="utf-8")
    with pytest.raises(kd_bench.KdBenchError, match="holds no runs"):
        kd_bench.report(tmp_path, tmp_path / "other")
    with pytest.raises(kd_bench.KdBenchError, match="holds runs"):
        kd_bench.report(store, store / "runs" / "page", ["teacher"])


@pytest.mark.slow
def test_every_plot_is_a_figure_in_real_colours(store, tmp_path):
    names = ["teacher", "sft-seed0", "switch-kd-seed0", "switch-kd-seed0-hybrid"]
    for name in kd_bench.plots.__all__:
        figure = getattr(kd_bench.plots, name)(store, names)
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
        labels = [text for axes in figure.axes for text in [*axes.texts, axes.xaxis.label]]
        assert figure.get_supxlabel() == "Embedded mini world: not the real benchmarks."
        assert {text.get_color() for text in labels} <= {"#1b1b1a", "#63615c", "#ffffff"}


def test_a_plot_without_its_data_says_what_it_needs(tmp_path):
    report_store.make_store(tmp_path, report_store.demo_models()[:1], units=4)
    for name, needs in (("forest", "role sft"), ("knees", "training logs"), ("gaps", "switch")):
        with pytest.raises(kd_bench.KdBenchError, match=f"no plot '{name}'.*{needs}"):
            getattr(kd_bench.plots, name)(tmp_path)
    with pytest.raises(kd_bench.KdBenchError, match="No run named"):
        kd_bench.plots.bars(tmp_path, ["nobody"])


# --- losses ---------------------------------------------------------------------------------------


def test_losses_are_one_value_a_position_and_zero_for_equal_logits():
    import torch

    teacher = torch.randn(5, 40)
    student = torch.randn(5, 40, requires_grad=True)
    for name in ("dbild", "bild", "kl", "rkl", "jsd"):
        loss = getattr(kd_bench.losses, name)
        values = loss(teacher, student)
        assert values.shape == (5,)
        assert (values > 0).all()
        assert torch.allclose(loss(teacher, teacher), torch.zeros(5), atol=1e-5)
    kd_bench.losses.dbild(teacher, student, temperature=2.0).mean().backward()
    assert student.grad.abs().sum() > 0
    knees = kd_bench.losses.knee(teacher)
    assert ((knees >= 2) & (knees <= 40)).all()


# --- training and evaluating ----------------------------------------------------------------------


def test_a_recipe_is_trained_with_settings_of_python(tmp_path):
    recipe = tiny.write_recipe(tmp_path)
    settings = {"steps": 2, "log_every": 1, "save_every": 0, "schedule": "constant"}
    training = kd_bench.train(
        recipe, method="kl", data={"limit": 8}, output=tmp_path / "kl", quiet=True, **settings
    )
    assert training.folder == tmp_path / "kl"
    assert (training.checkpoint / "model.safetensors").exists()
    assert training.lineage["status"] == "complete"
    assert (training.recipe.method, training.recipe.data.limit) == ("kl", 8)
    log = training.log()
    assert log.step.tolist()[:2] == [1, 2]
    assert {"loss", "term_ce", "term_kl", "learning_rate"} <= set(log.columns)
    again = kd_bench.train(
        recipe, method="kl", data={"limit": 8}, output=tmp_path / "kl", quiet=True, **settings
    )
    assert again == training
    with pytest.raises(kd_bench.KdBenchError, match=r"'stpes'.*steps"):
        kd_bench.train(recipe, stpes=3)
    with pytest.raises(kd_bench.KdBenchError, match="Train first"):
        replace(training, folder=tmp_path).log()


def test_the_log_of_a_killed_training_is_read_up_to_its_torn_line(tmp_path):
    line = '{"stage": "distil", "step": 4, "loss": 1.5, "terms": {"ce": 1.5}}\n'
    (tmp_path / "train_log.jsonl").write_text(line + line[:20])
    frame = kd_bench.Training(tmp_path).log()
    assert frame[["step", "loss", "term_ce"]].to_numpy().tolist() == [[4, 1.5, 1.5]]


def test_a_model_in_memory_is_no_checkpoint():
    with pytest.raises(kd_bench.KdBenchError, match=r"not a model in memory\. Save the model"):
        kd_bench.evaluate(tiny.model())


@pytest.mark.slow
def test_a_model_is_evaluated_into_a_store(tmp_path):
    settings = {"tasks": ["pope"], "limit": 6, "results": tmp_path, "progress": False}
    run = kd_bench.evaluate("embedded:weights/student", name="small", role="student", **settings)
    assert run.manifest.status == "complete"
    assert run.manifest.model.name == "small"
    assert kd_bench.load_runs(tmp_path).run.tolist() == [run.path.name]
    assert len(kd_bench.samples(run)) == run.result("pope").documents
    assert kd_bench.evaluate("embedded:weights/student", name="small", **settings) == run
    with pytest.raises(kd_bench.KdBenchError, match=r"no setting 'btach_size'.*'batch_size'"):
        kd_bench.evaluate("embedded:weights/student", btach_size=3)
    with pytest.raises(kd_bench.KdBenchError, match="popeye"):
        kd_bench.evaluate("embedded:weights/student", **{**settings, "tasks": ["popeye"]})


def test_the_objective_goes_into_a_plain_loop(tmp_path):
    import torch

    student, teacher = tiny.model(seed=2), tiny.model(width=48, seed=1)
    objective = kd_bench.SwitchKD(student, teacher, method="dbild")
    ids = torch.tensor([[4, 8, 9, 10, 5, 11, 1]])
    loss, parts = objective({"input_ids": ids, "labels": ids}, return_parts=True)
    loss.backward()
    assert parts.keys() == {"ce", "align"}
    assert Path(kd_bench.__file__).parent.joinpath("py.typed").exists()
