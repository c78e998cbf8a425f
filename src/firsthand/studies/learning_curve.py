"""Once a tagger's learning trend says that little is left to gain, does it foretell accuracy on more data better than today's?"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import least_squares

from firsthand import Study, Trial, beats, holds, matches
from firsthand.diagnose.learning_curve import LearningCurveTrace, ordering_reliability, prediction_mape
from firsthand.testbeds import curves
from firsthand.testbeds.curves import Curve

TAU = 5.0  # points of accuracy that may still be gained when a trend is asked
FLAT = 0.1  # points that an asymptote may move per level at the working level: 2e-5 a word at 5,000 words a level
DISTORTIONS = 20  # spoilt copies of each curve
SPOILT = 5  # observations in a row ...
BY = 1.0  # ... that are so many points too high, or too low


@dataclass
class World:
    """Curves of several systems over the same sizes, and what may be seen of them."""

    curves: dict[str, Curve]
    controls: np.ndarray  # the levels that are foretold, as indices: from 3/8 of the data to all of it
    asked: dict[str, int]  # how many observations of a system are seen when it is asked
    converged: float  # share of systems that were asked because their trend said so
    spoilt: dict[str, list[Curve]]  # what is seen before the first control, with a run of bad observations


def prepare(trial: Trial) -> World:
    found = curves.of_classifiers(trial) if "digits" in trial.data else curves.of_taggers(trial)
    levels = len(next(iter(found.values())).sizes)
    controls = np.round(np.linspace(3 / 8, 1, 11) * levels).astype(int) - 1  # 300,000, 350,000 ... 800,000 words
    world = World(found, controls, asked={}, converged=0.0, spoilt={})
    for name, curve in found.items():
        seen = pick(curve, slice(controls[0]))
        watched = watch(seen)
        world.asked[name] = len(watched.sizes_)
        world.converged += (watched.converged(TAU) is not None) / len(found)
        world.spoilt[name] = [spoil(seen, watched.working_level_ or 0, trial.rng) for _ in range(DISTORTIONS)]
    return world


def pick(curve: Curve, levels: slice | np.ndarray) -> Curve:
    return curve._replace(sizes=curve.sizes[levels], accuracy=curve.accuracy[levels])


def watch(seen: Curve) -> LearningCurveTrace:
    """Follow a curve, as a user would, until its trend says that at most `TAU` is left to gain, or until the controls begin."""
    trace = LearningCurveTrace(nu=FLAT / seen.step)
    for size, accuracy in zip(seen.sizes, seen.accuracy, strict=True):
        trace.update(size, accuracy)
        if trace.converged(TAU) is not None:
            break
    return trace


def spoil(seen: Curve, after: int, rng: np.random.Generator) -> Curve:
    """Put a run of observations off by `BY`, somewhere after a level, all up or all down."""
    start = rng.integers(min(after, len(seen.sizes) - SPOILT), len(seen.sizes) - SPOILT + 1)
    accuracy = seen.accuracy.copy()
    accuracy[start : start + SPOILT] += BY * rng.choice([-1, 1])
    return seen._replace(accuracy=np.minimum(accuracy, 100.0))


# What the arms differ in: from the points seen and the sizes asked for to the accuracies foretold.

Forecast = Callable[[Curve, np.ndarray], np.ndarray]


def last_value(seen: Curve, sizes: np.ndarray) -> np.ndarray:
    return np.full(len(sizes), seen.accuracy[-1])


def log_linear(seen: Curve, sizes: np.ndarray) -> np.ndarray:
    slope, intercept = np.polyfit(np.log(seen.sizes), seen.accuracy, 1)
    return np.asarray(np.minimum(intercept + slope * np.log(sizes), 100.0))


def power_law_to_100(seen: Curve, sizes: np.ndarray) -> np.ndarray:
    """The error falls as a power of size, to nothing: least squares on the accuracy, from the line through the logarithms."""
    unit = seen.sizes[-1]
    slope, intercept = np.polyfit(np.log(seen.sizes / unit), np.log(np.maximum(100.0 - seen.accuracy, 1e-6)), 1)

    def law(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.asarray(100.0 - np.exp(theta[0]) * (x / unit) ** -theta[1])

    theta = least_squares(lambda theta: law(theta, seen.sizes) - seen.accuracy, (intercept, -slope)).x
    return law(theta, sizes)


def trend(seen: Curve, sizes: np.ndarray, anchored: bool) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asked early, there may be no asymptote yet: then the error is what we want to know
        return LearningCurveTrace(nu=FLAT / seen.step, anchored=anchored).fit(seen.sizes, seen.accuracy).predict(sizes)


def foretell(trial: Trial, world: World, forecast: Forecast) -> dict[str, float]:
    """How far off the forecasts are at the controls, in percent of the accuracy there."""
    truth = {name: pick(curve, world.controls) for name, curve in world.curves.items()}

    def guess(name: str, level: int) -> np.ndarray:
        return forecast(pick(world.curves[name], slice(level)), truth[name].sizes)

    def error(name: str, foretold: np.ndarray) -> float:
        return prediction_mape(foretold, truth[name].accuracy)

    guesses = {name: guess(name, level) for name, level in world.asked.items()}
    errors = {name: error(name, foretold) for name, foretold in guesses.items()}
    step = next(iter(truth.values())).step
    for level in range(5, world.controls[0] + 1, 5):  # had all been asked then
        trial.record(level * step, mape=float(np.mean([error(name, guess(name, level)) for name in truth])))
    spoilt = [error(name, forecast(seen, truth[name].sizes)) for name in truth for seen in world.spoilt[name]]
    return {
        "mape": float(np.mean(list(errors.values()))),
        "worst mape": max(errors.values()),
        "mape, spoilt": float(np.mean(spoilt)),
        "ordering": ordering_reliability(list(guesses.values()), [curve.accuracy for curve in truth.values()]),
        "size when asked": float(np.mean([world.curves[name].sizes[level - 1] for name, level in world.asked.items()])),
        "converged by then": world.converged,
        **{f"mape, {name}": value for name, value in errors.items()},
    }


def of_anchored(name: str) -> Callable[[Mapping[str, Mapping[str, float]]], float]:
    return lambda metrics: metrics["anchored trend"][name]


study = Study(
    method="learning-curve",
    prepare=prepare,
    arms={
        "last value": partial(foretell, forecast=last_value),
        "log-linear": partial(foretell, forecast=log_linear),
        "power law to 100": partial(foretell, forecast=power_law_to_100),
        "trend": partial(foretell, forecast=partial(trend, anchored=False)),
        "anchored trend": partial(foretell, forecast=partial(trend, anchored=True)),
    },
    claim=beats("anchored trend", "last value", on="mape", lower_is_better=True),
    also=[
        holds("the anchored trend is off by less than 0.5 % on average for every system", of_anchored("worst mape"), below=0.5),
        holds(
            "the anchored trend puts more than 90 % of pairs of systems in the right order", of_anchored("ordering"), above=0.9
        ),
        holds(
            "for more than half of the systems it says in time that it can be asked", of_anchored("converged by then"), above=0.5
        ),
        matches("anchored trend", "trend", on="mape", within=0.1),
        beats("anchored trend", "trend", on="mape, spoilt", lower_is_better=True),
        beats("anchored trend", "log-linear", on="mape", lower_is_better=True),
        beats("anchored trend", "power law to 100", on="mape", lower_is_better=True),
    ],
    equal="curves, observations seen, sizes foretold",
    data=("pos-pd98",),
    fallback=("digits",),
)
