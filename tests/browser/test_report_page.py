"""The page in a real browser: it works, it is accessible, it asks the network for nothing."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kd_bench.report import render_report
from tests.support.report_store import Model, add_pictures, add_run, make_demo, samples

pytestmark = [pytest.mark.browser, pytest.mark.slow]

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
ATTACK = "<img src=x onerror=\"document.title='owned'\">"
FLIP = "A flip with <b>markup</b>"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    results = make_demo(folder, units=6, seeds=(0, 1))
    hostile = Model("hostile", "student", "", 0.2)
    frame = samples("textvqa", hostile, 6).assign(answer=ATTACK, question=FLIP, score=0.0)
    run = add_run(results, hostile, change={"textvqa": frame}, units=6)
    add_pictures(run, ("textvqa",), size=300)
    return render_report(results, folder / "report")


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have chromium: .ci/run installs it")
        pytest.skip("no chromium here")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Opened:
    """A page with everything that it complained about or asked for."""

    def __init__(self, browser, address: str, **options) -> None:  # type: ignore[no-untyped-def]
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(60_000)  # two busy cores are slow, not wrong
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)

    def close(self) -> None:
        assert self.complaints == []
        outside = [r for r in self.requests if not r.startswith(("file:", "data:"))]
        assert outside == []
        self.context.close()


@pytest.fixture
def opened(browser: object, page_path: Path) -> Iterator[Opened]:
    found = Opened(browser, page_path.as_uri(), viewport={"width": 1400, "height": 900})
    yield found
    found.close()


def column(opened: Opened, key: str) -> list[float]:
    """The visible numbers of one column in the order of the rows."""
    script = """key => {
      const heads = [...document.querySelectorAll('#board thead tr:last-child th')];
      const at = heads.findIndex(head => head.dataset.key === key);
      return [...document.querySelectorAll('#board tr[data-row]')]
        .filter(row => row.offsetParent !== null)
        .map(row => [...row.cells[at].querySelectorAll('.v')].find(v => v.offsetParent !== null))
        .map(v => v.dataset.value).filter(text => text !== '').map(Number);
    }"""
    return opened.page.evaluate(script, key)


def names(opened: Opened) -> list[str]:
    script = """[...document.querySelectorAll('#board tr[data-row]')]
      .filter(row => row.offsetParent !== null).map(row => row.querySelector('bdi').textContent)"""
    return opened.page.evaluate(script)


def test_sorting_goes_down_up_and_home(opened: Opened) -> None:
    home = names(opened)
    head = opened.page.locator('#board th[data-key="gqa"] button')
    head.click()
    down = column(opened, "gqa")
    assert down == sorted(down, reverse=True)
    assert opened.page.locator('#board th[aria-sort="descending"]').count() == 1
    head.click()
    assert column(opened, "gqa") == sorted(down)
    head.click()
    assert names(opened) == home
    assert opened.page.locator("#board th[aria-sort]").count() == 0


def test_cost_sorts_up_first_and_names_by_letter(opened: Opened) -> None:
    opened.page.locator('#board th[data-key="latency_ms"] button').click()
    values = column(opened, "latency_ms")
    assert values == sorted(values)
    opened.page.locator("#board th.name button").click()
    assert names(opened) == sorted(names(opened), key=str.lower)


def test_roles_filter_and_stay_filtered_when_sorted(opened: Opened) -> None:
    everyone = names(opened)
    opened.page.locator('input[name="role"][value="kd"]').uncheck()
    fewer = names(opened)
    assert set(fewer) < set(everyone)
    assert "Switch-KD" not in fewer
    opened.page.locator('#board th[data-key="average"] button').click()
    assert set(names(opened)) == set(fewer)
    opened.page.locator('input[name="role"][value="kd"]').check()
    assert set(names(opened)) == set(everyone)


def test_sft_rows_beside_the_floor_have_a_button_that_works(
    browser: object, tmp_path: Path
) -> None:
    for name, role, skill in (("a", "sft", 0.0), ("b", "sft", 0.2), ("c", "kd", 0.6)):
        add_run(tmp_path, Model(name, role, name, skill, 0), tasks=("gqa",), units=4)
    opened = Opened(browser, render_report(tmp_path, tmp_path / "page").as_uri())
    everyone = set(names(opened))
    for label, left in (("SFT (floor)", 2), ("SFT, not the floor", 1), ("Distilled students", 0)):
        opened.page.get_by_label(label, exact=True).uncheck()
        assert len(names(opened)) == left, label
    for button in opened.page.locator('input[name="role"]').all():
        button.check()
    assert set(names(opened)) == everyone == {"a", "b", "c"}
    opened.close()


def test_modes_switch_the_numbers(opened: Opened) -> None:
    scores = column(opened, "gqa")
    opened.page.locator('input[name="mode"][value="differences"]').check()
    differences = column(opened, "gqa")
    assert differences != scores
    assert "+" in opened.page.locator("#board").inner_text()
    opened.page.locator('input[name="mode"][value="retention"]').check()
    assert "%" in opened.page.locator("#board tbody td").nth(12).inner_text() or column(
        opened, "gqa"
    )
    opened.page.locator('input[name="mode"][value="scores"]').check()
    assert column(opened, "gqa") == scores


def test_a_number_tells_its_details_to_mouse_and_keyboard(opened: Opened) -> None:
    cell = opened.page.locator("#board .v.scores[data-tip]").first
    cell.hover()
    tip = opened.page.locator("#tip")
    tip.wait_for(state="visible")
    assert "samples" in tip.inner_text()
    assert "protocol" in tip.inner_text()
    opened.page.keyboard.press("Escape")
    assert not tip.is_visible()
    cell.focus()
    first = tip.inner_text()
    opened.page.keyboard.press("ArrowRight")
    assert tip.is_visible()
    assert tip.inner_text() != first


def test_samples_walk_by_arrow_keys_and_deep_links(
    opened: Opened, browser: object, page_path: Path
) -> None:
    page = opened.page
    assert "1 of" in page.locator("#place").inner_text()
    page.locator("#card").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#place").inner_text().startswith("2 of")
    where = page.locator("#card .where").inner_text()
    link = page.locator("#link").get_attribute("href")
    again = Opened(browser, page_path.as_uri() + link)
    assert again.page.locator("#card .where").inner_text() == where
    again.close()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#place").inner_text().startswith("1 of")


def test_samples_filter_by_benchmark_category_and_kind(opened: Opened) -> None:
    page = opened.page
    page.locator("#pick-task").select_option(label="MME")
    assert page.locator("#card .where").inner_text().startswith("MME / ")
    page.locator("#pick-category").select_option(index=1)
    category = page.locator("#pick-category").input_value()
    page.locator("#pick-kind").select_option("all")
    assert f"/ {category} /" in page.locator("#card .where").inner_text()
    page.locator("#pick-kind").select_option("fixed")
    marks = page.locator("#card tr.chosen .mark")
    if marks.count():
        assert [marks.nth(i).inner_text() for i in range(2)] == ["wrong", "right"]


def test_text_search_looks_into_questions_targets_and_answers(opened: Opened) -> None:
    page = opened.page
    page.locator("#pick-a").select_option(label="hostile")
    page.locator("#pick-kind").select_option("all")
    page.locator("#pick-text").fill("OF THE PICTURE 3")
    assert "of the picture 3" in page.locator("#card .question").inner_text()
    page.locator("#pick-text").fill("onerror")
    assert page.locator("#card tr.chosen .answer").first.inner_text() == ATTACK
    page.locator("#pick-text").fill("nobody says this")
    assert "No stored sample fits" in page.locator("#card").inner_text()


def test_the_address_keeps_the_filter(opened: Opened, browser: object) -> None:
    page = opened.page
    page.locator("#pick-a").select_option(label="hostile")
    page.locator("#pick-task").select_option(label="MME")
    page.locator("#pick-category").select_option("count")
    page.locator("#pick-kind").select_option("all")
    page.locator("#pick-text").fill("place & 1")
    page.locator("#pick-text").fill("place")
    page.locator("#next").click()
    where = page.locator("#card .where").inner_text()
    again = Opened(browser, page.url)
    for name in ("a", "b", "task", "category", "kind", "text"):
        mine, theirs = (p.locator(f"#pick-{name}").input_value() for p in (page, again.page))
        assert mine == theirs, name
    assert again.page.locator("#card .where").inner_text() == where
    assert again.page.locator("#place").inner_text() == page.locator("#place").inner_text()
    assert not again.page.locator("#missing").is_visible()
    again.close()


def test_a_link_to_a_sample_that_is_not_stored_says_so(browser: object, page_path: Path) -> None:
    opened = Opened(browser, page_path.as_uri() + "#sample=gqa/gqa-99999")
    missing = opened.page.locator("#missing")
    assert "gqa/gqa-99999 is not stored on this page" in missing.inner_text()
    assert "samples.parquet" in missing.inner_text()
    opened.page.locator("#pick-kind").select_option("all")
    assert not missing.is_visible()
    opened.close()


def test_what_a_model_says_stays_text(opened: Opened) -> None:
    page = opened.page
    page.locator("#pick-a").select_option(label="hostile")
    page.locator("#pick-task").select_option(label="TextVQA")
    page.locator("#pick-kind").select_option("all")
    answer = page.locator("#card tr.chosen .answer").first
    assert answer.inner_text() == ATTACK
    assert page.locator("#card img[onerror]").count() == 0
    assert page.title() != "owned"


def test_images_are_shown(opened: Opened) -> None:
    page = opened.page
    image = page.locator("#card img")
    image.wait_for()
    assert page.evaluate("document.querySelector('#card img').naturalWidth") > 0


def test_dark_mode_follows_the_system_and_the_button(browser: object, page_path: Path) -> None:
    opened = Opened(browser, page_path.as_uri(), color_scheme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = opened.page.evaluate(paper)
    opened.page.locator("#theme").click()
    light = opened.page.evaluate(paper)
    assert (dark, light) == ("rgb(22, 22, 21)", "rgb(255, 255, 255)")
    opened.close()


@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_overflows(browser: object, page_path: Path, width: int) -> None:
    opened = Opened(browser, page_path.as_uri(), viewport={"width": width, "height": 844})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    if width == 1400:
        hidden = (
            "(b => b.scrollWidth - b.clientWidth)(document.querySelector('#board').parentElement)"
        )
        assert opened.page.evaluate(hidden) <= 0
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390])
def test_axe_finds_nothing(browser: object, page_path: Path, scheme: str, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    opened = Opened(
        browser, page_path.as_uri(), color_scheme=scheme, viewport={"width": width, "height": 900}
    )
    opened.page.locator("#board .v[data-tip]").first.focus()
    opened.page.locator("#tip").wait_for(state="visible")
    found = axe.Axe().run(opened.page)
    violations = [
        (rule["id"], [node["target"] for node in rule["nodes"][:3]])
        for rule in found.response["violations"]
    ]
    assert violations == []
    opened.close()


def test_it_prints(browser: object, page_path: Path, tmp_path: Path) -> None:
    opened = Opened(browser, page_path.as_uri(), color_scheme="dark")
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)"
    )
    assert not opened.page.locator("#samples").is_visible()
    opened.page.pdf(path=tmp_path / "page.pdf", prefer_css_page_size=True)
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    opened.close()


def test_it_reads_without_javascript(browser: object, page_path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)  # type: ignore[attr-defined]
    page = context.new_page()
    page.goto(page_path.as_uri())
    assert "Switch-KD" in page.locator("#board").inner_text()
    assert not page.locator(".tools").is_visible()
    assert page.locator("noscript").count() == 1
    context.close()


def test_an_empty_report_opens(browser: object, tmp_path: Path) -> None:
    opened = Opened(browser, render_report(tmp_path, tmp_path / "out").as_uri())
    assert "No runs yet" in opened.page.locator("h1").inner_text()
    opened.close()


def test_a_broken_run_is_flagged(browser: object, tmp_path: Path) -> None:
    run = add_run(
        tmp_path, Model("half", "kd", "kl", 0.3, 0), tasks=("gqa",), planned=("gqa", "pope")
    )
    run.write_manifest(replace(run.manifest, status="partial"))
    opened = Opened(browser, render_report(tmp_path, tmp_path / "out").as_uri())
    flag = opened.page.locator("#board .flag")
    assert flag.inner_text() == "partial"
    flag.hover()
    assert "1 of 2 done" in opened.page.locator("#tip").inner_text()
    opened.close()
