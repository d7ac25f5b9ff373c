"""DP-SGD against oracles: a hand-written clip and sum, Opacus' own optimizer, and statistics of what is released."""

import copy
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.accounting import Release
from client.noise import SecureGenerator
from client.training import Step, train
from common.tasks import Data
from tests.statistics_checks import correlation_p_value, normal_checks, rejected

RECORDS = 24
LOSS = nn.CrossEntropyLoss(reduction="none")


class Silent(SecureGenerator):
    """Draws as the real one does, and adds no noise: what is left is the mechanism's mean."""

    def normal(self, shape, std, *, device=None, dtype=torch.float32):  # type: ignore[no-untyped-def]  # noqa: ARG002
        return torch.zeros(tuple(shape), dtype=dtype, device=device)


class Chosen(Silent):
    """No noise, and the batches of a list instead of drawn ones."""

    def __init__(self, batches: list[list[int]]) -> None:
        super().__init__()
        self._batches = iter(batches)

    def poisson_mask(self, n: int, rate: float) -> Tensor:  # noqa: ARG002
        mask = torch.zeros(n, dtype=torch.bool)
        mask[next(self._batches)] = True
        return mask


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 3))


def data(records: int = RECORDS) -> Data:
    generator = torch.Generator().manual_seed(1)
    return Data(
        inputs=torch.randn(records, 1, 8, 8, generator=generator),
        targets=torch.randint(3, (records,), generator=generator),
    )


def step(**changes: object) -> Step:
    return Step(**{"max_grad_norm": 0.7, "batch_size": 10, "physical_batch_size": 7, "learning_rate": 0.3, **changes})


def release(steps: int, sample_rate: float = 1.0, noise_multiplier: float = 1.0) -> Release:
    return Release(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def by_hand(model: nn.Module, records: Data, batches: list[list[int]], how: Step) -> nn.Module:
    """The same steps in float64, one record at a time by plain autograd."""
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    for batch in batches:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for i in batch:
            loss = LOSS(model(records.inputs[i : i + 1].double()), records.targets[i : i + 1]).sum()
            gradient = torch.autograd.grad(loss, parameters)
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            factor = min(1.0, how.max_grad_norm / float(norm))
            total = [t + factor * g for t, g in zip(total, gradient, strict=True)]
        with torch.no_grad():
            for parameter, t in zip(parameters, total, strict=True):
                parameter -= how.learning_rate * t / how.batch_size
    return model


@pytest.mark.parametrize("physical", [1, 5, 7, 24, 100])
def test_steps_are_clip_and_sum_over_the_expected_batch_size(physical: int) -> None:
    batches = [list(range(RECORDS)), [3], [], [1, 5, 8, 20]]
    model, how = network(), step(physical_batch_size=physical)
    expected = by_hand(model, data(), batches, how)
    train(model, LOSS, data(), release=release(4), step=how, generator=Chosen(batches))
    assert torch.allclose(flat(model).double(), flat(expected), atol=2e-6)


def test_steps_are_those_of_opacus() -> None:
    model, how, records = network(), step(), data()
    theirs = copy.deepcopy(model)
    wrapped = GradSampleModule(theirs, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(theirs.parameters(), lr=how.learning_rate),
        noise_multiplier=0.0, max_grad_norm=how.max_grad_norm, expected_batch_size=how.batch_size,
    )  # fmt: skip
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(records.inputs), records.targets).backward()
        optimizer.step()
    train(model, LOSS, records, release=release(3), step=how, generator=Silent())
    assert torch.allclose(flat(model), flat(theirs), atol=1e-6)


def test_batches_are_poisson_at_the_accounted_rate() -> None:
    seen: list[int] = []

    class Counting(Silent):
        def poisson_mask(self, n: int, rate: float) -> Tensor:
            assert rate == 0.2
            mask = super().poisson_mask(n, rate)
            seen.append(int(mask.sum()))
            return mask

    train(network(), LOSS, data(), release=release(300, sample_rate=0.2), step=step(), generator=Counting())
    assert len(seen) == 300
    assert len(set(seen)) > 4  # the size varies
    assert abs(np.mean(seen) - 0.2 * RECORDS) < 6 * np.sqrt(RECORDS * 0.2 * 0.8 / 300)


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    records = data()
    poisoned = Data(inputs=records.inputs.clone(), targets=records.targets)
    poisoned.inputs[4] = float("inf")
    others = [i for i in range(RECORDS) if i != 4]
    model = network()
    expected = by_hand(model, records, [others], step())
    train(model, LOSS, poisoned, release=release(1), step=step(), generator=Chosen([list(range(RECORDS))]))
    assert torch.allclose(flat(model).double(), flat(expected), atol=2e-6)


def test_without_that_rule_one_record_shows_itself() -> None:
    """The negative control: Opacus' own optimizer releases NaN where that record is present."""
    poisoned = data().inputs.clone()
    poisoned[4] = float("inf")
    model = network()
    wrapped = GradSampleModule(model, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=10
    )
    nn.functional.cross_entropy(wrapped(poisoned), data().targets).backward()
    optimizer.step()
    assert flat(model).isnan().any()


@given(
    scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e6, 1e19, 1e30, float("inf"), float("nan")]), seed=st.integers(0, 99)
)
@settings(max_examples=40, deadline=None)
def test_one_record_moves_the_sum_by_at_most_the_clip(scale: float, seed: int) -> None:
    records, how = data(), step(learning_rate=1.0, batch_size=1)
    generator = torch.Generator().manual_seed(seed)
    records.inputs[0] = scale * torch.randn(1, 8, 8, generator=generator)
    present, absent = network(), network()
    train(present, LOSS, records, release=release(1), step=how, generator=Chosen([list(range(RECORDS))]))
    train(absent, LOSS, records, release=release(1), step=how, generator=Chosen([list(range(1, RECORDS))]))
    assert float((flat(present) - flat(absent)).norm()) <= how.max_grad_norm * (1 + 1e-5)


class Still(nn.Module):
    """A model whose gradients are all zero: what it releases is noise alone."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer = nn.Linear(1, size, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


SIZE = 200_000
STEPS = 4
HOW = Step(max_grad_norm=0.5, batch_size=8, physical_batch_size=8, learning_rate=2.0)
STD = HOW.learning_rate * 1.5 * HOW.max_grad_norm / HOW.batch_size * STEPS**0.5


def released(generator: SecureGenerator) -> np.ndarray:
    """The noise of one round, through the shipped training."""
    model = Still(SIZE)
    nothing = Data(inputs=torch.zeros(16, 1), targets=torch.zeros(16, dtype=torch.int64))
    round_ = release(STEPS, sample_rate=0.5, noise_multiplier=1.5)
    train(model, lambda outputs, _: outputs.sum(1), nothing, release=round_, step=HOW, generator=generator)
    return flat(model).numpy()


def in_a_fork(make: Callable[[], SecureGenerator]) -> np.ndarray:
    """One round's noise, made in a forked process as a worker makes it."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        try:
            torch.set_num_threads(1)
            with os.fdopen(theirs, "wb") as pipe:
                pipe.write(released(make()).astype(np.float32).tobytes())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        noise = np.frombuffer(pipe.read(), np.float32)
    os.wait()
    return noise


@pytest.fixture(autouse=True)
def _one_thread():  # type: ignore[no-untyped-def]
    """A process that has used several threads cannot be forked and compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_released_noise_has_the_accounted_variance() -> None:
    assert not rejected(normal_checks(released(SecureGenerator()), STD))


class Empty(SecureGenerator):
    """The real noise, and batches that nobody joins."""

    def poisson_mask(self, n: int, rate: float) -> Tensor:  # noqa: ARG002
        return torch.zeros(n, dtype=torch.bool)


def test_empty_batches_are_noised_as_any_other() -> None:
    assert not rejected(normal_checks(released(Empty()), STD))


def test_no_two_rounds_share_noise() -> None:
    torch.manual_seed(7)
    first = released(SecureGenerator())
    torch.manual_seed(7)  # a task that seeds torch changes nothing
    second = released(SecureGenerator())
    generator = SecureGenerator()
    rounds = [first, second, released(generator), released(generator)]
    rounds += [in_a_fork(SecureGenerator) for _ in range(2)]  # siblings of one parent
    assert all(len(noise) == SIZE for noise in rounds)
    pairs = {f"{a} and {b}": correlation_p_value(rounds[a], rounds[b]) for a in range(len(rounds)) for b in range(a)}
    assert not rejected(pairs)


class Halved(SecureGenerator):
    def normal(self, shape, std, **options):  # type: ignore[no-untyped-def]
        return super().normal(shape, std / 2, **options)


class Seeded(SecureGenerator):
    def normal(self, shape, std, *, device=None, dtype=torch.float32):  # type: ignore[no-untyped-def]
        return torch.normal(0.0, std, tuple(shape), dtype=dtype).to(device)


def test_broken_noise_is_noticed() -> None:
    """The negative controls of the three tests above."""
    assert "variance" in rejected(normal_checks(released(Silent()) + 1e-30, STD))
    assert "variance" in rejected(normal_checks(released(Halved()), STD))
    torch.manual_seed(7)
    first = released(Seeded())
    torch.manual_seed(7)
    assert rejected({"repeated": correlation_p_value(first, released(Seeded()))})
    torch.manual_seed(8)
    forks = [in_a_fork(Seeded) for _ in range(2)]  # forks of one parent share torch's stream
    assert rejected({"forks": correlation_p_value(*forks)})


@pytest.mark.parametrize("asked", ["high", "medium"])
def test_products_are_never_rounded_more_coarsely_than_is_bounded(asked: str) -> None:
    seen: list[str] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return LOSS(outputs, targets)

    torch.set_float32_matmul_precision(asked)  # as a task's module may
    try:
        train(network(), loss, data(), release=release(steps=1), step=step(), generator=SecureGenerator())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}
