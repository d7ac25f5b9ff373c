"""DP-SGD of one round on resident tensors: Opacus' optimizer on clipped sums, with our own randomness.

Abadi et al. 2016, arXiv:1607.00133, Algorithm 1: each step draws every record independently with probability
`sample_rate`, clips each record's gradient to `max_grad_norm`, sums (client.gradients), adds Gaussian noise of standard
deviation `noise_multiplier * max_grad_norm`, and divides by the *expected* batch size, a constant of the policy.
"""

import logging
from dataclasses import dataclass

import torch
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from client import gpu, memory
from client.accounting import Release
from client.gradients import ClippedSums, Loss, clipped_sums, trainable
from client.noise import SecureGenerator
from client.program import Program
from client.sgd import Sgd
from common.config import GradientMode
from common.tasks import Data
from common.tasks.inputs import AS_THEY_ARE, Inputs

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """How a step is taken. `max_grad_norm` and `batch_size` are the owner's terms; the rest is speed and utility."""

    max_grad_norm: float  # L2 bound on one record's gradient
    batch_size: int  # expected records in a batch, the divisor
    physical_batch_size: int  # records per forward pass
    learning_rate: float
    gradient_mode: GradientMode = "hooks"
    program: Program | None = None  # of gradient_mode compiled


class SecureDPOptimizer(DPOptimizerFastGradientClipping):
    """Opacus' optimizer for sums that are clipped already, with noise from a cryptographic generator."""

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

    def add(self, sums: list[Tensor]) -> None:
        """Adds a part of the batch: its clipped sums, one per parameter."""
        for parameter, part in zip(self.params, sums, strict=True):
            total = parameter.summed_grad
            parameter.summed_grad = part if total is None else total.add_(part)

    def accumulate(self) -> None:
        """All parts were added before the step: there is no `grad` to take over."""

    def add_noise(self) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        noised = self._secure.noised_all([parameter.summed_grad for parameter in self.params], std)
        for parameter, total in zip(self.params, noised, strict=True):
            parameter.grad = total.view_as(parameter)


def train(
    model: nn.Module,
    loss: Loss,
    data: Data,
    *,
    release: Release,
    step: Step,
    generator: SecureGenerator,
    inputs: Inputs = AS_THEY_ARE,
) -> None:
    """Takes `release.steps` DP-SGD steps on `model`, in place.

    `loss(outputs, targets)` gives one value per record, [batch]. `data` lies on the model's device, raw: `inputs` makes
    of a batch's records what the model takes. A batch without records is noised and counts like any other.
    """
    torch.set_float32_matmul_precision("highest")  # client.gradients bounds no coarser one
    model.train()
    most = step.physical_batch_size
    sums = clipped_sums(step.gradient_mode, model, loss, step.max_grad_norm, step.program)
    optimizer = SecureDPOptimizer(Sgd(trainable(model), lr=step.learning_rate), generator, release, step)
    try:
        for _ in range(release.steps):
            drawn = generator.poisson_mask(len(data.inputs), release.sample_rate).nonzero().squeeze(1)
            optimizer.zero_grad(set_to_none=True)
            most = _add_batch(optimizer, sums, data, inputs, drawn.to(data.inputs.device), most)
            optimizer.step()
    finally:
        sums.close()


def _add_batch(
    optimizer: SecureDPOptimizer, sums: ClippedSums, data: Data, inputs: Inputs, drawn: Tensor, most: int
) -> int:
    """Adds the records `drawn` in parts of `most`, halved where memory runs out; returns what fitted.

    The parts change nothing about the step: the batch is the one that was drawn, each record keeps its own random
    numbers, and each part is added once, whole.
    """
    left, draws = drawn, inputs.draw(len(drawn), drawn.device)
    while True:
        part = left[:most]  # of no records, once, if none was drawn
        try:
            raw = data.inputs.index_select(0, part)  # ten times as fast as data.inputs[part]
            found = sums(inputs.training(raw, draws[:most]), data.targets.index_select(0, part))
        except (RuntimeError, MemoryError) as error:
            if len(part) <= 1 or not memory.ran_out(error):
                raise
            found = None
        if found is None:  # here the failed pass is gone, and its memory can be given back
            most = len(part) // 2
            gpu.give_back(data.inputs.device)
            log.warning("memory ran out: goes on with smaller passes")  # half of what was drawn is not to be told
            continue
        optimizer.add(found)
        left, draws = left[len(part) :], draws[len(part) :]
        if not len(left):
            return most
