"""Every number on the page, read back in a browser and compared with the store."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kd_bench.records import AVERAGE
from kd_bench.report import render_report
from tests.browser.test_report_page import Opened, browser  # noqa: F401
from tests.report.test_values import (
    AVERAGE_TITLE,
    HEADINGS,
    Value,
    close,
    expected,
    name_of,
    say,
)
from tests.support.distinct_store import make_distinct, run_named, truths
from tests.support.report_store import Model, add_run
from tests.support.svg_reading import number

pytestmark = [pytest.mark.browser, pytest.mark.slow]

BOARD = """mode => {
  const heads = [...document.querySelectorAll('#board thead tr:last-child th')];
  return [...document.querySelectorAll('#board tr[data-row]')].map(row => ({
    name: row.querySelector('bdi').textContent,
    cells: heads.slice(1).map((head, at) => {
      const all = [...row.cells[at + 1].querySelectorAll(".v")];
      const shown = all.filter(v => v.offsetParent !== null);
      const copy = shown[0].cloneNode(true);
      copy.querySelectorAll('sup').forEach(sup => sup.remove());
      const small = copy.querySelector('small')?.textContent ?? '';
      copy.querySelector('small')?.remove();
      return {key: head.dataset.key, title: head.textContent, count: shown.length,
              text: copy.textContent, small, value: shown[0].dataset.value,
              tip: shown[0].dataset.tip ?? ''};
    }),
  }));
}"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_distinct(tmp_path_factory.mktemp("distinct"))


@pytest.fixture(scope="module")
def page_path(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_report(results, tmp_path_factory.mktemp("report"))


@pytest.fixture
def opened(browser: object, page_path: Path) -> Iterator[Opened]:  # noqa: F811
    found = Opened(browser, page_path.as_uri(), viewport={"width": 1400, "height": 900})
    yield found
    found.close()


@pytest.mark.parametrize("mode", ["scores", "differences", "retention"])
def test_every_cell_of_the_leaderboard(opened: Opened, results: Path, mode: str) -> None:
    truth = expected(results, mode)
    opened.page.locator(f'input[name="mode"][value="{mode}"]').check(force=True)
    rows: list[dict[str, Any]] = opened.page.evaluate(BOARD, mode)
    assert {row["name"] for row in rows} == set(truth)
    for row in rows:
        true = truth[row["name"]]
        keys = [cell["key"] for cell in row["cells"]]
        assert set(HEADINGS.values()) <= set(keys)
        for cell in row["cells"]:
            key, where = cell["key"], f"{mode}, {row['name']}, {cell['key']}"
            if key not in true:
                continue
            assert HEADINGS[cell["title"]] == key
            assert cell["count"] == 1, f"{where}: {cell['count']} numbers are shown at once"
            say(f"{cell['text']} {cell['small']}".strip(), true[key], where, whole=True)
            if true[key].value is None:
                assert cell["value"] == ""
            else:
                assert float(cell["value"]) == pytest.approx(true[key].value, rel=1e-5), where
            _tip_is_true(cell["tip"], row["name"], key, true[key], where)


def _tip_is_true(tip: str, name: str, key: str, true: Value, where: str) -> None:
    """The hover text is about this row, and its interval is this number's."""
    if not tip:
        return
    if key not in ("difference", "retention", "gap_closed"):
        assert tip.startswith(name), where
    ends = re.search(r"(\d+) % interval (\S+) to (\S+?)(?:,|$)", tip, re.MULTILINE)
    if ends:
        assert true.interval is not None, where
        assert float(ends[1]) == pytest.approx(100 * true.interval.level), where
        close(number(ends[2]), true.interval.low, where, ends[2])
        close(number(ends[3]), true.interval.high, where, ends[3])


def test_the_head_of_the_page(opened: Opened, results: Path) -> None:
    """Each figure is the number that its name says, of the row that it names."""
    rows = {row.label: row for row in truths(results)}
    page = opened.page
    lead = page.locator(".lead").first.inner_text()
    for name, word in (("teacher", "teacher reaches"), ("SFT", "fine-tuning")):
        found = re.search(rf"{word} ([\d.]+)", lead)
        assert found is not None, lead
        close(float(found[1]), rows[name].scores[AVERAGE], name, found[1])
    figures = page.locator(".figures div")
    names = {}
    for place in range(figures.count()):
        figure = figures.nth(place)
        name = figure.locator("dt").inner_text()
        names[name] = (figure.locator(".big").inner_text(), figure.locator(".range").inner_text())
    (first,) = [name for name in names if name.startswith(AVERAGE_TITLE)]
    row = rows[first.removeprefix(f"{AVERAGE_TITLE} of ")]
    true = expected(results)[row.label]
    for name, (big, note) in names.items():
        key = AVERAGE if name == first else {
            "Difference from SFT": "difference", "Of the teacher kept": "retention",
            "Gap to the teacher closed": "gap_closed",
        }[name]  # fmt: skip
        say(big, true[key], name)
        _tip_is_true(note, "", "gap_closed", true[key], name)


def test_a_title_with_a_number_has_its_sign_and_its_row(
    browser: object,  # noqa: F811
    results: Path,
    tmp_path: Path,
) -> None:
    """Of the student that gained, and of one that lost by as clear a margin."""
    lost = tmp_path / "results"
    add_run(lost, Model("t", "teacher", "", 2.5), units=20)
    add_run(lost, Model("floor", "sft", "sft", 1.6, 0), units=20)
    add_run(lost, Model("worse", "kd", "kl", -0.9, 0), units=20)
    for store, wrong, folder in ((results, r"\bloses\b|−", "up"), (lost, r"\bgains\b|\+", "down")):
        path = render_report(store, tmp_path / folder)
        opened = Opened(browser, path.as_uri())
        title = opened.page.locator("h1").inner_text()
        differences = {
            row["name"]: next(c["value"] for c in row["cells"] if c["key"] == "difference")
            for row in opened.page.evaluate(BOARD, "scores")
        }
        opened.close()
        assert not re.search(wrong, title), title
        if said := re.match(r"(.*) (?:gains|loses) ([\d.]+) points", title):
            close(float(said[2]), abs(float(differences[said[1]])), title, said[2])
            assert (float(differences[said[1]]) > 0) == (folder == "up")


def test_the_sample_browser_shows_the_stored_answers(opened: Opened, results: Path) -> None:
    page = opened.page
    page.locator("#pick-task").select_option(label="TextVQA")
    page.locator("#pick-kind").select_option("all")
    frames: dict[str, pd.DataFrame] = {}
    for _ in range(6):
        document = page.locator("#card .where").inner_text().split(" / ")[-1]
        question = page.locator("#card .question").inner_text()
        target = page.locator("#card .target b").inner_text()
        for row in page.locator("#card tbody tr").all():
            name = row.locator("bdi").inner_text()
            if name not in frames:
                frames[name] = run_named(results, name).samples("textvqa").set_index("document_id")
            stored = frames[name].loc[document]
            assert (question, target) == (stored["question"], stored["target"])
            assert row.locator(".answer").inner_text() == stored["answer"], name
            assert row.locator(".mark").inner_text() == ("right" if stored["score"] else "wrong")
        page.locator("#next").click()
    a, b = (
        page.evaluate(
            f"(s => s.options[s.selectedIndex].text)(document.querySelector('#pick-{x}'))"
        )
        for x in "ab"
    )
    moved = frames[b]["score"].to_numpy() - frames[a]["score"].to_numpy()
    counts = page.locator("#counts").inner_text()
    found = re.search(r"Of (\d+) samples .*, (\S+) does better on (\d+) and worse on (\d+)", counts)
    assert found is not None, counts
    assert found[2] == b
    assert [int(found[i]) for i in (1, 3, 4)] == [
        len(moved), int((moved > 0).sum()), int((moved < 0).sum()),
    ]  # fmt: skip


def test_published_numbers_are_those_of_the_file(opened: Opened) -> None:
    """Each column of each published row, by the file's own names of its columns."""
    from kd_bench.registry import load_suite, load_tasks, published
    from kd_bench.report.board import task_info

    frame = published()
    known = {spec.id: spec for spec in load_tasks()}
    columns = {}
    for task in load_suite("ten").tasks:
        columns[task_info(known[task]).short] = known[task].published.column
    columns["Avg"] = "avg"
    script = """[...document.querySelectorAll('#published table')].flatMap(table => {
      const heads = [...table.querySelectorAll('thead tr:last-child th')].map(h => {
        const copy = h.cloneNode(true); copy.querySelectorAll('sup').forEach(s => s.remove());
        return copy.textContent; });
      return [...table.querySelectorAll('tbody tr')].filter(r => r.cells.length > 1).map(r =>
        Object.fromEntries([...r.cells].map((cell, at) => {
          const copy = cell.cloneNode(true); copy.querySelectorAll('sup').forEach(s => s.remove());
          return [heads[at], copy.textContent]; })));
    })"""
    rows = opened.page.evaluate(script)
    assert len(rows) == len(frame)
    for row in rows:
        same = frame[(frame["method"] == row["Method"]) & (frame["source"] == row["Source"])]
        texts = {title: row[title] for title in columns}
        assert any(_fits(record, columns, texts) for record in same.to_dict("records")), row


def _fits(record: dict[Any, Any], columns: dict[str, str], texts: dict[str, str]) -> bool:
    for title, column in columns.items():
        value = record.get(column)
        if value is None or value != value:
            if texts[title] != "–":
                return False
            continue
        scale = 20 if column == "mme" and "raw" in str(record.get("mme_unit")) else 1
        if texts[title] == "–" or abs(number(texts[title]) - float(value) / scale) > 0.0501:
            return False
    return True


def test_names_are_read_without_their_seeds() -> None:
    assert name_of("Switch-KD (2 seeds) (1)") == "Switch-KD"
