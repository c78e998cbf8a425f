"""Does a decoder embed texts better if it sees to both sides and is pooled over all its layers by learned queries?

A small Llama learns to predict docstrings and code of installed packages, and is then made an encoder in five ways: with causal
or bidirectional attention, pooled by its last token, by learned queries over the last layer, or by learned queries over all
layers. Each is trained to find the function that a sentence describes and tested on four tasks in each of five packages.

The paper's claim has two sides. For retrieval and similarity the most elaborate design wins, which is the primary claim here; for
classification and clustering the plainest will do, which is claimed beside it.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from firsthand import Study, Trial, beats, holds
from firsthand.embed.compare import compare_designs
from firsthand.embed.contrastive import HardNegativeInfoNCELoss
from firsthand.embed.multi_layer_pooling import build_design
from firsthand.harness.claims import Metrics
from firsthand.testbeds import embedding, lm

PACKAGES = ("stdlib", *embedding.PACKAGES)
GROUPS = {
    "retrieval and similarity": ("retrieval", "similarity"),
    "classification and clustering": ("classification", "clustering"),
}
TASK_TYPES = {f"{task} {package}": kind for kind, tasks in GROUPS.items() for task in tasks for package in PACKAGES}
HIDDEN, LENGTH = 64, 24


@dataclass(frozen=True)
class World:
    train: embedding.Functions
    test: embedding.Functions
    tokenizer: Any
    model: Any  # the decoder, pre-trained


def prepare(trial: Trial) -> World:
    train_size, test_size, vocab, steps = (64, 400, 500, 2) if trial.smoke else (5000, 1200, 2000, 250)
    train, test = embedding.split(embedding.functions(), trial.rng, train=train_size, test=test_size)
    texts = [*train.sentences, *train.codes]
    tokenizer = embedding.tokenizer(texts, vocab)
    sizes: dict[str, Any] = {"hidden": HIDDEN, "layers": 2 if trial.smoke else 6, "context": LENGTH}
    model = embedding.llama(trial.generator, len(tokenizer), **sizes, initializer_range=0.08)
    model.model.embed_tokens.weight.data *= HIDDEN**0.5  # large against what the layers add, lest they drown the tokens
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids[:128]])
    blocks = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
    lm.train(model.to(trial.device), lm.batches(blocks, 32, trial.generator), steps=steps, lr=1e-2, trial=trial, curve="lm loss")
    return World(train, test, tokenizer, model.cpu())


def train(trial: Trial, world: World, design: str, lr: float, *, mlp: bool = False) -> dict[str, float]:
    size, steps = (16, 2) if trial.smoke else (32, 180)
    transformer = embedding.sentence_transformer(world.model.model, world.tokenizer, length=LENGTH)[0]
    model = build_design(design, transformer, num_latents=16, num_heads=4)
    if mlp:
        model.append(MLP(HIDDEN))
    trial.count(model)
    rows = [torch.randperm(len(world.train), generator=trial.generator) for _ in range(1 + size * steps // len(world.train))]
    order = torch.cat(rows)[: size * steps].split(size)
    loss = HardNegativeInfoNCELoss(model, temperature=0.05)
    embedding.fit(model, (world.train.sentences, world.train.codes), loss, order, lr=lr, trial=trial)
    return score(model, world.test, trial.rng, least=2 if trial.smoke else 6)


class MLP(nn.Module):
    """Behind the pooling, as many parameters as learned queries have in their block: 16 times the width squared."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 8 * dim), nn.GELU(), nn.Linear(8 * dim, dim))

    def forward(self, features: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        pooled = features["sentence_embedding"] * HIDDEN**0.5  # of the size that states have
        features["sentence_embedding"] = F.normalize(pooled + self.block(pooled), dim=-1)
        return features


def score(model: Any, test: embedding.Functions, rng: np.random.Generator, least: int) -> dict[str, float]:
    """Four tasks in each package, and their means. Classes and clusters are the parts of a package with so many functions."""
    sentences, codes = embedding.embed(model, test.sentences), embedding.embed(model, test.codes)
    metrics = {}
    for package in PACKAGES:
        rows = [row for row, name in enumerate(test.packages) if name == package]
        parts, large = with_peers([part(test.modules[row], package) for row in rows], least)
        here, members = torch.tensor(rows), torch.tensor([rows[k] for k in large])
        groups = test.groups[rows]
        relevant = embedding.relevance(groups, groups)
        metrics |= {
            f"retrieval {package}": embedding.retrieval(sentences[here], codes[here], relevant)["ndcg@10"],
            f"similarity {package}": embedding.similarity(sentences[here], [test.modules[row] for row in rows], rng),
            f"classification {package}": embedding.classification(codes[members], parts, rng),
            f"clustering {package}": embedding.clustering(codes[members], parts, int(rng.integers(2**31))),
        }
    for task in ("retrieval", "similarity", "classification", "clustering"):
        metrics[task] = float(np.mean([metrics[f"{task} {package}"] for package in PACKAGES]))
    return metrics | {kind: float(np.mean([metrics[task] for task in tasks])) for kind, tasks in GROUPS.items()}


def part(module: str, package: str) -> str:
    """`"sklearn.linear_model"` of `"sklearn.linear_model._base"`; of the standard library the module itself."""
    return ".".join(module.split(".")[: 1 if package == "stdlib" else 2])


def with_peers(labels: Sequence[str], least: int) -> tuple[list[str], list[int]]:
    """The labels that are there often enough, and where."""
    often = {label for label in labels if labels.count(label) >= least}
    rows = [row for row, label in enumerate(labels) if label in often]
    return [labels[row] for row in rows], rows


def p_better(kind: str, metrics: Metrics) -> float:
    """Wilcoxon's p over the ten tasks of a kind, of one seed; 1 where multi-bidir is not the better one."""
    scores = {arm: {task: metrics[arm][task] for task in TASK_TYPES} for arm in ("eos-causal", "multi-bidir")}
    (row,) = (row for row in compare_designs(scores, TASK_TYPES, "eos-causal") if row["type"] == kind)
    return row["p"] if row["median_diff"] > 0 else 1.0


def gain(kind: str, metrics: Metrics) -> float:
    return metrics["multi-bidir"][kind] - metrics["eos-causal"][kind]


FIRST, SECOND = GROUPS
study = Study(
    method="multi-layer-pooling",
    prepare=prepare,
    arms={  # learning rates: best on the primary metric, between 1e-3 and 8e-3, at seeds 1 and 2
        "eos-causal": partial(train, design="eos-causal", lr=4e-3),
        "last-causal": partial(train, design="last-causal", lr=1e-3),
        "multi-causal": partial(train, design="multi-causal", lr=1e-3),
        "last-bidir": partial(train, design="last-bidir", lr=4e-3),
        "multi-bidir": partial(train, design="multi-bidir", lr=4e-3),
        "eos-causal, MLP": partial(train, design="eos-causal", lr=2e-3, mlp=True),
    },
    claim=beats("multi-bidir", "eos-causal", on=FIRST),
    also=[
        holds(f"it gains less than 0.01 in {SECOND}", partial(gain, SECOND), below=0.01),
        holds(
            f"Wilcoxon's test over the ten tasks of a seed: better in {FIRST}, p below 0.05", partial(p_better, FIRST), below=0.05
        ),
        holds(f"Wilcoxon's test: no better in {SECOND}, p above 0.05", partial(p_better, SECOND), above=0.05),
        beats("multi-bidir", "eos-causal, MLP", on=FIRST),
        beats("multi-bidir", "last-bidir", on=FIRST),
        beats("multi-causal", "eos-causal", on=FIRST),
    ],
    equal="pre-trained decoder, training pairs, batches, optimiser steps, loss; each design's learning rate tuned over one grid",
    seeds=5,
    data=("docstrings",),
)
