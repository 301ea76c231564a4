"""The page's shell: templates, themes, the content-security-policy."""

import base64
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kd_bench import __version__
from kd_bench.files import claim_folder, write_text
from kd_bench.report.style import DARK, LIGHT, Plot, variables
from kd_bench.report.tables import clean

TEMPLATES = Path(__file__).parent / "templates"
BRAND = '<span class="brand">kd-bench</span>'
"""On every page, also on those from before folders were marked."""
# Text colours keep a contrast of 4.5 to the paper, borders of controls 3.
CHROME_LIGHT = {
    "accent": "#0a58a8", "edge": "#8d8b85", "soft": "#f5f4f1", "warn": "#a33b00",
    "right": "#00785a", "wrong": "#b04a00",
}  # fmt: skip
CHROME_DARK = {
    "accent": "#7cbcf0", "edge": "#6d6b65", "soft": "#1f1f1d", "warn": "#ff9d6b",
    "right": "#2fc59a", "wrong": "#f0803c",
}  # fmt: skip
EMPTY: dict[str, Any] = {
    "mini": False, "title": "", "eyebrow": "", "lead": [], "figures": [], "warnings": [],
    "rows": False, "categories": [], "plot_sections": [], "samples_json": None,
    "published": None, "runs": [], "trend": None, "left_out": [], "downloads": [],
}  # fmt: skip

PlotSection = tuple[str, str, str, tuple[str, ...]]


def claim_report(folder: Path, files: Iterable[str], plots: Iterable[str]) -> None:
    """Make sure that a folder's page is ours to replace.

    Raises:
        UsageError: a file that would be replaced is somebody else's.
    """
    page = folder / "index.html"
    made_before = page.is_file() and BRAND in page.read_text(encoding="utf-8", errors="replace")
    names = ["index.html", *files, *(f"plots/{name}.svg" for name in plots)]
    claim_folder(folder, "report", names, made_before=made_before)


def write_page(path: Path, context: dict[str, Any]) -> None:
    """Render the page; what the context leaves out is not on it."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shell = {
        "css": Markup(_css()),
        "script": Markup(script),
        "script_hash": f"sha256-{digest}",
        "version": __version__,
    }
    context = EMPTY | context | shell
    context["sections"] = _navigation(context)
    write_text(path, _environment().get_template("page.html.j2").render(context))


def plot_sections(plots: list[Plot], layout: tuple[PlotSection, ...]) -> list[dict[str, Any]]:
    """The plots that there are, in sections of (id, title, introduction, plot names)."""
    by_name = {plot.name: plot for plot in plots}
    sections = []
    for key, title, intro, names in layout:
        shown = [
            {"title": plot.title, "summary": plot.summary, "svg": Markup(plot.svg)}
            for name in names
            if (plot := by_name.get(name)) is not None
        ]
        if shown:
            sections.append({"id": key, "title": title, "intro": intro, "plots": shown})
    return sections


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["clean"] = clean
    environment.filters["clean_lines"] = lambda text: "\n".join(map(clean, text.splitlines()))
    return environment


def _css() -> str:
    light, dark = variables(LIGHT | CHROME_LIGHT), variables(DARK | CHROME_DARK)
    themes = (
        f":root{{color-scheme:light;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light])"
        f"{{color-scheme:dark;{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )
    return themes + (TEMPLATES / "style.css").read_text(encoding="utf-8")


def _navigation(context: dict[str, Any]) -> list[tuple[str, str]]:
    links = [("trend", "Trend")] if context["trend"] else []
    links += [("leaderboard", "Leaderboard")] if context["rows"] else []
    links += [("categories", "Categories")] if context["categories"] else []
    links += [(section["id"], section["title"]) for section in context["plot_sections"]]
    links += [("samples", "Samples")] if context["samples_json"] else []
    links += [("published", "Published")] if context["published"] else []
    links += [("runs", "Runs")] if context["runs"] else []
    return links
