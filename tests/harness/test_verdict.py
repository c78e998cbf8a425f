from itertools import product
from math import inf, nan

import numpy as np
import pytest
from scipy import stats

from firsthand.harness.verdict import decide, interval, sign_flip_p

EFFECTS = [0.3, -0.1, 0.4, 0.25, 0.6]


def test_interval_agrees_with_scipy():
    expected = stats.ttest_1samp(EFFECTS, 0.0).confidence_interval(0.95)
    assert interval(EFFECTS) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("centre", [0.0, 0.2])
def test_sign_flip_p_counts_all_patterns(centre):
    shifted = np.asarray(EFFECTS) - centre
    means = [np.mean(shifted * signs) for signs in product((1, -1), repeat=len(EFFECTS))]
    more_extreme = np.mean([abs(mean) >= abs(shifted.mean()) - 1e-12 for mean in means])
    assert sign_flip_p(EFFECTS, centre) == pytest.approx(more_extreme)


def test_sign_flip_p_of_effects_of_one_sign_is_the_smallest_possible():
    assert sign_flip_p([1.0, 2.0, 3.0, 1.5]) == pytest.approx(2 / 2**4)


@pytest.mark.parametrize(
    ("effects", "low", "high", "outcome"),
    [
        ([1.0, 1.1, 0.9], 0.0, inf, "reproduced"),
        ([1.0, 1.1, 0.9], 2.0, inf, "contradicted"),
        ([1.0, -1.1, 0.9], 0.0, inf, "inconclusive"),
        ([0.01, -0.01, 0.0], -0.1, 0.1, "reproduced"),
        ([0.5, 0.51, 0.49], -0.1, 0.1, "contradicted"),
        ([0.1, 0.3, -0.2], -0.1, 0.1, "inconclusive"),
        ([-1.0, -1.1, -0.9], -inf, 0.0, "reproduced"),
        ([1.0, 1.0, 1.0], 0.0, inf, "reproduced"),  # no spread
        ([0.0, 0.0, 0.0], 0.0, inf, "inconclusive"),  # exactly at the edge
    ],
)
def test_outcomes(effects, low, high, outcome):
    verdict = decide(effects, low, high)
    assert verdict.outcome == outcome
    assert verdict.reason == ""
    assert verdict.mean == pytest.approx(np.mean(effects))


@pytest.mark.parametrize("effects", [[], [1.0], [1.0, 1.1]])
def test_too_few_seeds(effects):
    verdict = decide(effects, 0.0, inf)
    assert (verdict.outcome, verdict.reason) == ("inconclusive", "fewer than 3 seeds")


def test_a_failed_trial_or_a_nan_decides_nothing():
    assert decide([1.0, 1.1, 0.9], 0.0, inf, failure="seed 3: a trial failed").outcome == "inconclusive"
    assert decide([1.0, 1.1, 0.9, nan], 0.0, inf).reason == "an effect is not finite"


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_no_effect_is_reproduced_in_at_most_one_of_forty_studies(seeds):
    """One-sided 2.5 %: among 2,000 simulated studies 50 are expected; 3.29 standard errors above has chance 1 in 2,000."""
    rng = np.random.default_rng(seeds)
    outcomes = [decide(effects, 0.0, inf).outcome for effects in rng.normal(size=(2000, seeds)).tolist()]
    standard_error = np.sqrt(0.025 * 0.975 / 2000)
    assert outcomes.count("reproduced") / 2000 <= 0.025 + 3.29 * standard_error
    assert outcomes.count("contradicted") / 2000 <= 0.025 + 3.29 * standard_error


def test_a_difference_at_the_edge_matches_in_at_most_one_of_forty_studies():
    rng = np.random.default_rng(0)
    outcomes = [decide(effects, -0.5, 0.5).outcome for effects in (0.5 + 0.2 * rng.normal(size=(2000, 5))).tolist()]
    assert outcomes.count("reproduced") / 2000 <= 0.025 + 3.29 * np.sqrt(0.025 * 0.975 / 2000)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_interval_covers_the_true_effect(seeds):
    rng = np.random.default_rng(100 + seeds)
    ends = np.array([interval(effects) for effects in (0.7 + rng.normal(size=(4000, seeds))).tolist()])
    covered = np.mean((ends[:, 0] < 0.7) & (ends[:, 1] > 0.7))
    assert covered == pytest.approx(0.95, abs=0.015)
