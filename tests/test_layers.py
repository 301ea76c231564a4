"""Layers: a module imports only from the packages before it, and inside a package as well."""

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

# Inside a package: a module may import from those before it, wherever the import stands.
INSIDE = {
    "world": "__init__ scenes questions benchmarks training build",
    "store": "run __init__ damage",
    "distill": "__init__ recipe checkpoints data chat vision_language compatibility models build "
    "processes conversations encoding knee losses objective teacher_states distiller trainer "
    "counting stage plan train switch_kd",
    "compare": "estimates align methods __init__",
    "evals": "__init__ content documents fetch checkpoint benchmark cache decoding inputs engine "
    "models scoring run logs importing",
    "report": "board tables relations samples style verdicts leaderboard papers plots page history "
    "model_card __init__",
    "cli": "options process jobs compare demo findings study evaluate report runs tasks train "
    "__init__",
}
# What stands inside a function on purpose: (module, what it imports).
LATER = {
    ("evals.benchmark", "scoring"),  # a registry entry may name a rule
    ("cli.demo", "study"),  # the flag that starts it; the study trains the demo's students
}

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


def inside(package: str, tree: ast.AST, names: list[str]) -> set[str]:
    """Modules of its own package that a module imports when it runs; types do not count."""
    typed = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    running = [node for node in ast.walk(tree) if id(node) not in typed]
    found = set()
    for name in imports(ast.Module([n for n in running if isinstance(n, ast.stmt)], [])):
        top, own, *rest = [*name.split("."), "", ""][:4]
        if (top, own) == ("kd_bench", package):
            found.add(rest[0] if rest[0] in names else "__init__")
    return found


@pytest.mark.parametrize(
    "package", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
)
def test_inside_a_package_imports_go_one_way(package: str) -> None:
    paths = {path.stem: path for path in (PACKAGE / package).glob("*.py")}
    order = INSIDE[package].split()
    assert sorted(order) == sorted(paths), "every module has its place in INSIDE"
    for place, module in enumerate(order):
        for other in inside(package, ast.parse(paths[module].read_text()), order) - {module}:
            late = (f"{package}.{module}", other) in LATER
            assert late or order.index(other) < place, f"{package}.{module} imports {other}"
