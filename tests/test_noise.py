"""Noise and sampling are what the accounting assumes, no two streams meet, and broken ones are found out."""

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from client import noise
from client.noise import SecureGenerator
from tests.statistics_checks import correlation_p_value, normal_checks, poisson_checks, rejected

N = 200_000
CHUNK_LAGS = (1, 2, 3, 7, 64, noise._CHUNK // 2, noise._CHUNK)  # the last two: a Box-Muller pair, and the next chunk


def draw(generator: SecureGenerator, n: int = N, std: float = 1.0) -> np.ndarray:
    return generator.normal((n,), std).numpy()


def draw_masks(generator: SecureGenerator, rate: float, draws: int = 20_000, records: int = 40) -> np.ndarray:
    return np.stack([generator.poisson_mask(records, rate).numpy() for _ in range(draws)])


# The noise


@pytest.mark.parametrize(("n", "std"), [(1_000_000, 1.0), (N, 1e-3), (N, 40.0)])
def test_noise_is_independent_and_normal(n: int, std: float) -> None:
    assert rejected(normal_checks(draw(SecureGenerator(), n, std), std, CHUNK_LAGS)) == {}


def test_many_small_draws_are_as_good_as_a_large_one() -> None:
    generator = SecureGenerator()
    samples = np.concatenate([generator.normal((3, 7), 1.0).numpy().ravel() for _ in range(10_000)])
    assert rejected(normal_checks(samples, 1.0, (1, 2, 21, 22))) == {}


def halved(n: int) -> np.ndarray:
    return draw(SecureGenerator(), n) / 2


def three_percent_short(n: int) -> np.ndarray:
    return draw(SecureGenerator(), n) * 0.97


def zero(n: int) -> np.ndarray:
    return draw(SecureGenerator(), n, 0.0)


def seeded_again_for_every_step(n: int) -> np.ndarray:
    steps = [torch.randn(1000, generator=torch.Generator().manual_seed(7)) for _ in range(n // 1000)]
    return torch.cat(steps).numpy()


def the_same_twice(n: int) -> np.ndarray:
    return np.repeat(draw(SecureGenerator(), n // 2), 2)


def uniform(n: int) -> np.ndarray:
    return (SecureGenerator().normal((n,), 1.0).erf().numpy() * math.sqrt(3)).astype(np.float64)


@pytest.mark.parametrize("broken", [halved, three_percent_short, zero, the_same_twice, uniform])
def test_the_checks_reject_broken_noise(broken: Callable[[int], np.ndarray]) -> None:
    assert rejected(normal_checks(broken(N), 1.0))


def test_the_checks_reject_a_seed_that_repeats() -> None:
    assert "lag 1000" in rejected(normal_checks(seeded_again_for_every_step(N), 1.0, (1, 1000)))


def test_the_number_of_threads_is_restored() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        SecureGenerator().normal((10,), 1.0)
        SecureGenerator().poisson_mask(10, 0.5)
        with pytest.raises(ValueError, match="std"):
            SecureGenerator().normal((10,), -1.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_shapes_devices_and_types() -> None:
    generator = SecureGenerator()
    for shape in [(), (0,), (3, 0, 2), (1,), (5,), (2, 3, 4), (2**16 + 1,)]:
        assert generator.normal(shape, 1.0).shape == shape
    assert generator.normal((2,), 1.0).dtype == torch.float32
    assert generator.normal((2,), 1.0, dtype=torch.float64, device="cpu").dtype == torch.float64
    assert generator.normal((2,), 1.0, device="meta").device.type == "meta"
    assert torch.equal(generator.normal((9,), 0.0), torch.zeros(9))
    assert generator.normal((1000,), 1e300, dtype=torch.float64).isfinite().all()


@pytest.mark.parametrize(
    ("shape", "std", "dtype", "message"),
    [
        ((1,), -1.0, torch.float32, "std=-1.0 to be finite and >= 0"),
        ((1,), math.nan, torch.float32, "std=nan"),
        ((1,), math.inf, torch.float32, "std=inf"),
        ((2, -1), 1.0, torch.float32, r"shape=\(2, -1\)"),
        ((1,), 1.0, torch.int64, "dtype=torch.int64"),
    ],
)
def test_nonsense_is_refused(shape: tuple[int, ...], std: float, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SecureGenerator().normal(shape, std, dtype=dtype)


# The sampling


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.9])
def test_each_record_joins_by_itself(rate: float) -> None:
    assert rejected(poisson_checks(draw_masks(SecureGenerator(), rate), rate)) == {}


def test_a_mask_larger_than_a_chunk() -> None:
    masks = np.stack([SecureGenerator().poisson_mask(200_000, 0.25).numpy() for _ in range(10)])
    assert rejected(poisson_checks(masks.reshape(50_000, 40), 0.25)) == {}


def test_sampling_that_is_not_poisson_is_rejected() -> None:
    rng, draws, records, rate = np.random.default_rng(1), 20_000, 40, 0.1
    fixed_size = np.argsort(rng.random((draws, records)), axis=1) < records * rate
    in_pairs = np.repeat(rng.random((draws, records // 2)) < rate, 2, axis=1)
    kept = np.repeat(rng.random((draws // 2, records)) < rate, 2, axis=0)
    weighted = rng.random((draws, records)) < rate * np.linspace(0.9, 1.1, records)
    assert "batch sizes" in rejected(poisson_checks(fixed_size, rate))
    assert "pairs of records" in rejected(poisson_checks(in_pairs, rate))
    assert "one draw and the next" in rejected(poisson_checks(kept, rate))
    assert "every record alike" in rejected(poisson_checks(weighted, rate))
    assert "total" in rejected(poisson_checks(draw_masks(SecureGenerator(), rate * 1.03), rate))


def test_rates_at_the_edges() -> None:
    generator = SecureGenerator()
    assert generator.poisson_mask(1000, 1).all()
    assert generator.poisson_mask(1000, math.nextafter(1.0, 0.0)).all()  # a False comes once in 9e12 runs
    assert not generator.poisson_mask(1000, 2.0**-60).any()
    assert not generator.poisson_mask(1000, 5e-324).any()
    assert generator.poisson_mask(0, 0.5).shape == (0,)
    assert generator.poisson_mask(3, 0.5).dtype == torch.bool


def test_the_rate_is_never_rounded_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rate, generator = 0.1, SecureGenerator()
    threshold = int(rate * 2.0**64)
    words = torch.tensor([0, threshold - 1, threshold, 2**64 - 1], dtype=torch.uint64).view(torch.int64)
    monkeypatch.setattr(generator, "_words", lambda _count: words ^ (-(2**63)))  # the order of unsigned words
    assert generator.poisson_mask(4, rate).tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("n", "rate", "message"),
    [
        (5, 0.0, "rate=0.0"),
        (5, -0.1, "rate"),
        (5, 1.01, "rate=1.01"),
        (5, math.nan, "rate=nan"),
        (-1, 0.5, "n=-1"),
    ],
)
def test_a_rate_that_is_no_probability_is_refused(n: int, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SecureGenerator().poisson_mask(n, rate)


# One stream, one owner


def test_seeds_change_nothing_and_are_not_disturbed() -> None:
    noise, torchs, numpys = [], [], []
    for use in (True, True, False):
        torch.manual_seed(3)
        np.random.seed(3)
        if use:
            generator = SecureGenerator()
            noise.append(draw(generator))
            generator.poisson_mask(1000, 0.5)
        torchs.append(torch.rand(3).tolist())
        numpys.append(np.random.random(3).tolist())
    assert rejected({"same seeds": correlation_p_value(*noise)}) == {}
    assert torchs[0] == torchs[1] == torchs[2]
    assert numpys[0] == numpys[1] == numpys[2]


def test_instances_and_calls_are_not_correlated() -> None:
    one, two = SecureGenerator(), SecureGenerator()
    first, second, again = draw(one), draw(two), draw(one)
    p_values = {"instances": correlation_p_value(first, second), "calls": correlation_p_value(first, again)}
    assert rejected(p_values) == {}


def test_a_shared_seed_is_found() -> None:
    a, b = (torch.randn(N, generator=torch.Generator().manual_seed(7)).numpy() for _ in range(2))
    assert rejected({"same": correlation_p_value(a, b)})
    assert rejected({"a part": correlation_p_value(a, 0.05 * b + draw(SecureGenerator()))})
    assert rejected({"constant": correlation_p_value(a, np.zeros(N))})


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_generator_cannot_be_copied(copier: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="copied or pickled"):
        copier(SecureGenerator())


# A process of its own: a fork after torch's threads have started would hang.
FORKS = """
import os, sys
import numpy as np, torch
from client import noise
from client.noise import SecureGenerator

torch.set_num_threads(1)
torch.manual_seed(5)
inherited = SecureGenerator()
inherited.normal((1,), 1.0)
for child in range(3):
    pid = os.fork()
    if pid == 0:
        status = 1
        for use in (lambda: inherited.normal((1,), 1.0), lambda: inherited.poisson_mask(9, 0.5)):
            try:
                use()
            except RuntimeError as error:
                status = 0 if f"belongs to process {os.getppid()}" in str(error) else 1
        np.save(f"{sys.argv[1]}/own-{child}.npy", SecureGenerator().normal((200_000,), 1.0).numpy())
        np.save(f"{sys.argv[1]}/torch-{child}.npy", torch.randn(200_000).numpy())
        os._exit(status)
    if os.waitpid(pid, 0)[1] != 0:
        sys.exit("a child used the generator of its parent")
np.save(f"{sys.argv[1]}/own-3.npy", inherited.normal((200_000,), 1.0).numpy())
"""


def test_forked_processes_share_no_stream(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORKS, str(tmp_path)], check=True, timeout=100)
    own = [np.load(tmp_path / f"own-{child}.npy") for child in range(4)]
    assert rejected(normal_checks(np.concatenate(own), 1.0, (1, 200_000, 400_000, 600_000))) == {}
    pairs = {f"{i}, {j}": correlation_p_value(own[i], own[j]) for i in range(4) for j in range(i)}
    assert rejected(pairs) == {}
    torchs = [np.load(tmp_path / f"torch-{child}.npy") for child in range(2)]
    assert rejected({"torch's generator": correlation_p_value(*torchs)})  # the trap that all this is for
