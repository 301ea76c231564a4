"""One look for every plot: colours by meaning, resolved by the page's light or dark theme.

Plots are drawn in placeholder colours; in the SVG these become CSS variables, so that one picture
serves light, dark and print. Series colours are those of Okabe and Ito (2008), which people with
the common forms of colour blindness can tell apart; markers differ as well.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GRID", "INK", "MUTED", "PAPER", "Plot", "marker", "plotting", "series", "to_plot"]

from dataclasses import dataclass

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
_SERIES = tuple(f"#0102{number:02x}" for number in range(16, 25))
_NAMES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "paper"} | {
    color: f"s{number}" for number, color in enumerate(_SERIES)
}
# s0 is the teacher's and s1 the floor's: neutral; methods take the colours after them.
LIGHT = {
    "ink": "#1b1b1a", "muted": "#63615c", "line": "#e3e1dc", "paper": "#ffffff",
    "s0": "#1b1b1a", "s1": "#8d8b85", "s2": "#0072b2", "s3": "#d55e00", "s4": "#009e73",
    "s5": "#cc79a7", "s6": "#e69f00", "s7": "#56b4e9", "s8": "#7a5195",
}  # fmt: skip
DARK = {
    "ink": "#ecebe7", "muted": "#a3a19a", "line": "#33322f", "paper": "#161615",
    "s0": "#ecebe7", "s1": "#8d8b85", "s2": "#4fa8e0", "s3": "#f0803c", "s4": "#2fc59a",
    "s5": "#e29cc4", "s6": "#f0b73a", "s7": "#8fd0f7", "s8": "#b693d6",
}  # fmt: skip
_MARKERS = ("s", "X", "o", "^", "D", "v", "P", "<", ">")


@dataclass(frozen=True)
class Plot:
    """An SVG picture with the words that stand for it.

    Attributes:
        name: file name and id prefix.
        svg: inline `<svg>` element, colours as CSS variables.
        summary: what it shows, in a sentence, for those who do not see it.
    """

    name: str
    title: str
    svg: str
    summary: str

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


def series(number: int) -> str:
    """The placeholder colour of a series; more than there are start again after the neutrals."""
    count = len(_SERIES)
    return _SERIES[number if number < count else 2 + (number - 2) % (count - 2)]


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
        "axes.unicode_minus": True,
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
        "lines.linewidth": 1.5,
        "text.usetex": False,
        "text.parse_math": False,
        "path.simplify": True,
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
    figure.savefig(stream, format="svg", metadata=no_date, bbox_inches="tight", pad_inches=0.04)
    return Plot(name, title, _inline(stream.getvalue().decode(), name, summary), summary)


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
    svg = re.sub(r"#0102[0-9a-f]{2}", lambda m: _variable(m.group()), svg)
    svg = re.sub(r"font:\s*([^;\"]*?)'[^;\"]*?(?=[;\"])", r"font: \1var(--font, sans-serif)", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group() if box else ""} role="img" aria-label="{escape(summary)}"'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head + ">", svg, count=1).strip()


def _variable(color: str) -> str:
    return f"var(--{_NAMES[color]})" if color in _NAMES else color
