"""What README and docs say of the demo is what the example store gives."""

import json
from typing import Any

import pytest

from tests.docs.blocks import ROOT

STORE = ROOT / "results" / "example"


def rows() -> dict[str, dict[str, Any]]:
    """Average and difference from SFT of each row of the example's leaderboard."""
    page = json.loads((ROOT / "reports" / "example" / "leaderboard.json").read_text("utf-8"))
    return {row["cells"]["model"]["value"]: row["cells"] for row in page["tables"][0]["rows"]}


def told(cell: dict[str, Any]) -> str:
    interval = cell["interval"]
    return f"{cell['value']:+.1f} ({interval['low']:+.1f} to {interval['high']:+.1f})"


@pytest.mark.parametrize("page", ["README.md", "docs/study.md"])
def test_the_demos_table(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = rows()
    names = {"KL": "KL", "Switch-KD": "Switch-KD", "hybrid": "vision before the teacher's"}
    for name, cells in found.items():
        score = f"{cells['average']['value']:.1f}"
        assert score in text, name
        if "SFT" in name or "teacher" in name:
            continue
        label = names["hybrid" if "hybrid" in name else name.partition(" (")[0]]
        line = next(line for line in text.split("\n") if label in line and f"| {score} |" in line)
        assert told(cells["difference"]) in line


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/study.md", "docs/method.md"])
def test_the_demos_last_question(page: str) -> None:
    """Switch-KD against KL."""
    import kd_bench

    frame = kd_bench.compare("kl", "switch-kd", methods=True, results=STORE).to_frame()
    row = frame[frame.task == "average"].iloc[0]
    text = (ROOT / page).read_text(encoding="utf-8")
    both = f"{row.difference:+.1f}", f"{row.low:+.1f} to {row.high:+.1f}"
    assert f"{both[0]} ({both[1]})" in text or f"({both[0]}, {both[1]})" in text


@pytest.mark.slow
def test_what_a_demo_of_three_seeds_says() -> None:
    """`make demo` has the first three of the example's seeds."""
    from kd_bench.compare.methods import compare_methods, runs_of_method

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    first = {method: runs_of_method(STORE, method)[:3] for method in ("sft", "kl", "switch-kd")}
    kl, switch_kd, between = (
        compare_methods(first[floor], first[method])["average"]
        for floor, method in (("sft", "kl"), ("sft", "switch-kd"), ("kl", "switch-kd"))
    )
    assert f"KL is {kl.value:.1f} and Switch-KD {switch_kd.value:.1f} above SFT" in text
    assert between.interval is not None
    ends = f"{between.interval.low:+.1f} to {between.interval.high:+.1f}"
    assert f"({between.value:+.1f} apart, {ends})" in text


@pytest.mark.parametrize("name", ["map", "arms"])
def test_the_studys_tables(name: str) -> None:
    """The page has what `kd-bench demo --study` wrote, row by row."""
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").split("\n")
    written = (ROOT / "reports" / "study" / f"{name}.md").read_text(encoding="utf-8")
    rows = [line for line in written.split("\n") if line.startswith("|")]
    assert len(rows) > 10
    assert not set(rows) - set(page)
