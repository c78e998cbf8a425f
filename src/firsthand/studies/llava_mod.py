"""Does a small vision-language model hallucinate less when it is taught by a teacher, which then is its reference, than without?

Pictures of two handwritten digits are captioned "a seven beside a three". The teacher is larger and was trained for longer, on
pictures whose digits are independent: it has learnt to look. In the student's few pictures the second digit is mostly the first
plus one, so that the first word it says tells it the second; in the test the digits are independent, and such guesses are wrong.

Each student has three stages, with as many steps in all arms: the dense model; then, upcycled, its experts; then the experts on
pairs of captions for those training pictures that do not count up, the true one and the one that does. The baseline has the same
stages without a teacher: cross-entropy, then DPO against itself as it was. The same five sets of learning rates were tried for it
and for the method on one seed; the best was the same. Arms without preferences spend the third stage's steps on the second.
"""

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from firsthand import Study, Trial, beats
from firsthand.distill.llava_mod import MimicLoss, moe_aux_loss, train_only_ffn, upcycle_ffn
from firsthand.distill.preference import preference_distillation_loss, sequence_logps
from firsthand.testbeds import captions, digits, lm

AUX, BETA = 0.01, 0.1  # the release's
RATES = (3e-3, 3e-3, 3e-4)  # of the three stages


@dataclass
class World:
    teacher: Any
    task: Any  # what captions.encode returned
    chosen: Any
    rejected: Any
    test: captions.Collages
    tokenizer: Any


def prepare(trial: Trial) -> World:
    broad, narrow, tested, steps = (100, 100, 20, 3) if trial.smoke else (4000, 1000, 400, 500)
    split = digits.split(trial.rng)
    tokenizer = captions.tokenizer()

    def encode(world: captions.Collages, said: Tensor | None = None) -> Any:
        return captions.encode(tokenizer, world.images, captions.describe_short(world.digits if said is None else said))

    pretraining = captions.collages(split.train, trial.rng, broad, 2)
    teacher = captions.llava(trial.generator, 2, hidden=96, layers=3, intermediate=192).to(trial.device)
    stream = captions.batches(encode(pretraining), 32, trial.generator)
    lm.train(teacher, stream, steps=steps, lr=3e-3, loss=captions.caption_loss, trial=trial, label="teacher")

    task = captions.collages(split.train, trial.rng, narrow, 2, follow=0.9)
    left, right = task.digits.T
    surprising = captions.Collages(*(part[right != (left + 1) % 10] for part in task))
    expected = torch.stack([surprising.digits[:, 0], (surprising.digits[:, 0] + 1) % 10], dim=1)
    test = captions.collages(split.test, trial.rng, tested, 2)
    return World(teacher.eval(), encode(task), encode(surprising), encode(surprising, expected), test, tokenizer)


def score(model: Any, world: World) -> dict[str, float]:
    said = captions.describe(model, world.tokenizer, world.test.images, max_new_tokens=8)
    found = captions.hallucination(said, world.test.digits)
    return {"hallucination rate": found["chair_i"], "captions with one": found["chair_s"], "recall": found["recall"]}


def teacher(trial: Trial, world: World) -> dict[str, float]:
    trial.count(world.teacher)
    return score(world.teacher, world)


def student(trial: Trial, world: World, *, mimic: bool, reference: str | None, sparse: bool = True) -> dict[str, float]:
    dense, experts, pairs = (2, 2, 2) if trial.smoke else (200, 150, 100)
    model = captions.llava(trial.generator, 2, hidden=48, layers=2, intermediate=96 if sparse else 192).to(trial.device)
    stream = captions.batches(world.task, 32, trial.generator)

    def imitate(steps: int, lr: float, lm_weight: float, aux: float) -> None:
        with MimicLoss(model, world.teacher, lm_weight, aux) as distill:

            def loss(model: Any, batch: Any) -> Tensor:
                if mimic:
                    return distill(model(**batch, use_cache=False), batch["labels"])
                return captions.caption_loss(model, batch) + (aux * moe_aux_loss(model) if aux else 0)

            lm.train(model, stream, steps=steps, lr=lr, loss=loss, weight_decay=0.0, trial=trial)

    imitate(dense, RATES[0], 0.0, 0.0)
    aux = AUX if sparse else 0.0
    if sparse:
        upcycle_ffn(model, generator=trial.generator)
    train_only_ffn(model)
    imitate(experts if reference else experts + pairs, RATES[1], 1.0, aux)
    trial.count(model, active_parameters(model))
    if reference:
        compared_with = world.teacher if reference == "teacher" else copy.deepcopy(model).eval()
        prefer(trial, world, model, compared_with, steps=pairs, lr=RATES[2], aux=aux)
    return score(model, world)


def prefer(trial: Trial, world: World, model: Any, reference: Any, *, steps: int, lr: float, aux: float) -> None:
    order = captions.batches({"input_ids": torch.arange(len(world.chosen["input_ids"]))}, 16, trial.generator)

    def logps(of: Any, encoded: Any, rows: Tensor) -> Tensor:
        batch = {name: value[rows].to(trial.device) for name, value in encoded.items()}
        labels = batch.pop("labels")
        return sequence_logps(of(**batch, use_cache=False).logits, labels)

    def loss(model: Any, batch: Any) -> Tensor:
        rows = batch["input_ids"].cpu()
        with torch.no_grad():
            base = [logps(reference, encoded, rows) for encoded in (world.chosen, world.rejected)]
        ours, balance = [], 0.0
        for encoded in (world.chosen, world.rejected):
            ours.append(logps(model, encoded, rows))
            balance = balance + (aux * moe_aux_loss(model) if aux else 0.0)
        return preference_distillation_loss(*ours, *base, beta=BETA) + balance

    lm.train(model, order, steps=steps, lr=lr, loss=loss, weight_decay=0.0, trial=trial)


def active_parameters(model: Any) -> int:
    """All but two of the four experts in each sparse layer."""
    total = sum(p.numel() for p in model.parameters())
    return total - sum(p.numel() for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))) // 2


study = Study(
    method="llava-mod",
    prepare=prepare,
    arms={
        "no teacher": partial(student, mimic=False, reference="self"),
        "LLaVA-MoD": partial(student, mimic=True, reference="teacher"),
        "mimic, own reference": partial(student, mimic=True, reference="self"),
        "mimic only": partial(student, mimic=True, reference=None),
        "cross-entropy only": partial(student, mimic=False, reference=None),
        "LLaVA-MoD, dense": partial(student, mimic=True, reference="teacher", sparse=False),
        "teacher": teacher,
    },
    claim=beats("LLaVA-MoD", "no teacher", on="hallucination rate", lower_is_better=True),
    also=[
        beats("mimic only", "cross-entropy only", on="hallucination rate", lower_is_better=True),
        beats("LLaVA-MoD", "mimic, own reference", on="hallucination rate", lower_is_better=True),
        beats("LLaVA-MoD", "teacher", on="hallucination rate", lower_is_better=True),
        beats("LLaVA-MoD", "LLaVA-MoD, dense", on="hallucination rate", lower_is_better=True),
    ],
    equal="pictures, pairs, initial weights (but for the dense arm), steps in all, batches, optimiser, learning rates",
    data=("digits",),
)
