"""The two figures of a run's report, from the lines of its `rounds.jsonl`."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from common.charts import Chart, Point, Series

MOST_LINES = 12  # more lines than these cannot be told apart


def accuracy(rounds: list[dict[str, Any]]) -> str:
    """The server's test accuracy after each round, as SVG, or one sentence where there is none."""
    evaluated = ((line["round"], known(line["test_accuracy"])) for line in rounds)
    points = [(number, value) for number, value in evaluated if value is not None]
    if not points:
        return "<p>No round was evaluated.</p>"
    values = [value for _, value in points]
    room = max(0.02, (max(values) - min(values)) * 0.1)
    (first, start), (last, end) = points[0], points[-1]
    best = max(points, key=lambda point: point[1])
    return Chart(
        name="accuracy-chart",
        title="Test accuracy by round",
        description=f"{start:.3f} after round {first}, {end:.3f} after round {last},"
        f" highest {best[1]:.3f} after round {best[0]}. All values are in the table of rounds.",
        y_label="test accuracy",
        y_range=(max(0.0, min(values) - room), min(1.0, max(values) + room)),
        series=[Series(label=f"{end:.3f}", points=points, hint="test accuracy")],
    ).svg()


def epsilon(rounds: list[dict[str, Any]]) -> str:
    """What each partition had spent after each round: lines, or their envelope where they are too many."""
    paths: dict[str, list[Point]] = {}
    budgets: dict[str, float] = {}
    for line in rounds:
        for name, standing in line["partitions"].items():
            if (value := known(standing["epsilon_spent"])) is not None:
                paths.setdefault(name, []).append((line["round"], value))
                budgets[name] = standing["epsilon_budget"]
    if not paths:
        return "<p>No partition reported what it had spent.</p>"
    last = rounds[-1]["round"]
    alike: dict[tuple[Point, ...], list[str]] = {}  # partitions with the same line share it
    for name, path in paths.items():
        alike.setdefault(_filled(path, last), []).append(name)
    spent = [path[-1][1] for path in paths.values()]
    highest = max(*budgets.values(), *(value for path in paths.values() for _, value in path))
    series = [
        Series(label=_label(names, len(paths)), points=path, hint=", ".join(names)) for path, names in alike.items()
    ]
    band = None
    if len(series) > MOST_LINES:
        series, band = _envelope([list(path) for path, names in alike.items() for _ in names])
    bounds = sorted({min(budgets.values()), max(budgets.values())})
    return Chart(
        name="epsilon-chart",
        title="Epsilon spent by partition and round",
        description=f"After round {last}, {len(paths)} partitions had spent between {min(spent):.3f} and"
        f" {max(spent):.3f}, median {median(spent):.3f}, of {' to '.join(f'{value:g}' for value in bounds)}."
        " The last value of each partition is in the table of partitions.",
        y_label="epsilon spent",
        y_range=(0.0, highest * 1.05),
        series=series,
        band=band,
        limits=[(f"budget {value:g}", value) for value in bounds],
    ).svg()


def _filled(path: Sequence[Point], last: int) -> tuple[Point, ...]:
    """The path with a value in every round from its first to `last`: what is spent stays spent."""
    reported, value, filled = dict(path), 0.0, []
    for number in range(int(path[0][0]), last + 1):
        value = reported.get(number, value)
        filled.append((number, value))
    return tuple(filled)


def _envelope(paths: list[list[Point]]) -> tuple[list[Series], tuple[list[Point], list[Point]]]:
    by_round: dict[float, list[float]] = {}
    for path in paths:
        for number, value in path:
            by_round.setdefault(number, []).append(value)
    numbers = sorted(by_round)
    low, middle, high = ([(n, of(by_round[n])) for n in numbers] for of in (min, median, max))
    count = f"of {len(paths)} partitions"
    series = [
        Series(label=f"most {high[-1][1]:.3f}", points=high, hint=f"most {count}", style="edge"),
        Series(label=f"median {middle[-1][1]:.3f}", points=middle, hint=f"median {count}"),
        Series(label=f"least {low[-1][1]:.3f}", points=low, hint=f"least {count}", style="edge"),
    ]
    return series, (low, high)


def _label(names: Sequence[str], of: int) -> str:
    if len(names) == 1:
        return names[0]
    if len(names) == of:
        return "both partitions" if of == 2 else f"all {of} partitions"
    return f"{names[0]} + {len(names) - 1} more"


def known(value: float | None) -> float | None:
    """None also for a number that is none, as a diverged model's loss."""
    return value if value is not None and math.isfinite(value) else None
