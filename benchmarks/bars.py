"""Horizontal bars in groups, as SVG text in the colours of common.charts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from common.charts import COLOURS, ticks

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 160, 70, 34, 30
_ROW, _HEAD, _THICK = 18, 26, 11  # heights: of a bar's row, of a group's name, of the bar
_STYLE = """\
:root { background: var(--paper); font-size: 12px; }
text { fill: var(--soft); }
.title, .group { fill: var(--ink); font-weight: 600; }
.grid { stroke: var(--rule); }
.bar { fill: var(--bar); }
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    label: str
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Bars:
    """A logarithmic axis starts at the power of ten at or below the least value, a linear one at zero."""

    title: str
    groups: Mapping[str, Sequence[Bar]]
    logarithmic: bool = False

    def document(self) -> str:
        """The picture as an SVG file of its own, light or dark as its reader wishes."""
        height = _TOP + _BOTTOM + sum(_HEAD + _ROW * len(bars) for bars in self.groups.values())
        lines = [
            f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">',
            f"<title>{escape(self.title)}</title>",
            f"<style>{COLOURS}{_STYLE}</style>",
            _text("title", 12, 20, f"{self.title}{' (logarithmic)' if self.logarithmic else ''}", anchor="start"),
        ]
        for tick in self._ticks():
            x = self._x(tick)
            lines.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
            lines.append(_text("tick", x, height - _BOTTOM + 16, f"{tick:g}", anchor="middle"))
        y = float(_TOP)
        for name, bars in self.groups.items():
            lines.append(_text("group", 12, y + _HEAD - 8, name, anchor="start"))
            y += _HEAD
            for bar in bars:
                end, middle = self._x(bar.value), y + _THICK / 2 + 4
                lines.append(_text("label", _LEFT - 8, middle, bar.label, anchor="end"))
                lines.append(f'<rect class="bar" x="{_LEFT}" y="{y:.1f}" width="{end - _LEFT:.1f}" height="{_THICK}"/>')
                lines.append(_text("value", end + 6, middle, f"{bar.value:.3g}", anchor="start"))
                y += _ROW
        return "\n".join([*lines, "</svg>", ""])

    def _range(self) -> tuple[float, float]:
        values = [bar.value for bars in self.groups.values() for bar in bars]
        low = 10.0 ** math.floor(math.log10(min(values))) if self.logarithmic else 0.0
        return low, max(values) if max(values) > low else low + 1.0

    def _x(self, value: float) -> float:
        low, high = self._range()
        if self.logarithmic:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def _ticks(self) -> list[float]:
        low, high = self._range()
        if not self.logarithmic:
            return ticks(low, high)
        powers = range(round(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [tick for power in powers for tick in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if tick <= high]


def _text(look: str, x: float, y: float, words: str, *, anchor: str) -> str:
    return f'<text class="{look}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
