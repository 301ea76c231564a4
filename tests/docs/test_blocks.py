"""Every block of README and docs: run in a small prepared folder, or marked with what it needs."""

import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.docs.blocks import LANGUAGES, NEEDS, ROOT, Block, blocks_of, pages
from tests.docs.shell import Shell

pytest.importorskip("torch")
pytest.importorskip("lmms_eval")

PAGES = [page for page in pages() if blocks_of(page)]
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
VERDICTS = (0, 1, 3)  # `check` says what it found


def name_of(value: Any) -> str:
    if isinstance(value, Block):
        return f"{value.page}:{value.line}"
    return str(value.relative_to(ROOT))


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_a_block_says_what_it_is(block: Block) -> None:
    assert block.language in (*LANGUAGES, "text"), "name the language behind the fence"
    assert block.needs in ("", *NEEDS)


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_no_command_hides_in_an_indented_block(page: Path) -> None:
    fenced = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not re.search(r"^ {4}(kd-bench|make|pip|import|from) ", fenced, flags=re.M)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=name_of)
def test_every_command_names_options_that_exist(block: Block) -> None:
    """Also of blocks that are not run: each command line is parsed by the program itself."""
    import typer.main

    from kd_bench.cli import app

    root = typer.main.get_command(app)
    for command in block.commands:
        words = shlex.split(command.split("||")[0].split(">")[0])
        words = words[words.index("kd-bench") :] if "kd-bench" in words else []
        if "-m" in shlex.split(command) and "kd_bench" in shlex.split(command):
            words = shlex.split(command)[shlex.split(command).index("kd_bench") :]
        words = [word for word in words if "$" not in word]
        if not words or words[1].startswith("--"):  # would be obeyed, not parsed
            assert not words or words[1] in ("--version", "--help", "--install-completion")
            continue
        node, rest = root, words[1:]
        context = node.make_context("kd-bench", [rest[0]])
        while hasattr(node, "commands"):
            assert rest[0] in node.commands, command
            node, rest = node.commands[rest[0]], rest[1:]
        node.make_context(words[1], list(rest), parent=context)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=name_of)
def test_a_yaml_block_is_what_it_seems(block: Block, tmp_path: Path) -> None:
    from kd_bench.config import dump_yaml, parse_yaml, validate
    from kd_bench.distill.recipe import Recipe, Stage, load_recipe
    from kd_bench.policy import Policy
    from kd_bench.registry import TaskSpec

    value = parse_yaml(block.text)
    if set(value) <= {*Recipe.model_fields, *Stage.model_fields}:
        rest = {"student": "a", "teacher": "b", "data": {"path": "c.json"}, "method": "kl"}
        rest = rest if "student" not in value else {}  # a part of a recipe, or a whole one
        if "student" not in value and not {"steps", "epochs", "stages"} & set(value):
            rest["steps"] = 1
        whole = tmp_path / "whole.yaml"
        whole.write_text(dump_yaml({**rest, **value}), encoding="utf-8")
        assert load_recipe(whole).stages
    elif "margins" in value:
        validate(Policy, value, block.page)
    elif "upstream" in value:
        validate(TaskSpec, value, block.page)
    else:
        assert "script" in value["check"], "a job of another CI system"


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=name_of)
def test_a_python_block_compiles(block: Block) -> None:
    ast.parse(block.text)


@pytest.fixture(scope="module")
def shell(prepared: Path) -> Iterator[Shell]:
    shell = Shell(prepared)
    yield shell
    shell.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_blocks_of_a_page_run(page: Path, prepared: Path, shell: Shell, tmp_path: Path) -> None:
    """One after the other in one folder, as a reader would type them."""
    blocks = [b for b in blocks_of(page) if not b.needs and b.language != "text"]
    if not blocks:
        pytest.skip("only blocks that need a GPU or a download")
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder, symlinks=True)
    shell.enter(folder)
    for block in blocks:
        if block.language == "yaml":
            _written(block, folder)
        elif block.language == "python":
            code, output = shell.python(block.text)
            assert code == 0, f"{block.page}:{block.line}\n{output}"
        for command in block.commands:
            code, output = shell.run(command)
            allowed = VERDICTS if re.match(r"kd-bench check\b", command) else (0,)
            assert code in allowed, f"{block.page}:{block.line}: {command}\n{output}"


def _written(block: Block, folder: Path) -> Path:
    """The file that a YAML block shows, under the name in its first line."""
    name = re.match(r"# (\S+\.ya?ml)\b", block.text)
    path = folder / (name[1] if name else "block.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding="utf-8")
    return path
