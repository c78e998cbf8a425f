"""Does a frozen random router that activates ever more experts train a model better than the dense one, and one to be slimmed?

A small GPT-2 is trained from nothing on a little English prose and Python source, six times over, so that what generalises less
well shows. Its feed-forward blocks are dense, or experts with as many neurons in all. Three kinds of router: learned, with a
balance loss and two experts a token; random and frozen, with half of the experts throughout; and SMoE-Dropout, from half of the
experts to all.

The primary claim is about the trained model with all experts on, against the dense one, both with dropout of 0.1 as in the paper.
Then each sparse model is tested with any number of experts, the curve that says how well it can be slimmed. The last two arms
leave out all other dropout: is the method one by itself?
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from firsthand import Study, Trial, beats, holds
from firsthand.moe.balance import load_balancing_loss
from firsthand.moe.layer import TopKRouter
from firsthand.moe.smoe_dropout import SMoEDropout, set_active_experts, smoe_dropout_convert, smoe_dropout_num_experts
from firsthand.testbeds import lm, text

EXPERTS = 8
HIDDEN, INNER, BLOCK, VOCAB = 64, 512, 64, 512
# Tuned on a seed below 100, and the same for the dense model and SMoE-Dropout:
RATE = 6e-3  # the best of 1.5e-3, 3e-3, 6e-3, 1.2e-2
DROPOUT = 0.1  # the best of 0, 0.1, 0.2


@dataclass
class World:
    train: Tensor
    test: Tensor
    byte_lengths: Tensor


def prepare(trial: Trial) -> World:
    size = 30_000 if trial.smoke else 200_000
    split = text.split(text.documents("docs", "source"), trial.rng, validation=0.0)
    train, test = (
        [document["text"] for document in text.sample(part, trial.rng, characters)]
        for part, characters in ((split.train, size), (split.test, 100_000))
    )
    tokenizer = text.bpe_tokenizer(train, vocab=VOCAB)
    held_out = text.pack(tokenizer, test, BLOCK)
    some = trial.rng.permutation(len(held_out))[: 8 if trial.smoke else 256]
    return World(text.pack(tokenizer, train, BLOCK), held_out[some], text.byte_lengths(tokenizer))


def gpt2(generator: torch.Generator, dropout: float) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=BLOCK,
        n_embd=HIDDEN,
        n_inner=INNER,
        n_layer=2,
        n_head=4,
        activation_function="relu",  # as the paper's language model has it
        initializer_range=0.02 * (1024 / HIDDEN) ** 0.5,  # what 0.02 is to a model 1024 wide
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=text.END,
        eos_token_id=text.END,
    )
    seed = torch.randint(2**62, (), generator=generator).item()
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        torch.manual_seed(int(seed))
        return GPT2LMHeadModel(config)


def train(trial: Trial, world: World, model: Any, loss: lm.Loss = lm.next_token_loss) -> None:
    stream = lm.batches(world.train, 8, trial.generator)
    # No weight decay, as in the paper's code, which also spares us the question what it means to stacked experts.
    lm.train(model, stream, steps=steps(trial), lr=RATE, weight_decay=0.0, loss=loss, trial=trial, curve="loss")


def steps(trial: Trial) -> int:
    return 4 if trial.smoke else 1000


def dense(trial: Trial, world: World, dropout: float) -> dict[str, float]:
    model = gpt2(trial.generator, dropout).to(trial.device)
    train(trial, world, model)
    trial.count(model)
    quality = lm.bits_per_byte(model, world.test, world.byte_lengths)
    return {"bits per byte": quality, "share of experts in training": 1.0}


def random_router(trial: Trial, world: World, k_min: int, k_max: int, dropout: float) -> dict[str, float]:
    model = gpt2(trial.generator, dropout)
    smoe_dropout_convert(model, EXPERTS, k_min=k_min, fresh=True, generator=trial.generator).to(trial.device)
    schedule = [smoe_dropout_num_experts(step, steps(trial), k_min, k_max) for step in range(steps(trial))]
    active = iter(schedule)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        set_active_experts(model, next(active))
        return lm.next_token_loss(model, batch)

    train(trial, world, model, loss)
    return slimmed(trial, world, model, k_max) | {"share of experts in training": float(np.mean(schedule)) / EXPERTS}


def learned_router(trial: Trial, world: World, k: int, dropout: float) -> dict[str, float]:
    """The same experts, behind the usual router and its balance loss."""
    model = smoe_dropout_convert(gpt2(trial.generator, dropout), EXPERTS, fresh=True, generator=trial.generator)
    logits: list[Tensor] = []
    for layer in layers_of(model):
        layer.router = TopKRouter(HIDDEN, EXPERTS, k)
        layer.router.register_forward_hook(lambda router, args, routing: logits.append(routing.logits))

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        logits.clear()
        fit = lm.next_token_loss(model, batch)
        return fit + 0.01 * torch.stack([load_balancing_loss(each, k) for each in logits]).mean()

    train(trial, world, model.to(trial.device), loss)
    return slimmed(trial, world, model, k) | {"share of experts in training": k / EXPERTS}


def slimmed(trial: Trial, world: World, model: Any, own: int) -> dict[str, float]:
    """Test with every number of active experts. `own` is the number that training ended with."""
    quality = {}
    for k in range(1, EXPERTS + 1):
        set_active_experts(model, k)
        quality[k] = lm.bits_per_byte(model, world.test, world.byte_lengths)
        trial.record(k, bits_per_byte_by_active_experts=quality[k])
    experts = [weight for layer in layers_of(model) for weight in (layer.gate_up_proj, layer.gate_up_bias, layer.down_proj)]
    idle = sum(weight.numel() for weight in experts) * (EXPERTS - own) // EXPERTS
    trial.count(model, active=sum(weight.numel() for weight in model.parameters()) - idle)
    return {
        "bits per byte": quality[own],
        **{f"bits per byte, {k} active": quality[k] for k in (1, 2, 4, 8)},
        "rank correlation with active experts": float(spearmanr(list(quality), list(quality.values())).statistic),
        "gain at another number": quality[own] - min(value for k, value in quality.items() if k != own),
    }


def layers_of(model: nn.Module) -> list[SMoEDropout]:
    return [module for module in model.modules() if isinstance(module, SMoEDropout)]


study = Study(
    method="smoe-dropout",
    prepare=prepare,
    arms={
        "dense": partial(dense, dropout=DROPOUT),
        "SMoE-Dropout": partial(random_router, k_min=4, k_max=8, dropout=DROPOUT),
        "random router, 4 of 8": partial(random_router, k_min=4, k_max=4, dropout=DROPOUT),
        "learned router, 2 of 8": partial(learned_router, k=2, dropout=DROPOUT),
        "dense, no dropout": partial(dense, dropout=0.0),
        "SMoE-Dropout, no other dropout": partial(random_router, k_min=4, k_max=8, dropout=0.0),
    },
    claim=beats("SMoE-Dropout", "dense", on="bits per byte", lower_is_better=True),
    also=[
        holds(
            "SMoE-Dropout gets better with every active expert (rank correlation of bits per byte and their number)",
            lambda arms: arms["SMoE-Dropout"]["rank correlation with active experts"],
            below=-0.99,
        ),
        holds(
            "a learned router is best with the number it was trained with (bits per byte gained at the best other number)",
            lambda arms: arms["learned router, 2 of 8"]["gain at another number"],
            below=0.0,
        ),
        beats("SMoE-Dropout", "random router, 4 of 8", on="bits per byte, 8 active", lower_is_better=True),
        beats("SMoE-Dropout, no other dropout", "dense, no dropout", on="bits per byte", lower_is_better=True),
    ],
    equal="neurons, tokens, batches, steps, optimiser, learning rate; all initial weights but those of the feed-forward blocks",
    seeds=7,
    data=("docs", "source"),
)
