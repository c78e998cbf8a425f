"""Race: the trace of a curve of 160 points, one power law per level, against `scipy.optimize.curve_fit` at each level.

The peers get what a user would give them: the law, its derivatives, and the fit of the level before as the start. The limit is a
straight-line fit per level, as if the exponent were known. One process, one thread, alternating.
"""

import statistics
import warnings

import numpy as np
import torch
from scipy.optimize import curve_fit
from torch.utils.benchmark import Timer

from firsthand.diagnose.learning_curve import LearningCurveTrace

ROUNDS = 9
SIZES = 5000.0 * np.arange(1, 161)
SCORES = 96.0 - 300.0 * SIZES**-0.35 + np.random.default_rng(0).normal(0, 0.02, len(SIZES))


def law(x, log_a, log_b, c):
    return c - np.exp(log_a - np.exp(log_b) * np.log(x))


def derivatives(x, log_a, log_b, c):
    b = np.exp(log_b)
    power = np.exp(log_a - b * np.log(x))
    return np.stack([-power, power * b * np.log(x), np.ones_like(x)], axis=1)


def ours(anchored):
    return LearningCurveTrace(anchored=anchored).fit(SIZES, SCORES).alpha_


def peer(method):
    start, asymptotes = (np.log(300.0), np.log(0.35), 96.0), []
    for level in range(3, len(SIZES) + 1):
        start, _ = curve_fit(law, SIZES[:level], SCORES[:level], p0=start, jac=derivatives, method=method, maxfev=10_000)
        asymptotes.append(start[2])
    return np.array(asymptotes)


def limit():
    power = SIZES**-0.35
    return np.array([np.polyfit(power[:level], SCORES[:level], 1)[1] for level in range(3, len(SIZES) + 1)])


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # scipy, of the covariance at three points
    runs = {
        "trace": lambda: ours(anchored=False),
        "trace, anchored": lambda: ours(anchored=True),
        "curve_fit, Levenberg-Marquardt": lambda: peer("lm"),
        "curve_fit, trust region": lambda: peer("trf"),
        "limit: a line per level": limit,
    }
    reference = runs["trace"]()
    for name in ("curve_fit, Levenberg-Marquardt", "curve_fit, trust region"):
        apart = np.abs(runs[name]() - reference)[7:].max()  # below 10 points, scipy may stop before the minimum
        assert apart < 1e-3, f"{name} finds other asymptotes, by up to {apart:g}"
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(Timer("run()", globals={"run": run}).timeit(1).median)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:32} {seconds:7.3f} s a trace  {1000 * seconds / 158:6.3f} ms a level")
    for peer_name in list(runs)[2:]:
        print(f"trace / {peer_name}: {medians['trace'] / medians[peer_name]:.2f}")
    worst = medians["trace, anchored"]
    print(f"anchored trace of 160 levels / 0.5 s: {worst / 0.5:.2f}; its level / 5 ms: {worst / 158 / 0.005:.2f}")


if __name__ == "__main__":
    main()
