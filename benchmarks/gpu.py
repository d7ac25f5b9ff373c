"""What a client costs a GPU: memory of a worker that trains, beside one that waits, and steps by gradient mode.

Each figure is of a process of its own, as a worker is. How many workers fit follows from the memory of the first.
"""

import multiprocessing
import statistics
import subprocess
import time
from typing import Any

import torch

from benchmarks.models import CASES, CLASSES
from benchmarks.programs import BenchmarkError, Unavailable
from benchmarks.report import Result, Row

_RUNS = 7
_SECONDS = 300.0
_MODES = ("hooks", "book_keeping")


def run() -> Result:
    """Raises Unavailable without a GPU."""
    if not torch.cuda.is_available():
        raise Unavailable("no GPU here: nothing was measured")
    total = torch.cuda.get_device_properties(0).total_memory
    rows, findings = [], []
    for number, case in enumerate(CASES):
        measured = {mode: _in_a_process(number, mode) for mode in _MODES}
        base = statistics.median(measured["hooks"]["seconds"])
        for mode, found in measured.items():
            median = statistics.median(found["seconds"])
            rows.append(
                Row(
                    case=case.name, variant=mode, median_s=median, runs=_RUNS, baseline="hooks", ratio=median / base,
                    more={
                        "records_per_s": case.batch / median,
                        "context_mb": found["context"] / 1e6,
                        "training_mb": found["training"] / 1e6,
                        "workers_that_fit": total // (found["context"] + found["training"]),
                    },
                )
            )  # fmt: skip
    findings.append("A client that waits holds no memory of the GPU: its workers have ended.")
    return Result(
        measures="median_s: one DP-SGD step, noise included; MB of the GPU by the context alone, and beside it",
        rows=rows,
        findings=findings,
    )


def _in_a_process(number: int, mode: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, number, mode), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_SECONDS):
            raise BenchmarkError(f"{CASES[number].name}, {mode}: nothing within {_SECONDS:g} s")
        return ours.recv()
    except EOFError:
        raise BenchmarkError(f"{CASES[number].name}, {mode}: its process ended") from None
    finally:
        process.kill()
        process.join()


def _serve(host: Any, number: int, mode: str) -> None:
    from torch import nn

    from client.accounting import Release
    from client.noise import SecureGenerator
    from client.training import Step, train
    from common.tasks import Data

    before = _used()
    torch.zeros(1, device="cuda")
    context = _used() - before
    case = CASES[number]
    model, inputs = case.model().cuda(), case.inputs(case.batch).cuda()
    data = Data(inputs=inputs, targets=torch.randint(CLASSES, (case.batch,)).cuda())
    terms = Step(
        max_grad_norm=1.0, batch_size=case.batch, physical_batch_size=case.batch, learning_rate=1e-3,
        gradient_mode=mode,  # type: ignore[arg-type]
    )  # fmt: skip
    release = Release(noise_multiplier=1.0, sample_rate=1.0, steps=1)
    loss, generator, seconds = nn.CrossEntropyLoss(reduction="none"), SecureGenerator(), []
    for _ in range(_RUNS + 1):
        started = time.perf_counter()
        train(model, loss, data, release=release, step=terms, generator=generator)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    host.send({"context": context, "training": torch.cuda.max_memory_reserved(), "seconds": seconds[1:]})


def _used() -> int:
    """Bytes of the first GPU in use by anybody, as the driver says: a process that asks makes no context."""
    command = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 2**20
