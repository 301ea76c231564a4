"""Layers: a module imports only from the packages before it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kd_bench"

# A package may import from itself and from every package on an earlier line.
ORDER = [
    {"errors"},
    {"records"},
    {"files"},
    {"config"},
    {"aggregators"},
    {"stats"},
    {"registry"},
    {"provenance"},
    {"world"},
    {"distill", "store"},
    {"evals", "compare"},
    {"policy"},
    {"gate"},
    {"gate_plan"},
    {"report"},
    {"doctor"},
    {"api", "plots"},
    {"cli"},
]
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}

HEAVY = {"torch", "transformers", "lmms_eval", "pandas", "matplotlib", "scipy", "datasets", "numpy"}
ONLY_IN = {
    "lmms_eval": {"evals"},
    "torch": {"distill", "evals"},
    "transformers": {"distill", "evals"},
}


def modules() -> list[Path]:
    return sorted(
        path
        for path in PACKAGE.rglob("*.py")
        if path.name not in {"__main__.py"} and path != PACKAGE / "__init__.py"
    )


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layer"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_earlier_packages(path: Path) -> None:
    package = package_of(path)
    assert package in LEVEL, f"{package} has no layer yet"
    for name in imports(ast.parse(path.read_text())):
        top, _, rest = name.partition(".")
        if top == "kd_bench" and rest and not rest.startswith("__version__"):
            other = rest.partition(".")[0]
            assert other == package or LEVEL[other] < LEVEL[package], f"{path.name} imports {name}"
        if top in ONLY_IN:
            assert package in ONLY_IN[top], f"{top} belongs in {ONLY_IN[top]}, not in {path.name}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.name)
def test_a_command_imports_nothing_heavy_at_its_top(path: Path) -> None:
    tree = ast.parse(path.read_text())
    top_level = ast.Module([n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)], [])
    assert not {name.partition(".")[0] for name in imports(top_level)} & HEAVY
