"""The store in the tree, and the page in the tree that is rendered from it."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import kd_bench
from kd_bench.report import render_report
from kd_bench.store.damage import examine

ROOT = Path(__file__).parents[2]
STORE, PAGE = ROOT / "results" / "example", ROOT / "reports" / "example"
DRAWN_BY = ("matplotlib", "pyarrow", "pillow", "numpy", "scipy")
"""Whose versions decide bytes."""


def pinned() -> bool:
    """Whether what draws the page is what drew it."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return all(f"{name}=={version(name)}" in lines for name in DRAWN_BY)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_the_store_is_sound_whole_and_small():
    assert [finding for finding in examine(STORE) if finding.open] == []
    runs = kd_bench.load_runs(STORE)
    assert len(runs) == 21
    assert (runs.why_not == "").all()
    assert sum(map(len, files(STORE).values())) < 3.0e6


@pytest.mark.slow
def test_the_page_in_the_tree_is_the_one_that_the_store_gives(tmp_path):
    """After a change that is meant: `make example`, and look at the difference."""
    render_report(STORE, tmp_path / "page")
    expected, found = files(PAGE), files(tmp_path / "page")
    assert found.keys() == expected.keys()
    if not pinned():
        pytest.skip("bytes are those of the pinned versions")
    changed = [name for name in expected if found[name] != expected[name]]
    assert changed == []


def test_nothing_in_the_store_names_a_place_on_the_machine_that_made_it():
    for name, data in files(STORE).items():
        if name.endswith((".json", ".jsonl")):
            assert b'"/' not in data, name


def test_git_keeps_the_store_and_ignores_what_users_add():
    def ignored(path: str) -> bool:
        done = subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT)
        return done.returncode == 0

    if not (ROOT / ".git").exists():
        pytest.skip("no repository")
    assert ignored("results/runs/20260101-x/manifest.json")
    assert ignored("results/demo/runs")
    assert not ignored("results/README.md")
    assert not ignored("results/example/runs/20260101-x/manifest.json")


@pytest.mark.slow
def test_the_readmes_commands_work_as_typed(tmp_path):
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    blocks = [part.partition("```")[0] for part in text.split("```sh\n")[1:]]
    commands = [line for block in blocks for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        words = command.replace("results/example", str(STORE)).split()[1:]
        words = [str(tmp_path / word) if word.startswith("reports/") else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "kd_bench", *words], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode in (0, 1, 3), f"{command}: {done.stderr}"
        assert (done.returncode != 0) <= ("check" in command)
