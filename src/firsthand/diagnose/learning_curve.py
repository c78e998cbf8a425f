"""Learning trends: fit a power law to the observations so far, again and again, and know when its forecast can be used."""

import warnings
from collections.abc import Mapping
from itertools import pairwise
from math import exp, inf, isfinite, isnan, log
from sys import float_info
from typing import Any, NamedTuple, SupportsFloat

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from sklearn.base import BaseEstimator

try:
    from transformers import TrainerCallback
except ImportError:
    TrainerCallback = None  # type: ignore[assignment, misc]

Numbers = ArrayLike | SupportsFloat

LOWEST, HIGHEST = 1e-3, 5.0
"""Range of the exponent b: below, the law is a logarithm on any data; above, a step."""
_EXPONENTS = np.geomspace(LOWEST, HIGHEST, 60)


class PowerLawFit(NamedTuple):
    r"""The law $\pi(x) = c - a x^{-b}$ and the weighted sum of its squared errors on the points it was fitted to."""

    a: float
    b: float
    c: float
    sse: float

    def __call__(self, x: Numbers) -> Float[np.ndarray, "*shape"]:
        """The law at the sizes `x`."""
        return np.asarray(self.c - self.a * np.asarray(x, dtype=np.float64) ** -self.b)


def fit_power_law(x: Numbers, y: Numbers, *, anchor: float | None = None, weights: Numbers | None = None) -> PowerLawFit:
    r"""Least-squares fit of an increasing, concave power law with an asymptote.

    $$ \min_{a \ge 0,\, b,\, c} \; \sum_j w_j \left(y_j - c + a x_j^{-b}\right)^2 \; [+ (\mathrm{anchor} - c)^2] $$

    For a given exponent b the best a and c are those of a straight line in $x^{-b}$, so only b is searched: by a scan of 60
    values between 0.001 and 5, then to machine precision by the root of the derivative. There is no starting point to choose, and
    the same points always give the same fit.

    Args:
        x: sizes, positive and strictly increasing, at least 3.
        y: a score that grows with size, one per size, any unit.
        anchor: value of an extra point at infinite size, of weight 1.
        weights: positive, one per point; 1 / variance where it is known. None is 1 for all.

    Returns:
        `a` (≥ 0), `b` (in [0.001, 5]), `c` (the asymptote) and `sse`. Points no such law fits better than their mean does, as
        falling ones, give a = b = 0.

    Raises:
        ValueError: fewer than 3 points, sizes not positive and strictly increasing, lengths that differ, values that are not
            finite, weights that are not positive.

    Warns:
        UserWarning: b lies at an end of its range, so the asymptote means nothing.

    Source:
        Vilares Ferro, Darriba Bilbao and Ribadas Pena, "Modeling of learning curves with applications to POS tagging", 2017,
        arXiv 2402.02515: the accuracy pattern and its anchor at infinity (from memory of the paper, unverified). Departures, our
        choice: the paper runs a trust-region-reflective optimiser over all three parameters, we eliminate a and c exactly, which
        finds the same minimum without a start; the anchor is a point at infinity and not at a very large size; the range of b.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 1 or y.ndim != 1:
        raise ValueError(f"x and y must be one-dimensional, got shapes {x.shape} and {y.shape}")
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
    if len(x) < 3:
        raise ValueError(f"a power law needs at least 3 points, got {len(x)}")
    for size, score in zip(x, y, strict=True):
        _check_point(size, score)
    for before, after in pairwise(x):
        _check_order(before, after)
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    if w.shape != x.shape or not (np.isfinite(w).all() and (w > 0).all()):
        raise ValueError(f"weights must be positive and finite, one per point ({len(x)}), got {weights!r}")
    if anchor is not None and not isfinite(anchor):
        raise ValueError(f"anchor must be finite, got {anchor}")
    fit = _fit(x, y, w, anchor)
    _warn_at_end(fit)
    return fit


def _fit(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], w: Float[np.ndarray, " n"], anchor: float | None) -> PowerLawFit:
    log_x = np.log1p((x - x[0]) / x[0])  # from 0 up, so that no power of it overflows
    slope = -log_x
    if anchor is not None:
        log_x, slope = np.append(log_x, inf), np.append(slope, 0.0)  # at infinity the power is 0, whatever the exponent
        y, w = np.append(y, anchor), np.append(w, 1.0)
    share = w / w.sum()
    y_mean = y @ share
    y = y - y_mean

    def line(b: float) -> tuple[float, float, np.ndarray, np.ndarray]:
        """The best a and c of an exponent, the powers, and what is left of y."""
        drop = np.expm1(-b * log_x)  # the power less 1: exact where sizes are close together
        mean = drop @ share
        centred = drop - mean
        a = max(-(centred * share) @ y / (centred**2 @ share), 0.0)
        return float(a), float(y_mean + a * (1 + mean)), 1 + drop, y + a * centred

    def derivative(b: float) -> float:
        """Of half the squared error, with a and c always the best: they then contribute nothing."""
        a, _, power, left = line(b)
        return float(a * ((left * power * slope) @ w))

    centred = np.expm1(-_EXPONENTS[:, None] * log_x)
    centred -= (centred @ share)[:, None]
    gain = np.minimum(centred @ (y * share), 0) ** 2 / (centred**2 @ share)  # by which each exponent lowers the squared error
    best = int(np.argmax(gain))
    b = _EXPONENTS[best]
    low, high = _EXPONENTS[max(best - 1, 0)], _EXPONENTS[min(best + 1, len(_EXPONENTS) - 1)]
    if derivative(low) < 0 < derivative(high):
        b = brentq(derivative, low, high, xtol=1e-13)
    a, c, _, left = line(b)
    sse = float(left**2 @ w)
    return PowerLawFit(float(a * x[0] ** b), float(b), c, sse) if a else PowerLawFit(0.0, 0.0, c, sse)


class LearningCurveTrace(BaseEstimator):  # type: ignore[misc]
    r"""The sequence of power laws fitted to a learning curve as it grows.

    The *trend* of level i is the law $A_i(x) = c_i - a_i x^{-b_i}$ fitted to the first i observations, and $\alpha_i = c_i$ its
    asymptote. Once the asymptotes have settled, trends can be trusted, and say how much is still to be gained:

    - **working level** ω: the smallest i with $|\alpha_{j+1} - \alpha_j| / (x_{j+1} - x_j) \le \nu^{1/\varsigma}$ for
      all j = i … i + λ;
    - **prediction level** ℘: the smallest i ≥ ω whose asymptote the metric can reach;
    - **layer of convergence** $\chi_i = |\alpha_i - A_i(x_i)|$: what, by level i, more data can still give;
    - **convergence level** κ(τ): the smallest i ≥ ℘ with $\chi_i \le \tau$.

    If `anchored`, each trend above ω is fitted with one more point, at infinite size: the asymptote of the trend before it.

    Levels are numbers of observations. ω is known λ + 1 observations later, and with it the trends above it become anchored ones.
    `fit(sizes, scores)` starts anew, `update(size, score)` adds one observation; both lead to the same trace, bit for bit.

    Args:
        bound: the best value the metric can have. None is 100 (accuracy in percent) for `mode="max"` and 0 (a loss) for `"min"`.
        nu: verticality threshold ν, in units of the metric per unit of size; positive. The default is for percent and words, and
            allows 0.1 points per 5,000 words; it must be set anew for other units.
        slowdown: ς, the root taken of ν; positive.
        lookahead: λ, how many further steps must be as flat; at least 0.
        anchored: fit the trends above ω with an anchor.
        min_level: the first level that is fitted; at least 3.
        mode: `"max"` for a metric that grows with size, `"min"` for one that falls, where the law is $c + a x^{-b}$.

    Raises:
        ValueError: (on `fit` and `update`) a setting out of range; sizes not positive, finite and strictly increasing; a score
            that is not finite or beyond `bound`; `fit` with fewer than `min_level` observations.

    Source:
        Vilares Ferro, Darriba Bilbao and Ribadas Pena, "Modeling of learning curves with applications to POS tagging", 2017,
        arXiv 2402.02515. The definitions and the defaults of ν, ς and λ are from memory of the paper and its companions (arXiv
        2402.02522, 2402.02516), unverified; the defaults with little confidence. Departures, our choice: `fit_power_law` in place
        of a trust-region optimiser; `mode="min"`; `bound` in place of 100.
    """

    def __init__(
        self,
        bound: float | None = None,
        nu: float = 2e-5,
        slowdown: float = 1.0,
        lookahead: int = 5,
        anchored: bool = True,
        min_level: int = 3,
        mode: str = "max",
    ) -> None:
        self.bound = bound
        self.nu = nu
        self.slowdown = slowdown
        self.lookahead = lookahead
        self.anchored = anchored
        self.min_level = min_level
        self.mode = mode
        self._clear()

    def _clear(self) -> None:
        # Scores and trends are kept as of a metric that grows; `mode="min"` turns the sign at the door, both ways.
        self._sizes: list[float] = []
        self._scores: list[float] = []
        self._trends: list[PowerLawFit] = []
        self._working: int | None = None

    def fit(self, sizes: Numbers, scores: Numbers) -> "LearningCurveTrace":
        """The trace of a whole curve, in place of what was there.

        Args:
            sizes: shape (n,), in any unit: words, samples, steps.
            scores: shape (n,), the metric at each size.
        """
        sizes, scores = np.asarray(sizes, dtype=np.float64), np.asarray(scores, dtype=np.float64)
        if sizes.ndim != 1 or sizes.shape != scores.shape:
            raise ValueError(
                f"sizes and scores must be one-dimensional, of the same length, got {sizes.shape} and {scores.shape}"
            )
        self._check_settings()
        if len(sizes) < self.min_level:
            raise ValueError(f"a trace needs at least {self.min_level} observations, got {len(sizes)}")
        self._clear()
        for size, score in zip(sizes, scores, strict=True):
            self.update(size, score)
        return self

    def update(self, size: SupportsFloat, score: SupportsFloat) -> None:
        """Add the observation `score` at `size`, which is larger than all before, and fit the trend of the new level."""
        self._check_settings()
        size, score = float(size), float(score)
        _check_point(size, score)
        if self._sizes:
            _check_order(self._sizes[-1], size)
        bound = self._sign * self._bound
        if self._sign * score > bound:
            raise ValueError(f"score must not be beyond the bound {self._bound:g} (mode {self.mode!r}), got {score:g}")
        self._sizes.append(size)
        self._scores.append(self._sign * score)
        if len(self._sizes) < self.min_level:
            return
        self._trends.append(self._trend(len(self._sizes)))
        if self._working is None:
            self._working = self._find_working_level()
            if self._working is not None and self.anchored:
                self._trends = self._trends[: self._working - self.min_level + 1]
                for level in range(self._working + 1, len(self._sizes) + 1):
                    self._trends.append(self._trend(level))

    def _trend(self, level: int) -> PowerLawFit:
        """The trend of a level, from the observations up to it and, where anchored, the trend before it, the last so far."""
        anchor = self._trends[-1].c if self.anchored and self._working is not None else None
        return _fit(np.array(self._sizes[:level]), np.array(self._scores[:level]), np.ones(level), anchor)

    def _find_working_level(self) -> int | None:
        asymptotes = np.array([trend.c for trend in self._trends])
        steps = np.diff(self._sizes[self.min_level - 1 :])
        flat = np.abs(np.diff(asymptotes)) / steps <= self.nu ** (1 / self.slowdown)
        if len(flat) <= self.lookahead:
            return None
        runs = np.lib.stride_tricks.sliding_window_view(flat, self.lookahead + 1).all(axis=1)
        return int(np.argmax(runs)) + self.min_level if runs.any() else None

    @property
    def sizes_(self) -> Float[np.ndarray, " observations"]:
        """The sizes observed."""
        return np.array(self._sizes)

    @property
    def scores_(self) -> Float[np.ndarray, " observations"]:
        """The scores observed."""
        return self._sign * np.array(self._scores)

    @property
    def levels_(self) -> Int[np.ndarray, " levels"]:
        """The levels fitted: numbers of observations, from `min_level` up."""
        return np.arange(len(self._trends)) + self.min_level

    @property
    def alpha_(self) -> Float[np.ndarray, " levels"]:
        """Asymptotic backbone: the asymptote of the trend of each level in `levels_`."""
        return self._sign * np.array([trend.c for trend in self._trends])

    @property
    def layer_of_convergence_(self) -> Float[np.ndarray, " levels"]:
        """χ of each level in `levels_`: the distance between the trend at the last size it was fitted to and its asymptote."""
        sizes = self._sizes[self.min_level - 1 :]
        return np.array([trend.c - float(trend(size)) for trend, size in zip(self._trends, sizes, strict=True)])

    @property
    def working_level_(self) -> int | None:
        """ω, or None as long as it is not known."""
        return self._working

    @property
    def prediction_level_(self) -> int | None:
        """℘, or None as long as it is not reached."""
        if self._working is None:
            return None
        reachable = (self.levels_ >= self._working) & (self._sign * self.alpha_ <= self._sign * self._bound)
        return int(self.levels_[reachable][0]) if reachable.any() else None

    def converged(self, tau: float) -> int | None:
        """Convergence level κ(τ): from here on, if the trend is right, more data gains at most `tau`, in units of the metric.

        None as long as it is not reached. A larger `tau` is never reached later.
        """
        if isnan(tau) or tau < 0:
            raise ValueError(f"tau must be at least 0, got {tau}")
        first = self.prediction_level_
        if first is None:
            return None
        near = (self.levels_ >= first) & (self.layer_of_convergence_ <= tau)
        return int(self.levels_[near][0]) if near.any() else None

    def params_(self, level: int | None = None) -> tuple[float, float, float]:
        """(a, b, c) of the trend of a level, the last if None. The law is c − a·x^−b, for `mode="min"` c + a·x^−b."""
        trend = self._at(level)
        return trend.a, trend.b, self._sign * trend.c

    def predict(self, sizes: Numbers, level: int | None = None) -> Float[np.ndarray, "*shape"]:
        """The metric at `sizes`, by the trend of a level, the last if None.

        Raises:
            ValueError: sizes that are not positive, a level that is not in `levels_`, nothing fitted yet.

        Warns:
            UserWarning: the exponent of the trend lies at an end of its range.
        """
        sizes = np.asarray(sizes, dtype=np.float64)
        if not (sizes > 0).all():
            raise ValueError(f"sizes must be positive, got {sizes.min():g} as the smallest")
        trend = self._at(level)
        _warn_at_end(trend)
        return np.asarray(self._sign * trend(sizes))

    def samples_needed(self, target: float, level: int | None = None) -> float:
        """The size at which the trend of a level (the last if None) reaches the metric `target`; infinite if it never does."""
        if isnan(target):
            raise ValueError(f"target must be a number, got {target}")
        trend = self._at(level)
        gap = trend.c - self._sign * target
        if gap <= 0:
            return inf
        if trend.a == 0:
            return 0.0
        log_size = log(trend.a / gap) / trend.b
        return exp(log_size) if log_size < log(float_info.max) else inf

    def state_dict(self) -> dict[str, Any]:
        """All there is to know to go on: settings, observations and trends, of plain numbers, so that it can be JSON."""
        return {
            "settings": self.get_params(),
            "sizes": list(self._sizes),
            "scores": list(self._scores),
            "trends": [list(trend) for trend in self._trends],
            "working_level": self._working,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` of a trace with the same settings.

        Raises:
            ValueError: a setting differs.
        """
        for name, value in state["settings"].items():
            if getattr(self, name) != value:
                raise ValueError(f"the state is of a trace with {name}={value!r}, this one has {name}={getattr(self, name)!r}")
        self._sizes, self._scores = list(state["sizes"]), list(state["scores"])
        self._trends = [PowerLawFit(*trend) for trend in state["trends"]]
        self._working = state["working_level"]

    @property
    def _sign(self) -> int:
        return -1 if self.mode == "min" else 1

    @property
    def _bound(self) -> float:
        return self.bound if self.bound is not None else (0.0 if self.mode == "min" else 100.0)

    def _at(self, level: int | None) -> PowerLawFit:
        if not self._trends:
            raise ValueError(f"a trace needs at least {self.min_level} observations, got {len(self._sizes)}")
        last = len(self._sizes)
        level = last if level is None else level
        if not self.min_level <= level <= last:
            raise ValueError(f"level must be in {self.min_level}..{last}, the levels observed, got {level}")
        return self._trends[level - self.min_level]

    def _check_settings(self) -> None:
        if self.mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {self.mode!r}")
        if self.bound is not None and isnan(self.bound):
            raise ValueError("bound must be a number, got nan")
        if not self.nu > 0:
            raise ValueError(f"nu must be positive, got {self.nu}")
        if not self.slowdown > 0:
            raise ValueError(f"slowdown must be positive, got {self.slowdown}")
        if self.lookahead < 0:
            raise ValueError(f"lookahead must be at least 0, got {self.lookahead}")
        if self.min_level < 3:
            raise ValueError(f"min_level must be at least 3, got {self.min_level}")


def _check_point(size: float, score: float) -> None:
    if not (isfinite(size) and isfinite(score)):
        raise ValueError(f"sizes and scores must be finite, got {score} at {size}")
    if not size > 0:
        raise ValueError(f"sizes must be positive, got {size:g}")


def _check_order(before: float, after: float) -> None:
    if not before < after:
        raise ValueError(f"sizes must be strictly increasing, got {after:g} after {before:g}")


def _warn_at_end(fit: PowerLawFit) -> None:
    if fit.a > 0 and not LOWEST < fit.b < HIGHEST:
        warnings.warn(
            f"the exponent b = {fit.b:g} is at the end of its range: the points show no asymptote yet, or a step",
            stacklevel=3,
        )


def prediction_mape(predicted: Numbers, observed: Numbers) -> float:
    r"""Mean absolute percentage error of predictions.

    $$ \frac{100}{n} \sum_j \frac{|\hat y_j - y_j|}{|y_j|} $$

    Args:
        predicted: any shape.
        observed: the same shape, not 0.

    Raises:
        ValueError: shapes that differ, no values, values that are not finite, an observed 0.

    Source:
        The paper's measure over control sizes (arXiv 2402.02515, from memory, unverified).
    """
    predicted, observed = _pair(predicted, observed)
    if not observed.all():
        raise ValueError("observed values must not be 0: an error has no share of nothing")
    return float(100 * np.mean(np.abs(predicted - observed) / np.abs(observed)))


def ordering_reliability(predicted: Numbers, observed: Numbers) -> float:
    """How often predicted curves are in the order of the true ones: the share of all pairs of systems at all sizes.

    Args:
        predicted: shape (systems, sizes).
        observed: the same shape. A tie is in order only if both tie.

    Returns:
        In [0, 1]; a coin gives about a half.

    Raises:
        ValueError: shapes that differ or are not two-dimensional, fewer than 2 systems, values that are not finite.

    Source:
        The reliability ratio of two systems (arXiv 2402.02515, from memory, unverified), averaged over pairs.
    """
    predicted, observed = _pair(predicted, observed)
    if predicted.ndim != 2 or len(predicted) < 2:
        raise ValueError(f"an order needs a two-dimensional array of at least 2 systems, got the shape {predicted.shape}")
    first, second = np.triu_indices(len(predicted), k=1)
    same = np.sign(predicted[first] - predicted[second]) == np.sign(observed[first] - observed[second])
    return float(same.mean())


def _pair(predicted: Numbers, observed: Numbers) -> tuple[Float[np.ndarray, "*shape"], Float[np.ndarray, "*shape"]]:
    predicted, observed = np.asarray(predicted, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    if predicted.shape != observed.shape:
        raise ValueError(f"predicted and observed must have the same shape, got {predicted.shape} and {observed.shape}")
    if not predicted.size:
        raise ValueError("predicted and observed are empty")
    if not (np.isfinite(predicted).all() and np.isfinite(observed).all()):
        raise ValueError("predicted and observed must be finite")
    return predicted, observed


class LearningCurveStop(TrainerCallback or object):  # type: ignore[misc]
    """Stop a Hugging Face `Trainer` when more training would gain at most `tau`.

    Each evaluation adds an observation at the number of optimiser steps so far to a `LearningCurveTrace`; training stops at the
    first evaluation where `trace.converged(tau)` is not None. The trace of a resumed training is read back from the trainer's
    log, so it is the same as without the interruption.

    Args:
        tau: in units of the metric; at least 0.
        metric: as `compute_metrics` names it, with or without `eval_`.
        **settings: of the `LearningCurveTrace`: `bound` (1.0 for accuracy as a share), `nu`, in units of the metric per
            optimiser step, and so on. `mode` is `"min"` if the metric's name ends in "loss", unless it is given.

    Raises:
        ImportError: transformers is not installed.
        ValueError: `tau` or a setting is out of range.

    Warns:
        UserWarning: at the end of training, when no evaluation reported the metric.

    Source:
        The proximity condition of arXiv 2402.02515. The paper's sizes are those of training sets and each point is a model
        trained to its end; steps of one training are our choice, and a schedule that bends the curve late defeats any forecast.
    """

    def __init__(self, tau: float, metric: str, **settings: Any) -> None:
        if TrainerCallback is None:
            raise ImportError("LearningCurveStop needs transformers: pip install 'firsthand[hf]'")
        self.tau = tau
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.trace = LearningCurveTrace(**{"mode": "min" if metric.endswith("loss") else "max", **settings})
        self.trace._check_settings()
        self.trace.converged(tau)  # refuses a bad tau

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trace._clear()
        for entry in state.log_history:
            self._observe(entry["step"], entry)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Mapping[str, float], **kwargs: Any) -> None:
        if self._observe(state.global_step, metrics) and self.trace.converged(self.tau) is not None:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trace.sizes_.size:
            warnings.warn(f"no evaluation reported {self.metric!r}, so training could not be stopped on it", stacklevel=2)

    def _observe(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the evaluation is a new point of the curve: not before the first step, nor a second time at the same step."""
        seen = self.trace.sizes_
        new = self.metric in metrics and step > seen.max(initial=0)
        if new:
            self.trace.update(step, metrics[self.metric])
        return bool(new)
