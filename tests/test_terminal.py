import pytest

from firsthand.terminal import claimed_range, count, effect, effect_plot, number

CLAIM = {"effects": {"1": 1.0, "2": 2.0, "3": 3.0}, "mean": 2.0, "interval": [0.5, 3.5], "low": 0.0, "high": None}


def test_plot_puts_things_where_they_are():
    seeds, interval, axis = effect_plot(CLAIM, width=36).splitlines()
    assert [i - 2 for i, c in enumerate(seeds) if c == "•"] == [10, 20, 30]
    assert seeds.index("╷") - 2 == 0
    assert (interval.index("├") - 2, interval.index("┼") - 2, interval.index("┤") - 2) == (5, 20, 35)
    assert axis.split()[:2] == ["0", "3.5"]


def test_plot_of_effects_without_spread():
    same = {**CLAIM, "effects": {"1": 0.0, "2": 0.0}, "mean": 0.0, "interval": [0.0, 0.0]}
    assert "•" in effect_plot(same)


def test_no_interval_no_plot():
    assert effect_plot({**CLAIM, "interval": [None, None]}) == ""


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (0.123456, "0.1235"), (1e-9, "1e-09"), (12345.6, "1.235e+04")])
def test_number(value, shown):
    assert number(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "-"), (12, "12"), (1234, "1.23k"), (22_700_000, "22.7M"), (7e9, "7B")])
def test_count(value, shown):
    assert count(value) == shown


def test_effect_and_range():
    assert effect(CLAIM) == "+2 [0.5, 3.5]"
    assert effect({**CLAIM, "mean": None}) == "-"
    assert claimed_range(CLAIM) == "> 0"
    assert claimed_range({"low": None, "high": 1.0}) == "< 1"
    assert claimed_range({"low": -0.1, "high": 0.1}) == "-0.1 to 0.1"
