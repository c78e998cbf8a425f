"""Records as text: writing them out, marking what is known of them, and shortening them."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.utils.validation import check_is_fitted

Record = Mapping[str, Any] | str
Spans = Sequence[tuple[int, int, str]]  # begin, end, kind

SEPARATOR = " [SEP] "
_WORD = r"(?u)\b\w+\b"
_RESERVED = re.compile(r"(?<!\S)(COL|VAL)(?!\S)|\[(CLS|SEP|PAD|UNK|MASK)\]")


def serialize(entry: Record) -> str:
    """A record as text: `COL name VAL value` for each attribute, in order.

    `{"title": "Ditto", "year": 2020}` becomes `"COL title VAL Ditto COL year VAL 2020"`. Missing values (None, NaN) and nested
    ones become empty. What would be taken for a mark (the words COL and VAL, `[SEP]` and its like) is put in lower case.

    Args:
        entry: attribute -> value, or a text that is left as it is.

    Returns:
        The text, with single spaces between words.

    Raises:
        ValueError: `entry` is neither, or has no attribute, or is a text with `[SEP]` in it.

    Source:
        Li et al., "Deep Entity Matching with Pre-Trained Language Models", 2020, arXiv 2004.00584, section 2. Escaping is ours.
    """
    if isinstance(entry, str):
        if SEPARATOR.strip() in entry:
            raise ValueError(f"entry must not hold the separator {SEPARATOR.strip()!r}, got {_short(entry)}")
        return " ".join(entry.split())
    if not isinstance(entry, Mapping) or not entry:
        raise ValueError(f"entry must be a record (a dict of at least one attribute) or a text, got {_short(entry)}")
    return " ".join(f"COL {_plain(name)} VAL {_plain(value)}".rstrip() for name, value in entry.items())


def serialize_pair(left: Record, right: Record) -> tuple[str, str]:
    """Two records as texts, see `serialize`.

    A tokenizer takes them as a pair; `SEPARATOR.join(...)` of them is what `ditto_augment` takes.

    Args:
        left: the first record.
        right: the second.
    """
    return serialize(left), serialize(right)


def _plain(value: Any) -> str:
    missing = value is None or isinstance(value, (Mapping, list, tuple, set)) or (isinstance(value, float) and math.isnan(value))
    return "" if missing else " ".join(_RESERVED.sub(lambda found: found[0].lower(), str(value)).split())


def _short(value: object) -> str:
    words = repr(value)
    return words if len(words) <= 80 else words[:80] + "..."


class DomainKnowledge:
    """Marks spans of a text with their kind, and writes numbers in one way.

    A span that is named gets the kind before it: `6 Jan 2020` becomes `NUM 6 Jan 2020` in mode `"product"`. Any other word of at
    least 7 characters with a digit among them gets `ID`. Integers lose leading zeros and `.0`, other numbers get two decimals.
    `COL`, `VAL` and the names of attributes are left alone.

    Args:
        mode: `"product"`: people, places and products are `PRODUCT`; dates, times, quantities, percentages and sums of money
            `NUM`. `"general"`: PERSON, ORG, LOC, PRODUCT, DATE, QUANTITY and TIME keep their names.
        ner: from a value to spans `(begin, end, kind)` with the kinds of OntoNotes (those of spaCy), for example
            `lambda text: [(e.start_char, e.end_char, e.label_) for e in nlp(text).ents]`. By default `pattern_spans`.

    Raises:
        ValueError: an unknown `mode`; when called, spans out of the text.

    Source:
        arXiv 2004.00584, section 3.1 (domain knowledge), and the authors' code. Ours: spans by regular expressions where there
        is no `ner`; names of attributes are spared; integers of any length stay exact (the code goes through floats).
    """

    def __init__(self, mode: str = "product", ner: Callable[[str], Spans] | None = None) -> None:
        if mode not in _KINDS:
            raise ValueError(f"mode must be 'product' or 'general', got {mode!r}")
        self.mode = mode
        self.ner = ner

    def __call__(self, text: str) -> str:
        """A text of `serialize`, or any other, with its values marked."""
        parts = re.split(r"((?:^|(?<= ))COL .*?(?<= )VAL(?: |$))", text)
        return " ".join(" ".join(part if place % 2 else self._mark(part) for place, part in enumerate(parts)).split())

    def _mark(self, value: str) -> str:
        kinds = _KINDS[self.mode]
        begins: dict[int, str] = {}
        covered: set[int] = set()
        for begin, end, kind in (self.ner or pattern_spans)(value):
            if not 0 <= begin < end <= len(value):
                raise ValueError(f"ner must return spans inside the text of length {len(value)}, got {(begin, end, kind)}")
            if kind in kinds:
                begins[begin] = kinds[kind]
                covered.update(range(begin, end))
        words = []
        for word in re.finditer(r"\S+", value):
            kind = next((begins[at] for at in range(*word.span()) if at in begins), None)
            if kind is None and covered.isdisjoint(range(*word.span())) and not _NUMBER.fullmatch(word[0]):
                kind = "ID" if len(word[0]) >= 7 and any(map(str.isdigit, word[0])) else None
            words += [kind] * (kind is not None) + [_number(word[0])]
        return " ".join(words)


_NUMERIC = ("DATE", "QUANTITY", "TIME", "PERCENT", "MONEY")
_KINDS = {
    "product": dict.fromkeys(("NORP", "GPE", "LOC", "PERSON", "PRODUCT"), "PRODUCT") | dict.fromkeys(_NUMERIC, "NUM"),
    "general": {kind: kind for kind in ("PERSON", "ORG", "LOC", "PRODUCT", "DATE", "QUANTITY", "TIME")},
}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)
_MONTH = "(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*"
_PATTERNS = re.compile(
    rf"""
    (?P<MONEY>[$€£]\s?\d[\d,]*(?:\.\d+)?)
  | (?P<PERCENT>\d+(?:\.\d+)?\s?%)
  | (?P<TIME>\d{{1,2}}:\d{{2}}(?::\d{{2}})?(?:\s?[ap]m)?)
  | (?P<DATE>\d{{4}}-\d{{1,2}}-\d{{1,2}} | \d{{1,2}}/\d{{1,2}}/(?:\d{{4}}|\d{{2}})
      | (?:19|20)\d{{2}}(?:0[1-9]|1[0-2])(?:[0-2]\d|3[01])
      | \d{{1,2}}\s{_MONTH}\s\d{{4}} | {_MONTH}\s(?:\d{{1,2}},?\s)?\d{{4}} | (?:19|20)\d{{2}})
  | (?P<QUANTITY>\d+(?:\.\d+)?\s?(?:[kmgt]b|[mg]?hz|mp|mm|cm|km|m|inch(?:es)?|in|ft|kg|g|lbs?|oz|ml|l|w|watts?|v|volts?|mah))
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def pattern_spans(text: str) -> list[tuple[int, int, str]]:
    """Sums of money, percentages, times, dates and quantities, found by regular expressions.

    A stand-in for named-entity recognition that needs no model: it knows no names of people, places or products.

    Args:
        text: any.

    Returns:
        Spans `(begin, end, kind)` of whole words, in order.
    """
    spans = []
    at = 0
    while found := _PATTERNS.search(text, at):
        begin, end = found.span()
        whole = (begin == 0 or text[begin - 1] in " (,;") and (end == len(text) or text[end] in " ),;.")
        if whole:
            spans.append((begin, end, str(found.lastgroup)))
        at = end if whole else begin + 1
    return spans


def _number(word: str) -> str:
    if not _NUMBER.fullmatch(word):
        return word
    whole, _, decimals = word.partition(".")
    return f"{float(word):.2f}" if decimals.strip("0") else str(int(whole))


class TfidfSummarizer(BaseEstimator):
    """Shortens records to their most telling words.

    A word weighs the times it occurs in the pair of records, times its inverse document frequency. Of the distinct words of a
    record, the heaviest are kept until the next one would exceed the budget. The first occurrence of each stays in its place, and
    so do `COL` and `VAL`; the names of attributes are words like others.

    Args:
        stop_words: never kept; scikit-learn's English ones by default.
        length_fn: how many tokens of the language model a word takes, such as `lambda word: len(tokenizer.tokenize(word))`; 1 by
            default. It is asked once for each word.

    Attributes:
        idf_: word in lower case -> inverse document frequency, as scikit-learn's `TfidfVectorizer` computes it.
        unseen_: that of a word in no record: what its formula gives for a document frequency of 0.

    Source:
        arXiv 2004.00584, section 3.2 (summarisation), and the authors' code. Their code looks each word up as it stands in a
        vocabulary in lower case, so capitalised words and words beside a comma are lost; here case and punctuation do not
        matter, and the heaviest part of a hyphenated word counts. Single characters are words too: house numbers tell much.
        Words that `fit` has not seen are not lost either; names seldom are among the records at hand.
    """

    def __init__(self, stop_words: Collection[str] = ENGLISH_STOP_WORDS, length_fn: Callable[[str], int] | None = None) -> None:
        self.stop_words = stop_words
        self.length_fn = length_fn

    def fit(self, texts: Iterable[str], y: None = None) -> "TfidfSummarizer":
        """Learn the frequencies from all records, serialised; labels are not needed, so those to be matched may be among them.

        Raises:
            ValueError: there is no word in them but stop words.
        """
        vectorizer = TfidfVectorizer(stop_words=sorted(self.stop_words) or None, token_pattern=_WORD)
        records = list(texts)
        vectorizer.fit(records)
        self.idf_ = dict(zip(vectorizer.get_feature_names_out().tolist(), vectorizer.idf_.tolist(), strict=True))
        self.unseen_ = 1 + math.log(1 + len(records))
        return self

    def summarize_pair(self, left: str, right: str, max_len: int) -> tuple[str, str]:
        """Both texts of a pair, each within `max_len` tokens as `length_fn` counts them.

        Raises:
            ValueError: `max_len` is below 1.
            NotFittedError: before `fit`.
        """
        check_is_fitted(self)
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        words = left.split(), right.split()
        counts = Counter(words[0] + words[1])
        return self._shorten(words[0], counts, max_len), self._shorten(words[1], counts, max_len)

    def _shorten(self, words: list[str], counts: Counter[str], max_len: int) -> str:
        marks = ("COL", "VAL")
        weights = {word: counts[word] * self._idf(word) for word in dict.fromkeys(words) if word not in marks}
        left = max_len - sum(word in marks for word in words)
        kept = set()
        for word in sorted((word for word, weight in weights.items() if weight > 0), key=lambda word: -weights[word]):
            left -= self._length(word)
            if left < 0:
                break
            kept.add(word)
        short = []
        for word in words:
            if word in marks or word in kept:
                short.append(word)
                kept.discard(word)
        return " ".join(short)

    def _idf(self, word: str) -> float:
        parts = [part for part in re.findall(_WORD, word.lower()) if part not in self.stop_words]
        return max((self.idf_.get(part, self.unseen_) for part in parts), default=0.0)

    def _length(self, word: str) -> int:
        if self.length_fn is None:
            return 1
        lengths = self.__dict__.setdefault("_lengths", {})
        if word not in lengths:
            lengths[word] = self.length_fn(word)
        return int(lengths[word])
