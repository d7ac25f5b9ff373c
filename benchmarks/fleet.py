"""Many clients: does every reply arrive, and what does a round cost on each side?

The shipped digits split over all of them, one DP-SGD step a round; TLS and node keys on. CPU is per message, from the
end of the first round to the end of the last but one. The least squares fits say whether a client more costs the same
however many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import correlation, linear_regression, median
from typing import Self

from benchmarks import federation
from benchmarks.processes import MemoryPeak, alive, cpu_seconds, descendant, memory_mb, own_cpu_seconds
from benchmarks.report import RESULTS, Result, Row
from common.charts import Chart, Point, Series
from common.config import Privacy, Training


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    clients: int
    rounds: int
    processes: int = 1


SIZES = (
    Size(clients=10, rounds=5),
    Size(clients=50, rounds=4),
    Size(clients=100, rounds=4),
    Size(clients=200, rounds=3),
    Size(clients=500, rounds=3),
)  # benchmarks.endurance has more of both
_RECORDS = 1437  # in the training set of digits
_WORKER_SECONDS = 20.0  # after which an idle worker ends: not in a lull of a round, its CPU would not be counted
_IDLE_PROCESSES = 2  # of a client without work: host and zygote
_SETTLE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """`base + each * clients`, and how much of the differences that explains."""

    base: float
    each: float
    r_squared: float

    @classmethod
    def of(cls, points: Sequence[Point]) -> Self:
        clients, values = zip(*points, strict=True)
        line = linear_regression(clients, values)
        return cls(base=line.intercept, each=line.slope, r_squared=correlation(clients, values) ** 2)

    def at(self, clients: float) -> float:
        return self.base + self.each * clients

    def text(self, unit: str) -> str:
        return f"{self.base:.3g} {unit} + {self.each:.3g} {unit} a client, R^2 {self.r_squared:.4f}"


def run() -> Result:
    result = measure(SIZES)
    pairs = list(zip(SIZES, result.rows, strict=True))
    seconds = [(float(size.clients), row.median_s) for size, row in pairs]
    memory = [(float(size.clients), row.more["memory_mb"]) for size, row in pairs]
    for name, title, unit, points in (
        ("fleet", "Seconds per round", "s", seconds),
        ("fleet_memory", "Memory of the clients' side, idle", "MB", memory),
    ):
        fit = Fit.of(points)
        result = replace(result, findings=[*result.findings, f"{title}: {fit.text(unit)}"])
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.svg").write_text(_chart(name, title, unit, points, fit).document(), encoding="utf-8")
    return result


def measure(sizes: Sequence[Size]) -> Result:
    """A row for each size. Raises BenchmarkError unless every reply of every round arrives."""
    rows: list[Row] = []
    for size in sizes:
        rows.append(_row(size, rows))
    replies = ", ".join(f"{size.clients * size.rounds} of {size.clients} clients" for size in sizes)
    return Result(
        measures="median_s: seconds per round; CPU seconds per message: the clients' hosts, their zygotes and workers,"
        " the SuperLink, the server's other processes; memory: PSS of the clients' side in MB, idle after the rounds"
        " and the most seen in them",
        rows=rows,
        findings=[f"replies: all arrived: {replies}"],
    )


def _row(size: Size, before: list[Row]) -> Row:
    records = _RECORDS // size.clients
    privacy = Privacy(
        epsilon=100.0,
        delta=1e-5,
        noise_multiplier=3.0,
        max_grad_norm=0.25,
        batch_size=records,
        records=records,
        max_steps_per_round=1,
        accounting="adaptive",
    )
    with federation.train(
        federation.split("digits", size.clients),
        privacy,
        Training(device="cpu", idle_seconds=_WORKER_SECONDS),
        rounds=size.rounds,
        learning_rate=16.0,
        processes=size.processes,
    ) as run:
        with MemoryPeak(run.clients, every=1.0) as peak:
            for number in run.completed():
                if number == 1:
                    first = _cpu(run)
                if number == size.rounds - 1:  # after the last one its processes end
                    last = _cpu(run)
        lines, _ = run.results()
        idle = _IDLE_PROCESSES * size.processes
        run.programs.wait_until(lambda: alive(run.clients) == idle, f"{idle} idle processes", seconds=_SETTLE_SECONDS)
        memory = memory_mb(run.clients)
    messages = size.clients * (size.rounds - 2)
    seconds = [line["seconds"] for line in lines]
    return Row(
        case=f"{size.clients} clients",
        variant="one process" if size.processes == 1 else f"{size.processes} processes",
        median_s=round(median(seconds), 3),
        baseline=before[0].case if before else f"{size.clients} clients",
        ratio=round(median(seconds) / (before[0].median_s if before else median(seconds)), 3),
        runs=len(seconds),
        more={
            "min_s": min(seconds),
            "max_s": max(seconds),
            **{name: round((last[name] - first[name]) / messages, 4) for name in first},
            "memory_mb": round(memory, 1),
            "peak_mb": round(peak.mb, 1),
        },
    )


def _cpu(run: federation.Run) -> dict[str, float]:
    hosts = sum(map(own_cpu_seconds, run.clients))
    superlink = own_cpu_seconds(descendant(run.server, "flower-superlink"))
    return {
        "host_cpu_s": hosts,
        "worker_cpu_s": cpu_seconds(run.clients) - hosts,
        "superlink_cpu_s": superlink,
        "server_cpu_s": cpu_seconds([run.server]) - superlink,
    }


def _chart(name: str, title: str, unit: str, points: Sequence[Point], fit: Fit) -> Chart:
    ends = (0.0, points[-1][0])
    return Chart(
        name=name,
        title=title,
        description=f"{title} against the number of clients: {fit.text(unit)}",
        y_label=unit,
        y_range=(0.0, 1.05 * max(fit.at(ends[1]), *(value for _, value in points))),
        x_label="clients",
        series=[
            Series(label=f"fit, R^2 {fit.r_squared:.3f}", points=[(x, max(0.0, fit.at(x))) for x in ends]),
            Series(label="measured", points=points),
        ],
    )
