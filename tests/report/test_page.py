"""The page: whole, equal for equal stores, safe for what models say, sensible for odd stores."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from kd_bench.report import render_report
from kd_bench.report.history import render_training
from kd_bench.report.page import run_facts
from tests.report.test_relations import TWO, formed
from tests.support.report_store import (
    TASKS,
    Model,
    add_run,
    add_training,
    make_demo,
    printed,
    samples,
    with_content,
    with_status,
)

ATTACK = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
VOID = {"meta", "input", "img", "br", "link"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_demo(tmp_path_factory.mktemp("demo"), units=6, seeds=(0, 1))


@pytest.fixture(scope="module")
def report(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(demo, tmp_path_factory.mktemp("report")).parent


def text_of(folder: Path) -> str:
    return (folder / "index.html").read_text(encoding="utf-8")


def embedded(page: str) -> dict:  # type: ignore[type-arg]
    found = re.search(r'id="samples-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found.group(1))


class Checker(HTMLParser):
    """Fails on tags that do not nest; collects ids, tags and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                self.addresses.append(value or "")
            assert not name.startswith("on"), f"{tag} has {name}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    return checker


@pytest.mark.slow
def test_the_page_is_whole_and_loads_nothing(report: Path) -> None:
    page = text_of(report)
    checker = check(page)
    assert len(checker.ids) == len(set(checker.ids))
    for address in checker.addresses:
        local = address.startswith("#") or (report / address).exists()
        assert local, f"{address} is not inside the report"
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy.group(1)
    assert "http" not in policy.group(1)
    assert not re.search(r"url\((?!#)", page.split("</style>", 1)[1])
    targets = {address[1:] for address in checker.addresses if address.startswith("#")}
    assert targets <= set(checker.ids)


def test_every_section_and_plot_is_there(report: Path) -> None:
    page = text_of(report)
    for section in ("leaderboard", "skills", "differences", "cost", "training", "calibration",
                    "samples", "published", "runs", "files"):  # fmt: skip
        assert f'<section id="{section}"' in page
    plots = {path.stem for path in (report / "plots").glob("*.svg")}
    assert plots == {
        "radar", "bars", "forest", "retention", "gaps", "pareto", "reliability", "losses", "knees",
    }  # fmt: skip
    for path in (report / "plots").glob("*.svg"):
        ElementTree.parse(path)
    assert "Embedded mini world: not the real benchmarks" in page


def test_form_gap_and_sight_stand_beside_the_leaderboard(tmp_path: Path) -> None:
    results, hostile = formed(tmp_path / "results"), ATTACK.replace("/", "")
    model = Model(hostile, "student", "", 0.2)
    frames = {task: with_content(samples(task, model), 0.5) for task in TWO}
    add_run(results, model, tasks=TWO, change=frames)
    folder = render_report(results, tmp_path / "report").parent
    page = text_of(folder)
    check(page)
    section = page.split('<section id="form"')[1].split("</section>")[0]
    assert "Sight: score − score with blank images" in section
    assert section.count("<table>") == 2  # each model's own, and folded away what is between them
    assert "&lt;img src=x onerror=alert(1)&gt;" in section
    assert "<img" not in section
    with (folder / "gaps.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["section"].split(":")[0] for row in rows} >= {"Form gap", "Sight", "Δ SFT, sight"}
    sight = next(r for r in rows if r["section"].startswith("Sight") and r["model"] == "kd")
    assert float(sight["gqa_low"]) < float(sight["gqa"]) < float(sight["gqa_high"])
    for name in ("gaps.md", "gaps.tex", "gaps.json"):
        assert (folder / name).stat().st_size > 500
    # The leaderboard's own numbers are upstream's: they know nothing of content.
    assert "content" not in (folder / "leaderboard.csv").read_text(encoding="utf-8")


@pytest.mark.slow
def test_two_renderings_are_equal_byte_for_byte(demo: Path, report: Path, tmp_path: Path) -> None:
    """In another process with another hash seed, time zone and locale, over an older report."""
    again = Path(shutil.copytree(report, tmp_path / "again"))
    for name in ("index.html", "leaderboard.md", "plots/radar.svg"):
        (again / name).write_text("older")
    code = "import sys; from pathlib import Path; from kd_bench.report import render_report; " \
           "render_report(Path(sys.argv[1]), Path(sys.argv[2]))"  # fmt: skip
    environment = {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C", "PATH": "/usr/bin"}
    subprocess.run(
        [sys.executable, "-c", code, str(demo), str(again)], check=True, env=environment,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    files = sorted(path.relative_to(report) for path in report.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for file in files:
        assert (report / file).read_bytes() == (again / file).read_bytes(), file


def test_the_page_is_light_and_keeps_its_samples(report: Path) -> None:
    page = text_of(report)
    assert len(page.encode()) < 5_000_000
    data = embedded(page)
    assert len(data["tasks"]) == 10
    assert len(data["images"]) > 20
    assert all(uri.startswith("data:image/") for uri in data["images"].values())
    models = len(data["models"])
    assert all(len(s["a"]) == len(s["s"]) == len(s["z"]) == models for s in data["samples"])


def test_counts_of_changes_are_over_all_samples(demo: Path, report: Path) -> None:
    from kd_bench.store import list_runs

    data = embedded(text_of(report))
    runs = {run.path.name: run for run in list_runs(demo)}
    a, b = data["pair"]
    first, second = (runs[data["models"][i]["key"]] for i in (a, b))
    for task in data["tasks"]:
        old, new = first.samples(task["id"])["score"], second.samples(task["id"])["score"]
        assert task["better"][a][b] == int((new > old).sum())
        assert task["better"][b][a] == int((new < old).sum())
        assert task["documents"] == len(old)


def test_all_samples_lie_beside_the_page(report: Path) -> None:
    frame = pd.read_parquet(report / "samples.parquet")
    assert frame["model"].nunique() == 13
    assert set(frame["task"]) == set(TASKS)


def test_what_models_say_stays_text(tmp_path: Path) -> None:
    model = Model(ATTACK, "kd", ATTACK, 0.2, 0)
    frame = samples("gqa", model, 5)
    for column in ("document_id", "category", "question", "target", "answer", "parsed"):
        frame[column] = [f"{ATTACK}{row}" for row in range(len(frame))]
    frame["image_digest"] = "../../../etc/passwd"
    frame["unit_id"] = ATTACK
    run = add_run(tmp_path, replace(model, name="x"), tasks=("gqa",), change={"gqa": frame})
    manifest = run.manifest
    run.write_manifest(
        replace(
            manifest,
            status="partial",
            notes=[ATTACK],
            model=replace(manifest.model, name=ATTACK, architecture=ATTACK),
            provenance={ATTACK: {"command": [ATTACK, "`rm`"]}},
            protocol=replace(manifest.protocol, suite=ATTACK, engine=ATTACK),
        )
    )
    page = text_of(render_report(tmp_path, tmp_path / "out").parent)
    checker = check(page)
    assert "img" not in checker.tags
    assert checker.tags.count("script") == 2  # the page's own, and the data
    assert embedded(page)["samples"][0]["q"].startswith("<img src=x")
    assert embedded(page)["samples"][0]["i"] == ""
    for path in (tmp_path / "out" / "plots").glob("*.svg"):
        ElementTree.parse(path)
        assert "<img" not in path.read_text(encoding="utf-8")


def test_an_empty_store(tmp_path: Path) -> None:
    page = text_of(render_report(tmp_path, tmp_path / "out").parent)
    check(page)
    assert "No runs yet" in page
    assert "kd-bench eval CHECKPOINT" in page
    assert "Summary" in printed(tmp_path)


def test_one_model(tmp_path: Path) -> None:
    add_run(tmp_path, Model("alone", "student", "", 0.5), units=4)
    page = text_of(render_report(tmp_path, tmp_path / "out").parent)
    check(page)
    assert "1 model on 10 benchmarks" in page
    assert "Difference from SFT" not in page


def test_missing_benchmarks_and_nan(tmp_path: Path) -> None:
    add_run(tmp_path, Model("t", "teacher", "", 1.0), tasks=("gqa", "pope"), units=5)
    run = add_run(tmp_path, Model("s", "sft", "sft", 0.0, 0), tasks=("vqav2", "mme"), units=5)
    frame = run.samples("vqav2").assign(score=np.nan)
    hidden = replace(run.result("vqav2"), score=float("nan"), interval=None, profile="test-dev")
    run.commit(hidden, frame)
    with_status(run, "unhealthy")
    page = text_of(render_report(tmp_path, tmp_path / "out").parent)
    check(page)
    shown = page[page.index("<main") : page.index("<footer")]
    assert not re.search(r"\bnan\b", shown, re.IGNORECASE)
    assert "unhealthy" in page
    json.loads((tmp_path / "out" / "leaderboard.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_names_in_every_script(tmp_path: Path) -> None:
    names = ["תלמיד מזוקק", "نموذج طالب", "蒸馏学生 0.5B", "étudiant", "学生", "e\u202evil"]
    for number, name in enumerate(names):
        add_run(tmp_path, Model(name, "kd", "", 0.1 * number), tasks=("gqa", "mme"), units=5)
    page = text_of(render_report(tmp_path, tmp_path / "out").parent)
    checker = check(page)
    rows = [i for i in checker.ids if i.startswith("row-")]
    assert len(rows) == len(set(rows)) == len(names)
    assert "<bdi>תלמיד מזוקק</bdi>" in page
    assert "\u202e" not in page
    assert max(map(len, printed(tmp_path).splitlines())) <= 100


@pytest.mark.slow
def test_a_run_that_is_not_sound_is_marked_on_its_row(tmp_path: Path) -> None:
    add_run(tmp_path, Model("whole", "sft", "sft", 0.0, 0), tasks=("gqa",), units=5)
    run = add_run(tmp_path, Model("half", "kd", "kl", 0.0, 0), tasks=("gqa",), planned=TASKS)
    with_status(run, "partial")
    page = text_of(render_report(tmp_path, tmp_path / "out").parent)
    row = re.search(r'id="row-kd-half".*?</tr>', page, re.DOTALL)
    assert row is not None
    assert "partial" in row.group()
    assert "half is partial: 1 of 10 done" in row.group()
    assert "partial" in (tmp_path / "out" / "leaderboard.md").read_text(encoding="utf-8")


def test_plots_of_an_older_report_do_not_stay(tmp_path: Path) -> None:
    add_run(tmp_path, Model("alone", "student", "", 0.5), tasks=("gqa",), units=4)
    render_report(tmp_path, tmp_path / "out")
    (tmp_path / "out" / "plots" / "gaps.svg").write_text("older")
    (tmp_path / "out" / "plots" / "mine.svg").write_text("of the user")
    render_report(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out" / "plots" / "gaps.svg").exists()
    assert (tmp_path / "out" / "plots" / "mine.svg").exists()


def test_published_rows_stand_apart(report: Path) -> None:
    page = text_of(report)
    board = page[page.index('<table id="board"') : page.index("</table>")]
    assert "TinyLLaVA" not in board
    published = page[page.index('<section id="published"') :]
    assert "cannot be compared with these" in published
    assert "Beside the paper" not in page


@pytest.mark.slow
def test_console_and_text_agree(demo: Path, tmp_path: Path) -> None:
    import io

    from rich.console import Console

    stream = io.StringIO()
    render_report(demo, tmp_path, console=Console(file=stream, width=100, color_system=None))
    lines = [line.rstrip() for line in stream.getvalue().splitlines() if line.strip()]
    assert lines == [line for line in printed(demo).splitlines() if line.strip()]
    assert max(map(len, lines)) <= 100


def test_a_training_that_still_runs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    add_training(folder, Model("x", "kd", "switch-kd", 0.0, 0), steps=50)
    shutil.rmtree(folder / "final")
    with (folder / "train_log.jsonl").open("a") as log:
        log.write('{"stage": "distil", "step": 60, "loss": 1.')  # torn
    page = text_of(render_training([folder], tmp_path / "out").parent)
    check(page)
    assert "stage distil, step 50 of 50" in page
    assert "total loss" in page


def test_sft_rows_beside_the_floor_are_filtered_by_a_button_of_their_own(tmp_path: Path) -> None:
    """One button a heading: no two say the same, each has its rows and no others."""
    for name, skill in (("floor", 0.1), ("other", 0.2), ("third", 0.0)):
        add_run(tmp_path, Model(name, "sft", name, skill, 0), tasks=("gqa",), units=5)
    add_run(tmp_path, Model("kl", "kd", "kl", 0.5, 0), tasks=("gqa",), units=5)
    page = text_of(render_report(tmp_path, tmp_path / "page").parent)
    buttons = re.findall(r'name="role" value="([^"]*)" checked><span>([^<]*)</span>', page)
    assert len(dict(buttons)) == len({title for _, title in buttons}) == len(buttons) == 3
    assert dict(buttons)["sft"] == "SFT (floor)"
    rows = re.findall(r'<tr data-row data-role="([^"]*)"', page)
    assert sorted(rows) == ["kd", "sft", "sft-other", "sft-other"]
    heads = re.findall(r'<tbody data-role="([^"]*)">.*?<span>([^<]*)</span>', page, re.DOTALL)
    assert all(dict(buttons)[role] == title for role, title in heads)


def test_run_facts_tell_how_to_make_the_number_again(tmp_path: Path) -> None:
    training = {"method": "switch-kd", "teacher": {"weights_sha256": "ab" * 32}, "stages": {}}
    model = Model("mine", "kd", "switch-kd", 0.5, 7)
    run = add_run(tmp_path, model, tasks=("gqa",), units=2, training=training)
    facts = dict(run_facts(run.manifest))
    assert facts["Command"] == "kd-bench eval checkpoints/mine --suite mini"
    assert facts["Seed"] == "7"
    assert facts["Weights digest"] == run.manifest.model.weights_digest
    assert facts["Training teacher weights sha256"] == "ab" * 32
    assert facts["Hardware cpu"] == "2 cores"
