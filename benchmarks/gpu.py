"""What a step costs on a GPU, what a worker that takes it holds of the GPU's memory, and how many of them fit.

The variants of benchmarks.step, each in a process of its own, as a worker is: the memory of its CUDA context, what
training takes beside it, and what is left of both when the worker has ended, as it does when it is idle.
"""

import multiprocessing
import statistics
import subprocess
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks import step
from benchmarks.models import CASES, CLASSES, Case
from benchmarks.programs import BenchmarkError, Unavailable
from benchmarks.report import Result, Row

_DEVICE = "cuda"
_RUNS = 7
_SECONDS = 300.0  # for one process

Found = dict[str, list[float]]  # seconds of each step; bytes: context, training, idle


def run() -> Result:
    """Raises Unavailable without a GPU."""
    if not torch.cuda.is_available():
        raise Unavailable("no GPU here: nothing was measured")
    total = _memory("total")
    rows, findings = [], []
    for case in CASES:
        measured: dict[str, Found] = {}
        for variant in step.VARIANTS:
            said = _in_a_process(case, variant)
            if isinstance(said, str):
                findings.append(f"{case.name}: {variant}: {said}")
            else:
                measured[variant] = said
        if step.BASELINE not in measured:
            raise BenchmarkError(f"{case.name}: no {step.BASELINE} to compare with: {'; '.join(findings)}")
        plain = statistics.median(measured[step.BASELINE]["seconds"])
        rows += [_row(case, variant, found, plain, total) for variant, found in measured.items()]
    left = max(row.more["idle_mb"] for row in rows)
    findings.append(f"When a worker has ended, {left:.0f} MB of the GPU at most are not free again.")
    return Result(
        measures="median_s: one step, noise included; MB of the GPU: by the context alone, by training beside it, and"
        " what is left when the worker has ended; workers that fit: into the whole GPU, training at once",
        rows=rows,
        findings=findings,
    )


def _row(case: Case, variant: str, found: Found, plain: float, total: int) -> Row:
    median = statistics.median(found["seconds"])
    (context,), (training,), (idle,) = found["context"], found["training"], found["idle"]
    return Row(
        case=case.name,
        variant=variant,
        median_s=median,
        runs=len(found["seconds"]),
        baseline=step.BASELINE,
        ratio=median / plain,
        more={
            "records_per_s": case.batch / median,
            "context_mb": context / 1e6,
            "training_mb": training / 1e6,
            "idle_mb": idle / 1e6,
            "workers_that_fit": int(total // max(1, context + training)),
        },
    )


def _in_a_process(case: Case, variant: str) -> Found | str:
    """What was found, or why nothing was."""
    before = _memory("used")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (theirs, CASES.index(case), variant, Path(folder))
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            said: Found | str = ours.recv() if ours.poll(_SECONDS) else f"nothing within {_SECONDS:g} s"
        except EOFError:
            said = "its process ended"
        finally:
            process.kill()
            process.join()
    if isinstance(said, dict):
        said["idle"] = [max(0, _memory("used") - before)]
    return said


def _serve(host: Connection, number: int, variant: str, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    case, before = CASES[number], _memory("used")
    try:
        torch.zeros(1, device=_DEVICE)
        context = _memory("used") - before
        model, inputs = case.model().train().to(_DEVICE), case.inputs(case.batch).to(_DEVICE)
        take = step.build(variant, model, inputs, torch.randint(CLASSES, (case.batch,)).to(_DEVICE), folder)
        take()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # trying the modes is over
        seconds = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            take()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
    except Exception as error:
        host.send(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
        return
    host.send({"seconds": seconds, "context": [context], "training": [torch.cuda.max_memory_reserved()]})


def _memory(which: str) -> int:
    """Bytes of the first GPU, `used` by anybody or in `total`, as the driver says: who asks it makes no context."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu=memory.{which}", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 2**20
