"""What comes in from outside, and what a stopped training goes on from, damaged."""

import json
import shutil
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from kd_bench.errors import KdBenchError, UsageError
from kd_bench.evals.documents import load_documents
from kd_bench.evals.importing import import_results
from kd_bench.registry import load_task
from tests.faults import fault
from tests.support.eval_world import TEN
from tests.support.golden_rows import ROWS, write_rows

# --- evaluation data ------------------------------------------------------------------------------


@lru_cache
def scored_columns() -> list[tuple[str, str]]:
    """Benchmark and column, wherever a missing value would be asked or scored as something."""
    specs = [load_task(task) for task in TEN]
    return [(s.id, column) for s in specs for column in s.columns if column not in s.nullable]


def rows_of(folder: Path, task: str) -> tuple[Path, pa.Table]:
    write_rows(folder, task, ROWS[task])
    (file,) = (folder / task).glob("*.parquet")
    return file, pq.read_table(file)


@fault("evaluation data: missing values", tries=len(scored_columns()))
def a_value_is_missing(folder: Path, number: int) -> None:
    task, column = scored_columns()[number]
    file, table = rows_of(folder, task)
    values = table[column].to_pylist()
    values[number % len(values)] = None
    place = table.column_names.index(column)
    damaged = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
    pq.write_table(damaged, file)
    with pytest.raises(UsageError, match=f"{column!r} is missing in row"):
        load_documents(load_task(task), folder)


@fault("evaluation data: documents twice", tries=2 * len(TEN))
def documents_are_there_twice(folder: Path, number: int) -> None:
    task = TEN[number // 2]
    file, table = rows_of(folder, task)
    if number % 2:
        pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), file)
    else:
        shutil.copyfile(file, file.with_name(file.name.replace(".parquet", "-again.parquet")))
    with pytest.raises(UsageError, match="there twice"):
        load_documents(load_task(task), folder)


# --- imports --------------------------------------------------------------------------------------


@fault("imports: bits flipped", tries=600)
def a_flipped_bit_in_what_is_imported(folder: Path, number: int) -> None:
    outcome = {
        "results": {"textvqa_val": {"exact_match,none": 0.75}},
        "config": {"model": "llava_hf", "model_args": "pretrained=org/kl"},
        "n-samples": {"textvqa_val": {"original": 4, "effective": 4}},
    }
    lines = (
        {"doc_id": key, "input": f"q{key}", "target": "a", "filtered_resps": [said],
         "exact_match": float(said == "a")} for key, said in enumerate("abaa")
    )  # fmt: skip
    results, log = folder / "t_results.json", folder / "t_samples_textvqa_val.jsonl"
    results.write_text(json.dumps(outcome), encoding="utf-8")
    log.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    path = (results, log)[number % 2]
    data = bytearray(path.read_bytes())
    place = (number * 7919) % (8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    try:
        (run,) = import_results(folder, folder / "store")
    except KdBenchError:
        assert not (folder / "store").exists()
        return
    assert abs(run.result("textvqa").score - 75) <= 0.01


# --- training -------------------------------------------------------------------------------------


@lru_cache
def stopped_training() -> Path:
    """A stage's folder with two checkpoints, as an interrupted training leaves it."""
    import tempfile

    from kd_bench.distill.recipe import load_recipe
    from kd_bench.distill.train import train
    from kd_bench.distill.trainer import DistillationTrainer
    from tests.support import tiny

    def step(self: object, *arguments: object, **named: object) -> object:
        if self.state.global_step == 10:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return before(self, *arguments, **named)

    folder = Path(tempfile.mkdtemp(prefix="kd-bench-fault-training-"))
    recipe = load_recipe(tiny.write_recipe(folder))
    before = DistillationTrainer.training_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    (stage,) = (folder / "out" / "stages").iterdir()
    return stage


@fault("training: checkpoints damaged", tries=240)
def a_checkpoint_is_damaged(folder: Path, number: int) -> None:
    from kd_bench.distill.trainer import last_checkpoint

    stage = folder / "stage"
    shutil.copytree(stopped_training(), stage)
    files = sorted(p for p in (stage / "checkpoint-8").rglob("*") if p.is_file())
    path = files[number // 4 % len(files)]
    data = bytearray(path.read_bytes())
    if number % 4 == 0 and path.name != "digests.json":
        path.unlink()
    elif number % 4 == 1 or not data:
        path.write_bytes(data[: len(data) // 2])
    else:
        place = (number * 7919) % (8 * len(data))
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
    told: list[str] = []
    found = last_checkpoint(stage, told.append)
    assert found is not None
    # Of the list of digests itself, a flipped bit may leave what it says as it was.
    assert found.name == "checkpoint-4" or path.name == "digests.json"
    if found.name == "checkpoint-4":
        assert len(told) == 1
        assert path.name in told[0] or path.name == "digests.json"


@fault("teacher cache: bits flipped", tries=500)
def a_flipped_bit_in_the_teacher_cache(folder: Path, number: int) -> None:
    from kd_bench.distill.teacher_states import TeacherCache

    counts = (3, 1, 4)
    kept = torch.arange(64, dtype=torch.float32).reshape(8, 8)
    TeacherCache(folder, 8, torch.float32).put((5, 6, 7), counts, kept)
    path = sorted(folder.glob("*.bin"))[number % 2]
    data = bytearray(path.read_bytes())
    place = (number * 7919) % (8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    cache = TeacherCache(folder, 8, torch.float32)
    for sample, count, part in zip((5, 6, 7), counts, kept.split(counts), strict=True):
        found = cache.get((sample,), (count,))
        assert found is None or torch.equal(found, part)
    cache.put((5, 6, 7), counts, kept)
    again = TeacherCache(folder, 8, torch.float32).get((5, 6, 7), counts)
    assert again is not None
    assert torch.equal(again, kept)
