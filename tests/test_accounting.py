"""Epsilon against published numbers, closed forms, numeric integration and a second accountant; nonsense is refused."""

import doctest
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus_rdp
from scipy.optimize import brentq
from scipy.special import logsumexp
from scipy.stats import norm

from client import accounting
from client.accounting import ORDERS, Mode, Release, compose, epsilon, noise_within, rounds_within

MODES: tuple[Mode, ...] = ("fixed", "adaptive")
DELTA = 1e-5


def release(noise_multiplier: float = 1.0, sample_rate: float = 0.05, steps: int = 1) -> Release:
    return Release(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


def cost(mode: Mode, *releases: Release, delta: float = DELTA) -> float:
    return epsilon(mode, compose(releases), delta)


# Published and second accountants


def test_opacus_reference() -> None:
    """The value of Opacus' own test; dp-accounting's fractional orders cost 3e-5 of it, upwards."""
    reference = 7.32911117143
    ours = cost("adaptive", release(1.5, 0.04, int(90 / 0.04)))
    assert ours == pytest.approx(reference, rel=1e-4)
    assert ours >= reference - 1e-9


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"), [(0.7, 0.01, 100), (1.0, 0.0512, 441), (1.5, 0.2, 300), (4.0, 1.0, 50)]
)
def test_renyi_agrees_with_opacus_and_bounds_the_loss_distribution(sigma: float, rate: float, steps: int) -> None:
    rdp = opacus_rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=steps, orders=list(ORDERS))
    opacus, _ = opacus_rdp.get_privacy_spent(orders=list(ORDERS), rdp=rdp, delta=DELTA)
    adaptive, fixed = (cost(mode, release(sigma, rate, steps)) for mode in ("adaptive", "fixed"))
    assert adaptive == pytest.approx(opacus, rel=0.02)  # fractional orders, see NUMERIC
    assert adaptive >= opacus - 1e-9
    assert fixed < adaptive
    assert fixed > 0.7 * adaptive  # a loss distribution that lost half its mass would be far below


# Closed forms: without sampling


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """The exact epsilon of one Gaussian mechanism: Balle & Wang 2018, arXiv:1805.06530, Theorem 8."""

    def excess(eps: float) -> float:
        a, b = 1 / (2 * sigma), eps * sigma
        return norm.cdf(a - b) - math.exp(eps + norm.logcdf(-a - b)) - delta

    return brentq(excess, 0, 700, xtol=1e-12)


GAUSSIANS = [(0.8, 1), (1.0, 1), (3.0, 1), (5.0, 100), (20.0, 400), (50.0, 1)]


@pytest.mark.parametrize(("sigma", "steps"), GAUSSIANS)
def test_fixed_is_the_analytic_gaussian_mechanism(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(sigma / math.sqrt(steps), DELTA)
    ours = cost("fixed", release(sigma, 1.0, steps))
    assert exact * (1 - 1e-9) <= ours <= exact * 1.001 + steps * accounting.DISCRETIZATION / 100


@pytest.mark.parametrize(("sigma", "steps"), GAUSSIANS)
def test_adaptive_is_the_best_renyi_order(sigma: float, steps: int) -> None:
    """RDP of a Gaussian is alpha / (2 sigma^2); to epsilon by Canonne, Kamath & Steinke 2020, arXiv:2004.00010."""
    alpha = ORDERS
    converted = steps * alpha / (2 * sigma**2) + np.log1p(-1 / alpha) - np.log(DELTA * alpha) / (alpha - 1)
    assert cost("adaptive", release(sigma, 1.0, steps)) == pytest.approx(max(0, converted.min()), rel=1e-9)


# Numeric integration: with sampling


def renyi(alpha: float, sigma: float, rate: float) -> float:
    """RDP of one sampled step, integrated on a grid: Mironov, Talwar & Zhang 2019, arXiv:1908.10530."""
    x, width = np.linspace(-12 * sigma, alpha + 12 * sigma, 20_000, retstep=True)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))
    return (logsumexp(alpha * ratio + norm.logpdf(x, 0, sigma)) + math.log(width)) / (alpha - 1)


@pytest.mark.parametrize(("sigma", "rate"), [(1.0, 0.0512), (0.7, 0.2), (5.0, 0.01)])
def test_whole_orders_are_the_integral_and_fractional_ones_no_less(sigma: float, rate: float) -> None:
    ours = accounting._rdp_of_one_step((sigma, rate))
    exact = np.array([renyi(alpha, sigma, rate) for alpha in ORDERS])
    whole = ORDERS % 1 == 0
    assert np.allclose(ours[whole], exact[whole], rtol=1e-6, atol=1e-12)
    assert (ours >= exact * (1 - 1e-6)).all()
    assert np.isfinite(ours[ORDERS >= 2.5]).all()  # dp-accounting leaves some out


# Among them what is worst for a coarser set of orders: small budgets, few steps, large budgets.
PLANS = [
    (1.0, 0.0512, 441), (5.24, 0.0064, 316), (16.6, 0.0012, 106_000), (1.626, 0.0037, 35), (14.6, 0.18, 33_800),
    (3.0, 0.01, 45), (0.7, 0.05, 150), (1.5, 0.2, 292),
]  # fmt: skip


@pytest.mark.parametrize(("sigma", "rate", "steps"), PLANS)
def test_adaptive_is_close_to_the_best_order(sigma: float, rate: float, steps: int) -> None:
    orders = 1 + np.geomspace(0.04, 2500, 560)  # 2% apart
    rdp = np.maximum(steps * np.array([renyi(alpha, sigma, rate) for alpha in orders]), 0)
    best = (rdp + np.log1p(-1 / orders) - np.log(DELTA * orders) / (orders - 1)).min()
    assert cost("adaptive", release(sigma, rate, steps)) <= best * (1.01 if best < 10 else 1.03)


@pytest.mark.parametrize(("sigma", "rate", "steps"), PLANS)
def test_both_modes_agree_with_dp_accounting_at_finer_settings(sigma: float, rate: float, steps: int) -> None:
    event = SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), steps)
    ours = cost("adaptive", release(sigma, rate, steps))
    assert ours <= RdpAccountant().compose(event).get_epsilon(DELTA) * (1 + 1e-12)  # its own orders are among ours
    fine = [*np.arange(1.5, 4, 0.02), *np.arange(4, 40, 0.1), *np.arange(40, 400)]
    assert ours == pytest.approx(RdpAccountant(fine).compose(event).get_epsilon(DELTA), rel=0.01)
    interval = min(1e-4, rate / sigma / 30)
    loss = PLDAccountant(value_discretization_interval=interval).compose(event).get_epsilon(DELTA)
    assert cost("fixed", release(sigma, rate, steps)) == pytest.approx(loss, rel=0.01)


def test_a_coarse_grid_of_losses_would_count_a_small_budget_twice() -> None:
    """The negative control: so does the interval."""
    step = PoissonSampledDpEvent(0.0012, GaussianDpEvent(16.6))
    coarse = PLDAccountant(value_discretization_interval=accounting.DISCRETIZATION).compose(step, 106_000)
    assert coarse.get_epsilon(DELTA) > 2 * cost("fixed", release(16.6, 0.0012, 106_000))


def test_opacus_orders_alone_would_count_a_small_budget_twice() -> None:
    """The negative control: the orders matter."""
    few = np.array([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)), dtype=float)
    step = RdpAccountant(few).compose(PoissonSampledDpEvent(0.0064, GaussianDpEvent(5.24)))
    assert compute_epsilon(few, 316 * step.rdp, DELTA)[0] > 1.5 * cost("adaptive", release(5.24, 0.0064, 316))


def hockey_stick(eps: float, sigma: float, rate: float, steps: int = 1) -> float:
    """Delta of one or two sampled steps at `eps`: the worse of adding and removing the record, on a grid."""
    x, width = np.linspace(-12 * sigma, 1 + 12 * sigma, 400_000 if steps == 1 else 4000, retstep=True)
    without = norm.pdf(x, 0, sigma) * width
    with_record = (1 - rate) * without + rate * norm.pdf(x, 1, sigma) * width
    if steps == 2:
        without, with_record = np.outer(without, without), np.outer(with_record, with_record)
    pairs = (without, with_record), (with_record, without)
    return max(np.maximum(p - math.exp(eps) * q, 0).sum() for p, q in pairs)


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(0.6, 0.1, 1), (1.0, 0.05, 1), (2.0, 0.5, 1), (2.0, 1.0, 1), (1.0, 0.05, 2), (2.0, 0.5, 2)],
)
def test_a_sampled_step_by_integration(sigma: float, rate: float, steps: int) -> None:
    ours = cost("fixed", release(sigma, rate, steps))
    assert hockey_stick(ours, sigma, rate, steps) <= DELTA * (1 + 1e-4)  # an upper bound
    assert hockey_stick(ours * 0.995 - 1e-3, sigma, rate, steps) > DELTA  # and not by much
    assert cost("adaptive", release(sigma, rate, steps)) >= ours
    # A negative control of the oracle: accounting for half the rate would not have been enough.
    assert hockey_stick(cost("fixed", release(sigma, rate / 2, steps)), sigma, rate, steps) > DELTA


# Composition


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [1, 10, 1125, 2249])
def test_splitting_a_run_into_rounds_costs_the_same(mode: Mode, cut: int) -> None:
    whole, parts = release(1.5, 0.04, 2250), (release(1.5, 0.04, cut), release(1.5, 0.04, 2250 - cut))
    assert cost(mode, *parts) == cost(mode, whole)
    assert cost(mode, *reversed(parts)) == cost(mode, whole)


@pytest.mark.parametrize("mode", MODES)
def test_a_round_at_a_time_costs_the_same(mode: Mode) -> None:
    assert cost(mode, *[release(steps=11)] * 40) == cost(mode, release(steps=440))


def test_adaptive_adds_different_mechanisms() -> None:
    one, two = release(1.0, 0.05, 100), release(2.0, 0.1, 50)
    both = cost("adaptive", one, two)
    assert max(cost("adaptive", one), cost("adaptive", two)) < both < cost("adaptive", one) + cost("adaptive", two)


def test_nothing_costs_nothing() -> None:
    assert [cost(mode) for mode in MODES] == [0.0, 0.0]


# What dp-accounting bounds (fractional orders) or rounds up (losses to a grid) depends on the mechanism. Each value
# is an upper bound, so two of them may stand the other way round by this much.
NUMERIC = 0.025


@pytest.mark.long
@pytest.mark.parametrize(("mode", "examples"), [("adaptive", 15), ("fixed", 4)])
def test_more_steps_more_sampling_less_noise_cost_more(mode: Mode, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(st.floats(0.6, 20), st.floats(1e-4, 1), st.integers(1, 2000), st.floats(1.01, 3), st.floats(1e-8, 1e-3))
    def check(sigma: float, rate: float, steps: int, more: float, delta: float) -> None:
        base = cost(mode, release(sigma, rate, steps), delta=delta)
        assert cost(mode, release(sigma, rate, math.ceil(steps * more)), delta=delta) >= base * (1 - 1e-9)
        assert cost(mode, release(sigma, rate, steps), delta=delta / more) >= base * (1 - 1e-9)
        assert cost(mode, release(sigma, min(1.0, rate * more), steps), delta=delta) >= base * (1 - NUMERIC)
        assert cost(mode, release(sigma / more, rate, steps), delta=delta) >= base * (1 - NUMERIC)

    check()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(release, st.sampled_from([0.8, 1.0, 1.5]), st.sampled_from([0.01, 0.1]), st.integers(1, 100)),
        min_size=1,
        max_size=8,
    )
)
def test_a_further_release_never_lowers_what_is_spent(releases: list[Release]) -> None:
    spent = [cost("adaptive", *releases[:n]) for n in range(len(releases) + 1)]
    assert all(after >= before * (1 - 1e-12) for before, after in pairwise(spent))


# Searches


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("budget", "rate", "steps"), [(8.0, 0.0512, 441), (3.0, 0.064, 800), (0.3, 1.0, 1)])
def test_the_noise_that_fits_is_the_least(mode: Mode, budget: float, rate: float, steps: int) -> None:
    noise = noise_within(budget, mode, sample_rate=rate, steps=steps, delta=DELTA)
    assert cost(mode, release(noise, rate, steps)) <= budget < cost(mode, release(noise - 0.001, rate, steps))


def test_the_least_noise_and_none() -> None:
    assert noise_within(1e9, "adaptive", sample_rate=0.5, steps=1, delta=DELTA) == accounting.LEAST_NOISE
    for mode in MODES:
        with pytest.raises(ValueError, match="no noise multiplier up to 1e"):
            noise_within(1e-9, mode, sample_rate=1.0, steps=10**6, delta=DELTA)


def test_fixed_gives_fifteen_percent_more_steps() -> None:
    step = release(1.0, 0.0512, 1)
    fixed, adaptive = (rounds_within(8.0, mode, frozenset(), step, DELTA) for mode in MODES)
    assert fixed >= 1.15 * adaptive
    for mode, steps in zip(MODES, (fixed, adaptive), strict=True):
        assert cost(mode, release(1.0, 0.0512, steps)) <= 8.0 < cost(mode, release(1.0, 0.0512, steps + 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [0.3, 1.0, 2.2])
@pytest.mark.parametrize("spent", [0, 7, 60])
def test_rounds_within_agrees_with_trying(mode: Mode, budget: float, spent: int) -> None:
    round_ = release(1.0, 0.05, 11)
    before = [release(1.0, 0.05, spent)] if spent else []
    tried = 0
    while cost(mode, *before, *[round_] * (tried + 1)) <= budget:
        tried += 1
    assert rounds_within(budget, mode, compose(before), round_, DELTA) == tried


def test_rounds_within_after_another_mechanism() -> None:
    before, round_ = release(2.0, 0.1, 50), release(1.0, 0.05, 11)
    rounds = rounds_within(3.0, "adaptive", compose([before]), round_, DELTA)
    assert rounds > 0
    assert cost("adaptive", before, *[round_] * rounds) <= 3.0 < cost("adaptive", before, *[round_] * (rounds + 1))


def test_a_search_ends_where_nothing_is_spent() -> None:
    quiet = release(1e6, 1e-9, 1)
    assert rounds_within(8.0, "adaptive", frozenset(), quiet, DELTA) >= accounting.MAX_ROUNDS


# Nonsense


@cache
def nonsense() -> list[tuple[str, object]]:
    numbers = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e300, 5e-324, True, 1, 0, "1.0", None, 10**400, [1.0]]
    return [
        *(("noise_multiplier", value) for value in [*numbers, 1.01e6, 0.0099]),
        *(("sample_rate", value) for value in [*numbers, 1.0000001, 1.5]),
        *(("steps", value) for value in [0, -1, True, False, 1.0, math.nan, math.inf, 10**9 + 1, 10**400, "1", None]),
    ]


@pytest.mark.parametrize(("name", "value"), nonsense())
def test_a_release_refuses_nonsense(name: str, value: object) -> None:
    good = {"noise_multiplier": 1.0, "sample_rate": 0.05, "steps": 1}
    with pytest.raises(ValueError, match=f"^expected {name}="):
        Release(**{**good, name: value})


def test_a_release_takes_its_bounds() -> None:
    for sigma, rate, steps in [(0.01, 1.0, 1), (1e6, 1e-9, 10**9)]:
        assert cost("adaptive", release(sigma, rate, steps)) >= 0


def test_a_release_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        release().steps = 2  # type: ignore[misc]


def test_the_examples_in_the_docstrings() -> None:
    assert doctest.testmod(accounting).failed == 0
