"""With training data for few of the classes, does Loki come closer to the truth in a label metric than argmax does?

The module of a function is to be told from its docstring and its code. Modules are nodes of a tree, five packages below one root,
and a prediction costs the square of its distance from the truth. Most modules have no function in the training data.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_diabetes
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from firsthand import Study, Trial, beats, holds
from firsthand.decode.locus import next_class, tree_locus
from firsthand.decode.loki import TEMPERATURES, loki_predict_embedding, loki_predict_tree, squared_distance
from firsthand.testbeds import embedding

FEW = (10, 30, 100)  # classes in the training data
SHARPNESS = 20.0  # of cosines where nothing is trained; what sentence-transformers trains with
BINS = 20


@dataclass(frozen=True)
class Labels:
    """Labels as nodes of a tree, which may have more nodes, and as points."""

    edges: Tensor
    nodes: Tensor  # of each label
    points: Tensor  # of each label


@dataclass(frozen=True)
class Task:
    """What a classifier says of test data, to be turned into labels."""

    labels: Labels
    probs: Tensor  # (samples, observed)
    observed: Tensor  # labels
    truth: Tensor  # labels
    centre: Tensor  # share of each observed class in the training data
    temperature: float = 1.0  # with which Loki errs least in a cross-validation on the training data


World = dict[str, Task]
Rule = Callable[[Task], Tensor]

# The world: modules and functions


def prepare(trial: Trial) -> World:
    everything, modules, truth = functions_with_modules(few=trial.smoke)
    embed = embedding.frozen if "minilm" in trial.data else tfidf([*everything.sentences, *everything.codes], modules)
    sentences, codes = embed(everything.sentences), embed(everything.codes)
    labels = module_tree(modules, embed([words(module) for module in modules]))
    features = torch.cat([sentences, codes], dim=1).numpy()

    groups = trial.rng.permutation(np.unique(everything.groups))
    held_out = np.isin(everything.groups, groups[: len(groups) // 3])  # no sentence on both sides
    train, test = np.flatnonzero(~held_out & (truth >= 0)), np.flatnonzero(held_out & (truth >= 0))
    at_hand = np.flatnonzero(np.bincount(truth[train], minlength=len(modules)) >= 5)
    by_lot = trial.rng.permutation(at_hand)
    sizes = (2, 3, 5) if trial.smoke else FEW
    chosen = choose(labels, int(by_lot[0]), at_hand, max(sizes))
    world = {}
    for size, name in zip(sizes, FEW, strict=True):
        for how, order in (("", by_lot), (", chosen", chosen)):
            rows = train[np.isin(truth[train], order[:size])]
            world[f"{name} classes{how}"] = classify(labels, features[rows], truth[rows], features[test], truth[test], C=30.0)
    cosines = F.normalize(sentences[test], dim=1) @ F.normalize(labels.points, dim=1).T
    everyone = torch.arange(len(modules))
    equal = torch.full((len(modules),), 1 / len(modules))
    world["no training"] = Task(labels, (SHARPNESS * cosines).softmax(dim=1), everyone, torch.from_numpy(truth[test]), equal)
    world["bins"] = diabetes(trial)
    return world


def functions_with_modules(few: bool) -> tuple[embedding.Functions, list[str], np.ndarray]:
    """Functions, the modules with at least five of them, and the module of each function, -1 for the others."""
    everything = embedding.functions()
    if few:
        everything = everything.take(range(0, 400, 2))
    names = [
        f"stdlib.{module}" if package == "stdlib" else module
        for module, package in zip(everything.modules, everything.packages, strict=True)
    ]
    modules = sorted(module for module, count in Counter(names).items() if count >= 5)
    number = {module: index for index, module in enumerate(modules)}
    return everything, modules, np.array([number.get(name, -1) for name in names])


def module_tree(modules: list[str], points: Tensor) -> Labels:
    """Each part of a dotted name is a step down from the root."""
    paths = [tuple(module.split(".")) for module in modules]
    number: dict[tuple[str, ...], int] = {(): 0}
    for path in paths:
        for depth in range(1, len(path) + 1):
            number.setdefault(path[:depth], len(number))
    edges = torch.tensor([[number[path[:-1]], node] for path, node in number.items() if path])
    return Labels(edges, torch.tensor([number[path] for path in paths]), points)


def words(module: str) -> str:
    return " ".join(module.replace("_", " ").replace(".", " ").split())


def tfidf(texts: list[str], modules: list[str]) -> Callable[[list[str]], Tensor]:
    """Embeddings that need no model: words weighed by rarity, brought to few dimensions."""
    count = TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"[A-Za-z]{2,}", dtype=np.float32)
    counts = count.fit_transform([*texts, *map(words, modules)])
    reduce = TruncatedSVD(min(200, counts.shape[1] - 1), n_iter=2, random_state=0).fit(counts)
    return lambda some: F.normalize(torch.from_numpy(reduce.transform(count.transform(some))), dim=1)


def choose(labels: Labels, first: int, at_hand: np.ndarray, how_many: int) -> np.ndarray:
    """Classes one after the other, each where it enlarges the locus most."""
    label = {node: index for index, node in enumerate(labels.nodes.tolist())}
    candidates = labels.nodes[torch.from_numpy(at_hand)].tolist()
    observed = [int(labels.nodes[first])]
    while len(observed) < how_many:
        observed.append(next_class(observed, edges=labels.edges, candidates=candidates))
    return np.array([label[node] for node in observed])


def classify(labels: Labels, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, C: float) -> Task:
    """Logistic regression. C is what argmax errs least with: of 1 to 100 for modules, of 0.03 to 30 for bins, on seeds 1 to 4."""
    model = LogisticRegression(C=C, max_iter=1000)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    out_of_fold = torch.from_numpy(cross_val_predict(model, x, y, cv=folds, method="predict_proba"))
    model.fit(x, y)
    observed, share = np.unique(y, return_counts=True)
    task = Task(
        labels,
        torch.from_numpy(model.predict_proba(x_test)).float(),
        torch.from_numpy(observed),
        torch.from_numpy(y_test),
        torch.from_numpy(share / len(y)).float(),
    )
    held_out = replace(task, probs=out_of_fold.float(), truth=torch.from_numpy(y))

    def loss(temperature: float) -> float:
        return tree_error(held_out, tree(held_out, temperature)).mean().item()

    return replace(task, temperature=min(TEMPERATURES, key=loss))


def diabetes(trial: Trial) -> Task:
    """How far the disease has come after a year, in bins of equal size. Every fourth bin and the last have training data."""
    x, y = load_diabetes(return_X_y=True)
    bins = np.searchsorted(np.quantile(y, np.arange(1, BINS) / BINS), y)
    order = trial.rng.permutation(len(y))
    test, train = order[: len(y) // 2], order[len(y) // 2 :]
    train = train[np.isin(bins[train], [*range(0, BINS, 4), BINS - 1])]
    edges = torch.stack([torch.arange(BINS - 1), torch.arange(1, BINS)], dim=1)
    line = Labels(edges, torch.arange(BINS), torch.arange(float(BINS))[:, None])
    scaled = x / x.std(axis=0)
    return classify(line, scaled[train], bins[train], scaled[test], bins[test], C=3.0)


# The arms: ways to turn probabilities into a label


def argmax(task: Task) -> Tensor:
    return task.observed[task.probs.argmax(dim=1)]


def tree(task: Task, temperature: float = 1.0, allowed: Tensor | None = None) -> Tensor:
    """Loki on the tree. Inner nodes that are no labels may not be predicted: they are near to much and nobody's truth."""
    labels = task.labels
    node = loki_predict_tree(
        task.probs.clamp(min=1e-30).log(),
        labels.edges,
        labels.nodes[task.observed],
        labels=labels.nodes if allowed is None else labels.nodes[allowed],
        temperature=temperature,
    )
    label = torch.full((len(labels.edges) + 1,), -1)
    label[labels.nodes] = torch.arange(len(labels.nodes))
    return label[node]


def tuned(task: Task) -> Tensor:
    return tree(task, task.temperature)


def observed_only(task: Task) -> Tensor:
    """Loki that may not predict what nobody trained on."""
    return tree(task, allowed=task.observed)


def names(task: Task) -> Tensor:
    """Loki with the distances that the embeddings of the labels' names have: no tree is known."""
    return loki_predict_embedding(task.probs, task.labels.points[task.observed], task.labels.points)


def random_tree(task: Task, generator: torch.Generator) -> Tensor:
    """Loki with the labels on the wrong nodes."""
    shuffled = task.labels.nodes[torch.randperm(len(task.labels.nodes), generator=generator)]
    return tree(replace(task, labels=replace(task.labels, nodes=shuffled)))


def centre(task: Task) -> Tensor:
    """The same for every sample: the Fréchet mean of the training data."""
    return tree(replace(task, probs=task.centre[None])).expand(len(task.truth))


def tree_error(task: Task, label: Tensor) -> Tensor:
    nodes = task.labels.nodes
    return squared_distance(nodes[label], nodes[task.truth], edges=task.labels.edges)


def score(trial: Trial, world: World, rule: Rule, how: str = "") -> dict[str, float]:
    metrics = {}
    for name in [f"{few} classes" for few in FEW] + ["no training", "bins"]:
        task = world.get(name + how, world[name])
        label = rule(task)
        points = task.labels.points
        metrics |= {
            f"squared distance, {name}": tree_error(task, label).mean().item(),
            f"squared distance of names, {name}": squared_distance(label, task.truth, embeddings=points).mean().item(),
            f"accuracy, {name}": (label == task.truth).float().mean().item(),
            f"locus, {name}": len(tree_locus(task.labels.edges, task.labels.nodes[task.observed])) / (len(task.labels.edges) + 1),
        }
    return metrics


study = Study(
    method="loki",
    prepare=prepare,
    arms={
        "argmax": lambda trial, world: score(trial, world, argmax),
        "Loki, tree": lambda trial, world: score(trial, world, tree),
        "Loki, tuned temperature": lambda trial, world: score(trial, world, tuned),
        "Loki, names": lambda trial, world: score(trial, world, names),
        "Loki, random tree": lambda trial, world: score(trial, world, lambda task: random_tree(task, trial.generator)),
        "Loki, observed only": lambda trial, world: score(trial, world, observed_only),
        "Loki, tree, chosen classes": lambda trial, world: score(trial, world, tree, ", chosen"),
        "centre": lambda trial, world: score(trial, world, centre),
    },
    claim=beats("Loki, tree", "argmax", on="squared distance, 30 classes", lower_is_better=True),
    also=[
        beats("Loki, tree", "argmax", on="squared distance, 10 classes", lower_is_better=True),
        beats("Loki, tree", "argmax", on="squared distance, 100 classes", lower_is_better=True),
        beats("Loki, tree", "argmax", on="squared distance, bins", lower_is_better=True),
        beats("Loki, tree", "Loki, observed only", on="squared distance, 30 classes", lower_is_better=True),
        beats("Loki, tree", "centre", on="squared distance, 30 classes", lower_is_better=True),
        beats("Loki, tuned temperature", "Loki, tree", on="squared distance, 30 classes", lower_is_better=True),
        beats("Loki, names", "argmax", on="squared distance, 30 classes", lower_is_better=True),
        beats("Loki, names", "argmax", on="squared distance of names, 30 classes", lower_is_better=True),
        beats("Loki, names", "argmax", on="squared distance of names, no training", lower_is_better=True),
        beats("argmax", "Loki, random tree", on="squared distance, 30 classes", lower_is_better=True),
        beats("Loki, tree, chosen classes", "Loki, tree", on="locus, 30 classes"),
        beats("Loki, tree, chosen classes", "Loki, tree", on="squared distance, 30 classes", lower_is_better=True),
        holds(
            "what it gains in distance Loki pays for in accuracy, with 30 classes",
            lambda metrics: metrics["argmax"]["accuracy, 30 classes"] - metrics["Loki, tree"]["accuracy, 30 classes"],
            above=0.0,
        ),
    ],
    equal="the classifier and its probabilities, the labels that may be predicted, the test functions",
    seeds=10,
    data=("docstrings", "minilm"),
    fallback=("docstrings",),
)
