"""The dashboards as Grafana reads them: panels, their queries, and what a real Prometheus answers."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.dashboards.prometheus import INTERVAL, Prometheus
from tests.federation import ROOT

FOLDER = ROOT / "monitoring/grafana/dashboards"
POINTS = 600  # of a chart, about its width in pixels

Panel = dict[str, Any]
Target = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The time that a dashboard shows, Unix time."""

    start: float
    end: float

    @property
    def step(self) -> int:
        return max(INTERVAL, round((self.end - self.start) / POINTS))


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def dashboards() -> list[Path]:
    return sorted(FOLDER.glob("*.json"))


def panels(dashboard: dict[str, Any]) -> Iterator[Panel]:
    for panel in dashboard["panels"]:
        yield panel
        yield from panel.get("panels", ())  # of a collapsed row


def expression(target: Target, window: Window) -> str:
    """The query with Grafana's variables as it fills them when all tasks and partitions are chosen."""
    values = {
        "$__rate_interval": f"{max(window.step + INTERVAL, 4 * INTERVAL)}s",
        "$__range": f"{round(window.end - window.start)}s",
        "$partition": ".*",
        "$task": ".*",
    }
    text = target["expr"]
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def answer(target: Target, window: Window, source: Prometheus) -> list[dict[str, Any]]:
    """What the panel gets for this query."""
    text = expression(target, window)
    if target["instant"]:
        return source.query(text, window.end)
    start = window.start - window.start % window.step  # aligned, as Grafana does
    return source.query_range(text, start, window.end, window.step)
