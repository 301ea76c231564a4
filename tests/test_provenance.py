"""Where a number came from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import kd_bench
from kd_bench import provenance


def git(folder, *arguments):
    subprocess.run(
        ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def repository(tmp_path):
    package = tmp_path / "kd_bench"
    package.mkdir()
    (package / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    return package


def test_its_own_repository_gives_commit_and_dirty_flag(repository):
    clean = provenance.code_version(repository)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (repository / "__init__.py").write_text("changed = True\n")
    assert provenance.code_version(repository) == {**clean, "dirty": True}


def test_somebody_elses_repository_around_it_is_not_its_own(repository):
    inside = repository.parent / ".venv" / "site-packages" / "kd_bench"
    inside.mkdir(parents=True)
    assert provenance.code_version(inside) == {
        "version": kd_bench.__version__,
        "commit": None,
        "dirty": None,
    }


def test_everything_is_ready_for_json():
    found = provenance.collect(seed=3, command=["kd-bench", "train"])
    assert json.loads(json.dumps(found)) == found
    assert found["seed"] == 3
    assert found["command"] == ["kd-bench", "train"]
    assert found["hardware"]["cores"] >= 1
    assert found["versions"]["numpy"]
    assert "no-such-package" not in provenance.versions(["no-such-package"])


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from kd_bench import provenance; provenance.collect();"
        "print([m for m in ('torch', 'transformers', 'numpy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout.strip() == "[]"
