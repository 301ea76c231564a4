"""What doctor says about real, missing, wrong and broken packages; and its self-test."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kd_bench.doctor import Package, folders, packages, self_test
from kd_bench.errors import ExitCode

ROOT = Path(__file__).parents[2]


def install(folder: Path, name: str, version: str, code: str = "") -> None:
    """A package that shadows the installed one in processes that look into `folder` first."""
    information = folder / f"{name}-{version}.dist-info"
    information.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    (information / "METADATA").write_text(text)
    (folder / f"{name.replace('-', '_')}.py").write_text(code)


def doctor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kd_bench", "doctor", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_every_package_of_pyproject_is_named_with_the_smallest_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {each.name.replace(".", "-"): each for each in packages()}
    lists = {"": project["dependencies"], **project["optional-dependencies"]}
    for extra in ("", "train", "eval", "all"):
        for line in lists[extra]:
            if not line.startswith("kd-bench["):
                name = re.split("[<>=;]", line)[0].strip().replace(".", "-")
                assert found[name].extra == extra, line
    assert "pytest" not in found, "developers' tools are not a user's concern"
    assert [each for each in found.values() if each.problem] == []


def test_the_install_line_names_the_extra() -> None:
    assert Package("torch", "", ">=2.6", "train").install == 'pip install "kd-bench[train]"'
    assert Package("rich", "", ">=13", "").install == "pip install kd-bench"


@pytest.mark.parametrize(
    "name, version, problem",
    [
        ("peft", "0.1", "peft 0.1 is installed, <1,>=0.17 is needed"),
        ("rich", "1.0", "rich 1.0 is installed, >=13.7 is needed"),
        ("torch", "2.15.0+cpu", ""),
        ("torch", "99.0", "torch 99.0 is installed, <3,>=2.6 is needed"),
    ],
)
def test_versions_that_do_not_fit(
    name: str, version: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, name, version)
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = [each for each in packages() if each.name == name]
    assert (found.version, found.problem) == (version, problem)


def test_folders_name_the_caches_and_whether_they_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    environment = {
        "KD_BENCH_CACHE": str(tmp_path / "file" / "cache"),
        "HF_HOME": str(tmp_path / "hub" / "deep"),
        "HF_HUB_OFFLINE": "1",
    }
    found = {each.title: each for each in folders(environment)}
    world = found["embedded world"]
    assert (world.writable, world.note) == (False, "drawn on first use")
    hub = found["Hugging Face"]
    assert (hub.writable, hub.note) == (True, "HF_HUB_OFFLINE is set")
    assert hub.path == tmp_path / "hub" / "deep"
    assert not hub.path.exists(), "looking makes nothing"
    assert hub.free_bytes > 0


@pytest.mark.slow
def test_what_cannot_run_is_skipped_and_named(tmp_path: Path) -> None:
    bare = [Package("torch", "", ">=2.6", "train"), Package("lmms-eval", "", "==0.7.3", "eval")]
    steps = list(self_test(bare, tmp_path))
    assert [(step.name, step.state) for step in steps] == [
        ("train", "skipped"), ("eval", "skipped"), ("report", "works"),
    ]  # fmt: skip
    assert steps[0].reason == 'torch is missing: pip install "kd-bench[train]"'
    assert steps[1].reason.endswith('pip install "kd-bench[eval]"')


@pytest.mark.slow
def test_a_broken_package_is_named_and_the_exit_code_says_so(tmp_path: Path) -> None:
    install(tmp_path, "torchvision", "0.29.2", "raise ImportError('operator nms does not exist')")
    done = doctor(tmp_path)
    assert done.returncode == ExitCode.INCOMPLETE, done.stdout
    problem = "torchvision 0.29.2 does not load: ImportError: operator nms does not exist"
    assert f"problem {problem}" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_self_test_works_here_and_leaves_nothing(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--self-test")
    assert done.returncode == ExitCode.PASS, done.stdout + done.stderr
    for name in ("train", "eval", "report"):
        assert f"{name:<8} works" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_self_test_says_what_does_not_work(tmp_path: Path) -> None:
    install(tmp_path, "peft", "0.21.2")  # loads, and holds nothing
    (tmp_path / "pandas.py").write_text("raise RuntimeError('half installed')")
    done = doctor(tmp_path, "--self-test")
    assert done.returncode == ExitCode.INCOMPLETE
    assert "half installed" in done.stdout


@pytest.mark.slow
def test_what_the_engine_imports_is_imported_and_the_line_that_mends_it_is_printed(
    tmp_path: Path,
) -> None:
    """As filelock 4.3 did: the package loads, and what lmms-eval imports of it is gone."""
    import filelock

    install(tmp_path, "filelock", "4.3.1")
    (tmp_path / "filelock.py").unlink()
    folder = Path(shutil.copytree(Path(filelock.__file__).parent, tmp_path / "filelock"))
    (folder / "_api.py").rename(folder / "_core.py")
    for file in folder.glob("*.py"):
        text = file.read_text()
        file.write_text(text.replace("._api", "._core").replace("filelock._api", "filelock._core"))
    done = doctor(tmp_path)
    assert done.returncode == ExitCode.INCOMPLETE, done.stdout
    assert "problem filelock 4.3.1 is installed, <4.3,>=3.13 is needed" in done.stdout
    assert "problem `kd-bench eval` does not load" in done.stdout
    assert "No module named 'filelock._api'" in done.stdout
    assert 'mend it pip install "filelock<4.3,>=3.13"' in done.stdout
    assert "No problem found" not in done.stdout
