"""Statistical oracles for noise and sampling: functions of the data that return p-values, and no test.

Each p-value is exact or a central limit that holds to the significance used. With 1e-8 for one p-value, a
suite of a hundred of them raises a false alarm about once in a million runs.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

SIGNIFICANCE = 1e-8


def rejected(p_values: Mapping[str, float]) -> dict[str, float]:
    """The p-values below SIGNIFICANCE, by name; one that is NaN is rejected too."""
    return {name: p for name, p in p_values.items() if not p >= SIGNIFICANCE}


def normal_checks(samples: np.ndarray, std: float, lags: Sequence[int] = (1, 2, 3, 7, 64)) -> dict[str, float]:
    """P-values for "`samples` [n] are independent draws of N(0, std**2)", both parameters known.

    The lags find what repeats or drifts, in the values and in their squares. Good for n >= 10**5; below
    10**4 use `variance` and `ks` only, which are exact.
    """
    z = np.asarray(samples, dtype=np.float64).ravel() / std
    n = len(z)
    square = z * z
    p_values = {
        "ks": float(stats.kstest(z, "norm").pvalue),
        "mean": _two_sided(z.sum() / np.sqrt(n)),
        "variance": _two_tails(stats.chi2(n), square.sum()),
        "skew": _two_sided((z * square).sum() / np.sqrt(15 * n)),  # E z**6 = 15
        "kurtosis": _two_sided((square * square - 3).sum() / np.sqrt(96 * n)),  # Var z**4 = 105 - 9
    }
    for lag in lags:
        p_values[f"lag {lag}"] = _two_sided((z[lag:] @ z[:-lag]) / np.sqrt(n - lag))
        p_values[f"squares at lag {lag}"] = _two_sided(
            ((square[lag:] - 1) @ (square[:-lag] - 1)) / (2 * np.sqrt(n - lag))  # Var z**2 = 2
        )
    return p_values


def tail_checks(samples: np.ndarray, std: float) -> dict[str, float]:
    """P-values for the same claim, from what lies far out: how many, how far the farthest, and the sixth moment.

    Good for n >= 10**6.
    """
    z = np.asarray(samples, dtype=np.float64).ravel() / std
    n = len(z)
    p_values = {}
    for sigma in (2.0, 3.0, 4.0, 5.0):
        for side, count in (("above", (z > sigma).sum()), ("below", (z < -sigma).sum())):
            p_values[f"{side} {sigma:g} sigma"] = float(stats.binomtest(int(count), n, stats.norm.sf(sigma)).pvalue)
    farthest = np.exp(n * np.log1p(-2 * stats.norm.sf(np.abs(z).max())))  # P(no one is farther)
    p_values["farthest"] = float(2 * min(farthest, 1 - farthest))
    p_values["sixth moment"] = _two_sided((z**6 - 15).sum() / np.sqrt(10170 * n))  # Var z**6 = 10395 - 15**2
    return p_values


def autocorrelation_checks(samples: np.ndarray, lags: int) -> dict[str, float]:
    """P-values for "no two of `samples` [n] up to `lags` apart are correlated": over all lags, and for the worst one.

    Box & Pierce 1970, by one Fourier transform; `lags` is to be small against n.
    """
    z = np.asarray(samples, dtype=np.float64).ravel()
    n = len(z)
    z = (z - z.mean()) / z.std()
    spectrum = np.fft.rfft(z, 2 ** int(np.ceil(np.log2(n + lags))))
    products = np.fft.irfft(np.abs(spectrum) ** 2)[1 : lags + 1]
    scores = products / np.sqrt(n - np.arange(1, lags + 1))
    worst = -np.expm1(lags * np.log1p(-min(1 - 1e-16, _two_sided(np.abs(scores).max()))))
    return {"all lags": _two_tails(stats.chi2(lags), (scores**2).sum()), "worst lag": float(worst)}


def correlation_p_value(a: np.ndarray, b: np.ndarray) -> float:
    """P-value for "`a` and `b`, both [n], are not correlated" (Fisher 1915); NaN if one is constant."""
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (a, b))
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    if norm == 0:
        return float("nan")
    r = np.clip((a @ b) / norm, -1 + 1e-15, 1 - 1e-15)
    return _two_sided(np.arctanh(r) * np.sqrt(len(a) - 3))


def poisson_checks(masks: np.ndarray, rate: float) -> dict[str, float]:
    """P-values for "in `masks`, bool [draws, records], each entry is True by itself with probability `rate`".

    Good where both `draws * rate` and `draws * (1 - rate)` are above 1000.
    """
    draws, records = masks.shape
    sizes = masks.sum(axis=1)
    z = (masks - rate) / np.sqrt(rate * (1 - rate))
    pairs = (z.T @ z)[np.triu_indices(records, k=1)] / np.sqrt(draws)
    each = z.sum(axis=0) / np.sqrt(draws)
    spread = ((sizes - records * rate) ** 2).mean() / (records * rate * (1 - rate)) - 1
    excess_kurtosis = (1 / (rate * (1 - rate)) - 6) / records  # of the binomial
    return {
        "total": float(stats.binomtest(int(sizes.sum()), draws * records, rate).pvalue),
        "batch sizes": _two_sided(spread / np.sqrt((2 + excess_kurtosis) / draws)),
        "every record alike": _two_tails(stats.chi2(records), (each**2).sum()),
        "pairs of records": _two_tails(stats.chi2(len(pairs)), (pairs**2).sum()),
        "one draw and the next": _two_sided((z[1:] * z[:-1]).sum() / np.sqrt((draws - 1) * records)),
    }


def _two_sided(z: float) -> float:
    """P-value of a statistic that is standard normal."""
    return float(2 * stats.norm.sf(abs(z)))


def _two_tails(distribution: stats.rv_continuous, value: float) -> float:
    """P-value of a statistic that has this distribution, in whichever tail it lies."""
    return float(2 * min(distribution.cdf(value), distribution.sf(value)))
