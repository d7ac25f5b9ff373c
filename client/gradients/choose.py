"""Which way of computing the clipped sums is the fastest for this model on this device: tried, not guessed."""

import time
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.gradients.book_keeping import BookKeeping
from client.gradients.clipped import ClippedSums, Loss, Unsupported, factors, trainable
from client.gradients.compiled import Compiled
from client.gradients.hooks import Hooks
from client.program import Program
from common.config import GradientMode

MODES: dict[GradientMode, type[BookKeeping] | type[Hooks]] = {"hooks": Hooks, "book_keeping": BookKeeping}
ORACLE: GradientMode = "hooks"

_PASSES = 3  # timed; the fastest counts
_ENOUGH_SECONDS = 1.0  # for one way
_MEMORY_BYTES = 2**28  # for the gradients of all records by hooks
_TOLERANCE = 1e-2  # of the sums' norm; rounding stays far below, a gradient that is wrong does not


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A mode, and in one line why."""

    mode: GradientMode
    why: str


def clipped_sums(
    mode: GradientMode, model: nn.Module, loss: Loss, max_grad_norm: float, program: Program | None = None
) -> ClippedSums:
    """The sums of `model` by `mode`; `compiled` needs a `program`. Raises Unsupported."""
    if mode != "compiled":
        return MODES[mode](model, loss, max_grad_norm)
    if program is None:
        raise Unsupported("nothing was compiled for this model")
    return Compiled(model, max_grad_norm, program)


def choose(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, max_grad_norm: float) -> Choice:
    """The mode with the fastest pass over some of `inputs` [batch, ...], `targets` [batch, ...], which must be public.

    `hooks`, the oracle, where another way cannot do the model or finds other sums. The model, its parameters and the
    random generators stay as they are. Raises Unsupported where none can do the model.
    """
    size = sum(p.numel() * p.element_size() for p in trainable(model))
    inputs, targets = (x[: max(2, _MEMORY_BYTES // size)] for x in (inputs, targets))
    seconds: dict[GradientMode, float] = {}
    remarks = []
    expected: list[Tensor] = []
    for mode in MODES:  # the oracle first
        try:
            found, taken = _timed(clipped_sums(mode, model, loss, max_grad_norm), inputs, targets)
        except Unsupported as error:
            remarks.append(f"{mode}: {error}")
            continue
        expected = expected or found
        if _agree(expected, found):
            seconds[mode] = taken
        else:
            remarks.append(f"{mode}: other sums than {ORACLE}")
    if not seconds:
        raise Unsupported("; ".join(remarks))
    timings = [f"{mode} {1e3 * value:.3g} ms" for mode, value in seconds.items()]
    why = f"{len(inputs)} records on {inputs.device}: {'; '.join(timings + remarks)}"
    return Choice(mode=min(seconds, key=seconds.__getitem__), why=why)


def require(
    mode: GradientMode,
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    max_grad_norm: float,
    program: Program | None = None,
) -> None:
    """Raises Unsupported, with the layer's name, unless `mode` can do the model: a pass over public records shows.

    What is compiled must also find the sums of one record at a time.
    """
    inputs, targets = inputs[:2], targets[:2]
    found, _ = _timed(clipped_sums(mode, model, loss, max_grad_norm, program), inputs, targets)
    if mode == "compiled" and not _agree(_one_at_a_time(model, loss, inputs, targets, max_grad_norm), found):
        raise Unsupported("other sums than those of one record at a time")


def _timed(sums: ClippedSums, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], float]:
    """The sums, and the fastest of some passes; the first, which may set things up, does not count if it is quick."""
    devices = [inputs.device] if inputs.device.type == "cuda" else []
    with closing(sums), torch.random.fork_rng(devices=devices):
        found, first = _once(sums, inputs, targets)
        passes: list[float] = []
        while len(passes) < _PASSES and first + sum(passes) < _ENOUGH_SECONDS:
            passes.append(_once(sums, inputs, targets)[1])
    return found, min(passes or [first])


def _once(sums: ClippedSums, inputs: Tensor, targets: Tensor) -> tuple[list[Tensor], float]:
    torch.manual_seed(0)  # dropout draws the same in every mode
    started = time.perf_counter()
    found = sums(inputs, targets)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()
    return found, time.perf_counter() - started


def _one_at_a_time(model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor, max_grad_norm: float) -> list[Tensor]:
    own = trainable(model)
    sums = [torch.zeros_like(parameter) for parameter in own]
    for record, target in zip(inputs, targets, strict=True):
        lost = loss(model(record[None]), target[None]).sum()
        gradients = torch.autograd.grad(lost, own, allow_unused=True, materialize_grads=True)
        scale = factors(torch.stack([gradient.norm() for gradient in gradients]).norm(), max_grad_norm)
        for total, gradient in zip(sums, gradients, strict=True):
            total += scale * gradient
    return sums


def _agree(expected: list[Tensor], found: list[Tensor]) -> bool:
    difference = sum(float((a - b).double().pow(2).sum()) for a, b in zip(expected, found, strict=True)) ** 0.5
    size = sum(float(a.double().pow(2).sum()) for a in expected) ** 0.5
    return difference <= _TOLERANCE * size
