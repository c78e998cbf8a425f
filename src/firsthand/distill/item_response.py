"""Item response theory: how well each question tells strong test takers from weak ones, by the two-parameter logistic model."""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor


class TwoParameterFit(NamedTuple):
    """What `fit_2pl` found, in float64.

    Attributes:
        ability: of each test taker; 0 is average, the unit about one standard deviation.
        discrimination: of each question, positive: how steeply the chance of a right answer rises with ability.
        difficulty: of each question: the ability at which a right answer is as likely as a wrong one.
    """

    ability: Float[Tensor, " takers"]
    discrimination: Float[Tensor, " questions"]
    difficulty: Float[Tensor, " questions"]


def fit_2pl(scores: Float[Tensor, "takers questions"], max_iter: int = 200) -> TwoParameterFit:
    r"""Fit the two-parameter logistic model to who answered what correctly.

    $$ P(S_{ij} = 1) = \sigma\big(a_j (\theta_i - b_j)\big), \qquad
       \theta_i \sim N(0, 1),\quad a_j b_j \sim N(0, 3^2),\quad \log a_j \sim N(0, 0.5^2) $$

    The mode of the posterior, by L-BFGS from a start that the data give: the same scores give the same fit.

    Args:
        scores: 1 where taker i answered question j correctly, 0 where not, NaN where it was not asked. A share in [0, 1] is
            taken as the mean of several attempts.
        max_iter: largest number of L-BFGS iterations, at least 1.

    Returns:
        Ability, discrimination and difficulty, all finite: a question that all answered alike is very easy or very hard, and
        its discrimination is low.

    Raises:
        ValueError: there are no scores, one is outside [0, 1], or `max_iter` is below 1.

    Source:
        Liu et al., "Aligning Teacher with Student Preferences for Tailored Training Data Generation", 2024, arXiv 2406.19227,
        section 3.2 and appendix E. The text speaks of Bayesian inference there and of maximum likelihood here, and names no
        priors. The mode under these priors is our choice: the likelihood alone has no maximum where a question or a taker is
        all right or all wrong. The prior is on the intercept $a_j b_j$ and not on the difficulty, because a narrow prior on the
        difficulty makes a question that all answered correctly look steep: it may not be easy enough in any other way.
    """
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores must have shape (takers, questions), both at least 1, got {tuple(scores.shape)}")
    observed = scores.detach().cpu().double().numpy()
    known = ~np.isnan(observed)
    right = np.where(known, observed, 0.0)
    if not ((right >= 0) & (right <= 1)).all():
        raise ValueError(f"scores must be in [0, 1] or NaN, got {np.nanmin(observed):g} to {np.nanmax(observed):g}")
    if not known.any():
        raise ValueError("scores must have at least one entry that is not NaN, got none")
    takers, questions = observed.shape

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Negative log posterior, up to a constant, and its gradient."""
        ability, log_slope, intercept = np.split(flat, [takers, takers + questions])
        slope = np.exp(log_slope)
        logit = slope * ability[:, None] - intercept
        likelihood = known * (np.logaddexp(0, logit) - right * logit)
        prior = (ability**2).sum() + ((log_slope / _LOG_SLOPE) ** 2).sum() + ((intercept / _INTERCEPT) ** 2).sum()
        residual = known * (expit(logit) - right)
        gradient = (
            residual @ slope + ability,
            slope * (residual * ability[:, None]).sum(0) + log_slope / _LOG_SLOPE**2,
            -residual.sum(0) + intercept / _INTERCEPT**2,
        )
        return likelihood.sum() + prior / 2, np.concatenate(gradient)

    # Half a right and half a wrong answer more each, so that the start is finite.
    by_taker = (right.sum(1) + 0.5) / (known.sum(1) + 1)
    by_question = (right.sum(0) + 0.5) / (known.sum(0) + 1)
    start = np.concatenate([_logit(by_taker) - _logit(by_taker).mean(), np.zeros(questions), -_logit(by_question)])
    best = minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": max_iter}).x
    ability, log_slope, intercept = (torch.from_numpy(part.copy()) for part in np.split(best, [takers, takers + questions]))
    return TwoParameterFit(ability, log_slope.exp(), intercept / log_slope.exp())


_LOG_SLOPE, _INTERCEPT = 0.5, 3.0  # deviations of the priors


def _logit(share: np.ndarray) -> np.ndarray:
    return np.log(share / (1 - share))


def select_discriminative(discrimination: Float[Tensor, " questions"], k: int) -> Int64[Tensor, " k"]:
    """The k questions that tell test takers apart best, the best first; of equal ones, the earlier first.

    Args:
        discrimination: of each question, as `fit_2pl` gives it; finite.
        k: how many; at least 1 and at most as many as there are.

    Raises:
        ValueError: `k` is out of range, or a discrimination is not finite.

    Source:
        arXiv 2406.19227, section 3.2: 40 of 100.
    """
    if not 1 <= k <= len(discrimination):
        raise ValueError(f"k must be in [1, {len(discrimination)}], the number of questions, got {k}")
    if not math.isfinite(discrimination.sum().item()):
        raise ValueError("discrimination must be finite, got NaN or infinity")
    return discrimination.sort(descending=True, stable=True).indices[:k]
