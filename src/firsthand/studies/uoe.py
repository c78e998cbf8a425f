"""Is unlearning in one expert enough, and does it cost less of what else the model knows than unlearning in all of it?

A sparse language model learns facts ("entity relation value") of eight topics, each with words of its own, and to predict
Python's documentation byte by byte. One topic is to be forgotten. Two topics and the text that was trained on are there to be
retained by the objectives that use them; what is lost is measured on topics and text that unlearning never sees.

Forgetting and utility trade against each other along a run, so arms are compared at equal forgetting: where the accuracy on the
forgotten facts comes down to twice that of guessing, between two checkpoints by interpolation, or at a later checkpoint that is
below. Each arm unlearns at three learning rates; of all these points the one with the best utility on validation topics and text
is taken, and its utility on the test topics and text is what counts. It is 0 for an arm that never forgets that much.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from firsthand import Study, Trial, beats, holds
from firsthand.moe.balance import load_balancing_loss
from firsthand.moe.blocks import capture_routing, moe_blocks, register_experts_backend
from firsthand.moe.uoe import (
    SingleExpertUnlearner,
    expert_affinity_from,
    npo_loss,
    select_experts,
    selection_overlap,
    sequence_log_probs,
)
from firsthand.testbeds import lm, moe_lm, text

TOPICS, ENTITIES, RELATIONS, VALUES = 8, 12, 4, 16
FORGET, RETAIN, VALIDATION, TEST = [0], [1, 2], [3, 4], [5, 6, 7]
FORGOTTEN = 2 / VALUES  # twice what guessing gets right

BLOCK = 48  # tokens: 12 facts, or 48 bytes
BYTES = len(text.SPECIAL)  # the first byte's token; only ASCII is left in the text
TOPIC = BYTES + 128  # the first topic's first token: its entities, then its relations, then its values
WORDS = ENTITIES + RELATIONS + VALUES
VOCAB = TOPIC + TOPICS * WORDS

NPO_BETA = 0.1  # of NPO's own authors; with the 0.001 that UOE's use, NPO is gradient ascent

# For each way of unlearning, learning rates around the best of a few tuning seeds; with the smallest, the 80 steps may not do.
WHOLE, ONE = (1e-4, 2e-4, 4e-4), (5e-4, 1e-3, 2e-3)


@dataclass
class World:
    model: Any  # knows all topics and the text
    values: Tensor  # topic, entity, relation -> value
    prose: dict[str, Tensor]  # text in bytes: to train and retain, to validate and to test on
    facts: Tensor  # topic, block, token: all facts, as they are asked
    affinity: Tensor  # layer, expert
    routing: list[Tensor]  # of each layer: the experts of the forgotten topic's tokens
    perplexity: dict[str, float]  # of the text to validate and to test on


Point = dict[str, float]  # what is measured, in the middle of a run


# The world


def topic_blocks(values: Tensor, topic: int, generator: torch.Generator) -> Tensor:
    """All facts of a topic, in random order, as blocks of tokens."""
    entity, relation = torch.meshgrid(torch.arange(ENTITIES), torch.arange(RELATIONS), indexing="ij")
    first = TOPIC + topic * WORDS
    words = [first + entity, first + ENTITIES + relation, first + ENTITIES + RELATIONS + values[topic]]
    facts = torch.stack([*words, torch.full_like(entity, text.END)], dim=-1).view(-1, 4)
    return facts[torch.randperm(len(facts), generator=generator)].view(-1, BLOCK)


def prose_blocks(prose: Tensor, number: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(prose) - BLOCK, (number, 1), generator=generator)
    return prose[starts + torch.arange(BLOCK)]


def pretraining(values: Tensor, prose: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """Without end: 16 blocks of facts, each of one topic, and 16 of text."""
    while True:
        topics = torch.randint(TOPICS, (16,), generator=generator).tolist()
        facts = [topic_blocks(values, topic, generator)[0] for topic in topics]
        yield torch.cat([torch.stack(facts), prose_blocks(prose, 16, generator)])


def prepare(trial: Trial) -> World:
    register_experts_backend()
    split = text.split(text.documents("docs"), trial.rng)
    size = 20_000 if trial.smoke else 600_000
    prose = {}
    for part, share in (("train", 1.0), ("validation", 0.1), ("test", 0.1)):
        documents = text.sample(getattr(split, part), trial.rng, int(size * share))
        ascii_only = "\n".join(document["text"] for document in documents).encode("ascii", "replace")
        prose[part] = torch.tensor(list(ascii_only)) + BYTES
    values = torch.randint(VALUES, (TOPICS, ENTITIES, RELATIONS), generator=trial.generator)

    layers, steps = (2, 4) if trial.smoke else (4, 500)
    model = moe_lm.mixtral(trial.generator, VOCAB, layers=layers, context=BLOCK, initializer_range=0.05).to(trial.device)
    model.set_experts_implementation("firsthand")
    balanced = moe_lm.loss_with(lambda logits: 0.01 * torch.stack([load_balancing_loss(each, 2) for each in logits]).mean())
    stream = pretraining(values, prose["train"], trial.generator)
    lm.train(model, stream, steps=steps, lr=5e-3, loss=balanced, weight_decay=0.01, trial=trial, curve="pretraining_loss")
    model.eval()

    world = World(model, values, prose, torch.empty(0), torch.empty(0), [], {})
    world.facts = torch.stack([topic_blocks(values, topic, trial.generator) for topic in range(TOPICS)])
    for part in ("validation", "test"):
        prose[part] = prose_blocks(prose[part], 2 if trial.smoke else 40, trial.generator)
        world.perplexity[part] = perplexity(model, prose[part])
    forgotten = {"input_ids": world.facts[0].to(trial.device)}
    world.affinity = expert_affinity_from(model, [forgotten])
    world.routing = routing(model, forgotten)
    return world


# What is measured


@torch.no_grad()
def accuracy(model: Any, facts: Tensor) -> float:
    """Share of the facts whose value is the likeliest token after entity and relation."""
    tokens = facts.flatten(0, 1)
    guesses = model(input_ids=tokens).logits[:, 1::4].argmax(-1)
    return (guesses == tokens[:, 2::4]).float().mean().item()


@torch.no_grad()
def perplexity(model: Any, blocks: Tensor) -> float:
    device = next(model.parameters()).device
    return math.exp(min(lm.next_token_loss(model, blocks.to(device)).item(), 100.0))


@torch.no_grad()
def routing(model: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
    with capture_routing(model) as kept:
        model(**batch)
    return [each.index for each in kept]


def examine(model: Any, world: World) -> Point:
    device = next(model.parameters()).device
    facts = world.facts.to(device)
    now = routing(model, {"input_ids": facts[0]})
    point = {
        "forget accuracy": accuracy(model, facts[FORGET]),
        "overlap": sum(float(selection_overlap(*pair)) for pair in zip(world.routing, now, strict=True)) / len(now),
    }
    for part, topics in (("validation", VALIDATION), ("test", TEST)):
        point[f"{part} facts"] = accuracy(model, facts[topics])
        point[f"{part} text"] = world.perplexity[part] / perplexity(model, world.prose[part])
        point[f"{part} utility"] = (point[f"{part} facts"] + point[f"{part} text"]) / 2
    return point


def forgotten(run: list[Point]) -> list[Point]:
    """The points of a run at which enough is forgotten: where it comes to be so, and the checkpoints where it is."""
    points = [point for point in run if point["forget accuracy"] <= FORGOTTEN]
    for before, after in itertools.pairwise(run):
        above, below = before["forget accuracy"] - FORGOTTEN, after["forget accuracy"] - FORGOTTEN
        if below < 0 < above:
            share = above / (above - below)
            points.append({name: before[name] + share * (after[name] - before[name]) for name in before})
    return points


# The arms

Loss = Callable[[Tensor, Tensor], Tensor]  # of a forget and a retain batch


def batches(world: World, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: all facts to forget, and as many tokens to retain, half of them facts."""
    while True:
        facts = [topic_blocks(world.values, topic, generator)[:1] for topic in RETAIN]
        retain = torch.cat([*facts, prose_blocks(world.prose["train"], 2, generator)])
        yield topic_blocks(world.values, 0, generator), retain


def unlearn(
    trial: Trial, world: World, start: Callable[..., tuple[list[torch.nn.Parameter], Loss]], rates: tuple[float, ...]
) -> dict[str, float]:
    steps, every = (2, 1) if trial.smoke else (80, 5)
    trial.count(world.model)
    order = trial.generator.get_state()
    runs = {}
    for rate in rates:
        model = copy.deepcopy(world.model)
        trained, loss = start(model, world)
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        stream = batches(world, trial.generator.set_state(order))  # the same batches in each run
        run = [examine(model, world) | {"learning rate": rate, "steps": 0.0}]
        for step in trial.track(range(1, steps + 1), f"rate {rate:g}"):
            loss(*(batch.to(trial.device) for batch in next(stream))).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % every == 0:
                run.append(examine(model, world) | {"learning rate": rate, "steps": float(step)})
        runs[rate] = run

    points = [point for run in runs.values() for point in forgotten(run)]
    best = max(points, key=lambda point: point["validation utility"], default=None)
    chosen = best or min(itertools.chain(*runs.values()), key=lambda point: point["forget accuracy"])
    run = runs[chosen["learning rate"]]
    for point in run:
        trial.record(point["steps"], forget_accuracy=point["forget accuracy"], utility=point["test utility"])
    return {
        "utility": chosen["test utility"] if best else 0.0,
        "forget accuracy": chosen["forget accuracy"],
        "overlap": chosen["overlap"],
        "other facts": chosen["test facts"],
        "text": chosen["test text"],
        "forgot": float(best is not None),
        "utility at the end": run[-1]["test utility"],
        "forget accuracy at the end": run[-1]["forget accuracy"],
        "learning rate": chosen["learning rate"],
        "steps": chosen["steps"],
    }


def whole(model: Any, world: World, objective: str, routers: bool = True) -> tuple[list[torch.nn.Parameter], Loss]:
    """All parameters, or all but the routers'."""
    if not routers:
        for block in moe_blocks(model):
            block.router.requires_grad_(False)

    def loss(forget: Tensor, retain: Tensor) -> Tensor:
        if objective == "npo":
            with torch.no_grad():
                reference = sequence_log_probs(world.model(input_ids=forget).logits, forget)
            return npo_loss(sequence_log_probs(model(input_ids=forget).logits, forget), reference, NPO_BETA)
        ascent = -lm.next_token_loss(model, forget)
        return ascent + lm.next_token_loss(model, retain) if objective == "gdiff" else ascent

    return [parameter for parameter in model.parameters() if parameter.requires_grad], loss


def one_expert(
    model: Any, world: World, objective: str, anchor: float = 1.0, which: str = "most used"
) -> tuple[list[torch.nn.Parameter], Loss]:
    """One expert and the router of its layer: the expert that the forgotten topic uses most, or another one."""
    ((layer, expert),) = select_experts(world.affinity)
    layers, experts = world.affinity.shape
    draw = torch.Generator().manual_seed(int(world.values.sum()))
    if which == "another of its layer":
        expert = (expert + int(torch.randint(1, experts, (), generator=draw))) % experts
    elif which == "any other":
        others = [place for place in itertools.product(range(layers), range(experts)) if place != (layer, expert)]
        layer, expert = others[int(torch.randint(len(others), (), generator=draw))]
    unlearner = SingleExpertUnlearner(model, [(layer, expert)], objective, anchor, beta=NPO_BETA)

    def loss(forget: Tensor, retain: Tensor) -> Tensor:
        return unlearner({"input_ids": forget}, {"input_ids": retain} if objective == "gdiff" else None)["loss"]

    return unlearner.trainable_parameters(), loss


def mean_gain(metric: str) -> Callable[[Mapping[str, Mapping[str, float]]], float]:
    """Over the three objectives, what unlearning in one expert gains over unlearning in all."""
    return lambda of: sum(of[f"{name} + UOE"][metric] - of[name][metric] for name in ("GA", "GDIFF", "NPO")) / 3


def arm(start: Callable[..., Any], rates: tuple[float, ...], objective: str, **options: Any) -> Callable[..., dict[str, float]]:
    return partial(unlearn, start=partial(start, objective=objective, **options), rates=rates)


study = Study(
    method="uoe",
    prepare=prepare,
    arms={
        "GA": arm(whole, WHOLE, "ga"),
        "GA + UOE": arm(one_expert, ONE, "ga"),
        "GDIFF": arm(whole, WHOLE, "gdiff"),
        "GDIFF + UOE": arm(one_expert, ONE, "gdiff"),
        "NPO": arm(whole, WHOLE, "npo"),
        "NPO + UOE": arm(one_expert, ONE, "npo"),
        "GA, routers frozen": arm(whole, WHOLE, "ga", routers=False),
        "GA + UOE, no anchor": arm(one_expert, ONE, "ga", anchor=0.0),
        "GA + another expert of the layer": arm(one_expert, ONE, "ga", which="another of its layer"),
        "GA + any other expert": arm(one_expert, ONE, "ga", which="any other"),
    },
    claim=holds("over GA, GDIFF and NPO, UOE keeps more utility at equal forgetting", mean_gain("utility"), above=0.0),
    also=[
        beats("GA + UOE", "GA", on="utility"),
        beats("GDIFF + UOE", "GDIFF", on="utility"),
        beats("NPO + UOE", "NPO", on="utility"),
        holds("over GA, GDIFF and NPO, UOE leaves more of the expert selections as they were", mean_gain("overlap"), above=0.0),
        beats("GA + UOE", "GA + another expert of the layer", on="utility"),
        beats("GA + UOE", "GA + any other expert", on="utility"),
        beats("GA + UOE", "GA + UOE, no anchor", on="utility"),
    ],
    equal="model, forget and retain batches, steps, optimiser, number of learning rates tried, rule to choose a checkpoint",
    seeds=6,
    data=("docs",),
)
