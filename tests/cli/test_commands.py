"""Commands in this process, by the same entry point: what they print, their exit codes."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kd_bench.errors import ExitCode
from kd_bench.store import list_runs, set_baseline
from tests.cli.conftest import Call
from tests.compare.test_compare import samples
from tests.evals.test_data import hub  # noqa: F401  # a fixture
from tests.statistics.simulate import write_run
from tests.support.golden_rows import ROWS, write_rows

# --- the command line itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["evl"], "No such command 'evl'. Did you mean 'eval'? `kd-bench --help`"),
        (["runs", "fsk"], "Did you mean 'fsck'? `kd-bench runs --help`"),
        (["eval", "--nosuch"], "No such option: --nosuch"),
        (["eval", "a", "--limit", "x"], "'--limit'"),
        (["check"], "`kd-bench check --help` shows what it takes."),
        (["eval"], "No model to evaluate. Name checkpoints, or --model"),
        (["eval", "a", "--model", "b"], "CHECKPOINT and --model do not go together"),
        (["eval", "--vision", "a"], "--vision and --language belong together"),
        (["eval", "a", "--vision", "a", "--language", "b"], "CHECKPOINT and --vision do not go"),
        (["eval", "a", "--model-args", "x=1"], "--model-args without --model"),
        (["eval", "a", "b", "--name", "c"], "--name names one model"),
        (["eval", "a", "b", "--seed", "1"], "--seed is of one model"),
        (["eval", "--vision", "a", "--language", "b", "--role", "kd"], "--role is fixed"),
        (["eval", "--vision", "a", "--language", "b", "--method", "x"], "--method is read from"),
        (["eval", "--model", "a", "--dtype", "float16"], "--dtype goes into --model-args"),
        (["eval", "a", "--profile", "textvqa"], "None of the benchmarks has a profile 'textvqa'"),
        (["eval", "a", "--profile", "textvqa=ocrr"], "Did you mean 'ocr'?"),
        (["eval", "a", "--profile", "textvqq=ocr"], "Did you mean 'textvqa'?"),
        (["eval", "a", "--tasks", "gqa", "--profile", "textvqa=ocr"], "not among the chosen"),
        (["eval", "a", "--profile", "pope=llava,pope=accuracy"], "both llava and accuracy"),
        (["report", "--training", "a", "--suite", "mini"], "plots training folders only"),
        (["tasks", "fetch", "--suite", "mini"], "comes with kd-bench"),
        (["tasks", "fetch", "--suite", "tenn"], "Did you mean 'ten'?"),
        (["tasks", "verify", "nowhere"], "There is no folder nowhere"),
        (["tasks", "show", "textvqa", "--profile", "x"], "textvqa has no profile 'x'"),
        (["runs", "import", "nowhere"], "There is no nowhere"),
        (["runs", "import", ".", "--role", "sftt"], "Did you mean 'sft'?"),
        (["runs", "import", "."], "holds no *_results.json"),
        (["runs", "fsck", "--results", "nowhere"], "There is no folder nowhere"),
    ],
)
@pytest.mark.slow
def test_bad_input_is_one_line_and_exit_2(
    call: Call,
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    told = call(*arguments)
    assert told.code == ExitCode.USAGE
    assert expected in told.err
    assert told.err.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is written for a command that is refused"


def test_a_bare_group_shows_its_help(call: Call) -> None:
    told = call("runs")
    assert told.code == ExitCode.USAGE
    assert "fsck" in told.out
    assert told.err == ""


def test_an_interrupt_says_that_what_was_done_is_kept(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_bench.store.catalogue", interrupted)
    told = call("runs", "list")
    assert told.code == 130
    assert told.err == "error Interrupted. What was done is kept; the same command continues.\n"


# --- the light install -----------------------------------------------------------------------

LIGHT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from kd_bench.cli import main
main()
"""
EXTRAS = ("torch", "torchvision", "transformers", "lmms_eval", "datasets", "huggingface_hub",
          "accelerate", "peft", "safetensors", "tokenizers")  # fmt: skip


def light(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-c", LIGHT % (EXTRAS,), *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "arguments, extra",
    [
        (["train"], "train"),
        (["tasks", "fetch"], "train"),
        (["eval", "embedded:weights/student"], "eval"),
        (["tasks", "validate"], "eval"),
    ],
)
@pytest.mark.slow
def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(
    arguments: list[str], extra: str, tmp_path: Path
) -> None:
    done = light(*arguments, folder=tmp_path)
    assert done.returncode == ExitCode.USAGE
    command = " ".join(arguments[:2] if arguments[0] == "tasks" else arguments[:1])
    assert f"`kd-bench {command}` needs the package" in done.stderr
    assert f'pip install "kd-bench[{extra}]"' in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_tasks_show_on_the_light_install_shows_the_entry(tmp_path: Path) -> None:
    done = light("tasks", "show", "gqa", folder=tmp_path)
    assert done.returncode == ExitCode.PASS
    assert done.stdout.startswith("id: gqa")
    assert done.stderr == (
        "A document's prompt needs lmms-eval. "
        'Install it with: pip install "kd-bench[eval]"\n'
    )  # fmt: skip


@pytest.mark.slow
def test_verify_and_fsck_need_no_extra(tmp_path: Path) -> None:
    write_rows(tmp_path, "pope", ROWS["pope"])
    done = light("tasks", "verify", ".", "--tasks", "pope", "--subset", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "pope: 6 documents, 1 images\n")
    done = light("runs", "fsck", "--results", ".", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "0 runs examined, nothing to do.\n")


# --- tasks -----------------------------------------------------------------------------------


def test_show_renders_a_document_and_writes_its_picture(call: Call, tmp_path: Path) -> None:
    from PIL import Image

    write_rows(tmp_path, "pope", ROWS["pope"])
    told = call("tasks", "show", "pope", "--data", tmp_path, "--images", tmp_path / "out")
    assert told.code == ExitCode.PASS, told.err
    assert "upstream: pope" in told.out
    assert f"Document 0 of {tmp_path}, profile pooled-f1:\n\n" in told.out
    assert "Answer the question using a single word or phrase." in told.out
    (line,) = [line for line in told.out.splitlines() if line.startswith("image: ")]
    with Image.open(line.removeprefix("image: ")) as picture:
        assert picture.width > 0


def test_show_keeps_a_strangers_escapes_off_the_terminal(call: Call, tmp_path: Path) -> None:
    row = {**ROWS["pope"][0], "question": "Is \x1b[2J there?"}
    write_rows(tmp_path, "pope", [row])
    told = call("tasks", "show", "pope", "--data", tmp_path, "--images", tmp_path / "out")
    assert "there?" in told.out
    assert "\x1b[2J" not in told.out


def test_verify_lists_problems_and_exits_5(call: Call, tmp_path: Path) -> None:
    write_rows(tmp_path, "pope", ROWS["pope"])
    told = call("tasks", "verify", tmp_path, "--tasks", "pope,mme")
    assert told.code == ExitCode.INCOMPLETE
    assert "6 documents, 9000 expected" in told.out
    assert "has no mme/test-*.parquet" in told.out


def test_validate_names_what_does_not_fit(call: Call, tmp_path: Path) -> None:
    from kd_bench.registry import tasks_folder

    text = (tasks_folder() / "pope.yaml").read_text()
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("id: pope", "id: mine").replace("pope_f1_score", "pope_f1_scor"))
    told = call("tasks", "validate", "pope", mine)
    assert told.code == ExitCode.USAGE
    assert told.out.startswith("pope: fits\n")
    assert "mine.yaml: does not fit" in told.out
    assert "Did you mean 'pope_f1_score'?" in told.out


@pytest.mark.slow
def test_fetch_then_verify(hub: str, tmp_path: Path) -> None:  # noqa: F811
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {
        **clean, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip

    def tasks(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kd_bench", "tasks", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = tasks("fetch", "--tasks", "pope,gqa", "--to", "here")
    assert done.returncode == ExitCode.PASS, done.stderr
    assert done.stdout.endswith("Check it with: kd-bench tasks verify here\n")
    done = tasks("verify", "here", "--tasks", "pope,gqa", "--subset")
    assert done.returncode == ExitCode.PASS, done.stdout
    assert done.stdout.startswith("pope: 6 documents, 1 images, revision ")
    done = tasks("fetch", "--tasks", "mme", "--to", "here")
    assert done.returncode == ExitCode.INCOMPLETE
    assert done.stderr.startswith("error mme: ")
    assert done.stderr.count("\n") == 1


# --- eval ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for task in ("textvqa", "pope"):
        write_rows(folder, task, ROWS[task])
    return folder


def test_a_stock_model_with_a_profile(call: Call, data: Path, tmp_path: Path) -> None:
    told = call(
        "eval", "--model", "dummy", "--model-args", "response=yes", "--name", "says-yes",
        "--tasks", "textvqa,pope", "--profile", "textvqa=ocr,pope=accuracy", "--seed", 3,
        "--method", "none", "--role", "sft", "--data", data, "--results", tmp_path,
    )  # fmt: skip
    assert told.code == ExitCode.PASS, told.err
    (run,) = list_runs(tmp_path)
    assert f"Run: {run.path} (complete)" in told.out
    model = run.manifest.model
    assert (model.name, model.seed, model.method, model.role) == ("says-yes", 3, "none", "sft")
    profiles = {task: result.profile for task, result in run.results().items()}
    assert profiles == {"textvqa": "ocr", "pope": "accuracy"}


def test_a_hybrid_of_two_checkpoints(call: Call, data: Path, tmp_path: Path) -> None:
    from tests.support.eval_world import save_talker

    eyes, mind = save_talker(tmp_path / "eyes", seed=5), save_talker(tmp_path / "mind")
    told = call(
        "eval", "--vision", eyes, "--language", mind, "--tasks", "pope",
        "--data", data, "--results", tmp_path / "results",
    )  # fmt: skip
    assert told.code == ExitCode.PASS, told.err
    (run,) = list_runs(tmp_path / "results")
    assert run.manifest.model.role == "switch"


@pytest.mark.slow
def test_the_error_limit_decides_what_is_healthy(call: Call, data: Path, tmp_path: Path) -> None:
    from tests.support.eval_world import save_talker

    rows = [dict(row) for row in ROWS["pope"]]
    rows[0] = {**rows[0], "image": {"bytes": b"no picture", "path": None}}
    write_rows(tmp_path / "data", "pope", rows)
    arguments = ["eval", save_talker(tmp_path / "model"), "--tasks", "pope",
                 "--data", tmp_path / "data", "--results", tmp_path / "results",
                 "--truncated-limit", "1"]  # fmt: skip
    told = call(*arguments)
    assert told.code == ExitCode.INCOMPLETE, told.err
    assert "(unhealthy)" in told.out
    told = call(*arguments, "--error-limit", "0.5")
    assert told.code == ExitCode.PASS, told.err


# --- runs ------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A baseline and a worse student."""
    good = write_run(tmp_path, "good", {"mmmu": samples("mmmu", [1.0, 0.0] * 300)})
    write_run(tmp_path, "worse", {"mmmu": samples("mmmu", [1.0, 0.0] * 200 + [0.0] * 200)})
    set_baseline(tmp_path, "ten", good)
    return tmp_path


def test_fsck_explains_repairs_and_exits(call: Call, store: Path) -> None:
    assert call("runs", "fsck", "--results", store).out == "2 runs examined, nothing to do.\n"
    run = list_runs(store)[0]
    run.journal("mmmu").append([{"key": "a"}])
    journal = run.path / "journal" / "mmmu.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"crc32"')
    told = call("runs", "fsck", "--results", store)
    assert told.code == ExitCode.INCOMPLETE
    assert f"{journal}: ends in the middle of a line (8 bytes)" in told.out.replace("\n", "")
    assert "--repair" in told.out
    told = call("runs", "fsck", "--results", store, "--repair")
    assert told.code == ExitCode.PASS
    assert told.out.startswith("repaired")
    assert call("runs", "fsck", "--results", store).code == ExitCode.PASS


def test_a_damaged_manifest_leads_to_fsck(call: Call, store: Path) -> None:
    (list_runs(store)[0].path / "manifest.json").write_text("{")
    told = call("runs", "list", "--results", store)
    assert told.code == ExitCode.INCOMPLETE
    assert "kd-bench runs fsck" in told.err
    assert call("runs", "fsck", "--results", store).code == ExitCode.INCOMPLETE


def test_import_makes_a_run(call: Call, tmp_path: Path) -> None:
    """Two logged answers of a stock lmms-eval evaluation of TextVQA."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    outcome = {
        "results": {"textvqa_val": {"exact_match,none": 0.5}},
        "config": {"model": "llava_hf", "model_args": "pretrained=org/fixed"},
    }
    (folder / "t_results.json").write_text(json.dumps(outcome))
    entries = [
        {"doc_id": key, "input": f"q{key}", "target": "a", "filtered_resps": [said],
         "exact_match": float(said == "a")} for key, said in enumerate(("a", "b"))
    ]  # fmt: skip
    log = "\n".join(json.dumps(entry) for entry in entries)
    (folder / "t_samples_textvqa_val.jsonl").write_text(log)
    results = tmp_path / "results"
    told = call("runs", "import", folder, "--results", results, "--role", "sft", "--seed", 2)
    assert told.code == ExitCode.PASS, told.err
    (run,) = list_runs(results)
    assert told.out == f"Run: {run.path} (textvqa)\n"
    assert (run.manifest.model.name, run.manifest.model.seed) == ("fixed", 2)
    assert run.result("textvqa").score == 50.0
    assert call("runs", "fsck", "--results", results).code == ExitCode.PASS


# --- check and report ------------------------------------------------------------------------


def test_check_writes_junit_and_summary_outside_github(call: Call, store: Path) -> None:
    junit, summary = store / "ci" / "junit.xml", store / "summary.md"
    told = call(
        "check", "worse", "--results", store, "--junit", junit, "--summary", summary
    )  # fmt: skip
    assert told.code == ExitCode.REGRESSION
    assert ET.parse(junit).getroot().get("failures") == "2"
    assert summary.read_text().startswith("### kd-bench check: regression")
    assert "::error" not in told.err + told.out


def test_check_inside_github(call: Call, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = store / "step.md"
    call("check", "worse", "--results", store)  # `call` has taken GitHub's variables away
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    told = call("check", "worse", "--results", store, "--json")
    assert json.loads(told.out)["exit_code"] == 1
    assert told.err.startswith("::error title=kd-bench check%3A mmmu::")
    call("check", "worse", "--results", store)
    assert summary.read_text().count("### kd-bench check") == 2


def test_report_of_a_suite_that_was_not_run(call: Call, store: Path) -> None:
    told = call("report", "--results", store, "--suite", "tenn", "--to", store / "page")
    assert told.code == ExitCode.USAGE
    assert "No run of the suite 'tenn'. Did you mean 'ten'? There are runs of: ten." in told.err
    assert not (store / "page").exists()
    told = call("report", "good", "--results", store, "--suite", "ten", "--to", store / "page")
    assert told.code == ExitCode.PASS, told.err
    assert (store / "page" / "index.html").exists()
