"""Which rows of two CSV files are the same thing? Writes a file of matches with scores.

Two steps. First write pairs that are worth labelling, and fill in their column `label` (1: the same, 0: not):

    python match_two_tables.py left.csv right.csv --to-label pairs.csv

Then train on these, and match:

    python match_two_tables.py left.csv right.csv --labels pairs.csv --matches matches.csv

Both files need a column that tells rows apart (`--id`, by default `id`); the other columns may differ between the files.
`matches.csv` has the columns left_id, right_id and score. A trained matcher that was kept with `--save FOLDER` is used again with
`--load FOLDER` in place of `--labels`.
"""

import argparse
import csv
import random

from firsthand.match.blocking import block
from firsthand.match.matcher import DittoMatcher
from firsthand.match.records import DomainKnowledge, serialize
from firsthand.match.tables import match_tables, read_labels, read_records, write_matches


def main() -> None:
    options = arguments()
    left, right = read_records(options.left, options.id), read_records(options.right, options.id)
    if options.to_label:
        write_pairs_to_label(options.to_label, left, right, options.pairs, min(3, len(right)))
        print(f"wrote {options.to_label}: fill in its column label, then come back with --labels")
        return
    if options.load:
        matcher = DittoMatcher.load(options.load)
    else:
        matcher = DittoMatcher(
            options.model, max_len=options.max_len, epochs=options.epochs, batch_size=16, learning_rate=options.learning_rate,
            op="all", knowledge=DomainKnowledge("general"),
        )  # fmt: skip
        matcher.fit(*read_labels(options.labels, left, right))
        print(f"F1 on pairs set aside: {max(matcher.validation_f1_):.3f}, threshold {matcher.threshold_:.2f}")
    if options.save:
        matcher.save(options.save)
    matches = match_tables(matcher, left, right, k=options.k)
    write_matches(options.matches, matches)
    print(f"{len(left)} x {len(right)} records: {len(matches)} matches in {options.matches}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("left")
    parser.add_argument("right")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--to-label", metavar="CSV", help="write pairs to label, and stop")
    what.add_argument("--labels", metavar="CSV", help="train on these")
    what.add_argument("--load", metavar="FOLDER", help="a matcher that was saved")
    parser.add_argument("--matches", metavar="CSV", default="matches.csv")
    parser.add_argument("--save", metavar="FOLDER", help="keep the trained matcher")
    parser.add_argument("--id", default="id", help="the column that tells rows apart")
    parser.add_argument("--pairs", type=int, default=300, help="how many pairs to label")
    parser.add_argument("--k", type=int, default=10, help="candidates for each left row")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="an encoder, by name or folder")
    parser.add_argument("--max-len", type=int, default=256, help="tokens of a pair")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    return parser.parse_args()


def write_pairs_to_label(path: str, left: dict, right: dict, how_many: int, k: int) -> None:
    """A random part of the candidates, with the records beside their ids so that a person can tell."""
    ids = list(left), list(right)
    candidates = block([serialize(record) for record in left.values()], [serialize(record) for record in right.values()], k=k)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["left_id", "right_id", "label", "left", "right"])
        for i, j, _ in random.Random(0).sample(candidates, min(how_many, len(candidates))):
            a, b = ids[0][i], ids[1][j]
            writer.writerow([a, b, "", *(" | ".join(record.values()) for record in (left[a], right[b]))])


if __name__ == "__main__":
    main()
