"""What the report shows, worked out: numbers in words, and charts as positions in per cent of the page's width."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, floor, inf, isfinite, log10
from statistics import fmean, stdev
from typing import Any

UNKNOWN = "–"


# Numbers


def places(values: Iterable[float], digits: int) -> int:
    """How many decimals show `digits` digits of the largest of the values; none if all are whole."""
    sizes = [abs(value) for value in values]
    if all(size == floor(size) for size in sizes):
        return 0
    return max(0, digits - 1 - floor(log10(max(sizes))))


def number(value: float | None, decimals: int = 0, sign: bool = False) -> str:
    """The value with so many decimals, or in powers of ten where that would be a row of zeros. The minus is a minus."""
    if value is None or not isfinite(value):
        return UNKNOWN
    form = ".2e" if decimals > 6 or abs(value) >= 1e9 else f",.{decimals}f"
    text = re.sub(r"e\+?(-?)0*(\d)", r"e\1\2", f"{value:{'+' if sign else ''}{form}}")
    return text.replace("-", "−")


def seconds(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value < 0.1:
        return f"{number(1000 * value, places([1000 * value], 2) if value < 0.01 else 0)} ms"
    if value < 100:
        return f"{number(value, places([value], 2))} s"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


def megabytes(value: float | None) -> str:
    if value is None or value < 1000:
        return UNKNOWN if value is None else f"{value:.0f} MB"
    return f"{value / 1000:.2f} GB"


def count(value: float | None) -> str:
    if value is None or value < 1e6:
        return number(value)
    return f"{value / 1e6:.2f} M" if value < 1e9 else f"{value / 1e9:.2f} B"


def ratio(value: float | None, baseline: float | None) -> str:
    """The value as a multiple of the baseline's, in three digits."""
    if value is None or not baseline:
        return ""
    times = value / baseline
    return f"×{number(times, 2 if times < 9.995 else 1 if times < 99.95 else 0)}"


COSTS = {
    "wall_s": seconds,
    "cpu_s": seconds,
    "peak_memory_mb": megabytes,
    "trained_parameters": count,
    "parameters": count,
    "active_parameters": count,
}


def claimed_range(low: float | None, high: float | None) -> str:
    """The claimed range in words; no end is no limit on that side."""
    ends = [f"{end:g}".replace("-", "−") for end in (low, high) if end is not None]
    if len(ends) == 2:
        return f"between {ends[0]} and {ends[1]}"
    return f"{'above' if high is None else 'below'} {ends[0]}" if ends else "anything"


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and isfinite(value)]


def metric_column(name: str, arms: Mapping[str, Mapping[str, float | None]]) -> dict[str, Any]:
    """A metric's mean and standard deviation for each arm, and its value for each arm and seed."""
    values = {arm: known(seeds.values()) for arm, seeds in arms.items()}
    means = {arm: fmean(some) for arm, some in values.items() if some}
    decimals, of_means = places(chain(*values.values()), 4), places(means.values(), 4)
    return {
        "name": name,
        "mean": {arm: number(means.get(arm), of_means) for arm in arms},
        "spread": {arm: number(stdev(some), of_means) if len(some) > 1 else "" for arm, some in values.items()},
        "seeds": {arm: {seed: number(value, decimals) for seed, value in seeds.items()} for arm, seeds in arms.items()},
    }


# Charts


@dataclass(frozen=True)
class Axis:
    """A stretch of the number line, laid out over 0 to 100 per cent."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], margin: float = 0.06, log: bool = False) -> "Axis":
        """The axis that holds the values, with a margin on both sides."""
        if log:
            powers = cls.around([log10(value) for value in values], margin)
            return cls(10**powers.low, 10**powers.high, log=True)
        low, high = min(values), max(values)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-99):  # one value, but for rounding
            return cls(low - (abs(low) / 10 or 1.0), high + (abs(high) / 10 or 1.0))
        return cls(low - margin * (high - low), high + margin * (high - low))

    def at(self, value: float) -> float:
        """Where the value lies, in per cent; what is beyond an end is at the end."""
        if not isfinite(value):
            return 100.0 if value > 0 else 0.0
        low, high, value = (log10(self.low), log10(self.high), log10(value)) if self.log else (self.low, self.high, value)
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    def ticks(self, about: int = 5) -> list[tuple[float, str]]:
        """Positions and labels of round numbers: steps of 1, 2 or 5 times a power of ten; powers of ten on a log axis."""
        if self.log:
            powers = range(ceil(log10(self.low)), floor(log10(self.high)) + 1)
            return [(self.at(10.0**k), number(10.0**k, max(0, -k))) for k in powers[:: ceil(len(powers) / about)]]
        least = (self.high - self.low) / about
        power = 10.0 ** floor(log10(least))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
        decimals = max(0, -floor(log10(step) + 1e-9))
        values = [k * step for k in range(ceil(self.low / step), floor(self.high / step) + 1)]
        return [(self.at(value), number(value, decimals)) for value in values]


def claim_view(claim: Mapping[str, Any]) -> dict[str, Any]:
    """A claim of the evidence with its numbers in words, and its chart where any seed has an effect."""
    low, high = claim["interval"]
    half = (high - low) / 2 if low is not None and high is not None else 0.0
    decimals = places([half], 2) if half else places(known([claim["mean"]]), 3)
    p = claim["p"]
    effects = {seed: number(effect, decimals + (decimals > 0), sign=True) for seed, effect in claim["effects"].items()}
    view = {
        **claim,
        "claimed": claimed_range(claim["low"], claim["high"]),
        "mean_text": number(claim["mean"], decimals, sign=True),
        "interval_text": f"{number(low, decimals, True)} to {number(high, decimals, True)}" if low is not None else UNKNOWN,
        "p_text": UNKNOWN if p is None else f"{p:.3g}" if p >= 0.001 else "below 0.001",
        "effect_texts": effects,
        "seeds": len(known(claim["effects"].values())),
        "chart": None,
    }
    if view["seeds"]:
        axis = Axis.around(known([*claim["effects"].values(), low, high, claim["low"], claim["high"]]))
        view["chart"] = {
            "dots": _stacked(
                (axis.at(effect), f"seed {seed}: {effects[seed]}")
                for seed, effect in claim["effects"].items()
                if effect is not None
            ),
            "mean": axis.at(claim["mean"]),
            "interval": [axis.at(low), axis.at(high)] if half else None,
            "range": [
                axis.at(-inf if claim["low"] is None else claim["low"]),
                axis.at(inf if claim["high"] is None else claim["high"]),
            ],
            "edges": [axis.at(edge) for edge in known([claim["low"], claim["high"]])],
            "ticks": axis.ticks(),
        }
    return view


def _stacked(dots: Iterable[tuple[float, str]], apart: float = 2.4) -> list[dict[str, Any]]:
    """Dots that would hide one another go on top of one another."""
    last: list[float] = []  # where the last dot of each row lies
    stacked = []
    for x, label in sorted(dots):
        row = next((row for row, before in enumerate(last) if x - before >= apart), len(last))
        last[row : row + 1] = [x]
        stacked.append({"x": x, "row": row, "label": label})
    return stacked


def curve_chart(name: str, curves: Mapping[str, Mapping[str, Sequence[float | None]]], arms: Sequence[str]) -> dict[str, Any]:
    """A value over the steps: for each arm a line of means and a band from the lowest seed to the highest.

    Args:
        name: of the value.
        curves: arm -> the `step`, `mean`, `low` and `high` of the evidence.
        arms: all arms of the study, so that an arm has one colour in all charts.
    """
    keys = ("step", "mean", "low", "high")
    points = {
        arm: [point for point in zip(*(curve[key] for key in keys), strict=True) if len(known(point)) == 4]
        for arm, curve in curves.items()
    }
    points = {arm: some for arm, some in points.items() if some}
    if not points:
        return {"name": name, "lines": []}
    values = known(chain.from_iterable(point[1:] for point in chain(*points.values())))
    across = Axis.around(known(point[0] for point in chain(*points.values())), margin=0.0)
    up = Axis.around(values, log=min(values) > 0 and max(values) > 100 * min(values))
    decimals = places([some[-1][1] for some in points.values()], 4)

    def line(arm: str, some: list[tuple[float, ...]]) -> dict[str, Any]:
        x = [across.at(point[0]) for point in some]
        mean, low, high = ([round(100 - up.at(point[i]), 2) for point in some] for i in (1, 2, 3))
        path = [f"{a},{b}" for a, b in zip(x, mean, strict=True)]
        band = [f"{a},{b}" for a, b in [*zip(x, high, strict=True), *zip(x[::-1], low[::-1], strict=True)]]
        labels = [
            "{}, step {}: {} ({} to {})".format(arm, *(number(value, places([value], 4)) for value in point)) for point in some
        ]
        hover = list(zip(x, mean, labels, strict=True))[:: ceil(len(some) / 20)]  # enough to hit with a pointer
        last = number(some[-1][1], decimals)
        return {"arm": arm, "colour": arms.index(arm) % 8, "path": path, "band": band, "hover": hover, "last": last}

    lines = [line(arm, some) for arm, some in points.items()]
    return {
        "name": name,
        "lines": lines,
        "log": up.log,
        "x": across.ticks(),
        "y": [(100 - at, label) for at, label in up.ticks()],
    }
