"""Intervals, ranks and relations against the statistics that they must come from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kd_bench.aggregators import aggregate, by_content
from kd_bench.compare.estimates import Evidence
from kd_bench.compare.methods import compare_methods
from kd_bench.errors import UsageError
from kd_bench.records import AVERAGE
from kd_bench.report.board import Board, load_board
from kd_bench.report.relations import gap_table, hybrid_gaps, read_evidence, relate
from tests.support.report_store import Model, add_run, demo_models, samples, with_content

TWO = ("gqa", "mme")


def board_of(results: Path, resamples: int = 500) -> tuple[Board, Evidence]:
    board = load_board(results)
    evidence = read_evidence(board, resamples)
    return relate(board, evidence), evidence


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("store")
    for model in demo_models(seeds=(0, 1)):
        add_run(results, model, tasks=TWO, units=20)
    return results


def entry(board: Board, name: str, role: str = "kd"):  # type: ignore[no-untyped-def]
    return next(e for e in board.entries if e.method == name and e.role == role)


@pytest.mark.slow
def test_difference_from_sft_is_the_method_comparison(store: Path) -> None:
    board, _ = board_of(store, resamples=10_000)
    switch, floor = entry(board, "switch-kd"), entry(board, "sft", "sft")
    expected = compare_methods(floor.runs, switch.runs)
    assert set(expected) == {*TWO, AVERAGE}
    for key, found in expected.items():
        shown = switch.differences[key]
        assert shown.value == pytest.approx(found.value)
        assert shown.interval.low == pytest.approx(found.interval.low)
        assert shown.interval.high == pytest.approx(found.interval.high)
        assert shown.holds_seeds


def test_retention_and_gap_closed_by_hand(store: Path) -> None:
    board, _ = board_of(store)
    switch = entry(board, "switch-kd")
    top, low = board.teacher, board.floor
    assert top is not None
    assert low is not None
    own, ceiling, ground = (e.score(AVERAGE).value for e in (switch, top, low))
    assert switch.retentions[AVERAGE].value == pytest.approx(100 * own / ceiling)
    assert switch.gap_closed.value == pytest.approx(100 * (own - ground) / (ceiling - ground))
    assert (
        switch.gap_closed.interval.low < switch.gap_closed.value < switch.gap_closed.interval.high
    )
    assert top.retentions == {}
    assert low.differences == {}


def test_vision_and_language_gap_add_up_to_the_distance_from_the_teacher(store: Path) -> None:
    board, evidence = board_of(store)
    (gap,) = hybrid_gaps(board, evidence)
    assert gap.student.role == "kd"
    for key in (*TWO, AVERAGE):
        whole = board.teacher.score(key).value - gap.student.score(key).value  # type: ignore[union-attr]
        assert gap.vision[key].value + gap.language[key].value == pytest.approx(whole)


def test_equal_models_share_a_rank_and_a_better_one_leads(tmp_path: Path) -> None:
    same = samples("gqa", Model("twin", "kd", "", 0.0), units=40)
    better = same.assign(score=1.0)
    for name, frame in (("one", same), ("two", same.copy()), ("best", better)):
        add_run(tmp_path, Model(name, "kd", "", 0.0), tasks=("gqa",), change={"gqa": frame})
    board, _ = board_of(tmp_path)
    ranks = {e.name: e.score("gqa").rank for e in board.entries}
    assert ranks == {"one": 2, "two": 2, "best": 1}


def test_a_difference_within_noise_shares_the_rank(tmp_path: Path) -> None:
    base = samples("gqa", Model("twin", "kd", "", 0.0), units=40)
    flipped = base.copy()
    wrong = np.flatnonzero(flipped["score"] == 0)[:1]
    flipped.loc[flipped.index[wrong], "score"] = 1.0
    for name, frame in (("base", base), ("lucky", flipped)):
        add_run(tmp_path, Model(name, "kd", "", 0.0), tasks=("gqa",), change={"gqa": frame})
    board, _ = board_of(tmp_path)
    assert {e.score("gqa").rank for e in board.entries} == {1}


def test_samples_that_do_not_make_the_score_give_no_interval(tmp_path: Path) -> None:
    run = add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=10)
    frame = run.samples("gqa")
    run.commit(run.result("gqa"), frame.assign(score=1.0 - frame["score"]))
    evidence = read_evidence(load_board(tmp_path), 50)
    assert not evidence.has("gqa", [run.path.name])
    board, _ = board_of(tmp_path, 50)
    assert board.entries[0].score("gqa").interval is None


# --- form gap and sight --------------------------------------------------------------------------

FORMED = (Model("teacher", "teacher", "", 1.5), Model("sft", "sft", "sft", 0.0, 0),
          Model("kd", "kd", "kl", 0.6, 0), Model("mixed", "switch", "kl", 1.0, 0))  # fmt: skip


def formed(results: Path, share: float = 0.4, ambiguous: float = 0.05) -> Path:
    """Runs with scores by content, all but the hybrid with a run on blank images."""
    for model in FORMED:
        frames = {task: with_content(samples(task, model), share) for task in TWO}
        add_run(results, model, tasks=TWO, change=frames, ambiguous=ambiguous)
        if model.role != "switch":
            blind = replace(model, skill=-0.5)
            guessed = {task: with_content(samples(task, blind), 0.0) for task in TWO}
            add_run(results, model, tasks=TWO, change=guessed, images="blank")
    return results


def test_form_gap_and_sight_of_every_model_by_hand(tmp_path: Path) -> None:
    board, evidence = board_of(formed(tmp_path))
    assert len(board.left_out) == 3  # runs with blank images are no rows
    table = gap_table(board, evidence)
    assert table is not None
    assert [column.key for column in table.columns] == ["model", "mme", "gqa", AVERAGE, "ambiguous"]
    seen = {(row.section, str(row.cells[0].value)): row for row in table.rows}
    sections = list(dict.fromkeys(row.section for row in table.rows))
    assert [section.split(":")[0] for section in sections] == [
        "Form gap", "Sight", "Δ SFT, content", "Δ SFT, form", "Δ SFT, guessing", "Δ SFT, sight",
    ]  # fmt: skip
    for model in FORMED:
        frame = with_content(samples("gqa", model), 0.4)
        gap = aggregate("mean", by_content(frame)) - aggregate("mean", frame)
        row = seen[sections[0], model.name]
        assert row.cells[2].value == pytest.approx(gap)
        assert row.cells[2].interval.low < gap < row.cells[2].interval.high
        documents = [len(samples(task, model)) for task in TWO]
        assert row.cells[4].value == sum(round(0.05 * count) for count in documents)
        if model.role == "switch":
            assert (sections[1], model.name) not in seen  # nothing is shown that is not known
            continue
        blind = aggregate("mean", samples("gqa", replace(model, skill=-0.5)))
        sight = aggregate("mean", frame) - blind
        assert seen[sections[1], model.name].cells[2].value == pytest.approx(sight)
    for key, place in (("mme", 1), ("gqa", 2), (AVERAGE, 3)):
        kd = next(each for each in board.entries if each.name == "kd")
        parts = [seen[section, "kd"].cells[place].value for section in sections[2:]]
        assert parts[0] + parts[1] == pytest.approx(kd.differences[key].value)
        assert parts[2] + parts[3] == pytest.approx(kd.differences[key].value)


def test_a_seed_without_its_blank_run_is_named_where_others_have_one(tmp_path: Path) -> None:
    for seed in range(3):
        model = Model(f"kl-seed{seed}", "kd", "kl", 0.1, seed)
        run = add_run(tmp_path, model, tasks=TWO)
        if seed < 2:
            add_run(tmp_path, model, tasks=TWO, images="blank")
    add_run(tmp_path, Model("sft-seed0", "sft", "sft", 0.0, 0), tasks=TWO)
    (told,) = [line for line in load_board(tmp_path).left_out if "seeds of kl" in line]
    assert not told.endswith(".")
    assert told.startswith(f"kl-seed2 ({run.path.name}) has no run with blank images")


def test_a_run_without_its_images_is_a_row_only_where_it_was_named(tmp_path: Path) -> None:
    add_run(tmp_path, FORMED[0], tasks=TWO)
    blind = add_run(tmp_path, FORMED[0], tasks=TWO, images="blank")
    for every in (False, True):
        board = load_board(tmp_path, every=every)
        assert blind.path.name not in [run.path.name for e in board.entries for run in e.runs]
    (entry,) = load_board(tmp_path, [blind.path.name]).entries
    assert entry.runs == (blind,)


def test_nothing_is_shown_where_nothing_is_known(tmp_path: Path) -> None:
    add_run(tmp_path, FORMED[0], tasks=TWO)
    board, evidence = board_of(tmp_path, 50)
    assert gap_table(board, evidence) is None
    blind = add_run(tmp_path, FORMED[0], tasks=TWO, images="blank")
    (blind.path / "tasks" / "gqa.samples.parquet").write_bytes(b"PAR1 torn")
    table = gap_table(*board_of(tmp_path, 50))
    assert table is None or all(row.cells[2].value is None for row in table.rows)


def test_that_no_form_costs_points_is_one_sentence(tmp_path: Path) -> None:
    table = gap_table(*board_of(formed(tmp_path, share=0.0, ambiguous=0.0), 200))
    assert table is not None
    assert table.caption.startswith("Form gap: none.")
    assert {row.section.split(":")[0] for row in table.rows} == {
        "Sight", "Δ SFT, guessing", "Δ SFT, sight",
    }  # fmt: skip
    assert [column.key for column in table.columns] == ["model", "mme", "gqa", AVERAGE]
    # An answer that can be read in two ways is told even where no form costs points.
    (tmp_path / "more").mkdir()
    table = gap_table(*board_of(formed(tmp_path / "more", share=0.0, ambiguous=0.1), 200))
    assert table is not None
    assert table.rows[0].cells[-1].value > 0
    assert table.rows[0].cells[1].interval is None


def test_a_run_with_unreadable_samples_is_left_out_by_name(tmp_path: Path) -> None:
    add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=10)
    run = add_run(tmp_path, Model("b", "kd", "kl", 0.5, 0), tasks=("gqa",), units=10)
    (run.path / "tasks" / "gqa.samples.parquet").write_bytes(b"PAR1 torn")
    board, _ = board_of(tmp_path, 50)
    assert [e.role for e in board.entries] == ["sft"]
    assert any(run.path.name in reason for reason in board.left_out)


def test_other_documents_are_not_paired(tmp_path: Path) -> None:
    add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=("gqa",), units=10)
    add_run(tmp_path, Model("b", "kd", "kl", 0.0, 0), tasks=("gqa",), units=12)
    evidence = read_evidence(load_board(tmp_path), 50)
    assert len(evidence.tasks["gqa"].draws) == 1


def test_a_teacher_below_the_floor_closes_no_gap(tmp_path: Path) -> None:
    for name, role, skill in (("t", "teacher", -2.0), ("s", "sft", 1.0), ("k", "kd", 1.5)):
        add_run(tmp_path, Model(name, role, "", skill), tasks=("gqa",), units=20)
    board, _ = board_of(tmp_path, 50)
    student = next(e for e in board.entries if e.role == "kd")
    assert not student.gap_closed.known
    assert student.differences[AVERAGE].known


def test_the_page_and_compare_show_one_interval(tmp_path: Path) -> None:
    """Issue: `compare` said [-9.83, +12.52] and `report` [-9.38, +13.16] of one pair."""
    from kd_bench.compare import compare

    one = add_run(tmp_path, Model("a", "sft", "sft", 0.0, 0), tasks=TWO, units=30)
    two = add_run(tmp_path, Model("b", "kd", "kl", 0.3, 0), tasks=TWO, units=30)
    found = compare([one, two], categories=False)
    board, _ = board_of(tmp_path, 10_000)
    shown = next(e for e in board.entries if e.role == "kd").differences
    told = {t.task: t.differences[0] for t in found.tasks} | {AVERAGE: found.average_differences[0]}
    for key, difference in told.items():
        assert shown[key].value == pytest.approx(difference.value)
        assert shown[key].interval == difference.interval


def test_too_few_units_have_no_interval_and_no_rank(tmp_path: Path) -> None:
    for name, role, skill in (("s", "sft", 0.0), ("k", "kd", 3.0)):
        add_run(tmp_path, Model(name, role, role, skill, 0), tasks=("gqa",), units=2)
    board, _ = board_of(tmp_path, 200)
    for entry in board.entries:
        score = entry.score("gqa")
        assert score.interval is None
        assert score.rank is None
        assert any("too few" in mark for mark in score.marks)
        assert all(found.interval is None for found in entry.differences.values())
    assert board.claim is None


def test_seeds_are_in_every_interval_of_a_method(store: Path) -> None:
    """Score, difference, retention and gap closed: none holds the documents alone."""
    board, _ = board_of(store)
    switch = entry(board, "switch-kd")
    found = [*switch.scores.values(), *switch.differences.values(), *switch.retentions.values()]
    assert all(score.holds_seeds for score in (*found, switch.gap_closed))


def test_the_headline_is_of_the_row_named_as_main_or_of_what_holds_over_all(store: Path) -> None:
    board = load_board(store)
    evidence = read_evidence(board, 500)
    best = relate(board, evidence)
    assert best.claim is not None
    assert best.claim.candidates == len(best.students) - 1
    named = relate(board, evidence, "kl")
    assert named.main is not None
    assert named.main.method == "kl"
    assert named.claim is None or named.claim.candidates == 1
    with pytest.raises(UsageError, match="No student on this page is 'k1'"):
        relate(board, evidence, "k1")


@pytest.mark.slow
def test_equal_methods_and_single_seeds_get_no_headline(tmp_path: Path) -> None:
    """Nine equal methods of one seed each: whatever comes out best is chance."""
    from kd_bench.report.page import head

    add_run(tmp_path, Model("floor", "sft", "sft", 0.3, 0), tasks=TWO, units=20)
    for number in range(9):
        add_run(tmp_path, Model(f"m{number}", "kd", f"m{number}", 0.3, 0), tasks=TWO, units=20)
    board, _ = board_of(tmp_path, 500)
    assert head(board)["title"] == "10 models on 2 benchmarks"
    add_run(tmp_path, Model("giant", "kd", "giant", 3.0, 0), tasks=TWO, units=20)
    board, _ = board_of(tmp_path, 500)
    assert board.claim is not None
    assert board.claim.weights_only
    assert head(board)["title"] == "11 models on 2 benchmarks"
    assert head(board)["figures"] == []
    assert any("what another seed would give is unknown" in line for line in head(board)["lead"])
