"""What a worker spends beside the training itself, and how soon after its fork it takes its first step.

The ancestor's CNN, batch 256, on one core. A message's CPU is counted from the end of one training to the end of the
next, so that it holds all that a worker does for it: reading it, checking it, loading the model, the ledger's
questions, and packing the reply before.
"""

import json
import sys
from itertools import pairwise
from statistics import median
from typing import Any

from benchmarks.programs import Programs
from benchmarks.report import Result, Row

WORKERS = 5
STEPS = (1, 12)  # local steps a message: the least there is, and the shipped configuration's
MESSAGES = 8


def run() -> Result:
    rows: list[Row] = []
    firsts: list[float] = []
    laters: list[float] = []
    for steps in STEPS:
        workers = _measure(steps)
        firsts += [messages[0]["steps"][0] for messages in workers]
        laters += [seconds for messages in workers for each in messages[1:] for seconds in each["steps"]]
        rows.append(_row(steps, workers))
    rows.append(
        Row(
            case="first step after a fork",
            variant="CPU",
            median_s=round(median(firsts), 4),
            baseline="later steps",
            ratio=round(median(firsts) / median(laters), 3),
            runs=len(firsts),
            more={"max_s": round(max(firsts), 4), "later_s": round(median(laters), 4)},
        )
    )
    return Result(
        measures="median_s: CPU seconds of a worker's second and later messages, or of one step; in_step: the share of"
        " it in the training itself; outside_s: the rest; first_s: of the first message before the training",
        rows=rows,
        findings=[
            f"{100 * rows[-2].more['in_step']:.1f}% of the CPU of later messages of {STEPS[-1]} steps is in the steps",
            f"first step after a fork: {rows[-1].median_s:.3f} s of CPU, later ones {rows[-1].more['later_s']:.3f} s",
        ],
    )


def _measure(steps: int) -> list[list[dict[str, Any]]]:
    """For each worker the trainings that it wrote down, in order."""
    with Programs() as programs:
        program = [sys.executable, "-m", "benchmarks.worker_host", str(steps), str(MESSAGES), str(WORKERS)]
        programs.call("worker_host", *program, seconds=300.0)
        return json.loads((programs.directory / "workers.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def _row(steps: int, workers: list[list[dict[str, Any]]]) -> Row:
    trained = [each["after"] - each["before"] for messages in workers for each in messages[1:]]
    whole = [later["after"] - sooner["after"] for messages in workers for sooner, later in pairwise(messages)]
    return Row(
        case=f"messages of {steps} step{'s'[: steps - 1]}",
        variant="second and later",
        median_s=round(median(whole), 4),
        runs=len(whole),
        more={
            "in_step": round(sum(trained) / sum(whole), 4),
            "outside_s": round((sum(whole) - sum(trained)) / len(whole), 5),
            "first_s": round(median(messages[0]["before"] for messages in workers), 3),
        },
    )
