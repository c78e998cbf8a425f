"""Do negatives that hold related labels teach a classifier what a label means, where random ones teach it the label's name?

Labels are functions and classes, positives are sentences in other docstrings that hold their names. The classifiers are tested on
what each says of itself in its first sentence, without its name. The same with skills of the ESCO taxonomy and their definitions.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from torch import Tensor

from firsthand import Study, Trial, beats, data, holds
from firsthand.embed.skill_negatives import (
    DistantLabelRanker,
    literal_match,
    r_precision_at_k,
    related_labels,
    sample_label_negatives,
)
from firsthand.testbeds import embedding
from firsthand.testbeds.retrieval import reciprocal_rank

LEAST = 3  # positives of a label
FRACTIONS = (0.1, 0.25, 0.5, 1.0)  # of the negatives that a strategy chooses; which is best is asked on the validation half
MOST = 40  # positives of a label that are kept, so that a few frequent names do not take all the time
Related = dict[str, dict[int, list[int]]]


@dataclass(frozen=True)
class Taxonomy:
    """Labels with sentences that hold their names, and what describes each without its name.

    Attributes:
        names: of the labels.
        parents: of the labels in the taxonomy, if it is known.
        features: of the sentences.
        positives: rows of the sentences that hold each label's name.
        described: features of the descriptions, one a label.
        name_features: features of the names.
    """

    names: list[str]
    parents: list[str] | None
    features: Tensor
    positives: dict[int, list[int]]
    described: Tensor
    name_features: Tensor


@dataclass(frozen=True)
class World:
    taxonomy: Taxonomy
    related: Related
    validation: Tensor  # labels whose descriptions choose the fraction
    test: Tensor


Setting = dict[str, World]


def prepare(trial: Trial) -> Setting:
    setting = {"": divide(trial, functions(trial))}
    if "esco" in trial.data:
        setting[" of skills"] = divide(trial, skills(trial))
    return setting


def functions(trial: Trial) -> Taxonomy:
    """Names with a capital, a digit or an underscore inside, which are no English words, of exactly one function or class."""
    entries = data.load("api-docs", packages=("networkx",) if trial.smoke else embedding.PACKAGES)
    entries = [entry for entry in entries if not trial.smoke or entry["package"] == "networkx"]
    last = [entry["name"].rpartition(".")[2] for entry in entries]
    count = Counter(last)
    named = [row for row, name in enumerate(last) if count[name] == 1 and re.search(r"\w[A-Z0-9_]", name) and len(name) > 3]
    texts = [sentences_of(entry["text"]) for entry in entries]
    parents = [".".join(part for part in entry["module"].split(".") if not part.startswith("_")) for entry in entries]
    readable = [re.sub(r"_|(?<=[a-z])(?=[A-Z])", " ", name) for name in last]
    return taxonomy(
        trial,
        texts,
        {row: (last[row], readable[row]) for row in named},
        {row: text[0] for row, text in enumerate(texts) if text},
        [f"{entry['package']}: {parent}" for entry, parent in zip(entries, parents, strict=True)],
        casefold=False,
    )


def skills(trial: Trial) -> Taxonomy:
    """Skills by the longest two to four words at the beginning of their names that definitions of others hold.

    The file does not say where a name ends and the next begins, nor what the parents of a skill are.
    """
    entries = [entry for kind in data.load("esco").values() for entry in kind]
    if trial.smoke:
        entries = entries[:2000]
    texts = [sentences_of(entry["definition"]) for entry in entries]
    prefixes: dict[str, list[int]] = {}
    for row, entry in enumerate(entries):
        words = re.findall(r"\w+", entry["labels"].lower())
        for length in (2, 3, 4):
            begin, end = words[:1], words[length - 1 : length]
            if "/skill/" in entry["id"] and end and not ENGLISH_STOP_WORDS.intersection(begin + end):
                prefixes.setdefault(" ".join(words[:length]), []).append(row)
    unique = {prefix: rows[0] for prefix, rows in prefixes.items() if len(rows) == 1}
    flat = [sentence for text in texts for sentence in text]
    held = literal_match(flat, {prefix: [prefix] for prefix in unique})
    names: dict[int, tuple[str, str]] = {}
    for prefix, row in unique.items():  # shorter ones come first
        if len(held[prefix]) >= LEAST:
            names[row] = (prefix, prefix)
    described = {row: " ".join(text) for row, text in enumerate(texts) if text}
    return taxonomy(trial, texts, names, described, None, casefold=True)


def sentences_of(text: str) -> list[str]:
    """The sentences of prose with at least four words, of parts of lists too."""
    parts = re.split(r"\n\s*\n|(?<=[.!?])\s+(?=[A-Z])|\n\s*(?:-{3,}|[*-] )", text)
    return [" ".join(part.split()) for part in parts if len(part.split()) >= 4]


def taxonomy(
    trial: Trial,
    texts: list[list[str]],
    names: dict[int, tuple[str, str]],  # of an entry, as it stands in a text and as it is read
    described: dict[int, str],
    parents: list[str] | None,
    casefold: bool,
) -> Taxonomy:
    """The entries whose names others hold often enough, and whose description does not hold it."""
    flat = [sentence for text in texts for sentence in text]
    owner = np.array([row for row, text in enumerate(texts) for _ in text])
    held = literal_match(flat, {row: [name] for row, (name, _) in names.items()}, casefold=casefold)
    said = literal_match(list(described.values()), {row: [name] for row, (name, _) in names.items()}, casefold=casefold)
    place = {row: number for number, row in enumerate(described)}
    elsewhere = {row: [hit for hit in hits if owner[hit] != row] for row, hits in held.items()}
    least = 2 if trial.smoke else LEAST
    kept = [row for row, hits in elsewhere.items() if len(hits) >= least and row in described and place[row] not in said[row]]
    fixed = np.random.default_rng(0)  # the corpus is the same for all seeds, so that it is embedded once
    chosen = {row: sorted(fixed.permutation(elsewhere[row])[:MOST].tolist()) for row in kept}
    others = fixed.permutation(len(flat))[: 200 if trial.smoke else 4000].tolist()
    rows = sorted({*others, *(hit for hits in chosen.values() for hit in hits)})
    number = {row: index for index, row in enumerate(rows)}
    embed = embedder(trial, [flat[row] for row in rows])
    # Sentences that are not kept for a label may still hold its name: they are no negatives, so all that hold it are positives.
    positives = {k: [number[hit] for hit in elsewhere[row] if hit in number] for k, row in enumerate(kept)}
    return Taxonomy(
        names=[names[row][1] for row in kept],
        parents=None if parents is None else [parents[row] for row in kept],
        features=embed([flat[row] for row in rows]),
        positives=positives,
        described=embed([described[row] for row in kept]),
        name_features=embed([names[row][1] for row in kept]),
    )


def embedder(trial: Trial, corpus: list[str]) -> Callable[[list[str]], Tensor]:
    """all-MiniLM-L6-v2; or what needs no model, words weighed by rarity and brought to few dimensions."""
    if "minilm" in trial.data:
        return lambda texts: embedding.frozen(texts, length=48)
    count = TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"[A-Za-z]{2,}", dtype=np.float32)
    counts = count.fit_transform(corpus)
    reduce = TruncatedSVD(min(200, counts.shape[1] - 1), n_iter=2, random_state=0).fit(counts)
    return lambda texts: F.normalize(torch.from_numpy(reduce.transform(count.transform(texts))), dim=1)


def divide(trial: Trial, whole: Taxonomy) -> World:
    """Two labels of three, drawn by the seed; half of their descriptions to choose with, half to test with."""
    drawn = trial.rng.permutation(len(whole.names))[: 2 * len(whole.names) // 3]
    kept = Taxonomy(
        names=[whole.names[k] for k in drawn],
        parents=None if whole.parents is None else [whole.parents[k] for k in drawn],
        features=whole.features,
        positives={number: whole.positives[k] for number, k in enumerate(drawn.tolist())},
        described=whole.described[torch.from_numpy(drawn)],
        name_features=whole.name_features[torch.from_numpy(drawn)],
    )
    labels = {number: [name] for number, name in enumerate(kept.names)}
    related = {
        "levenshtein": related_labels(labels, strategy="levenshtein"),
        "embedding": related_labels(labels, strategy="embedding", embeddings=kept.name_features.numpy()),
    }
    if kept.parents is not None:
        parents = {number: [parent] for number, parent in enumerate(kept.parents)}
        related["siblings"] = related_labels(labels, strategy="siblings", parents=parents)
    half = torch.arange(len(drawn)).chunk(2)
    return World(kept, related, half[0], half[1])


def with_strategies(*wanted: str) -> Callable[[Trial, Setting], dict[str, float]]:
    """An arm with these strategies, as far as a taxonomy allows them; without any, all negatives are random."""

    def arm(trial: Trial, setting: Setting) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for suffix, world in setting.items():
            related = {name: world.related[name] for name in wanted if name in world.related}
            if related or not wanted:
                found = learn(trial, world, related)
                metrics |= {name + suffix: value for name, value in found.items()}
        return metrics

    return arm


def learn(trial: Trial, world: World, related: Related) -> dict[str, float]:
    """Classifiers with each fraction; the test is of the one that ranks best on the validation half."""
    best: tuple[float, float, Tensor] | None = None
    for fraction in trial.track(FRACTIONS if related else (0.0,), "fractions"):
        scores = classified(trial, world, related, fraction)
        value = precision(scores, world.validation)
        if best is None or value > best[0]:
            best = value, fraction, scores
    assert best is not None
    _, fraction, scores = best
    truth = torch.eye(len(scores), dtype=torch.bool)
    return {
        "RP@5": precision(scores, world.test),
        "RP@1": precision(scores, world.test, k=1),
        "RP@10": precision(scores, world.test, k=10),
        "MRR": reciprocal_rank(scores[world.test], truth[world.test], k=len(scores)).mean().item(),
        "fraction": fraction,
    }


def classified(trial: Trial, world: World, related: Related, fraction: float) -> Tensor:
    """Scores of every description, (descriptions, labels)."""
    taxonomy = world.taxonomy
    positives, negatives = taxonomy.positives, sample(taxonomy, related, fraction, trial.seed)
    # C is the best of 0.3, 1, 10 and 100 on seeds 2 and 3, for random negatives and for the strategies.
    ranker = DistantLabelRanker(C=10.0, progress=False).fit(taxonomy.features.numpy(), positives, negatives)
    return torch.from_numpy(ranker.decision_function(taxonomy.described.numpy())).float()


def sample(taxonomy: Taxonomy, related: Related, fraction: float, seed: int) -> dict[int, list[int]]:
    with warnings.catch_warnings():  # labels alone in their module get random negatives; the card says so
        warnings.simplefilter("ignore", UserWarning)
        return sample_label_negatives(
            taxonomy.positives, related, fraction=fraction, num_sentences=len(taxonomy.features), seed=seed
        )


def precision(scores: Tensor, rows: Tensor, k: int = 5) -> float:
    gold: list[Iterable[int]] = [{int(row)} for row in rows]
    return r_precision_at_k(scores[rows], gold, k=k)


study = Study(
    method="skill-negatives",
    prepare=prepare,
    arms={
        "random": with_strategies(),
        "siblings": with_strategies("siblings"),
        "levenshtein": with_strategies("levenshtein"),
        "embedding": with_strategies("embedding"),
        "combined": with_strategies("siblings", "levenshtein", "embedding"),
    },
    claim=beats("siblings", "random", on="RP@5"),
    also=[
        beats("levenshtein", "random", on="RP@5"),
        beats("embedding", "random", on="RP@5"),
        beats("combined", "random", on="RP@5"),
        holds(
            "combined is better than the best single strategy, RP@5",
            lambda arms: arms["combined"]["RP@5"] - max(arms[name]["RP@5"] for name in ("siblings", "levenshtein", "embedding")),
            above=0.0,
        ),
        holds(
            "combined is better than random on skills, RP@5 (siblings are not known there)",
            lambda arms: arms["combined"].get("RP@5 of skills", 0.0) - arms["random"].get("RP@5 of skills", 0.0),
            above=0.0,
        ),
    ],
    equal="labels, positives, number of negatives, features, classifier",
    seeds=8,
    data=("api-docs", "minilm", "esco"),
    fallback=("api-docs",),
)
