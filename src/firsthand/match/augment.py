"""Ditto's augmentations: small changes to the text of a pair of records that seldom change whether they match."""

from itertools import pairwise

import numpy as np

from firsthand.match.records import SEPARATOR

Tokens = list[str]
OPERATORS = ("span_delete", "span_shuffle", "attribute_delete", "attribute_append", "entry_swap")
_MARKS = {"COL", "VAL", "[SEP]", "[CLS]"}
_ROUNDS = 3  # operators that "all" applies
_LONGEST = 8  # tokens of an attribute that may be deleted, with COL and VAL


def ditto_augment(
    pair_text: str, op: str = "all", *, swap_sides: bool = True, rng: np.random.Generator | int | None = None
) -> str:
    """A changed copy of a pair's text.

    Spans are of words other than COL, VAL and `[SEP]`, and never reach across one of these. Where an operator finds nothing to
    change, the text stays as it is.

    | op | what it does |
    |---|---|
    | `"span_delete"` | removes 1 or 2 words that stand side by side |
    | `"span_shuffle"` | shuffles 2 to 4 words that stand side by side |
    | `"attribute_delete"` | removes an attribute of at most 8 words, COL and VAL counted |
    | `"attribute_append"` | moves an attribute's value to the end of another one of the first record |
    | `"entry_swap"` | exchanges the records |
    | `"all"` | three of the first four, drawn with replacement, one after the other |

    Args:
        pair_text: two records in the form of `serialize` with `" [SEP] "` between them.
        op: the operator.
        swap_sides: before each operator, exchange the records with probability one half.
        rng: a generator, or a seed.

    Raises:
        ValueError: an unknown `op`, or not exactly one separator in `pair_text`.

    Source:
        Li et al., "Deep Entity Matching with Pre-Trained Language Models", 2020, arXiv 2004.00584, section 3.3, with the sizes
        of the authors' code. Its `"all"` confuses words with labels after a deletion, so that later operators spare what
        comes before it; here they do not. The words of an attribute's name may change like others, as in the code.
    """
    if op != "all" and op not in OPERATORS:
        raise ValueError(f"op must be 'all' or one of {', '.join(OPERATORS)}, got {op!r}")
    left, right = split_pair(pair_text)
    rng = np.random.default_rng(rng)
    if op == "entry_swap":
        return SEPARATOR.join((right, left))
    sides = left.split(), right.split()
    for name in rng.choice(OPERATORS[:4], size=_ROUNDS).tolist() if op == "all" else [op]:
        if swap_sides and rng.random() < 0.5:
            sides = sides[::-1]
        sides = _APPLY[name](*sides, rng)
    return SEPARATOR.join(" ".join(side) for side in sides)


def split_pair(pair_text: str) -> tuple[str, str]:
    """The two texts of a pair, or a `ValueError` where there is not exactly one separator."""
    tokens = pair_text.split()
    mark = SEPARATOR.strip()
    if tokens.count(mark) != 1:
        raise ValueError(f"pair_text must hold {mark!r} once, between the records, got it {tokens.count(mark)} times")
    at = tokens.index(mark)
    return " ".join(tokens[:at]), " ".join(tokens[at + 1 :])


def _spans(tokens: Tokens, shortest: int, longest: int) -> list[slice]:
    found = []
    for begin in range(len(tokens)):
        for end in range(begin + 1, min(begin + longest, len(tokens)) + 1):
            if tokens[end - 1] in _MARKS:
                break
            if end - begin >= shortest:
                found.append(slice(begin, end))
    return found


def _attributes(tokens: Tokens) -> list[slice]:
    begins = [place for place, token in enumerate(tokens) if token == "COL"]
    return [slice(begin, end) for begin, end in pairwise([*begins, len(tokens)])]


def _draw(left: list[slice], right: list[slice], rng: np.random.Generator) -> tuple[int, slice] | None:
    """A side and one of its spans, all equally likely; None if there is none."""
    if not left and not right:
        return None
    at = int(rng.integers(len(left) + len(right)))
    return (0, left[at]) if at < len(left) else (1, right[at - len(left)])


def _change(left: Tokens, right: Tokens, side: int, span: slice, new: Tokens) -> tuple[Tokens, Tokens]:
    sides = [left, right]
    sides[side] = sides[side][: span.start] + new + sides[side][span.stop :]
    return sides[0], sides[1]


def _span_delete(left: Tokens, right: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    drawn = _draw(_spans(left, 1, 2), _spans(right, 1, 2), rng)
    return _change(left, right, *drawn, []) if drawn else (left, right)


def _span_shuffle(left: Tokens, right: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    drawn = _draw(_spans(left, 2, 4), _spans(right, 2, 4), rng)
    if drawn is None:
        return left, right
    words = (left, right)[drawn[0]][drawn[1]]
    return _change(left, right, *drawn, [words[at] for at in rng.permutation(len(words))])


def _attribute_delete(left: Tokens, right: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    short = [[span for span in _attributes(side) if span.stop - span.start <= _LONGEST] for side in (left, right)]
    drawn = _draw(*short, rng)
    return _change(left, right, *drawn, []) if drawn else (left, right)


def _attribute_append(left: Tokens, right: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    attributes = _attributes(left)
    if len(attributes) < 2:
        return left, right
    cut, keep = rng.choice(len(attributes), size=2, replace=False)
    moved = left[attributes[cut]]
    value = moved[moved.index("VAL") + 1 :] if "VAL" in moved else []
    pieces = [left[: attributes[0].start]]
    for number, span in enumerate(attributes):
        if number != cut:
            pieces.append(left[span] + (value if number == keep else []))
    return [token for piece in pieces for token in piece], right


_APPLY = {
    "span_delete": _span_delete,
    "span_shuffle": _span_shuffle,
    "attribute_delete": _attribute_delete,
    "attribute_append": _attribute_append,
}
