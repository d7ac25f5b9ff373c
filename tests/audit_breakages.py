"""Ways in which a client could break its promise, applied to the shipped modules: what an audit must catch.

Each is a function of pytest's monkeypatch, which takes the breakage back.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import dp_accounting
import pytest
import torch

from client import accounting, app, noise
from client.gradients import book_keeping, clipped, compiled, hooks
from client.noise import SecureGenerator
from client.training import SecureDPOptimizer

Patch = pytest.MonkeyPatch


def _noise_times(factor: float, patch: Patch) -> None:
    shipped = SecureGenerator.normal

    def normal(self: SecureGenerator, shape: Any, std: float, **options: Any) -> torch.Tensor:
        return shipped(self, shape, factor * std, **options)

    patch.setattr(SecureGenerator, "normal", normal)


def noise_off(patch: Patch) -> None:
    _noise_times(0.0, patch)


def noise_halved(patch: Patch) -> None:
    _noise_times(0.5, patch)


def noise_too_small_by_a_tenth(patch: Patch) -> None:
    _noise_times(0.9, patch)


def _factors(patch: Patch, factors: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
    for mode in (hooks, book_keeping, compiled):
        patch.setattr(mode, "factors", factors)


def no_clipping(patch: Patch) -> None:
    _factors(patch, lambda norms, _: torch.ones_like(norms))


def sensitivity_doubled(patch: Patch) -> None:
    """Clipped to twice the norm that the noise is made for."""
    _factors(patch, lambda norms, bound: clipped.factors(norms, 2 * bound))


def each_parameter_clipped_by_itself(patch: Patch) -> None:
    def sums(self: hooks.Hooks, inputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        found = []
        self._loss(self._wrapped(inputs), targets).sum().backward()
        for parameter in self._parameters:
            gradients: Any = parameter.grad_sample
            parameter.grad_sample = parameter.grad = None
            scale = clipped.factors(gradients.flatten(1).norm(dim=1), self._bound)
            found.append(torch.einsum("b,b...->...", scale, gradients))
        return found

    patch.setattr(hooks.Hooks, "__call__", sums)


def same_noise_in_each_job(patch: Patch) -> None:
    patch.setattr(noise, "os", SimpleNamespace(urandom=bytes, getpid=os.getpid))


def same_noise_for_each_parameter(patch: Patch) -> None:
    def add_noise(self: SecureDPOptimizer) -> None:
        most = max(parameter.numel() for parameter in self.params)
        drawn = self._secure.normal((most,), self.noise_multiplier * self.max_grad_norm)
        for parameter in self.params:
            parameter.grad = parameter.summed_grad + drawn[: parameter.numel()].view_as(parameter)

    patch.setattr(SecureDPOptimizer, "add_noise", add_noise)


def sampled_at_twice_the_rate(patch: Patch) -> None:
    shipped = SecureGenerator.poisson_mask

    def poisson_mask(self: SecureGenerator, n: int, rate: float) -> torch.Tensor:
        return shipped(self, n, min(1.0, 2 * rate))

    patch.setattr(SecureGenerator, "poisson_mask", poisson_mask)


def accounted_at_half_the_rate(patch: Patch) -> None:
    shipped = dp_accounting.PoissonSampledDpEvent
    patch.setattr(dp_accounting, "PoissonSampledDpEvent", lambda rate, event: shipped(rate / 2, event))


def charged_for_half_the_steps(patch: Patch) -> None:
    """The ledger is told less than is trained."""
    shipped = app.train

    def train(*arguments: Any, release: accounting.Release, **options: Any) -> None:
        doubled = accounting.Release(
            noise_multiplier=release.noise_multiplier, sample_rate=release.sample_rate, steps=2 * release.steps
        )
        shipped(*arguments, release=doubled, **options)

    patch.setattr(app, "train", train)


VARIANCE, AMPLITUDE, CORRELATION = "noise variance / accounted", "canary amplitude / clip", "noise correlation"
LOSS, CLAIM = "epsilon by privacy loss", "p-value of the claim"

# The check that each must fail, whichever others it fails besides.
CAUGHT_BY: dict[Callable[[Patch], None], str] = {
    noise_off: VARIANCE,
    noise_halved: VARIANCE,
    no_clipping: AMPLITUDE,
    same_noise_in_each_job: CORRELATION,
    same_noise_for_each_parameter: CORRELATION,
    sensitivity_doubled: AMPLITUDE,
    accounted_at_half_the_rate: LOSS,
}
ALSO_CAUGHT_BY: dict[Callable[[Patch], None], str] = {
    noise_too_small_by_a_tenth: VARIANCE,
    each_parameter_clipped_by_itself: AMPLITUDE,
    sampled_at_twice_the_rate: AMPLITUDE,
    charged_for_half_the_steps: AMPLITUDE,
}
