"""Plain gradient descent, as torch.optim.SGD takes it, without the compiler that PyTorch imports in its first step.

That import takes a second and 100 MB in each new worker. What it is for, that a step can be part of a compiled graph,
no step of ours needs.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Sgd(torch.optim.SGD):
    """`parameter -= lr * gradient`, with no momentum and no decay."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, lr=lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        inspect.unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 (none is taken)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-group["lr"])
