"""Does back-propagation end better where Clu-DE has found its starting weights, or where the best of as many random ones starts?

Pairs of messages of Django: the same message in two varieties of one language (Spanish, Portuguese) is a pair to find, a message
and the ones nearest in their words to it are not. The texts are read as frozen token states of MiniLM. With the fallback data,
sentences of docstrings are to be matched with copies that lack words or have them in another order; words are random vectors.
"""

import hashlib
import math
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from torch import Tensor

from firsthand import Study, Trial, beats, data, holds
from firsthand.match.clude import clu_de
from firsthand.match.plagiarism import PlagiarismDetector

LANGUAGES = (("es", "es_AR", "es_CO", "es_MX", "es_VE"), ("pt", "pt_BR"))
WIDTH = 64  # of token vectors: what the search can do shrinks as this grows
NEGATIVES = 5  # for each positive
TOKENS = 48


@dataclass(frozen=True)
class Pairs:
    texts: list[tuple[str, str]]
    same: np.ndarray


@dataclass(frozen=True)
class Setting:
    vectors: dict[str, Tensor]
    train: Pairs
    validation: Pairs
    test: Pairs

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        return [self.vectors[text] for text in texts]


# Pairs


def prepare(trial: Trial) -> Setting:
    django = "django-parallel" in trial.data
    everything = renderings() if django else sentences(trial.rng)
    names = sorted({message for message, _ in everything})  # a message is in one part only, in all its languages
    parts = np.split(trial.rng.permutation(len(names)), [int(0.6 * len(names)), int(0.75 * len(names))])
    if trial.smoke:
        parts = [part[:30] for part in parts]
    train, validation, test = (pairs(everything, {names[i] for i in part}, trial.rng) for part in parts)
    used = sorted({text for part in (train, validation, test) for pair in part.texts for text in pair})
    if django:
        found = token_states(sorted({text for _, texts in everything.items() for text in texts}), smoke=trial.smoke, used=used)
        vectors = principal(found, {text for pair in train.texts for text in pair})
    else:
        vectors = random_words(used, trial.generator)
    return Setting(vectors, train, validation, test)


def normalise(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def renderings() -> dict[tuple[str, int], list[str]]:
    """(English, language) -> how its varieties put it, where they differ by more than case and punctuation."""
    catalogues = data.load("django-parallel")
    found = {}
    for number, varieties in enumerate(LANGUAGES):
        for english in sorted({message for variety in varieties for message in catalogues[variety]}):
            texts = [catalogues[variety][english] for variety in varieties if english in catalogues[variety]]
            different = list({normalise(text): text for text in texts if len(normalise(text).split()) >= 3}.values())
            if len(different) > 1:
                found[english, number] = different
    return found


def sentences(rng: np.random.Generator, count: int = 900) -> dict[tuple[str, int], list[str]]:
    """Sentences of docstrings, each with a copy: a third of its words dropped, and two neighbours swapped."""
    originals = list({normalise(pair["sentence"]): pair["sentence"] for pair in data.load("docstrings")})
    found = {}
    for row in rng.permutation(len(originals))[:count]:
        words = originals[row].split()[:TOKENS]
        kept = [words[i] for i in np.sort(rng.choice(len(words), max(2, 2 * len(words) // 3), replace=False))]
        place = int(rng.integers(len(kept) - 1))
        kept[place : place + 2] = kept[place : place + 2][::-1]
        found[originals[row], 0] = [" ".join(words), " ".join(kept)]
    return found


def pairs(everything: dict[tuple[str, int], list[str]], messages: set[str], rng: np.random.Generator) -> Pairs:
    """At most two positives of each message, and of each the texts of other messages nearest to its first by TF-IDF."""
    texts, same = [], []
    for language in sorted({language for _, language in everything}):
        of_language = {m: found for (m, number), found in everything.items() if m in messages and number == language}
        candidates = [(text, message) for message, found in of_language.items() for text in found]
        weights = TfidfVectorizer().fit_transform([text for text, _ in candidates])
        nearest = np.argsort(-(weights @ weights.T).toarray(), axis=1, kind="stable")
        row_of = {text: row for row, (text, _) in enumerate(candidates)}
        for message, found in of_language.items():
            couples = [(a, b) for a in found for b in found if a != b]
            for k in rng.permutation(len(couples))[: 1 if len(found) == 2 else 2]:
                text, other = couples[k]
                texts.append((text, other))
                same.append(True)
                others: dict[str, str] = {}  # one text of each other message
                for row in nearest[row_of[text]]:
                    candidate, its = candidates[row]
                    if its != message and normalise(candidate) not in map(normalise, found):
                        others.setdefault(its, candidate)
                    if len(others) == NEGATIVES:
                        break
                texts += [(text, negative) for negative in others.values()]
                same += [False] * len(others)
    return Pairs(texts, np.array(same))


# Token vectors


def token_states(texts: list[str], *, smoke: bool, used: list[str]) -> dict[str, Tensor]:
    """MiniLM's last states of all texts (in a smoke run of those used only), kept in the user's cache: they are computed once."""
    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformer

    texts = used if smoke else texts
    key = hashlib.sha256("\0".join([f"minilm tokens {TOKENS}", *texts]).encode()).hexdigest()[:24]
    kept = data.cache_folder() / "embedded" / f"{key}.safetensors"
    if not kept.exists():
        model = SentenceTransformer(str(data.load("minilm")), device="cpu")
        model.max_seq_length = TOKENS
        states = model.encode(texts, output_value="token_embeddings", show_progress_bar=False)
        lengths = torch.tensor([len(each) for each in states])
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as place:  # written whole or not at all
            save_file({"states": torch.cat(states).half(), "lengths": lengths}, Path(place) / kept.name)
            os.replace(Path(place) / kept.name, kept)
    stored = load_file(kept)
    return dict(zip(texts, stored["states"].split(stored["lengths"].tolist()), strict=True))


def principal(states: dict[str, Tensor], training: set[str]) -> dict[str, Tensor]:
    """The first principal components of the training texts' tokens, scaled to a mean square of 1."""
    tokens = torch.cat([states[text].float() for text in sorted(training)])
    mean = tokens.mean(dim=0)
    _, axes = torch.linalg.eigh((tokens - mean).T @ (tokens - mean))
    axes = axes[:, -WIDTH:]
    axes = axes * axes.abs().max(dim=0).values.reciprocal().sign()
    scale = ((tokens - mean) @ axes).square().mean().sqrt()
    return {text: (each.float() - mean) @ axes / scale for text, each in states.items()}


def random_words(texts: list[str], generator: torch.Generator) -> dict[str, Tensor]:
    words = sorted({word for text in texts for word in text.split()})
    vectors = dict(zip(words, torch.randn(len(words), WIDTH, generator=generator), strict=True))
    return {text: torch.stack([vectors[word] for word in text.split()]) for text in texts}


# Arms

# Best on seeds 1 and 2 of learning rates 0.001, 0.003 and 0.01 and, for the searches from random weights and for Clu-DE, of
# widths 1, 3 and that of PyTorch's own distribution, sqrt 3; for Clu-DE also of F = 0.1, 0.2 and 0.5. Not all were combined.
TUNED: dict[str, Any] = {"symmetric": True, "learning_rate": 1e-2, "spread": math.sqrt(3), "F": 0.1}


def detect(trial: Trial, setting: Setting, init: str, loss: str = "focal", **other: Any) -> dict[str, float]:
    settings: dict[str, Any] = TUNED | {"hidden": 16, "pop_size": 30, "generations": 20, "search_pairs": 512, "max_epochs": 30}
    if trial.smoke:
        settings |= {"hidden": 4, "pop_size": 10, "generations": 2, "search_pairs": 32, "max_epochs": 1}
    detector = PlagiarismDetector(setting.encode, init, loss, **(settings | other), random_state=trial.seed, device=trial.device)
    train, validation, test = setting.train, setting.validation, setting.test
    detector.fit(train.texts, train.same, eval_set=(validation.texts, validation.same))
    trial.count(detector.model_)
    for epoch, losses in enumerate(detector.history_):
        trial.record(epoch, validation=losses["validation loss"])
    if detector.search_:
        for generation, best in enumerate(detector.search_.history):
            trial.record(generation, search=best)
    of_validation, of_test = (detector.predict_proba(part.texts)[:, 1] for part in (validation, test))
    precision, recall, thresholds = precision_recall_curve(validation.same, of_validation)
    f1 = 2 * precision * recall / (precision + recall).clip(1e-9)
    threshold = thresholds[f1[:-1].argmax()]
    return {
        "average precision": float(average_precision_score(test.same, of_test)),
        "f1": float(f1_score(test.same, of_test >= threshold)),
        "evaluations": float(detector.search_.evaluations if detector.search_ else 0),
        "loss at the start": detector.history_[0]["validation loss"],
        "lowest loss": min(each["validation loss"] for each in detector.history_),
        "epochs": float(len(detector.history_) - 1),
    }


# Functions to minimise, all with their minimum 0 at 0


def functions() -> dict[str, Any]:
    def ellipsoid(x: Tensor) -> Tensor:
        return (torch.logspace(0, 6, x.shape[1], dtype=x.dtype) * x**2).sum(dim=1)

    def rosenbrock(x: Tensor) -> Tensor:
        z = 0.02048 * x + 1
        return (100 * (z[:, :-1] ** 2 - z[:, 1:]) ** 2 + (z[:, :-1] - 1) ** 2).sum(dim=1)

    def rastrigin(x: Tensor) -> Tensor:
        z = 0.0512 * x
        return (z**2 - 10 * (2 * math.pi * z).cos() + 10).sum(dim=1)

    def ackley(x: Tensor) -> Tensor:
        waves = (2 * math.pi * x).cos().mean(dim=1)
        return 20 - 20 * (-0.2 * x.square().mean(dim=1).sqrt()).exp() + math.e - waves.exp()

    def griewank(x: Tensor) -> Tensor:
        z = 6 * x
        return (z**2).sum(dim=1) / 4000 - (z / torch.arange(1, x.shape[1] + 1).sqrt()).cos().prod(dim=1) + 1

    return {each.__name__: each for each in (ellipsoid, rosenbrock, rastrigin, ackley, griewank)}


def minimise(trial: Trial, setting: Setting, *, clustering: bool) -> dict[str, float]:
    """Functions of 30 variables, shifted and rotated, with as many evaluations with and without clusters."""
    dim, generations = 30, 10 if trial.smoke else 1000
    shift = 160 * torch.rand(dim, generator=trial.generator, dtype=torch.float64) - 80
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=trial.generator, dtype=torch.float64))
    metrics = {}
    for name, function in trial.track(functions().items(), "functions"):
        init = 200 * torch.rand(30, dim, generator=trial.generator, dtype=torch.float64) - 100
        found = clu_de(
            lambda x, function=function: function((x - shift) @ rotation),
            init=init,
            bounds=(-100.0, 100.0),
            generations=generations if clustering else generations * 6 // 5,  # 36 and 30 evaluations a generation
            clustering=clustering,
            generator=trial.generator,
        )
        metrics[f"log10 error, {name}"] = math.log10(max(found.fun, 1e-8))
    return {"log10 error": sum(metrics.values()) / len(metrics), **metrics}


study = Study(
    method="plagiarism",
    prepare=prepare,
    arms={
        "best of random": partial(detect, init="best-of-random"),
        "Clu-DE": partial(detect, init="clude"),
        "DE": partial(detect, init="de"),
        "random": partial(detect, init="random"),
        "Clu-DE, F 0.5": partial(detect, init="clude", F=0.5),
        "Clu-DE, BCE": partial(detect, init="clude", loss="bce"),
        "best of random, BCE": partial(detect, init="best-of-random", loss="bce"),
        "functions, DE": partial(minimise, clustering=False),
        "functions, Clu-DE": partial(minimise, clustering=True),
    },
    claim=beats("Clu-DE", "best of random", on="average precision"),
    also=[
        beats("Clu-DE", "DE", on="average precision"),
        beats("Clu-DE", "random", on="average precision"),
        beats("Clu-DE, F 0.5", "best of random", on="average precision"),
        beats("Clu-DE", "Clu-DE, BCE", on="average precision"),
        beats("best of random", "best of random, BCE", on="average precision"),
        holds(
            "Clu-DE starts at a lower loss than the best of random",
            lambda arms: arms["best of random"]["loss at the start"] - arms["Clu-DE"]["loss at the start"],
            above=0.0,
        ),
        beats("functions, Clu-DE", "functions, DE", on="log10 error", lower_is_better=True),
    ],
    equal="pairs, token vectors, model, optimiser, batches, stopping rule; forward passes of the search, except in 'random'",
    seeds=8,
    data=("django-parallel", "minilm"),
    fallback=("docstrings",),
)
