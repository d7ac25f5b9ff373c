"""Clipped sums by one program that is compiled ahead of time: each record's gradient by vmap, clipped and summed.

A program takes a fixed number of rows. What is left of a batch is filled up with rows that are not `used` and add
nothing, so that neither the number of records drawn nor what fills it up shows in the sums.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.gradients.clipped import Loss, Unsupported, factors
from client.program import Program


class Compiled:
    """`ClippedSums` by a `Program` for this model."""

    def __init__(self, model: nn.Module, max_grad_norm: float, program: Program) -> None:
        self._trained, self._rest = state(model)
        self._bound = max_grad_norm
        self._rows, self._kind = program.rows, program.device
        # Not by torch._inductor, whose import would cost each worker a second and 150 MB.
        runners = {
            "cpu": torch._C._aoti.AOTIModelContainerRunnerCpu,
            "cuda": torch._C._aoti.AOTIModelContainerRunnerCuda,
        }
        self._run = runners[program.device](str(program.path), 1).run

    def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        if inputs.device.type != self._kind:
            raise Unsupported(f"the program is compiled for {self._kind}, found records on {inputs.device.type}")
        sums = [torch.zeros_like(parameter) for parameter in self._trained.values()]
        own = [value.detach() for value in (*self._trained.values(), *self._rest.values())]
        bound = torch.tensor(self._bound, dtype=torch.float64, device=inputs.device)
        for start in range(0, len(inputs), self._rows):
            part, of = inputs[start : start + self._rows], targets[start : start + self._rows]
            used = torch.arange(self._rows, device=inputs.device) < len(part)
            found = self._run([bound, used, _filled(part, self._rows), _filled(of, self._rows), *own])
            for total, more in zip(sums, found, strict=True):
                total += more
        return sums

    def close(self) -> None:
        """Nothing was put on the model."""


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a program is given of the model at each call, by name: what is trained, and all else it computes with."""
    parameters = dict(model.named_parameters())
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    rest = {name: value for name, value in parameters.items() if not value.requires_grad}
    return trained, rest | dict(model.named_buffers())  # type: ignore[return-value]


def step(model: nn.Module, loss: Loss) -> Callable[..., list[Tensor]]:
    """What is compiled: bound [], used bool [rows], inputs and targets [rows, ...], all of `state` -> sums."""
    trained, rest = state(model)

    def lost(own: tuple[Tensor, ...], more: tuple[Tensor, ...], record: Tensor, target: Tensor) -> Tensor:
        named = dict(zip((*trained, *rest), (*own, *more), strict=True))
        return loss(functional_call(model, named, (record[None],)), target[None]).sum()

    def sums(bound: Tensor, used: Tensor, inputs: Tensor, targets: Tensor, *values: Tensor) -> list[Tensor]:
        own, more = values[: len(trained)], values[len(trained) :]
        gradients = vmap(grad(lost), in_dims=(None, None, 0, 0))(own, more, inputs, targets)
        # In float64: a million squares added up in float32 can lose any number of them.
        squared = torch.stack([g.flatten(1).double().square().sum(1) for g in gradients]).sum(0)
        scale = torch.where(used, factors(squared.sqrt(), bound), 0.0)
        return [_weighted(scale, gradient) for gradient in gradients]

    return sums


def _weighted(scale: Tensor, gradients: Tensor) -> Tensor:
    """The sum of each record's gradient times its factor; nothing of a record whose factor is 0, be it NaN."""
    each = scale.to(gradients.dtype).view(-1, *[1] * (gradients.dim() - 1))
    return torch.where(each > 0, gradients * each, 0.0).sum(0)


def _filled(values: Tensor, rows: int) -> Tensor:
    """`values` [n, ...] with rows of zeros up to `rows`, in a memory of its own."""
    filled = values.new_zeros(rows, *values.shape[1:])
    filled[: len(values)] = values
    return filled
