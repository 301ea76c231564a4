"""The whole product once, small, by its own commands: train -> eval -> report -> check."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_bench.errors import ExitCode

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).parents[2] / "tasks" / "policy.yaml"


def kd_bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "kd_bench", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two students trained for a few steps and evaluated on three benchmarks."""
    folder = tmp_path_factory.mktemp("project")
    for method in ("sft", "switch-kd"):
        settings = (f"method={method}", "steps=6", "batch_size=8", f"output=checkpoints/{method}")
        done = kd_bench(folder, "train", "mini", *settings)
        assert done.returncode == ExitCode.PASS, done.stderr
    checkpoints = ("checkpoints/sft/final", "checkpoints/switch-kd/final")
    done = kd_bench(folder, "eval", *checkpoints, "--tasks", "mme,gqa,pope", "--limit", "60")
    assert done.returncode == ExitCode.PASS, done.stderr
    return folder


def test_training_leaves_checkpoint_recipe_log_and_lineage(project: Path) -> None:
    folder = project / "checkpoints" / "switch-kd"
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert {"ce", "align", "switch"} <= set(lines[-1]["terms"])
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["method"] == "switch-kd"
    assert (folder / "recipe.yaml").exists()
    assert (folder / "final" / "model.safetensors").exists()


def test_the_same_eval_command_computes_nothing_again(project: Path) -> None:
    journals = sorted(project.glob("results/runs/*/journal/*.jsonl"))
    before = [path.read_bytes() for path in journals]
    assert before
    done = kd_bench(
        project, "eval", "checkpoints/sft/final", "--tasks", "mme,gqa,pope", "--limit", "60"
    )
    assert done.returncode == ExitCode.PASS, done.stderr
    assert [path.read_bytes() for path in journals] == before


def test_report_and_check_read_what_eval_wrote(project: Path) -> None:
    done = kd_bench(project, "report", "--to", "page")
    assert done.returncode == ExitCode.PASS, done.stderr
    page = (project / "page" / "index.html").read_text()
    assert "mini world" in page
    runs = kd_bench(project, "runs", "list").stdout
    assert runs.count("complete") == 2
    names = [path.parent.name for path in sorted(project.glob("results/runs/*/manifest.json"))]
    done = kd_bench(project, "check", names[0], "--against", names[0])
    assert done.returncode == ExitCode.USAGE, "a run says nothing about itself"
    done = kd_bench(project, "check", names[1], "--against", names[0])
    assert done.returncode == ExitCode.NOT_COMPARABLE, "three of ten benchmarks are no suite"
    policy = project / "policy.yaml"
    policy.write_text(f"{SHIPPED.read_text(encoding='utf-8')}\nbenchmarks: [mme, gqa, pope]\n")
    options = ("--against", names[0], "--policy", "policy.yaml")
    done = kd_bench(project, "check", names[1], *options)
    allowed = (ExitCode.PASS, ExitCode.REGRESSION, ExitCode.INCONCLUSIVE)
    assert done.returncode in allowed, done.stderr
    done = kd_bench(project, "compare", *names, "--json")
    assert len(json.loads(done.stdout)["tasks"]) == 3


def test_a_partial_run_is_refused_by_check(project: Path) -> None:
    done = kd_bench(project, "check", "nobody")
    assert done.returncode == ExitCode.USAGE
