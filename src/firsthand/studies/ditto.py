"""With few labels, does Ditto with all its options find more matches than the same language model fine-tuned plainly?

People in two tables (Febrl), with typing errors, lost values and values in the wrong column; candidates are the nearest by
trigrams, so that most are hard. Further tables: restaurants of two guides, papers of two bibliographies. The language model is a
two-layer BERT that `pretrain` trains once to compare pieces of docstrings. With the fallback data, people are made up.
"""

import hashlib
import inspect
import os
import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support
from torch import nn

from firsthand import Study, Trial, beats, data, holds
from firsthand.match.blocking import block
from firsthand.match.ditto import DittoModel, best_f1_threshold
from firsthand.match.matcher import DittoMatcher
from firsthand.match.records import DomainKnowledge, TfidfSummarizer, serialize
from firsthand.testbeds import embedding

Person = dict[str, str]
Pair = tuple[dict[str, str], dict[str, str], int]  # left, right, whether they are the same
COLUMNS = {"given_name": "given", "surname": "surname", "address_1": "street", "suburb": "suburb", "date_of_birth": "born"}
SIZES = {"hidden": 128, "layers": 2, "heads": 4, "context": 128}
LETTERS = string.ascii_lowercase + string.digits


@dataclass(frozen=True)
class Task:
    """Pairs to learn from, to choose threshold and epoch with, and to be tested on; and all records, without labels."""

    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    records: list[dict[str, str]]


@dataclass(frozen=True)
class Setting:
    tasks: dict[str, Task]
    tokenizer: Any
    trained: Any  # the language model
    untrained: Any  # what it was before


def prepare(trial: Trial) -> Setting:
    sentences = [pair["sentence"].lower() for pair in data.load("docstrings")]
    if trial.smoke:
        sentences = sentences[:300]
    tokenizer = embedding.tokenizer(sentences, 500 if trial.smoke else 3000)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # which record a token is of
    sizes = {**SIZES, "hidden": 16, "layers": 1, "heads": 2} if trial.smoke else SIZES
    untrained = initial(len(tokenizer), sizes)
    trained = pretrained(untrained, tokenizer, sentences, trial)
    return Setting(tasks(trial), tokenizer, trained, untrained)


# Tables


def tasks(trial: Trial) -> dict[str, Task]:
    real = "febrl4" in trial.data
    count, parts = (60, (24, 12, 24)) if trial.smoke else (1500, (200, 60, 600))
    found = {"people": people(*(febrl if real else made_up)(count, trial.rng), parts, trial.rng)}
    if real:
        parts = (16, 12, 20) if trial.smoke else (100, 60, 240)
        found["restaurants"] = labelled(data.load("fodors-zagat"), parts, trial.rng)
        found["papers"] = labelled(data.load("dblp-acm"), parts, trial.rng)
    return found


def febrl(count: int, rng: np.random.Generator) -> tuple[list[Person], list[Person]]:
    """The same people in two tables."""
    tables = data.load("febrl4")
    sides = [{record["rec_id"]: record for record in tables[side]} for side in ("left", "right")]
    drawn = [tables["matches"][row] for row in rng.permutation(len(tables["matches"]))[:count]]
    left, right = (
        [{name: side[pair[at]][column] for column, name in COLUMNS.items()} for pair in drawn] for at, side in enumerate(sides)
    )
    return left, right


def made_up(count: int, rng: np.random.Generator) -> tuple[list[Person], list[Person]]:
    """People as Febrl's generator makes them: values drawn from lists, and copies with errors, swaps and gaps."""
    words = sorted(
        {w for pair in data.load("docstrings") for w in pair["sentence"].lower().split() if w.isalpha() and len(w) > 3}
    )
    lists = dict(zip(COLUMNS.values(), (rng.choice(words, size) for size in (200, 400, 400, 200)), strict=False))
    left, right = [], []
    for _ in range(count):
        person = {name: str(rng.choice(values)) for name, values in lists.items()}
        person["born"] = f"{rng.integers(1900, 2000)}{rng.integers(1, 13):02}{rng.integers(1, 29):02}"
        copy = dict(person)
        for name in rng.choice(list(copy), 2):  # two errors
            copy[name] = typo(copy[name], rng) if rng.random() < 0.8 else ""
        if rng.random() < 0.1:
            copy["given"], copy["surname"] = copy["surname"], copy["given"]
        left.append(person)
        right.append(copy)
    return left, right


def people(left: list[Person], right: list[Person], parts: Sequence[int], rng: np.random.Generator) -> Task:
    """Each person's three nearest in the other table, once both are dirty. A person on the left is in one part only."""
    left, right = ([dirty(person, rng) for person in side] for side in (left, right))
    nearest: list[list[int]] = [[] for _ in left]
    for i, j, _ in block([serialize(p) for p in left], [serialize(p) for p in right], k=3, progress=False):
        nearest[i].append(j)
    rows = iter(rng.permutation(len(left)).tolist())
    made: list[list[Pair]] = []
    for size in parts:
        pairs: list[Pair] = []
        while len(pairs) < size:
            i = next(rows)
            pairs += [(left[i], right[j], int(i == j)) for j in nearest[i]]
        made.append(pairs[:size])
    return Task(*made, [*left, *right])


def dirty(person: Person, rng: np.random.Generator) -> Person:
    """A fifth of the values lost, and half of the others moved to the end of a random column."""
    values: dict[str, list[str]] = {name: [] for name in person}
    for name, value in person.items():
        if rng.random() >= 0.2:
            values[str(rng.choice(list(person))) if rng.random() < 0.5 else name].append(value)
    return {name: " ".join(filter(None, parts)) for name, parts in values.items()}


def labelled(tables: dict[str, Any], parts: Sequence[int], rng: np.random.Generator) -> Task:
    """The pairs that the tables come with, at random into parts; the test gets at most what is left."""
    sides = [
        {record["id"]: {k: v for k, v in record.items() if k != "id"} for record in tables[side]} for side in ("left", "right")
    ]
    pairs = [(sides[0][i], sides[1][j], int(same)) for i, j, same in tables["labelled"]]
    pairs = [pairs[row] for row in rng.permutation(len(pairs))]
    train, validation, test = np.cumsum(parts).tolist()
    return Task(pairs[:train], pairs[train:validation], pairs[validation:test], [*sides[0].values(), *sides[1].values()])


def typo(word: str, rng: np.random.Generator) -> str:
    """One letter left out, exchanged with the next, or mistaken for another."""
    if len(word) < 3:
        return word
    at = int(rng.integers(len(word) - 1))
    middle = ("", word[at + 1] + word[at], str(rng.choice(list(LETTERS))) + word[at + 1])[int(rng.integers(3))]
    return word[:at] + (middle or word[at + 1]) + word[at + 2 :]


# The language model


def initial(vocab: int, sizes: dict[str, int]) -> Any:
    """Random weights, with which a token of the first layer attends to those like it."""
    model = embedding.bert(torch.Generator().manual_seed(0), vocab, **sizes)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(4)
        attention = model.encoder.layer[0].attention.self
        attention.query.weight.mul_(4)
        attention.key.weight.copy_(attention.query.weight)
    return model


def pretrained(untrained: Any, tokenizer: Any, sentences: list[str], trial: Trial) -> Any:
    """`pretrain`, kept in the user's cache: all seeds start from one language model, as those of the paper do."""
    from safetensors.torch import load_file, save_file

    model = embedding.bert(torch.Generator().manual_seed(0), len(tokenizer), **sizes_of(untrained))
    model.load_state_dict(untrained.state_dict())
    code = "".join(map(inspect.getsource, (initial, pretrain, comparison, typo)))
    key = hashlib.sha256("\0".join([torch.__version__, code, *sentences]).encode()).hexdigest()[:24]
    kept = data.cache_folder() / "trained" / f"{key}.safetensors"
    if trial.smoke:
        pretrain(model, tokenizer, sentences, trial, steps=2)
    elif kept.exists():
        model.load_state_dict(load_file(kept))
    else:
        pretrain(model, tokenizer, sentences, trial, steps=500)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as place:  # written whole or not at all
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, Path(place) / kept.name)
            os.replace(Path(place) / kept.name, kept)
    return model.eval()


def sizes_of(model: Any) -> dict[str, int]:
    config = model.config
    return {
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "context": SIZES["context"],
    }


def pretrain(model: Any, tokenizer: Any, sentences: list[str], trial: Trial, *, steps: int, lr: float = 1e-3) -> None:
    """Learn, of two texts, whether they come from one sentence, and which of their tokens are in both."""
    rng = np.random.default_rng(0)
    sentences = sorted({" ".join(s.split()[:10]) for s in sentences if len(s.split()) >= 6})
    near: dict[int, list[int]] = {}
    for i, j, _ in block(sentences, sentences, k=4, progress=False):
        if i != j:
            near.setdefault(i, []).append(j)
    heads = sorted({w for s in sentences for w in s.split() if w.isalpha() and len(w) > 3})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        pair, tokens = DittoModel(model).train(), nn.Linear(model.config.hidden_size, 2)
        weights = [*pair.parameters(), *tokens.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=lr)
        for step in trial.track(range(steps), "pre-training"):
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 50) * (1 - step / steps)
            labels = rng.integers(2, size=32)
            texts = [comparison(sentences, near, heads, bool(label), rng) for label in labels]
            batch = tokenizer(
                *map(list, zip(*texts, strict=True)), padding=True, truncation=True, max_length=96, return_tensors="pt"
            )
            ids, side, mask = batch["input_ids"], batch["token_type_ids"], batch["attention_mask"]
            states = pair.lm(**batch).last_hidden_state
            other = (side[:, :, None] != side[:, None, :]) & (mask[:, None, :] == 1)
            common = ((ids[:, :, None] == ids[:, None, :]) & other).any(dim=2).long()
            words = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
            loss = F.cross_entropy(pair.head(states[:, 0]), torch.from_numpy(labels))
            loss = loss + F.cross_entropy(tokens(states)[words], common[words])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trial.record(step, loss=loss.item())


def comparison(
    sentences: list[str], near: dict[int, list[int]], heads: list[str], same: bool, rng: np.random.Generator
) -> tuple[str, str]:
    """A sentence and a number in two to four columns; and the same once more, or another. Words are lost and misspelt."""
    names = rng.choice(heads, int(rng.integers(2, 5)), replace=False).tolist()
    place = int(rng.integers(len(names)))

    def columns(row: int) -> list[list[str]]:
        words = sentences[row].split()
        cuts = np.sort(rng.integers(0, len(words) + 1, len(names) - 1))
        values = [words[a:b] for a, b in zip([0, *cuts], [*cuts, len(words)], strict=True)]
        values[place] = [*values[place], str(rng.integers(10 ** int(rng.integers(1, 9))))]
        return values

    def noisy(values: list[list[str]]) -> str:
        kept = [[typo(w, rng) if rng.random() < 0.2 else w for w in words if rng.random() > 0.2] for words in values]
        return serialize({name: " ".join(words) for name, words in zip(names, kept, strict=True)})

    row = int(rng.integers(len(sentences)))
    left = columns(row)
    hard = row in near and rng.random() < 0.5
    right = left if same else columns(int(rng.choice(near[row])) if hard else int(rng.integers(len(sentences))))
    return noisy(left), noisy(right)


# Arms


def score(probs: np.ndarray, threshold: float, pairs: list[Pair], suffix: str) -> dict[str, float]:
    labels = [label for *_, label in pairs]
    values = precision_recall_fscore_support(labels, probs > threshold, average="binary", zero_division=0)
    return {f"{name}{suffix}": float(value) for name, value in zip(("precision", "recall", "f1"), values, strict=False)}


def everywhere(setting: Setting) -> dict[str, Task]:
    """By what is put after a metric's name. The first is people with half of the labels."""
    names = {f", {name}": task for name, task in setting.tasks.items() if name != "people"}
    return {"": fewer(setting.tasks["people"]), ", twice the labels": setting.tasks["people"], **names}


def fewer(task: Task) -> Task:
    return replace(task, train=task.train[: len(task.train) // 2])


def features(trial: Trial, setting: Setting) -> dict[str, float]:
    """Logistic regression on cosines of TF-IDF vectors, of words and of trigrams, of whole records and of each column."""
    metrics = {}
    for suffix, task in everywhere(setting).items():
        texts = [" ".join(record.values()) for record in task.records]
        vectorizers = [TfidfVectorizer(token_pattern=r"\w+"), TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3))]
        for vectorizer in vectorizers:
            vectorizer.fit(texts)
        parts = [task.train, task.validation, task.test]
        x = [np.hstack([cosines(vectorizer, part) for vectorizer in vectorizers]) for part in parts]
        y = [np.array([label for *_, label in part]) for part in parts]
        fitted = [LogisticRegression(C=c, max_iter=2000).fit(x[0], y[0]) for c in (0.1, 1.0, 10.0, 100.0)]
        chosen = max(fitted, key=lambda model: best_f1_threshold(model.predict_proba(x[1])[:, 1], y[1])[1])
        threshold, _ = best_f1_threshold(chosen.predict_proba(x[1])[:, 1], y[1])
        metrics |= score(chosen.predict_proba(x[2])[:, 1], threshold, task.test, suffix)
    return metrics | mean_f1(metrics)


def cosines(vectorizer: TfidfVectorizer, pairs: list[Pair]) -> np.ndarray:
    columns = []
    for name in (None, *pairs[0][0]):
        left, right = (
            vectorizer.transform([" ".join(pair[side].values()) if name is None else pair[side][name] for pair in pairs])
            for side in (0, 1)
        )
        columns.append(np.asarray(left.multiply(right).sum(axis=1)))
    return np.hstack(columns)


def ditto(
    trial: Trial,
    setting: Setting,
    *,
    start: str = "trained",
    tables: Callable[[Setting], dict[str, Task]] = everywhere,
    mixda: bool = False,
    knowledge: bool = False,
    summary: bool = False,
) -> dict[str, float]:
    """Fine-tune on each task with some of the options."""
    metrics = {}
    for suffix, task in trial.track(tables(setting).items(), "fine-tuning"):
        summarizer = TfidfSummarizer(length_fn=partial(length, setting.tokenizer)) if summary else None
        if summarizer:
            summarizer.fit([serialize(record) for record in task.records])
        matcher = DittoMatcher(
            getattr(setting, start),
            setting.tokenizer,
            op="all" if mixda else None,
            knowledge=DomainKnowledge("general") if knowledge else None,
            summarizer=summarizer,
            max_len=SIZES["context"],
            epochs=1 if trial.smoke else max(6, 1000 // len(task.train)),
            batch_size=16,
            learning_rate=1e-3,
            seed=trial.seed,
            device=trial.device,
            progress=False,
        )
        pairs, labels = unzip(task.train)
        matcher.fit(pairs, labels, valid=unzip(task.validation))
        probs = matcher.predict_proba(unzip(task.test)[0])[:, 1]
        metrics |= score(probs, matcher.threshold_, task.test, suffix)
        for epoch, f1 in enumerate(matcher.validation_f1_):
            trial.record(epoch, **{f"f1 on validation{suffix}": f1})
        trial.count(matcher.model_)
    return metrics | mean_f1(metrics)


def mean_f1(metrics: dict[str, float]) -> dict[str, float]:
    values = [value for name, value in metrics.items() if name.startswith("f1")]
    return {"f1, mean of tables": float(np.mean(values))} if len(values) > 1 else {}


def people_only(setting: Setting) -> dict[str, Task]:
    return {"": fewer(setting.tasks["people"])}


def length(tokenizer: Any, word: str) -> int:
    return len(tokenizer.tokenize(word))


def unzip(pairs: list[Pair]) -> tuple[list[tuple[dict[str, str], dict[str, str]]], list[int]]:
    return [(left, right) for left, right, _ in pairs], [label for *_, label in pairs]


study = Study(
    method="ditto",
    prepare=prepare,
    arms={
        "plain": ditto,
        "all options": partial(ditto, mixda=True, knowledge=True, summary=True),
        "MixDA": partial(ditto, tables=people_only, mixda=True),
        "knowledge": partial(ditto, tables=people_only, knowledge=True),
        "summary": partial(ditto, summary=True),
        "random weights": partial(ditto, tables=people_only, start="untrained"),
        "features": features,
    },
    claim=beats("all options", "plain", on="f1"),
    also=[
        beats("MixDA", "plain", on="f1"),
        beats("knowledge", "plain", on="f1"),
        beats("summary", "plain", on="f1, mean of tables"),
        beats("all options", "plain", on="f1, mean of tables"),
        beats("all options", "features", on="f1"),
        beats("all options", "features", on="f1, mean of tables"),
        beats("plain", "random weights", on="f1"),
        holds(
            "all options with half of the labels beat the plain model with all of them",
            lambda arms: arms["all options"]["f1"] - arms["plain"]["f1, twice the labels"],
            above=0.0,
        ),
        holds(
            "all options with half of the labels beat the features with all of them",
            lambda arms: arms["all options"]["f1"] - arms["features"]["f1, twice the labels"],
            above=0.0,
        ),
    ],
    equal="pairs, language model, initial weights, order, optimiser, steps, choice of threshold and epoch",
    seeds=8,
    data=("febrl4", "fodors-zagat", "dblp-acm", "docstrings"),
    fallback=("docstrings",),
)
