import math
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import NotFittedError
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer

from firsthand.match.records import DomainKnowledge, TfidfSummarizer, pattern_spans, serialize, serialize_pair

LEFT = "COL title VAL fast joins of large tables COL authors VAL ada lovelace , alan turing COL year VAL 1999"
RIGHT = "COL title VAL joins of tables , fast joins COL venue VAL sigmod"

words = st.text(string.ascii_letters + string.digits + "[]:/.", min_size=1, max_size=8)


def test_serialize_as_in_the_paper():
    assert serialize({"title": "Ditto", "year": 2020}) == "COL title VAL Ditto COL year VAL 2020"
    assert serialize_pair({"a": 1}, "free  text") == ("COL a VAL 1", "free text")


@pytest.mark.parametrize("value", [None, math.nan, {"a": 1}, ["a"], ""])
def test_missing_and_nested_values_are_empty(value):
    assert serialize({"a": value, "b": "x"}) == "COL a VAL COL b VAL x"


@given(st.dictionaries(words, st.lists(st.one_of(words, st.sampled_from(["COL", "VAL", "[SEP]", "[CLS]"]))), min_size=1))
@settings(max_examples=60, deadline=None)
def test_marks_in_values_are_no_marks_in_the_text(record):
    tokens = serialize({name: "  ".join(value) for name, value in record.items()}).split()
    assert tokens.count("COL") == tokens.count("VAL") == len(record)
    assert "[SEP]" not in " ".join(tokens)
    expected = " ".join(f"col {name} val {' '.join(value)}" for name, value in record.items())
    assert " ".join(tokens).lower().split() == expected.lower().split()


@pytest.mark.parametrize(("entry", "message"), [("a [SEP] b", "must not hold the separator"), ({}, "must be a record")])
def test_bad_entry(entry, message):
    with pytest.raises(ValueError, match=message):
        serialize(entry)


# Knowledge


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("COL price VAL $1,999.00", "COL price VAL NUM $1,999.00"),
        ("COL n VAL 3.0 COL m VAL 0800", "COL n VAL 3 COL m VAL 800"),
        ("19.9", "19.90"),
        ("COL model VAL sd-card1 COL x1234567 VAL y", "COL model VAL ID sd-card1 COL x1234567 VAL y"),
        ("16 gb drive", "NUM 16 gb drive"),
        ("nan inf 1e5", "nan inf 1e5"),
        ("12345678901234567890", "12345678901234567890"),
        ("released 6 Jan 2020 , 10:30", "released NUM 6 Jan 2020 , NUM 10:30"),
        ("COL empty VAL COL a VAL b", "COL empty VAL COL a VAL b"),
    ],
)
def test_product_knowledge(text, marked):
    assert DomainKnowledge()(text) == marked


def test_general_knowledge_keeps_kinds_and_takes_a_recogniser():
    assert DomainKnowledge("general")("born 1999-01-02") == "born DATE 1999-01-02"

    def people(text):
        return [(text.index("Ada"), text.index("Ada") + 12, "PERSON")] if "Ada" in text else []

    text = "COL by VAL Ada Lovelace COL year VAL 1999"
    assert DomainKnowledge("general", people)(text) == "COL by VAL PERSON Ada Lovelace COL year VAL 1999"
    assert DomainKnowledge("product", people)(text) == "COL by VAL PRODUCT Ada Lovelace COL year VAL 1999"
    assert DomainKnowledge("general", lambda text: [(0, 1, "CARDINAL")])("7") == "7"


@given(st.lists(words, max_size=12))
@settings(max_examples=60, deadline=None)
def test_knowledge_only_adds_words_and_rewrites_numbers(tokens):
    marked = DomainKnowledge()(" ".join(tokens)).split()
    kept = [word for word in marked if word not in {"NUM", "ID"}]
    originals = [word for word in tokens if word not in {"NUM", "ID"}]
    assert len(kept) == len(originals)
    for word, original in zip(kept, originals, strict=True):
        assert word == original or math.isclose(float(word), float(original), abs_tol=0.01)


def test_spans_are_whole_words():
    text = "a16 gb 16 gb $5 5% 10:30 2020-01-02 x2020"
    assert [text[begin:end] for begin, end, _ in pattern_spans(text)] == ["16 gb", "$5", "5%", "10:30", "2020-01-02"]


def test_bad_knowledge():
    with pytest.raises(ValueError, match="mode must be 'product' or 'general', got 'people'"):
        DomainKnowledge("people")
    with pytest.raises(ValueError, match="spans inside the text of length 2"):
        DomainKnowledge(ner=lambda text: [(0, 9, "PERSON")])("ab")


# Summaries


def test_idf_is_that_of_scikit_learn():
    texts = [LEFT, RIGHT, "COL title VAL other things"]
    peer = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)\b\w+\b").fit(texts)
    expected = dict(zip(peer.get_feature_names_out(), peer.idf_, strict=True))
    summarizer = TfidfSummarizer().fit(texts)
    assert summarizer.idf_ == pytest.approx(expected)
    assert summarizer.unseen_ == pytest.approx(np.log((1 + 3) / (1 + 0)) + 1)


def test_ample_budget_keeps_the_first_of_each_word_in_order():
    left, right = TfidfSummarizer().fit([LEFT, RIGHT]).summarize_pair(LEFT, RIGHT, 1000)
    assert left == "COL title VAL fast joins large tables COL authors VAL ada lovelace alan turing COL year VAL 1999"
    assert right == "COL title VAL joins tables fast COL venue VAL sigmod"


@pytest.mark.parametrize("budget", [4, 7, 9, 12])
@pytest.mark.parametrize("length_fn", [None, len])
def test_budget_is_kept_and_heavier_words_come_first(budget, length_fn):
    summarizer = TfidfSummarizer(length_fn=length_fn).fit([LEFT, RIGHT, RIGHT.replace("sigmod", "vldb")])
    count = length_fn or (lambda word: 1)
    _, right = summarizer.summarize_pair(LEFT, RIGHT, budget)
    tokens = right.split()
    marks = [token for token in tokens if token in ("COL", "VAL")]
    kept = [token for token in tokens if token not in ("COL", "VAL")]
    assert marks == ["COL", "VAL", "COL", "VAL"]
    assert len(marks) + sum(map(count, kept)) <= max(budget, 4)
    counts = {word: (LEFT + " " + RIGHT).split().count(word) for word in RIGHT.split()}
    weight = {word: counts[word] * summarizer.idf_.get(word, 0.0) for word in counts if word not in ENGLISH_STOP_WORDS}
    dropped = [weight[word] for word in weight if word not in kept and word not in ("COL", "VAL", ",")]
    assert not kept or not dropped or min(weight[word] for word in kept) >= max(dropped) - 1e-9


def test_case_punctuation_hyphens_and_unseen_words_count():
    summarizer = TfidfSummarizer().fit(["COL a VAL data base", "COL a VAL data store"])
    assert summarizer.summarize_pair("Data, the Data-Base Zeppelin", "x", 10)[0] == "Data, Data-Base Zeppelin"
    assert summarizer.summarize_pair("data Zeppelin", "x", 1)[0] == "Zeppelin"


def test_lengths_are_asked_once():
    asked = []
    summarizer = TfidfSummarizer(length_fn=lambda word: asked.append(word) or 1).fit([LEFT, RIGHT])
    for _ in range(3):
        summarizer.summarize_pair(LEFT, RIGHT, 50)
    assert len(asked) == len(set(asked))


def test_bad_summaries():
    with pytest.raises(NotFittedError):
        TfidfSummarizer().summarize_pair(LEFT, RIGHT, 10)
    with pytest.raises(ValueError, match="max_len must be at least 1"):
        TfidfSummarizer().fit([LEFT]).summarize_pair(LEFT, RIGHT, 0)
    with pytest.raises(ValueError, match="empty vocabulary"):
        TfidfSummarizer().fit(["the of"])
