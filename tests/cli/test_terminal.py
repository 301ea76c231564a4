"""Commands in odd surroundings: locales, readers that leave, signals, paths that cannot be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kd_bench.errors import ExitCode
from kd_bench.files import MARKER
from tests.support.report_store import Model, add_run, make_store, result, samples

SLOW_SIGNALS = [pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGHUP, signal.SIGINT)]
C_LOCALE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def kd_bench(*arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "kd_bench", *map(str, arguments)],
        capture_output=True,
        cwd=folder,
        check=False,
        env={**os.environ, "GITHUB_ACTIONS": "", **environment},
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that answered alike, and one that lost a lot."""
    folder = tmp_path_factory.mktemp("store") / "results" / "demo"
    models = [Model("one", "sft", "sft", 1.5, 0), Model("lost", "kd", "kl", -2.0, 0)]
    make_store(folder, models, units=40)
    return folder


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, C_LOCALE], ids=str)
@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "tasks list",
        "runs list",
        "runs show one",
        "report",
        "compare one lost",
        "nonsensé",
    ],
)
@pytest.mark.slow
def test_a_stream_without_unicode_gets_plain_forms(
    results: Path, tmp_path: Path, command: str, environment: dict[str, str]
) -> None:
    words = command.split()
    if words[0] in ("runs", "report", "compare"):
        words += ["--results", str(results)]
    done = kd_bench(*words, folder=tmp_path, **environment)
    assert done.returncode == (2 if command == "nonsensé" else 0), done.stderr
    assert (done.stdout + done.stderr).isascii()


def piped(command: str, folder: Path) -> list[int]:
    """Exit codes of `command | head -1`."""
    line = f"{sys.executable} -m kd_bench {command} | head -1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    shell = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=folder)
    assert "Traceback" not in shell.stderr
    assert "BrokenPipe" not in shell.stderr
    return int(shell.stdout)


@pytest.mark.slow
def test_a_reader_that_leaves_costs_nothing(results: Path, tmp_path: Path) -> None:
    assert piped(f"report --results {results}", tmp_path) == 0
    assert (tmp_path / "reports" / "latest" / "index.html").is_file()
    assert piped(f"runs show one --results {results}", tmp_path) == 0
    # A verdict is the verdict's, whoever listens.
    assert piped(f"check lost --against one --results {results}", tmp_path) == 1


@pytest.mark.parametrize("command, code", [("check lost --against one", 1), ("runs list", 5)])
@pytest.mark.slow
def test_a_full_output_costs_no_verdict(
    results: Path, tmp_path: Path, command: str, code: int
) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10));"
        f"sys.argv = {['kd-bench', *command.split(), '--results', str(results)]!r};"
        "from kd_bench.cli import main; main()"
    )
    with (tmp_path / "told").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, cwd=tmp_path
        )
    told = done.stderr.decode()
    assert done.returncode == code, told
    assert "Traceback" not in told
    assert told.count("error Standard output: ") == 1


def started(words: list[str], folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "kd_bench", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, stdout=pipe, stderr=pipe, cwd=folder, env=environment, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, *SLOW_SIGNALS])
@pytest.mark.slow
def test_a_signal_is_one_line_and_the_training_can_go_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = started(["train", "mini", "output=out", "steps=100000"], tmp_path)
    lineage = tmp_path / "out" / "lineage.json"
    end = time.monotonic() + 60
    while not lineage.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    try:
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()  # nothing of a failed test goes on
    assert process.returncode == 128 + number
    assert told.count("error ") == 1
    assert "the same command continues" in told
    assert '"interrupted"' in lineage.read_text(encoding="utf-8")


# --- paths that cannot be ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command, path",
    [
        ("report --results {store} --to /dev/null", "/dev/null"),
        ("report --results {store} --to file/x", "file"),
        ("report --results file", "file"),
        ("eval embedded:weights/student --results file", "file"),
        ("check one --against lost --results {store} --policy .", "."),
        ("runs baseline set a one --results file", "file"),
        ("train mini output=file", "file"),
        ("tasks fetch --to file", "file"),
    ],
)
@pytest.mark.slow
def test_a_path_that_cannot_be_is_named(
    results: Path, tmp_path: Path, command: str, path: str
) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    words = command.format(store=results).split()
    done = kd_bench(*words, folder=tmp_path, HF_HUB_OFFLINE="0")
    told = done.stderr.decode()
    assert done.returncode == ExitCode.USAGE, told
    assert path in told
    assert "Errno" not in told
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_a_full_disk_is_exit_5_with_the_path(results: Path, tmp_path: Path) -> None:
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
    run = f"sys.argv = ['kd-bench', 'report', '--results', {str(results)!r}]"
    script = f"{limited} {run}; from kd_bench.cli import main; main()"
    line = [sys.executable, "-c", script]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == ExitCode.INCOMPLETE
    assert "reports/latest/" in done.stderr
    assert "Make room" in done.stderr


# --- the report on odd folders -------------------------------------------------------------------


@pytest.mark.slow
def test_a_store_without_runs_is_refused_and_the_last_page_stays(
    results: Path, tmp_path: Path
) -> None:
    page = tmp_path / "reports" / "latest" / "index.html"
    assert kd_bench("report", "--results", results, folder=tmp_path).returncode == 0
    before = page.read_bytes()
    (tmp_path / "empty").mkdir()
    for words in (["--results", "nowhere"], ["--results", "empty"], []):
        done = kd_bench("report", *words, folder=tmp_path)
        assert done.returncode == ExitCode.USAGE
        assert b"kd-bench eval" in done.stderr
    assert page.read_bytes() == before


@pytest.mark.slow
def test_runs_that_lie_elsewhere_are_named(results: Path, tmp_path: Path) -> None:
    for folder, hint in ((results.parents[1], "results/demo"), (results.parent, "demo")):
        done = kd_bench("report", "--to", tmp_path, folder=folder)
        assert done.returncode == ExitCode.USAGE
        assert f"--results {hint}" in done.stderr.decode()


@pytest.mark.slow
def test_a_page_of_damaged_runs_only_is_refused(tmp_path: Path) -> None:
    run = add_run(tmp_path / "results", Model("half", "kd", "kl", 0.3, 0), tasks=("gqa",))
    (run.path / "manifest.json").write_text("{", encoding="utf-8")
    done = kd_bench("report", folder=tmp_path)
    assert done.returncode in (ExitCode.USAGE, ExitCode.INCOMPLETE)
    assert b"fsck" in done.stderr
    assert not (tmp_path / "reports").exists()


@pytest.mark.slow
def test_the_report_works_from_inside_the_store(results: Path, tmp_path: Path) -> None:
    run = next((results / "runs").glob("*-one-*"))
    for folder, words in (
        (results / "runs", ["--results", ".."]),
        (results / "runs", [run.name, "--results", ".."]),
        (run, ["."]),
        (run / "tasks", [".."]),
        (run, [".", "--results", "../.."]),
    ):
        done = kd_bench("report", *words, "--to", tmp_path, folder=folder)
        assert done.returncode == 0, done.stderr


def test_no_page_lies_among_the_runs(results: Path, tmp_path: Path) -> None:
    before = sorted((results / "runs").rglob("*"))
    (tmp_path / "link").symlink_to(results / "runs")
    run = next((results / "runs").glob("*-one-*"))
    for to in (results / "runs", results / "runs" / "page", run / "page", tmp_path / "link" / "x"):
        done = kd_bench("report", "--results", results, "--to", to, folder=tmp_path)
        assert done.returncode == ExitCode.USAGE
        assert b"holds runs" in done.stderr
    assert sorted((results / "runs").rglob("*")) == before


# --- only what kd-bench made is replaced ---------------------------------------------------------


@pytest.mark.slow
def test_somebodys_own_page_stays(results: Path, tmp_path: Path) -> None:
    for name in ("index.html", "leaderboard.csv", "plots/radar.svg"):
        mine = tmp_path / name.replace("/", "-") / name
        mine.parent.mkdir(parents=True)
        mine.write_text("mine", encoding="utf-8")
        folder = tmp_path / name.replace("/", "-")
        done = kd_bench("report", "--results", results, "--to", folder, folder=tmp_path)
        assert done.returncode == ExitCode.USAGE
        assert name in done.stderr.decode()
        assert mine.read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_a_page_from_before_folders_were_marked_is_ours(results: Path, tmp_path: Path) -> None:
    words = ("report", "--results", results, "--to", "page")
    assert kd_bench(*words, folder=tmp_path).returncode == 0
    (tmp_path / "page" / MARKER).unlink()
    assert kd_bench(*words, folder=tmp_path).returncode == 0
    assert (tmp_path / "page" / MARKER).is_file()


# --- every ending of the gate writes its files ---------------------------------------------------


@pytest.mark.parametrize(
    "against, code, tag",
    [("one", 1, "failure"), ("nobody", 2, "error"), ("other", 4, "error"), ("half", 5, "error")],
)
@pytest.mark.slow
def test_every_ending_of_the_gate_is_written(
    tmp_path: Path, against: str, code: int, tag: str
) -> None:
    store = tmp_path / "results"
    models = [Model("one", "sft", "sft", 1.5, 0), Model("lost", "kd", "kl", -2.0, 0)]
    make_store(store, models, units=40)
    model = Model("other", "kd", "kl", 0.0)
    frame = samples("gqa", model, units=40)
    add_run(store, model, units=40).commit(result("gqa", frame, "another protocol"), frame)
    add_run(store, Model("half", "kd", "kl", 0.0), tasks=("gqa",), units=40)
    half = next((store / "runs").glob("*-half-*/tasks/gqa.json"))
    half.write_text("{", encoding="utf-8")
    options = ("--junit", "new/junit.xml", "--summary", "new/er/summary.md")
    done = kd_bench("check", "lost", "--against", against, *options, folder=tmp_path,
                    GITHUB_ACTIONS="true")  # fmt: skip
    assert done.returncode == code, done.stderr
    suite = ElementTree.parse(tmp_path / "new" / "junit.xml").getroot()
    assert suite.findall(f"testcase/{tag}")
    told = (tmp_path / "new" / "er" / "summary.md").read_text(encoding="utf-8")
    assert told.startswith("### kd-bench check: ")
    assert b"::error " in done.stderr


@pytest.mark.slow
def test_a_verdict_outlives_a_summary_that_cannot_be_written(results: Path, tmp_path: Path) -> None:
    words = ("check", "--results", results, "--summary", "/dev/null/summary.md", "--against")
    done = kd_bench(*words[:1], "lost", *words[1:], "one", folder=tmp_path)
    assert done.returncode == ExitCode.REGRESSION
    assert b"/dev/null/summary.md" in done.stderr
