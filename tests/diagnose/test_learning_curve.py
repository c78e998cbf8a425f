import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from scipy.optimize import curve_fit, least_squares
from sklearn.base import clone

from firsthand.diagnose.learning_curve import (
    LearningCurveStop,
    LearningCurveTrace,
    PowerLawFit,
    fit_power_law,
    ordering_reliability,
    prediction_mape,
)

SIZES = 5000.0 * np.arange(1, 41)


def power_law(x, a=300.0, b=0.35, c=96.0):
    return c - a * np.asarray(x, dtype=float) ** -b


@pytest.fixture
def noisy():
    return power_law(SIZES) + np.random.default_rng(0).normal(0, 0.1, len(SIZES))


# One fit


@pytest.mark.parametrize(("a", "b", "c"), [(300.0, 0.35, 96.0), (1e3, 0.05, 900.0), (1e9, 2.5, 80.0), (2.0, 0.01, 95.0)])
@pytest.mark.parametrize("levels", [3, 4, 40])
def test_noiseless_points_give_the_law_back(a, b, c, levels):
    fit = fit_power_law(SIZES[:levels], power_law(SIZES[:levels], a, b, c))
    np.testing.assert_allclose(fit[:3], (a, b, c), rtol=1e-5)
    assert fit.sse < 1e-18 * levels * c**2


def test_flat_points_give_a_flat_law():
    fit = fit_power_law(SIZES, np.full(len(SIZES), 90.0))
    assert fit(1e9) == fit(1.0) == fit.c == pytest.approx(90.0)


def test_falling_points_give_the_mean():  # the law cannot fall
    scores = 90.0 - SIZES / 1e5
    fit = fit_power_law(SIZES, scores)
    assert fit == pytest.approx((0.0, 0.0, scores.mean(), np.sum((scores - scores.mean()) ** 2)))


def dense_scan(x, y, weights):
    """The best of many exponents, with a and c by ordinary linear least squares."""
    best = np.inf
    root = np.sqrt(weights)
    for b in np.geomspace(1e-3, 5, 3000):
        design = np.stack([-((x / x[0]) ** -b), np.ones_like(x)], axis=1)
        solution = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
        residual = y - design @ solution
        if solution[0] >= 0:
            best = min(best, np.sum(weights * residual**2))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("noise", [0.01, 0.5, 5.0])
def test_never_worse_than_a_dense_scan(seed, noise):
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(100, 1e6, rng.integers(3, 30)))
    y = power_law(x, a=10 ** rng.uniform(1, 3), b=rng.uniform(0.05, 1.0)) + rng.normal(0, noise, len(x))
    weights = rng.uniform(0.2, 2.0, len(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an exponent at the end of its range is no worse a minimum
        fit = fit_power_law(x, y, weights=weights)
    assert fit.sse <= dense_scan(x, y, weights) * (1 + 1e-9) + 1e-9
    assert fit.sse == pytest.approx(np.sum(weights * (y - fit(x)) ** 2), rel=1e-6)


def test_agrees_with_scipy_from_a_good_start(noisy):
    found, _ = curve_fit(power_law, SIZES, noisy, p0=(300.0, 0.35, 96.0))
    np.testing.assert_allclose(fit_power_law(SIZES, noisy)[:3], found, rtol=1e-4)


def test_agrees_with_trust_region_reflective(noisy):
    """The optimiser of the paper, on the logarithms of a and b."""
    weights = np.linspace(0.5, 2, len(SIZES))

    def residuals(theta):
        return np.sqrt(weights) * (noisy - power_law(SIZES, *np.exp(theta[:2]), theta[2]))

    found = least_squares(residuals, (np.log(300.0), np.log(0.35), 96.0), method="trf", x_scale="jac", xtol=1e-14, ftol=1e-14)
    fit = fit_power_law(SIZES, noisy, weights=weights)
    np.testing.assert_allclose((np.log(fit.a), np.log(fit.b), fit.c), found.x, rtol=1e-4)
    assert fit.sse <= 2 * found.cost * (1 + 1e-12)


def test_weight_of_two_is_the_point_twice(noisy):
    weights = np.ones(len(SIZES))
    weights[7] = 2
    twice = np.sort(np.append(SIZES, SIZES[7]))
    doubled = np.insert(noisy, 7, noisy[7])

    def residuals(theta):
        return doubled - power_law(twice, *np.exp(theta[:2]), theta[2])

    found = least_squares(residuals, (np.log(300.0), np.log(0.35), 96.0), x_scale="jac", xtol=1e-14, ftol=1e-14)
    assert fit_power_law(SIZES, noisy, weights=weights).c == pytest.approx(found.x[2], rel=1e-5)


def test_scaling_the_sizes_scales_a_alone(noisy):
    fit, scaled = fit_power_law(SIZES, noisy), fit_power_law(SIZES * 1000, noisy)
    assert scaled.b == pytest.approx(fit.b, rel=1e-9)
    assert scaled.c == pytest.approx(fit.c, rel=1e-9)
    assert scaled.a == pytest.approx(fit.a * 1000**fit.b, rel=1e-7)


def test_anchor_on_the_asymptote_changes_nothing_without_noise():
    scores = power_law(SIZES)
    np.testing.assert_allclose(fit_power_law(SIZES, scores, anchor=96.0), fit_power_law(SIZES, scores), rtol=1e-7, atol=1e-15)


def test_anchor_is_a_point_at_infinity(noisy):
    anchored = fit_power_law(SIZES, noisy, anchor=90.0)
    far = fit_power_law(np.append(SIZES, 1e120), np.append(noisy, 90.0))  # what the papers do
    np.testing.assert_allclose(anchored, far, rtol=1e-6)
    assert 90.0 < anchored.c < fit_power_law(SIZES, noisy).c


@pytest.mark.parametrize("start", [1e3, 1e6, 1e12])
def test_sizes_close_together(start):
    sizes = start + np.arange(1.0, 9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so little of a curve shows no asymptote
        fit = fit_power_law(sizes, 50 + np.arange(8) ** 0.5)
        flat = fit_power_law(sizes, np.full(8, 50.0))
    assert np.isfinite(fit).all()
    assert fit.sse < np.var(np.arange(8) ** 0.5) * 8
    assert flat.c == pytest.approx(50.0)


def test_exponent_at_the_end_of_its_range_warns():
    with pytest.warns(UserWarning, match=r"exponent .* end of its range"):
        fit_power_law(SIZES, 10 * np.log(SIZES))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2], "at least 3"),
        ([1, 2, 2], [1, 2, 3], "strictly increasing"),
        ([0, 1, 2], [1, 2, 3], "positive"),
        ([1, 2, np.nan], [1, 2, 3], "finite"),
        ([1, 2, 3], [1, 2, np.inf], "finite"),
        ([1, 2, 3], [1, 2], "same length"),
        ([[1, 2, 3]], [[1, 2, 3]], "one-dimensional"),
    ],
)
def test_bad_points(x, y, message):
    with pytest.raises(ValueError, match=message):
        fit_power_law(x, y)


def test_bad_anchor_and_weights():
    with pytest.raises(ValueError, match="anchor must be finite"):
        fit_power_law([1, 2, 3], [1, 2, 2.5], anchor=np.nan)
    for weights in ([1, 1], [1, 0, 1], [1, np.nan, 1]):
        with pytest.raises(ValueError, match="weights"):
            fit_power_law([1, 2, 3], [1, 2, 2.5], weights=weights)


# The trace


@pytest.mark.parametrize("anchored", [True, False])
def test_noiseless_trace(anchored):
    trace = LearningCurveTrace(anchored=anchored).fit(SIZES, power_law(SIZES))
    assert trace.levels_.tolist() == list(range(3, 41))
    np.testing.assert_allclose(trace.alpha_, 96.0, rtol=1e-7)
    assert trace.working_level_ == trace.prediction_level_ == 3
    np.testing.assert_allclose(trace.layer_of_convergence_, 300 * SIZES[2:] ** -0.35, rtol=1e-5)
    np.testing.assert_allclose(trace.predict([1e6, 1e9], level=3), power_law([1e6, 1e9]), rtol=1e-7)
    np.testing.assert_allclose(trace.params_(17), (300, 0.35, 96), rtol=1e-6)
    # chi falls to 5 where 300 x^-0.35 = 5, at 120,863 words: level 25
    assert trace.converged(5.0) == 25
    assert trace.samples_needed(95.0) == pytest.approx(300 ** (1 / 0.35), rel=1e-5)
    assert trace.samples_needed(96.5) == np.inf
    assert trace.samples_needed(96 - 1e-9, level=40) > 1e27


def test_a_size_beyond_all_numbers_is_infinite():
    trace = LearningCurveTrace().fit(SIZES, 8 * np.log(SIZES) - 30)  # the exponent is at the low end of its range
    assert trace.samples_needed(trace.alpha_[-1] - 1e-3) == np.inf


def test_levels_are_the_fits_of_their_prefixes(noisy):
    trace = LearningCurveTrace(anchored=False).fit(SIZES, noisy)
    for level in (5, 20, 40):
        assert trace.params_(level) == tuple(fit_power_law(SIZES[:level], noisy[:level])[:3])


def working_level(alpha, sizes, nu, slowdown, lookahead, first=3):
    """The definition, read aloud."""
    for i in range(first, len(sizes)):
        levels = range(i, i + lookahead + 1)
        if levels[-1] + 1 <= len(sizes) and all(
            abs(alpha[j + 1 - first] - alpha[j - first]) / (sizes[j] - sizes[j - 1]) <= nu ** (1 / slowdown) for j in levels
        ):
            return i
    return None


@pytest.mark.parametrize(
    ("nu", "slowdown", "lookahead"), [(2e-5, 1.0, 5), (1e-5, 1.0, 0), (1e-9, 2.0, 3), (2e-6, 1.0, 5), (1e-12, 1.0, 5)]
)
def test_working_level_is_its_definition(noisy, nu, slowdown, lookahead):
    trace = LearningCurveTrace(nu=nu, slowdown=slowdown, lookahead=lookahead, anchored=False).fit(SIZES, noisy)
    assert trace.working_level_ == working_level(trace.alpha_, SIZES, nu, slowdown, lookahead)


def test_anchors_are_the_asymptotes_before(noisy):
    free = LearningCurveTrace(anchored=False).fit(SIZES, noisy)
    trace = LearningCurveTrace().fit(SIZES, noisy)
    start = trace.working_level_
    assert start == free.working_level_
    assert start is not None
    assert 3 < start < 30
    np.testing.assert_array_equal(trace.alpha_[: start - 2], free.alpha_[: start - 2])
    anchor = free.alpha_[start - 3]
    for level in range(start + 1, 41):
        fit = fit_power_law(SIZES[:level], noisy[:level], anchor=anchor)
        assert trace.params_(level) == tuple(fit[:3])
        anchor = fit.c


def test_prediction_level_waits_for_an_asymptote_that_can_be():
    scores = power_law(SIZES, a=120, b=0.05, c=140)  # a law of its own, but above what accuracy can be
    trace = LearningCurveTrace(nu=1.0).fit(SIZES, scores)
    assert trace.working_level_ == 3
    assert trace.prediction_level_ is None
    assert trace.converged(1e9) is None
    assert LearningCurveTrace(nu=1.0, bound=150.0).fit(SIZES, scores).prediction_level_ == 3


@pytest.mark.parametrize("seed", range(5))
def test_lower_tau_is_never_reached_earlier(seed):
    scores = power_law(SIZES) + np.random.default_rng(seed).normal(0, 0.03, len(SIZES))
    trace = LearningCurveTrace().fit(SIZES, scores)
    reached = [trace.converged(tau) or np.inf for tau in (8.0, 6.0, 5.0, 4.5, 4.0, 3.0, 1.0)]
    assert reached == sorted(reached)
    assert np.isfinite(reached[0])


def test_a_falling_metric_is_a_rising_one_upside_down(noisy):
    up = LearningCurveTrace().fit(SIZES, noisy)
    down = LearningCurveTrace(mode="min").fit(SIZES, 100 - noisy)
    np.testing.assert_allclose(down.alpha_, 100 - up.alpha_, rtol=1e-6)
    np.testing.assert_allclose(down.predict(1e6), 100 - up.predict(1e6), rtol=1e-6)
    assert down.working_level_ == up.working_level_
    assert down.converged(5.0) == up.converged(5.0)
    assert down.samples_needed(5.0) == pytest.approx(up.samples_needed(95.0), rel=1e-5)


def test_predict_keeps_the_shape(noisy):
    trace = LearningCurveTrace().fit(SIZES, noisy)
    assert trace.predict(5e5).shape == ()
    assert trace.predict(np.full((2, 3), 5e5)).shape == (2, 3)


# State


@pytest.mark.parametrize("cut", [0, 2, 10, 25])
def test_stopped_and_resumed_is_the_same_bit_for_bit(noisy, cut):
    whole = LearningCurveTrace().fit(SIZES, noisy)
    first = LearningCurveTrace()
    for size, score in zip(SIZES[:cut], noisy[:cut], strict=True):
        first.update(size, score)
    second = LearningCurveTrace()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for size, score in zip(SIZES[cut:], noisy[cut:], strict=True):
        second.update(size, score)
    assert second.state_dict() == whole.state_dict()
    np.testing.assert_array_equal(second.alpha_, whole.alpha_)
    np.testing.assert_array_equal(second.predict(SIZES), whole.predict(SIZES))


def test_state_of_other_settings_is_refused(noisy):
    state = LearningCurveTrace().fit(SIZES, noisy).state_dict()
    with pytest.raises(ValueError, match="lookahead"):
        LearningCurveTrace(lookahead=4).load_state_dict(state)


def test_fit_forgets_and_clone_is_empty(noisy):
    trace = LearningCurveTrace(nu=1e-4).fit(SIZES, noisy)
    trace.fit(SIZES[:5], noisy[:5])
    assert trace.levels_.tolist() == [3, 4, 5]
    copy = clone(trace)
    assert copy.get_params() == trace.get_params()
    assert copy.levels_.size == 0
    assert copy.set_params(nu=0.5).nu == 0.5


# Bad input


def test_bad_observations():
    trace = LearningCurveTrace()
    trace.update(100, 50.0)
    for size, score, message in [
        (100, 60.0, "strictly increasing"),
        (200, 101.0, "bound"),
        (200, float("nan"), "finite"),
        (float("inf"), 60.0, "finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            trace.update(size, score)
    trace.update(200, 60.0)  # a refused observation leaves no mark
    with pytest.raises(ValueError, match="at least 3"):
        trace.predict(1000)
    with pytest.raises(ValueError, match="at least 3"):
        LearningCurveTrace().fit([1, 2], [1.0, 2.0])
    with pytest.raises(ValueError, match="positive"):
        LearningCurveTrace().update(0, 1.0)
    with pytest.raises(ValueError, match="bound"):
        LearningCurveTrace(mode="min").fit([1, 2, 3], [0.5, 0.1, -0.1])


def test_bad_questions(noisy):
    trace = LearningCurveTrace().fit(SIZES, noisy)
    for level in (2, 41):
        with pytest.raises(ValueError, match="level must be in"):
            trace.predict(1e6, level=level)
    with pytest.raises(ValueError, match="sizes must be positive"):
        trace.predict([1e6, 0])
    with pytest.raises(ValueError, match="tau"):
        trace.converged(-1.0)
    with pytest.raises(ValueError, match="target"):
        trace.samples_needed(float("nan"))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("nu", 0.0), ("slowdown", 0.0), ("lookahead", -1), ("min_level", 2), ("mode", "up"), ("bound", float("nan"))],
)
def test_bad_settings(setting, value):
    with pytest.raises(ValueError, match=setting):
        LearningCurveTrace(**{setting: value}).fit(SIZES, power_law(SIZES))


def test_a_prediction_from_an_exponent_at_the_end_of_its_range_warns():
    trace = LearningCurveTrace().fit(SIZES, 8 * np.log(SIZES) - 30)
    with pytest.warns(UserWarning, match="end of its range"):
        trace.predict(1e6)


# Scores of predictions


def test_mape():
    assert prediction_mape([101.0, 99.0], [100.0, 100.0]) == pytest.approx(1.0)
    assert prediction_mape([45.0], [50.0]) == pytest.approx(10.0)
    with pytest.raises(ValueError, match="same shape"):
        prediction_mape([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="observed"):
        prediction_mape([1.0], [0.0])
    with pytest.raises(ValueError, match="finite"):
        prediction_mape([np.nan], [1.0])


def test_ordering_reliability():
    true = [[90.0, 91.0], [92.0, 93.0], [94.0, 92.0]]
    assert ordering_reliability(true, true) == 1.0
    assert ordering_reliability([[-9.0, 9.0], [-8.0, 1e3], [5.0, 10.0]], true) == 1.0  # only the order counts
    assert ordering_reliability([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0]], true) == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="at least 2"):
        ordering_reliability([[1.0]], [[1.0]])


def test_a_fit_is_a_function():
    fit = PowerLawFit(2.0, 0.5, 10.0, 0.0)
    np.testing.assert_allclose(fit([1.0, 4.0]), [8.0, 9.0])


# In a trainer


def trainer(tmp_path, callback, scores, steps=12, **settings):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    class Regression(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def forward(self, inputs, labels):
            loss = ((self.layer(inputs)[:, 0] - labels) ** 2).mean()
            return {"loss": loss, "logits": self.layer(inputs)}

    generator = torch.Generator().manual_seed(0)
    data = [{"inputs": row, "labels": row.sum()} for row in torch.randn(32, 2, generator=generator)]
    values = iter(scores)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=steps, eval_strategy="steps", eval_steps=1, logging_steps=1000, save_steps=6,
        per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        Regression(), arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[callback],
        compute_metrics=lambda prediction: {"accuracy": next(values)},
    )  # fmt: skip


pinned = pytest.mark.filterwarnings("ignore:.*pin_memory.*")


@pinned
def test_stops_a_trainer_where_the_trace_converges(tmp_path):
    scores = 0.96 - 0.5 * np.arange(1, 41) ** -0.8
    callback = LearningCurveStop(tau=0.1, metric="accuracy", bound=1.0, nu=1e-3)
    run = trainer(tmp_path, callback, scores, steps=40)
    run.train()
    # chi falls to 0.1 where 0.5 x^-0.8 = 0.1, at 7.5 steps; the working level, 3, is known from level 9
    assert run.state.global_step == 9
    assert callback.trace.converged(0.1) == 8
    run.evaluate()  # by hand, at a step already seen
    assert len(callback.trace.sizes_) == 9


@pinned
def test_resumed_training_continues_the_trace(tmp_path):
    scores = (0.9 - 0.5 * np.arange(1, 13) ** -0.5 + np.random.default_rng(0).normal(0, 0.01, 12)).tolist()
    whole = LearningCurveStop(tau=1e-9, metric="eval_accuracy", bound=1.0)
    trainer(tmp_path, whole, scores).train()
    resumed = LearningCurveStop(tau=1e-9, metric="eval_accuracy", bound=1.0)
    trainer(tmp_path, resumed, scores[6:]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.trace.state_dict() == whole.trace.state_dict()
    assert len(whole.trace.sizes_) == 12


def test_a_loss_falls():
    pytest.importorskip("transformers")
    assert LearningCurveStop(tau=0.1, metric="loss").trace.mode == "min"
    assert LearningCurveStop(tau=0.1, metric="eval_f1").trace.mode == "max"
    assert LearningCurveStop(tau=0.1, metric="gain_of_loss", mode="max").trace.mode == "max"
    with pytest.raises(ValueError, match="tau"):
        LearningCurveStop(tau=-0.1, metric="loss")


@pinned
def test_a_metric_nobody_reports_is_said(tmp_path):
    run = trainer(tmp_path, LearningCurveStop(tau=0.1, metric="f1"), [0.5] * 4, steps=2)
    with pytest.warns(UserWarning, match="eval_f1"):
        run.train()


def test_without_transformers_the_rest_works():
    script = """
import sys
sys.modules["transformers"] = None
from firsthand.diagnose.learning_curve import LearningCurveStop, LearningCurveTrace
LearningCurveTrace().fit([1, 2, 4], [50, 70, 80])
try:
    LearningCurveStop(tau=0.1, metric="loss")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install 'firsthand[hf]'" in done.stdout
