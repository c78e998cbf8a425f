"""Does pooling a bidirectional decoder through latents beat a plain mean, and do labels help with in-batch negatives off?

Two questions about one small Llama that has learnt to predict the next token of code. First the architecture: causal or
bidirectional; and the embedding from the last token, from the mean, or from the mean behind latent attention. Latents do not
depend on the text, so attention to them is a function of each token alone: the control is a gated feed-forward block with as many
parameters in its place. Then data and loss, for the bidirectional model with latents: search only, or labelled functions blended
in, at once or in a second stage, and that stage with in-batch negatives or without.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firsthand import Study, Trial, beats, holds
from firsthand.embed.bidirectional import make_bidirectional
from firsthand.embed.contrastive import HardNegativeInfoNCELoss
from firsthand.embed.nv_embed import LatentAttentionPooling, classification_to_triplets
from firsthand.testbeds import embedding, lm

HIDDEN, NEGATIVES, LENGTH, TEMPERATURE = 64, 1, 32, 0.05
SCORE = "mean score"  # of the three tasks, as the paper's is over those of MTEB


@dataclass(frozen=True)
class World:
    test: embedding.Functions
    tokenizer: Any
    decoder: Any  # a causal language model
    search: list[list[str]]  # columns: sentences, their codes, hard negatives
    topics: list[list[str]]  # columns: codes, others of their area, codes of other areas


def prepare(trial: Trial) -> World:
    sizes = {"train": 120, "test": 60} if trial.smoke else {"train": 2400, "test": 1000}
    train, test = embedding.split(embedding.functions(), trial.rng, **sizes)
    tokenizer = embedding.tokenizer([*train.sentences, *train.codes], 600 if trial.smoke else 2000)
    decoder = embedding.llama(trial.generator, len(tokenizer), hidden=HIDDEN, layers=2)
    stream = torch.tensor([token for ids in tokenizer(train.codes, verbose=False)["input_ids"] for token in ids])
    blocks = stream[: len(stream) // 48 * 48].view(-1, 48)
    steps = 2 if trial.smoke else 250
    lm.train(decoder, lm.batches(blocks, 16, trial.generator), steps=steps, lr=1e-3, trial=trial, curve="next-token loss")
    topics = classification_to_triplets(
        train.codes, areas(train), mode="example", num_negatives=NEGATIVES, seed=int(trial.rng.integers(2**31))
    )
    search = [train.sentences, train.codes, *hard_negatives(train)]
    return World(test, tokenizer, decoder, search, [topics[name][:] for name in topics.column_names])


def areas(functions: embedding.Functions) -> list[str]:
    """Coarser than modules, of which most have a few functions only: `"sympy.polys"`, `"scipy.stats"`."""
    return [".".join(module.split(".")[:2]) for module in functions.modules]


def hard_negatives(functions: embedding.Functions) -> list[list[str]]:
    """For each sentence the nearest codes in words, those apart that it describes: as many columns as there are negatives."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern="[A-Za-z]+", sublinear_tf=True)
    codes = words.fit_transform(functions.codes)
    scores = (words.transform(functions.sentences) @ codes.T).toarray()
    scores[functions.groups[:, None] == functions.groups] = -1.0
    nearest = np.argsort(-scores, axis=1, kind="stable")[:, :NEGATIVES]
    return [[functions.codes[row] for row in column] for column in nearest.T]


class FeedForwardPooling(nn.Module):
    """What latent attention is without attention: a block for each token, and the mean. As many parameters."""

    def __init__(self) -> None:
        super().__init__()
        budget = sum(p.numel() for p in latents().parameters())
        inner = (budget - 3 * HIDDEN) // (3 * HIDDEN + 2)
        self.norm = nn.LayerNorm(HIDDEN)
        self.ff_in, self.ff_out = nn.Linear(HIDDEN, 2 * inner), nn.Linear(inner, HIDDEN)

    def forward(self, features: Any, **_: Any) -> Any:
        states, weights = features["token_embeddings"], features["attention_mask"][..., None]
        value, gate = self.ff_in(self.norm(states)).chunk(2, dim=-1)
        states = states + self.ff_out(value * F.gelu(gate))
        features["sentence_embedding"] = F.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)
        return features


def latents() -> LatentAttentionPooling:
    return LatentAttentionPooling(HIDDEN, num_latents=32, num_heads=4)


@dataclass(frozen=True)
class Stage:
    share: float  # of the steps
    blended: bool = False  # labelled functions in every other step
    in_batch: bool = True
    rate: float = 1.0  # times the learning rate


def train(
    trial: Trial,
    world: World,
    pooling: Callable[[], str | nn.Module],
    *,
    lr: float,
    bidirectional: bool = True,
    stages: tuple[Stage, ...] = (Stage(1.0),),
) -> dict[str, float]:
    model = embedding.sentence_transformer(world.decoder.model, world.tokenizer, pooling=pooling(), length=LENGTH)
    if bidirectional:
        make_bidirectional(model[0].auto_model)
    trial.count(model)
    columns = [[*searched, *labelled] for searched, labelled in zip(world.search, world.topics, strict=True)]
    for stage in stages:
        size, steps = (8, round(2 * stage.share)) if trial.smoke else (32, round(120 * stage.share))
        order = batches(trial.generator, len(world.search[0]), len(world.topics[0]), size, steps, stage.blended)
        loss = HardNegativeInfoNCELoss(model, TEMPERATURE, in_batch_negatives=stage.in_batch)
        embedding.fit(model, columns, loss, order, lr=lr * stage.rate, trial=trial)
    return score(model, world.test, trial.rng)


def batches(generator: torch.Generator, searched: int, labelled: int, size: int, steps: int, blended: bool) -> list[Tensor]:
    """Rows of each step, all from one kind of data; blended: every other step from the labelled rows, which come last."""
    order = []
    for step in range(steps):
        first, count = (searched, labelled) if blended and step % 2 else (0, searched)
        order.append(first + torch.randperm(count, generator=generator)[:size])
    return order


def score(model: Any, test: embedding.Functions, rng: np.random.Generator) -> dict[str, float]:
    queries, documents = (embedding.embed(model, texts) for texts in (test.sentences, test.codes))
    labels = np.array(areas(test))
    sizes = Counter(labels.tolist())
    classed = np.array([row for row, label in enumerate(labels) if sizes[label] >= max(2, len(test) // 100)])
    groups, first = np.unique(test.groups, return_index=True)
    metrics = {
        **embedding.retrieval(queries[torch.from_numpy(first)], documents, embedding.relevance(groups, test.groups)),
        "accuracy": embedding.classification(documents[torch.from_numpy(classed)], labels[classed].tolist(), rng),
        "v-measure": embedding.clustering(documents, test.packages, int(rng.integers(2**31))),
        "spearman": embedding.similarity(queries, test.modules, rng),
    }
    return metrics | {SCORE: (metrics["ndcg@10"] + metrics["accuracy"] + metrics["v-measure"]) / 3}


def mean() -> str:
    return "mean"


def last_token() -> str:
    return "lasttoken"


# Best of 0.001, 0.002 and 0.004 for each on seed 3; for mean and latents 0.0005 was worse, on seed 4. The same for causal
# models. A second stage's rate is the best of 1, 0.3 and 0.1 times that for accuracy, on seed 3, with in-batch negatives and
# without.
RATE: dict[Callable[[], Any], float] = {mean: 1e-3, latents: 1e-3, FeedForwardPooling: 1e-3, last_token: 2e-3}


def arm(pooling: Callable[[], Any], **options: Any) -> Callable[..., dict[str, float]]:
    return partial(train, pooling=pooling, lr=RATE[pooling], **options)


study = Study(
    method="nv-embed",
    prepare=prepare,
    arms={
        "mean": arm(mean),
        "latents": arm(latents),  # also: search alone, in one stage
        "feed-forward": arm(FeedForwardPooling),
        "last token": arm(last_token),
        "causal, mean": arm(mean, bidirectional=False),
        "causal, latents": arm(latents, bidirectional=False),
        "causal, last token": arm(last_token, bidirectional=False),
        "blend at once": arm(latents, stages=(Stage(1.0, blended=True),)),
        "two stages": arm(latents, stages=(Stage(0.5), Stage(0.5, blended=True, in_batch=False, rate=0.3))),
        "two stages, in-batch": arm(latents, stages=(Stage(0.5), Stage(0.5, blended=True))),
    },
    claim=beats("latents", "mean", on=SCORE),
    also=[
        beats("latents", "feed-forward", on=SCORE),
        beats("latents", "last token", on=SCORE),
        beats("mean", "causal, mean", on=SCORE),
        beats("latents", "causal, latents", on=SCORE),
        beats("latents", "causal, last token", on=SCORE),
        beats("two stages", "latents", on="accuracy"),
        beats("two stages", "two stages, in-batch", on="accuracy"),
        beats("two stages", "blend at once", on="accuracy"),
        holds(
            "the second stage costs less than 0.01 of nDCG@10 against search alone",
            lambda arms: arms["two stages"]["ndcg@10"] - arms["latents"]["ndcg@10"],
            above=-0.01,
        ),
    ],
    equal="decoder and its weights, functions, batch size, optimiser, steps of training, texts in each step",
    data=("docstrings",),
)
