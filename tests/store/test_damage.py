"""A store examined: real files are damaged, each finding names its file, repair changes no more."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from kd_bench.errors import IncompleteRunError, UsageError
from kd_bench.records import Interval, ModelRef, Protocol, TaskResult, to_json
from kd_bench.store import Run, set_baseline
from kd_bench.store.damage import Finding, examine
from tests.compare.test_compare import samples
from tests.support.report_store import open_run, written_elsewhere

SCORES = [1.0, 0.0, 1.0, 1.0]


def commit(run: Run, task: str, **changes: object) -> None:
    frame = samples(task, SCORES)
    result = TaskResult(
        task, "f" * 64, "accuracy", 75.0, {"accuracy": 0.75}, len(frame),
        int(frame["unit_id"].nunique()), {"error": 0.0}, Interval(20.0, 100.0),
        settings={"aggregator": "mean"},
    )  # fmt: skip
    run.commit(replace(result, **changes), frame)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A finished run of two benchmarks with journals."""
    model = ModelRef("student", "kd", "checkpoints/student", "a" * 64)
    run = open_run(tmp_path, model, Protocol("ten"), ["mmmu", "textvqa"])
    for task in ("mmmu", "textvqa"):
        run.journal(task).append({"key": str(key), "text": "yes"} for key in range(4))
        commit(run, task)
    with run.locked():
        run.finish("complete")
    set_baseline(tmp_path, "ten", run)
    return run


def results_of(run: Run) -> Path:
    return run.path.parents[1]


def only(run: Run, repair: bool = False) -> Finding:
    (finding,) = examine(results_of(run), repair=repair)
    return finding


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def samples_path(run: Run) -> Path:
    return run.path / "tasks" / "mmmu.samples.parquet"


def test_a_sound_store_has_no_findings(run: Run, tmp_path: Path) -> None:
    before = content(tmp_path)
    assert examine(tmp_path) == []
    assert examine(tmp_path, repair=True) == []
    assert content(tmp_path) == before


def test_no_store_and_an_empty_one(tmp_path: Path) -> None:
    assert examine(tmp_path) == []
    with pytest.raises(UsageError, match="There is no folder"):
        examine(tmp_path / "nothing")


# --- journals ----------------------------------------------------------------------------------


def test_a_torn_tail_is_found_and_cut(run: Run) -> None:
    path = run.path / "journal" / "mmmu.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:37])
    finding = only(run)
    assert (finding.path, finding.state, finding.open) == (path, "damaged", True)
    assert "37 bytes" in finding.problem
    assert path.read_bytes() == whole + whole[:37], "looking must change nothing"
    mended = only(run, repair=True)
    assert (mended.state, mended.open) == ("repaired", False)
    assert path.read_bytes() == whole
    assert examine(results_of(run)) == []


def test_a_torn_tail_behind_a_link_is_not_cut(run: Run, tmp_path: Path) -> None:
    outside = tmp_path / "precious.txt"
    outside.write_text("a line\nno line end")
    (run.path / "journal" / "gqa.jsonl").symlink_to(outside)
    found = examine(tmp_path, repair=True)
    assert {finding.state for finding in found} == {"damaged"}
    assert outside.read_text() == "a line\nno line end"


@pytest.mark.parametrize("committed", [True, False])
def test_a_flipped_bit_in_a_journal(run: Run, committed: bool) -> None:
    path = run.path / "journal" / "mmmu.jsonl"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    if not committed:
        run.discard("mmmu")
        run.write_manifest(replace(run.manifest, status="running"))
    first = examine(results_of(run), repair=True)[0]
    assert first.path == path
    assert "1 line fail" in first.problem
    assert first.state == ("harmless" if committed else "damaged")
    assert path.read_bytes() == bytes(data), "a damaged line is not ours to throw away"


# --- committed tasks ---------------------------------------------------------------------------


def test_samples_that_do_not_decode(run: Run) -> None:
    data = samples_path(run).read_bytes()
    samples_path(run).write_bytes(data[:40] + bytes(60) + data[100:])
    finding = only(run, repair=True)
    assert (finding.path, finding.state) == (samples_path(run), "damaged")
    assert finding.problem == "is not what was written: its digest differs"


@pytest.mark.parametrize("cut", [0, 4, 1000])
def test_samples_cut_short(run: Run, cut: int) -> None:
    samples_path(run).write_bytes(samples_path(run).read_bytes()[:cut])
    assert only(run).path == samples_path(run)


@pytest.mark.slow
def test_every_flipped_bit_of_the_samples_is_found_or_changes_nothing(run: Run) -> None:
    sound = samples_path(run).read_bytes()
    frame = run.samples("mmmu")
    for place in range(0, len(sound), max(1, len(sound) // 150)):
        data = bytearray(sound)
        data[place] ^= 1
        samples_path(run).write_bytes(data)
        if not examine(results_of(run)):
            pd.testing.assert_frame_equal(run.samples("mmmu"), frame)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"documents": 5}, "has 4 rows, mmmu.json says 5 documents"),
        ({"units": 3}, "has 4 units, mmmu.json says 3"),
        ({"score": 80.0}, "gives a score of 75.00, mmmu.json says 80.00"),
    ],
)
def test_samples_and_result_that_disagree(run: Run, change: dict[str, float], told: str) -> None:
    commit(run, "mmmu", **change)
    assert told in only(run).problem


def test_samples_of_another_task(run: Run) -> None:
    source = run.path / "tasks" / "textvqa.json"
    (run.path / "tasks" / "mmmu.json").write_text(source.read_text())
    assert only(run).path == run.path / "tasks" / "mmmu.json"
    assert "digest differs" in only(run).problem


def test_missing_samples_and_missing_result(run: Run) -> None:
    samples_path(run).unlink()
    assert "is missing" in only(run).problem
    run.discard("mmmu")
    finding = only(run)
    assert "calls itself complete and has no result for mmmu" in finding.problem


def test_a_result_that_is_not_json(run: Run) -> None:
    path = run.path / "tasks" / "mmmu.json"
    path.write_text(path.read_text()[:50])
    finding = only(run)
    assert finding.path == path
    assert "answers are kept" in finding.hint


def test_a_profile_without_score_is_sound(run: Run) -> None:
    nothing = float("nan")
    with pytest.raises(IncompleteRunError, match="mmmu has no score"):
        commit(run, "mmmu", score=nothing, interval=None)
    run.begin(replace(run.manifest, tasks=["vqav2"], suite_tasks=["mmmu", "textvqa", "vqav2"]))
    commit(run, "vqav2", score=nothing, interval=None, profile="test-dev")
    assert [finding.path.name for finding in examine(results_of(run))] == []


# --- runs --------------------------------------------------------------------------------------


def test_a_missing_and_an_unreadable_manifest(run: Run) -> None:
    path = run.path / "manifest.json"
    text = path.read_text()
    path.unlink()
    found = {finding.path: finding.problem for finding in examine(results_of(run))}
    assert found[run.path] == "has no manifest.json"
    assert "ten stands for" in found[results_of(run) / "baselines.yaml"]
    for broken in ("{", "[]", text.replace('"complete"', '"done"'), "[" * 100_000):
        path.write_text(broken)
        assert only(run).path == path


def test_the_way_out_of_a_damaged_manifest_keeps_the_answers(run: Run) -> None:
    manifest = run.manifest
    (run.path / "manifest.json").write_text("{")
    assert "delete that file" in only(run).hint
    (run.path / "manifest.json").unlink()
    again = open_run(results_of(run), manifest.model, manifest.protocol, manifest.tasks)
    assert again.path == run.path
    assert again.results() == {}, "no digest vouches for them now: they are scored again"
    assert len(again.journal("mmmu").read()) == 4


def test_unfinished_runs_are_listed_and_left_alone(run: Run) -> None:
    run.discard("mmmu")
    samples_path(run).unlink()
    run.write_manifest(replace(run.manifest, status="running"))
    finding = only(run, repair=True)
    assert (finding.state, finding.open) == ("unfinished", True)
    assert finding.problem == "was stopped: 1 of 2 benchmarks done"
    assert "It continues" in finding.hint


def test_a_run_without_any_answer_may_go(tmp_path: Path) -> None:
    model = ModelRef("student", "kd", "checkpoints/student", "a" * 64)
    run = open_run(tmp_path, model, Protocol("ten"), ["mmmu"])
    assert only(run).hint == "Delete the folder: nothing was answered yet."


def test_samples_before_their_result_are_harmless(run: Run) -> None:
    run.discard("mmmu")
    run.write_manifest(replace(run.manifest, status="partial"))
    states = [finding.state for finding in examine(results_of(run))]
    assert states == ["harmless", "unfinished"]


def test_a_run_that_is_being_written_is_not_touched(run: Run) -> None:
    torn = run.path / "journal" / "mmmu.jsonl"
    torn.write_bytes(torn.read_bytes() + b"{")
    with written_elsewhere(run):
        finding = only(run, repair=True)
        assert (finding.path, finding.state) == (run.path, "harmless")
        assert torn.read_bytes().endswith(b"{")
    assert only(run, repair=True).state == "repaired"


# --- left behind by a killed process -----------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from kd_bench.files import atomic_path
with atomic_path(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed_while_writing(path: Path) -> Path:
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    (left,) = path.parent.glob(f".{path.name}.*")
    return left


@pytest.mark.parametrize("where", ["manifest.json", "tasks/mmmu.samples.parquet"])
def test_temporary_files_of_a_killed_process(run: Run, where: str) -> None:
    left = killed_while_writing(run.path / where)
    sound = content(run.path)
    del sound[str(left.relative_to(run.path))]
    finding = only(run)
    assert (finding.path, finding.state) == (left, "damaged")
    assert only(run, repair=True).state == "repaired"
    assert content(run.path) == sound


def test_an_unguarded_temporary_file_may_be_in_use_for_an_hour(run: Run) -> None:
    left = killed_while_writing(results_of(run) / "baselines.yaml")
    assert examine(results_of(run), repair=True) == []
    assert left.exists()
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    assert only(run, repair=True).state == "repaired"
    assert not left.exists()


def test_files_that_are_not_ours_stay(run: Run) -> None:
    others = [run.path / name for name in ("notes.tmp", ".hidden", ".a.tmp", "tasks/.b.12345678.t")]
    for path in others:
        path.write_text("mine")
    assert examine(results_of(run), repair=True) == []
    assert all(path.read_text() == "mine" for path in others)


# --- baselines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ten: gone\n", f"ten: {'x' * 400}\n", "{", "- ten\n"])
def test_baselines_that_stand_for_nothing(run: Run, text: str) -> None:
    path = results_of(run) / "baselines.yaml"
    path.write_text(text)
    finding = only(run, repair=True)
    assert (finding.path, finding.state) == (path, "damaged")
    assert path.read_text() == text


def test_a_stored_score_of_another_model_is_noticed(run: Run) -> None:
    path = run.path / "tasks" / "mmmu.json"
    stored = to_json(run.result("mmmu"))
    path.write_text(json.dumps({**stored, "score": 76.0}))
    assert (only(run).path, only(run).problem) == (
        path,
        "is not what was written: its digest differs",
    )


# --- kept pictures -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", [3, 60, -20])
def test_a_picture_with_a_flipped_bit(run: Run, place: int) -> None:
    from PIL import Image

    path = run.images / "0123456789abcdef.png"
    path.parent.mkdir()
    Image.effect_noise((16, 16), 60).convert("RGB").save(path)
    assert examine(results_of(run)) == []
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    finding = only(run)
    assert (finding.path, finding.state) == (path, "damaged")
