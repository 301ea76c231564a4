"""Sources at their size: an index that is made once, and rows that are parsed when asked for."""

import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as HFImage
from datasets import Sequence as HFSequence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kd_bench.distill import conversations as data
from kd_bench.distill.conversations import data_digest, read_conversations
from kd_bench.distill.data import Unreadable
from kd_bench.distill.recipe import DataSource, load_recipe, recipe_yaml
from kd_bench.errors import UsageError
from tests.distill.test_data import TURNS, read, written
from tests.support import tiny


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Every source counts as large, its rows come in batches of 3, JSON in pieces of 7."""
    monkeypatch.setenv("KD_BENCH_CACHE", str(tmp_path / "cache"))
    for name, value in (("SMALL", -1), ("ROWS", 3), ("CHUNK", 7)):
        monkeypatch.setattr(data, name, value)
    return tmp_path / "cache" / "training-data"


SAID = [{**TURNS[0], "value": "what colour ?"}, TURNS[1]]


def numbered(count, **more):
    return [{"id": f"r{i}", "conversations": SAID, **more} for i in range(count)]


def test_a_large_file_is_parsed_once(on_disk, tmp_path, monkeypatch):
    path = written(tmp_path, numbered(8))
    first, _ = read(path)

    def parsed_again(path):
        raise AssertionError(path)
        yield

    monkeypatch.setattr(data, "json_rows", parsed_again)
    second, _ = read(path)
    assert list(first) == list(second)
    assert [c.id for c in second] == [f"r{i}" for i in range(8)]
    assert [c.number for c in second[2:4]] == [2, 3]
    assert second.images.tolist() == [0] * 8
    assert second.characters.tolist() == [sum(len(t["value"]) for t in SAID)] * 8
    assert len(list(on_disk.glob("*.arrow"))) == 1


def test_a_changed_file_is_parsed_again(on_disk, tmp_path):
    read(written(tmp_path, numbered(8)))
    found, _ = read(written(tmp_path, numbered(9)))
    assert len(found) == 9


def test_a_torn_index_is_made_again(on_disk, tmp_path):
    path = written(tmp_path, numbered(8))
    before = list(read(path)[0])
    (index,) = on_disk.glob("*.arrow")
    index.write_bytes(index.read_bytes()[:-40])
    assert list(read(path)[0]) == before


def test_a_worker_gets_names_not_rows(on_disk, tmp_path):
    found, _ = read(written(tmp_path, numbered(2_000)))
    list(found[:3])
    sent = pickle.dumps(found)
    assert len(sent) < 30_000
    assert pickle.loads(sent)[1_999].id == "r1999"


def test_the_digest_is_kept_while_files_look_the_same(on_disk, tmp_path):
    picture = tmp_path / "a.png"
    tiny.picture("red").save(picture)
    found, _ = read(written(tmp_path, numbered(3, image="a.png")))
    first = data_digest(found)
    state = picture.stat()
    content = bytearray(picture.read_bytes())
    content[-1] ^= 1
    picture.write_bytes(bytes(content))
    os.utime(picture, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert data_digest(found) == first
    assert data_digest(found, verify=True) != first
    picture.touch()
    assert data_digest(found) != first
    assert data_digest(found[:2]) != data_digest(found)


def test_small_and_large_sources_have_one_digest(tmp_path, on_disk, monkeypatch):
    path = written(tmp_path, numbered(5))
    large = data_digest(read(path)[0])
    monkeypatch.setattr(data, "SMALL", 1 << 20)
    assert data_digest(read(path)[0]) == large


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON_VALUES, max_size=6), st.sampled_from([None, 1]), st.integers(1, 20))
@pytest.mark.slow
def test_a_list_read_in_pieces_is_the_list(values, indent, chunk):
    text = json.dumps(values, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", chunk)
        found = list(data.json_items(io.StringIO(text), Path("x.json")))
    assert [value for _, value in found] == values
    assert [json.loads(piece) for piece, _ in found] == values


@settings(max_examples=150, deadline=None)
@given(st.lists(JSON_VALUES, min_size=1, max_size=4), st.integers(0, 200), st.integers(1, 20))
@pytest.mark.slow
def test_a_damaged_list_is_refused_as_json_refuses_it(values, cut, chunk):
    text = json.dumps(values)
    text = text[: cut % len(text)] + text[cut % len(text) + 1 :]
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CHUNK", chunk)
        try:
            found = [value for _, value in data.json_items(io.StringIO(text), Path("x.json"))]
        except (ValueError, UsageError):
            found = None
    assert found == (whole if isinstance(whole, list) else None)


def test_parquet_patterns_and_folders_hold_the_same_rows(tmp_path):
    rows = [{"id": f"r{i}", "conversations": SAID} for i in range(6)]
    table = Dataset.from_list(rows)
    table.select(range(4)).to_parquet(tmp_path / "part-0.parquet")
    table.select(range(4, 6)).to_parquet(tmp_path / "part-1.parquet")
    table.save_to_disk(tmp_path / "folder")
    (tmp_path / "a-0.json").write_text(json.dumps(rows[:4]))
    (tmp_path / "a-1.json").write_text(json.dumps(rows[4:]))
    expected = [f"r{i}" for i in range(6)]
    for name in ("part-*.parquet", "folder", "a-*.json"):
        found, broken = read(tmp_path / name)
        assert [c.id for c in found] == expected
        assert not broken
    found, _ = read(tmp_path / "part-*.parquet", skip=3, limit=2)
    assert [c.id for c in found] == expected[3:5]
    with pytest.raises(UsageError, match="no training data at"):
        read(tmp_path / "b-*.json")


def test_images_inside_parquet_stay_encoded_until_they_are_needed(tmp_path):
    picture = io.BytesIO()
    tiny.picture("red").save(picture, "png")
    rows = [{"images": [{"bytes": picture.getvalue(), "path": None}],
             "texts": [{"user": "what colour ?", "assistant": "red"}]}] * 2  # fmt: skip
    features = Features(
        {
            "images": HFSequence(HFImage()),
            "texts": [{"user": Value("string"), "assistant": Value("string")}],
        }
    )
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "x.parquet")
    found, broken = read(tmp_path / "x.parquet")
    assert not broken
    assert found[1].images == (picture.getvalue(),)
    assert found.images.tolist() == [1, 1]


def test_what_is_no_parquet_and_no_hub_dataset_is_one_line(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UsageError, match="is not a parquet file"):
        read(tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="neither a file nor a dataset of the hub") as raised:
        read_conversations(DataSource(path="somebody/no-such-dataset"))
    assert "data.subset" in raised.value.hint


# --- mixtures and streams --------------------------------------------------------------------


def rows_file(folder, name, count):
    rows = [{"id": f"{name}{i}", "conversations": SAID} for i in range(count)]
    return written(folder, rows, f"{name}.json")


def test_a_mixture_meets_each_source_as_often_as_it_weighs(tmp_path):
    sources = [
        DataSource(path=str(rows_file(tmp_path, "a", 10)), weight=0.5),
        DataSource(path=str(rows_file(tmp_path, "b", 4)), weight=2.0),
        DataSource(path=str(rows_file(tmp_path, "c", 7)), skip=1, limit=5),
    ]
    found, _ = read_conversations(*sources)
    assert found.epoch_size == 5 + 8 + 5
    first, second = (Counter(found[int(i)].id for i in found.epoch(n, seed=3)) for n in (0, 1))
    for each in (first, second):
        assert sum(each.values()) == 18
        assert [each[f"b{i}"] for i in range(4)] == [2] * 4
        assert [each[f"c{i}"] for i in range(7)] == [0, 1, 1, 1, 1, 1, 0]
    assert [first[f"a{i}"] + second[f"a{i}"] for i in range(10)] == [1] * 10
    assert found.epoch(0, seed=3).tolist() != found.epoch(0, seed=4).tolist()
    half = found.select(range(2, len(found)))
    assert half.epoch_size == 4 + 8 + 5


def test_a_mixture_without_weights_is_all_rows(tmp_path):
    paths = [str(rows_file(tmp_path, name, 3)) for name in "ab"]
    mixed, _ = read_conversations(*[DataSource(path=path) for path in paths])
    joined, _ = read_conversations(DataSource(path=paths))
    assert list(mixed) == list(joined)
    assert mixed.epoch(5, seed=0).tolist() == list(range(6))


@pytest.fixture
def parquet(tmp_path):
    rows = [{"id": f"r{i}", "conversations": SAID} for i in range(23)]
    rows[4]["conversations"] = SAID[:1]
    Dataset.from_list(rows[:9]).to_parquet(tmp_path / "part-0.parquet")
    Dataset.from_list(rows[9:]).to_parquet(tmp_path / "part-1.parquet")
    return DataSource(path=str(tmp_path / "part-*.parquet"), streaming=True)


def test_a_stream_gives_any_row_by_its_number(parquet, monkeypatch):
    monkeypatch.setattr(data, "WINDOW", 4)
    found, broken = read_conversations(parquet)
    assert len(found) == 23
    assert not broken
    for index in (0, 3, 5, 22, 9, 1):
        assert found[index].id == f"r{index}"
    with pytest.raises(Unreadable, match="no answer"):
        found[4]
    assert pickle.loads(pickle.dumps(found))[10].id == "r10"
    part, _ = read_conversations(parquet.model_copy(update={"skip": 8, "limit": 5}))
    assert [each.id for each in part] == [f"r{i}" for i in range(8, 13)]
    assert data_digest(part)["sha256"] != data_digest(found)["sha256"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"path": __file__}, "cannot be streamed"),
        ({"path": ["a.parquet", "b.parquet"]}, "one source"),
        ({"path": "nowhere.parquet"}, "no training data at"),
        ({"path": "somebody/no-such-dataset"}, "neither a file nor a dataset of the hub"),
        ({"skip": 23}, "holds no conversations"),
    ],
)
def test_what_cannot_be_streamed_is_said(parquet, change, named):
    with pytest.raises(UsageError, match=named):
        read_conversations(parquet.model_copy(update=change))


def test_a_recipe_takes_one_source_or_several(tmp_path):
    one = load_recipe("mini", ["data.path=x.json"])
    assert [source.path for source in one.data_of(one.stages[-1])] == ["x.json"]
    several = load_recipe("mini", ["data=[{path: a.json, weight: 0.5}, {path: b.json}]"])
    assert [source.weight for source in several.data_of(several.stages[-1])] == [0.5, None]
    (tmp_path / "r.yaml").write_text(recipe_yaml(several))
    assert load_recipe(tmp_path / "r.yaml") == several
    for wrong, named in (
        ("data=[{path: a.json, wieght: 1}]", "weight"),
        ("data=[{path: a.json, weight: 0}]", r"data\.0\.weight"),
        ("data=[]", "has no data"),
    ):
        with pytest.raises(UsageError, match=named):
            load_recipe("mini", [wrong])


class Ids(TorchDataset):
    """Ids of rows, read where the loader reads them."""

    def __init__(self, conversations):
        self.conversations = conversations

    def __len__(self):
        return len(self.conversations)

    def __getitem__(self, index):
        return self.conversations[index].id


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 3])
def test_workers_of_a_stream_read_the_rows_that_are_asked_for(tmp_path, monkeypatch, files):
    """Neither does `datasets` share the rows out, nor do forked workers share a file's place."""
    monkeypatch.setattr(data, "WINDOW", 16)
    for number in range(files):
        rows = [{"id": f"{number}-{i}", "conversations": SAID} for i in range(120)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"part-{number}.parquet")
    found, _ = read_conversations(DataSource(path=str(tmp_path / "*.parquet"), streaming=True))
    expected = [each.id for each in found]
    assert len(set(expected)) == 120 * files
    assert found[40].id == expected[40]  # the parent has begun to read
    for workers in (0, 2, 3):
        loader = DataLoader(Ids(found), batch_size=8, num_workers=workers)
        for _ in range(2):
            assert [name for batch in loader for name in batch] == expected, workers


def test_a_pattern_of_several_kinds_cannot_be_streamed(parquet, tmp_path):
    (tmp_path / "part-2.json").write_text(json.dumps(numbered(2)))
    with pytest.raises(UsageError, match="cannot be streamed"):
        read_conversations(parquet.model_copy(update={"path": str(tmp_path / "part-*")}))


def test_a_light_source_is_met_in_every_epoch(tmp_path):
    path = rows_file(tmp_path, "a", 5)
    found, _ = read_conversations(DataSource(path=str(path), weight=0.01))
    assert found.epoch_size == 1
    met = Counter(int(i) for number in range(10) for i in found.epoch(number, seed=1))
    assert sorted(met.values()) == [2] * 5


def test_an_index_with_damage_inside_says_what_to_delete(on_disk, tmp_path):
    path = written(tmp_path, numbered(300))
    read(path)
    (index,) = on_disk.glob("*.arrow")
    content = index.read_bytes()
    middle = content.index(b'"r150"')
    index.write_bytes(content[:middle] + b"\xff" * 6 + content[middle + 6 :])
    with pytest.raises(UsageError, match=r"arrow is damaged at row 150\. Delete it"):
        read(path)[0][150]


def test_parquet_without_rows_or_with_broken_text_says_so(tmp_path):
    Dataset.from_list(numbered(1)).select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UsageError, match=r"empty\.parquet"):
        read(tmp_path / "empty.parquet")
    Dataset.from_list([{"query": "@@@@", "response": "r"}]).to_parquet(
        path := tmp_path / "x.parquet"
    )
    path.write_bytes(path.read_bytes().replace(b"@@@@", b"\xff\xfe\xff\xfe"))
    with pytest.raises(UsageError, match=r"x\.parquet.*UTF-8"):
        list(read(path)[0])


@pytest.mark.parametrize(
    "name, text",
    [
        (
            "x.json",
            '\n{"id": "a", "query": "q", "response": "r"}\n\n{"query": "q", "response": "s"}',
        ),
        (
            "x.jsonl",
            '[{"id": "a", "query": "q", "response": "r"},\n{"query": "q", "response": "s"}]',
        ),
    ],
)
def test_lists_and_lines_are_known_by_what_they_hold(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    found, broken = read(tmp_path / name)
    assert (len(found), found[0].id, broken) == (2, "a", [])


def test_numbers_at_the_edge_of_what_is_read_are_whole(monkeypatch):
    for chunk in range(1, 12):
        monkeypatch.setattr(data, "CHUNK", chunk)
        found = data.json_items(io.StringIO("[[], 1.5, -2e-3, 7]"), Path("x.json"))
        assert [value for _, value in found] == [[], 1.5, -0.002, 7]


def test_unreadable_rows_of_a_mixture_name_their_file(tmp_path):
    bad = written(tmp_path, [{"id": "x", "conversations": SAID[:1]}], "bad.json")
    sources = [DataSource(path=str(each)) for each in (rows_file(tmp_path, "a", 2), bad)]
    _, told = read_conversations(*sources)
    assert told == [("x", "no answer to learn from (bad.json) (row 0)")]
