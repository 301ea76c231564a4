"""Stores of three models, damaged after they were written.

Every reader looks before and after: the page's board, the table of runs, `runs show`, `compare` and
`check`. What it says afterwards is the same number or a refusal that names what is wrong.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from kd_bench import gate
from kd_bench.compare import compare
from kd_bench.errors import KdBenchError, UsageError
from kd_bench.files import read_json, write_json
from kd_bench.policy import load_policy
from kd_bench.records import AVERAGE, RunManifest, to_json
from kd_bench.report.board import load_board
from kd_bench.report.leaderboard import run_table
from kd_bench.store import (
    Run,
    baseline_run,
    catalogue,
    find_run,
    find_runs,
    set_baseline,
)
from tests.faults import fault
from tests.support.report_store import Model, add_run, result, samples

MODELS = (
    Model("teacher", "teacher", "", 1.5),
    Model("floor", "sft", "sft", -0.1, 0),
    Model("student", "kd", "switch-kd", 0.6, 0),
)
TASKS = ("gqa", "pope")
LATER = "2026-05-02T10:00:00+00:00"
Observed = dict[str, float | str]


@cache
def template() -> Path:
    """A sound store, made once a process."""
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="kd-bench-store-"))
    for number, model in enumerate(MODELS):
        minute = f"2026-05-01T10:{number:02d}:00+00:00"
        run = add_run(folder, model, tasks=TASKS, units=12, created=minute)
        for task in TASKS:
            run.journal(task).append({"key": str(key), "text": "yes"} for key in range(4))
    set_baseline(folder, "mini", run_of(folder, "floor"))
    return folder


def run_of(store: Path, name: str) -> Run:
    """A model's run of the sound store, found without the catalogue."""
    (path,) = (store / "runs").glob(f"20260501-{name}-*")
    return Run(path)


# --- what readers say -----------------------------------------------------------------------------


def observe(store: Path, quick: bool = False) -> Observed:
    """Every number that the readers give, and the refusals in place of others.

    Args:
        quick: without `compare` and `check`, which resample.
    """
    seen: Observed = {}
    for reader in (_page, _list, _show, *([] if quick else [_compare, _check])):
        try:
            seen |= reader(store)
        except KdBenchError as error:
            seen[f"refused {reader.__name__[1:]}"] = str(error)
    return seen


def _page(store: Path) -> Observed:
    board = load_board(store, suite="mini")
    seen: Observed = {
        f"page {entry.name} {key}": score.value
        for entry in board.entries
        for key, score in entry.scores.items()
        if score.known and not score.marks and score.comparable
    }
    told = [*board.left_out, *(line for entry in board.entries for line in entry.health)]
    marks = {mark for e in board.entries for score in e.scores.values() for mark in score.marks}
    return {**seen, "refused page": "; ".join([*told, *sorted(marks)])}


def _list(store: Path) -> Observed:
    table, errors = run_table(catalogue(store))
    seen: Observed = {}
    for row in table.rows:
        values = [cell.value for cell in row.cells]
        if values[2] == "mini" and isinstance(values[3], float) and not row.cells[6].notes:
            seen[f"list {values[0]}"] = values[3]
    return {**seen, "refused list": "; ".join([*table.notes, *map(str, errors)])}


def _show(store: Path) -> Observed:
    seen: Observed = {}
    for model in MODELS:
        try:
            found = find_run(store, model.name).results()
        except KdBenchError as error:
            seen[f"refused show {model.name}"] = str(error)
            continue
        seen |= {f"show {model.name} {task}": each.score for task, each in found.items()}
    return seen


def _compare(store: Path) -> Observed:
    found = compare(find_runs(store, ["floor", "student", "teacher"]), resamples=1000)
    seen: Observed = {}
    for task in found.tasks:
        for fact, score in zip(found.runs, task.scores, strict=True):
            seen[f"compare {fact.name} {task.task}"] = score.value
    return {**seen, "refused compare": "; ".join(found.notes)}


def _check(store: Path) -> Observed:
    policy = load_policy().model_copy(update={"resamples": 1000})
    old = baseline_run(store, "mini")
    report = gate.check(find_run(store, "student", like=old), old, policy)
    return {
        f"check {side} {verdict.name}": score
        for verdict in report.verdicts
        for side, score in (("baseline", verdict.baseline), ("candidate", verdict.candidate))
    }


@cache
def sound() -> Observed:
    """What the readers say of the sound store."""
    seen = observe(template())
    assert sum(isinstance(value, float) for value in seen.values()) > 20
    assert f"page student {AVERAGE}" in seen
    return seen


def judge(store: Path, quick: bool = False) -> None:
    """No reader gives another number; where one is missing, a refusal says why."""
    numbers = {key: value for key, value in sound().items() if isinstance(value, float)}
    if quick:
        numbers = {k: v for k, v in numbers.items() if not k.startswith(("compare", "check"))}
    seen = observe(store, quick)
    found = {key: value for key, value in seen.items() if isinstance(value, float)}
    for key, value in found.items():
        assert key in numbers, f"{key} = {value} is new"
        assert math.isclose(value, numbers[key], abs_tol=1e-9), f"{key}: {value}, {numbers[key]}"
    refusals = {key: str(value) for key, value in seen.items() if key.startswith("refused")}
    for key in sorted(numbers.keys() - found.keys()):
        reader = key.split()[0]
        told = [text for name, text in refusals.items() if name.startswith(f"refused {reader}")]
        assert any(len(text) > 12 for text in told), f"{key} is gone without a word"
    assert all("\n" not in text for text in refusals.values())


# --- the damage -----------------------------------------------------------------------------------

Damage = Callable[[Path, Run, random.Random], None]


def damage(family: str, tries: int = 1) -> Callable[[Damage], Damage]:
    """Register damage to a copy of the sound store; it is given one run and seeded dice."""

    def register(made: Damage) -> Damage:
        def inject(folder: Path, number: int) -> None:
            dice = random.Random(number)
            store = Path(shutil.copytree(template(), folder / "results"))
            made(store, run_of(store, MODELS[number % 3].name), dice)
            judge(store, quick=tries > 10)

        inject.__name__ = made.__name__
        fault(family, tries=tries)(inject)
        return made

    return register


def flip(path: Path, dice: random.Random) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    place = dice.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def edit(path: Path, **changes: object) -> None:
    """Change fields of a JSON file by hand."""
    path.write_text(json.dumps({**read_json(path), **changes}))


def parquet(run: Run, task: str) -> Path:
    return run.path / "tasks" / f"{task}.samples.parquet"


FILES = "stored files: edited, swapped, cut, lost"
BITS = "stored files: one bit flipped"
MANIFESTS = "manifests"
OTHERS = "other runs of the same name"
AROUND = "baselines, journals, leftovers"


@damage(BITS, tries=1500)
def a_bit_of_samples_flipped(store: Path, run: Run, dice: random.Random) -> None:
    flip(parquet(run, dice.choice(TASKS)), dice)


@damage(BITS, tries=300)
def a_bit_of_a_result_flipped(store: Path, run: Run, dice: random.Random) -> None:
    flip(run.path / "tasks" / f"{dice.choice(TASKS)}.json", dice)


@damage(BITS, tries=300)
def a_bit_of_a_manifest_flipped(store: Path, run: Run, dice: random.Random) -> None:
    flip(run.path / "manifest.json", dice)


@damage(BITS, tries=60)
def a_bit_of_a_journal_flipped(store: Path, run: Run, dice: random.Random) -> None:
    flip(run.path / "journal" / "pope.jsonl", dice)


@damage(BITS, tries=120)
def a_bit_of_the_baselines_flipped(store: Path, run: Run, dice: random.Random) -> None:
    flip(store / "baselines.yaml", dice)


@damage(FILES, tries=3)
def a_score_edited(store: Path, run: Run, dice: random.Random) -> None:
    edit(run.path / "tasks" / "pope.json", score=92.8)


@damage(FILES, tries=3)
def a_score_edited_by_less_than_rounding(store: Path, run: Run, dice: random.Random) -> None:
    edit(run.path / "tasks" / "pope.json", score=run.result("pope").score + 0.04)


@damage(FILES, tries=3)
def a_score_that_is_no_number(store: Path, run: Run, dice: random.Random) -> None:
    edit(run.path / "tasks" / "gqa.json", score=float("nan"))


@damage(FILES, tries=3)
def a_fingerprint_edited(store: Path, run: Run, dice: random.Random) -> None:
    edit(run.path / "tasks" / "gqa.json", fingerprint="0" * 64)


@damage(FILES, tries=3)
def a_result_cut(store: Path, run: Run, dice: random.Random) -> None:
    path = run.path / "tasks" / "pope.json"
    path.write_bytes(path.read_bytes()[: dice.randrange(200)])


@damage(FILES, tries=3)
def a_result_lost(store: Path, run: Run, dice: random.Random) -> None:
    (run.path / "tasks" / "pope.json").unlink()


@damage(FILES, tries=3)
def a_result_of_another_benchmark(store: Path, run: Run, dice: random.Random) -> None:
    shutil.copyfile(run.path / "tasks" / "gqa.json", run.path / "tasks" / "pope.json")


@damage(FILES, tries=3)
def results_and_samples_of_two_benchmarks_swapped(
    store: Path, run: Run, dice: random.Random
) -> None:
    for end in (".json", ".samples.parquet"):
        one, other = (run.path / "tasks" / f"{task}{end}" for task in TASKS)
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)


@damage(FILES, tries=3)
def results_and_samples_of_another_run(store: Path, run: Run, dice: random.Random) -> None:
    other = next(m.name for m in MODELS if run_of(store, m.name) != run)
    for end in (".json", ".samples.parquet"):
        shutil.copyfile(
            run_of(store, other).path / "tasks" / f"pope{end}", run.path / "tasks" / f"pope{end}"
        )


@damage(FILES, tries=3)
def samples_of_another_run(store: Path, run: Run, dice: random.Random) -> None:
    other = next(m.name for m in MODELS if run_of(store, m.name) != run)
    shutil.copyfile(parquet(run_of(store, other), "pope"), parquet(run, "pope"))


@damage(FILES, tries=3)
def samples_edited(store: Path, run: Run, dice: random.Random) -> None:
    frame = pd.read_parquet(parquet(run, "gqa"))
    frame["score"] = 1.0
    frame.to_parquet(parquet(run, "gqa"), index=False, write_page_checksum=True)


@damage(FILES, tries=3)
def samples_twice(store: Path, run: Run, dice: random.Random) -> None:
    frame = pd.read_parquet(parquet(run, "gqa"))
    pd.concat([frame, frame]).to_parquet(parquet(run, "gqa"), index=False)


@damage(FILES, tries=3)
def samples_and_result_edited_alike(store: Path, run: Run, dice: random.Random) -> None:
    frame = pd.read_parquet(parquet(run, "gqa")).assign(score=1.0)
    frame.to_parquet(parquet(run, "gqa"), index=False)
    write_json(run.path / "tasks" / "gqa.json", to_json(result("gqa", frame)))


@damage(FILES, tries=3)
def samples_cut(store: Path, run: Run, dice: random.Random) -> None:
    data = parquet(run, "pope").read_bytes()
    parquet(run, "pope").write_bytes(data[: dice.randrange(len(data))])


@damage(FILES, tries=3)
def samples_lost(store: Path, run: Run, dice: random.Random) -> None:
    parquet(run, "pope").unlink()


@damage(FILES, tries=3)
def all_tasks_lost(store: Path, run: Run, dice: random.Random) -> None:
    shutil.rmtree(run.path / "tasks")


# --- manifests


def rewritten(run: Run, **changes: object) -> None:
    """A manifest changed by hand, its own digest left as it was."""
    edit(run.path / "manifest.json", **changes)


@damage(MANIFESTS, tries=3)
def a_manifest_lost(store: Path, run: Run, dice: random.Random) -> None:
    (run.path / "manifest.json").unlink()


@damage(MANIFESTS, tries=6)
def a_manifest_that_is_none(store: Path, run: Run, dice: random.Random) -> None:
    text = dice.choice(["", "{", "[]", "null", "{}", "[" * 50_000, '{"format": 2}', "\x00"])
    (run.path / "manifest.json").write_text(text)


@damage(MANIFESTS, tries=3)
def a_manifest_cut(store: Path, run: Run, dice: random.Random) -> None:
    path = run.path / "manifest.json"
    path.write_bytes(path.read_bytes()[: dice.randrange(1, 900)])


@damage(MANIFESTS, tries=3)
def a_manifest_of_a_newer_format(store: Path, run: Run, dice: random.Random) -> None:
    rewritten(run, format=3, signed_by="someone")


@damage(MANIFESTS, tries=3)
def a_manifest_of_an_older_format(store: Path, run: Run, dice: random.Random) -> None:
    rewritten(run, format=1)


@damage(MANIFESTS, tries=3)
def a_manifest_of_another_run(store: Path, run: Run, dice: random.Random) -> None:
    other = next(m.name for m in MODELS if run_of(store, m.name) != run)
    shutil.copyfile(run_of(store, other).path / "manifest.json", run.path / "manifest.json")


@damage(MANIFESTS, tries=3)
def a_role_edited(store: Path, run: Run, dice: random.Random) -> None:
    rewritten(run, model={**to_json(run.manifest)["model"], "role": "sft"})


@damage(MANIFESTS, tries=3)
def a_name_edited(store: Path, run: Run, dice: random.Random) -> None:
    rewritten(run, model={**to_json(run.manifest)["model"], "name": "teacher"})


@damage(MANIFESTS, tries=3)
def a_status_edited(store: Path, run: Run, dice: random.Random) -> None:
    rewritten(run, status="unhealthy")


@damage(MANIFESTS, tries=3)
def digests_edited_with_the_score(store: Path, run: Run, dice: random.Random) -> None:
    from kd_bench.files import digest_bytes

    path = run.path / "tasks" / "pope.json"
    edit(path, score=92.8)
    files = {**run.manifest.files, "tasks/pope.json": digest_bytes(path.read_bytes())}
    rewritten(run, files=files)


# --- other runs of the same name


def another(store: Path, run: Run, skill: float, **changes: object) -> Run:
    """A newer run of the same model with other scores."""
    manifest = run.manifest
    tail = run.path.name.rsplit("-", 1)[0].removeprefix("20260501-")
    made = Run(store / "runs" / f"20260502-{tail}-other000")
    fresh: RunManifest = replace(manifest, run_id=made.path.name, created=LATER, files={})
    made.write_manifest(replace(fresh, **changes))  # type: ignore[arg-type]
    model = Model(manifest.model.name + "?", manifest.model.role, "", skill)
    for task in made.manifest.tasks:
        frame = samples(task, model, units=6)
        made.commit(replace(result(task, frame), total=600), frame)
    return made


@damage(OTHERS, tries=3)
def a_limited_run_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    another(store, run, 2.5, protocol=replace(run.manifest.protocol, limit=4))


@damage(OTHERS, tries=3)
def a_stopped_run_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    another(store, run, 2.5, status="running", finished=None)


@damage(OTHERS, tries=3)
def a_run_that_never_began_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    made = another(store, run, 2.5, status="running")
    for task in TASKS:
        made.discard(task)


@damage(OTHERS, tries=3)
def a_partial_run_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    another(store, run, 2.5, status="partial").discard("gqa")


@damage(OTHERS, tries=3)
def an_unhealthy_run_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    another(store, run, 2.5, status="unhealthy", notes=["pope: 12.5% of the answers failed"])


@damage(OTHERS, tries=3)
def a_run_of_one_benchmark_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    another(store, run, 2.5, tasks=["pope"], suite_tasks=list(TASKS))


@damage(OTHERS, tries=3)
def a_run_of_another_dtype_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    another(store, run, 2.5, protocol=replace(run.manifest.protocol, dtype="bfloat16"))


@damage(OTHERS, tries=3)
def a_quantised_run_after_the_full_one(store: Path, run: Run, dice: random.Random) -> None:
    another(store, run, 2.5, protocol=replace(run.manifest.protocol, quantize="nf4"))


@damage(OTHERS, tries=3)
def a_newer_run_that_is_damaged(store: Path, run: Run, dice: random.Random) -> None:
    (another(store, run, 2.5).path / "manifest.json").write_text("{")


@damage(OTHERS, tries=3)
def a_newer_run_with_an_edited_score(store: Path, run: Run, dice: random.Random) -> None:
    edit(another(store, run, 2.5).path / "tasks" / "pope.json", score=99.0)


@damage(OTHERS, tries=3)
def a_copy_of_the_run_with_an_edited_score(store: Path, run: Run, dice: random.Random) -> None:
    copy = shutil.copytree(run.path, run.path.with_name("20260503" + run.path.name[8:]))
    edit(Path(copy) / "tasks" / "pope.json", score=99.0)


@damage(OTHERS, tries=3)
def a_copy_of_the_run(store: Path, run: Run, dice: random.Random) -> None:
    shutil.copytree(run.path, run.path.with_name("20260503" + run.path.name[8:]))


# --- around the runs


@damage(AROUND, tries=3)
def a_baseline_that_names_another_run(store: Path, run: Run, dice: random.Random) -> None:
    path = store / "baselines.yaml"
    floor, other = run_of(store, "floor").path.name, run_of(store, "teacher").path.name
    path.write_text(path.read_text().replace(floor, other))


@damage(AROUND, tries=3)
def the_baselines_cut(store: Path, run: Run, dice: random.Random) -> None:
    path = store / "baselines.yaml"
    path.write_bytes(path.read_bytes()[: dice.randrange(80)])


@damage(AROUND)
def the_baselines_lost(store: Path, run: Run, dice: random.Random) -> None:
    (store / "baselines.yaml").unlink()


@fault(AROUND)
def the_baselines_run_lost(folder: Path, number: int) -> None:
    store = Path(shutil.copytree(template(), folder / "results"))
    shutil.rmtree(run_of(store, "floor").path)
    with pytest.raises(UsageError, match="which is not there"):
        baseline_run(store, "mini")
    found = observe(store)
    assert "check candidate gqa" not in found
    assert found["page student gqa"] == sound()["page student gqa"]


@damage(AROUND, tries=3)
def a_journal_torn(store: Path, run: Run, dice: random.Random) -> None:
    path = run.path / "journal" / "pope.jsonl"
    path.write_bytes(path.read_bytes()[:-7])


@damage(AROUND, tries=3)
def files_that_a_killed_process_left(store: Path, run: Run, dice: random.Random) -> None:
    for path in (run.path / "tasks", run.path, store / "runs"):
        (path / ".pope.json.abcdef12.tmp").write_text('{"score": 99')
    (run.path / "tasks" / "mme.json").write_text('{"task": "mme", "score": 99}')
    (store / "runs" / "20260509-student-00000000-00000000").mkdir()


@damage(AROUND, tries=3)
def a_folder_of_another_day(store: Path, run: Run, dice: random.Random) -> None:
    if "floor" not in run.path.name:  # the baseline names its folder
        run.path.rename(run.path.with_name("20270101" + run.path.name[8:]))
