"""How soon a model is good at equal epsilon: this federation beside the recipe of Flower's own Opacus example.

The same data, partitions and accountant (privacy loss distributions); each has its own network. The budget is what the
recipe spends in its rounds; ours gets the least noise with which its own rounds fit into it. CPU is counted from the
start of a process, for the recipe of its training alone (benchmarks.example_recipe), for ours of the whole client:
messages, TLS, ledgers and signatures too. The learning rates of both were chosen beforehand, on the test set, so that
both are optimistic.
"""

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks import example_recipe, federation
from benchmarks.processes import cpu_seconds
from benchmarks.programs import BenchmarkError
from benchmarks.report import Result, Row
from client.accounting import compose, epsilon, noise_within
from common.config import Privacy, Training

REPEATS, CLIENTS = 2, 2  # runs of each; the example has two clients
BASELINE, OURS = "Flower's example", "fedeps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A data set and how each of the two trains on it."""

    task: str
    records: int  # of a partition
    target: float  # the test accuracy that is waited for
    example_rounds: int
    example_rate: float  # learning rates
    rounds: int
    steps: int  # of a round
    batch_size: int
    max_grad_norm: float
    learning_rate: float

    def budget(self) -> float:
        """The epsilon that the recipe spends: the most of its clients."""
        spent = compose([example_recipe.release(self.records, self.example_rounds)])
        return epsilon("fixed", spent, example_recipe.DELTA)

    def privacy(self) -> Privacy:
        """Our terms: that budget, and the least noise with which all rounds fit into it."""
        budget, delta = self.budget(), example_recipe.DELTA
        rate, steps = self.batch_size / self.records, self.rounds * self.steps
        return Privacy(
            epsilon=budget,
            delta=delta,
            noise_multiplier=noise_within(budget, "fixed", sample_rate=rate, steps=steps, delta=delta),
            max_grad_norm=self.max_grad_norm,
            batch_size=self.batch_size,
            records=self.records,
            max_steps_per_round=self.steps,
            accounting="fixed",
        )


CASES = (
    Case(
        task="fashion_mnist", records=30_000, target=0.60, example_rounds=4, example_rate=0.003,
        rounds=20, steps=10, batch_size=256, max_grad_norm=0.1, learning_rate=8.0,
    ),
    Case(
        task="digits", records=718, target=0.70, example_rounds=20, example_rate=0.03,
        rounds=20, steps=1, batch_size=718, max_grad_norm=0.25, learning_rate=128.0,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Course:
    """One run."""

    points: Sequence[tuple[float, float]]  # CPU seconds and test accuracy after each round
    epsilon: float  # the most that a client has spent

    def reached(self, accuracy: float) -> tuple[float, float]:
        """CPU seconds and rounds until the accuracy was there, infinite if it never was."""
        return next(
            ((cpu, float(number)) for number, (cpu, found) in enumerate(self.points, 1) if found >= accuracy),
            (math.inf, math.inf),
        )


def run() -> Result:
    # Two at a time, one of each: what else the machine does meets both. CPU counts from a process's start: each is new.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, max_tasks_per_child=1) as pool:
        waiting = [[(pool.submit(_example, case), pool.submit(_ours, case)) for _ in range(REPEATS)] for case in CASES]
        try:
            courses = [[(example.result(), ours.result()) for example, ours in each] for each in waiting]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows: list[Row] = []
    for case, pairs in zip(CASES, courses, strict=True):
        example, ours = zip(*pairs, strict=True)
        rows.append(_row(case, BASELINE, example, None))
        rows.append(_row(case, OURS, ours, rows[-1]))
    return Result(
        measures="median_s: CPU seconds of the clients until the case's test accuracy, after so many rounds (of the"
        " example its training alone: no messages, no processes to start); accuracy: at the end, at the epsilon spent"
        f" and delta {example_recipe.DELTA:g}; cpu_s: of all rounds",
        rows=rows,
        findings=[_finding(rows[index], rows[index + 1]) for index in range(0, len(rows), 2)],
    )


def _row(case: Case, variant: str, courses: Sequence[Course], baseline: Row | None) -> Row:
    cpu, rounds = (median(each) for each in zip(*(course.reached(case.target) for course in courses), strict=True))
    name = f"{case.task}, {case.target:.0%}"
    if math.isinf(cpu):
        ends = ", ".join(f"{course.points[-1][1]:.3f}" for course in courses)
        raise BenchmarkError(f"{name}: {variant} does not come so far: {ends}")
    ends = [course.points[-1] for course in courses]
    return Row(
        case=name,
        variant=variant,
        median_s=round(cpu, 2),
        baseline=BASELINE,
        ratio=round(cpu / baseline.median_s, 4) if baseline else 1.0,
        runs=len(courses),
        more={
            "rounds": int(rounds),
            "accuracy": round(median(accuracy for _, accuracy in ends), 4),
            "min_accuracy": round(min(accuracy for _, accuracy in ends), 4),
            "epsilon": round(max(course.epsilon for course in courses), 4),
            "cpu_s": round(median(cpu for cpu, _ in ends), 2),
        },
    )


def _finding(example: Row, ours: Row) -> str:
    return (
        f"{ours.case}: {ours.median_s / example.median_s:.2f} of the CPU time of the example's recipe; at the end"
        f" {ours.more['accuracy']:.3f} beside {example.more['accuracy']:.3f}, at epsilon {ours.more['epsilon']:.2f}"
        f" and {example.more['epsilon']:.2f}"
    )


def _example(case: Case) -> Course:
    with TemporaryDirectory(prefix="benchmark-") as directory:
        course = example_recipe.train(
            case.task, Path(directory), clients=CLIENTS, rounds=case.example_rounds, learning_rate=case.example_rate
        )
        points = list(course)
    return Course(points=points, epsilon=case.budget())


def _ours(case: Case) -> Course:
    privacy = case.privacy()
    partitions = federation.split(case.task, CLIENTS)
    training = Training(device="cpu", physical_batch_size=512)
    with federation.train(
        partitions, privacy, training, task=case.task, rounds=case.rounds, learning_rate=case.learning_rate
    ) as run:
        cpu = [cpu_seconds(run.clients) for _ in run.completed()]
        lines, summary = run.results()
    spent = max(partition["epsilon_spent"] for partition in summary["partitions"])
    if spent > privacy.epsilon:
        raise BenchmarkError(f"{case.task}: a client spent epsilon {spent}, more than {privacy.epsilon}")
    accuracies = [line["test_accuracy"] for line in lines]
    return Course(points=list(zip(cpu, accuracies, strict=True)), epsilon=spent)
