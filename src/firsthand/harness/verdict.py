"""From the effects of a claim, one per seed, to a verdict.

Nothing else decides a verdict: the interval lies wholly inside the claimed range (`reproduced`), wholly outside it on one
side (`contradicted`), or neither (`inconclusive`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    outcome: str  # "reproduced", "contradicted" or "inconclusive"
    mean: float
    low: float  # ends of the t-interval of the mean
    high: float
    p: float  # two-sided sign-flip p-value of "the mean effect is at the edge of the claimed range"
    reason: str = ""  # why an inconclusive claim is so, where the interval is not the reason


def interval(effects: Sequence[float]) -> tuple[float, float]:
    r"""95 % t-interval of the mean, $\bar e \pm t_{0.975,\,n-1}\, s/\sqrt n$, from at least two effects."""
    values = np.asarray(effects, dtype=np.float64)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def sign_flip_p(effects: Sequence[float], centre: float = 0.0) -> float:
    """Two-sided p-value of the sign-flip test that the effects are symmetric around `centre`.

    Exact (all 2^n sign patterns) up to 16 effects, and by 65,535 random patterns beyond. From n effects it cannot be
    below 2^(1-n).
    """
    values = np.asarray(effects, dtype=np.float64) - centre
    test = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=2**16 - 1 if len(values) > 16 else np.inf, rng=0
    )
    return float(test.pvalue)


def decide(effects: Sequence[float], low: float, high: float, failure: str = "") -> Verdict:
    """The verdict on "the mean effect lies between `low` and `high`".

    Args:
        effects: one per seed, paired.
        low: lower end of the claimed range, may be -inf.
        high: upper end of the claimed range, may be inf.
        failure: why some seed has no effect (a trial failed); a verdict cannot be had then.
    """
    finite = [value for value in effects if isfinite(value)]
    if len(finite) < 2:
        mean = finite[0] if finite else nan
        return Verdict("inconclusive", mean, nan, nan, nan, failure or f"fewer than {FEWEST_SEEDS} seeds")
    mean = float(np.mean(finite))
    lower, upper = interval(finite)
    edge = min((end for end in (low, high) if isfinite(end)), key=lambda end: abs(end - mean))
    p = sign_flip_p(finite, edge)
    if failure:
        return Verdict("inconclusive", mean, lower, upper, p, failure)
    if len(finite) < len(effects):
        return Verdict("inconclusive", mean, lower, upper, p, "an effect is not finite")
    if len(finite) < FEWEST_SEEDS:
        return Verdict("inconclusive", mean, lower, upper, p, f"fewer than {FEWEST_SEEDS} seeds")
    if low < lower and upper < high:
        return Verdict("reproduced", mean, lower, upper, p)
    if upper < low or high < lower:
        return Verdict("contradicted", mean, lower, upper, p)
    return Verdict("inconclusive", mean, lower, upper, p)
