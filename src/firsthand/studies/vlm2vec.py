"""Does one vision-language model that reads an instruction embed for many tasks better than without it, or than two towers?

The tasks are on handwritten digits: name the digit, answer a question about it, find another image of it, find the quarter with
the most ink. Queries are an image, an instruction and, in one task, a question; targets are words or images. The model is a LLaVA
of transformers with random weights. As in the paper's benchmark each query has candidates of its own task, and P@1 is averaged
over tasks. Without instructions the questions are still there, but the other three tasks have the same queries: only their
candidates tell them apart. So P@1 is also measured where all tasks share their candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from firsthand import Study, Trial, beats
from firsthand.embed.contrastive import info_nce_loss
from firsthand.embed.vlm2vec import (
    EmbeddingMatchAccuracy,
    InterleavedSubBatchSampler,
    embed_items,
    format_instruction,
    pack_items,
)
from firsthand.testbeds import digits

# The tasks

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ANSWERS = (*NUMBERS, "even", "odd")
QUESTIONS = ("is it even or odd", "which digit comes next")
WORDINGS = {  # the last of each is kept for the test; its words, but not the whole, are known from training
    "classify": ("name the digit", "which digit is in the image", "tell which digit is shown", "name which digit is shown"),
    "answer": (
        "answer the question on the image",
        "tell the answer to the question",
        "what is the answer to this question",
        "tell the answer to this question on the image",
    ),
    "retrieve": (
        "find an image of the same digit",
        "find a digit of the same kind",
        "which other image is of this digit",
        "find which other image is of the same kind",
    ),
    "ground": (
        "find the part with most ink",
        "which part of the image has most ink",
        "find the quarter with most ink",
        "which quarter of the image has most ink",
    ),
}
TASKS = tuple(WORDINGS)
SEEN, UNSEEN = 0, 3
POOL = 20  # candidates of a query, where they are images


@dataclass(frozen=True)
class Item:
    """What is embedded: an image, text, or both."""

    text: str = ""
    image: Tensor | None = None


@dataclass(frozen=True)
class Pair:
    task: str
    image: Tensor
    question: str
    target: Item
    answer: str  # targets with the same are equally right, and not negatives of each other

    def query(self, wording: str | None) -> Item:
        """With an instruction; without, there is still the question."""
        return Item(self.question if wording is None else format_instruction(wording, self.question), self.image)


@dataclass(frozen=True)
class World:
    train: dict[str, list[Pair]]
    test: dict[str, list[Pair]]
    candidates: list[Item]
    pools: dict[str, Tensor]  # which candidates each test pair has (pairs, candidates), the right one first


def prepare(trial: Trial) -> World:
    split = digits.split(trial.rng)
    if trial.smoke:
        split = digits.Split(*(digits.Labelled(part.images[:100], part.labels[:100]) for part in split))
    train, test = (pairs(part, trial.rng) for part in split)
    asked = trial.rng.permutation(len(split.test.images))[: 10 if trial.smoke else 300]
    test = {task: [test[task][row] for row in asked] for task in TASKS}
    every_quarter = [quarters(split.test.images[row]) for row in asked]
    candidates = [Item(word) for word in ANSWERS]
    candidates += [Item(image=image) for image in split.test.images]
    candidates += [Item(image=quarter) for four in every_quarter for quarter in four]

    pools: dict[str, list[np.ndarray]] = {task: [] for task in TASKS}
    labels, of_images = split.test.labels.numpy(), np.arange(len(ANSWERS), len(candidates))
    whole, parts = of_images[: len(labels)], of_images[len(labels) :].reshape(-1, 4)
    for place, row in enumerate(asked):
        for task in ("classify", "answer"):
            right = ANSWERS.index(test[task][place].answer)
            pools[task].append(np.roll(np.arange(len(ANSWERS)), -right))
        same, other = whole[labels == labels[row]], whole[labels != labels[row]]
        right = trial.rng.choice(same[same != whole[row]])
        pools["retrieve"].append(np.append(right, trial.rng.choice(other, POOL - 1, replace=False)))
        own = np.roll(parts[place], -darkest(every_quarter[place]))
        pools["ground"].append(np.append(own, trial.rng.choice(np.delete(parts, place, axis=0).ravel(), POOL - 4, replace=False)))
    return World(train, test, candidates, {task: torch.from_numpy(np.stack(rows)) for task, rows in pools.items()})


def pairs(data: digits.Labelled, rng: np.random.Generator) -> dict[str, list[Pair]]:
    """Every image in every task."""
    labels = data.labels.numpy()
    found: dict[str, list[Pair]] = {task: [] for task in TASKS}
    for row, (image, label) in enumerate(zip(data.images, labels.tolist(), strict=True)):
        asked = int(rng.integers(2))
        answer = (("even", "odd")[label % 2], NUMBERS[(label + 1) % 10])[asked]
        other = rng.choice(np.setdiff1d(np.flatnonzero(labels == label), row))
        quarter = (four := quarters(image))[darkest(four)]
        found["classify"].append(Pair("classify", image, "", Item(NUMBERS[label]), NUMBERS[label]))
        found["answer"].append(Pair("answer", image, QUESTIONS[asked], Item(answer), answer))
        found["retrieve"].append(Pair("retrieve", image, "", Item(image=data.images[other]), f"a {label}"))
        found["ground"].append(Pair("ground", image, "", Item(image=quarter), f"quarter of {row}"))
    return found


def quarters(image: Tensor) -> list[Tensor]:
    """The four corners, at twice their size."""
    twice = image.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return [corner for half in twice.split(8) for corner in half.split(8, dim=1)]


def darkest(images: list[Tensor]) -> int:
    return int(torch.stack(images).sum(dim=(1, 2)).argmax())


# The models

WORDS = ("<pad>", "<image>", "Instruct:", "Query:", *ANSWERS)
WORDS += tuple(sorted({word for text in chain(QUESTIONS, *WORDINGS.values()) for word in text.split()} - set(WORDS)))
NUMBER_OF = {word: number for number, word in enumerate(WORDS)}
WIDTH = 64
LAYERS = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
PATCHES = 16  # of 2 by 2 pixels


def processor(*, text: list[str], images: list[Tensor] | None, **_: Any) -> dict[str, Tensor]:
    """What a processor of transformers does, for words of a list, and images that are tensors already."""
    rows = [[NUMBER_OF[word] for word in each.replace("<image>", "<image> " * PATCHES).split()] for each in text]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])  # 0 is <pad>
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    return inputs if images is None else inputs | {"pixel_values": torch.stack(images)[:, None]}


def text_config() -> LlamaConfig:
    return LlamaConfig(**LAYERS, vocab_size=len(WORDS), num_hidden_layers=2, pad_token_id=0, initializer_range=0.1)


def llama() -> nn.Module:
    return LlamaForCausalLM(text_config())


def llava() -> nn.Module:
    vision = CLIPVisionConfig(**LAYERS, num_hidden_layers=1, image_size=8, patch_size=2, num_channels=1)
    options = {"image_token_id": NUMBER_OF["<image>"], "vision_feature_layer": -1}
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text_config(), **options))


def build(make: Callable[[], nn.Module], generator: torch.Generator) -> Any:
    """With weights from `generator`, where transformers draws them from the global one."""
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        return make()


class OneStream(nn.Module):
    """Each item goes through the model as one sequence: image, instruction, question."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.model = build(llava, generator)

    def forward(self, items: list[Item]) -> Tensor:
        inputs = pack_items(processor, [item.text for item in items], [item.image for item in items], image_token="<image>")
        return embed_items(self.model, inputs)


class LateFusion(nn.Module):
    """As CLIP embeds an image with text: either goes through a model of its own, and their embeddings are added."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.of_images, self.of_texts = build(llava, generator), build(llama, generator)

    def forward(self, items: list[Item]) -> Tensor:
        images = {row: item.image for row, item in enumerate(items) if item.image is not None}
        texts = {row: item.text for row, item in enumerate(items) if item.text}
        total = torch.zeros(len(items), WIDTH, device=self.of_texts.device)
        if images:
            inputs = pack_items(processor, [""] * len(images), list(images.values()), image_token="<image>")
            total = total.index_add(0, torch.tensor(list(images), device=total.device), embed_items(self.of_images, inputs))
        if texts:
            inputs = pack_items(processor, list(texts.values()))
            total = total.index_add(0, torch.tensor(list(texts), device=total.device), embed_items(self.of_texts, inputs))
        return F.normalize(total, dim=-1)


# The experiment


def train(
    trial: Trial,
    world: World,
    model: Callable[[torch.Generator], nn.Module] = OneStream,
    instructed: bool = True,
    run: int = 1,  # pairs of one task in a row: 1 is a random mix, as in the paper
) -> dict[str, float]:
    steps, batch_size = (3, 16) if trial.smoke else (250, 64)
    embed = model(trial.generator).to(trial.device)
    trial.count(embed)
    every_pair = [pair for task in TASKS for pair in world.train[task]]
    sampler = InterleavedSubBatchSampler(
        [len(world.train[task]) for task in TASKS], batch_size, min(run, batch_size), seed=trial.seed
    )
    epochs = chain.from_iterable(repeat(sampler))
    optimizer = torch.optim.AdamW(embed.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for step in trial.track(range(steps), "steps"):
        batch = [every_pair[row] for row in next(epochs)]
        wordings = [WORDINGS[pair.task][trial.rng.integers(UNSEEN)] for pair in batch]
        queries = embed([pair.query(wording if instructed else None) for pair, wording in zip(batch, wordings, strict=True)])
        targets = embed([pair.target for pair in batch])
        answers = np.array([pair.answer for pair in batch])
        others = torch.from_numpy(answers[:, None] != answers).to(trial.device)
        loss = info_nce_loss(queries, targets, temperature=0.05, valid=others)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(embed.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        trial.record(step + 1, loss=loss.item())
    return score(embed.eval(), world, instructed)


@torch.no_grad()
def score(embed: nn.Module, world: World, instructed: bool) -> dict[str, float]:
    """P@1 among the candidates of a query's own task and among those of all, with wordings of training and with unseen ones."""
    candidates = torch.cat([embed(world.candidates[start : start + 256]) for start in range(0, len(world.candidates), 256)])
    metrics: dict[str, float] = {}
    for name, wording in (("P@1", SEEN), ("P@1, unseen wording", UNSEEN)):
        own, shared = EmbeddingMatchAccuracy(TASKS), EmbeddingMatchAccuracy(TASKS)
        for task in TASKS:
            queries = embed([pair.query(WORDINGS[task][wording] if instructed else None) for pair in world.test[task]])
            words = task if task in ("classify", "answer") else "classify"  # both have the same words for candidates
            others = [world.pools[other] for other in (words, "retrieve", "ground") if other != task]
            right = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
            own.update(queries, candidates[world.pools[task]], right, task)
            shared.update(queries, candidates[torch.cat([world.pools[task], *others], dim=1)], right, task)
        scores, of_all = own.compute(), shared.compute()
        metrics |= {name: scores["overall"].item(), f"{name}, shared candidates": of_all["overall"].item()}
        metrics |= {f"{name}, {task}": scores[task].item() for task in TASKS}
    return metrics


study = Study(
    method="vlm2vec",
    prepare=prepare,
    arms={
        "no instructions": partial(train, instructed=False),
        "VLM2Vec": train,
        "late fusion": partial(train, model=LateFusion),
        "VLM2Vec, runs of 16": partial(train, run=16),
        "VLM2Vec, one task a batch": partial(train, run=64),
    },
    claim=beats("VLM2Vec", "no instructions", on="P@1"),
    also=[
        beats("VLM2Vec", "late fusion", on="P@1"),
        beats("VLM2Vec", "no instructions", on="P@1, unseen wording"),
        beats("VLM2Vec", "late fusion", on="P@1, unseen wording"),
        beats("VLM2Vec", "no instructions", on="P@1, shared candidates"),
        beats("VLM2Vec", "VLM2Vec, one task a batch", on="P@1"),
        beats("VLM2Vec, runs of 16", "VLM2Vec", on="P@1"),
    ],
    equal="pairs, initial weights of the one-stream models, steps, batch size, optimiser, learning rate, loss",
    data=("digits",),
)
