"""The site: builds without a warning, and its tables and entries follow the code."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kd_bench.errors import ExitCode
from tests.docs.blocks import ROOT, pages

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_hooks"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def troubles() -> str:
    return (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Also that no link is dead and every page stands in the menu."""
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "recipes.html").read_text(encoding="utf-8")
    assert "optimizer steps" in page
    assert "<!-- settings" not in page


def test_every_message_has_an_entry(hooks: ModuleType, troubles: str) -> None:
    patterns = hooks.entries(troubles).values()
    lost = [m.text for m in hooks.messages() if not any(p.search(m.text) for p in patterns)]
    assert not lost, "write an entry into docs/troubleshooting.md, or widen one"


def test_every_entry_has_a_message_and_an_explanation(hooks: ModuleType, troubles: str) -> None:
    for part in re.split(r"^(?=### )", troubles, flags=re.M)[1:]:
        title = part.split("\n", 1)[0].removeprefix("### ")
        text = re.sub(r"<!--.*?-->|^#.*$", "", part, flags=re.M).strip()
        assert len(text) > 60, title
        assert hooks.messages_of(title, troubles) or title == "Internal error", title


def test_every_error_class_has_an_entry(hooks: ModuleType, troubles: str) -> None:
    codes = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    met = {message.kind for message in hooks.messages()}
    for name in hooks.error_classes():
        assert f"`{name}`" in codes
        assert name in met or f"`{name}`" in troubles


def test_every_exit_code_is_explained() -> None:
    codes = (DOCS / "exit-codes.md").read_text(encoding="utf-8")
    for code in ExitCode:
        assert re.search(rf"^\| {code.value} \| `{code.name}` \| .+ \|$", codes, flags=re.M)


@pytest.mark.parametrize(
    "model", ["Recipe", "DataSource", "Stage", "StudentParts", "LoraSettings", "Term", "Policy"]
)
def test_every_setting_is_in_a_table_with_its_meaning(hooks: ModuleType, model: str) -> None:
    kind = hooks._models()[model]
    rows = hooks.settings_table(model).split("\n")[2:]
    assert [row.split("`")[1] for row in rows] == list(kind.model_fields)
    pages = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    assert f"<!-- settings: {model} -->" in pages
    for row in rows:
        name, kind_of, unit = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:4])
        assert kind_of not in ("", "any"), name
        assert unit or "number" not in kind_of, name


def test_the_citation_has_the_version() -> None:
    from kd_bench import __version__

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_files_and_modules_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:kd_bench|tests|docs)/[\w./-]*\w", text))
    named |= {
        m.replace(".", "/") for m in re.findall(r"python -m ((?:tests|kd_bench)[\w.]*\w)", text)
    }
    missing = [n for n in named if not (ROOT / n).exists() and not (ROOT / f"{n}.py").exists()]
    assert not missing
