"""What a client pays for one message with almost no training, beside a stock flower-supernode doing the same.

One DP-SGD step on 64 real digits, every record in the batch; TLS and node keys on. Counted is the clients' side only:
every process of it, from the end of one round to the end of the next, waiting included, after warm-up rounds.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice, pairwise
from statistics import median

from benchmarks import federation, few_digits, stock
from benchmarks.processes import MemoryPeak, alive, cpu_seconds, memory_mb
from benchmarks.report import Result, Row
from common.config import Partition, Privacy, Training

OURS = {1: 5, 4: 2, 50: 1}  # partitions in one client process: rounds a measurement takes, long beside a clock tick
RUNS = 5  # measurements
_WARM_UP = 3  # rounds; one is enough for stock, which starts a process for each message
_WORKER_SECONDS = 5.0  # after which an idle worker of ours ends
_IDLE_PROCESSES = 2  # of a client without work: supernode and superexec, host and zygote
_SETTLE_SECONDS = 60.0
STOCK_NAME, OUR_NAME = "stock SuperNode", "one process"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of the whole clients' side."""

    clients: int
    cpu: Sequence[float]  # seconds per message, one for each measurement
    idle_mb: float
    busy_mb: float  # the most that was seen


def run() -> Result:
    costs = {}
    with stock.train(1, rounds=1 + RUNS) as run:  # one flower-supernode: many do not come through a round
        costs[STOCK_NAME, 1] = _measure(run, 1, warm_up=1)
    for clients, each in OURS.items():
        with _ours(clients, rounds=_WARM_UP + RUNS * each) as run:
            costs[OUR_NAME, clients] = _measure(run, clients, warm_up=_WARM_UP, each=each)
            run.results()
    rows = [_row(variant, cost, costs[STOCK_NAME, 1]) for (variant, _), cost in costs.items()]
    return Result(
        measures="median_s: CPU seconds of the clients' side per message; memory: PSS in MB per client, idle after work"
        " and the most seen at work; ratios: to one stock SuperNode",
        rows=rows,
        findings=[_finding(row) for row in rows if row.variant == OUR_NAME],
    )


def _ours(clients: int, *, rounds: int) -> AbstractContextManager[federation.Run]:
    privacy = Privacy(
        epsilon=100.0,
        delta=1e-5,
        noise_multiplier=3.0,
        max_grad_norm=0.25,
        batch_size=few_digits.RECORDS,
        records=few_digits.RECORDS,
        max_steps_per_round=1,
        accounting="adaptive",
    )
    members = [Partition(name=f"few-{index}", index=index, of=clients) for index in range(clients)]
    training = Training(device="cpu", idle_seconds=_WORKER_SECONDS)
    return federation.train(members, privacy, training, task=few_digits.SPEC, rounds=rounds, learning_rate=16.0)


def _measure(run: stock.Run | federation.Run, clients: int, *, warm_up: int, each: int = 1) -> Cost:
    rounds = run.completed()
    with MemoryPeak(run.clients, every=0.2) as peak:  # not later: looking costs CPU
        for _ in range(warm_up):
            next(rounds)
    cpu = [cpu_seconds(run.clients)]
    cpu += [cpu_seconds(run.clients) for _ in islice(rounds, each - 1, None, each)]
    idle = _IDLE_PROCESSES * len(run.clients)
    run.programs.wait_until(lambda: alive(run.clients) == idle, f"{idle} idle processes", seconds=_SETTLE_SECONDS)
    return Cost(
        clients=clients,
        cpu=[(after - before) / (clients * each) for before, after in pairwise(cpu)],
        idle_mb=memory_mb(run.clients),
        busy_mb=peak.mb,
    )


def _row(variant: str, cost: Cost, baseline: Cost) -> Row:
    idle, busy = cost.idle_mb / cost.clients, cost.busy_mb / cost.clients
    return Row(
        case=f"{cost.clients} client{'s'[: cost.clients - 1]}",
        variant=variant,
        median_s=round(median(cost.cpu), 4),
        baseline=STOCK_NAME,
        ratio=round(median(cost.cpu) / median(baseline.cpu), 4),
        runs=len(cost.cpu),
        more={
            "min_s": round(min(cost.cpu), 4),
            "max_s": round(max(cost.cpu), 4),
            "idle_mb": round(idle, 1),
            "idle_ratio": round(idle / baseline.idle_mb, 3),
            "busy_mb": round(busy, 1),
            "busy_ratio": round(busy / baseline.busy_mb, 3),
        },
    )


def _finding(row: Row) -> str:
    cpu, idle, busy = map(_times, (row.ratio or 1.0, row.more["idle_ratio"], row.more["busy_ratio"]))
    return (
        f"{row.case} in one process, each beside one stock SuperNode:"
        f" {cpu} CPU per message, {idle} memory idle, {busy} memory at work"
    )


def _times(ratio: float) -> str:
    return f"{1 / ratio:.3g}x less" if ratio < 1 else f"{ratio:.3g}x as much"
