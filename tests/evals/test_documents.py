"""Rows that would be scored as something they are not are refused before anything is asked."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd_bench.errors import UsageError
from kd_bench.evals.documents import load_documents
from kd_bench.evals.fetch import verify
from kd_bench.registry import load_task
from tests.support.eval_world import TEN
from tests.support.golden_rows import ROWS, write_rows


def rows_of(folder: Path, task: str) -> tuple[Path, pa.Table]:
    write_rows(folder, task, ROWS[task])
    spec = load_task(task)
    (file,) = sorted((folder / task).glob(f"{spec.dataset.split}-*.parquet"))
    return file, pq.read_table(file)


def replace(table: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = table[column].to_pylist()
    values[row] = value
    place = table.column_names.index(column)
    return table.set_column(place, column, pa.array(values, table.schema.field(column).type))


@pytest.mark.parametrize("task", TEN)
def test_sound_rows_are_read(tmp_path: Path, task: str) -> None:
    rows_of(tmp_path, task)
    assert len(load_documents(load_task(task), tmp_path)) == len(ROWS[task])


@pytest.mark.parametrize(
    "task, column, value",
    [
        ("pope", "answer", None),
        ("pope", "answer", "maybe"),
        ("pope", "category", None),
        ("pope", "question_id", None),
        ("mme", "category", None),
        ("mme", "answer", " "),
        ("gqa", "question", None),
        ("gqa", "answer", ""),
        ("mmmu", "question_type", None),
        ("mmmu", "answer", None),
        ("mmbench_en", "answer", None),
        ("mmbench_cn", "A", None),
        ("scienceqa_img", "answer", None),
        ("scienceqa_img", "choices", []),
        ("vqav2", "answers", None),
        ("vqav2", "answers", []),
        ("textvqa", "answers", None),
        ("vizwiz_vqa", "answers", ["yes", None, "no"]),
        ("textvqa", "image", None),
    ],
)
def test_a_missing_value_names_file_column_and_row(
    tmp_path: Path, task: str, column: str, value: Any
) -> None:
    file, table = rows_of(tmp_path, task)
    pq.write_table(replace(table, column, 0, value), file)
    with pytest.raises(UsageError) as refused:
        load_documents(load_task(task), tmp_path)
    told = str(refused.value)
    assert str(file) in told
    assert repr(column) in told
    assert "row 0" in told
    assert verify(load_task(task), tmp_path, complete=False).problems


def test_a_column_without_any_value_is_refused(tmp_path: Path) -> None:
    file, table = rows_of(tmp_path, "gqa")
    place = table.column_names.index("answer")
    pq.write_table(table.set_column(place, "answer", pa.nulls(table.num_rows)), file)
    with pytest.raises(UsageError, match="'answer' is missing in row"):
        load_documents(load_task("gqa"), tmp_path)


@pytest.mark.parametrize("task", TEN)
def test_every_row_twice_is_refused(tmp_path: Path, task: str) -> None:
    file, table = rows_of(tmp_path, task)
    pq.write_table(pa.concat_tables([table, table]), file)
    with pytest.raises(UsageError, match=f"{table.num_rows} documents are there twice"):
        load_documents(load_task(task), tmp_path)
    assert verify(load_task(task), tmp_path, complete=False).problems


@pytest.mark.parametrize("task", ["pope", "mme", "scienceqa_img"])
def test_a_shard_that_is_there_twice_is_named(tmp_path: Path, task: str) -> None:
    file, _ = rows_of(tmp_path, task)
    copy = file.with_name(file.name.replace(".parquet", " (copy).parquet"))
    shutil.copyfile(file, copy)
    with pytest.raises(UsageError, match=r"there twice") as refused:
        load_documents(load_task(task), tmp_path)
    assert copy.name in str(refused.value)


def test_shards_must_be_of_one_set_and_all_there(tmp_path: Path) -> None:
    file, _ = rows_of(tmp_path, "pope")
    other = file.with_name("test-00001-of-00002.parquet")
    shutil.copyfile(file, other)
    with pytest.raises(UsageError, match="files of two sets"):
        load_documents(load_task("pope"), tmp_path)
    file.unlink()
    with pytest.raises(UsageError, match="lacks file 00000 of 2"):
        load_documents(load_task("pope"), tmp_path)


def test_the_same_question_about_another_picture_is_another_document(tmp_path: Path) -> None:
    file, table = rows_of(tmp_path, "scienceqa_img")
    other = replace(table, "image", 0, {"bytes": b"another picture", "path": None})
    pq.write_table(pa.concat_tables([table, other.slice(0, 1)]), file)
    documents = load_documents(load_task("scienceqa_img"), tmp_path)
    assert len(documents) == table.num_rows + 1


def test_more_documents_than_the_benchmark_has_are_refused(tmp_path: Path) -> None:
    rows_of(tmp_path, "pope")
    spec = load_task("pope").model_copy(update={"documents": 1})
    with pytest.raises(UsageError, match="the benchmark has 1"):
        load_documents(spec, tmp_path)


def test_a_torn_file_is_one_line(tmp_path: Path) -> None:
    file, _ = rows_of(tmp_path, "pope")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UsageError) as refused:
        load_documents(load_task("pope"), tmp_path)
    assert str(file) in str(refused.value)
