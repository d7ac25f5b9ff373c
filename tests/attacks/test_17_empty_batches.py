"""Attack: no record joins a Poisson batch, and an implementation that skips the step tells so by what it releases.

What holds: a step without records is noised, counted and charged like any other, so that nobody sees the difference.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client.noise import SecureGenerator
from client.training import SecureDPOptimizer
from tests.attacks.site import LEARNING_RATE, Site, Weights, moved, site
from tests.attacks.task import Rigged
from tests.statistics_checks import normal_checks, rejected

STEPS, CLIP, NOISE, OUTPUTS = 4, 0.5, 4.0, 2000
WEIGHTS: Weights = {"1.weight": np.zeros((OUTPUTS, 64), np.float32)}
# The expected batch is 1 of a nominal million, and the partition holds a few hundred: nobody joins, in all but one
# of a thousand runs.
STD = LEARNING_RATE * NOISE * CLIP / 1 * STEPS**0.5


class Pixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float()


def lonely(task: Rigged) -> None:
    """A wider model, and a loss that leaves a note if it is ever called."""
    losses = task.losses

    def noted(outputs: Tensor, targets: Tensor) -> Tensor:
        (task.root / "met").touch()
        return losses(outputs, targets)

    task.patch.setattr(task, "make_model", lambda: nn.Sequential(Pixels(), nn.Linear(64, OUTPUTS, bias=False)))
    task.patch.setattr(task, "losses", noted)


def batches(task: Rigged) -> list[int]:
    """The sizes of the batches that are drawn from now on."""
    sizes: list[int] = []
    poisson_mask = SecureGenerator.poisson_mask

    def noted(*arguments: Any) -> Tensor:
        mask = poisson_mask(*arguments)
        sizes.append(int(mask.sum()))
        return mask

    task.patch.setattr(SecureGenerator, "poisson_mask", noted)
    return sizes


def skipping(task: Rigged) -> None:
    """The control: a client that takes no step where there is no record."""
    lonely(task)
    step, drawn = SecureDPOptimizer.step, batches(task)
    task.patch.setattr(SecureDPOptimizer, "step", lambda *arguments: step(*arguments) if drawn[-1] else None)


def noiseless(task: Rigged) -> None:
    """The other control: an empty batch is a step, and gets no noise."""
    lonely(task)
    normal, drawn = SecureGenerator.normal, batches(task)

    def normal_for_some(*arguments: Any, **options: Any) -> Tensor:
        noise = normal(*arguments, **options)
        return noise if drawn[-1] else torch.zeros_like(noise)

    task.patch.setattr(SecureGenerator, "normal", normal_for_some)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    terms = {"batch_size": 1, "records": 10**6, "delta": 1e-7, "noise_multiplier": NOISE, "max_grad_norm": CLIP}
    with site(tmp_path_factory.mktemp("empty"), clients=4, privacy=terms) as made:
        made.start()
        moved(made.ask(0))
        yield made


def released(owner: Site, order: Callable[[Rigged], None]) -> np.ndarray:
    owner.order(order)
    before = owner.account(0)
    update = moved(owner.ask(0, WEIGHTS, steps=STEPS), WEIGHTS)
    after = owner.account(0)
    assert after.commits == before.commits + 1
    assert sum(steps for _, steps in after.charged) == sum(steps for _, steps in before.charged) + STEPS
    assert after.epsilon_spent > before.epsilon_spent
    return update


def test_a_step_without_records_is_noised_and_charged(owner: Site) -> None:
    update = released(owner, lonely)
    if (owner.data / "met").exists():
        pytest.skip("a record joined, once in a thousand runs")
    assert len(update) == OUTPUTS * 64
    assert rejected(normal_checks(update, STD)) == {}


@pytest.mark.parametrize("order", [skipping, noiseless])
def test_a_client_that_saves_the_step_or_the_noise_is_caught(owner: Site, order: Callable[[Rigged], None]) -> None:
    assert "variance" in rejected(normal_checks(released(owner, order), STD))
