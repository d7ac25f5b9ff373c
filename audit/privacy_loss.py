"""What each canary's part of the updates says about whether it was a record, and the epsilon that this refutes.

The score of a canary is its privacy loss under the documented mechanism: the logarithm of how much likelier its
coordinate is with the record than without. No adversary can do better (Neyman & Pearson). For an (epsilon, delta)-DP
training the mean of (1 - exp(epsilon - loss))+ over outputs with the record is at most delta (Balle, Barthe &
Gaboardi 2018, arXiv:1807.01647), and likewise without: a mean far above delta refutes epsilon. Unlike `one_run` it
rests on the mechanism being the documented one, which `conformance` checks; in return it comes close to the truth.
"""

import math

import numpy as np
from scipy import special, stats

from audit.one_run import largest
from client.accounting import Release


def losses(seen: np.ndarray, round_: Release) -> np.ndarray:
    """Privacy loss of each canary, [canaries], from `seen` [rounds, canaries] in units of the clip.

    One round is the sum of `steps` steps: a binomial number of parts of 1, and N(0, steps * noise_multiplier**2).
    """
    parts = np.arange(round_.steps + 1)[:, None]
    prior = stats.binom.logpmf(parts, round_.steps, round_.sample_rate)
    variance = round_.steps * round_.noise_multiplier**2
    total = np.zeros(seen.shape[1])
    for row in seen:
        total += special.logsumexp(prior + (parts * row[None] - parts**2 / 2) / variance, axis=0)
    return total


def refuted_epsilon(losses: np.ndarray, included: np.ndarray, *, delta: float, level: float) -> float:
    """The largest epsilon that these losses refute at `level`."""
    sides = (losses[included], -losses[~included])  # a record more, a record less

    def refuted(epsilon: float) -> bool:
        return any(_p_value(side, epsilon, delta) < level / len(sides) for side in sides)

    return largest(refuted)


def _p_value(losses: np.ndarray, epsilon: float, delta: float) -> float:
    """Chernoff's bound (Hoeffding 1963): independent values in [0, 1] whose mean should be at most delta."""
    mean = float(-np.expm1(np.minimum(0.0, epsilon - losses)).mean()) if len(losses) else 0.0
    if mean <= delta:
        return 1.0
    return math.exp(-len(losses) * float(special.rel_entr(mean, delta) + special.rel_entr(1 - mean, 1 - delta)))
