"""From two tables to their matches: files with a record a row, in and out."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from firsthand.match.blocking import block
from firsthand.match.matcher import DittoMatcher
from firsthand.match.records import Record, serialize

Table = Mapping[str, Record]
LABELS = ("left_id", "right_id", "label")


class Match(NamedTuple):
    """Two records that are one thing, by their ids, and how probable that is."""

    left_id: str
    right_id: str
    score: float


def read_records(path: str | Path, id_column: str = "id") -> dict[str, dict[str, str]]:
    """A CSV file with a header, as records by their id. The two tables need not have the same columns.

    Args:
        path: the file, in UTF-8.
        id_column: the column that tells records apart; it is no part of the record.

    Raises:
        ValueError: no such column, or no other; an id that is empty or comes twice; a row with too many or too few cells.
    """
    rows = _rows(path, (id_column,))
    records: dict[str, dict[str, str]] = {}
    for number, row in rows:
        key = row.pop(id_column)
        if not row:
            raise ValueError(f"{path}: there must be a column besides {id_column!r}")
        if not key or key in records:
            raise ValueError(f"{path}, line {number}: {id_column} must be filled and unique, got {key!r}")
        records[key] = row
    return records


def read_labels(path: str | Path, left: Table, right: Table) -> tuple[list[tuple[Record, Record]], list[int]]:
    """Labelled pairs from a CSV file with the columns `left_id`, `right_id` and `label` (1 for a match, 0 for none).

    Args:
        path: the file.
        left: the left table.
        right: the right table.

    Returns:
        Pairs of records and their labels, as `DittoMatcher.fit` takes them.

    Raises:
        ValueError: a column is missing, an id is in no table, a label is neither 0 nor 1.
    """
    pairs, labels = [], []
    for number, row in _rows(path, LABELS):
        for name, table in (("left_id", left), ("right_id", right)):
            if row[name] not in table:
                raise ValueError(f"{path}, line {number}: {name} {row[name]!r} is in no record of its table")
        if row["label"] not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: label must be 0 or 1, got {row['label']!r}")
        pairs.append((left[row["left_id"]], right[row["right_id"]]))
        labels.append(int(row["label"]))
    return pairs, labels


def match_tables(
    matcher: DittoMatcher, left: Table, right: Table, *, k: int = 10, encoder: Any = None, threshold: float | None = None
) -> list[Match]:
    """Find the matches between two tables: block, score the candidates, keep those above the threshold.

    Args:
        matcher: a fitted one.
        left: id -> record.
        right: id -> record.
        k: candidates for each left record, see `block`; fewer where the right table is smaller.
        encoder: of the records' texts for blocking, see `block`.
        threshold: the least probability, which a match must exceed; by default the matcher's.

    Returns:
        The matches, most probable first. A record may be in several.

    Raises:
        ValueError: an empty table, `k` below 1, `threshold` not in [0, 1].
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if not left or not right:
        raise ValueError(f"both tables must have records, got {len(left)} left and {len(right)} right")
    texts = [[serialize(record) for record in table.values()] for table in (left, right)]
    candidates = block(*texts, encoder, k=min(k, len(right)), progress=matcher.progress)
    ids, records = [list(table) for table in (left, right)], [list(table.values()) for table in (left, right)]
    scores = matcher.predict_proba([(records[0][i], records[1][j]) for i, j, _ in candidates])[:, 1].tolist()
    above = matcher.threshold_ if threshold is None else threshold
    found = [Match(ids[0][i], ids[1][j], score) for (i, j, _), score in zip(candidates, scores, strict=True) if score > above]
    return sorted(found, key=lambda match: -match.score)


def write_matches(path: str | Path, matches: Sequence[Match]) -> None:
    """A CSV file with the columns `left_id`, `right_id` and `score`.

    Args:
        path: the file; it is replaced.
        matches: as `match_tables` returns them.
    """
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Match._fields)
        writer.writerows((left, right, f"{score:.6f}") for left, right, score in matches)


def _rows(path: str | Path, needed: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Rows with their line numbers."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        if missing := [name for name in needed if name not in (reader.fieldnames or ())]:
            found = ", ".join(reader.fieldnames or ["none"])
            raise ValueError(f"{path}: there must be a column {' and '.join(map(repr, missing))}, got {found}")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: there must be {len(reader.fieldnames or ())} cells")
            rows.append((reader.line_num, {name: value.strip() for name, value in row.items()}))
    if not rows:
        raise ValueError(f"{path}: there must be a row below the header")
    return rows
