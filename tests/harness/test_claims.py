import math

import pytest

from firsthand import beats, holds, matches

METRICS = {"method": {"accuracy": 0.9, "loss": 0.5}, "baseline": {"accuracy": 0.7, "loss": 0.6}}


def test_beats_is_the_difference():
    claim = beats("method", "baseline", on="accuracy", by=0.1)
    assert claim.effect(METRICS) == pytest.approx(0.2)
    assert (claim.low, claim.high) == (0.1, math.inf)


def test_lower_is_better_turns_the_sign():
    assert beats("method", "baseline", on="loss", lower_is_better=True).effect(METRICS) == pytest.approx(0.1)


def test_matches_is_a_range_on_both_sides():
    claim = matches("method", "baseline", on="loss", within=0.2)
    assert claim.effect(METRICS) == pytest.approx(-0.1)
    assert (claim.low, claim.high) == (-0.2, 0.2)


def test_holds_takes_any_statistic_and_range():
    claim = holds("sum", lambda m: m["method"]["loss"] + m["baseline"]["loss"], above=1.0, below=2.0)
    assert claim.effect(METRICS) == pytest.approx(1.1)
    assert (claim.low, claim.high) == (1.0, 2.0)
    assert holds("below", lambda m: 0.0, below=1.0).low == -math.inf


def test_needs_name_what_is_compared():
    assert beats("method", "baseline", on="loss").needs == (("method", "loss"), ("baseline", "loss"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: beats("a", "a", on="x"), "arm and baseline must differ"),
        (lambda: beats("a", "b", on="x", by=-1.0), "by must be finite and at least 0, got -1"),
        (lambda: beats("a", "b", on="x", by=math.nan), "by must be finite"),
        (lambda: matches("a", "b", on="x", within=0.0), "within must be positive and finite, got 0"),
        (lambda: matches("a", "a", on="x", within=1.0), "arm and baseline must differ"),
        (lambda: holds("text", lambda m: 0.0), "holds needs above=, below= or both"),
        (lambda: holds("text", lambda m: 0.0, above=1.0, below=1.0), "low < high"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
