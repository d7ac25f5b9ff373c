"""A lower bound on epsilon from one training run: Steinke, Nasr & Jagielski 2023, arXiv:2305.08846.

Each of `canaries` records was in or out by a fair coin. Whoever guesses `guesses` of the coins from the output of an
(epsilon, delta)-DP training has `correct` or more right with probability `p_value` at most, whatever the training and
the guessing do: an epsilon at which that is small is refuted.
"""

import numpy as np
from scipy import stats

_LARGEST = 1000.0  # beyond it no epsilon says anything
SHARES = (1.0, 1 / 4, 1 / 8, 1 / 16)  # of the canaries, guessed: fixed before anything is seen


def p_value(*, canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most that P["correct" or more] can be under (epsilon, delta)-DP: the paper's Theorem 5.2.

    >>> p_value(canaries=10, guesses=10, correct=10, epsilon=0.0, delta=0.0) == 0.5**10
    True
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"expected 0 <= correct={correct} <= guesses={guesses} <= canaries={canaries}")
    accuracy = 1 / (1 + np.exp(-epsilon))  # of randomised response
    pure = stats.binom.sf(correct - 1, guesses, accuracy)
    missing = np.arange(1, correct + 1)  # what delta may add: `correct` was missed by up to so many
    below = np.cumsum(stats.binom.pmf(correct - missing, guesses, accuracy))
    worst = float((below / missing).max()) if correct else 0.0
    return float(min(1.0, pure + 2 * canaries * delta * worst))


def lower_bound(*, canaries: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """The largest epsilon, to 1e-6, that is refuted at `level`: P[it exceeds the truth] <= level. 0 if none is."""

    def refuted(epsilon: float) -> bool:
        value = p_value(canaries=canaries, guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        return value < level

    return largest(refuted)


def largest(refuted) -> float:  # type: ignore[no-untyped-def]
    """The largest epsilon for which `refuted`, which holds up to some epsilon and not beyond; 0 if for none."""
    low, high = 0.0, _LARGEST
    if not refuted(low):
        return low
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def count_correct(scores: np.ndarray, included: np.ndarray) -> dict[int, int]:
    """By number of guesses, how many are right: the highest scores are guessed in, as many of the lowest out."""
    order = np.argsort(scores, kind="stable")
    right: dict[int, int] = {}
    for share in SHARES:
        half = int(len(scores) * share) // 2
        if half:
            right[2 * half] = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    return right


def measured_epsilon(scores: np.ndarray, included: np.ndarray, *, delta: float, level: float) -> float:
    """The best lower bound over the numbers of guesses, right with probability 1 - level (union bound)."""
    right = count_correct(scores, included)
    return max(
        lower_bound(canaries=len(scores), guesses=guesses, correct=correct, delta=delta, level=level / len(right))
        for guesses, correct in right.items()
    )


def claim_p_value(scores: np.ndarray, included: np.ndarray, *, epsilon: float, delta: float) -> float:
    """P-value of the claim that the training was (epsilon, delta)-DP."""
    right = count_correct(scores, included)
    values = (
        p_value(canaries=len(scores), guesses=guesses, correct=correct, epsilon=epsilon, delta=delta)
        for guesses, correct in right.items()
    )
    return min(1.0, len(right) * min(values))
