"""The benchmark for a GPU runs: here with tiny shapes, on a CPU, without lmms-eval."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.torchrun import ROOT

RUN = "import sys; sys.modules['lmms_eval'] = None; from tests.benchmarks.accelerator import main; "


def test_every_figure_is_measured_or_says_why_not(tmp_path: Path) -> None:
    told = tmp_path / "figures.json"
    line = [sys.executable, "-c", f"{RUN} main(['--tiny', '--json', {str(told)!r}])"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = {each["name"]: each["ours"] for each in json.loads(told.read_text())["figures"]}
    assert not [ours for ours in figures.values() if ours.startswith("failed")]
    for method in ("sft", "kl", "switch-kd"):
        assert any(name.startswith(f"a step of {method},") for name in figures)
    assert sum(name.startswith("answers/s") for name in figures) == 4
    assert sum(name.startswith("answers unlike") for name in figures) == 1
