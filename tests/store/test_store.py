"""Run folders: created, continued, committed, found, locked, damaged."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from kd_bench.errors import ExitCode, IncompleteRunError, UsageError
from kd_bench.records import (
    SAMPLE_COLUMNS,
    Cost,
    Interval,
    ModelRef,
    Protocol,
    RunManifest,
    TaskResult,
    from_json,
    to_json,
)
from kd_bench.report.leaderboard import run_table
from kd_bench.store import (
    Run,
    baseline_run,
    catalogue,
    cautions,
    find_run,
    list_runs,
    set_baseline,
)
from kd_bench.store.damage import examine
from tests.support.report_store import open_run, written_elsewhere

MODEL = ModelRef("student", "kd", "checkpoints/student", "a" * 64, "switch-kd", 1)
PROTOCOL = Protocol("mini", batch_size=8)


def result(task: str = "mmmu", **changes: object) -> TaskResult:
    made = TaskResult(task, "f" * 64, "mmmu_acc", 50.0, {"mmmu_acc": 0.5}, 2, 2, {"error": 0.0},
                      Interval(20.0, 80.0))  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


def samples(rows: int = 2) -> pd.DataFrame:
    made = {column: [f"{column}-{row}" for row in range(rows)] for column in SAMPLE_COLUMNS}
    numbers = {"score": [1.0] * rows, "answer_confidence": [float("nan")] * rows}
    return pd.DataFrame({**made, **numbers})


def new_run(results: Path, name: str = "student", digest: str = "a" * 64) -> Run:
    model = replace(MODEL, name=name, weights_digest=digest)
    return open_run(results, model, PROTOCOL, ["mmmu", "gqa"])


def finished(results: Path, name: str = "student") -> Run:
    """A complete run of its whole suite."""
    run = new_run(results, name)
    for task in ("mmmu", "gqa"):
        run.commit(result(task), samples())
    run.finish("complete")
    return run


# --- create and continue -----------------------------------------------------------------------


def test_a_new_run_is_running_and_names_model_weights_and_protocol(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    date, name, weights, protocol = run.path.name.rsplit("-", 3)
    assert (len(date), name, weights, len(protocol)) == (8, "student", "aaaaaaaa", 8)
    manifest = run.manifest
    assert (manifest.status, manifest.run_id) == ("running", run.path.name)
    assert manifest.tasks == ["mmmu", "gqa"]


def test_the_same_command_continues_the_same_folder(tmp_path: Path) -> None:
    one = new_run(tmp_path)
    one.commit(result(), samples())
    other = open_run(tmp_path, MODEL, replace(PROTOCOL, batch_size=1), ["gqa", "pope"])
    assert other.path == one.path
    assert other.manifest.tasks == ["mmmu", "gqa", "pope"]
    assert other.manifest.protocol.batch_size == 1
    assert other.done("mmmu")


def test_a_run_of_another_day_is_continued(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    older = run.path.with_name("20200101" + run.path.name[8:])
    run.path.rename(older)
    assert new_run(tmp_path).path == older


@pytest.mark.parametrize(
    "change",
    [
        {"suite": "ten"},
        {"limit": 5},
        {"dtype": "bfloat16"},
        {"profiles": {"pope": "llava"}},
    ],
)
def test_another_protocol_is_another_run(tmp_path: Path, change: dict[str, object]) -> None:
    one = new_run(tmp_path)
    other = open_run(tmp_path, MODEL, replace(PROTOCOL, **change), ["mmmu"])  # type: ignore[arg-type]
    assert other.path != one.path


def test_retrained_weights_at_the_same_path_are_another_run(tmp_path: Path) -> None:
    assert new_run(tmp_path).path != new_run(tmp_path, digest="b" * 64).path


def test_a_name_that_ends_like_another_is_not_continued(tmp_path: Path) -> None:
    """`student` must not pick up `my-student`, whose folder name ends alike."""
    other = new_run(tmp_path, "my-student")
    assert new_run(tmp_path, "student").path != other.path
    assert len(list_runs(tmp_path)) == 2


@pytest.mark.parametrize(
    "name", ["../../etc", "a/b", "", "...", "-", "é中", "a" * 300, "a\nb", ".hid"]
)
def test_no_model_name_leaves_the_runs_folder(tmp_path: Path, name: str) -> None:
    run = new_run(tmp_path, name)
    assert run.path.parent == tmp_path / "runs"
    assert run.manifest.model.name == name
    assert find_run(tmp_path, run.path.name).path == run.path


def test_different_names_with_one_slug_are_different_runs(tmp_path: Path) -> None:
    """Folder names keep plain letters only; two models must never share a folder by that."""
    one = new_run(tmp_path, "модель")
    other = new_run(tmp_path, "模型")
    assert one.manifest.model.name == "модель"
    assert other.manifest.model.name == "模型"


# --- commit and read -------------------------------------------------------------------------


def test_what_is_committed_is_read(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    frame = samples(3)
    run.commit(result(), frame)
    assert run.done("mmmu")
    assert not run.done("gqa")
    assert run.result("mmmu") == result()
    assert list(run.results()) == ["mmmu"]
    pd.testing.assert_frame_equal(run.samples("mmmu"), frame, check_dtype=False)
    assert list(run.samples("mmmu", ["score", "unit_id"]).columns) == ["score", "unit_id"]


@pytest.mark.parametrize("write", range(5))
def test_a_commit_killed_at_any_write_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """Four writes: the manifest without the task, samples, result, the manifest with both."""
    run = new_run(tmp_path)
    run.commit(result(), samples())
    left = [write]
    replaced = Path.replace

    def killed(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return replaced(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt) if write < 4 else contextlib.nullcontext():
        run.commit(result(score=60.0), samples(5))
    monkeypatch.undo()
    found = {task: (each.score, len(run.samples(task))) for task, each in run.results().items()}
    assert found == {0: {"mmmu": (50.0, 2)}, 4: {"mmmu": (60.0, 5)}}.get(write, {})


def test_a_failed_second_commit_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path)
    run.commit(result(), samples())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(OSError, match="No space"):
        run.commit(result(score=60.0), samples(5))
    monkeypatch.undo()
    assert run.result("mmmu").score == 50.0
    assert len(run.samples("mmmu")) == 2
    assert sorted(path.name for path in (run.path / "tasks").iterdir()) == [
        "mmmu.json", "mmmu.samples.parquet",
    ]  # fmt: skip


def test_discard_forgets_the_result_not_the_journal(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.journal("mmmu").append([{"key": "a"}])
    run.commit(result(), samples())
    run.discard("mmmu")
    run.discard("mmmu")
    assert not run.done("mmmu")
    assert run.journal("mmmu").read() == [{"key": "a"}]


def test_finish_sets_the_status_and_more(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    manifest = run.finish("unhealthy", notes=["2 % errors"], cost=Cost(parameters=5))
    assert manifest.finished is not None
    assert run.manifest == manifest
    assert run.manifest.cost.parameters == 5
    assert run.manifest.cost.latency_ms is None


def test_unusual_texts_survive(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    frame = samples(3)
    frame["answer"] = ["", "a\x00b\n\u2028\u202eright", "𝒜" * 1000]
    run.commit(result(), frame)
    assert run.samples("mmmu")["answer"].tolist() == frame["answer"].tolist()


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"task": 3}', b"\xff", b"null"])
def test_a_damaged_result_names_its_file(tmp_path: Path, content: bytes) -> None:
    run = new_run(tmp_path)
    run.commit(result(), samples())
    (run.path / "tasks" / "mmmu.json").write_bytes(content)
    with pytest.raises(IncompleteRunError, match=r"mmmu\.json") as caught:
        run.result("mmmu")
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    assert caught.value.hint


def test_a_result_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IncompleteRunError, match="no result for mmmu"):
        new_run(tmp_path).result("mmmu")


@pytest.mark.parametrize("content", [None, b"", b"PAR1", b"PAR1" * 50])
def test_damaged_samples_name_their_file(tmp_path: Path, content: bytes | None) -> None:
    run = new_run(tmp_path)
    run.commit(result(), samples())
    path = run.path / "tasks" / "mmmu.samples.parquet"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IncompleteRunError, match=r"mmmu\.samples\.parquet"):
        run.samples("mmmu")


def test_a_flipped_byte_anywhere_in_the_samples_is_never_read_as_a_score(tmp_path: Path) -> None:
    """Parquet pages carry checksums only if asked; a wrong score must not pass for a right one."""
    run = new_run(tmp_path)
    frame = samples(50)
    run.commit(result(), frame)
    path = run.path / "tasks" / "mmmu.samples.parquet"
    data = path.read_bytes()
    wrong = []
    for place in range(4, len(data), 61):
        changed = bytearray(data)
        changed[place] ^= 0x10
        path.write_bytes(bytes(changed))
        try:
            found = run.samples("mmmu", ["document_id", "score"])
        except IncompleteRunError:
            continue
        if found["score"].tolist() != frame["score"].tolist():
            wrong.append(place)
    assert not wrong


def test_samples_without_a_column(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.commit(result(), samples())
    path = run.path / "tasks" / "mmmu.samples.parquet"
    pd.read_parquet(path).drop(columns="target").to_parquet(path)
    with pytest.raises(IncompleteRunError, match="digest differs"):
        run.samples("mmmu")
    run.write_manifest(replace(run.manifest, format=1))  # as before there were digests
    with pytest.raises(IncompleteRunError, match="no column target"):
        run.samples("mmmu")


def test_a_damaged_manifest_names_its_file(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    (run.path / "manifest.json").write_text('{"run_id": 1}')
    with pytest.raises(IncompleteRunError, match=run.path.name):
        _ = run.manifest


def test_records_round_trip_and_ignore_nothing_they_should_not() -> None:
    manifest = RunManifest("id", "complete", "2026", MODEL, PROTOCOL, ["mmmu"], notes=["a"])
    text = json.loads(json.dumps(to_json(manifest)))
    assert from_json(RunManifest, text, "here") == manifest
    for broken in ({**text, "status": "done"}, {**text, "tasks": "mmmu"}, {"run_id": "x"}):
        with pytest.raises(IncompleteRunError, match="here is damaged"):
            from_json(RunManifest, broken, "here")


# --- find, list, baselines ---------------------------------------------------------------------


def test_runs_are_found_by_folder_prefix_model_and_path(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    for name in (run.path.name, run.path.name[:20], "student", str(run.path)):
        assert find_run(tmp_path, name).path == run.path
    assert [each.path for each in list_runs(tmp_path)] == [run.path]


def test_of_several_the_newest(tmp_path: Path) -> None:
    old, new = new_run(tmp_path), new_run(tmp_path, digest="b" * 64)
    old.write_manifest(replace(old.manifest, created="2026-01-01T00:00:00+00:00"))
    new.write_manifest(replace(new.manifest, created="2026-02-01T00:00:00+00:00"))
    assert find_run(tmp_path, "student").path == new.path
    assert [run.path for run in list_runs(tmp_path)] == [old.path, new.path]


def test_an_unknown_run_names_the_near_one(tmp_path: Path) -> None:
    new_run(tmp_path)
    with pytest.raises(UsageError, match="Did you mean 'student'"):
        find_run(tmp_path, "studnet")
    with pytest.raises(UsageError, match="No run named"):
        find_run(tmp_path / "empty", "student")


def test_an_empty_name_finds_nothing(tmp_path: Path) -> None:
    new_run(tmp_path)
    for name in ("", "x" * 400, "a\x00b"):
        with pytest.raises(UsageError, match="No run named"):
            find_run(tmp_path, name)


def test_one_damaged_run_does_not_hide_the_others(tmp_path: Path) -> None:
    good, bad = new_run(tmp_path), new_run(tmp_path, "broken")
    (bad.path / "manifest.json").write_text("{")
    with pytest.raises(IncompleteRunError, match="broken"):
        list_runs(tmp_path)
    assert find_run(tmp_path, good.path.name).path == good.path


def test_an_empty_store(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "nothing") == []


def test_baselines_are_set_and_found(tmp_path: Path) -> None:
    run, other = finished(tmp_path), finished(tmp_path, "other")
    set_baseline(tmp_path, "mini", run)
    set_baseline(tmp_path, "ten", other)
    assert baseline_run(tmp_path, "mini").path == run.path
    set_baseline(tmp_path, "mini", other)
    assert baseline_run(tmp_path, "mini").path == other.path
    assert baseline_run(tmp_path, "ten").path == other.path


@pytest.mark.parametrize("status", ["running", "partial", "unhealthy"])
def test_only_complete_runs_become_baselines(tmp_path: Path, status: str) -> None:
    run = new_run(tmp_path)
    if status != "running":
        run.finish(status)  # type: ignore[arg-type]
    with pytest.raises(IncompleteRunError, match=f"is {status}"):
        set_baseline(tmp_path, "mini", run)
    assert not (tmp_path / "baselines.yaml").exists()


def test_an_unknown_baseline_names_the_near_one_and_the_way_out(tmp_path: Path) -> None:
    run = finished(tmp_path)
    set_baseline(tmp_path, "main", run)
    with pytest.raises(UsageError, match=r"Did you mean 'main'.*baseline set") as caught:
        baseline_run(tmp_path, "mian")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_baseline_whose_run_was_deleted(tmp_path: Path) -> None:
    (tmp_path / "baselines.yaml").write_text("mini: 20260101-gone\n")
    with pytest.raises(UsageError, match="20260101-gone"):
        baseline_run(tmp_path, "mini")


# --- the lock --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_process_is_told_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with (
        written_elsewhere(run),
        pytest.raises(UsageError, match="another kd-bench process"),
        run.locked(),
    ):
        pass
    with run.locked():
        pass


# --- folders from before files carried digests ---------------------------------------------------

OLD = Path(__file__).parents[1] / "golden" / "results-format-1"


def test_an_older_results_folder_loads_and_says_that_it_is_not_verified(tmp_path: Path) -> None:
    results = Path(shutil.copytree(OLD, tmp_path / "results"))
    there = {run.manifest.model.name: run for run in list_runs(results)}
    scores = {
        name: {task: round(result.score, 1) for task, result in run.results().items()}
        for name, run in there.items()
    }
    assert scores == {
        "teacher": {"pope": 96.1, "mme": 44.1},
        "student": {"pope": 68.8, "mme": 30.9},
        "student-switch": {"pope": 73.3, "mme": 45.5},
        "small": {"pope": 0.0, "mme": 0.0},
    }
    assert not any(run.manifest.verified for run in there.values())
    assert baseline_run(results, "mini") == there["student"]
    told = cautions(there["small"])
    assert "limited to 20 documents a benchmark: n = 40, limited" in told[0]
    assert "not verified by digests" in told[1]
    table, errors = run_table(catalogue(results))
    assert not errors
    assert "not verified by digests" in table.notes
    assert examine(results) == []


@pytest.mark.parametrize("score", [92.8, float("nan")])
def test_an_edited_score_of_an_older_run_is_found_by_its_samples(
    tmp_path: Path, score: float
) -> None:
    results = Path(shutil.copytree(OLD, tmp_path / "results"))
    run = find_run(results, "student")
    path = run.path / "tasks" / "pope.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "score": score}))
    with pytest.raises(IncompleteRunError, match=r"pope.*(68.8|no score)"):
        run.results()


def test_answers_of_an_older_run_are_taken_over(tmp_path: Path) -> None:
    """An older run does not know its data: it is not continued, its journal is."""
    results = Path(shutil.copytree(OLD, tmp_path / "results"))
    old = find_run(results, "student")
    new = open_run(results, old.manifest.model, old.manifest.protocol, ["pope", "mme"])
    assert new.path != old.path
    assert new.journal("pope").read() == old.journal("pope").read() != []
    assert new.results() == {}
    assert find_run(results, "student") == old, "an unfinished run stands for nothing"


@pytest.mark.parametrize("place", ["..", "../..", ".", "/tmp", "../runs/x"])
def test_a_baseline_outside_the_runs_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "baselines.yaml").write_text(f"main: '{place}'\n", encoding="utf-8")
    with pytest.raises(UsageError, match="which is no folder in"):
        baseline_run(tmp_path, "main")
