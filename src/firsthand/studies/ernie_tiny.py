"""Distilling a tiny encoder for a task, does it help that the fine-tuned teacher first teaches on general text?

The task is to tell which of ten related languages a few words of a program's messages are in; each language has ten labelled
snippets. General text is messages in three times as many languages. The teacher is a BERT of four layers, pre-trained here by
masking on the general text and then fine-tuned on the labelled snippets; the student has two layers, a third of the width, and
begins at random. In the fallback, the task is to tell of which library a sentence of documentation is.

The primary claim is against the usual order, which goes from the pre-trained teacher on general text straight to the task.
Each of the other stages is left out as well. All arms have equally many updates: those of a stage left out go to general text.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firsthand import Study, Trial, beats, data
from firsthand.distill.ernie_tiny import Stage, ernie_tiny_stages, progressive_distill
from firsthand.testbeds import embedding, lm, text

TASK = ("ca", "da", "es", "gl", "it", "nb", "nl", "pt", "ro", "sv")
OTHER = (
    "af", "bs", "cs", "cy", "de", "eo", "et", "eu", "fi", "fr", "hr", "hu", "id",
    "is", "lt", "lv", "nn", "pl", "pt_BR", "sk", "sl", "sq", "sr_Latn", "tr",
)  # fmt: skip
LENGTH, SHORTEST, VOCAB, BATCH = 20, 15, 512, 32
TEACHER = {"hidden": 96, "layers": 4, "heads": 4, "intermediate": 192}
STUDENT = {"hidden": 32, "layers": 2, "heads": 4, "intermediate": 64}
RATES = (6e-3,) * 4  # tuned on the usual order; labels alone do as well with it as with lower ones


@dataclass
class Texts:
    """Lines of text as tokens, the first of which stands for the whole line."""

    ids: Tensor  # [lines, LENGTH]
    labels: Tensor | None = None

    def batch(self, rows: Tensor | slice) -> dict[str, Tensor]:
        labelled = {} if self.labels is None else {"labels": self.labels[rows]}
        return {"input_ids": self.ids[rows], "attention_mask": (self.ids[rows] != text.PAD).long()} | labelled


@dataclass
class Batches:
    """Each line once, in random order: data of a stage."""

    texts: Texts
    generator: torch.Generator

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in torch.randperm(len(self.texts.ids), generator=self.generator).split(BATCH):
            yield self.texts.batch(rows)


@dataclass
class World:
    general: Texts
    train: Texts
    test: Texts
    pretrained: Any
    finetuned: Any
    student: Any


def lines(trial: Trial) -> tuple[list[list[str]], list[str]]:
    """Lines of each class of the task, and of what is not of the task, all in random order."""
    of: dict[str, set[str]] = {}
    if "messages" in trial.data:
        classes = TASK
        for document in data.load("messages"):
            of.setdefault(document["domain"], set()).update(document["text"].split("\n"))
    else:
        classes = ("networkx", "scipy", "sklearn", "stdlib", "sympy")
        for record in data.load("docstrings", packages=embedding.PACKAGES):
            of.setdefault(record["package"], set()).add(record["sentence"])

    def shuffled(members: set[str]) -> list[str]:
        ordered = sorted(line for line in members if len(line) >= SHORTEST)
        return [ordered[i] for i in trial.rng.permutation(len(ordered))]

    other = set().union(*(of.get(name, set()) for name in OTHER)) - set().union(*(of[name] for name in classes))
    return [shuffled(of[name]) for name in classes], shuffled(other)


def prepare(trial: Trial) -> World:
    labelled, tested, masking, tuning = (4, 6, 4, 2) if trial.smoke else (20, 120, 400, 120)
    classes, other = lines(trial)
    general = other + [line for members in classes for line in members[labelled + tested :]]
    tokenizer = text.bpe_tokenizer(general, VOCAB)
    tokenizer.enable_truncation(LENGTH - 1)

    def tokens(members: list[str]) -> Tensor:
        rows = [[text.END, *encoding.ids] for encoding in tokenizer.encode_batch_fast(members)]
        return torch.tensor([row + [text.PAD] * (LENGTH - len(row)) for row in rows])

    def part(first: int, last: int) -> Texts:
        ids = torch.cat([tokens(members[first:last]) for members in classes])
        return Texts(ids.to(trial.device), torch.arange(len(classes), device=trial.device).repeat_interleave(last - first))

    world = Texts(tokens(general).to(trial.device)), part(0, labelled), part(labelled, labelled + tested)
    masked = lm.masked_loss(trial.generator, VOCAB, share=0.4)  # more to learn from a line than with 0.15
    model = lm.bert(trial.generator, VOCAB, **TEACHER, context=LENGTH, **initial(TEACHER)).to(trial.device)
    stream = lm.batches(world[0].ids, BATCH, trial.generator)
    lm.train(model, stream, steps=masking, lr=2e-3, loss=masked, trial=trial, curve="masking loss", label="pre-training")
    pretrained = classifier(model, len(classes)).eval()
    finetuned = copy.deepcopy(pretrained)
    own = Stage("fine-tuning", pretrained, Batches(world[1], trial.generator), tuning, 5e-4, latent=0.0, hard=1.0)
    progressive_distill(finetuned, [own])
    student = lm.bert(trial.generator, VOCAB, **STUDENT, context=LENGTH, **initial(STUDENT))
    return World(*world, pretrained, finetuned, classifier(student, len(classes)).to(trial.device))


def initial(sizes: dict[str, int]) -> dict[str, float]:
    return {"initializer_range": 0.02 * (1024 / sizes["hidden"]) ** 0.5}  # what 0.02 is to a model 1024 wide


def classifier(model: Any, classes: int) -> Any:
    """The encoder of `model` with a new head."""
    from transformers import BertForSequenceClassification

    config = copy.deepcopy(model.config)
    config.num_labels = classes
    whole = BertForSequenceClassification._from_config(config, attn_implementation="eager")
    whole.bert.load_state_dict(model.bert.state_dict(), strict=False)  # the head, and the layer before it, are new
    return whole.to(model.device)


def score(model: Any, texts: Texts) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        batch = texts.batch(slice(None))
        labels = batch.pop("labels")
        logits = model(**batch).logits
    right = (logits.argmax(-1) == labels).float().mean().item()
    return {"accuracy": right, "cross-entropy": F.cross_entropy(logits, labels).item()}


def distil(trial: Trial, world: World, shares: tuple[int, int, int, int], teacher: bool = True) -> dict[str, float]:
    """The stages that have a share of the updates; without a teacher, the last one has the labels alone."""
    updates = 8 if trial.smoke else 400
    a, b, c, d = (share * updates // sum(shares) for share in shares)
    general, task = (Batches(texts, trial.generator) for texts in (world.general, world.train))
    stages = ernie_tiny_stages(world.pretrained, world.finetuned, general, task, steps=(a, b, c, d), lr=RATES)
    if not teacher:
        stages[-1] = replace(stages[-1], latent=0.0, soft=0.0)
    trial.count(world.student)
    with_steps = [stage for stage in stages if stage.steps]
    steps = iter(trial.track(range(updates), "distilling"))
    progressive_distill(world.student, with_steps, callback=lambda name, step, loss: trial.record(next(steps), loss=loss))
    return score(world.student, world.test)


study = Study(
    method="ernie-tiny",
    prepare=prepare,
    arms={
        "GD, TAD, TSD": partial(distil, shares=(2, 0, 1, 1)),
        "four stages": partial(distil, shares=(1, 1, 1, 1)),
        "GED, TAD, TSD": partial(distil, shares=(0, 2, 1, 1)),
        "GD, GED, TSD": partial(distil, shares=(3, 3, 0, 2)),
        "GD, GED, TAD, labels": partial(distil, shares=(1, 1, 1, 1), teacher=False),
        "labels alone": partial(distil, shares=(0, 0, 0, 1), teacher=False),
        "teacher": lambda trial, world: score(world.finetuned, world.test),
    },
    claim=beats("four stages", "GD, TAD, TSD", on="accuracy"),
    also=[
        beats("four stages", "GED, TAD, TSD", on="accuracy"),
        beats("four stages", "GD, GED, TSD", on="accuracy"),
        beats("four stages", "GD, GED, TAD, labels", on="accuracy"),
        beats("four stages", "labels alone", on="accuracy"),
    ],
    equal="student, initial weights, updates, batch size, learning rates, text, labels",
    data=("messages",),
    fallback=("docstrings",),
)
