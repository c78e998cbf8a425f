"""What every method of the catalogue must be. One suite holds them together."""

import importlib
import inspect
import json
import re
import warnings
from pathlib import Path

import pytest

import firsthand
from firsthand import catalogue
from firsthand.harness.published import is_stale, published
from firsthand.harness.study import load_study
from firsthand.harness.worker import Finished, Work, run_seed

PACKAGE = Path(firsthand.__file__).parent
CARDS = catalogue.cards()
CHANGES = {"loss", "layer", "weights", "data", "decoding", "training", "metric", "system"}
EXTRAS = {"hf", "embed", "distill", "studies", "ray"}

every_card = pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
every_api = pytest.mark.parametrize("name", [name for card in CARDS.values() for name in card.api])
quietly = pytest.mark.filterwarnings("ignore")  # what host libraries warn of in a snippet or a study is theirs


def resolve(name):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def test_the_catalogue_is_not_empty():
    assert len(CARDS) >= 5


@every_card
def test_card(card):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.slug)
    assert (PACKAGE / "cards" / f"{card.slug}.md").is_file()
    assert (PACKAGE / card.area).is_dir()
    assert card.changes in CHANGES
    assert set(card.extras) <= EXTRAS
    assert card.api
    assert not card.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
    for part in ("**Reach for it when**", "**Costs**", "## How it works", "## Use it", "## Where we depart from the paper"):
        assert part in card.body, f"the card has no {part}"
    assert "What we found" not in card.body, "that part is generated from the evidence"


@every_card
def test_files_are_where_they_are_looked_for(card):
    module = card.slug.replace("-", "_")
    assert (PACKAGE / "studies" / f"{module}.py").is_file()
    assert (PACKAGE.parents[1] / "tests" / card.area / f"test_{module}.py").is_file()
    assert all(name.startswith(f"firsthand.{card.area}.") for name in card.api)


@every_api
def test_api_is_documented_and_typed(name):
    thing = resolve(name)
    doc = inspect.getdoc(thing) or ""
    assert len(doc.splitlines()) > 3, f"{name} has no docstring to speak of"
    assert doc.splitlines()[0].endswith((".", "?")), f"{name}: the first line is a sentence"
    function = thing.__init__ if inspect.isclass(thing) else thing
    if inspect.isclass(thing) and thing.__init__ is object.__init__:
        return
    signature = inspect.signature(function)
    untyped = [
        p.name
        for p in signature.parameters.values()
        if p.name != "self" and p.annotation is p.empty and p.kind not in (p.VAR_KEYWORD,)
    ]
    assert not untyped, f"{name}: no type for {', '.join(untyped)}"
    if not inspect.isclass(thing):
        assert signature.return_annotation is not signature.empty, f"{name}: no return type"


@every_card
def test_a_source_is_named(card):
    module = inspect.getmodule(resolve(card.api[0]))  # not always the slug's: variations of one thing share a module
    assert module.__name__.startswith(f"firsthand.{card.area}.")
    words = inspect.getsource(module)
    assert "Source:" in words
    assert not card.arxiv or card.arxiv in words


@quietly
@every_card
def test_snippet_runs(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", card.body, re.DOTALL)
    assert snippets, "the card shows no use"
    for snippet in snippets:
        exec(compile(snippet, f"{card.slug}.md", "exec"), {"__name__": "snippet"})


@quietly
@every_card
def test_smoke_study_runs_and_a_seed_gives_the_same_numbers_again(card):
    study = load_study(card.slug)
    assert study.method == card.slug
    assert study.question.endswith("?"), "the study's docstring begins with its question"
    assert study.data, "a study names its data, or says that they are generated"
    work = Work(card.slug, seed=1, arms=tuple(study.arms), smoke=True, data=study.fallback or study.data)

    def go():
        records = [event.record for event in run_seed(work) if isinstance(event, Finished)]
        assert [r["error"] for r in records if r["status"] != "ok"] == [], records[-1]["traceback"]
        return {record["arm"]: (record["metrics"], record["curves"]) for record in records}

    first = go()
    assert set(study.arms) <= set(first)
    assert json.dumps(first) == json.dumps(go())


@every_card
def test_evidence_is_there_whole_and_of_this_code(card):
    evidence = published()[card.slug]
    study = load_study(card.slug)
    assert evidence["schema"] == 1
    assert min(evidence["seeds"]) >= 1000
    assert len(evidence["seeds"]) >= study.seeds
    assert not evidence["smoke"]
    assert evidence["failures"] == []
    assert evidence["arms"] == list(study.arms)
    assert [claim["text"] for claim in evidence["claims"]] == [claim.text for claim in study.claims]
    assert [claim["primary"] for claim in evidence["claims"]] == [True] + [False] * len(study.also)
    for claim in evidence["claims"]:
        assert set(claim["effects"]) == {str(seed) for seed in evidence["seeds"]}
        assert claim["verdict"] in {"reproduced", "contradicted", "inconclusive"}
    assert set(evidence["costs"]) >= set(study.arms)
    assert not is_stale(evidence), "the code has changed since: make evidence"


def test_no_evidence_without_a_card():
    assert set(published()) <= set(CARDS)


@pytest.mark.parametrize("area", sorted({card.area for card in CARDS.values()}))
def test_what_an_area_exports_is_there(area):
    package = importlib.import_module(f"firsthand.{area}")
    assert package.__all__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in package.__all__:
            assert getattr(package, name) is not None
