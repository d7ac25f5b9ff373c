"""results/<name>.svg: a picture of a benchmark's rows, always the same for the same results/<name>.json."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.bars import Bar, Bars


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """Which column a picture shows."""

    column: str
    words: str
    logarithmic: bool = False


# A benchmark that is not here has no picture, or draws its own when it runs.
VIEWS = {
    "step": View(column="ratio", words="CPU time of a step, as a multiple of plain SGD's", logarithmic=True),
    "gpu": View(column="ratio", words="time of a step on a GPU, as a multiple of plain SGD's", logarithmic=True),
    "message": View(column="median_s", words="CPU seconds of the clients' side per message", logarithmic=True),
    "accuracy": View(column="accuracy", words="test accuracy, median over the runs"),
    "time_to_accuracy": View(column="median_s", words="CPU seconds of the clients until the test accuracy"),
}


def update(names: Iterable[str], results: Path = report.RESULTS) -> None:
    """Draws each benchmark that has a view and a file in `results`."""
    for name in names:
        document = report.read(name, results)
        if name in VIEWS and document is not None:
            (results / f"{name}.svg").write_text(draw(document), encoding="utf-8")


def draw(document: dict[str, Any]) -> str:
    """The SVG file for what is in a file of results/."""
    view = VIEWS[document["benchmark"]]
    groups: dict[str, list[Bar]] = {}
    for row in document["rows"]:
        groups.setdefault(row["case"], []).append(Bar(label=row["variant"], value=row[view.column]))
    return Bars(title=view.words, groups=groups, logarithmic=view.logarithmic).document()
