"""Line charts as SVG text: no script, no dependency, and colours that come from a style sheet.

What a chart says is also in a table beside it, so its lines carry names where they end and need no legend.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 60, 170, 16, 46  # margins; names of lines stand in the right one
_LINE_HEIGHT = 14.0
_MOST_MARKERS = 30  # beyond that the markers of a line would touch

COLOURS = """
:root { --paper: #fcfcfa; --ink: #1d2329; --soft: #5c6670; --rule: #dfe3e6; --bar: #3b6fb5; --limit: #b3261e;
  --light: 40%; font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14181c; --ink: #e6e9ec; --soft: #9aa5af; --rule: #2e353c; --bar: #7fb0ee;
    --limit: #ff8a80; --light: 70%; }
}
"""

STYLE = """\
svg { display: block; width: 100%; min-width: 36rem; height: auto; font-size: 12px; }
svg text { fill: var(--soft); }
svg .grid { stroke: var(--rule); }
svg .axis { stroke: var(--soft); }
svg .limit { stroke: var(--limit); stroke-width: 1.5; stroke-dasharray: 6 4; }
svg .limit-name { fill: var(--limit); }
svg .leader { fill: none; stroke: var(--soft); stroke-width: .75; }
svg .band { fill: var(--bar); opacity: .18; }
svg .line polyline { fill: none; stroke: hsl(var(--hue) 60% var(--light)); stroke-width: 2;
  stroke-linejoin: round; }
svg .line circle, svg .line-name { fill: hsl(var(--hue) 60% var(--light)); }
svg .edge polyline { fill: none; stroke: var(--bar); opacity: .7; }
svg .edge circle { display: none; }
"""

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One line. `hint` is what a pointer resting on it shows."""

    label: str
    points: Sequence[Point]  # by ascending x
    hint: str = ""
    style: str = "line"  # a class of the style sheet


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Lines over rounds or another `x_label`, an optional area between two of them, and horizontal limits by name."""

    name: str  # of the chart on its page: an id
    title: str
    description: str  # what somebody who cannot see the chart has to know
    y_label: str
    y_range: tuple[float, float]
    series: Sequence[Series]
    x_label: str = "round"
    band: tuple[Sequence[Point], Sequence[Point]] | None = None  # lower and upper edge
    limits: Sequence[tuple[str, float]] = ()

    def document(self) -> str:
        """The chart as an SVG file of its own, light or dark as its reader wishes."""
        style = f"<style>{COLOURS}{STYLE}:root {{ background: var(--paper); font-size: 12px; }}</style>"
        return self.svg().replace("</svg>", f"{style}\n</svg>\n")

    def svg(self) -> str:
        """The chart as one `<svg>` element for a page that has `COLOURS` and `STYLE`."""
        name = escape(self.name)
        return "\n".join(
            [
                f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-desc"'
                ' xmlns="http://www.w3.org/2000/svg">',
                f'<title id="{name}-title">{escape(self.title)}</title>',
                f'<desc id="{name}-desc">{escape(self.description)}</desc>',
                *self._axes(),
                *self._area(),
                *self._limits(),
                *(line for number, series in enumerate(self.series) for line in self._line(number, series)),
                *self._names(),
                "</svg>",
            ]
        )

    def _x(self, value: float) -> float:
        rounds = [x for series in self.series for x, _ in series.points]
        low, high = min(rounds), max(rounds)
        if low == high:  # one round stands in the middle
            low, high = low - 1, high + 1
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        low, high = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def _axes(self) -> list[str]:
        right, bottom, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2
        lines = []
        for tick in ticks(*self.y_range):
            y = self._y(tick)
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            lines.append(_text("tick", LEFT - 8, y + 4, f"{tick:g}", anchor="end"))
        rounds = [x for series in self.series for x, _ in series.points]
        for tick in ticks(min(rounds), max(rounds), most=10, whole=True):
            lines.append(_text("tick", self._x(tick), bottom + 18, f"{tick:g}"))
        lines.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        lines.append(_text("axis-name", (LEFT + right) / 2, HEIGHT - 6, self.x_label))
        lines.append(f'<g transform="translate(15 {middle}) rotate(-90)">')
        return [*lines, _text("axis-name", 0, 0, self.y_label), "</g>"]

    def _area(self) -> list[str]:
        if self.band is None:
            return []
        lower, upper = self.band
        return [f'<polygon class="band" points="{self._path([*lower, *reversed(upper)])}"/>']

    def _limits(self) -> list[str]:
        across = f'class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}"'
        places = ((name, self._y(value)) for name, value in self.limits)
        return [f'<line {across} y1="{y:.1f}" y2="{y:.1f}"><title>{escape(name)}</title></line>' for name, y in places]

    def _line(self, number: int, series: Series) -> list[str]:
        lines = [f'<g class="{series.style}" {self._hue(number)}>']
        lines.append(f"<title>{escape(series.hint or series.label)}</title>")
        lines.append(f'<polyline points="{self._path(series.points)}"/>')
        if len(series.points) <= _MOST_MARKERS:
            places = ((self._x(x), self._y(y)) for x, y in series.points)
            lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in places]
        return [*lines, "</g>"]

    def _names(self) -> list[str]:
        """What stands at the end of each line, moved apart where lines end close together."""
        wanted = [
            (self._y(series.points[-1][1]), series.label, f"{series.style}-name", self._hue(number))
            for number, series in enumerate(self.series)
        ]
        wanted += [(self._y(value), name, "limit-name", "") for name, value in self.limits]
        wanted.sort(key=lambda name: name[0])
        places = spread([y for y, *_ in wanted], gap=_LINE_HEIGHT, low=TOP, high=HEIGHT - BOTTOM)
        right, lines = WIDTH - RIGHT, []
        for y, (end, label, look, hue) in zip(places, wanted, strict=True):
            if abs(y - end) > 1:  # the name was moved: lead back to its line
                lines.append(f'<path class="leader" d="M{right + 4} {end:.1f}L{right + 16} {y:.1f}"/>')
            lines.append(_text(look, right + 20, y + 4, shorten(label), anchor="start", more=hue))
        return lines

    def _hue(self, number: int) -> str:
        return f'style="--hue:{round(215 + 360 * number / len(self.series)) % 360}"'

    def _path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)


def ticks(low: float, high: float, *, most: int = 6, whole: bool = False) -> list[float]:
    """At most about `most` round numbers in [low, high], evenly spaced; `whole` ones only where asked."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 else 1.0
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    if whole:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def spread(places: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Sorted places, moved as little as needed to stand `gap` apart, and inside [low, high] if they fit."""
    moved = list(places)
    for _ in range(len(moved)):  # each pass moves the tightest neighbours by half of what they lack
        for index, (before, after) in enumerate(pairwise(moved)):
            if lack := max(0.0, gap - (after - before)):
                moved[index], moved[index + 1] = before - lack / 2, after + lack / 2
    for index, place in enumerate(moved):  # then whole, from the top edge and from the bottom edge
        moved[index] = max(place, low if index == 0 else moved[index - 1] + gap)
    for index in range(len(moved) - 1, -1, -1):
        moved[index] = min(moved[index], high if index == len(moved) - 1 else moved[index + 1] - gap)
    return moved


def shorten(label: str, most: int = 24) -> str:
    """A label that fits into the right margin."""
    return label if len(label) <= most else f"{label[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _text(look: str, x: float, y: float, words: str, *, anchor: str = "middle", more: str = "") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{look}" {place} {more}>{escape(words)}</text>'
