"""The workflow in the docs, run as far as it goes without GitHub: its own scripts, a real store."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from kd_bench.config import parse_yaml
from tests.compare.test_compare import samples
from tests.statistics.simulate import small_frames, write_run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "kd-bench-check.yml"
WORKFLOW: dict[Any, Any] = parse_yaml(EXAMPLE.read_text())
JOB = WORKFLOW["jobs"]["check"]
STEPS = {step.get("name", step.get("uses")): step for step in JOB["steps"]}


def run_step(
    name: str, folder: Path, **variables: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """A step's script under GitHub's bash and variables; its process and the job summary."""
    summary = folder / "summary.md"
    environment = {
        **{key: value for key, value in JOB["env"].items() if "${{" not in value},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder), "GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary),
        "OMP_NUM_THREADS": "1", **variables,
    }  # fmt: skip
    process = subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[name]["run"]],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return process, summary.read_text() if summary.exists() else ""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a baseline and three candidates in results/."""
    folder = tmp_path_factory.mktemp("repository")
    results = folder / "results"
    good = [1.0, 0.0] * 300
    students = {
        "baseline": good,
        "same": good,
        "worse": [1.0, 0.0] * 200 + [0.0] * 200,
        "unsure": [0.0, 1.0] * 150 + [1.0, 0.0] * 150,
    }
    for name, scores in students.items():
        run = write_run(results, name, {"mmmu": samples("mmmu", scores)})
        if name == "baseline":
            (results / "baselines.yaml").write_text(f"ten: {run.path.name}\n")
    return folder


def test_the_workflow_has_what_github_needs() -> None:
    assert set(WORKFLOW["on"]) == {"workflow_dispatch"}
    assert WORKFLOW["permissions"] == {"contents": "read"}
    for step in JOB["steps"]:
        assert ("run" in step) != ("uses" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step["uses"])


def test_no_input_is_pasted_into_a_script() -> None:
    assert not any("${{" in step.get("run", "") for step in JOB["steps"])


def test_the_install_step_needs_no_extra() -> None:
    assert STEPS["Install"]["run"] == 'python -m pip install "$KD_BENCH"'
    assert JOB["env"]["KD_BENCH"].startswith("kd-bench @ git+"), "it is on no package index"


@pytest.mark.parametrize(
    "candidate, code, level", [("same", 0, None), ("worse", 1, "error"), ("unsure", 3, "warning")]
)
@pytest.mark.slow
def test_the_check_step(repository: Path, candidate: str, code: int, level: str | None) -> None:
    process, summary = run_step("Check", repository, CANDIDATE=candidate, BASELINE="")
    assert process.returncode == code, process.stderr
    assert summary.count("### kd-bench check") >= 1
    annotations = [line for line in process.stderr.splitlines() if line.startswith("::")]
    if level is None:
        assert annotations == []
    else:
        assert annotations[0].startswith(f"::{level} title=kd-bench check%3A mmmu::mmmu")
    root = ET.parse(repository / "kd-bench-junit.xml").getroot()
    assert int(root.get("failures", "-1")) == (2 if code == 1 else 0)
    (repository / "summary.md").unlink()


@pytest.mark.slow
def test_an_undecided_check_may_pass(repository: Path) -> None:
    process, _ = run_step(
        "Check", repository, CANDIDATE="unsure", BASELINE="baseline", ON_INCONCLUSIVE="pass"
    )
    assert process.returncode == 0
    process, _ = run_step(
        "Check", repository, CANDIDATE="worse", BASELINE="baseline", ON_INCONCLUSIVE="pass"
    )
    assert process.returncode == 1


@pytest.mark.slow
def test_a_name_cannot_become_a_command(repository: Path) -> None:
    process, _ = run_step("Check", repository, CANDIDATE="$(touch owned); touch owned", BASELINE="")
    assert process.returncode == 2
    assert "No run named" in process.stderr
    assert not (repository / "owned").exists()


@pytest.mark.slow
def test_a_whole_suite(tmp_path: Path) -> None:
    one, other = small_frames(seed=4, rho=0.999, shrink=10)
    write_run(tmp_path / "results", "old", one)
    write_run(tmp_path / "results", "new", other)
    process, summary = run_step("Check", tmp_path, CANDIDATE="new", BASELINE="old")
    assert process.returncode in (0, 3), process.stderr
    assert summary.count("\n| ") == 12  # header, ten benchmarks, average


def test_the_page_about_it_names_every_exit_code() -> None:
    page = (ROOT / "docs" / "github-actions.md").read_text()
    for code in ("| 0 |", "| 1 |", "| 3 |", "| 2, 4, 5 |"):
        assert code in page
    for name in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / name).resolve().exists(), name
