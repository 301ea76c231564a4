"""Runs fold into entries; whatever is wrong with a run is said and costs no report."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from kd_bench.errors import IncompleteRunError, UsageError
from kd_bench.records import AVERAGE
from kd_bench.report import render_report
from kd_bench.report.board import load_board, task_infos
from kd_bench.report.leaderboard import leaderboard
from kd_bench.report.relations import read_evidence, relate
from tests.cli.conftest import Call, call  # noqa: F401  # a fixture
from tests.support.report_store import TASKS, Model, add_run, printed, result, samples, with_status

SFT = [Model(f"sft-{seed}", "sft", "sft", 0.0, seed) for seed in range(3)]


def test_seeds_of_a_method_fold_into_mean_and_spread(tmp_path: Path) -> None:
    runs = [add_run(tmp_path, model, tasks=("gqa",), units=10) for model in SFT]
    scores = [run.result("gqa").score for run in runs]
    (entry,) = load_board(tmp_path).entries
    mean = sum(scores) / 3
    assert entry.score("gqa").value == pytest.approx(mean)
    spread = math.sqrt(sum((s - mean) ** 2 for s in scores) / 2)
    assert entry.score("gqa").spread == pytest.approx(spread)
    assert entry.score("gqa").seeds == tuple(scores)
    assert [manifest.model.seed for manifest in entry.manifests] == [0, 1, 2]
    assert entry.label == "SFT (3 seeds)"


def test_one_run_has_no_spread(tmp_path: Path) -> None:
    add_run(tmp_path, SFT[0], tasks=("gqa",), units=5)
    (entry,) = load_board(tmp_path).entries
    assert entry.score("gqa").spread is None
    assert entry.name == "sft-0"


def test_the_average_is_the_mean_and_missing_with_a_benchmark(tmp_path: Path) -> None:
    whole = add_run(tmp_path, SFT[0], tasks=("gqa", "pope"), units=10)
    add_run(tmp_path, Model("other", "student", "", 0.0), tasks=("gqa",), units=10)
    whole_entry, part = sorted(load_board(tmp_path).entries, key=lambda e: e.name, reverse=True)
    values = [whole.result(task).score for task in ("gqa", "pope")]
    assert whole_entry.score(AVERAGE).value == pytest.approx(sum(values) / 2)
    assert not part.score(AVERAGE).known
    assert part.score("gqa").known


def test_thoughts_are_a_cost_where_a_model_thinks(tmp_path: Path, call: Call) -> None:  # noqa: F811
    models = [Model("thinks", "teacher", "", 1.0), Model("answers", "student", "", 0.0)]
    runs = [add_run(tmp_path, model, tasks=("gqa", "pope"), units=10) for model in models]
    table = leaderboard(load_board(tmp_path))
    assert "thinking" not in [column.key for column in table.columns]
    shown = json.loads(call("runs", "show", "thinks", "--results", tmp_path).out)
    assert "tokens" not in shown["results"]["gqa"]
    spent = {"gqa": {"answer": 3.0, "thinking": 90.0}, "pope": {"answer": 1.0, "thinking": 0.0}}
    for task, frame in ((task, runs[0].samples(task)) for task in spent):
        runs[0].commit(replace(runs[0].result(task), tokens=spent[task]), frame)
    board = load_board(tmp_path)
    documents = [runs[0].result(task).documents for task in spent]
    told = {e.name: (e.tokens("answer"), e.tokens("thinking")) for e in board.entries}
    mean = [sum(n * of[k] for n, of in zip(documents, spent.values(), strict=True))
            / sum(documents) for k in ("answer", "thinking")]  # fmt: skip
    assert told == {"thinks": pytest.approx(mean), "answers": (None, None)}
    table = leaderboard(board)
    keys = [column.key for column in table.columns]
    place = keys.index("thinking")
    assert keys[place : place + 2] == ["thinking", "answer"]
    by_name = {row.cells[0].value: row.cells[place].value for row in table.rows}
    assert by_name == {"thinks": pytest.approx(mean[1]), "answers": None}
    shown = json.loads(call("runs", "show", "thinks", "--results", tmp_path).out)
    assert shown["results"]["gqa"]["tokens"] == spent["gqa"]


def test_a_newer_run_of_the_same_model_replaces_the_older(tmp_path: Path) -> None:
    old = add_run(tmp_path, SFT[0], tasks=("gqa",), units=5)
    new = old.path.rename(old.path.with_name("20260601-again"))
    run = add_run(tmp_path, SFT[0], tasks=("gqa",), units=5)
    newer = replace(run.manifest, created="2026-06-01T00:00:00+00:00")
    (new / "manifest.json").unlink()
    type(run)(new).write_manifest(newer)
    board = load_board(tmp_path)
    assert [r.path.name for e in board.entries for r in e.runs] == ["20260601-again"]
    assert any("a newer run of sft-0 is shown" in line for line in board.left_out)


def test_another_recipe_of_a_method_is_a_row_of_its_own(tmp_path: Path) -> None:
    for model in (*SFT, replace(SFT[0], name="sft-high-rate")):
        add_run(tmp_path, model, tasks=("gqa",), units=5)
    names = sorted(entry.name for entry in load_board(tmp_path).entries)
    assert names == ["SFT", "sft-high-rate"]


def test_sizes_of_one_method_are_told_apart(tmp_path: Path) -> None:
    for size in (1_500_000_000, 500_000_000):
        for model in SFT[:2]:
            named = replace(model, name=f"{model.name}-{size}", parameters=size)
            add_run(tmp_path, named, tasks=("gqa",), units=5)
    assert {e.name for e in load_board(tmp_path).entries} == {"SFT, 1.5B", "SFT, 0.5B"}


def test_other_suites_are_left_out_and_named(tmp_path: Path) -> None:
    add_run(tmp_path, SFT[0], tasks=("gqa",), units=5, suite="ten", created="2026-01-01")
    add_run(tmp_path, SFT[1], tasks=("gqa",), units=5, suite="mini", created="2026-02-01")
    board = load_board(tmp_path)
    assert (board.suite, board.mini, len(board.entries)) == ("mini", True, 1)
    assert board.left_out == ("sft-0: suite ten, not mini",)
    assert load_board(tmp_path, suite="ten").entries[0].name == "sft-0"


def test_named_runs_only_and_an_unknown_name(tmp_path: Path) -> None:
    for model in SFT:
        add_run(tmp_path, model, tasks=("gqa",), units=5)
    assert len(load_board(tmp_path, ["sft-1"]).entries[0].runs) == 1
    with pytest.raises(UsageError, match="sft-9"):
        load_board(tmp_path, ["sft-9"])


@pytest.mark.parametrize("status", ["running", "partial", "unhealthy"])
def test_a_run_that_is_not_complete_says_so(tmp_path: Path, status: str) -> None:
    run = add_run(tmp_path, SFT[0], tasks=("gqa",), planned=TASKS, units=5, notes=["disk full"])
    with_status(run, status)  # type: ignore[arg-type]
    (entry,) = load_board(tmp_path).entries
    assert entry.health == (f"sft-0 is {status}: 1 of 10 done", "sft-0: disk full")
    assert len(load_board(tmp_path).tasks) == 10


def test_failed_answers_are_health(tmp_path: Path) -> None:
    run = add_run(tmp_path, SFT[0], tasks=("gqa",), units=5)
    frame = samples("gqa", SFT[0], 5)
    sick = replace(result("gqa", frame), rates={"error": 0.25, "unparsed": 0.5})
    run.commit(sick, frame)
    (entry,) = load_board(tmp_path).entries
    assert entry.health == ("sft-0: 25.0% of the answers on gqa are errors",)
    assert entry.score("gqa").marks == ("25.0% error", "50.0% unparsed")


def test_another_protocol_is_marked_and_not_compared(tmp_path: Path) -> None:
    for model in SFT[:2]:
        add_run(tmp_path, model, tasks=("gqa", "pope"), units=5)
    run = add_run(tmp_path, Model("odd", "student", "", 0.0), tasks=("gqa", "pope"), units=5)
    frame = run.samples("gqa")
    run.commit(replace(run.result("gqa"), fingerprint="other"), frame)
    odd = next(e for e in load_board(tmp_path).entries if e.name == "odd")
    assert not odd.score("gqa").comparable
    assert "another protocol" in odd.score("gqa").marks[0]
    assert odd.score("pope").comparable
    assert not odd.score(AVERAGE).comparable


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    add_run(tmp_path, SFT[0], tasks=("gqa",), units=5)
    broken = add_run(tmp_path, SFT[1], tasks=("gqa",), units=5)
    (broken.path / "tasks" / "gqa.json").write_text("{torn", encoding="utf-8")
    (entry,) = load_board(tmp_path).entries
    assert any("gqa.json" in line for line in entry.health)
    assert entry.score("gqa").marks == ("1 of 2 seeds",)


def test_an_empty_store(tmp_path: Path) -> None:
    board = load_board(tmp_path)
    assert (board.entries, board.tasks, board.mini) == ((), (), False)


def test_nan_scores_are_not_numbers(tmp_path: Path) -> None:
    """Of a hidden test split there is no score; a scored benchmark cannot be stored without."""
    run = add_run(tmp_path, SFT[0], tasks=("vqav2",), units=5)
    frame = run.samples("vqav2")
    nothing = replace(run.result("vqav2"), score=float("nan"), interval=None)
    with pytest.raises(IncompleteRunError, match="no score"):
        run.commit(nothing, frame)
    run.commit(replace(nothing, profile="test-dev"), frame)
    (entry,) = load_board(tmp_path).entries
    assert not entry.score("vqav2").known


def test_columns_stand_in_the_papers_order_and_groups() -> None:
    """The table of github.com/haoyi199815/Switch-KD, whose last group holds three of one each."""
    infos = task_infos(reversed(TASKS))
    assert [info.id for info in infos] == [
        "mme", "mmbench_en", "mmbench_cn", "vqav2", "gqa", "scienceqa_img", "mmmu",
        "textvqa", "vizwiz_vqa", "pope",
    ]  # fmt: skip
    assert [info.group for info in infos] == [
        *["perception"] * 3, *["cognition"] * 4, "OCR", "domain", "hallucination",
    ]  # fmt: skip


def test_benchmarks_stand_in_groups() -> None:
    infos = task_infos([*reversed(TASKS), "my_own"])
    assert infos[-1].group == "other"
    groups = [info.group for info in infos]
    assert len(dict.fromkeys(groups)) == 6
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index)


def test_training_cost_is_shown_where_the_lineage_has_it(tmp_path: Path) -> None:
    """Mean over seeds of the sum over stages; a seed that does not say it makes it unknown."""
    from kd_bench.report.leaderboard import leaderboard

    def told(tokens: int, seconds: float) -> dict[str, object]:
        stage = {"tokens": tokens, "device_seconds": seconds, "device": "cuda"}
        return {"stages": {"one": stage, "two": {**stage, "tokens": 10}}}

    for seed, tokens in ((0, 990), (1, 1990)):
        add_run(tmp_path, Model(f"m{seed}", "kd", "kl", 0.1, seed), tasks=("gqa",), units=4,
                training=told(tokens, 5400.0))  # fmt: skip
    add_run(tmp_path, Model("old", "sft", "sft", 0.1, 0), tasks=("gqa",), units=4)
    board = load_board(tmp_path)
    table = leaderboard(board)
    shown = {
        c.title: [row.cells[i].value for row in table.rows] for i, c in enumerate(table.columns)
    }
    assert shown["Tokens"] == [1500.0, None]
    assert shown["GPU-hours"] == [3.0, None]
    older = [run.path.name for run in board.entries[1].runs]
    titles = [column.title for column in leaderboard(load_board(tmp_path, older)).columns]
    assert "Tokens" not in titles


def test_a_damaged_run_is_named_in_every_rendering(tmp_path: Path) -> None:
    for model in (SFT[0], Model("kl", "kd", "kl", 0.5, 0)):
        run = add_run(tmp_path, model, tasks=("gqa",), units=5)
    (run.path / "manifest.json").write_text("{", encoding="utf-8")
    page = render_report(tmp_path, tmp_path / "page").parent
    texts = {path.name: path.read_text("utf-8") for path in page.glob("leaderboard.*")}
    texts |= {"terminal": printed(tmp_path), "page": (page / "index.html").read_text("utf-8")}
    assert len(texts) == 6
    for name, text in texts.items():
        assert run.path.name in " ".join(text.split()).replace("\\_", "_"), name


@pytest.mark.parametrize("status", ["partial", "unhealthy"])
def test_an_unsound_seed_stands_beside_the_mean(tmp_path: Path, status: str) -> None:
    runs = [add_run(tmp_path, model, tasks=("gqa",), units=10) for model in SFT]
    with_status(runs[2], status)  # type: ignore[arg-type]
    board = load_board(tmp_path)
    mean, beside = sorted(board.entries, key=lambda entry: -len(entry.runs))
    assert [manifest.model.seed for manifest in mean.manifests] == [0, 1]
    assert mean.score("gqa").value == sum(r.result("gqa").score for r in runs[:2]) / 2
    assert (beside.name, bool(beside.health)) == ("sft-2", True)
    related = relate(board, read_evidence(board, 50))
    assert related.floor is not None
    assert [manifest.model.seed for manifest in related.floor.manifests] == [0, 1]
    headings = {row.key: row.section for row in leaderboard(related).rows}
    assert headings == {mean.key: "SFT (floor)", beside.key: "SFT, not the floor"}


def test_no_average_over_mixed_seeds(tmp_path: Path) -> None:
    add_run(tmp_path, SFT[0], tasks=("gqa", "pope"), units=5)
    add_run(tmp_path, SFT[1], tasks=("gqa",), units=5)
    (entry,) = load_board(tmp_path).entries
    assert entry.score("gqa").known
    assert not entry.score(AVERAGE).known


def test_a_limited_run_is_related_to_nothing_else(tmp_path: Path) -> None:
    add_run(tmp_path, Model("big", "teacher", "", 1.5), tasks=("gqa",), units=20)
    add_run(tmp_path, SFT[0], tasks=("gqa",), units=20)
    run = add_run(tmp_path, Model("few", "kd", "kl", 0.9, 0), tasks=("gqa",), units=8)
    limited = replace(run.manifest.protocol, limit=8)
    run.write_manifest(replace(run.manifest, protocol=limited))
    board = load_board(tmp_path)
    few = next(e for e in relate(board, read_evidence(board, 50)).entries if e.name == "few")
    assert few.score("gqa").known
    assert (few.differences, few.retentions, few.gap_closed.known) == ({}, {}, False)
    assert few.score("gqa").rank is None


def test_number_types_that_differ_are_said(tmp_path: Path) -> None:
    run = [add_run(tmp_path, model, tasks=("gqa",), units=5)
           for model in (SFT[0], Model("kl", "kd", "kl", 0.5, 0))][1]  # fmt: skip
    assert "number types" not in printed(tmp_path)
    coarse = replace(run.manifest.protocol, dtype="bfloat16", quantize="nf4")
    run.write_manifest(replace(run.manifest, protocol=coarse))
    told = "float32: sft-0; bfloat16, nf4: kl"
    page = render_report(tmp_path, tmp_path / "page").parent
    for text in (printed(tmp_path), *(p.read_text("utf-8") for p in page.glob("*.csv"))):
        assert "different number types" in " ".join(text.split())
    assert all(part in " ".join(printed(tmp_path).split()) for part in told.split("; "))


def test_one_name_in_two_roles_is_two_labels(tmp_path: Path) -> None:
    for role in ("sft", "kd"):
        add_run(tmp_path, Model("same", role, "", 0.0), tasks=("gqa",), units=5)
    board = load_board(tmp_path)
    assert len({entry.label for entry in board.entries}) == 2
    sections = [row.section for row in leaderboard(relate(board, read_evidence(board, 50))).rows]
    assert sections.count("SFT (floor)") == 1
