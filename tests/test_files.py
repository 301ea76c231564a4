"""Atomic writes, journals with torn tails and flipped bits, digests."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_bench.errors import UsageError
from kd_bench.files import (
    Journal,
    atomic_folder,
    atomic_path,
    digest_files,
    digest_text,
    locked,
    read_json,
    write_json,
    write_text,
)

# --- atomic writes -----------------------------------------------------------------------------


def test_a_block_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_a_reader_sees_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_a_block_that_writes_nothing_makes_an_empty_file(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_bytes() == b""


def test_a_block_that_removes_its_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def removes() -> None:
        with atomic_path(path) as temporary:
            temporary.unlink()

    with pytest.raises(FileNotFoundError):
        removes()
    assert path.read_text() == "old"


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "x")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
        assert os.umask(mask) == mask  # writing did not change it
    finally:
        os.umask(before)


def test_text_is_utf8_with_plain_line_ends_in_any_locale(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "é\n中\n")
    assert path.read_bytes() == "é\n中\n".encode()


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    (tmp_path / "deep" / ".model.saving").mkdir(parents=True)
    (tmp_path / "deep" / ".model.saving" / "half").write_text("of a killed process")
    for text in ("old", "new"):
        with atomic_folder(folder) as aside:
            (aside / "in").mkdir()
            (aside / "in" / "weights").write_text(text)
            assert folder.exists() == (text == "new")
        assert (folder / "in" / "weights").read_text() == text

    def half() -> None:
        with atomic_folder(folder) as aside:
            (aside / "weights").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert [each.name for each in folder.iterdir()] == ["in"]
    assert [each.name for each in folder.parent.iterdir()] == ["model"]


def test_a_lock_is_one_process_s_and_says_whose_way_it_stands_in(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run.lock"
    with (
        locked(path, "Busy.", "Wait."),
        pytest.raises(UsageError, match=r"^Busy\. Wait\.$"),
        locked(path, "Busy.", "Wait."),
    ):
        pass
    with locked(path, "Busy.", "Wait."):
        pass


@pytest.mark.slow
def test_a_lock_stays_one_where_lmms_eval_has_changed_filelock(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom lmms_eval import evaluator\n"
        "evaluator._enable_reentrant_filelocks()\nfrom kd_bench.files import locked\n"
        "with locked(Path(sys.argv[1]), 'Busy.', 'Wait.'):\n"
        "    with locked(Path(sys.argv[1]), 'Busy.', 'Wait.'):\n        print('twice')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run.lock")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Busy. Wait." in done.stderr
    assert "twice" not in done.stdout


@pytest.mark.slow
def test_killed_writers_never_leave_half_a_file(tmp_path: Path) -> None:
    """SIGKILL at many moments: the reader meets one whole version or another."""
    path = tmp_path / "file.json"
    write_json(path, {"n": 0, "text": "x" * 100_000})
    code = (
        "import sys, itertools\nfrom pathlib import Path\n"
        "from kd_bench.files import write_json\n"
        "print('go', flush=True)\n"
        "for n in itertools.count(1):\n"
        "    write_json(Path(sys.argv[1]), {'n': n, 'text': chr(97 + n % 26) * 100_000})\n"
    )
    for wait in range(8):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        try:
            process.wait(timeout=0.01 + 0.007 * wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        process.stdout.close()
        value = read_json(path)
        assert len(set(value["text"])) == 1
        assert len(value["text"]) == 100_000


# --- JSON ------------------------------------------------------------------------------------


def test_json_round_trips_in_order(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": "é\u2028"}
    write_json(tmp_path / "x.json", value)
    assert list(read_json(tmp_path / "x.json").items()) == list(value.items())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": 1} trailing'])
def test_what_is_not_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.json is not valid JSON"):
        read_json(path)


def test_a_missing_json_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")


def test_json_that_nests_too_deep_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(ValueError, match=r"deep\.json is not valid JSON"):
        read_json(path)


def test_text_with_a_lone_surrogate_can_be_written(tmp_path: Path) -> None:
    """A model may produce one; JSON escapes it instead of failing."""
    write_json(tmp_path / "x.json", {"answer": "\ud800"})
    assert read_json(tmp_path / "x.json") == {"answer": "\ud800"}


# --- digests ---------------------------------------------------------------------------------


@settings(max_examples=200)
@given(one=st.lists(st.text(), max_size=4), other=st.lists(st.text(), max_size=4))
def test_text_digests_are_equal_exactly_when_the_parts_are(
    one: list[str], other: list[str]
) -> None:
    assert (digest_text(*one) == digest_text(*other)) == (one == other)


def test_a_digest_is_pinned() -> None:
    """Run ids and seeds hang on it: a change would orphan every stored run."""
    expected = "9a8acca1b6c6c0befd3fbc756aed625da998c998f7252e738c4ef061906b9b21"
    assert digest_text("a", "bc") == expected


def test_file_digests_see_names_and_contents_not_order_or_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a").write_text("1")
        (tmp_path / folder / "b").write_text("2")
    paths = [tmp_path / "one" / "a", tmp_path / "one" / "b"]
    same = digest_files(paths)
    assert digest_files(reversed(paths)) == same
    assert digest_files((tmp_path / "two").iterdir()) == same
    (tmp_path / "two" / "b").write_text("3")
    assert digest_files((tmp_path / "two").iterdir()) != same
    (tmp_path / "one" / "b").rename(tmp_path / "one" / "c")
    assert digest_files((tmp_path / "one").iterdir()) != same


# --- the journal -----------------------------------------------------------------------------

RECORDS = st.lists(
    st.dictionaries(
        st.text(max_size=5),
        st.one_of(st.text(), st.integers(-(2**53), 2**53), st.floats(allow_nan=False), st.none()),
        max_size=4,
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(records=RECORDS)
def test_whatever_is_appended_is_read(
    records: list[dict[str, object]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal") / "task.jsonl")
    for record in records:
        journal.append([record])
    assert journal.read() == records
    assert journal.damaged == 0


def test_nothing_yet(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "task.jsonl")
    assert journal.read() == []
    journal.append([])
    journal.append([{"key": "a"}])
    assert journal.read() == [{"key": "a"}]


def torn(tmp_path: Path, cut: int) -> tuple[Journal, list[dict[str, object]]]:
    journal = Journal(tmp_path / "task.jsonl")
    records: list[dict[str, object]] = [{"key": f"k{n}", "text": "é\u2028" * n} for n in range(4)]
    journal.append(records)
    data = journal.path.read_bytes()
    journal.path.write_bytes(data[: len(data) - cut])
    return journal, records


def test_a_torn_tail_at_every_byte_costs_the_last_record_only(tmp_path: Path) -> None:
    _, records = torn(tmp_path, 0)
    last = len((tmp_path / "task.jsonl").read_bytes().splitlines()[-1])
    for cut in range(1, last + 1):
        journal, _ = torn_again(tmp_path, cut)
        assert journal.read() == records[:3], cut
        assert journal.damaged == 0
        journal.append([{"key": "new"}])
        assert journal.read() == [*records[:3], {"key": "new"}]


def torn_again(tmp_path: Path, cut: int) -> tuple[Journal, list[dict[str, object]]]:
    (tmp_path / "task.jsonl").unlink()
    return torn(tmp_path, cut)


def test_a_torn_tail_does_not_swallow_the_next_record_without_a_read(tmp_path: Path) -> None:
    """A process that appends without reading first must not glue its record to the torn line."""
    journal, records = torn(tmp_path, 5)
    Journal(journal.path).append([{"key": "new"}])
    assert Journal(journal.path).read() == [*records[:3], {"key": "new"}]


def test_any_flipped_bit_costs_at_most_two_records_and_is_counted(tmp_path: Path) -> None:
    journal, records = torn(tmp_path, 0)
    data = journal.path.read_bytes()
    for place in range(len(data)):
        for bit in (place % 8, 7):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            journal.path.write_bytes(bytes(changed))
            found = journal.read()
            assert all(record in records for record in found), (place, bit)
            assert len(found) >= 2
            lost_tail = len(journal.path.read_bytes()) < len(data)
            assert journal.damaged >= 1 or lost_tail


@settings(max_examples=200)
@given(junk=st.binary(max_size=60))
def test_junk_in_the_middle_is_skipped(
    junk: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal") / "task.jsonl")
    journal.append([{"key": "a"}])
    with journal.path.open("ab") as stream:
        stream.write(junk.replace(b"\n", b" ") + b"\n")
    journal.append([{"key": "b"}])
    assert journal.read() == [{"key": "a"}, {"key": "b"}]


def test_a_line_with_a_right_checksum_but_no_record_is_damage(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "task.jsonl")
    journal.append([["not", "a", "mapping"]])  # type: ignore[list-item]
    assert journal.read() == []
    assert journal.damaged == 1


def test_records_are_on_disk_when_append_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "task.jsonl")
    journal.append([{"key": "a"}])
    lines = journal.path.read_bytes().splitlines()
    assert json.loads(lines[0])["record"] == {"key": "a"}


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):  # the second leads to nothing yet
        target = tmp_path / "there" / name
        if name == "old":
            target.write_text("before", encoding="utf-8")
        link = tmp_path / f"link-{name}"
        link.symlink_to(target)
        write_text(link, "after")
        assert link.is_symlink()
        assert target.read_text(encoding="utf-8") == "after"


def test_a_pipe_is_written_into_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "link").symlink_to(pipe)
    for path in (pipe, tmp_path / "link"):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            write_text(path, "verdict")
            assert os.read(reader, 100) == b"verdict"
        finally:
            os.close(reader)
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]
