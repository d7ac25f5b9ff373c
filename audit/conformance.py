"""Is what the client sends the documented mechanism? Three tests with exact or one-sided-safe intervals.

Each is a value, and the interval outside of which it lies with probability `level` at most when all is well.
"""

import math

import numpy as np
from scipy import stats

from audit.trial import Trial
from common.audit import Check


def noise_variance(trial: Trial, level: float) -> Check:
    """Variance of what no record has a part in, over what was accounted: chi-square."""
    accounted = trial.round_.steps * trial.round_.noise_multiplier**2
    count = trial.noise.size
    return Check.of(
        name="noise variance / accounted",
        observed=float(np.square(trial.noise).mean() / accounted),
        low=float(stats.chi2.ppf(level / 2, count) / count),
        high=float(stats.chi2.isf(level / 2, count) / count),
    )


def canary_amplitude(trial: Trial, level: float) -> Check:
    """What the canaries that are records add to each step, over rate times clip: the sensitivity."""
    records, steps = int(trial.included.sum()), len(trial.seen) * trial.round_.steps
    expected = records * steps * trial.round_.sample_rate
    margin = amplitude_margin(
        records=records, steps=steps, rate=trial.round_.sample_rate, sigma=trial.round_.noise_multiplier, level=level
    )
    return Check.of(
        name="canary amplitude / clip",
        observed=float(trial.seen[:, trial.included].sum() / expected),
        low=1 - margin,
        high=1 + margin,
    )


def amplitude_margin(*, records: int, steps: int, rate: float, sigma: float, level: float) -> float:
    """Bernstein's inequality for participations in {0, 1} and Gaussian noise, relative to their expected sum."""
    tail = math.log(2 / level)
    count = records * steps
    variance = count * (sigma**2 + rate * (1 - rate))
    return (tail / 3 + math.sqrt(tail**2 / 9 + 2 * tail * variance)) / (count * rate)


def noise_correlation(trial: Trial, level: float) -> Check:
    """The largest correlation of two rounds, or of two parameters in any rounds: Student's t, for all pairs."""
    rows = trial.noise.reshape(-1, trial.noise.shape[-1])
    rows = rows - rows.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(rows, axis=1)
    still = norms == 0  # noise that does not vary is known
    units = rows / np.where(still, 1.0, norms)[:, None]
    found = np.abs(units @ units.T)[np.triu_indices(len(rows), k=1)]
    freedom = rows.shape[1] - 2
    t = stats.t.isf(level / (2 * len(found)), freedom)
    return Check.of(
        name="noise correlation",
        observed=1.0 if still.any() else float(found.max()),
        low=0.0,
        high=float(t / math.sqrt(freedom + t**2)),
    )
