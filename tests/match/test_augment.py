from collections import Counter

import numpy as np
import pytest

from firsthand.match.augment import OPERATORS, ditto_augment

PAIR = "COL title VAL fast joins of tables COL year VAL 1999 [SEP] COL title VAL quick joins COL venue VAL COL year VAL 99"
MARKS = ("COL", "VAL", "[SEP]")
SEEDS = range(60)


def counts(text):
    return Counter(text.split())


def marks(text):
    return [token for token in text.split() if token in MARKS]


def test_span_delete_removes_one_or_two_words_side_by_side():
    tokens = PAIR.split()
    seen = set()
    for seed in SEEDS:
        out = ditto_augment(PAIR, "span_delete", swap_sides=False, rng=seed).split()
        gone = len(tokens) - len(out)
        at = next((place for place, (a, b) in enumerate(zip(tokens, out, strict=False)) if a != b), len(out))
        assert gone in (1, 2)
        assert tokens[:at] + tokens[at + gone :] == out
        assert not set(tokens[at : at + gone]) & set(MARKS)
        seen.add(gone)
    assert seen == {1, 2}


def test_span_shuffle_keeps_every_word_and_mark_in_its_segment():
    outs = {ditto_augment(PAIR, "span_shuffle", swap_sides=False, rng=seed) for seed in SEEDS}
    assert len(outs) > 3
    for out in outs:
        assert marks(out) == marks(PAIR)
        segments = [
            [Counter(part.split()) for part in text.replace("[SEP]", "COL").replace("VAL", "COL").split("COL")]
            for text in (out, PAIR)
        ]
        assert segments[0] == segments[1]


def attributes(text):
    return [tuple(part.split()) for side in text.split("[SEP]") for part in side.split("COL")[1:]]


def test_attribute_delete_removes_one_short_attribute():
    for seed in SEEDS:
        before, after = (
            Counter(attributes(text)) for text in (PAIR, ditto_augment(PAIR, "attribute_delete", swap_sides=False, rng=seed))
        )
        gone = before - after
        assert sum(gone.values()) == 1
        assert not after - before
    long = "COL a VAL " + "w " * 6 + "[SEP] COL b VAL " + "w " * 6
    assert ditto_augment(long, "attribute_delete", swap_sides=False, rng=0) == " ".join(long.split())


def test_attribute_append_moves_a_value_of_the_first_record():
    outs = {ditto_augment(PAIR, "attribute_append", swap_sides=False, rng=seed) for seed in SEEDS}
    right = PAIR.split("[SEP]")[1]
    assert outs == {
        f"COL year VAL 1999 fast joins of tables [SEP]{right}",
        f"COL title VAL fast joins of tables 1999 [SEP]{right}",
    }


def test_entry_swap_twice_is_nothing():
    once = ditto_augment(PAIR, "entry_swap", rng=0)
    assert once == " [SEP] ".join(reversed(PAIR.split(" [SEP] ")))
    assert ditto_augment(once, "entry_swap", rng=1) == PAIR


@pytest.mark.parametrize("op", ["all", *OPERATORS])
def test_seeded_and_never_adds_a_word(op):
    for seed in SEEDS:
        out = ditto_augment(PAIR, op, rng=seed)
        assert out == ditto_augment(PAIR, op, rng=np.random.default_rng(seed))
        assert counts(out) <= counts(PAIR)
        assert out.split().count("[SEP]") == 1


def test_all_changes_what_comes_before_a_deletion_too():
    """After a deletion, words on both sides of it can still be deleted."""
    gone = Counter()
    for seed in range(400):
        out = ditto_augment("a b c d e [SEP] z", "all", swap_sides=False, rng=seed)
        if len(out.split()) <= 4:
            gone.update(set("abcde") - set(out))
    assert set(gone) == set("abcde")
    assert max(gone.values()) < 2 * min(gone.values())


@pytest.mark.parametrize("op", ["span_delete", "span_shuffle", "attribute_delete", "attribute_append", "all"])
def test_nothing_to_change(op):
    assert ditto_augment(" [SEP] ", op, rng=0).split() == ["[SEP]"]
    assert ditto_augment("COL VAL [SEP] COL VAL", "span_delete", rng=0) == "COL VAL [SEP] COL VAL"


def test_sides_are_swapped_half_of_the_time():
    swapped = [ditto_augment("a [SEP] b", "attribute_append", rng=seed) == "b [SEP] a" for seed in range(400)]
    assert np.mean(swapped) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("text", ["a b", "a [SEP] b [SEP] c"])
def test_not_one_separator(text):
    with pytest.raises(ValueError, match="pair_text must hold"):
        ditto_augment(text)


def test_unknown_operator():
    with pytest.raises(ValueError, match=r"op must be 'all' or one of span_delete.*got 'swap'"):
        ditto_augment(PAIR, "swap")
