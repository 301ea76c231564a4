"""Documents whose images were taken away: what a model reaches without them was guessed."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd_bench.compare import compare
from kd_bench.errors import UsageError
from kd_bench.evals.benchmark import prepare, unit_ids
from kd_bench.evals.checkpoint import Model, StockModel, VisualSwitch
from kd_bench.evals.documents import GREY, IMAGES, Documents, load_documents
from kd_bench.evals.inputs import pixel_digest
from kd_bench.evals.run import EvalSettings, evaluate
from kd_bench.records import AVERAGE, Identity, Protocol, from_json
from kd_bench.registry import load_task
from kd_bench.report.board import load_board
from kd_bench.store import Run, catalogue, find_run, set_baseline
from tests.support.eval_world import TEN, processor, save_talker, talker, write_replicas


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_replicas(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("talker"), seed=8, end=8)


def go(model: Model, data: Path, results: Path, **options: Any) -> Run:
    settings = {"tasks": ["pope", "mmmu", "gqa"], "limit": 24, "truncated_limit": 1.0, **options}
    return evaluate(model, EvalSettings(data=data, results=results, progress=False, **settings))


def pixels(documents: Documents, rows: Sequence[int]) -> list[set[str]]:
    """Digests of the decoded images that each document shows."""
    return [
        {
            pixel_digest(documents[row][column])
            for column in documents.image_columns
            if documents[row][column] is not None
        }
        for row in rows
    ]


@pytest.mark.parametrize("task", TEN)
def test_blank_images_are_grey_and_as_large(data: Path, task: str) -> None:
    own = load_documents(load_task(task), data)
    blank = own.with_images("blank", task)
    assert len(blank) == len(own)
    for row in range(0, len(own), 1 + len(own) // 12):
        for column in own.image_columns:
            one, other = own[row][column], blank[row][column]
            assert (one is None) == (other is None)
            if one is not None:
                assert one.size == other.size
                assert set(np.asarray(other).reshape(-1, 3).mean(axis=0)) == set(map(float, GREY))
    sizes = {own[row][own.image_columns[0]].size for row in range(24)}
    assert len({*blank.image_digests(own.image_columns[0])[:24]}) == len(sizes)


@pytest.mark.parametrize("task", TEN)
def test_shuffled_images_are_those_of_another_document(data: Path, task: str) -> None:
    spec = load_task(task)
    own = load_documents(spec, data)
    other = own.with_images("shuffled", task)
    rows = range(0, len(own), 1 + len(own) // 40)
    for seen, shown in zip(pixels(own, rows), pixels(other, rows), strict=True):
        assert shown
        assert not seen & shown
    columns = own.image_columns
    for column in columns:
        before, after = own.image_digests(column), other.image_digests(column)
        assert [bool(each) for each in before] == [bool(each) for each in after]
        assert len(set(zip(before, after, strict=True))) == len(set(before))  # by image
        assert not {(a, b) for a, b in zip(before, after, strict=True) if a and a == b}
        assert other.select([5, 3]).image_digests(column) == [after[5], after[3]]
        assert other[2:4].image_digests(column) == after[2:4]
    assert other.content_digests() == own.with_images("shuffled", task).content_digests()
    backwards = own.select(list(range(len(own)))[::-1]).with_images("shuffled", task)
    first = columns[0]
    assert backwards.image_digests(first)[::-1] == other.image_digests(first)
    limited = prepare(spec, data, limit=12, images="shuffled").documents
    if spec.unit not in ("pair", "circular"):  # those take whole units, not the first rows
        assert limited.image_digests(first) == other.image_digests(first)[:12]
    assert unit_ids(spec, other) == unit_ids(spec, own)


def test_one_image_cannot_be_exchanged(data: Path) -> None:
    own = load_documents(load_task("pope"), data)
    digests = own.image_digests("image")
    alike = [row for row, digest in enumerate(digests) if digest == digests[0]]
    with pytest.raises(UsageError, match=r"pope: .* no other to exchange it with"):
        own.select(alike).with_images("shuffled", "pope")


def test_a_protocol_that_takes_nothing_away_has_the_digest_that_it_had() -> None:
    old = {k: v for k, v in asdict(Protocol("mini")).items() if k != "images"}
    assert from_json(Protocol, old, "a manifest") == Protocol("mini")
    conditions = {
        kind: Identity("w", "s", replace(Protocol("mini"), images=kind), {}).conditions
        for kind in ("", *IMAGES)
    }
    assert len(set(conditions.values())) == 3
    assert conditions[""].startswith("d0eb74515b3631b4")  # as it was before there was the field


@pytest.mark.parametrize("kind", IMAGES)
def test_a_model_that_never_looks_scores_the_same(data: Path, tmp_path: Path, kind: str) -> None:
    model = StockModel("dummy", "response=yes")
    own = go(model, data, tmp_path)
    other = go(model, data, tmp_path, images=kind)
    assert other.path != own.path
    assert other.manifest.model.name == f"dummy-{kind}"
    for task in own.manifest.tasks:
        one, two = own.result(task), other.result(task)
        assert (one.score, one.units, one.documents) == (two.score, two.units, two.documents)
        assert one.fingerprint != two.fingerprint
        assert own.samples(task)["unit_id"].equals(other.samples(task)["unit_id"])
    assert go(model, data, tmp_path, images=kind).path == other.path  # continued, not made anew


@pytest.mark.slow
def test_a_run_without_its_images_is_no_score_of_its_own(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    own = go(checkpoint, data, tmp_path, name="model", role="kd")
    runs = {kind: go(checkpoint, data, tmp_path, name="model", images=kind) for kind in IMAGES}
    for kind, run in runs.items():
        assert run.manifest.model.role == "kd"  # the store knows these weights
        for task in own.manifest.tasks:
            seen, shown = (each.samples(task)["image_digest"] for each in (own, run))
            assert (seen != shown).all()
            assert run.samples(task)["unit_id"].equals(own.samples(task)["unit_id"])
            if kind == "blank":
                assert shown.nunique() < seen.nunique()  # equal sizes share one prefix
    assert find_run(tmp_path, "model") == own  # though the others are newer
    assert find_run(tmp_path, runs["blank"].path.name) == runs["blank"]
    board = load_board(tmp_path, None)
    assert [run.path for entry in board.entries for run in entry.runs] == [own.path]
    told = " ".join(board.left_out)
    for kind, run in runs.items():
        assert run.path.name in told
        reason = catalogue(tmp_path).reason(run, run.manifest)
        assert f"its images are {kind}" in reason
        with pytest.raises(UsageError, match=f"its images are {kind}"):
            set_baseline(tmp_path, "main", run, allow_limited=True, allow_subset=True)


def test_other_images_are_not_known(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no images 'blnk'\. Did you mean 'blank'"):
        go(StockModel("dummy", "response=A"), data, tmp_path, images="blnk")


def test_a_model_that_never_looks_has_no_sight_and_all_it_gains_is_guessing(
    data: Path, tmp_path: Path
) -> None:
    runs = []
    for word in ("yes", "no"):
        model = StockModel("dummy", f"response={word}")
        runs.append(go(model, data, tmp_path, name=word))
        go(model, data, tmp_path, name=f"{word}-in-the-dark", images="blank")
    found = compare(runs, resamples=1000)
    whole = {task.task: task.differences[0].value for task in found.tasks}
    assert whole["pope"] != 0
    for run in runs:
        assert {each.value for each in found.measures("sight", run.path.name).values()} == {0.0}
    other = runs[1].path.name
    for task, difference in whole.items():
        assert found.measures("sight difference", other)[task].value == 0.0
        guessed = found.measures("guessing difference", other)[task].value
        assert guessed == pytest.approx(difference, abs=1e-9)


@pytest.mark.slow
def test_teacher_student_and_hybrid_have_their_own_sight(
    data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """A student whose projector gives nothing sees nothing; its hybrid sees as little."""
    blind = talker(5, 8)
    with torch.no_grad():
        for weights in blind.model.multi_modal_projector.parameters():
            weights.zero_()
    student = tmp_path / "blind"
    blind.save_pretrained(student)
    processor().save_pretrained(student)
    models = {"teacher": checkpoint, "kd": student, "switch": VisualSwitch(student, checkpoint)}
    runs = {}
    for role, model in models.items():
        runs[role] = go(model, data, tmp_path / "results", name=role, role=role)
        go(model, data, tmp_path / "results", name=role, role=role, images="blank")
    found = compare([*runs.values()], resamples=1000)
    sights = {role: found.measures("sight", run.path.name) for role, run in runs.items()}
    assert {len(known) for known in sights.values()} == {4}  # three benchmarks and the average
    assert {each.value for each in sights["kd"].values()} == {0.0}
    there = catalogue(tmp_path / "results")
    for run in runs.values():
        blank, _ = there.blank_of(run, run.manifest)
        for task, sight in found.measures("sight", run.path.name).items():
            if task != AVERAGE:
                told = run.result(task).score - blank.result(task).score
                assert sight.value == pytest.approx(told)
