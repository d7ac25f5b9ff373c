"""Compiles a model's clipped sums ahead of time, in a process of its own: workers load the result in milliseconds.

It takes up to minutes and a C++ compiler (of a GPU, Triton with a C compiler), which the images do not have. Nothing of
a record goes in: the program is made of the task's model, its loss, and the shape of its public records.
"""

import logging
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn

from client.app import Bench, pick_device
from client.gradients import Loss, Unsupported
from client.gradients.compiled import state, step
from client.policy import Refused
from client.program import Program
from common.config import Policy
from common.messages import Reason
from common.tasks.inputs import Inputs

log = logging.getLogger(__name__)

_PARTS = 8  # of a batch: what the last one is filled up with is a sixteenth of the work


def serve(policy: Policy, host: Connection) -> None:
    """Compiles the step of the policy's task into the folder that the host names; answers a Program, or why not."""
    folder = host.recv()
    try:
        host.send(program(Bench(policy=policy), folder))
    except Refused as refused:
        host.send(refused.detail)


def program(bench: Bench, folder: Path) -> Program:
    """The step of the bench's task, compiled into `folder`. Raises Refused, before any charge."""
    task, policy = bench.task(), bench.policy
    device, public = pick_device(policy.training.device), task.test_data()
    rows = rows_for(min(policy.privacy.batch_size, policy.training.physical_batch_size))
    few = torch.arange(rows) % len(public.inputs)
    raw, targets = public.inputs[few].to(device), public.targets[few].to(device)
    inputs = Inputs.of(task)
    made = inputs.training(raw, inputs.draw(rows, raw.device))
    try:
        return build(task.model().to(device).train(), task.loss, made, targets, folder)
    except Unsupported as error:
        raise Refused(Reason.MODEL, str(error)) from None


def rows_for(batch: int) -> int:
    """Records of a program that takes a batch of so many in parts: a power of two."""
    return 2 ** (max(1, batch // _PARTS).bit_length() - 1)


def build(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, folder: Path) -> Program:
    """A program for batches of as many rows as `inputs` [rows, ...] and `targets` [rows, ...] have, on their device.

    Raises:
        Unsupported: the model cannot be compiled, or there is no compiler. One line.
    """
    path = folder / "step.so"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")  # the default is a name that others can take first
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    from torch._inductor import aot_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    bound = torch.ones((), dtype=torch.float64, device=inputs.device)
    used = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
    arguments = (bound, used, inputs, targets, *(value.detach() for part in state(model) for value in part.values()))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        graph = torch.export.export(make_fx(step(model, loss))(*arguments), arguments).module()
        aot_compile(graph, arguments, options={"aot_inductor.output_path": str(path)})
    except Exception as error:
        text = " ".join(str(error).split())
        if "randomness" in text:
            text = "the model draws random numbers (dropout)"
        raise Unsupported(f"{type(error).__name__}: {text[:200]}") from None
    spent = resource.getrusage(resource.RUSAGE_SELF).ru_utime - before
    log.info("the step is compiled for %d records at a time (%.0f s of CPU)", len(inputs), spent)
    return Program(path=path, rows=len(inputs), device=inputs.device.type)
