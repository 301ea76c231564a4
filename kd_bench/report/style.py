"""One look for every plot: colours by meaning, resolved by the page's light or dark theme.

Plots are drawn in the colours of the light theme, no two of which are equal; in the SVG these
become CSS variables, so that one file serves light, dark and print. The first series colours are
those of Okabe and Ito (2008), which people with the common forms of colour blindness can tell
apart, the further ones Tol's (2021); markers differ as well, and no two of a hundred series share
both.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from kd_bench.report.tables import clean

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# s0 is the teacher's and s1 the floor's: neutral; methods take the colours after them.
LIGHT = {
    "ink": "#1b1b1a", "muted": "#63615c", "line": "#e3e1dc", "paper": "#ffffff",
    "s0": "#1b1b1b", "s1": "#8d8b85", "s2": "#0072b2", "s3": "#d55e00", "s4": "#009e73",
    "s5": "#cc79a7", "s6": "#e69f00", "s7": "#56b4e9", "s8": "#7a5195",
    "s9": "#117733", "s10": "#882255", "s11": "#999933", "s12": "#332288", "s13": "#cc6677",
    "s14": "#44aa99", "s15": "#8c510a", "s16": "#b8336a", "s17": "#5b7a00", "s18": "#4477aa",
    "s19": "#a6761d", "s20": "#c2185b",
}  # fmt: skip
DARK = {
    "ink": "#ecebe7", "muted": "#a3a19a", "line": "#33322f", "paper": "#161615",
    "s0": "#ecebe7", "s1": "#8d8b85", "s2": "#4fa8e0", "s3": "#f0803c", "s4": "#2fc59a",
    "s5": "#e29cc4", "s6": "#f0b73a", "s7": "#8fd0f7", "s8": "#b693d6",
    "s9": "#4bb36b", "s10": "#d46a9f", "s11": "#c9c95f", "s12": "#8f86e0", "s13": "#e8949f",
    "s14": "#7fd6c8", "s15": "#d39a55", "s16": "#ee7fa8", "s17": "#a5c84a", "s18": "#86b3dd",
    "s19": "#dcb060", "s20": "#ff77a8",
}  # fmt: skip
INK, MUTED, GRID, PAPER = (LIGHT[name] for name in ("ink", "muted", "line", "paper"))
_SERIES = tuple(color for name, color in LIGHT.items() if name[1:].isdigit())
_NAMES = {color: name for name, color in LIGHT.items()}
WIDTH = 4.9  # inches, the same for every plot, so that their type has one size on the page
_MARKERS = ("s", "X", "o", "^", "D", "v", "P", "<", ">", "p", "d")


@dataclass(frozen=True)
class Plot:
    """A drawing with the words that stand for it.

    Attributes:
        name: file name and id prefix.
        svg: inline `<svg>` element, colours as CSS variables.
        summary: what it shows, in a sentence, for those who do not see it.
        figure: what it was drawn as, in the colours of the light theme.
    """

    name: str
    title: str
    svg: str
    summary: str
    figure: "Figure" = field(compare=False, repr=False)

    def standalone(self) -> str:
        """A file of its own, following the viewer's light or dark theme."""
        style = (
            "<style>:root{" + variables(LIGHT) + "font-family:sans-serif}"
            "@media (prefers-color-scheme:dark){:root{" + variables(DARK) + "}}</style>"
        )
        head, rest = self.svg.split(">", 1)
        return f"{head}>{style}{rest}\n"


def variables(theme: dict[str, str]) -> str:
    """CSS custom properties of a theme."""
    return "".join(f"--{name}:{color};" for name, color in theme.items())


def canvas(width: float, height: float, rows: int = 0, columns: int = 0) -> tuple[Any, Any]:
    """A figure that draws SVG, with its axes, or a grid of axes where rows are asked for."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(width, height), layout=engine)
    FigureCanvasSVG(figure)
    return figure, figure.subplots(rows or 1, columns or 1, squeeze=not rows)


def legend(figure: Any, handles: list[Any], labels: list[str], *, columns: int = 3) -> None:
    """Names above the plot, left-aligned; the figure grows by their lines."""
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(labels) // columns) + 0.1)
    figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, borderpad=0.1, borderaxespad=0.2,
        handlelength=1.5, columnspacing=1.6, handletextpad=0.6, labelcolor=INK,
    )  # fmt: skip


def short(name: str, limit: int = 22) -> str:
    """A name that fits beside a plot."""
    name = clean(name)
    return name if len(name) <= limit else name[: limit - 1] + "…"


def spread_out(heights: list[float], least: float) -> list[float]:
    """Positions near `heights` that keep at least `least` apart, for labels."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = list(heights)
    for _ in range(60):
        moved = False
        for lower, upper in pairwise(order):
            lack = least - (placed[upper] - placed[lower])
            if lack > 1e-9:
                placed[lower] -= lack / 2
                placed[upper] += lack / 2
                moved = True
        if not moved:
            break
    return placed


def series(number: int) -> str:
    """The colour of a series; the twentieth method takes the first one's again."""
    return _SERIES[css_series(number)]


def css_series(number: int) -> int:
    """The number of the colour variable of a series."""
    count = len(_SERIES)
    return number if number < count else 2 + (number - 2) % (count - 2)


def marker(number: int) -> str:
    """The marker that goes with a series."""
    return _MARKERS[number % len(_MARKERS)]


@contextmanager
def plotting() -> Iterator[None]:
    """The drawing settings of all plots; a user's matplotlibrc does not reach them."""
    import matplotlib as mpl

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "kd-bench",
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "axes.labelsize": 8.5,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "figure.facecolor": "none",
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": GRID,
        "ytick.color": GRID,
        "xtick.labelcolor": MUTED,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "text.parse_math": False,
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(settings)
        with warnings.catch_warnings():  # names in scripts that DejaVu lacks: the browser has them
            warnings.filterwarnings("ignore", message="Glyph")
            warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
            yield


def to_plot(figure: "Figure", name: str, title: str, summary: str) -> Plot:
    """The figure as an inline SVG; equal figures give equal bytes."""
    stream = BytesIO()
    no_date = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(stream, format="svg", metadata=no_date)
    return Plot(name, title, _inline(stream.getvalue().decode(), name, summary), summary, figure)


def _inline(svg: str, name: str, summary: str) -> str:
    """Strip the file's frame, scope the ids to this plot, turn colours into variables."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(?:patch|text|axes|line2d|xtick|ytick|matplotlib\.axis|figure|legend|'
                 r'PathCollection|LineCollection|PolyCollection|FillBetweenPolyCollection)_[0-9]+">',
                 "<g>", svg)  # fmt: skip
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\1{name}-", svg)
    svg = re.sub("|".join(_NAMES), lambda m: f"var(--{_NAMES[m.group()]})", svg)
    svg = re.sub(r"font:\s*([^;\"]*?)'[^;\"]*?(?=[;\"])", r"font: \1var(--font, sans-serif)", svg)
    svg = svg.replace("font: 700 ", "font: 600 ")
    svg = re.sub(r"\n\s*", "\n", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group() if box else ""} role="img" aria-label="{escape(summary)}"'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head + ">", svg, count=1).strip()
