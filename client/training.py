"""DP-SGD of one round on resident tensors: Opacus' per-record gradients, clipping and optimizer; our own randomness.

Abadi et al. 2016, arXiv:1607.00133, Algorithm 1: each step draws every record independently with probability
`sample_rate`, clips each record's gradient to `max_grad_norm`, sums, adds Gaussian noise of standard deviation
`noise_multiplier * max_grad_norm`, and divides by the *expected* batch size, a constant of the policy.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.accounting import Release
from client.noise import SecureGenerator
from common.tasks import Data


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How a step is taken. `max_grad_norm` and `batch_size` are the owner's terms; the rest is speed and utility."""

    max_grad_norm: float  # L2 bound on one record's gradient
    batch_size: int  # expected records in a batch, the divisor
    physical_batch_size: int  # records per forward pass
    learning_rate: float


class SecureDPOptimizer(DPOptimizer):
    """Opacus' DPOptimizer with noise from a cryptographic generator and a bound that holds for any gradient."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, generator: SecureGenerator, release: Release, step: Step
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=release.noise_multiplier,
            max_grad_norm=step.max_grad_norm,
            expected_batch_size=step.batch_size,
        )
        self._secure = generator

    def clip_and_accumulate(self) -> None:
        # A record whose gradient is not finite would pass the clip (inf * 0 is NaN) and show itself in the sum:
        # a server may send parameters made for that. It counts as zero, which keeps the bound.
        samples = self.grad_samples
        norms = samples[0].new_zeros(1, 0)
        if len(samples[0]):
            norms = torch.stack([g.reshape(len(g), -1).norm(dim=1) for g in samples])
        bad = ~norms.isfinite().all(dim=0)  # [batch]
        if bad.any():
            for parameter in self.params:
                parameter.grad_sample = parameter.grad_sample.masked_fill(
                    bad.view(-1, *[1] * (parameter.grad_sample.dim() - 1)), 0.0
                )
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = parameter.summed_grad
            parameter.grad = self._secure.noised(total, std).view_as(parameter)


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Data,
    *,
    release: Release,
    step: Step,
    generator: SecureGenerator,
) -> None:
    """Takes `release.steps` DP-SGD steps on `model`, in place.

    `loss(outputs, targets)` gives one value per record, [batch]. `data` lies on the model's device. A batch without
    records is noised and counts like any other.
    """
    model.train()
    # A model of one layer has no gradient with respect to its input, which torch remarks upon each time.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    # What Opacus would be strict about, client.model_check has checked by its effect.
    wrapped = GradSampleModule(model, loss_reduction="sum", strict=False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = SecureDPOptimizer(torch.optim.SGD(parameters, lr=step.learning_rate), generator, release, step)
    try:
        for _ in range(release.steps):
            drawn = generator.poisson_mask(len(data.inputs), release.sample_rate).nonzero().squeeze(1)
            chunks = drawn.to(data.inputs.device).split(step.physical_batch_size)
            for index, chunk in enumerate(chunks):
                optimizer.zero_grad(set_to_none=True)
                if len(chunk):
                    loss(wrapped(data.inputs[chunk]), data.targets[chunk]).sum().backward()
                else:
                    for parameter in parameters:
                        parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
                optimizer.signal_skip_step(do_skip=index < len(chunks) - 1)
                optimizer.step()
    finally:
        wrapped.to_standard_module()
