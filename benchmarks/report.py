"""What a benchmark found: a table for people, JSON for programs, both under a header that says where and when."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("flwr", "grpcio", "torch", "opacus", "dp-accounting", "numpy")
_NO_REQUIREMENTS = ("jax",)  # named where installed
_BUSY = 0.4  # cores that others use: less may be our own workers, whom nobody waits for


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One variant of one case. `ratio` is `median_s` over that of the variant named `baseline`."""

    case: str
    variant: str
    median_s: float  # what the seconds are of, the result's `measures` says
    runs: int  # measurements behind the median
    baseline: str | None = None
    ratio: float | None = None
    more: dict[str, float] = field(default_factory=dict)  # further columns

    def columns(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "variant": self.variant,
            "median_s": self.median_s,
            "baseline": self.baseline,
            "ratio": self.ratio,
            "runs": self.runs,
            **self.more,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one benchmark found."""

    measures: str  # one line: what `median_s` and the further columns are
    rows: Sequence[Row]
    findings: Sequence[str] = ()  # one line each, computed from the rows


def header(others: float) -> dict[str, Any]:
    """The machine, the versions, the date; `others` are the cores that other programs used meanwhile."""
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": {
            "cpu": _fact("/proc/cpuinfo", "model name"),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(int(_fact("/proc/meminfo", "MemTotal").split()[0]) * 1024 / 1e9, 1),
            "cores_used_by_others": round(others, 2),
            "busy": others > _BUSY,
        },
        "versions": {
            "python": platform.python_version(),
            "linux": platform.release().split("-")[0],
            **{name: version(name) for name in (*_PACKAGES, *filter(find_spec, _NO_REQUIREMENTS))},
        },
    }


def write(name: str, result: Result, head: dict[str, Any]) -> Path:
    """Replaces the benchmark's file in results/ and returns its path."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {
        "benchmark": name,
        **head,
        "measures": result.measures,
        "rows": [row.columns() for row in result.rows],
        "findings": list(result.findings),
    }
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path


def read(name: str, results: Path = RESULTS) -> dict[str, Any] | None:
    """What is in the benchmark's file, if there is one."""
    path = results / f"{name}.json"
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def text(name: str, result: Result, head: dict[str, Any]) -> str:
    """The same for a terminal."""
    machine = head["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in head["versions"].items())
    lines = [
        f"{name}, {head['date']}: {machine['cores']} cores, {machine['cpu']}, {machine['memory_gb']} GB",
        versions,
        result.measures,
        "",
        *_table([row.columns() for row in result.rows]),
        "",
        *result.findings,
    ]
    if machine["busy"]:
        lines.append(f"The machine was busy: others used {machine['cores_used_by_others']} cores meanwhile.")
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    numeric = [all(not isinstance(row.get(name), str) for row in rows) for name in names]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "-" if value is None else str(value)


def _fact(path: str, name: str) -> str:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")
