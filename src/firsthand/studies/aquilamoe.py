"""Is a large model better for the same compute if it is grown from a small one, or upcycled, than if it is trained from nothing?

A Llama with grouped-query attention, hidden size 32 and 3 layers, is trained on the bytes of English prose and Python source.
Then it is grown to hidden size 64 and 6 layers in the paper's ways and trained on. The paper takes the small model as given and
compares at the same number of further steps. One could as well have spent the small model's compute on the large one, so the
primary claim is against a model from nothing that gets as many steps more as that pays for. The other way round, the small
model is trained on for what the large one's steps cost: does growing pay at all? As for sparse models, one is upcycled from
the small one, against two from nothing, with and without its compute.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from firsthand import Study, Trial, beats, holds
from firsthand.moe.balance import load_balancing_loss, router_z_loss
from firsthand.testbeds import lm, moe_lm, text
from firsthand.weights.aquilamoe import grow_width, scale_out, scale_up

VOCAB, CONTEXT = 256 + len(text.SPECIAL), 128
BATCH = 2  # so small because models from nothing are short of steps: of 8, 4 and 2, at the same tokens, it served them best
SMALL = {"hidden": 32, "layers": 3, "heads": 4, "intermediate": 88}
LARGE = {"hidden": 64, "layers": 6, "heads": 8, "intermediate": 176}
SAME = {"vocab": VOCAB, "context": CONTEXT, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS, TOP_K = 4, 2


@dataclass
class World:
    train: Tensor
    test: Tensor
    byte_lengths: Tensor
    small: Any  # the trained small model
    small_steps: int  # that it was trained for
    steps: int  # that the others are trained for
    order: int  # seed of the batches, the same for every arm


def prepare(trial: Trial) -> World:
    size = 60_000 if trial.smoke else 2_000_000
    split = text.split(text.documents("docs", "source"), trial.rng, validation=0.0)
    tokenizer = text.byte_tokenizer()
    train, test = (
        text.pack(tokenizer, [document["text"] for document in text.sample(part, trial.rng, characters)], block=CONTEXT)
        for part, characters in ((split.train, size), (split.test, size // 4))
    )
    test = test[trial.rng.permutation(len(test))[: 8 if trial.smoke else 192]]
    small_steps, steps = (4, 4) if trial.smoke else (2000, 400)
    small = llama(trial.generator, SMALL).to(trial.device)
    lm.train(small, lm.batches(train, BATCH, trial.generator), steps=small_steps, lr=RATES["small"], trial=trial, label="small")
    return World(train, test, text.byte_lengths(tokenizer), small, small_steps, steps, order=trial.seed)


# Peak learning rates, tuned on seed 1 for each way to begin: from nothing the best of 0.005 and 0.01 (and 0.0025 for the
# dense one, the baseline), for the others of 0.001 and 0.002 (and 0.0005 for FPI, 0.004 for upcycling).
RATES = {"small": 1e-2, "from nothing": 5e-3, "sparse from nothing": 1e-2, "fpi": 2e-3, "aki": 2e-3, "upcycled": 2e-3}


def llama(generator: torch.Generator, sizes: dict[str, int]) -> Any:
    return with_large_embeddings(lm.llama(generator, **sizes, **SAME, initializer_range=deviation(sizes)))


def deviation(sizes: dict[str, int]) -> float:
    """What 0.02 is to a model 1024 wide: with 0.02 itself, models so small learn late."""
    return 0.02 * (1024 / sizes["hidden"]) ** 0.5


@torch.no_grad()
def with_large_embeddings(model: Any) -> Any:
    """Of deviation 1, lest the layers drown the tokens: better for a model from nothing than `deviation`, and than √hidden."""
    model.model.embed_tokens.weight /= model.config.initializer_range
    return model


def cost(model: Any) -> float:
    """Multiplications for a token: with the weights that it uses, and between queries, keys and values."""
    weights = sum(used(name, weight) for name, weight in model.named_parameters() if weight.ndim > 1 and "embed" not in name)
    config = model.config
    return weights + config.num_hidden_layers * 2 * CONTEXT * config.num_attention_heads * config.head_dim


def used(name: str, weight: Tensor) -> float:
    """How many of these parameters a token uses."""
    return weight.numel() * (TOP_K / EXPERTS if "experts" in name else 1)


def fit(
    trial: Trial, world: World, model: Any, rate: float, *, more: float = 0.0, loss: lm.Loss = lm.next_token_loss
) -> dict[str, float]:
    """Train and test. `more` is compute for additional steps, in the unit of `cost` and for as many tokens as a step has."""
    steps = world.steps + round(more / cost(model))
    model.to(trial.device)
    trial.count(model, active=round(sum(used(name, weight) for name, weight in model.named_parameters())))
    found = []

    def look(step: int) -> None:
        found.append(lm.bits_per_byte(model, world.test, world.byte_lengths))
        trial.record(step, bits_per_byte=found[-1])

    def batches() -> Iterator[Tensor]:
        """With a look at the test text after each quarter of the steps."""
        for step, batch in enumerate(lm.batches(world.train, BATCH, torch.Generator().manual_seed(world.order))):
            if step % (steps // 4) == 0 and len(found) < 4:
                look(step)
            yield batch

    lm.train(model, batches(), steps=steps, lr=rate, loss=loss, trial=trial)
    look(steps)
    names = ("bits per byte at the start", "after a quarter", "after half", "after three quarters", "bits per byte")
    return dict(zip(names, found, strict=True)) | {"steps": steps}


def spent_on_small(world: World) -> float:
    return world.small_steps * cost(world.small)


def from_nothing(trial: Trial, world: World, with_small: bool) -> dict[str, float]:
    more = spent_on_small(world) if with_small else 0.0
    return fit(trial, world, llama(trial.generator, LARGE), RATES["from nothing"], more=more)


def small_trained_on(trial: Trial, world: World) -> dict[str, float]:
    """Not grown: the compute of the large model's steps goes into more of its own."""
    more = world.steps * (cost(llama(trial.generator, LARGE)) - cost(world.small))
    return fit(trial, world, world.small, RATES["aki"], more=more)


def grown(trial: Trial, world: World, width: str, depth: str) -> dict[str, float]:
    model = scale_up(world.small, llama(trial.generator, LARGE).config, width=width, depth=depth)
    wide = grow_width(
        world.small,
        hidden_size=LARGE["hidden"],
        intermediate_size=LARGE["intermediate"],
        num_attention_heads=LARGE["heads"],
        method=width,
    )
    moved = {"logits moved by width": largest_difference(world, wide)}
    return moved | fit(trial, world, model, RATES[width])


def sparse_from_nothing(trial: Trial, world: World, with_small: bool) -> dict[str, float]:
    model = moe_lm.mixtral(trial.generator, **SMALL, **SAME, experts=EXPERTS, top_k=TOP_K, initializer_range=deviation(SMALL))
    more, rate = spent_on_small(world) if with_small else 0.0, RATES["sparse from nothing"]
    return fit(trial, world, with_large_embeddings(model), rate, more=more, loss=moe_lm.loss_with(balance))


def upcycled(trial: Trial, world: World) -> dict[str, float]:
    model = scale_out(world.small, EXPERTS, TOP_K, generator=trial.generator)
    moved = {"logits moved by upcycling": largest_difference(world, model)}
    return moved | fit(trial, world, model, RATES["upcycled"], loss=moe_lm.loss_with(balance))


def balance(router_logits: tuple[Tensor, ...]) -> Tensor:
    """With the paper's weights."""
    losses = [0.001 * load_balancing_loss(each, TOP_K) + 0.01 * router_z_loss(each) for each in router_logits]
    return torch.stack(losses).mean()


@torch.no_grad()
def largest_difference(world: World, model: Any) -> float:
    """Between logits of the small model and another, on test text."""
    tokens = world.test[:16].to(world.small.device)
    before, after = (each.eval()(tokens, use_cache=False).logits for each in (world.small, model))
    return (before - after).abs().max().item()


study = Study(
    method="aquilamoe",
    prepare=prepare,
    arms={
        "from nothing, same compute": partial(from_nothing, with_small=True),
        "from nothing, same steps": partial(from_nothing, with_small=False),
        "FPI, stacking": partial(grown, width="fpi", depth="stacking"),
        "FPI, interpolation": partial(grown, width="fpi", depth="interpolation"),
        "AKI, stacking": partial(grown, width="aki", depth="stacking"),
        "AKI-Pro": partial(grown, width="aki", depth="interpolation"),
        "small, same compute": small_trained_on,
        "sparse from nothing, same compute": partial(sparse_from_nothing, with_small=True),
        "sparse from nothing, same steps": partial(sparse_from_nothing, with_small=False),
        "upcycled": upcycled,
    },
    claim=beats("AKI-Pro", "from nothing, same compute", on="bits per byte", lower_is_better=True),
    also=[
        beats("AKI-Pro", "from nothing, same steps", on="bits per byte", lower_is_better=True),
        beats("AKI-Pro", "small, same compute", on="bits per byte", lower_is_better=True),
        beats("AKI-Pro", "FPI, interpolation", on="bits per byte", lower_is_better=True),
        beats("FPI, interpolation", "AKI-Pro", on="bits per byte at the start", lower_is_better=True),
        beats("FPI, interpolation", "FPI, stacking", on="bits per byte at the start", lower_is_better=True),
        beats("AKI-Pro", "AKI, stacking", on="bits per byte", lower_is_better=True),
        beats("upcycled", "sparse from nothing, same steps", on="bits per byte", lower_is_better=True),
        beats("upcycled", "sparse from nothing, same compute", on="bits per byte", lower_is_better=True),
        holds(
            "FPI in width moves no logit by more than 0.0001",
            lambda arms: arms["FPI, interpolation"]["logits moved by width"],
            below=1e-4,
        ),
        holds(
            "upcycling moves no logit by more than 0.0001", lambda arms: arms["upcycled"]["logits moved by upcycling"], below=1e-4
        ),
    ],
    equal="text, batches, test text; the primary claim: compute, the small model's included",
    data=("docs", "source"),
)
