"""Where tasks pull apart and one has most of the data, is a learned merge better than joint training and than the average?

One encoder, three tasks with 4, 1 and 1 parts of the steps: finding functions by their sentence, telling modules apart, and
judging how near two functions are. One expert is trained on each; merging searches its position on a few balanced batches.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firsthand import Study, Trial, beats, holds, matches
from firsthand.testbeds import embedding
from firsthand.testbeds.embedding import Functions
from firsthand.weights.self_positioning import merge_at, self_positioning, task_vector_stats

TASKS = {"retrieval": 4, "modules": 1, "nearness": 1}  # parts of the data and of the steps
SCORE = {"retrieval": "ndcg@10", "modules": "accuracy", "nearness": "spearman"}
Batch = tuple[str, list[list[str]], Tensor | None]  # task, columns of texts, labels
State = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """The common start, and what training on each task made of it."""

    model: Any  # a SentenceTransformer
    train: dict[str, Functions]  # of each task
    probe: Functions  # that no task has trained on, for the search
    test: Functions
    experts: dict[str, State]
    expert_scores: dict[str, float]  # of each task, by its own expert
    steps: int  # of one part
    search: int  # steps of the search, each a batch of every task


def prepare(trial: Trial) -> Setting:
    part, batch, steps, search = (32, 8, 2, 2) if trial.smoke else (500, 32, 60, 40)
    parts = sum(TASKS.values())
    probe = 60 if trial.smoke else 400
    train, test = embedding.split(
        embedding.functions(), trial.rng, train=(parts + 1) * part + probe, test=200 if trial.smoke else 1000
    )
    ends = np.cumsum([0, probe, part, *(share * part for share in TASKS.values())])
    pieces = [train.take(range(low, high)) for low, high in itertools.pairwise(ends)]
    learnt = embedding.tokenizer([*train.sentences, *train.codes], 500 if trial.smoke else 4000)
    bert = embedding.bert(trial.generator, learnt.vocab_size, hidden=96, layers=2)
    model = embedding.sentence_transformer(bert, learnt, length=32)
    start = batches("names", pieces[1], batch, trial.rng)
    descend(model, (next(start) for _ in range(5 * steps)), 5 * steps, trial, lr=1e-3)

    setting = Setting(model, dict(zip(TASKS, pieces[2:], strict=True)), pieces[0], test, {}, {}, steps, search)
    before = copy_of(model)
    for task, share in TASKS.items():
        model.load_state_dict(before)
        stream = batches(task, setting.train[task], batch, trial.rng)
        descend(model, (next(stream) for _ in range(share * steps)), share * steps, trial)
        setting.experts[task] = copy_of(model)
        setting.expert_scores[task] = scores(model, test)[task]
    model.load_state_dict(before)
    return setting


def copy_of(model: Any) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def batches(task: str, functions: Functions, size: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Pairs to learn a task from, without end.

    Of names: a name in words and its sentence, the start that all share. Of retrieval: a sentence and its code. Of modules: two
    codes of one module. Of nearness: two sentences and how much of the way to their modules they have in common.
    """
    members: dict[str, list[int]] = {}
    for row, module in enumerate(functions.modules):
        members.setdefault(module, []).append(row)
    several = [row for row, module in enumerate(functions.modules) if len(members[module]) > 1]
    while True:
        if task in ("names", "retrieval"):
            rows = rng.permutation(len(functions))[:size]
            first = functions.names if task == "names" else functions.sentences
            second = functions.sentences if task == "names" else functions.codes
            yield task, [[column[row] for row in rows] for column in (first, second)], None
        elif task == "modules":
            rows, seen = [], set()
            for row in rng.permutation(several):
                if functions.modules[row] not in seen and len(rows) < size:
                    seen.add(functions.modules[row])
                    rows.append(int(row))
            peers = [int(rng.choice([peer for peer in members[functions.modules[row]] if peer != row])) for row in rows]
            yield task, [[functions.codes[row] for row in side] for side in (rows, peers)], None
        else:
            left, right = rng.integers(len(functions), size=(2, size))
            half = [members[functions.modules[row]] for row in left[: size // 2]]
            right[: size // 2] = [rng.choice(peers) for peers in half]
            near = [embedding.nearness(functions.modules[i], functions.modules[j]) for i, j in zip(left, right, strict=True)]
            yield task, [[functions.sentences[row] for row in side] for side in (left, right)], torch.tensor(near)


def task_loss(model: Any, batch: Batch) -> Tensor:
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MultipleNegativesRankingLoss

    task, columns, labels = batch
    loss: Any = CoSENTLoss(model) if task == "nearness" else MultipleNegativesRankingLoss(model)
    value: Tensor = loss([embedding.features_of(model, column) for column in columns], labels)
    return value


def descend(model: Any, stream: Iterator[Batch], steps: int, trial: Trial, lr: float = 3e-4) -> None:
    """Train with AdamW; the learning rate falls to nothing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.to(trial.device).train()
    for step, batch in enumerate(trial.track(list(stream), "training")):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        task_loss(model, batch).backward()
        optimizer.step()


def scores(model: Any, test: Functions) -> dict[str, float]:
    found = embedding.evaluate(lambda texts: embedding.embed(model, texts), test, np.random.default_rng(0))
    return {task: found[metric] for task, metric in SCORE.items()}


def judged(setting: Setting, state: State | None = None) -> dict[str, float]:
    """Each task's score, and their mean as a share of what the task's own expert reaches."""
    if state is not None:
        setting.model.load_state_dict(state)
    found = scores(setting.model, setting.test)
    shares = [found[task] / setting.expert_scores[task] for task in TASKS]
    return {"mean score": float(np.mean(shares))} | {SCORE[task]: found[task] for task in TASKS}


def joint(trial: Trial, setting: Setting, share: dict[str, int]) -> dict[str, float]:
    """All tasks in one training, with as many batches as the experts and the search had together."""
    size = 8 if trial.smoke else 32
    streams = {task: batches(task, setting.train[task], size, trial.rng) for task in TASKS}
    steps = sum(TASKS.values()) * setting.steps + searching(setting)
    drawn = trial.rng.choice(list(TASKS), size=steps, p=np.array(list(share.values())) / sum(share.values()))
    trial.count(setting.model)
    descend(setting.model, (next(streams[task]) for task in drawn), steps, trial)
    return judged(setting)


def searching(setting: Setting) -> int:
    """Batches that the search takes: two folds, a batch of each task a step."""
    return 2 * setting.search * len(TASKS)


def joint_natural(trial: Trial, setting: Setting) -> dict[str, float]:
    return joint(trial, setting, TASKS)


def joint_balanced(trial: Trial, setting: Setting) -> dict[str, float]:
    return joint(trial, setting, dict.fromkeys(TASKS, 1))


def merging(merge: Callable[[State, list[State]], State]) -> Callable[[Trial, Setting], dict[str, float]]:
    def arm(trial: Trial, setting: Setting) -> dict[str, float]:
        trial.count(setting.model)
        return judged(setting, merge(setting.model.state_dict(), list(setting.experts.values())))

    return arm


def average(start: State, experts: list[State]) -> State:
    return merge_at(start, experts, [1 / len(experts)] * len(experts), path="linear")


def slerp(start: State, experts: list[State]) -> State:
    return merge_at(start, experts, [0.5] * (len(experts) - 1))


def ties(start: State, experts: list[State]) -> State:
    """Keep the largest fifth of each task vector, elect a sign for each weight, average what agrees (as peft has it)."""
    from peft.utils.merge_utils import ties as merge

    return {
        name: value + merge([expert[name] - value for expert in experts], torch.ones(len(experts)), density=0.2)
        if value.is_floating_point()
        else value
        for name, value in start.items()
    }


def learned(trial: Trial, setting: Setting, path: str = "spherical") -> dict[str, float]:
    size, count = (8, 2) if trial.smoke else (32, 8)
    streams = [batches(task, setting.probe, size, trial.rng) for task in TASKS]
    probe = [[next(stream) for stream in streams] for _ in range(count)]  # a batch of every task, used again and again
    found = self_positioning(
        setting.model.to(trial.device),
        list(setting.experts.values()),
        lambda model, every: torch.stack([task_loss(model, batch) for batch in every]).mean(),
        probe,
        steps=setting.search if path == "spherical" else 2 * setting.search,
        path=path,
        progress=False,
    )
    for step, value in enumerate(found.history):
        trial.record(step + 1, **{"probe loss": value})
    trial.count(setting.model)
    metrics = judged(setting, found.state_dict)
    metrics |= {f"length {number}": float(length) for number, (_, length) in enumerate(found.position, 1)}
    if path == "spherical":
        metrics |= {f"position {number}": float(t) for number, (t, _) in enumerate(found.position, 1)}
        stats = task_vector_stats(setting.model, list(setting.experts.values()))
        metrics |= {f"length of {task}": value for task, value in zip(TASKS, stats["norms"].tolist(), strict=True)}
    return metrics


def learned_linear(trial: Trial, setting: Setting) -> dict[str, float]:
    return learned(trial, setting, path="linear")


study = Study(
    method="self-positioning",
    prepare=prepare,
    arms={
        "joint, natural mix": joint_natural,
        "joint, balanced": joint_balanced,
        "average": merging(average),
        "slerp": merging(slerp),
        "TIES": merging(ties),
        "self-positioning": learned,
        "self-positioning, linear": learned_linear,
    },
    claim=beats("self-positioning", "joint, natural mix", on="mean score"),
    also=[
        beats("self-positioning", "joint, balanced", on="mean score"),
        beats("self-positioning", "average", on="mean score"),
        beats("self-positioning", "slerp", on="mean score"),
        beats("self-positioning", "TIES", on="mean score"),
        matches("self-positioning, linear", "self-positioning", on="mean score", within=0.02),
        holds(
            "the task with most data has the longest task vector",
            lambda arms: (
                arms["self-positioning"]["length of retrieval"]
                - max(arms["self-positioning"]["length of modules"], arms["self-positioning"]["length of nearness"])
            ),
            above=0.0,
        ),
    ],
    equal="start, encoder, batches in all (those of the search are counted), batch size, learning rate",
    seeds=6,
    data=("docstrings",),
)
