import csv
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from firsthand.match.matcher import DittoMatcher
from firsthand.match.tables import Match, match_tables, read_labels, read_records, write_matches
from firsthand.testbeds import embedding

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "match_two_tables.py"
NAMES = [f"{colour} {thing}" for colour in ("red", "green", "blue", "white") for thing in ("lamp", "chair", "table", "desk")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tables of furniture with different columns, and pairs with labels."""
    place = tmp_path_factory.mktemp("tables")
    with open(place / "left.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "name", "price"), *((f"a{n}", name, 10 + n) for n, name in enumerate(NAMES))])
    with open(place / "right.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "product"), *((f"b{n}", name) for n, name in enumerate(reversed(NAMES)))])
    rows = [(f"a{i}", f"b{15 - j}", int(i == j)) for i in range(16) for j in (i, (i + 1) % 16)]
    with open(place / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("left_id", "right_id", "label"), *rows])
    return place


def read(path):
    return list(csv.DictReader(path.read_text().splitlines()))


class Overlap(DittoMatcher):
    """A matcher whose probability is the share of common words."""

    def __init__(self):
        super().__init__("none", progress=False)
        self.threshold_ = 0.5

    def predict_proba(self, pairs):
        words = [[set(str(record.get("name", record.get("product"))).split()) for record in pair] for pair in pairs]
        match = np.array([len(a & b) / len(a | b) for a, b in words])
        return np.stack([1 - match, match], axis=1)


def test_tables_to_matches(folder, tmp_path):
    left, right = read_records(folder / "left.csv"), read_records(folder / "right.csv")
    assert left["a0"] == {"name": "red lamp", "price": "10"}
    found = match_tables(Overlap(), left, right, k=3)
    assert {(match.left_id, match.right_id) for match in found} == {(f"a{n}", f"b{15 - n}") for n in range(16)}
    assert all(match.score == 1.0 for match in found)
    more = match_tables(Overlap(), left, right, k=99, threshold=0.2)
    assert len(more) == 16 * 7  # those with a word in common
    assert [match.score for match in more] == sorted((match.score for match in more), reverse=True)
    write_matches(tmp_path / "matches.csv", more)
    assert (tmp_path / "matches.csv").read_text().splitlines()[:2] == ["left_id,right_id,score", "a0,b15,1.000000"]


def test_labels(folder):
    left, right = read_records(folder / "left.csv"), read_records(folder / "right.csv")
    pairs, labels = read_labels(folder / "labels.csv", left, right)
    assert pairs[0] == (left["a0"], right["b15"])
    assert labels == [1, 0] * 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name\nx\n", "there must be a column 'id', got name"),
        ("", "there must be a column 'id', got none"),
        ("id\n1\n", "there must be a column besides 'id'"),
        ("id,name\n", "there must be a row below the header"),
        ("id,name\n1,x\n1,y\n", "line 3: id must be filled and unique, got '1'"),
        ("id,name\n,x\n", "line 2: id must be filled and unique, got ''"),
        ("id,name\n1\n", "line 2: there must be 2 cells"),
        ("id,name\n1,x,y\n", "line 2: there must be 2 cells"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [("z,b,1", "left_id 'z' is in no record"), ("a,z,1", "right_id 'z'"), ("a,b,", "label must be 0 or 1, got ''")],
)
def test_bad_labels(tmp_path, row, message):
    (tmp_path / "l.csv").write_text(f"left_id,right_id,label\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path / "l.csv", {"a": {"x": "1"}}, {"b": {"x": "1"}})


def test_bad_matching():
    with pytest.raises(ValueError, match="both tables must have records, got 0 left"):
        match_tables(Overlap(), {}, {"b": {"product": "x"}})
    with pytest.raises(ValueError, match="threshold must be in"):
        match_tables(Overlap(), {"a": {"name": "x"}}, {"b": {"product": "x"}}, threshold=2.0)
    assert isinstance(Match("a", "b", 1.0), tuple)


def test_the_example_goes_from_two_files_to_a_file_of_matches(folder, tmp_path, monkeypatch, capsys):
    tokenizer = embedding.tokenizer([*NAMES, "COL name VAL price product", *map(str, range(10, 30))] * 3, 300)
    model = embedding.bert(torch.Generator().manual_seed(0), 300, hidden=32, layers=1, heads=2)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "encoder")

    def run(*options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [EXAMPLE.name, str(folder / "left.csv"), str(folder / "right.csv"), *options])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return capsys.readouterr().out

    assert "fill in its column label" in run("--to-label", "pairs.csv", "--pairs", "20")
    rows = read(tmp_path / "pairs.csv")
    assert len(rows) == 20
    assert set(rows[0]) == {"left_id", "right_id", "label", "left", "right"}
    said = run("--labels", str(folder / "labels.csv"), "--model", "encoder", "--max-len", "48", "--epochs", "3", "--save", "kept")
    assert "16 x 16 records" in said
    found = read(tmp_path / "matches.csv")
    assert all(row.keys() == {"left_id", "right_id", "score"} and 0 <= float(row["score"]) <= 1 for row in found)
    run("--load", "kept", "--matches", "again.csv")
    assert (tmp_path / "again.csv").read_text() == (tmp_path / "matches.csv").read_text()
