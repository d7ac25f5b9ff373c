"""One training step: plain SGD, our gradient modes, and Opacus' ways as it ships them, each in a process of its own.

The variants take turns, so that what else the machine does meets all alike. One thread each, as a worker has where two
train on two cores; ours goes through client.training, noise and sampling included, in a process set up like a worker.
"""

import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import jax_step
from benchmarks.models import CASES, CLASSES, Case, ancestor_cnn
from benchmarks.report import Result, Row

BASELINE = "plain SGD"
_WORKER = ("auto", "hooks", "book_keeping", "compiled")  # of ours
_SLOW = "compiled"  # to start: the others do so meanwhile
_OPACUS = {"Opacus hooks": "hooks", "Opacus functorch": "functorch", "Opacus ghost": "ghost"}
VARIANTS = (BASELINE, *_WORKER, *_OPACUS)
_RATE, _BOUND, _NOISE = 1e-3, 1.2, 1.0
_START_SECONDS, _RUN_SECONDS = 300.0, 300.0

Step = Callable[[], object]


def run() -> Result:
    rows, findings = [], []
    for case in CASES:
        seconds, remarks = _measure(case)
        medians = {variant: statistics.median(each) for variant, each in seconds.items()}
        plain = medians[BASELINE]
        rows += [
            Row(
                case=case.name, variant=variant, median_s=median, runs=len(seconds[variant]),
                baseline=BASELINE, ratio=median / plain,
            )
            for variant, median in medians.items()
        ]  # fmt: skip
        if "Opacus hooks" in medians:
            faster = medians["Opacus hooks"] / medians["auto"]
            findings.append(
                f"{case.name}: auto costs {medians['auto'] / plain:.2f} of plain SGD,"
                f" {faster:.1f} times less than Opacus hooks"
            )
        findings += [f"{case.name}: {remark}" for remark in remarks]
    return Result(measures="median_s: CPU seconds of one step, one thread", rows=rows, findings=findings)


def _measure(case: Case) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of each variant's runs, and what there is to say of those that cannot."""
    context = multiprocessing.get_context("spawn")
    variants = [each for each in (*VARIANTS, *_elsewhere(case)) if each not in case.left_out]
    seconds: dict[str, list[float]] = {variant: [] for variant in variants}
    remarks: list[str] = []
    living: dict[str, tuple[multiprocessing.process.BaseProcess, Connection]] = {}
    folders = ExitStack()

    def ready(variant: str) -> None:
        process, connection = living[variant]
        if (said := _hear(connection, _START_SECONDS)) != "ready":
            remarks.append(f"{variant}: {said}")
            process.kill()
            del living[variant]

    try:
        for variant in sorted(variants, key=lambda each: each != _SLOW):
            ours, theirs = context.Pipe()
            folder = Path(folders.enter_context(tempfile.TemporaryDirectory()))
            process = context.Process(target=_serve, args=(theirs, CASES.index(case), variant, folder), daemon=True)
            process.start()
            theirs.close()
            living[variant] = process, ours
            if variant != _SLOW:
                ready(variant)
        if _SLOW in living:
            ready(_SLOW)
        for _ in range(case.runs):
            for variant, (_, connection) in living.items():
                connection.send("go")
                said = _hear(connection, _RUN_SECONDS)
                if isinstance(said, float):
                    seconds[variant].append(said)
    finally:
        for process, _ in living.values():
            process.kill()
            process.join()
        folders.close()
    return {variant: each for variant, each in seconds.items() if each}, remarks


def _elsewhere(case: Case) -> tuple[str, ...]:
    return (jax_step.NAME,) if case.model is ancestor_cnn and jax_step.installed() else ()


def _hear(connection: Connection, patience: float) -> object:
    try:
        return connection.recv() if connection.poll(patience) else "too slow"
    except EOFError:
        return "its process ended"


def _serve(host: Connection, number: int, variant: str, folder: Path) -> None:
    """A variant's process: says ready, or why it is not; then a step's CPU seconds for each word."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = CASES[number]
    try:
        model, inputs = case.model().train(), case.inputs(case.batch)
        targets = torch.randint(CLASSES, (case.batch,))
        step = build(variant, model, inputs, targets, folder)
        step()
    except Exception as error:
        host.send(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
        return
    host.send("ready")
    while host.recv():
        started = time.process_time()
        step()
        host.send(time.process_time() - started)


def build(variant: str, model: nn.Module, inputs: Tensor, targets: Tensor, folder: Path) -> Step:
    """A step of `variant` on these records, on whatever device they and the model are; `folder` is empty."""
    if variant == BASELINE:
        return _plain(model, inputs, targets)
    if variant in _OPACUS:
        return _opacus(_OPACUS[variant], model, inputs, targets)
    if variant == jax_step.NAME:
        return jax_step.step(model, inputs, targets, rate=_RATE, bound=_BOUND, noise=_NOISE)
    return _ours(variant, model, inputs, targets, folder)


def _plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()

    return step


def _ours(mode: str, model: nn.Module, inputs: Tensor, targets: Tensor, folder: Path) -> Step:
    from client.accounting import Release
    from client.compiler import build as compiled
    from client.compiler import rows_for
    from client.gradients import choose
    from client.job import keep_memory
    from client.memory import give_back
    from client.noise import SecureGenerator
    from client.training import Step as Terms
    from client.training import train
    from common.tasks import Data

    keep_memory()
    loss = nn.CrossEntropyLoss(reduction="none")
    chosen = choose(model, loss, inputs[:64], targets[:64], _BOUND).mode if mode == "auto" else mode
    give_back()  # as a worker does once it has chosen
    program = None
    if mode == "compiled":
        rows = rows_for(len(inputs))
        program = compiled(model, loss, inputs[:rows], targets[:rows], folder)
    terms = Terms(
        max_grad_norm=_BOUND, batch_size=len(inputs), physical_batch_size=len(inputs), learning_rate=_RATE,
        gradient_mode=chosen, program=program,  # type: ignore[arg-type]
    )  # fmt: skip
    release = Release(noise_multiplier=_NOISE, sample_rate=1.0, steps=1)
    generator, data = SecureGenerator(), Data(inputs=inputs, targets=targets)
    return lambda: train(model, loss, data, release=release, step=terms, generator=generator)


def _opacus(mode: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    more = {"criterion": nn.CrossEntropyLoss()} if mode == "ghost" else {}
    made = PrivacyEngine(accountant="rdp").make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=_RATE),
        data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=len(inputs)),
        noise_multiplier=_NOISE,
        max_grad_norm=_BOUND,
        poisson_sampling=False,  # the loader is not used: every variant steps on the same records
        grad_sample_mode=mode,
        **more,
    )
    model, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(inputs), targets).backward()
        optimizer.step()

    return step
