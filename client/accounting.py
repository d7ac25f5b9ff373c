"""Epsilon of what was released. Derived from the releases each time it is asked for, never stored.

Two modes, both by Google's dp-accounting, both for neighbours that differ by adding or removing one record:

- `adaptive`: Renyi DP over one fixed set of orders. Valid as a filter, that is when the terms of later rounds were
  chosen after seeing earlier ones (Feldman & Zrnic 2021, arXiv:2008.11193; Lecuyer 2021, arXiv:2103.01379).
- `fixed`: privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049). Tighter, valid only while every release
  of a ledger uses one `(noise_multiplier, sample_rate)`, which the ledger enforces.

dp-accounting is imported where it is asked: workers, who name releases and account for none, do without its memory.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

Mode = Literal["fixed", "adaptive"]

# Any set of orders bounds epsilon from above. These hold all of Opacus' and of dp-accounting's own, and more: by
# Opacus' alone a small budget would be counted twice. At fractional orders dp-accounting takes the absolute value of an
# alternating series, which is up to 3% too much at budgets above 10, and never too little.
ORDERS = np.unique(
    np.concatenate(
        [
            np.arange(1.05, 2.999, 0.05).round(2),
            np.arange(30, 110) / 10,
            np.arange(55, 80) / 5,
            np.arange(32, 64) / 2,
            np.arange(32, 128),
            np.geomspace(128, 2048, 17).round(),
        ]
    )
)

# Losses are rounded up to a grid, so that any interval gives an upper bound, but each step adds to the error: it has to
# be fine beside what a step loses, which is about sample_rate / noise_multiplier. It must not depend on the steps, or
# epsilon could fall from one round to the next.
DISCRETIZATION = 1e-3  # at most; a tenth of a step's loss is within 0.1% of the value at a finer one
_LEAST_DISCRETIZATION = 1e-5

# dp-accounting says so for every fractional order that it leaves out; the bound stays valid without them.
logging.getLogger("absl").setLevel(logging.ERROR)

MAX_ROUNDS = 1_000_000  # a bound for searches, far beyond any training
NOISE_STEPS = 1000  # a noise multiplier is searched for in steps of 1 / 1000


# Beyond these bounds the accountants overflow, and nobody trains there.
LEAST_NOISE, MOST_NOISE = 0.01, 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """`steps` Poisson-sampled Gaussian steps: Abadi et al. 2016, arXiv:1607.00133, Algorithm 1.

    >>> Release(noise_multiplier=1.0, sample_rate=1.5, steps=1)
    Traceback (most recent call last):
    ValueError: expected sample_rate=1.5 in [1e-9, 1]
    """

    noise_multiplier: float  # noise stddev / max_grad_norm, dimensionless
    sample_rate: float  # probability that a record joins a batch
    steps: int  # optimiser steps, not epochs

    def __post_init__(self) -> None:
        for name in ("noise_multiplier", "sample_rate"):
            if type(getattr(self, name)) is not float:
                raise ValueError(f"expected {name}={getattr(self, name)!r} as a float")
        if not LEAST_NOISE <= self.noise_multiplier <= MOST_NOISE:
            raise ValueError(f"expected noise_multiplier={self.noise_multiplier} in [0.01, 1e6]")
        if not 1e-9 <= self.sample_rate <= 1:
            raise ValueError(f"expected sample_rate={self.sample_rate} in [1e-9, 1]")
        if type(self.steps) is not int or not 0 < self.steps <= 10**9:
            raise ValueError(f"expected steps={self.steps!r} as a whole number in [1, 1e9]")


Mechanism = tuple[float, float]  # (noise_multiplier, sample_rate)
Composition = frozenset[tuple[Mechanism, int]]  # all steps taken with each mechanism


def compose(releases: Iterable[Release]) -> Composition:
    """The releases as steps per mechanism: in both modes their order and grouping cost nothing."""
    steps: dict[Mechanism, int] = {}
    for release in releases:
        mechanism = (release.noise_multiplier, release.sample_rate)
        steps[mechanism] = steps.get(mechanism, 0) + release.steps
    return frozenset(steps.items())


@lru_cache(maxsize=4096)
def epsilon(mode: Mode, composition: Composition, delta: float) -> float:
    """The epsilon at `delta` of everything in `composition`; 0 for nothing."""
    if not composition:
        return 0.0
    if mode == "adaptive":
        from dp_accounting.rdp import compute_epsilon

        rdp = sum(steps * _rdp_of_one_step(mechanism) for mechanism, steps in composition)
        return float(compute_epsilon(ORDERS, rdp, delta)[0])
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    interval = min(DISCRETIZATION, *(rate / noise / 10 for (noise, rate), _ in composition))
    accountant = PLDAccountant(value_discretization_interval=max(_LEAST_DISCRETIZATION, interval))
    for (noise_multiplier, sample_rate), steps in sorted(composition):
        accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)), steps)
    return float(accountant.get_epsilon(delta))


def rounds_within(budget: float, mode: Mode, spent: Composition, round_: Release, delta: float) -> int:
    """How many more releases like `round_` fit after `spent` while epsilon stays within `budget`."""
    mechanism = (round_.noise_multiplier, round_.sample_rate)
    taken = dict(spent)
    if mode == "fixed" and set(taken) <= {mechanism}:
        return max(0, _steps_within(budget, mechanism, delta) - taken.get(mechanism, 0)) // round_.steps

    def fits(rounds: int) -> bool:
        more = {**taken, mechanism: taken.get(mechanism, 0) + rounds * round_.steps}
        return epsilon(mode, frozenset(more.items()), delta) <= budget

    return _largest(fits)


def noise_within(budget: float, mode: Mode, *, sample_rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier with which `steps` steps fit in a new ledger's `budget`, rounded up to 0.001.

    It fits by the same account that the ledger keeps; what is 0.001 less does not.

    Raises:
        ValueError: not even the largest noise multiplier that a release may have is enough.
    """

    def fits(thousandths: int) -> bool:
        step = Release(noise_multiplier=thousandths / NOISE_STEPS, sample_rate=sample_rate, steps=steps)
        return epsilon(mode, compose([step]), delta) <= budget

    least, most = round(LEAST_NOISE * NOISE_STEPS), round(MOST_NOISE * NOISE_STEPS)
    high = NOISE_STEPS
    if mode == "fixed":  # never more than by Renyi DP, which is quicker asked
        high = round(NOISE_STEPS * noise_within(budget, "adaptive", sample_rate=sample_rate, steps=steps, delta=delta))
    while not fits(high):
        if high == most:
            raise ValueError(f"no noise multiplier up to {MOST_NOISE:g} keeps {steps} steps within epsilon {budget:g}")
        high = min(most, 2 * high)
    low = high
    while low > least and fits(low):
        high, low = low, max(least, low * 3 // 4)
    if fits(low):
        return low / NOISE_STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high / NOISE_STEPS


@lru_cache(maxsize=1024)
def _steps_within(budget: float, mechanism: Mechanism, delta: float) -> int:
    """With one mechanism a single search answers every later question about this budget."""
    return _largest(lambda steps: epsilon("fixed", frozenset({(mechanism, steps)}), delta) <= budget)


@lru_cache(maxsize=1024)
def _rdp_of_one_step(mechanism: Mechanism) -> np.ndarray:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    noise_multiplier, sample_rate = mechanism
    accountant = RdpAccountant(ORDERS)
    accountant.compose(PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier)))
    return accountant.rdp


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest n up to MAX_ROUNDS with fits(n), where fits is true up to some n and false after it."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MAX_ROUNDS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
