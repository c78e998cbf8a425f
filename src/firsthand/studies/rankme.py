"""Can the rank of its embeddings choose a pre-training run better than chance, and nearly as well as labels would?"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor

from firsthand import Study, Trial, beats, holds
from firsthand.diagnose.rankme import alpha_req, rankme, spectrum
from firsthand.testbeds import digits


def vicreg(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Two views agree, every coordinate keeps a spread of 1, no two coordinates say the same (arXiv 2105.04906)."""
    spread = covariance = torch.zeros((), device=a.device)
    for z in (a, b):
        spread = spread + F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean() / 2
        cov = z.T.cov()
        covariance = covariance + (cov - cov.diag().diag()).square().sum() / len(cov)
    return 25 * F.mse_loss(a, b) + 25 * spread + weight * covariance


def simclr(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Among all views in the batch, find the other one of the same image (arXiv 2002.05709)."""
    z = F.normalize(torch.cat([a, b]), dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(a)))


# Ranges with what trains best inside them, found on tuning seeds. The temperatures are those SimCLR's authors compare.
OBJECTIVES = {
    "VICReg": [partial(vicreg, weight=weight) for weight in (1.0, 5.0, 25.0, 125.0)],
    "SimCLR": [partial(simclr, temperature=temperature) for temperature in (0.05, 0.1, 0.5, 1.0)],
}
LEARNING_RATES = (0.01, 0.03, 0.1)


@dataclass
class Run:
    """What one pre-training leaves behind."""

    loss: float  # the objective in its last epoch
    embeddings: Tensor  # of the training images, after the projector
    validation: float  # linear probe before the projector, cross-validated on the training labels
    accuracy: float  # the same probe on the test images


def pretrain_all(trial: Trial) -> dict[str, list[list[Run]]]:
    """Every configuration once, from the same weights over the same views: a row a variant of the objective, a column a rate."""
    world = digits.split(trial.rng)
    start = trial.generator.get_state()

    def pretrain(objective: Callable[[Tensor, Tensor], Tensor], lr: float) -> Run:
        trial.generator.set_state(start)
        network = digits.JointEmbedding(trial.generator)
        trial.count(network)
        loss = digits.pretrain(network, world.train.images, objective, lr=lr, epochs=1 if trial.smoke else 80, trial=trial)
        representations, embeddings = digits.embed(network, world.train.images)
        return finished(world, loss, embeddings, representations, digits.embed(network, world.test.images)[0])

    few = slice(2) if trial.smoke else slice(None)
    grids = {
        name: [[pretrain(variant, lr) for lr in LEARNING_RATES[few]] for variant in trial.track(variants[few], name)]
        for name, variants in OBJECTIVES.items()
    }
    noise = [torch.randn(len(part.images), digits.WIDTH, generator=trial.generator) for part in (world.train, world.test)]
    return grids | {"noise": [[finished(world, 0.0, noise[0], *noise)]]}


def finished(world: digits.Split, loss: float, embeddings: Tensor, train: Tensor, test: Tensor) -> Run:
    return Run(
        loss=loss,
        embeddings=embeddings,
        validation=digits.cross_validated_probe(train, world.train.labels),
        accuracy=digits.linear_probe(train, world.train.labels, test, world.test.labels),
    )


def sweeps(grids: dict[str, list[list[Run]]]) -> Iterator[tuple[str, list[tuple[Run, ...]]]]:
    """The paper's use of RankMe: choose among runs that differ in one hyper-parameter."""
    for objective, own in (("VICReg", "covariance weight"), ("SimCLR", "temperature")):
        yield f"{objective}: {own}", list(zip(*grids[objective], strict=True))
        yield f"{objective}: learning rate", [tuple(row) for row in grids[objective]]


def choose(
    trial: Trial, grids: dict[str, list[list[Run]]], by: Callable[[Run], float], with_noise: bool = False
) -> dict[str, float]:
    """From each sweep, and from each whole grid, take the run that scores highest."""
    noise = grids["noise"][0] if with_noise else []
    chosen = {name: mean(max([*runs, *noise], key=by).accuracy for runs in each) for name, each in sweeps(grids)}
    orders = {name: sorted([*chain(*grids[name]), *noise], key=by, reverse=True) for name in OBJECTIVES}
    for name, order in orders.items():
        sigma = spectrum(order[0].embeddings)
        for k, run in enumerate(order, start=1):
            trial.record(k, **{f"{name}: accuracy of the k-th choice": run.accuracy})
        for k, value in enumerate(sigma / sigma[0], start=1):
            trial.record(k, **{f"{name}: k-th singular value of the first choice": value.item()})
    return {
        "accuracy": mean(chosen.values()),
        "grid accuracy": mean(order[0].accuracy for order in orders.values()),
        **chosen,
        **{f"{name}: rank correlation": rank_correlation(by, order) for name, order in orders.items()},
        "joint rank correlation": rank_correlation(by, list(chain(*orders.values()))),
    }


def by_chance(trial: Trial, grids: dict[str, list[list[Run]]]) -> dict[str, float]:
    """What drawing by lot gives on average."""
    drawn = {name: mean(run.accuracy for runs in each for run in runs) for name, each in sweeps(grids)}
    return {"accuracy": mean(drawn.values()), "grid accuracy": mean(drawn.values()), **drawn}


def rank_correlation(by: Callable[[Run], float], runs: list[Run]) -> float:
    return float(spearmanr([by(run) for run in runs], [run.accuracy for run in runs]).statistic)


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def correlation(metrics: Mapping[str, Mapping[str, float]], objective: str) -> float:
    return metrics["RankMe"][f"{objective}: rank correlation"]


by_rankme = partial(choose, by=lambda run: rankme(run.embeddings).item())

study = Study(
    method="rankme",
    prepare=pretrain_all,
    arms={
        "random pick": by_chance,
        "training loss": partial(choose, by=lambda run: -run.loss),
        "alpha-ReQ": partial(choose, by=lambda run: -abs(alpha_req(run.embeddings) - 1)),
        "RankMe": by_rankme,
        "labels": partial(choose, by=lambda run: run.validation),
        "RankMe + a run of noise": partial(by_rankme, with_noise=True),
    },
    claim=beats("RankMe", "random pick", on="accuracy"),
    also=[
        holds(
            "choosing by labels gains less than 1 point of accuracy over RankMe",
            lambda metrics: metrics["labels"]["accuracy"] - metrics["RankMe"]["accuracy"],
            below=0.01,
        ),
        beats("RankMe", "training loss", on="accuracy"),
        beats("RankMe", "alpha-ReQ", on="accuracy"),
        beats("RankMe", "random pick", on="grid accuracy"),
        holds("RankMe orders VICReg runs as accuracy does", lambda metrics: correlation(metrics, "VICReg"), above=0),
        holds("RankMe orders SimCLR runs as accuracy does", lambda metrics: correlation(metrics, "SimCLR"), above=0),
        holds(
            "RankMe orders the runs of both objectives together worse than those of one",
            lambda metrics: mean(correlation(metrics, name) for name in OBJECTIVES) - metrics["RankMe"]["joint rank correlation"],
            above=0,
        ),
        holds(
            "RankMe falls for white noise: it chooses that run and loses more than 50 points",
            lambda metrics: metrics["RankMe"]["accuracy"] - metrics["RankMe + a run of noise"]["accuracy"],
            above=0.5,
        ),
    ],
    equal="the 24 trained networks, their embeddings, and the probe that scores a choice",
    data=("digits",),
)
