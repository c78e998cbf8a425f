import math
import os
import re
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firsthand.harness import charts, report
from firsthand.harness.report import write_report
from report_sample import EVIL, evil, make_claim, make_evidence, sample


class Page(HTMLParser):
    """Tags, text and links of a page; opened tags must be closed in order."""

    INLINE = ("a", "b", "code", "small", "span")
    VOID = ("meta", "link", "input", "br", "hr", "img", "wbr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.links, self.open, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("href", "src")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag not in self.INLINE:
            self.text += " "

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    assert write_report(folder, **sample()) == folder / "index.html"
    return folder


def page(site, name):
    return Page((site / name).read_text(encoding="utf-8"))


def text_of(site, name):
    return " ".join(page(site, name).text.split())


def test_a_page_each_an_index_and_nothing_else(site):
    files = sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file())
    slugs = ["gistembed", "my%20study", "peri-ln", "rankme", "read-me", "smoe-dropout"]
    assert files == sorted(["index.html", "reading.html", *(f"methods/{slug}.html" for slug in slugs)])


def test_pages_are_well_formed_and_local_links_lead_somewhere(site):
    for path in site.rglob("*.html"):
        for link in Page(path.read_text(encoding="utf-8")).links:
            if not re.match("https://arxiv.org/abs/|data:,|#", link):
                assert (path.parent / unquote(link.partition("#")[0])).is_file(), link


def test_index_has_verdict_effect_and_cost_of_each(site):
    rows = re.findall(r"<tr role=\"row\" data-words.*?</tr>", (site / "index.html").read_text(), re.DOTALL)
    by_slug = {re.search("methods/(.*?).html", row)[1]: " ".join(Page(row).text.split()) for row in rows}
    assert len(by_slug) == 6
    effect = sample()["evidence"]["gistembed"]["claims"][0]
    assert "reproduced" in by_slug["gistembed"]
    assert f"{effect['mean']:+.3f}" in by_slug["gistembed"]
    assert "×1.93 24 s" in by_slug["gistembed"]  # the last of four arms takes 1 + 3 * 0.31 times as long
    assert "×1.20 735 MB" in by_slug["gistembed"]  # 735 / 612
    assert "contradicted stale" in by_slug["smoe-dropout"]
    assert "inconclusive" in by_slug["rankme"]
    assert "not measured" in by_slug["read-me"]
    assert "Does my study help where" in by_slug["my%2520study"]


def test_method_page_has_everything_that_was_measured(site):
    text = text_of(site, "methods/gistembed.html")
    evidence = sample()["evidence"]["gistembed"]
    for said in (
        "Guided in-sample selection of negatives",
        "Reach for it when",
        "Costs one more forward pass",
        "How it works",
        evidence["question"],
        "oracle beats in-batch on accuracy",
        "this claim decides",
        "Secondary claims shown, not counted",
        "sign-flip p 0.0625",
        "Claimed: above 0 (shaded)",
        "between −0.05 and 0.05",
        "gistembed, margin 0.1",
        "train loss",
        "gradient norm log scale",
        "12 s",
        "24 s ×1.93",
        "612 MB",
        "11.23 M",
        "120,330",
        evidence["command"],
        "AMD EPYC 9B45",
        "torch 2.13.0",
        "9f2c1ab07de4",
        "2026-11-22",
        "docstrings",
        "3.1 min",
        "firsthand.embed.loss",
    ):
        assert said in text, said
    labels = [attrs["aria-label"] for tag, attrs in page(site, "methods/gistembed.html").tags if tag == "svg" and "role" in attrs]
    assert len(labels) == 4  # two claims, two curves
    assert labels[0].startswith("Effects of 5 seeds, mean +0.0")


def test_every_seed_is_a_dot_that_names_itself(site):
    text = (site / "methods/gistembed.html").read_text()
    effects = sample()["evidence"]["gistembed"]["claims"][0]["effects"]
    for seed, effect in effects.items():
        assert f"<title>seed {seed}: {effect:+.4f}</title>".replace("-", "−") in text


def test_failures_are_shown_and_the_other_seeds_kept(site):
    text = text_of(site, "methods/peri-ln.html")
    assert "method, seed 1002: RuntimeError: loss is not finite" in text
    assert "No verdict could be had: seed 1002: a trial failed." in text
    assert "4 seeds" in text


def test_card_without_evidence_and_evidence_without_card(site):
    assert "There is no evidence yet. To measure it: firsthand run read-me" in text_of(site, "methods/read-me.html")
    own = text_of(site, "methods/my%20study.html")
    assert "Does my study help where" in own
    assert "Data generated" in own


def test_stale_and_smoke_are_marked(tmp_path):
    content = sample()
    content["evidence"]["gistembed"]["smoke"] = True
    write_report(tmp_path, **content)
    assert "stale" in text_of(tmp_path, "methods/smoe-dropout.html")
    assert "numbers of an older version" in text_of(tmp_path, "methods/smoe-dropout.html")
    assert "older version" not in text_of(tmp_path, "methods/gistembed.html")
    assert "the numbers mean nothing" in text_of(tmp_path, "methods/gistembed.html")
    assert "smoke run" in text_of(tmp_path, "index.html")


def test_code_is_highlighted_by_class_and_markdown_tables_scroll(site):
    text = (site / "methods/gistembed.html").read_text()
    assert '<span class="kn">import</span>' in text
    assert '<div class="scroll" tabindex="0"><table>' in text


def test_markup_in_cards_and_evidence_stays_text(tmp_path):
    folder = tmp_path / "a" / "b" / "report"
    write_report(folder, **evil())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    assert all(folder in path.parents for path in written)
    for path in written:
        found = Page(path.read_text(encoding="utf-8"))
        assert sum(tag == "script" for tag, _ in found.tags) == (path.name == "index.html")
        assert not any(tag in ("img", "iframe", "object") for tag, _ in found.tags)
        assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
        assert "' & 49" not in found.text
        assert {link for link in found.links if re.match(r"\s*(?!https?:)[a-z]+:|//", link, re.IGNORECASE)} <= {"data:,"}
    method = Page((folder / "methods/gistembed.html").read_text(encoding="utf-8"))
    assert {"https://ok.test/x", "../reading.html", "https://evil.test/auto"} <= set(method.links)
    assert f"{EVIL} ?" in method.text


@pytest.mark.parametrize(
    ("link", "fine"),
    [
        ("https://a.test", True),
        ("HTTP://a.test", True),
        ("rankme.html", True),
        ("../a.html#b:c", True),
        ("#x", True),
        ("?a=b:c", True),
        ("javascript:x", False),
        ("java\nscript:x", False),
        ("vbscript:x", False),
        ("data:text/html,x", False),
        ("file:///etc/passwd", False),
        ("//a.test", False),
        ("\\\\a.test", False),
        ("/\\a.test", False),
        ("mailto:a@b", False),
    ],
)
def test_links_only_to_the_web_and_the_site(link, fine):
    assert report._is_harmless(link) is fine


def test_nothing_measured_at_all(tmp_path):
    write_report(tmp_path, {}, {})
    assert "0 methods" in text_of(tmp_path, "index.html")


def test_evidence_with_nothing_but_failures(tmp_path):
    evidence = make_evidence("m", 0.1, metrics={"baseline": {}, "method": {}}, curves={}, costs={})
    evidence["claims"] = [make_claim("method beats baseline on x", [None] * 5)]
    write_report(tmp_path, {}, {"m": evidence})
    assert "Mean effect –, 95 % interval –, 0 seeds, sign-flip p –." in text_of(tmp_path, "methods/m.html")


def test_a_page_that_cannot_be_made_leaves_the_old_site(tmp_path):
    write_report(tmp_path, **sample())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.html")}
    content = sample()
    del content["evidence"]["rankme"]["arms"]
    with pytest.raises(KeyError):
        write_report(tmp_path, **content)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_write_that_fails_leaves_the_old_page_and_no_litter(tmp_path, monkeypatch):
    index = write_report(tmp_path, **sample())
    before = index.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, {}, {})
    assert index.read_bytes() == before
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".html"}


def test_same_input_same_bytes(site, tmp_path):
    write_report(tmp_path, **sample())
    for path in site.rglob("*.html"):
        assert (tmp_path / path.relative_to(site)).read_bytes() == path.read_bytes()


# Numbers and axes


@pytest.mark.parametrize(
    ("values", "digits", "expected"),
    [
        ([0.97123], 4, 4),
        ([23.4567, 1.0], 4, 2),
        ([1234.5], 3, 0),
        ([3.0, 600.0], 4, 0),
        ([0.0], 3, 0),
        ([], 3, 0),
        ([-0.0123], 2, 3),
    ],
)
def test_places(values, digits, expected):
    assert charts.places(values, digits) == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (charts.number(0.03123, 3, sign=True), "+0.031"),
        (charts.number(-1234.5, 1), "−1,234.5"),
        (charts.number(None), "–"),
        (charts.number(math.nan), "–"),
        (charts.number(1.5e-9, 9), "1.50e−9"),
        (charts.number(2e12), "2.00e12"),
        (charts.seconds(0.41), "0.41 s"),
        (charts.seconds(0.0142), "14 ms"),
        (charts.seconds(1.5e-4), "0.15 ms"),
        (charts.seconds(12.34), "12 s"),
        (charts.seconds(187), "3.1 min"),
        (charts.seconds(9000), "2.5 h"),
        (charts.megabytes(612.4), "612 MB"),
        (charts.megabytes(12345.0), "12.35 GB"),
        (charts.count(120330), "120,330"),
        (charts.count(1.123e7), "11.23 M"),
        (charts.count(None), "–"),
        (charts.ratio(3.0, 2.0), "×1.50"),
        (charts.ratio(246.0, 2.0), "×123"),
        (charts.ratio(1.0, 0.0), ""),
        (charts.ratio(None, 1.0), ""),
        (charts.claimed_range(0.0, None), "above 0"),
        (charts.claimed_range(None, 0.5), "below 0.5"),
        (charts.claimed_range(-0.01, 0.01), "between −0.01 and 0.01"),
    ],
)
def test_numbers_in_words(shown, expected):
    assert shown == expected


def test_axis_is_linear_with_margins():
    axis = charts.Axis.around([0.0, 10.0], margin=0.1)
    assert (axis.low, axis.high) == (-1.0, 11.0)
    assert axis.at(5.0) == 50.0
    assert axis.at(0.0) == pytest.approx(100 / 12, abs=0.01)
    assert (axis.at(-math.inf), axis.at(math.inf), axis.at(99.0)) == (0.0, 100.0, 100.0)


def test_ticks_are_round_numbers_in_their_place():
    axis = charts.Axis(-0.013, 0.052)
    assert [label for _, label in axis.ticks()] == ["0.00", "0.02", "0.04"]
    assert [at for at, _ in axis.ticks()] == [20.0, 50.77, 81.54]


def test_log_ticks_are_powers_of_ten():
    axis = charts.Axis(0.05, 200.0, log=True)
    assert [label for _, label in axis.ticks()] == ["0.1", "1", "10", "100"]
    assert axis.at(math.sqrt(0.05 * 200)) == 50.0


finite = st.floats(-1e15, 1e15, allow_subnormal=False)


@given(st.lists(finite, min_size=1))
def test_axis_holds_any_values_and_has_a_few_ticks_in_order(values):
    axis = charts.Axis.around(values)
    assert all(axis.low < value < axis.high for value in values)
    at = [where for where, _ in axis.ticks()]
    assert 2 <= len(at) <= 7
    assert at == sorted(set(at))
    assert [axis.at(value) for value in sorted(values)] == sorted(axis.at(value) for value in values)


@given(st.lists(st.floats(1e-12, 1e12), min_size=2).filter(lambda v: max(v) > 100 * min(v)))
def test_log_axis_holds_any_values(values):
    axis = charts.Axis.around(values, log=True)
    assert all(0 <= axis.at(value) <= 100 for value in values)
    assert 2 <= len(axis.ticks()) <= 6


def flat(**values):
    return {"step": [0.0, 1.0], **{key: values.get(key, values["mean"]) for key in ("mean", "low", "high")}}


@pytest.mark.parametrize(
    ("values", "log"),
    [([1.0, 101.0], True), ([1.0, 100.0], False), ([0.0, 1e6], False), ([-1.0, 1e6], False)],
)
def test_log_scale_only_for_positive_values_over_two_decades(values, log):
    assert charts.curve_chart("loss", {"a": flat(mean=values)}, ["a"])["log"] is log


def test_log_scale_looks_at_the_band_too():
    assert charts.curve_chart("loss", {"a": flat(mean=[1.0, 101.0], low=[-1.0, 100.0])}, ["a"])["log"] is False


def test_curve_skips_what_is_missing_and_an_arm_without_points():
    curves = {
        "a": {"step": [0, 1, 2], "mean": [1.0, None, 3.0], "low": [1.0, None, 3.0], "high": [1.0, None, 3.0]},
        "b": flat(mean=[None, None]),
    }
    chart = charts.curve_chart("loss", curves, ["b", "a"])
    (line,) = chart["lines"]
    assert (line["arm"], line["colour"], line["last"]) == ("a", 1, "3")
    assert line["path"] == ["0.0,94.64", "100.0,5.36"]
    assert charts.curve_chart("loss", {"b": flat(mean=[None, None])}, ["b"])["lines"] == []


def test_means_of_whole_numbers_keep_their_decimals():
    column = charts.metric_column("steps", {"a": {"1": 3.0, "2": 4.0, "3": 4.0}, "b": {"1": 5.0}, "c": {}})
    assert column["mean"] == {"a": "3.667", "b": "5.000", "c": "–"}
    assert column["seeds"]["a"] == {"1": "3", "2": "4", "3": "4"}
    assert column["spread"] == {"a": "0.577", "b": "", "c": ""}


def test_claimed_metrics_come_first(tmp_path):
    evidence = make_evidence("m", 0.1)
    evidence["claims"][0]["needs"] = [["method", "steps"], ["baseline", "steps"]]
    evidence["claims"][1]["needs"] = []
    write_report(tmp_path, {}, {"m": evidence})
    assert "Arm steps accuracy nll baseline" in text_of(tmp_path, "methods/m.html")


def test_one_point_is_a_dot(tmp_path):
    point = {"step": [5], "mean": [0.5], "low": [0.4], "high": [0.6]}
    write_report(tmp_path, {}, {"m": make_evidence("m", 0.1, curves={"method": {"loss": point}})})
    assert "hover arm-1 alone" in (tmp_path / "methods/m.html").read_text()


def test_equal_effects_are_stacked_so_that_each_shows():
    view = charts.claim_view(make_claim("x", [0.5] * 5))
    assert [dot["row"] for dot in view["chart"]["dots"]] == [0, 1, 2, 3, 4]
    assert view["chart"]["interval"] is None  # the interval is a point
    assert view["interval_text"] == "+0.500 to +0.500"


def test_chart_places_the_interval_inside_the_claimed_range_exactly_when_reproduced():
    for effects in ([0.1, 0.2, 0.15, 0.12, 0.18], [-0.1, 0.2, 0.15, 0.12, 0.18]):
        claim = make_claim("x", effects)
        chart = charts.claim_view(claim)["chart"]
        inside = chart["range"][0] < chart["interval"][0] and chart["interval"][1] < chart["range"][1]
        assert inside is (claim["verdict"] == "reproduced")


def test_charts_are_valid_xml(site):
    for path in site.rglob("*.html"):
        for svg in re.findall(r"<div class=\"plot\".*?</div>", path.read_text(), re.DOTALL):
            ElementTree.fromstring(svg)
