"""Claims: what a study says, in a form that can fail.

A claim turns the metrics of all arms of one seed into one number, the *effect*, and says in which range the mean
effect must lie. `firsthand.harness.verdict` decides from the effects of all seeds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite

Metrics = Mapping[str, Mapping[str, float]]
"""Arm name -> metric name -> value, of one seed."""


@dataclass(frozen=True)
class Claim:
    """The mean effect lies strictly between `low` and `high`.

    Use `beats`, `matches` or `holds` to make one.
    """

    text: str
    effect: Callable[[Metrics], float]
    low: float = -inf
    high: float = inf
    needs: tuple[tuple[str, str], ...] = ()  # (arm, metric) pairs the effect is computed from
    kind: str = "holds"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"a claim needs low < high, got low={self.low}, high={self.high}")


def beats(arm: str, baseline: str, *, on: str, by: float = 0.0, lower_is_better: bool = False) -> Claim:
    r"""`arm` is better than `baseline` on the metric `on`, by more than `by`.

    $$ e = \pm(m_\mathrm{arm} - m_\mathrm{baseline}), \qquad \bar e > \mathrm{by} $$

    Args:
        arm: name of the arm that should win.
        baseline: name of the arm it is compared with, at the same seed.
        on: name of the metric.
        by: smallest difference that counts, in the metric's unit; at least 0.
        lower_is_better: turn the sign, for losses and errors.

    Raises:
        ValueError: `by` is negative or not finite, or both arms are the same.
    """
    _check_pair(arm, baseline)
    if not (isfinite(by) and by >= 0):
        raise ValueError(f"by must be finite and at least 0, got {by}")
    sign = -1.0 if lower_is_better else 1.0
    margin = f" by more than {by:g}" if by else ""
    direction = " (lower is better)" if lower_is_better else ""
    return Claim(
        text=f"{arm} beats {baseline} on {on}{margin}{direction}",
        effect=lambda metrics: sign * (metrics[arm][on] - metrics[baseline][on]),
        low=by,
        needs=((arm, on), (baseline, on)),
        kind="beats",
    )


def matches(arm: str, baseline: str, *, on: str, within: float) -> Claim:
    r"""`arm` and `baseline` are equal on the metric `on`, up to `within` in either direction.

    $$ e = m_\mathrm{arm} - m_\mathrm{baseline}, \qquad -\mathrm{within} < \bar e < \mathrm{within} $$

    Decided by two one-sided tests, each at 2.5 %, which is the same as asking the 95 % interval to lie inside the range.

    Args:
        arm: name of the first arm.
        baseline: name of the second, at the same seed.
        on: name of the metric.
        within: the largest difference that does not matter, in the metric's unit; positive.

    Raises:
        ValueError: `within` is not positive and finite, or both arms are the same.
    """
    _check_pair(arm, baseline)
    if not (isfinite(within) and within > 0):
        raise ValueError(f"within must be positive and finite, got {within}")
    return Claim(
        text=f"{arm} matches {baseline} on {on} within {within:g}",
        effect=lambda metrics: metrics[arm][on] - metrics[baseline][on],
        low=-within,
        high=within,
        needs=((arm, on), (baseline, on)),
        kind="matches",
    )


def holds(text: str, statistic: Callable[[Metrics], float], *, above: float | None = None, below: float | None = None) -> Claim:
    """A statistic of all arms at one seed has a mean above `above`, or below `below`, or between the two.

    Args:
        text: the claim in words.
        statistic: from `{arm: {metric: value}}` of one seed to one number.
        above: lower end of the claimed range.
        below: upper end of the claimed range.

    Raises:
        ValueError: neither `above` nor `below` is given.
    """
    if above is None and below is None:
        raise ValueError("holds needs above=, below= or both")
    return Claim(text, statistic, low=-inf if above is None else above, high=inf if below is None else below)


def _check_pair(arm: str, baseline: str) -> None:
    if arm == baseline:
        raise ValueError(f"arm and baseline must differ, both are {arm!r}")
