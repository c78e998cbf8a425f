"""Does what fine-tuning did to a small language model, added to a large one as it predicts, beat both of them?

A small and a large Llama are trained from nothing on the prose and the source of Python's standard library, then both are
fine-tuned to answer what one of its functions is for. The large tuned model is what is emulated. The primary claim is the paper's
up-scaling: the large base with the small model's difference predicts the answers for other modules better than the large base and
than the small tuned model, whichever of the two is better. A control mixes these two models' log-probabilities with the share
that is best on validation text, where the emulation has the paper's weight of 1.

For the trade-off between two behaviours, the small model is fine-tuned once more, to write a function's code instead.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firsthand import Study, Trial, beats, data, holds
from firsthand.decode.eft import emulated_logits
from firsthand.testbeds import lm, text

BLOCK = 96
SIZES = {"small": {"hidden": 48, "layers": 2}, "large": {"hidden": 128, "layers": 4}}
SHARES = [step / 20 for step in range(21)]
MODELS = ("large base", "small base", "large tuned", "small tuned", "small on code")


@dataclass
class Text:
    """Blocks of text, and what each model says of each next token."""

    next: Tensor  # [places]
    size: int  # of the text, in bytes
    logits: dict[str, Tensor]  # of each model, [places, vocab]


@dataclass
class World:
    """Answers to choose on and to test on, and text of the other behaviour."""

    validation: Text
    test: Text
    code: Text


def dialogues() -> list[dict[str, str]]:
    """What a function of the standard library is for, or how its code goes on. Each counts to its module's file in the split."""
    asked = [("answers", "What is {} for?", entry, entry["text"]) for entry in data.load("api-docs", packages=())]
    asked += [("code", "How is {} written?", entry, entry["code"]) for entry in data.load("docstrings", packages=())]
    return [
        {
            "domain": "docstrings",
            "name": entry["module"],
            "behaviour": behaviour,
            "text": f"Q: {question.format(entry['name'])}\nA: {answer[:400]}\n",
        }
        for behaviour, question, entry, answer in asked
    ]


def prepare(trial: Trial) -> World:
    characters, pretraining, tuning, tested = (20_000, 3, 2, 4) if trial.smoke else (500_000, 300, 40, 80)
    split = text.split([*text.documents("docs", "source"), *dialogues()], trial.rng)

    def texts(part: list[dict[str, str]], behaviour: str) -> list[str]:
        chosen = [document for document in part if document.get("behaviour", "") == behaviour]
        return [document["text"] for document in text.sample(chosen, trial.rng, characters)]

    prose = [document for document in split.train if document["domain"] != "source"]
    code = [document for document in split.train if document["domain"] == "source"]
    before = [*texts(prose, ""), *texts(code, "")]
    tokenizer = text.bpe_tokenizer(before, vocab=512)
    lengths = text.byte_lengths(tokenizer)

    def pack(part: list[dict[str, str]], behaviour: str) -> Tensor:
        return text.pack(tokenizer, texts(part, behaviour), BLOCK)

    corpora = {
        "base": text.pack(tokenizer, before, BLOCK),
        "tuned": pack(split.train, "answers"),
        "on code": pack(split.train, "code"),
    }

    def train(model: Any, corpus: str, steps: int, lr: float, label: str) -> Any:
        stream = lm.batches(corpora[corpus], 8, trial.generator)
        lm.train(model, stream, steps=steps, lr=lr, trial=trial, curve=f"loss of {label}", label=label)
        return model.eval()

    models = {}
    for size, sizes in SIZES.items():
        deviation = 0.02 * (1024 / sizes["hidden"]) ** 0.5  # what 0.02 is to a model 1024 wide
        model = lm.llama(
            trial.generator, 512, **sizes, intermediate=3 * sizes["hidden"], context=BLOCK, initializer_range=deviation
        ).to(trial.device)
        models[f"{size} base"] = train(model, "base", pretraining, 3e-3, f"{size} base")
        for corpus in ("tuned", "on code"):
            if f"{size} {corpus}" in MODELS:
                models[f"{size} {corpus}"] = train(copy.deepcopy(model), corpus, tuning, 1e-3, f"{size} {corpus}")

    def read(blocks: Tensor) -> Text:
        blocks = blocks[trial.rng.permutation(len(blocks))[:tested]]
        with torch.no_grad():
            logits = {
                name: torch.cat([model(part.to(trial.device)).logits[:, :-1].cpu() for part in blocks.split(16)]).flatten(0, 1)
                for name, model in models.items()
            }
        return Text(blocks[:, 1:].flatten(), int(lengths[blocks[:, 1:]].sum()), logits)

    return World(
        validation=read(pack(split.validation, "answers")),
        test=read(pack(split.test, "answers")),
        code=read(pack(split.test, "code")),
    )


def bits_per_byte(given: Text, log_probs: Tensor) -> float:
    return F.nll_loss(log_probs, given.next, reduction="sum").item() / math.log(2) / given.size


Prediction = Callable[[dict[str, Tensor]], Tensor]


def alone(logits: dict[str, Tensor], model: str) -> Tensor:
    return logits[model].log_softmax(-1)


def emulated(logits: dict[str, Tensor], weight: float = 1.0, size: str = "large", pair: str = "small", **how: Any) -> Tensor:
    return emulated_logits(logits[f"{size} base"], logits[f"{pair} tuned"], logits[f"{pair} base"], weight, **how)


def mixture(logits: dict[str, Tensor], share: float) -> Tensor:
    both = alone(logits, "large base"), alone(logits, "small tuned")
    return ((1 - share) * both[0] + share * both[1]).log_softmax(-1)


def score(trial: Trial, world: World, prediction: Prediction) -> dict[str, float]:
    """How well held-out answers are predicted, and how far the prediction is from that of the large tuned model."""
    log_probs, oracle = prediction(world.test.logits), alone(world.test.logits, "large tuned")
    reached, base, best = (
        bits_per_byte(world.test, each) for each in (log_probs, alone(world.test.logits, "large base"), oracle)
    )
    return {
        "bits per byte": reached,
        "gap recovered": (base - reached) / (base - best),
        "KL from large tuned": F.kl_div(log_probs, oracle, reduction="batchmean", log_target=True).item(),
    }


def chosen(trial: Trial, world: World, family: Callable[..., Tensor], settings: Sequence[float]) -> dict[str, float]:
    """The setting with the best prediction of validation answers."""
    reached = {setting: bits_per_byte(world.validation, family(world.validation.logits, setting)) for setting in settings}
    for setting, value in reached.items():
        trial.record(setting, validation_bits_per_byte=value)
    best = min(reached, key=lambda setting: reached[setting])
    return {**score(trial, world, lambda logits: family(logits, best)), "setting": best}


def trade_off(trial: Trial, world: World) -> dict[str, float]:
    """Two small tunings on the large base, with the weights λ and 1 - λ: the steps of the way from one behaviour to the other."""

    def at(share: float, given: Text) -> float:
        tuned = [given.logits["small tuned"], given.logits["small on code"]]
        return bits_per_byte(
            given, emulated_logits(given.logits["large base"], tuned, given.logits["small base"], [share, 1 - share])
        )

    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    answers, code = ([at(share, given) for share in shares] for given in (world.test, world.code))
    for share, one, other in zip(shares, answers, code, strict=True):
        trial.record(share, bits_per_byte_of_answers=one, bits_per_byte_of_code=other)
    steps = [before - after for before, after in pairwise(answers)] + [after - before for before, after in pairwise(code)]
    return {"smallest step": min(steps), "answers at λ = 0.5": answers[2], "code at λ = 0.5": code[2]}


study = Study(
    method="eft",
    prepare=prepare,
    arms={
        "large base": partial(score, prediction=partial(alone, model="large base")),
        "small base": partial(score, prediction=partial(alone, model="small base")),
        "small tuned": partial(score, prediction=partial(alone, model="small tuned")),
        "mixture": partial(chosen, family=mixture, settings=SHARES),
        "EFT": partial(score, prediction=emulated),
        "EFT, weight chosen": partial(chosen, family=emulated, settings=[2 * share for share in SHARES]),
        "EFT, top_p 0.9": partial(score, prediction=partial(emulated, top_p=0.9)),
        "EFT, down-scaled": partial(score, prediction=partial(emulated, size="small", pair="large")),
        "EFT, two behaviours": trade_off,
        "large tuned": partial(score, prediction=partial(alone, model="large tuned")),
    },
    claim=holds(
        "EFT beats the better of large base and small tuned on bits per byte",
        lambda arms: min(arms[arm]["bits per byte"] for arm in ("large base", "small tuned")) - arms["EFT"]["bits per byte"],
        above=0.0,
    ),
    also=[
        beats("EFT", "mixture", on="bits per byte", lower_is_better=True),
        beats("EFT", "small tuned", on="KL from large tuned", lower_is_better=True),
        beats("EFT", "mixture", on="KL from large tuned", lower_is_better=True),
        holds(
            "the weight of two behaviours trades one for the other at every step",
            lambda arms: arms["EFT, two behaviours"]["smallest step"],
            above=0.0,
        ),
    ],
    equal="models, held-out text",
    data=("docs", "source", "api-docs", "docstrings"),
)
