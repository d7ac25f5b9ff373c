"""What the modes share: their interface, and the factor by which a record's gradient is scaled."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]

_CALM = 1e-6  # Opacus': keeps the factor finite for a gradient of zero


class Unsupported(ValueError):
    """This mode cannot compute the gradients of this model. One line that names the layer."""


class ClippedSums(Protocol):
    """Computes, for a batch, the sum over its records of their clipped gradients."""

    def __call__(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Sums shaped like `trainable(model)`, in its order, for inputs [batch, ...] and targets [batch, ...].

        Leaves no `grad`. May be called again after it raised, say for want of memory.
        """
        ...

    def close(self) -> None:
        """Takes everything off the model that was put on it."""
        ...


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def factors(norms: Tensor, max_grad_norm: float | Tensor) -> Tensor:
    """What scales each record's gradient of the given norm, [batch]: at most 1, such that the product stays in bound.

    A gradient that is not finite counts as zero: it would pass the clip (inf * 0 is NaN) and show its record in the
    sum, and a server may send parameters made for that. So does one so large that its factor is denormal: a number
    without full precision bounds nothing.
    """
    scale = (max_grad_norm / (norms + _CALM)).clamp(max=1.0)
    sound = norms.isfinite() & (scale >= torch.finfo(torch.float32).tiny)
    return torch.where(sound, scale, torch.zeros_like(scale))
