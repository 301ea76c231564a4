"""Data sources: fetching from a hub, checking a folder, a benchmark of one's own, no network."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kd_bench.errors import UsageError
from kd_bench.evals.benchmark import prepare, preview, task_config, validate
from kd_bench.evals.fetch import fetch, verify
from kd_bench.evals.run import EvalSettings, answer_keys, ask, evaluate
from kd_bench.evals.scoring import headline
from kd_bench.registry import load_task, load_tasks, tasks_folder
from tests.evals.test_golden import Script
from tests.support.eval_world import TEN, save_talker, write_replicas
from tests.support.golden_rows import ROWS, picture, write_rows


class Hub(BaseHTTPRequestHandler):
    """The two addresses of a hub that a download uses; can break off in the middle of a file."""

    files: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    commit = "c" * 40  # the newest
    absent = "a" * 40
    break_after = -1
    served: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "api":
            repo = "/".join(parts[2:4])
            if repo not in self.files:
                self.send_error(404)
                return
            asked = parts[5] if len(parts) > 5 else "main"
            if asked == self.absent:
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            names = [{"rfilename": name} for name in self.files[repo]]
            found = self.commit if asked == "main" else asked
            body = json.dumps({"id": repo, "sha": found, "siblings": names}).encode()
            self._head(body, {})
            self.wfile.write(body)
            return
        name = "/".join(parts[5:])
        body = self.files["/".join(parts[1:3])][name]
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        self._head(body[start:], {"ETag": f'"{hash(body) & 0xFFFFFFFF:x}"'}, 206 if start else 200)
        type(self).served.append(f"{name}@{start}")
        if 0 <= self.break_after < len(body) - start:
            self.wfile.write(body[start : start + self.break_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(body[start:])

    def do_HEAD(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        body = self.files["/".join(parts[1:3])]["/".join(parts[5:])]
        self._head(body, {"ETag": f'"{hash(body) & 0xFFFFFFFF:x}"'})

    def _head(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Accept-Ranges", "bytes")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    write_rows(tmp_path / "origin", "pope", ROWS["pope"])
    write_rows(
        tmp_path / "origin",
        "gqa",
        [{key: value for key, value in ROWS["gqa"][0].items() if key != "image"}],
    )
    images = tmp_path / "origin" / "gqa_images" / "testdev-00000-of-00001.parquet"
    write_rows(tmp_path / "scratch", "gqa", [{"id": "n161313", "image": picture(3)}])
    images.parent.mkdir()
    (tmp_path / "scratch" / "gqa" / images.name).rename(images)
    origin = tmp_path / "origin"
    Hub.files = {
        "lmms-lab-encoder/POPE": {
            "README.md": b"#",
            "data/test-00000-of-00001.parquet": next(origin.glob("pope/*")).read_bytes(),
            "Full/adversarial-00000-of-00001.parquet": b"other",
        },
        "lmms-lab-encoder/GQA": {
            "testdev_balanced_instructions/testdev-00000-of-00001.parquet": next(
                origin.glob("gqa/*")
            ).read_bytes(),
            "testdev_balanced_images/testdev-00000-of-00001.parquet": images.read_bytes(),
        },
    }
    Hub.break_after, Hub.served = -1, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


FETCH = """
import sys
from pathlib import Path
from kd_bench.errors import KdBenchError
from kd_bench.evals.fetch import fetch
from kd_bench.registry import load_task
try:
    specs = [load_task(name) for name in sys.argv[3:]]
    if sys.argv[2] != "pinned":
        change = {"revision": sys.argv[2] or None}
        sources = [spec.dataset.model_copy(update=change) for spec in specs]
        specs = [s.model_copy(update={"dataset": d}) for s, d in zip(specs, sources)]
    fetch(specs, Path(sys.argv[1]), report=print)
except KdBenchError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


def fetched(
    hub: str, folder: Path, *tasks: str, revision: str = "pinned"
) -> subprocess.CompletedProcess[str]:
    """`fetch` in a process of its own, at the registry's revision or at the given one."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {
        **clean,
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run(
        [sys.executable, "-c", FETCH, str(folder), revision, *tasks],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_fetched_files_are_locked_and_verified(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    told = fetched(hub, folder, "pope", "gqa")
    assert told.returncode == 0, told.stdout + told.stderr
    lock = json.loads((folder / "lock.json").read_text())
    pope, gqa = (load_task(task).dataset.revision for task in ("pope", "gqa"))
    assert {name: entry["revision"] for name, entry in lock.items()} == {
        "pope": pope, "gqa": gqa, "gqa_images": gqa,
    }  # fmt: skip
    assert f"pope: lmms-lab-encoder/POPE at {pope}, the pinned revision\n" in told.stdout
    for task, rows in (("pope", 6), ("gqa", 1)):
        found = verify(load_task(task), folder, complete=False)
        assert (found.documents, found.images, found.problems) == (rows, 1, [])
        assert found.revision == load_task(task).dataset.revision
    (problem,) = verify(load_task("pope"), folder).problems
    assert problem == "pope: 6 documents, 9000 expected"
    Hub.served.clear()
    again = fetched(hub, folder, "pope", "gqa")
    assert again.returncode == 0
    assert Hub.served == []
    file = next((folder / "pope").glob("*.parquet"))
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 4), file)
    problems = verify(load_task("pope"), folder, complete=False).problems
    assert problems == [f"pope: {file} is not the file that was fetched"]
    assert fetched(hub, folder, "pope").returncode == 0
    assert verify(load_task("pope"), folder, complete=False).problems == []


@pytest.mark.slow
def test_without_a_pin_the_newest_is_taken_and_kept(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    told = fetched(hub, folder, "pope", revision="")
    newest = "c" * 40
    assert f"at {newest}, the newest: none is pinned, lock.json keeps it\n" in told.stdout
    spec = load_task("pope")
    unpinned = spec.model_copy(
        update={"dataset": spec.dataset.model_copy(update={"revision": None})}
    )
    found = verify(unpinned, folder, complete=False)
    assert (found.revision, found.problems) == (newest, [])
    Hub.commit = "d" * 40
    try:
        again = fetched(hub, folder, "pope", revision="")
    finally:
        Hub.commit = newest
    assert f"at {newest}, as lock.json says\n" in again.stdout
    (problem,) = verify(spec, folder, complete=False).problems
    pinned = spec.dataset.revision
    assert problem == f"pope: {folder / 'pope'} is of revision {newest}, pinned is {pinned}"


@pytest.mark.slow
def test_another_revision_replaces_files_of_other_names(hub: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    assert fetched(hub, folder, "pope", revision="").returncode == 0
    files = Hub.files["lmms-lab-encoder/POPE"]
    files["data/test-00000-of-00001-b.parquet"] = files.pop("data/test-00000-of-00001.parquet")
    assert fetched(hub, folder, "pope").returncode == 0
    assert [path.name for path in folder.glob("pope/*")] == ["test-00000-of-00001-b.parquet"]
    assert verify(load_task("pope"), folder, complete=False).documents == 6


def test_a_revision_that_is_not_there_is_one_line(hub: str, tmp_path: Path) -> None:
    told = fetched(hub, tmp_path / "data", "pope", revision=Hub.absent)
    assert told.returncode == 2
    assert told.stdout == (
        f"pope: lmms-lab-encoder/POPE has no revision {Hub.absent}. Correct `revision` in its YAML;"
        " without one the newest is taken and kept.\n"
    )


@pytest.mark.slow
def test_a_download_that_broke_off_goes_on(hub: str, tmp_path: Path) -> None:
    # Large enough that the hub's client, which writes pieces of 10 MB, has kept one.
    Hub.files["lmms-lab-encoder/POPE"]["data/test-00000-of-00001.parquet"] += bytes(30_000_000)
    Hub.break_after = 14_000_000
    told = fetched(hub, tmp_path / "data", "pope")
    if told.returncode:
        assert "goes on where it stopped" in told.stdout
        Hub.break_after = -1
        assert fetched(hub, tmp_path / "data", "pope").returncode == 0
    assert any(not entry.endswith("@0") for entry in Hub.served), Hub.served
    file = next((tmp_path / "data" / "pope").glob("*.parquet"))
    expected = Hub.files["lmms-lab-encoder/POPE"]["data/test-00000-of-00001.parquet"]
    assert file.read_bytes() == expected


@pytest.mark.slow
def test_a_hub_that_is_away_or_has_moved_is_one_line(hub: str, tmp_path: Path) -> None:
    told = fetched(hub, tmp_path / "data", "mme")
    assert told.returncode == 5
    assert told.stdout.startswith("mme: lmms-lab-encoder/MME cannot be listed:")
    assert told.stdout.count("\n") == 1
    Hub.files["lmms-lab-encoder/MME"] = {"data/train-00000-of-00001.parquet": b""}
    told = fetched(hub, tmp_path / "data", "mme")
    assert told.returncode == 2
    assert "has no data/test-*.parquet" in told.stdout


def test_offline_refuses_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        fetch([load_task("pope")], tmp_path)


def test_verify_finds_pictures_that_do_not_decode(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS["pope"]]
    rows[2]["image"] = {"bytes": rows[2]["image"]["bytes"][:50], "path": None}
    folder = write_rows(tmp_path, "pope", rows)
    (problem,) = verify(load_task("pope"), folder, complete=False).problems
    assert problem.startswith("pope: document 2, image: the image cannot be decoded")
    (problem,) = verify(load_task("gqa"), folder, complete=False).problems
    assert "has no gqa/testdev-*.parquet" in problem


def test_every_entry_fits_upstream() -> None:
    for spec in load_tasks():
        assert validate(spec) == []
        for profile in spec.profiles.values():
            config = task_config(profile.upstream or spec.upstream)
            source = (config["dataset_path"], config.get("dataset_name"))
            assert source == (spec.dataset.repo, spec.dataset.config)
            assert re.fullmatch("[0-9a-f]{40}", spec.dataset.revision or "")
    spec = load_task("gqa")
    problem, *_ = validate(spec.model_copy(update={"metric": "exact_mach"}))  # one a profile
    assert problem.endswith("not exact_mach. Did you mean 'exact_match'?")
    problem, *_ = validate(spec.model_copy(update={"upstream": "gqa_2"}))
    assert "has no task 'gqa_2'" in problem


def test_a_preview_shows_prompt_and_pictures(tmp_path: Path) -> None:
    write_rows(tmp_path, "mmmu", ROWS["mmmu"])
    prepared, index, images = preview(load_task("mmmu"), tmp_path, tmp_path / "pictures")
    assert prepared.prompts[index].startswith("Which is larger, <image> or <image>?")
    assert [path.name for path in images] == ["mmmu-0-1.png", "mmmu-0-2.png"]
    assert all(path.is_file() for path in images)


def test_an_eleventh_benchmark_is_one_file(tmp_path: Path) -> None:
    """The example in the registry's README, on rows of its own."""
    name = str(tasks_folder() / "examples" / "chartqa.yaml")
    spec = load_task(name)
    assert validate(spec) == []
    rows = [
        {"image": picture(9), "question": f"How many in {year}?", "answer": "40", "type": kind}
        for year, kind in ((2001, "human_test"), (2002, "augmented_test"))
    ]
    write_rows(tmp_path, "chartqa", rows, "test")
    checkpoint = save_talker(tmp_path / "model")
    settings = EvalSettings(
        tasks=[name],
        data=tmp_path,
        results=tmp_path / "results",
        progress=False,
        truncated_limit=1.0,
    )
    run = evaluate(checkpoint, settings)
    assert run.manifest.status == "complete", run.manifest.notes
    result = run.result("chartqa")
    assert result.metric == "relaxed_overall"
    assert set(result.metrics) == {
        "relaxed_overall", "relaxed_human_split", "relaxed_augmented_split", "kd_bench_content",
    }  # fmt: skip
    assert run.samples("chartqa")["category"].tolist() == ["human_test", "augmented_test"]
    assert run.samples("chartqa")["unit_id"].nunique() == 1


AI2D = """
id: ai2d
title: "AI2D: questions about school science diagrams"
short: AI2D
skill: domain
upstream: ai2d
dataset: {repo: lmms-lab-encoder/ai2d, split: test}
documents: 3088
columns: {image: image, question: text, options: texts, answer: text}
unit: picture
answer: letter
generation: {max_new_tokens: 16, until: ["\\n\\n"]}
metric: exact_match
scale: 100.0
aggregator: mean
profiles:
  upstream: {title: "the letter, alone or with a full stop"}
published: {column: ai2d, verdict: near, why: "not one of the paper's ten"}
citation: "Kembhavi et al., ECCV 2016, arXiv 1603.07396"
licence: "see the data set's card"
"""


def added(name: str, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """An eleventh benchmark's file and rows of its own."""
    if name == "chartqa":
        told = ["40", "45", "A lot", "10%"]
        rows = [
            {"image": picture(9), "question": "How many?", "answer": answer, "type": "human_test"}
            for answer in told
        ]
        return str(tasks_folder() / "examples" / "chartqa.yaml"), rows
    file = folder / "ai2d.yaml"
    file.write_text(AI2D, encoding="utf-8")
    rows = [
        {"image": picture(9), "question": f"Which eats {food}?",
         "options": ["owl", "hare", "fox"], "answer": "1"}
        for food in ("grass", "clover", "bark", "roots")
    ]  # fmt: skip
    return str(file), rows


@pytest.mark.parametrize(
    "name,answers,scores",
    [
        # within five per cent of 40, more than that off 45, another word, the same share
        ("chartqa", ["41.9", "50", "a few", "0.1"], [1, 0, 0, 1]),
        # alone, with a full stop and more, in words, another letter
        ("ai2d", ["B", "B. hare", "hare", "C"], [1, 1, 0, 0]),
    ],
)
def test_an_added_benchmark_is_scored_as_upstream_does(
    name: str, answers: list[str], scores: list[float], tmp_path: Path
) -> None:
    path, rows = added(name, tmp_path)
    spec = load_task(path)
    assert validate(spec) == []
    write_rows(tmp_path, name, rows, "test")
    prepared = prepare(spec, tmp_path)
    asked = ask(prepared, Script(answers), answer_keys(prepared, "script"))
    assert asked is not None
    assert asked.samples["score"].tolist() == scores
    assert headline(prepared, asked.samples) == 50 == 100 * asked.metrics[spec.metric]


@pytest.mark.slow
def test_evaluating_local_data_uses_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_replicas(tmp_path / "data")
    checkpoint = save_talker(tmp_path / "model")
    asked: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            asked.append(address)
            raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a) or [])
    settings = EvalSettings(
        tasks=[task for task in TEN if task != "mmbench_en"],
        data=data, limit=4, results=tmp_path / "results", progress=False, truncated_limit=1.0,
    )  # fmt: skip
    run = evaluate(checkpoint, settings)
    assert run.manifest.status == "complete", run.manifest.notes
    assert asked == []
