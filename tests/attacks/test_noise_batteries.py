"""Attack on the noise itself: statistics of ten million draws, in both types that a model may have.

What holds: distribution, moments, tails and correlations are those of independent normal draws, as far as so many can
tell. Each battery rejects noise that is uniform, halved, cut off, nearly normal, or comes twice.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from client import noise
from client.noise import SecureGenerator
from tests.statistics_checks import autocorrelation_checks, normal_checks, rejected, tail_checks

N, STD, LAGS = 10_000_000, 0.75, 100_000
CHUNK_LAGS = (1, 2, 3, 7, 64, noise._CHUNK // 2, noise._CHUNK)  # the last two: a Box-Muller pair, and the next chunk


def batteries(samples: np.ndarray) -> dict[str, float]:
    return {
        **normal_checks(samples, STD, CHUNK_LAGS),
        **tail_checks(samples, STD),
        **autocorrelation_checks(samples, LAGS),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_million_draws_are_independent_and_normal(dtype: torch.dtype) -> None:
    p_values = batteries(SecureGenerator().normal((N,), STD, dtype=dtype).numpy())
    assert len(p_values) == 31
    assert rejected(p_values) == {}


def draw(n: int) -> np.ndarray:
    return SecureGenerator().normal((n,), STD, dtype=torch.float64).numpy()


def uniform(n: int) -> np.ndarray:
    return np.random.default_rng().uniform(-1, 1, n) * STD * 3**0.5


def halved(n: int) -> np.ndarray:
    return draw(n) / 2


def one_percent_short(n: int) -> np.ndarray:
    return draw(n) * 0.99


def cut_off(n: int) -> np.ndarray:
    return draw(n).clip(-4 * STD, 4 * STD)


def twelve_uniforms(n: int) -> np.ndarray:
    """The textbook's approximation of a normal."""
    return sum(np.random.default_rng().random(n) for _ in range(12)) * STD - 6 * STD  # type: ignore[return-value]


def one_in_a_hundred_wild(n: int) -> np.ndarray:
    return draw(n) * np.where(np.random.default_rng().random(n) < 1e-2, 2.0, 1.0)


def repeated(n: int) -> np.ndarray:
    """A stream that starts again, at a lag that only the transform looks at."""
    return np.resize(draw(77_777), n)


def drifting(n: int) -> np.ndarray:
    noise = draw(n)
    noise[1:] = (noise[1:] + 0.01 * noise[:-1]) / (1 + 1e-4) ** 0.5
    return noise


@pytest.mark.parametrize(
    ("broken", "by"),
    [
        (uniform, {"ks", "kurtosis", "above 2 sigma"}),
        (halved, {"ks", "variance", "below 3 sigma"}),
        (one_percent_short, {"variance"}),
        (cut_off, {"farthest"}),
        (twelve_uniforms, {"kurtosis", "sixth moment"}),
        (one_in_a_hundred_wild, {"above 5 sigma"}),
        (repeated, {"all lags", "worst lag"}),
        (drifting, {"lag 1"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_batteries_reject_broken_noise(broken: Callable[[int], np.ndarray], by: set[str]) -> None:
    """On a tenth of the draws."""
    assert set(rejected(batteries(broken(N // 10)))) >= by


def test_they_do_not_reject_the_true_noise() -> None:
    """So that the test above does not pass because everything is rejected."""
    assert rejected(batteries(draw(N // 10))) == {}
