"""What lies between a step and its records: the Poisson mask, the gather, the augmentation, the normalising.

On made-up records of each shipped task's shape, resident as bytes, in a process set up like a worker: each part by
itself, the whole, and beside them the step that they serve, in the mode that `auto` takes, and one of plain SGD on
records that are floats already. The variants take turns, so that what else the machine does meets all alike.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.programs import BenchmarkError
from benchmarks.report import Result, Row

STEP, PLAIN, PATH = "DP-SGD step, auto", "plain SGD step", "data path"
_PARTS = ("mask", "gather", "augment", "prepare")
_RUNS = 15
_STEPS = 12  # of a round: what a round sets up is shared among them
_NOISE, _RATE, _BOUND = 1.0, 1e-3, 1.0
_PATIENCE = 300.0  # seconds, for one task


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A shipped task at a usual size: so many records in a partition, so many expected in a batch."""

    task: str
    shape: tuple[int, int, int]
    shades: int
    records: int
    batch: int


CASES = (
    Case(task="digits", shape=(1, 8, 8), shades=17, records=718, batch=64),
    Case(task="fashion_mnist", shape=(1, 28, 28), shades=256, records=6000, batch=256),
    Case(task="cifar10", shape=(3, 32, 32), shades=256, records=5000, batch=256),
)


def run() -> Result:
    rows, findings = [], []
    for case in CASES:
        seconds, mode = _measure(case)
        name = f"{case.task}, batch {case.batch} of {case.records}"
        medians = {variant: statistics.median(each) for variant, each in seconds.items()}
        rows += [
            Row(
                case=name, variant=variant, median_s=median, runs=len(seconds[variant]),
                baseline=STEP, ratio=median / medians[STEP],
            )
            for variant, median in medians.items()
        ]  # fmt: skip
        findings.append(
            f"{case.task}: the data path costs {medians[PATH] / medians[STEP]:.1%} of a DP-SGD step ({mode}),"
            f" {medians[PATH] / medians[PLAIN]:.1%} of a step of plain SGD"
        )
    return Result(measures="median_s: CPU seconds for one step, one thread", rows=rows, findings=findings)


def _measure(case: Case) -> tuple[dict[str, list[float]], str]:
    """Seconds of each variant's runs, and the gradient mode that `auto` took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, case), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(_PATIENCE):
            found: tuple[dict[str, list[float]], str] = ours.recv()
            return found
        raise BenchmarkError(f"{case.task}: nothing after {_PATIENCE:g} s")
    except EOFError:
        raise BenchmarkError(f"{case.task}: its process ended") from None
    finally:
        process.kill()
        process.join()


def _serve(host: Connection, case: Case) -> None:
    from client.job import keep_memory

    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    variants, mode = _variants(case)
    repeats = {name: _repeats(once) for name, once in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(_RUNS):
        for name, once in variants.items():
            seconds[name].append(_seconds(once, repeats[name]) / (_STEPS if name == STEP else 1))
    host.send((seconds, mode))


def _variants(case: Case) -> tuple[dict[str, Callable[[], object]], str]:
    from client.accounting import Release
    from client.gradients import choose
    from client.noise import SecureGenerator
    from client.training import Step, train
    from common.tasks import Data, load_task
    from common.tasks.inputs import Inputs

    task = load_task(case.task, Path())  # its files are not needed: the records are made up
    inputs, generator = Inputs.of(task), SecureGenerator()
    pictures = torch.randint(case.shades, (case.records, *case.shape)).byte()
    data = Data(inputs=pictures, targets=torch.randint(10, (case.records,)))
    model, rate = task.model().train(), case.batch / case.records
    drawn = torch.randperm(case.records)[: case.batch]
    draws = inputs.draw(case.batch, data.inputs.device)
    raw, targets = data.inputs[drawn], data.targets[drawn]
    made = inputs.training(raw, draws)
    mode = choose(model, task.loss, made[:64], targets[:64], _BOUND).mode
    terms = Step(
        max_grad_norm=_BOUND, batch_size=case.batch, physical_batch_size=2 * case.batch, learning_rate=_RATE,
        gradient_mode=mode,
    )  # fmt: skip

    def mask() -> Tensor:
        return generator.poisson_mask(case.records, rate).nonzero().squeeze(1)

    def gather(chosen: Tensor = drawn) -> tuple[Tensor, Tensor]:
        return data.inputs.index_select(0, chosen), data.targets.index_select(0, chosen)

    def path() -> None:
        chosen = mask()
        inputs.training(gather(chosen)[0], inputs.draw(len(chosen), chosen.device))

    def augment() -> None:
        if inputs.augment is not None:
            inputs.augment(raw, inputs.draw(case.batch, raw.device))

    plain_model = task.model().train()
    optimizer = torch.optim.SGD(plain_model.parameters(), lr=_RATE)

    def plain() -> None:
        optimizer.zero_grad()
        task.loss(plain_model(made), targets).mean().backward()
        optimizer.step()

    parts = dict(zip(_PARTS, (mask, gather, augment, partial(inputs.evaluation, raw)), strict=True))
    release = Release(noise_multiplier=_NOISE, sample_rate=rate, steps=_STEPS)
    steps = partial(train, model, task.loss, data, release=release, step=terms, generator=generator, inputs=inputs)
    return {STEP: steps, PLAIN: plain, PATH: path, **parts}, mode


def _repeats(once: Callable[[], object]) -> int:
    """So many that a run takes some milliseconds, whatever one costs."""
    once()
    return max(1, int(0.02 / max(_seconds(once, 3), 1e-7)))


def _seconds(once: Callable[[], object], repeats: int) -> float:
    started = time.process_time()
    for _ in range(repeats):
        once()
    return (time.process_time() - started) / repeats
