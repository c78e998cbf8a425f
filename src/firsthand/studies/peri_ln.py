"""Does normalising both sides of every sub-layer make a language model bear higher learning rates?

A deep and thin Llama is trained from nothing on English prose and Python source, at four learning rates that span a factor of 30,
with its norms in five places. The primary claim is the paper's figure of loss against learning rate, as one number: the loss
on test text, averaged over the grid. It punishes both a worse loss and a loss that breaks at high rates, and it stays finite: a
run that diverged, or ended worse than it began, counts as the untrained model. Spikes and failed runs, which the
paper also shows, are rare in a model this small; they are metrics here and not claims.

The grid is run without clipping. The claim about the best loss is about one more run, at the rate of the grid with the lowest
loss on validation text (each arm's own, at each seed anew), with gradients clipped at 1 as one would train; what is said of the
residual stream is said of that model.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firsthand import Study, Trial, beats
from firsthand.pretrain.peri_ln import GradientSpikes, ResidualStats, to_output_only, to_peri_ln, to_post_ln
from firsthand.testbeds import lm, text

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass
class World:
    train: Tensor
    validation: Tensor
    test: Tensor
    byte_lengths: Tensor


@dataclass
class Outcome:
    """What a run at one learning rate came to, in bits per byte."""

    rate: float
    run: lm.Run
    validation: float  # infinite if it failed, so that it is not chosen
    test: float  # that of the untrained model if it failed
    failed: bool  # diverged, or ended worse than untrained


def prepare(trial: Trial) -> World:
    size = 30_000 if trial.smoke else 600_000
    split = text.split(text.documents("docs", "source"), trial.rng)
    train, validation, test = (
        [document["text"] for document in text.sample(part, trial.rng, characters)]
        for part, characters in ((split.train, size), (split.validation, size // 3), (split.test, size // 3))
    )
    tokenizer = text.bpe_tokenizer(train, vocab=512)
    evaluated = 8 if trial.smoke else 96
    packed = [text.pack(tokenizer, texts, block=64) for texts in (train, validation, test)]
    some = [blocks[trial.rng.permutation(len(blocks))[:evaluated]] for blocks in packed[1:]]
    return World(packed[0], *some, text.byte_lengths(tokenizer))


HIDDEN = 64


def llama(generator: torch.Generator, layers: int) -> Any:
    """Initial weights tuned so that Pre-LN and Peri-LN both learn fast; with 0.02 for all, neither gets past unigrams in time."""
    deviation = 0.02 * (1024 / HIDDEN) ** 0.5  # what 0.02 is to a model 1024 wide: sub-layers that do not begin almost silent
    sizes = {"vocab": 512, "hidden": HIDDEN, "layers": layers, "heads": 4, "intermediate": 176, "context": 64}
    model = lm.llama(generator, **sizes, initializer_range=deviation)
    with torch.no_grad():
        model.model.embed_tokens.weight *= HIDDEN**0.5 / deviation  # large, as Gemma's are, lest the blocks drown the tokens
    return model


def with_embedding_norm(model: Any) -> Any:
    to_peri_ln(model, embedding_norm=True)
    torch.nn.init.constant_(model.model.embedding_norm.weight, HIDDEN**0.5)  # the size that embeddings have in the other arms
    return model


def train(trial: Trial, world: World, surgery: Callable[[Any], Any]) -> dict[str, float]:
    depth, steps = (2, 4) if trial.smoke else (16, 250)
    start = surgery(llama(trial.generator, depth)).to(trial.device)
    trial.count(start)
    untrained = lm.bits_per_byte(start, world.test, world.byte_lengths)
    order = trial.generator.get_state()

    def run(rate: float, clip: float | None) -> tuple[Outcome, Any]:
        model = copy.deepcopy(start)
        stream = lm.batches(world.train, 4, trial.generator.set_state(order))  # the same batches in each run
        run = lm.train(model, stream, steps=steps, lr=rate, clip=clip, trial=trial, label=f"rate {rate:g}, clip {clip}")
        validation, test = (lm.bits_per_byte(model, part, world.byte_lengths) for part in (world.validation, world.test))
        failed = run.diverged or test > untrained
        return Outcome(rate, run, math.inf if failed else validation, untrained if failed else test, failed), model

    grid = [run(rate, clip=None)[0] for rate in RATES]
    best = min(grid, key=lambda outcome: outcome.validation)
    final, model = run(best.rate, clip=1.0)

    stream = ResidualStats(depth).to(trial.device)
    with stream.attach(model):
        lm.bits_per_byte(model, world.test, world.byte_lengths)
    largest = torch.finfo(torch.float32).max  # stands for what is not finite in a model that diverged
    stats = {name: values.cpu().double().nan_to_num(largest, largest).numpy() for name, values in stream.compute().items()}

    for outcome in grid:
        trial.record(outcome.rate, bits_per_byte_by_rate=outcome.test)
    for step, loss in enumerate(grid[-1].run.losses):
        trial.record(step, loss_at_highest_rate=loss)
    for step, loss in enumerate(final.run.losses):
        trial.record(step, loss_at_best_rate=loss)
    for block, value in enumerate(stats["mean_square"]):
        trial.record(block, residual_mean_square_by_block=value)

    over_grid = [outcome.test for outcome in grid]
    return {
        "mean bits per byte over rates": float(np.mean(over_grid)),
        "excess over own best rate": float(np.mean(over_grid) - min(over_grid)),
        "bits per byte at best rate": final.test,
        "best rate": best.rate,
        "failed runs": float(np.mean([outcome.failed for outcome in grid])),
        "spikes per run": float(np.mean([spikes(outcome.run) for outcome in grid])),
        "log growth per block": log_growth(stats["mean_square"]),
        "largest activation": float(stats["max_abs"].max()),
    }


def spikes(run: lm.Run) -> int:
    counter = GradientSpikes()
    for norm in run.gradient_norms:
        counter.observe(norm)
    return counter.count + run.diverged


def log_growth(mean_square: np.ndarray) -> float:
    """Slope of log mean square over depth: the rate at which the stream would grow were its growth exponential."""
    return float(np.polyfit(np.arange(len(mean_square)), np.log(mean_square), 1)[0])


study = Study(
    method="peri-ln",
    prepare=prepare,
    arms={
        "Pre-LN": partial(train, surgery=lambda model: model),
        "Peri-LN": partial(train, surgery=to_peri_ln),
        "Post-LN": partial(train, surgery=to_post_ln),
        "output only": partial(train, surgery=to_output_only),
        "Peri-LN, embedding norm": partial(train, surgery=with_embedding_norm),
    },
    claim=beats("Peri-LN", "Pre-LN", on="mean bits per byte over rates", lower_is_better=True),
    also=[
        beats("Peri-LN", "Pre-LN", on="excess over own best rate", lower_is_better=True),
        beats("Peri-LN", "Pre-LN", on="bits per byte at best rate", lower_is_better=True),
        beats("Peri-LN", "Pre-LN", on="log growth per block", lower_is_better=True),
    ],
    equal="initial weights, tokens, batches, steps, optimiser, learning rates tried",
    data=("docs", "source"),
)
