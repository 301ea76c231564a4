"""What a newcomer types first: help, recipes, the demo, tables, errors that can be followed."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from kd_bench.cli import app, demo
from kd_bench.cli.jobs import run_jobs
from kd_bench.distill.recipe import DataSource, LoraSettings, Recipe, Stage, StudentParts
from kd_bench.errors import ExitCode
from tests.cli.conftest import Call
from tests.cli.test_help import HELPS
from tests.support.report_store import demo_models, make_store

ROOT = Path(__file__).parents[2]
GROUPS = ([], ["recipes"], ["data"], ["tasks"], ["runs"], ["runs", "baseline"])


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo was run: a folder with results/demo."""
    folder = tmp_path_factory.mktemp("demo")
    models = [m for m in demo_models((0, 1)) if m.method in ("", "sft", "kl", "switch-kd")]
    make_store(folder / demo.RESULTS, models, units=10)
    return folder


# --- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_a_bare_group_shows_its_help_once(call: Call, group: list[str]) -> None:
    told = call(*group)
    assert told.out.count("Usage:") == 1
    assert told.err == ""
    assert told.code == ExitCode.USAGE


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_no_type_stands_beside_a_flag(
    call: Call, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    told = call(*command, "--help")
    assert told.code == ExitCode.PASS
    assert "bool" not in told.out
    assert re.search(r"--help +-h +Show this message", told.out)


def test_train_help_lists_every_setting(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    told = call("train", "--help").out
    for prefix, model in (
        ("", Recipe), ("data.", DataSource), ("", Stage), ("lora.", LoraSettings),
        ("student.", StudentParts),
    ):  # fmt: skip
        for name in model.model_fields:
            assert re.search(rf"^ {re.escape(prefix + name)} ", told, re.MULTILINE), name
    assert "learning_rate" in call("recipes", "settings").out


def test_the_shell_completes_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kd_bench"],
        env={**os.environ, "_KD_BENCH_COMPLETE": "complete_bash", "COMP_WORDS": "kd-bench ru",
             "COMP_CWORD": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == ["runs"]


def test_version(call: Call) -> None:
    assert re.fullmatch(r"kd-bench \d+\.\d+\.\d+\n", call("--version").out)


# --- recipes --------------------------------------------------------------------------------------


def test_recipes_are_listed_and_shown(call: Call) -> None:
    listed = call("recipes", "list").out
    for recipe in (ROOT / "kd_bench" / "distill" / "recipes").glob("*.yaml"):
        assert re.search(rf"^ {recipe.stem} ", listed, re.MULTILINE)
        assert call("recipes", "show", recipe.stem).out == recipe.read_text(encoding="utf-8")


def test_a_recipe_to_start_from(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = call("train", "--init", "my.yaml")
    assert told.out == "Wrote my.yaml. Next: kd-bench train my.yaml --show\n"
    assert (tmp_path / "my.yaml").read_text(encoding="utf-8").startswith("# kd-bench train my.yaml")
    assert call("train", "my.yaml", "--show").code == ExitCode.PASS
    assert call("train", "--init", "my.yaml").code == ExitCode.USAGE, "nothing is replaced"


def test_a_sweep_is_shown_whole_and_nothing_is_trained(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = call("train", "mini", "--method", "sft,kl", "--seeds", "0,1", "--show").out
    assert re.findall(r"^seed: (\d)", shown, re.MULTILINE) == ["0", "0", "1", "1"]
    assert re.findall(r"method: (\w+)", shown) == ["sft", "kl", "sft", "kl"]
    every = call("train", "mini", "--method", "all", "--seeds", "0,1", "--show").out
    assert every.count("\n---\n") == 19
    assert not list(tmp_path.iterdir())


# --- the demo -------------------------------------------------------------------------------------


def test_the_demo_tells_its_plan_and_the_time_that_it_may_take(
    capsys: pytest.CaptureFixture[str],
) -> None:
    students = [demo.Student(method, seed) for method in ("sft", "kl") for seed in (0, 1, 2)]
    demo.tell_plan(["sft", "kl"], [0, 1, 2], demo.commands_of(students), 2)
    told = capsys.readouterr().out
    assert re.search(r"The plan, about \d+ min on 2 cores:", told)
    assert "train 3 seeds of sft, kl: 6 commands" in told
    assert "ten benchmarks: 7 commands" in told


def test_the_time_left_is_told_with_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [["--version"], ["--version"], ["--version"]]
    run_jobs({"first": commands[:2], "then": commands[2:]}, 1, tmp_path, lambda command: 3600.0)
    ended = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line[:5] for line in ended] == ["[1/3]", "[2/3]", "[3/3]"]
    assert all(re.search(r"; (about \d+ min|less than a minute) left$", each) for each in ended[:2])
    assert (tmp_path / "then-0.log").exists()


@pytest.mark.parametrize("methods", [["sft", "kl", "switch-kd"], ["sft"]])
@pytest.mark.slow
def test_the_demos_next_commands_work_as_typed(
    demos: Path, methods: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    demo.tell_next(methods)
    lines = capsys.readouterr().out.split("Next:\n")[1].splitlines()
    assert len(lines) == 3
    for line in lines:
        program, *words = line.split(" -m kd_bench ")
        assert program.strip() == "python"
        done = subprocess.run(
            [sys.executable, "-m", "kd_bench", *words[0].split()],
            cwd=demos, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_a_store_without_runs_leads_to_the_demos(
    call: Call, demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demos)
    hint = "There are runs in results/demo (--results results/demo)."
    assert hint in call("runs", "list").out
    for command in (["report"], ["compare", "a", "b"], ["check", "a"], ["runs", "show", "a"]):
        assert hint in call(*command).err


# --- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(
    "command, title",
    [
        ("runs list", "Runs"),
        ("report", "Summary"),
        ("compare sft-seed0 kl-seed0", "kl-seed0 against sft-seed0"),
        ("compare sft kl switch-kd --methods", "Methods on the average"),
        ("check kl-seed0 --against sft-seed0", "kl-seed0 ("),
        ("tasks list", "Benchmarks"),
        ("recipes list", "Recipes"),
        ("recipes settings", "The recipe"),
    ],
)
@pytest.mark.slow
def test_tables_are_titled_and_fit(
    call: Call, demos: Path, width: int, command: str, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demos)
    monkeypatch.setenv("COLUMNS", str(width))
    words = command.split()
    stored = words[0] in ("report", "compare", "check") or words == ["runs", "list"]
    told = call(*words, *(["--results", demo.RESULTS] if stored else []))
    assert told.out.startswith(title)
    assert max(map(len, told.out.splitlines())) <= width
    assert "\u2026" not in told.out, "nothing is cut off"
    if width == 120 and "seed0" in command:
        assert told.out.count("\nBenchmark ") == 1, "in one piece"


# --- errors that can be followed ------------------------------------------------------------------


def write_import(folder: Path, *tasks: str) -> Path:
    folder.mkdir()
    outcome = {
        "results": {task: {"exact_match,none": 0.5} for task in tasks},
        "config": {"model": "llava_hf", "model_args": "pretrained=org/x"},
        "n-samples": {task: {"original": 2, "effective": 2} for task in tasks},
    }
    (folder / "t_results.json").write_text(json.dumps(outcome), encoding="utf-8")
    lines = [
        {"doc_id": n, "input": f"q{n}", "target": "a", "filtered_resps": [said], "exact_match": hit}
        for n, said, hit in ((0, "a", 1.0), (1, "b", 0.0))
    ]
    for task in tasks:
        log = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"t_samples_{task}.jsonl").write_text(log, encoding="utf-8")
    return folder


def test_an_import_names_what_it_does_not_know(call: Call, tmp_path: Path) -> None:
    told = call("runs", "import", write_import(tmp_path / "a", "ocrbench"), "--results", tmp_path)
    assert told.code == ExitCode.USAGE
    assert "knows no benchmark ocrbench. `kd-bench tasks list`" in told.err
    both = write_import(tmp_path / "b", "ocrbench", "textvqa_val")
    told = call("runs", "import", both, "--results", tmp_path / "results")
    assert told.code == ExitCode.PASS, told.err
    assert "Note: ocrbench is no benchmark that kd-bench knows: not imported" in told.out


def _options() -> dict[str, set[str]]:
    """Every command by its words, with its options."""
    found: dict[str, set[str]] = {}

    def walk(command: object, words: str) -> None:
        parameters = command.params  # type: ignore[attr-defined]
        options = {name for each in parameters for name in (*each.opts, *each.secondary_opts)}
        found[words] = {"--help", "--debug", *(o for o in options if o.startswith("--"))}
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, f"{words} {name}".strip())

    walk(typer.main.get_command(app), "")
    return found


FOREIGN = {
    "--log_samples", "--output_path", "--tasks",  # lmms-eval's
    "--use_fsdp", "--fsdp_version", "--upgrade", "--weights",  # accelerate's, pip's, a placeholder
    "--porcelain", "--show-toplevel", "--untracked-files",  # git's
}  # fmt: skip


def _texts(path: Path) -> list[str]:
    """Every text of a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [c.value for c in constants if isinstance(c.value, str) and id(c) not in told]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "kd_bench").rglob("*.py")), ids=lambda path: path.stem
)
def test_messages_name_only_options_that_exist(path: Path) -> None:
    """Where a text names a command, the option is that command's; else it is some command's."""
    commands = _options()
    every = set.union(*commands.values()) | FOREIGN
    for text in _texts(path):
        assert set(re.findall(r"(?<![\w(-])--[a-z][a-z_-]*[a-z]", text)) <= every, text
        for typed in re.findall(r"`(?:kd-bench )?([a-z]+[^`]*--[^`]*)`", text):
            words = typed.split()
            named = max((c for c in commands if words[: len(c.split())] == c.split()), key=len)
            asked = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
            assert not named or asked <= commands[named], text


def test_check_of_different_protocols_names_the_command_that_shows_them(
    call: Call, tmp_path: Path
) -> None:
    from tests.support.report_store import Model, add_run, result, samples

    models = [Model("one", "sft", "sft", 1.5, 0)]
    make_store(tmp_path, models, units=10)
    model = Model("other", "kd", "kl", 0.0)
    frame = samples("gqa", model, units=10)
    add_run(tmp_path, model, units=10).commit(result("gqa", frame, "another protocol"), frame)
    told = call("check", "other", "--against", "one", "--results", tmp_path)
    assert told.code == ExitCode.NOT_COMPARABLE
    assert "`compare --allow-different`" in told.err


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "decord":
            raise ModuleNotFoundError("No module named 'decord'", name="decord")
sys.meta_path.insert(0, Blocked())
from kd_bench.cli import main
main()
"""


@pytest.mark.slow
def test_a_stock_model_without_its_package_is_the_line_that_installs_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "eval", "--model", "llava_hf", "--tasks", "gqa"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.USAGE
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith("error lmms-eval's llava_hf cannot be loaded: No module named 'decord'.")
    assert told.endswith("pip install eva-decord")


@pytest.mark.slow
def test_wandb_without_a_key_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "kd_bench", "train", "mini", "steps=1", "report_to=[wandb]"],
        cwd=tmp_path, env={**clean, "HOME": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.USAGE
    assert done.stderr.count("\n") == 1
    assert "WANDB_API_KEY" in done.stderr
