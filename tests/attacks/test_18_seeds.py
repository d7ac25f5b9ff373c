"""Attack: a seed is set by the task, the environment, `torch.manual_seed` or in the parent before a fork.

What holds: no two rounds share noise or draws, whether one worker serves them, two forks of one parent or a client that
was started again: each job's generator has a key of its own from the operating system, and there is no seed.
"""

import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from client import app
from client.noise import SecureGenerator
from tests.attacks.site import LEARNING_RATE, Site, Weights, moved, site
from tests.attacks.task import Rigged
from tests.attacks.test_17_empty_batches import Pixels
from tests.statistics_checks import correlation_p_value, normal_checks, rejected

STEPS, CLIP, NOISE, BATCH, OUTPUTS = 2, 0.5, 4.0, 64, 1000
WEIGHTS: Weights = {"1.weight": np.zeros((OUTPUTS, 64), np.float32)}
STD = LEARNING_RATE * NOISE * CLIP / BATCH * STEPS**0.5
ENVIRONMENT = {"PYTHONHASHSEED": "0", "PL_GLOBAL_SEED": "7", "TORCH_SEED": "7", "SEED": "7"}


def seeding(task: Rigged) -> None:
    """Seeds all there is to seed before every job (the task did so before the fork, too). Its loss has no gradient."""
    os.environ["SEED"] = "7"
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    torch.default_generator.manual_seed(7)

    def losses(outputs: Tensor, _: Tensor) -> Tensor:
        torch.manual_seed(7)  # and in the middle of every step
        np.random.seed(7)
        random.seed(7)
        return outputs.sum(1) * 0

    task.patch.setattr(task, "make_model", lambda: nn.Sequential(Pixels(), nn.Linear(64, OUTPUTS, bias=False)))
    task.patch.setattr(task, "losses", losses)


class FromTorch(SecureGenerator):
    """The mistake: noise and draws from torch's own generator."""

    def normal(self, shape: Any, std: float, *, device: Any = None, dtype: Any = torch.float32) -> Tensor:
        return torch.normal(0.0, std, tuple(shape), dtype=dtype).to(device)


def from_torch(task: Rigged) -> None:
    seeding(task)
    task.patch.setattr(app, "SecureGenerator", FromTorch)


class KeyedBefore(SecureGenerator):
    """The other mistake: the key is drawn once, before the fork, and the stream starts anew in each process."""

    key = bytes(range(32))

    def __init__(self) -> None:
        before, os.urandom = os.urandom, lambda count: self.key[:count]  # type: ignore[assignment]
        try:
            super().__init__()
        finally:
            os.urandom = before


def keyed_before(task: Rigged) -> None:
    seeding(task)
    task.patch.setattr(app, "SecureGenerator", KeyedBefore)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    terms = {"batch_size": BATCH, "noise_multiplier": NOISE, "max_grad_norm": CLIP, "epsilon": 100.0}
    with site(tmp_path_factory.mktemp("seeds"), clients=2, privacy=terms) as made:
        yield made


def rounds(owner: Site, order: Callable[[Rigged], None], *, restarts: int) -> list[np.ndarray]:
    """The noise of two rounds of one worker, one of the next fork, and one after each restart of the client."""
    client = owner.start(**ENVIRONMENT)
    found = []

    def one() -> None:
        owner.order(order)
        found.append(moved(owner.ask(0, WEIGHTS, steps=STEPS), WEIGHTS))

    def warm() -> None:
        owner.order(None)
        moved(owner.ask(1))  # the task's model is checked, with its own loss

    warm()
    one()
    one()
    owner.end_workers(client)
    warm()
    one()
    for _ in range(restarts):
        client = owner.restart(client, **ENVIRONMENT)
        warm()
        one()
    client.terminate()
    assert client.wait(60) == 0
    return found


def shared(found: list[np.ndarray]) -> dict[str, float]:
    return {
        f"{a}, {b}": correlation_p_value(found[a], found[b]) for a, b in itertools.combinations(range(len(found)), 2)
    }


def test_no_two_rounds_share_noise_whoever_sets_a_seed(owner: Site) -> None:
    found = rounds(owner, seeding, restarts=1)
    assert rejected(shared(found)) == {}
    assert rejected(normal_checks(np.concatenate(found), STD, (1, 64, found[0].size))) == {}


@pytest.mark.parametrize("order", [from_torch, keyed_before])
def test_a_client_whose_noise_has_a_seed_is_caught(owner: Site, order: Callable[[Rigged], None]) -> None:
    assert set(rejected(shared(rounds(owner, order, restarts=0)))) == {"0, 1", "0, 2", "1, 2"}
