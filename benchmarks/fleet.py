"""Many clients in one process: does every reply arrive, and what does a round cost on each side?

The shipped digits split over all of them, one DP-SGD step a round; TLS and node keys on. CPU is per message, from the
end of the first round to the end of the last but one.
"""

from statistics import median

from benchmarks import federation
from benchmarks.processes import MemoryPeak, cpu_seconds, descendant, memory_mb, own_cpu_seconds
from benchmarks.report import Result, Row
from common.config import Privacy, Training

SIZES = (10, 50)  # partitions, all in one client process
ROUNDS = 10
_RECORDS = 1437  # in the training set of digits


def run() -> Result:
    rows: list[Row] = []
    for clients in SIZES:
        rows.append(_row(clients, rows))
    replies = " and ".join(f"{clients * ROUNDS} of {clients * ROUNDS}" for clients in SIZES)
    return Result(
        measures="median_s: seconds per round; CPU seconds per message: the clients' host, their zygote and workers,"
        " the SuperLink, the server's other processes; memory: PSS of the clients' side in MB, after the rounds and the"
        " most seen in them",
        rows=rows,
        findings=[f"replies: {replies} arrived"],
    )


def _row(clients: int, before: list[Row]) -> Row:
    records = _RECORDS // clients
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
        federation.split("digits", clients), privacy, Training(device="cpu"), rounds=ROUNDS, learning_rate=16.0
    ) as run:
        with MemoryPeak(run.clients, every=1.0) as peak:
            for number in run.completed():
                if number == 1:
                    first = _cpu(run)
                if number == ROUNDS - 1:  # after the last one its processes end
                    last = _cpu(run)
        idle = memory_mb(run.clients)
        lines, _ = run.results()
    messages = clients * (ROUNDS - 2)
    seconds = [line["seconds"] for line in lines]
    return Row(
        case=f"{clients} clients",
        variant="one process",
        median_s=round(median(seconds), 3),
        baseline=before[0].case if before else f"{clients} clients",
        ratio=round(median(seconds) / (before[0].median_s if before else median(seconds)), 3),
        runs=len(seconds),
        more={
            "min_s": min(seconds),
            "max_s": max(seconds),
            **{name: round((last[name] - first[name]) / messages, 4) for name in first},
            "memory_mb": round(idle, 1),
            "peak_mb": round(peak.mb, 1),
        },
    )


def _cpu(run: federation.Run) -> dict[str, float]:
    host = own_cpu_seconds(run.client)
    superlink = own_cpu_seconds(descendant(run.server, "flower-superlink"))
    return {
        "host_cpu_s": host,
        "worker_cpu_s": cpu_seconds(run.clients) - host,
        "superlink_cpu_s": superlink,
        "server_cpu_s": cpu_seconds([run.server]) - superlink,
    }
