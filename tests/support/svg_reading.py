"""Reads numbers back from a drawn SVG: by its tick labels and its legend, as an eye does."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

Point = tuple[float, float]
XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass
class Text:
    """A word on the picture."""

    text: str
    x: float
    y: float
    anchor: str


@dataclass
class Shape:
    """A path or a marker: its corners, and the colour variable that it is painted in."""

    points: list[Point]
    color: str
    filled: bool
    marker: bool
    clipped: bool  # what lies in the axes is clipped to them; a legend is not


@dataclass
class Panel:
    """One group of the figure: axes, or a legend."""

    texts: list[Text] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)

    def x(self, position: float) -> float:
        """The value at a horizontal position."""
        return _on_axis(position, self.x_ticks)

    def y(self, position: float) -> float:
        """The value at a vertical position."""
        return _on_axis(position, self.y_ticks)

    def row(self, y: float, names: list[str]) -> str:
        """The row label that stands at a height."""
        rows = [text for text in self.texts if text.anchor == "end" and text.text in names]
        assert rows, f"no row is called one of {names}"
        return min(rows, key=lambda text: abs(text.y - 3.1 - y)).text

    def markers(self, color: str) -> list[Point]:
        """Places of the markers of one colour."""
        return [s.points[0] for s in self.shapes if s.marker and s.clipped and s.color == color]

    def lines(self, color: str) -> list[list[Point]]:
        """Corners of the lines of one colour."""
        return [
            s.points
            for s in self.shapes
            if not s.marker and not s.filled and s.clipped and s.color == color
        ]

    def filled(self, color: str) -> list[list[Point]]:
        """Corners of the areas of one colour."""
        return [s.points for s in self.shapes if s.filled and s.clipped and s.color == color]


def read_svg(path: Path) -> tuple[list[Panel], dict[str, str]]:
    """The panels with something in them, and the colours of the legend by label."""
    figure = ElementTree.parse(path).getroot().find("{*}g")
    assert figure is not None
    areas = {
        path.get("id", ""): path.get("d", "") for path in figure.iterfind(".//{*}defs/{*}path")
    }
    panels = [_panel(group, areas) for group in figure]
    legends = [p for p in panels if not any(s.clipped for s in p.shapes) and p.texts]
    axes = [p for p in panels if any(s.clipped for s in p.shapes)]
    return axes, {label: color for legend in legends for color, label in _handles(legend)}


def _handles(legend: Panel) -> list[tuple[str, str]]:
    """A handle stands to the left of its label, on its line; the nearest one is the label's."""
    found = []
    colored = [s for s in legend.shapes if s.color.startswith("s")]
    for text in legend.texts:

        def far(shape: Shape, text: Text = text) -> float:
            x, y = shape.points[0]
            return (text.x - x if x <= text.x else 1e6) + 10 * abs(y - (text.y - 3))

        found.append((min(colored, key=far).color, text.text))
    return found


def _panel(group: ElementTree.Element, areas: dict[str, str]) -> Panel:
    panel = Panel()
    _walk(group, panel, areas, clipped=False)
    return panel


def _walk(node: ElementTree.Element, panel: Panel, areas: dict[str, str], clipped: bool) -> None:
    for child in node:
        tag = child.tag.rpartition("}")[2]
        inside = clipped or "clip-path" in child.attrib
        style = child.get("style", "")
        if tag == "defs":
            continue
        if tag == "text":
            text = Text("".join(child.itertext()).strip(), *_position(child), _anchor(style))
            panel.texts.append(text)
            _tick(panel, text)
        elif tag == "use":
            corners, marker = [_position(child)], True
            if child.get("x") == "0":  # an area, drawn elsewhere and moved down into the picture
                down = float(child.get("y", "0"))
                path = areas[child.get(XLINK, "")[1:]]
                corners, marker = [(x, y + down) for x, y in _corners(path)], False
            panel.shapes.append(Shape(corners, _color(style), True, marker, inside))
        elif tag == "path":
            panel.shapes.append(
                Shape(_corners(child.get("d", "")), _color(style), _fills(style), False, inside)
            )
        else:
            _walk(child, panel, areas, inside)


def _tick(panel: Panel, text: Text) -> None:
    """A tick's label comes right after its grid line."""
    if not panel.shapes or panel.shapes[-1].color != "line" or len(panel.shapes[-1].points) != 2:
        return
    (x1, y1), (x2, y2) = panel.shapes[-1].points
    if x1 == x2 and text.anchor == "middle" and abs(text.x - x1) < 0.01:
        panel.x_ticks.append((x1, text.text))
    elif y1 == y2 and text.anchor == "end":
        panel.y_ticks.append((y1, text.text))


def _on_axis(position: float, ticks: list[tuple[float, str]]) -> float:
    """By the first and the last tick; logarithmic where the middle one says so."""
    known = sorted((place, number(text)) for place, text in ticks)
    (start, low), (end, high) = known[0], known[-1]
    share = (position - start) / (end - start)
    straight = low + share * (high - low)
    if len(known) > 2:
        place, middle = known[1]
        there = low + (place - start) / (end - start) * (high - low)
        if abs(there - middle) > 0.02 * abs(high - low):
            return math.exp(math.log(low) + share * math.log(high / low))
    return straight


UNITS = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "ms": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "%": 1}


def number(text: str) -> float:
    """`534M` -> 534000000."""
    found = re.fullmatch(r"([+−-]?[\d.,]+)\s*([A-Za-z%]*)", text.strip())
    assert found is not None, f"{text!r} is no number"
    return float(found[1].replace("−", "-").replace(",", "")) * UNITS[found[2]]


def _position(node: ElementTree.Element) -> Point:
    return float(node.get("x", "nan")), float(node.get("y", "nan"))


def _anchor(style: str) -> str:
    found = re.search(r"text-anchor: (\w+)", style)
    return found[1] if found else "start"


def _fills(style: str) -> bool:
    return "fill:" in style and "fill: none" not in style


def _color(style: str) -> str:
    names = dict(re.findall(r"(fill|stroke): var\(--(\w+)\)", style))
    return names.get("fill") or names.get("stroke") or ""


def _corners(path: str) -> list[Point]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] ([-\d.e]+) ([-\d.e]+)", path)]
