"""What a round costs the server in memory: a model of 20 MB, ten times as many clients, the same memory?

The real server, with TLS and node keys, and clients that train nothing but take in and send back the whole model, all
about the same time. Counted is the server's whole tree: supervisor, SuperLink, ServerApp with torch.
"""

from statistics import median

from benchmarks import federation, large_model
from benchmarks.processes import MemoryPeak, cpu_seconds, memory_mb
from benchmarks.report import Result, Row
from common.config import Partition, Privacy, Training

SIZES = (10, 100)
REPLIES_MB = 10 * large_model.MEGABYTES  # server.reply_memory_mb: what the smaller round needs at most
_PRIVACY = Privacy(
    epsilon=100.0, delta=1e-5, noise_multiplier=1.0, max_grad_norm=1.0, batch_size=64, records=64, max_steps_per_round=1
)  # fmt: skip


def run() -> Result:
    rows: list[Row] = []
    for clients in SIZES:
        rows.append(_row(clients, rows))
    small, large = rows[0].more["peak_mb"], rows[-1].more["peak_mb"]
    return Result(
        measures="median_s: seconds of a round; memory: PSS of the server's processes in MB, the most seen in the"
        f" round and after it; CPU seconds of all of them per message; server.reply_memory_mb is {REPLIES_MB:g}",
        rows=rows,
        findings=[
            f"a model of {large_model.MEGABYTES:g} MB: {small:.0f} MB at most with {SIZES[0]} clients,"
            f" {large:.0f} MB with {SIZES[-1]}: {large / small:.2f} times as much"
        ],
    )


def _row(clients: int, before: list[Row]) -> Row:
    members = [Partition(name=f"large-{index}", index=index, of=clients) for index in range(clients)]
    with federation.train(
        members,
        _PRIVACY,
        Training(device="cpu"),
        task=large_model.SPEC,
        rounds=1,
        learning_rate=1.0,
        client="benchmarks.prepared_client",
        reply_memory_mb=REPLIES_MB,
    ) as run:
        with MemoryPeak([run.server], every=0.25) as peak:
            for _ in run.completed():
                cpu, after = cpu_seconds([run.server]), memory_mb([run.server])
        lines, _ = run.results()
    seconds = [line["seconds"] for line in lines]
    return Row(
        case=f"{clients} clients",
        variant=f"{large_model.MEGABYTES:g} MB",
        median_s=round(median(seconds), 2),
        baseline=before[0].case if before else f"{clients} clients",
        ratio=round(median(seconds) / (before[0].median_s if before else median(seconds)), 2),
        runs=len(seconds),
        more={
            "peak_mb": round(peak.mb, 1),
            "after_mb": round(after, 1),
            "cpu_s_per_message": round(cpu / clients, 3),
        },
    )
