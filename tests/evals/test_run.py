"""One checkpoint over one suite: run folders, resuming, lineage, bad input."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kd_bench.compare.align import numeric_notes
from kd_bench.errors import IncompleteRunError, UsageError
from kd_bench.evals.run import EvalSettings, evaluate
from kd_bench.files import Journal, read_json, write_json
from kd_bench.records import ModelRef, Protocol
from kd_bench.stats import FEWEST_UNITS
from kd_bench.store import Run, list_runs
from tests.support.eval_world import TEN, save_talker, write_replicas
from tests.support.report_store import open_run, written_elsewhere
from tests.support.torchrun import torchrun


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replicas(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It ends its answers early: one benchmark allows 1,024 tokens."""
    return save_talker(tmp_path_factory.mktemp("talker"), seed=8, end=8)


def go(checkpoint: Path, data: Path, results: Path, **options: Any) -> Run:
    settings: dict[str, Any] = {"tasks": TEN, "limit": 24, "progress": False, "debug": False}
    settings["truncated_limit"] = 1.0  # a random model seldom ends its answers
    return evaluate(checkpoint, EvalSettings(data=data, results=results, **{**settings, **options}))


def frames(run: Run) -> dict[str, pd.DataFrame]:
    return {task: run.samples(task) for task in run.manifest.tasks if run.done(task)}


def same(first: Run, second: Run) -> None:
    """Equal samples; probabilities up to the rounding that neighbours in a batch may change."""
    for (task, one), (_, two) in zip(frames(first).items(), frames(second).items(), strict=True):
        pd.testing.assert_frame_equal(one, two, check_exact=False, atol=3e-4, obj=task)
        assert first.result(task).score == second.result(task).score
        assert first.result(task).fingerprint == second.result(task).fingerprint


def entries(run: Run) -> list[dict[str, Any]]:
    files = sorted((run.path / "journal").glob("*.jsonl"))
    return [entry for file in files for entry in Journal(file).read()]


@pytest.fixture(scope="module")
def whole(checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return go(checkpoint, data, tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_a_run_holds_what_was_asked(whole: Run, checkpoint: Path) -> None:
    manifest = whole.manifest
    assert manifest.status == "complete", manifest.notes
    assert manifest.tasks == list(TEN)
    assert manifest.model.architecture == "LlavaForConditionalGeneration"
    assert manifest.model.path == str(checkpoint)
    assert manifest.cost.parameters is not None
    assert manifest.cost.parameters > 200_000
    assert manifest.cost.weight_bytes == 4 * manifest.cost.parameters
    assert manifest.cost.latency_ms is not None
    assert manifest.cost.latency_ms > 0
    assert manifest.provenance["versions"]["lmms-eval"]
    for task in TEN:
        result = whole.result(task)
        assert result.documents >= 24
        assert result.computed == len(
            {row["key"] for row in Journal(whole.path / "journal" / f"{task}.jsonl").read()}
        )
        assert result.resumed == 0
        assert (result.interval is None) == (result.units < FEWEST_UNITS)
        if result.interval is not None:
            assert result.interval.low <= result.score <= result.interval.high
        frame = whole.samples(task)
        assert (frame["image_digest"].str.len() == 32).all()
        assert set(frame["status"]) <= {"ok", "empty", "truncated"}
    assert len({tuple(frame["answer"]) for frame in frames(whole).values()}) == len(TEN)


@pytest.mark.slow
def test_the_store_keeps_the_pictures_of_its_samples(whole: Run) -> None:
    from PIL import Image

    from kd_bench.evals.inputs import pixel_digest

    digests = {name for task in TEN for name in whole.samples(task)["image_digest"]}
    for digest in digests:
        file = whole.image(digest)
        assert file is not None
        assert pixel_digest(Image.open(file)) == digest


def test_a_finished_run_is_returned_without_loading_the_model(
    whole: Run, checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_bench.evals.run.Worker", None)
    again = go(checkpoint, data, whole.path.parents[1])
    assert again.path == whole.path
    assert again.manifest.status == "complete"
    assert again.manifest.cost == whole.manifest.cost


@pytest.mark.parametrize("batch_size", [1, 8, 16])
@pytest.mark.slow
def test_batch_size_changes_nothing(
    batch_size: int, whole: Run, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    tasks = ["mme", "mmmu", "textvqa", "pope"]
    run = go(checkpoint, data, tmp_path, tasks=tasks, batch_size=batch_size)
    for task in tasks:
        pd.testing.assert_frame_equal(
            run.samples(task), whole.samples(task), check_exact=False, atol=3e-4
        )


def in_child(work: Any) -> int:
    """Run `work` in a forked process that shares what is already imported."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def dying_journal(appends: int, torn: int) -> Any:
    """Replaces `Journal.append`: kills the process at an append, `torn` bytes into it."""
    append, left = Journal.append, [appends]

    def dying(self: Journal, records: Any) -> None:
        records = list(records)
        left[0] -= 1
        if left[0] < 0:
            line = "".join(self._encode(record) for record in records).encode()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as stream:
                stream.write(line[: torn % (len(line) + 1)])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, records)

    return dying


def killed_until_done(checkpoint: Path, data: Path, results: Path, kills: int, seed: int) -> int:
    """Evaluate again and again, killed each time; returns how many kills met a living process."""
    dice = random.Random(seed)
    met = 0
    for number in range(kills):

        def work(number: int = number) -> None:
            if number % 2:
                Journal.append = dying_journal(dice.randrange(4), dice.randrange(2000))  # type: ignore[method-assign]
            go(checkpoint, data, results, batch_size=4)

        child = in_child(work)
        if number % 2 == 0:
            time.sleep(dice.random() * 2)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        met += os.WIFSIGNALED(status)
    return met


@pytest.mark.parametrize("kills", [6, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_killed_at_random_moments_and_resumed(
    kills: int, whole: Run, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    assert killed_until_done(checkpoint, data, tmp_path, kills, seed=kills) > kills // 3
    run = go(checkpoint, data, tmp_path, batch_size=4)
    assert run.manifest.status == "complete"
    same(run, whole)
    counts = Counter(entry["key"] for entry in entries(run))
    assert max(counts.values()) == 1
    assert sum(counts.values()) == len({entry["key"] for entry in entries(whole)})


TOGETHER = """
import sys
from pathlib import Path
from kd_bench.evals.run import EvalSettings, evaluate

checkpoint, data, results, *tasks = sys.argv[1:]
settings = {"tasks": tasks, "limit": 24, "progress": False, "truncated_limit": 1.0}
evaluate(checkpoint, EvalSettings(data=Path(data), results=Path(results), **settings))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_what_one_gives(
    processes: int, whole: Run, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """As torchrun starts them; three do not share the documents out evenly."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    places = (str(checkpoint), str(data), str(tmp_path / "results"))
    done = torchrun(processes, script, *places, *TEN)
    assert done.returncode == 0, done.stderr[:4000]
    [run] = list_runs(tmp_path / "results")
    assert run.manifest.status == "complete"
    same(run, whole)
    assert sum(result.computed for result in run.results().values()) == len(
        {entry["key"] for entry in entries(whole)}
    )


@pytest.mark.slow
def test_a_flipped_bit_in_the_journal_is_computed_again(
    whole: Run, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    go(checkpoint, data, tmp_path, tasks=["gqa"])
    run = go(checkpoint, data, tmp_path, tasks=["gqa"])
    file = run.path / "journal" / "gqa.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    middle = bytearray(lines[len(lines) // 2])
    middle[len(middle) // 2] ^= 1
    lines[len(lines) // 2] = bytes(middle)
    file.write_bytes(b"".join(lines))
    run.discard("gqa")
    again = go(checkpoint, data, tmp_path, tasks=["gqa"])
    assert again.result("gqa").computed == 1
    pd.testing.assert_frame_equal(
        again.samples("gqa"), whole.samples("gqa"), check_exact=False, atol=3e-4
    )


@pytest.mark.slow
def test_a_retrained_checkpoint_at_the_same_path_is_a_new_run(data: Path, tmp_path: Path) -> None:
    folder = save_talker(tmp_path / "model", seed=3)
    first = go(folder, data, tmp_path / "results", tasks=["gqa"])
    save_talker(folder, seed=4)
    second = go(folder, data, tmp_path / "results", tasks=["gqa"])
    assert first.path != second.path
    assert second.result("gqa").computed == first.result("gqa").computed
    assert not first.samples("gqa")["answer"].equals(second.samples("gqa")["answer"])


@pytest.mark.slow
def test_another_chat_template_is_answered_anew(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    first = go(folder, data, tmp_path / "results", tasks=["gqa"])
    before = first.samples("gqa")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("ASSISTANT:", "ASSISTANT: the"))
    second = go(folder, data, tmp_path / "results", tasks=["gqa"])
    assert second.path != first.path, "another measurement is another run"
    pd.testing.assert_frame_equal(first.samples("gqa"), before)
    assert second.result("gqa").resumed == 0
    assert not before["answer"].equals(second.samples("gqa")["answer"])


@pytest.mark.slow
def test_a_prompt_template_stands_in_and_is_recorded(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    own = go(folder, data, tmp_path / "results", tasks=["gqa"])
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match=r"no chat template.*--prompt-template"):
        go(folder, data, tmp_path / "bare", tasks=["gqa"])
    with pytest.raises(UsageError, match="no prompt template 'chatlm'"):
        go(folder, data, tmp_path / "bare", tasks=["gqa"], prompt_template="chatlm")
    assert not list((tmp_path / "bare").glob("runs/*/manifest.json"))
    given = go(folder, data, tmp_path / "results", tasks=["gqa"], prompt_template="plain")
    assert given.path != own.path
    assert "{% for message" in given.manifest.protocol.prompt_template
    assert given.result("gqa").resumed == 0
    again = go(folder, data, tmp_path / "results", tasks=["gqa"], prompt_template="plain")
    assert again.path == given.path
    other = go(folder, data, tmp_path / "results", tasks=["gqa"], prompt_template="llava")
    assert other.path != given.path


@pytest.mark.slow
def test_variables_of_the_template_make_another_run(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "{% if brief %}{{ ' brief' }}{% endif %}")
    own = go(folder, data, tmp_path / "results", tasks=["gqa"])
    told = {"chat_template_kwargs": {"brief": True}}
    given = go(folder, data, tmp_path / "results", tasks=["gqa"], **told)
    assert given.path != own.path
    assert given.manifest.protocol.chat_template_kwargs == '{"brief": true}'
    assert given.result("gqa").resumed == 0
    assert go(folder, data, tmp_path / "results", tasks=["gqa"], **told).path == given.path


@pytest.mark.slow
def test_lineage_names_method_seed_and_role(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "switch-s1"
    folder = Path(shutil.copytree(checkpoint, run_folder / "final"))
    lineage = {"method": "switch-kd", "seed": 1, "recipe": "mini"}
    write_json(folder / "lineage.json", lineage)
    model = go(folder, data, tmp_path / "results", tasks=["gqa"]).manifest
    assert (model.model.method, model.model.seed, model.model.role) == ("switch-kd", 1, "kd")
    assert model.model.name == "switch-s1"
    assert model.training is not None
    assert model.training["recipe"] == "mini"
    write_json(folder / "lineage.json", {**lineage, "method": "sft", "role": "sft"})
    assert go(folder, data, tmp_path / "other", tasks=["gqa"]).manifest.model.role == "sft"
    told = go(folder, data, tmp_path / "third", tasks=["gqa"], role="baseline", name="x y/z")
    assert (told.manifest.model.role, told.manifest.model.name) == ("baseline", "x y/z")


@pytest.mark.slow
def test_unreadable_pictures_make_a_run_unhealthy_and_are_tried_again(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    damaged = Path(shutil.copytree(data, tmp_path / "data"))
    file = next((damaged / "pope").glob("*.parquet"))
    table = pq.read_table(file)
    rows = table.to_pylist()
    for row in rows[:3]:
        row["image"] = {"bytes": row["image"]["bytes"][:200], "path": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    run = go(checkpoint, damaged, tmp_path / "results", tasks=["pope", "gqa"])
    assert run.manifest.status == "unhealthy"
    assert "pope: 12.5% of the answers failed" in run.manifest.notes
    result, frame = run.result("pope"), run.samples("pope")
    assert result.rates["error"] == pytest.approx(3 / 24)
    assert (frame["status"][:3] == "error").all()
    failed = [entry for entry in entries(run) if entry["status"] == "error"]
    assert len(failed) == 3
    assert all("image cannot be decoded" in entry["error"] for entry in failed)
    again = go(checkpoint, damaged, tmp_path / "results", tasks=["pope", "gqa"])
    assert again.path == run.path
    assert again.result("pope").computed == 3
    assert again.manifest.status == "unhealthy"


def test_answers_that_never_end_make_a_run_unhealthy(data: Path, tmp_path: Path) -> None:
    endless = save_talker(tmp_path / "endless", end=0.0)
    options: dict[str, Any] = {"tasks": ["pope"], "limit": 8}
    run = go(endless, data, tmp_path / "r", **options, truncated_limit=0.5)
    assert run.result("pope").rates["truncated"] == 1.0
    assert run.manifest.status == "unhealthy"
    assert run.manifest.notes == [
        "pope: 100.0% of the answers never ended: they were cut off at the token limit"
    ]
    again = go(endless, data, tmp_path / "r", **options, truncated_limit=1.0)
    assert (again.path, again.manifest.status) == (run.path, "complete")


def test_scores_that_are_not_finite_are_failed_answers_with_their_reason(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    from kd_bench.distill.models import load_model

    folder = Path(shutil.copytree(checkpoint, tmp_path / "loud"))
    model = load_model(folder)
    model.model.language_model.norm.weight.data.fill_(3e38)  # finite, and its products are not
    model.save_pretrained(folder)
    run = go(folder, data, tmp_path / "r", tasks=["pope"], limit=8)
    assert run.manifest.status == "unhealthy"
    assert run.manifest.notes == [
        "pope: 100.0% of the answers failed",
        "pope: commonest failure: FloatingPointError: the model's logits are not finite",
    ]


@pytest.mark.slow
def test_the_quantized_model_is_a_run_beside_the_float_one(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    plain = go(checkpoint, data, tmp_path, tasks=["pope"])
    for kind in ("nf4", "int8"):
        run = go(checkpoint, data, tmp_path, tasks=["pope"], quantize=kind)
        assert run.path != plain.path
        assert run.manifest.status == "complete", run.manifest.notes
        assert run.manifest.protocol.quantize == kind
        assert run.manifest.model.name == f"{plain.manifest.model.name}-{kind}"
        assert run.manifest.cost.parameters == plain.manifest.cost.parameters
        assert run.manifest.cost.weight_bytes < plain.manifest.cost.weight_bytes  # type: ignore[operator]
        assert run.result("pope").fingerprint == plain.result("pope").fingerprint
        [note] = numeric_notes([plain, run])
        assert note.endswith(f"differ in quantization: none, {kind}.")


@pytest.mark.slow
def test_one_task_that_cannot_be_asked_does_not_cost_the_others(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    damaged = Path(shutil.copytree(data, tmp_path / "data"))
    file = next((damaged / "mmmu").glob("*.parquet"))
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[5]["options"] = "['no list"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    run = go(checkpoint, damaged, tmp_path / "results", tasks=["mmmu", "gqa"])
    assert run.manifest.status == "partial"
    assert run.done("gqa")
    assert not run.done("mmmu")
    (note,) = run.manifest.notes
    assert note.startswith("mmmu: failed: mmmu: document 5 ")


def problem(checkpoint: Path, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        evaluate(checkpoint, EvalSettings(progress=False, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_bad_input_is_named_in_one_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    def say(**options: Any) -> str:
        good: dict[str, Any] = {"checkpoint": checkpoint, "data": data, "results": tmp_path}
        return problem(**{**good, **options})

    assert "no checkpoint at" in say(checkpoint=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "not a checkpoint" in say(checkpoint=tmp_path / "empty")
    assert "Did you mean 'mmbench_en'" in say(tasks=["mmbench"])
    assert "no suite 'tne'. Did you mean 'ten'" in say(suite="tne")
    assert "no role 'kdd'" in say(role="kdd")
    assert "no data folder" in say(data=tmp_path / "absent")
    assert "mme/test-*.parquet" in say(data=tmp_path)
    assert "dtype 'float23'" in say(dtype="float23")
    assert "profile 'first'" in say(profiles={"pope": "first"})
    assert not (tmp_path / "runs").exists() or all(
        json.loads(file.read_text())["status"] == "running"
        for file in (tmp_path / "runs").glob("*/manifest.json")
    )


def flipped(data: Path, folder: Path) -> Path:
    """The same data with every answer of POPE turned round."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    changed = Path(shutil.copytree(data, folder))
    file = next((changed / "pope").glob("*.parquet"))
    table = pq.read_table(file)
    rows = table.to_pylist()
    for row in rows:
        row["answer"] = {"yes": "no", "no": "yes"}[row["answer"]]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), file)
    return changed


@pytest.mark.slow
def test_changed_data_is_asked_again_as_a_new_run(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """The data's digest is part of what a finished task is known by; its place is not."""
    results = tmp_path / "results"
    first = go(checkpoint, data, results, tasks=["pope"])
    before = first.samples("pope")
    changed = flipped(data, tmp_path / "changed")
    second = go(checkpoint, changed, results, tasks=["pope"])
    fresh = go(checkpoint, changed, tmp_path / "fresh", tasks=["pope"])
    assert second.path != first.path
    pd.testing.assert_frame_equal(second.samples("pope"), fresh.samples("pope"))
    assert second.result("pope").fingerprint != first.result("pope").fingerprint
    assert (second.samples("pope")["target"] != before["target"]).all()
    pd.testing.assert_frame_equal(first.samples("pope"), before)
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    assert go(checkpoint, moved, results, tasks=["pope"]).path == first.path
    assert go(checkpoint, changed, results, tasks=["pope", "gqa"]).path == second.path
    assert len(list_runs(results)) == 2


def test_a_refused_evaluation_writes_nothing(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """Neither a run that stays "running", nor a word in a run that another process holds."""
    results = tmp_path / "results"
    (tmp_path / "wrong").mkdir()
    for options in ({"data": tmp_path / "wrong"}, {"dtype": "float23"}, {"suite": "tenn"}):
        problem(**{"checkpoint": checkpoint, "data": data, "results": results, **options})
        assert not (results / "runs").exists() or not list_runs(results)
    run = go(checkpoint, data, results, tasks=["gqa"])
    before = (run.path / "manifest.json").read_bytes()
    with written_elsewhere(run):
        with pytest.raises(UsageError, match="written by another"):
            go(checkpoint, data, results, tasks=["gqa", "mme"], role="teacher", method="x")
        assert (run.path / "manifest.json").read_bytes() == before
    written = json.loads(before)
    (run.path / "manifest.json").write_text(json.dumps({**written, "format": 9, "new": 1}))
    with pytest.raises(IncompleteRunError, match="newer kd-bench: its format is 9"):
        go(checkpoint, data, results, tasks=["gqa"])
    assert read_json(run.path / "manifest.json")["new"] == 1


@pytest.mark.slow
def test_a_role_is_never_guessed(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """SFT alone makes no floor; what a command said stays known, and so do teachers of others."""

    def role_of(results: str, **options: Any) -> str:
        run = go(checkpoint, data, tmp_path / results, tasks=["gqa"], limit=2, **options)
        return run.manifest.model.role

    assert role_of("a") == role_of("a", method="sft") == "model"
    assert [role_of("a", role="teacher"), role_of("a")] == ["teacher", "teacher"]
    weights = list_runs(tmp_path / "a")[0].manifest.model.weights_digest
    student = open_run(
        tmp_path / "b", ModelRef("student", "kd", "", "0" * 64), Protocol("mini"), ["gqa"]
    )
    told = {"teacher": {"path": "elsewhere", "weights_sha256": weights}}
    student.write_manifest(replace(student.manifest, training=told))
    assert role_of("b") == "teacher"


def test_wrong_columns_are_named(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    damaged = Path(shutil.copytree(data, tmp_path / "data"))
    file = next((damaged / "vqav2").glob("*.parquet"))
    table = pq.read_table(file)

    def say() -> str:
        return problem(checkpoint=checkpoint, data=damaged, results=tmp_path / "r", tasks=["vqav2"])

    pq.write_table(
        table.rename_columns(
            ["queston" if name == "question" else name for name in table.column_names]
        ),
        file,
    )
    assert f"vqav2: {file} has no column 'question'. Did you mean 'queston'?" in say()
    pq.write_table(
        table.set_column(table.column_names.index("answers"), "answers", table["question"]), file
    )
    assert "column 'answers'" in say()
    file.write_bytes(b"not parquet")
    assert f"vqav2: {file} cannot be read" in say()
    gqa = next((damaged / "gqa_images").glob("*.parquet"))
    pictures = pq.read_table(gqa)
    pq.write_table(pictures.slice(3), gqa)
    line = problem(checkpoint=checkpoint, data=damaged, results=tmp_path / "r", tasks=["gqa"])
    assert "lacks the image" in line


def test_two_processes_cannot_write_one_run(whole: Run, checkpoint: Path, data: Path) -> None:
    with whole.locked():
        child = in_child(lambda: go(checkpoint, data, whole.path.parents[1]))
        _, status = os.waitpid(child, 0)
    assert os.WEXITSTATUS(status) == 1
    assert read_json(whole.path / "manifest.json")["status"] == "complete"


# --- what is kept to look at ----------------------------------------------------------------------


def test_images_are_written_once_a_store_and_upstream_asks_git_once(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many fsyncs with images to write as without; none of a run's images is its own."""
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(handle) or fsync(handle))
    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *line, **kw: started.append(line) or popen(*line, **kw)
    )
    some: dict[str, Any] = {"tasks": ["pope", "gqa", "mmmu"], "limit": 8}
    first = go(checkpoint, data, tmp_path, name="first", **some)
    written = {file: file.read_bytes() for file in (tmp_path / "images").iterdir()}
    asked = {digest[:16] for frame in frames(first).values() for digest in frame["image_digest"]}
    assert {file.stem for file in written} == asked - {""}
    assert len(written) > 8
    before, processes = len(flushed), len(started)
    times = {file: file.stat().st_mtime_ns for file in written}
    shutil.rmtree(first.path)
    second = go(checkpoint, data, tmp_path, name="second", **some)
    assert len(flushed) == 2 * before
    assert len(started) - processes <= 3, "the revision of this project, not upstream's"
    assert {file: file.stat().st_mtime_ns for file in times} == times
    digests = {digest for frame in frames(second).values() for digest in frame["image_digest"]}
    assert all(second.image(digest) for digest in digests - {""})
    cut, emptied, lost = list(written)[:3]  # as a crash leaves what was not flushed
    cut.write_bytes(written[cut][:-1])
    emptied.write_bytes(b"")
    lost.unlink()
    go(checkpoint, data, tmp_path, name="third", **some)
    assert {file: file.read_bytes() for file in (tmp_path / "images").iterdir()} == written
