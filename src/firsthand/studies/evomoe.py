"""Does a sparse model that grows out of one expert through a gate that begins dense beat one that is sparse from the start?

A small Llama is trained from nothing on the bytes of Python's documentation and the source of its standard library, in one run of
transformers' Trainer for each arm. EvoMoE spends 30 % of the steps on the dense model, 50 % on lowering the temperature of the
gates, and 20 % on top-1 gates. Switch has top-1 gates from the start, and experts with initial weights of their own. All are
evaluated top-1.

The primary claim is at equal tokens. EvoMoE computes more for a token while its gates are open, so one more Switch is trained for
as many steps as cost what EvoMoE costs. How many is worked out beforehand, for gates that prefer no expert. Gates that do choose
fewer, so EvoMoE spends a little less than that; both totals are among the metrics.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from firsthand import Study, Trial, beats
from firsthand.moe.balance import load_balancing_loss
from firsthand.moe.blocks import capture_routing
from firsthand.moe.evomoe import EvoMoECallback, dts_gate, dts_temperature
from firsthand.moe.ffn import ffn_slots
from firsthand.moe.layer import MoE, TopKRouter
from firsthand.testbeds import lm, text

EXPERTS, LAYERS, HIDDEN, INNER, CONTEXT, BATCH = 4, 2, 64, 176, 128, 8
BALANCE = 0.01  # weight of the balance loss, EvoMoE's and Switch's
DENSE, GATE = 0.3, 0.5  # shares of the steps; the rest is hard
# Peak learning rates, each the best of 3e-3, 6e-3 and 1.2e-2 (Switch: and 1.5e-3; dense: not 1.2e-2) on a seed below 100.
SWITCH_RATE, EVOMOE_RATE, DENSE_RATE = 3e-3, 6e-3, 6e-3


@dataclass
class World:
    train: Tensor
    test: Tensor
    byte_lengths: Tensor
    steps: int


def prepare(trial: Trial) -> World:
    steps = 5 if trial.smoke else 600
    split = text.split(text.documents("docs", "source"), trial.rng)
    tokenizer = text.byte_tokenizer()
    # Three times what an arm at equal tokens sees: no arm sees a text twice.
    train, test = (
        text.pack(tokenizer, [document["text"] for document in text.sample(part, trial.rng, characters)], CONTEXT)
        for part, characters in ((split.train, 3 * steps * BATCH * CONTEXT), (split.test, 50_000 if trial.smoke else 400_000))
    )
    some = test[trial.rng.permutation(len(test))[: 8 if trial.smoke else 512]]
    return World(train, some, text.byte_lengths(tokenizer), steps)


def llama(trial: Trial, world: World) -> Any:
    """The same dense model for all arms; initial weights of the size that they would have in a model 1024 wide."""
    sizes = {"hidden": HIDDEN, "layers": LAYERS, "heads": 4, "intermediate": INNER, "context": CONTEXT}
    return lm.llama(trial.generator, len(world.byte_lengths), **sizes, initializer_range=0.02 * (1024 / HIDDEN) ** 0.5)


def to_switch(model: Any, generator: torch.Generator) -> Any:
    """Each feed-forward block becomes experts with initial weights of their own, of which a token goes to one."""
    for slot in ffn_slots(model):
        moe = MoE(HIDDEN, INNER, EXPERTS, 1, router=TopKRouter(HIDDEN, EXPERTS, 1, normalize_top_k=False))
        for weight in moe.parameters():
            nn.init.normal_(weight, std=model.config.initializer_range, generator=generator)
        slot.replace(moe)
    return model


class Meter(TrainerCallback):
    """Counts floating-point operations of training, and shows and records how it goes."""

    def __init__(self, trial: Trial, steps: int) -> None:
        self.trial, self.flops = trial, 0.0
        self.progress = trial.track(range(steps), trial.arm)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        layers = [module.last_routing for module in model.modules() if isinstance(module, MoE)]
        pairs = sum(int((routing.index < EXPERTS).sum()) for routing in layers) if layers else LAYERS * BATCH * CONTEXT
        self.flops += step_flops(model, pairs)
        next(self.progress, None)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        entry = state.log_history[-1]
        if "loss" in entry:
            values = {"training_loss": entry["loss"]} | {key: entry[key] for key in ("active_experts",) if key in entry}
            self.trial.record(state.global_step, **values)


def step_flops(model: Any, pairs: float) -> float:
    """Of a step in which tokens meet experts `pairs` times: two for each weight that a token meets, backward twice as many."""
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name}
    shared = sum(size for name, size in matrices.items() if "mlp" not in name or "router" in name)
    attention = 2 * LAYERS * CONTEXT * HIDDEN  # scores and their use, for each token
    return 6.0 * (BATCH * CONTEXT * (shared + attention) + pairs * 3 * HIDDEN * INNER)


def train(
    trial: Trial, world: World, model: Any, steps: int, rate: float, callback: TrainerCallback | None = None
) -> dict[str, float]:
    meter = Meter(trial, steps)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=round(0.05 * steps),
            adam_beta2=0.95,
            weight_decay=0.1,
            logging_steps=max(1, steps // 50),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=trial.device.type == "cpu",
            dataloader_pin_memory=False,
            seed=trial.seed,
        )
        rows = [{"input_ids": block, "labels": block} for block in world.train]
        trainer = Trainer(model, settings, train_dataset=rows, callbacks=[c for c in (callback, meter) if c is not None])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    experts = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj")))
    total = sum(p.numel() for p in model.parameters())
    trial.count(model, active=total - experts + experts // EXPERTS)
    return {
        "bits per byte": lm.bits_per_byte(model, world.test, world.byte_lengths),
        "training GFLOPs": meter.flops / 1e9,
        "training tokens": float(steps * BATCH * CONTEXT),
    }


def dense(trial: Trial, world: World) -> dict[str, float]:
    return train(trial, world, llama(trial, world), world.steps, DENSE_RATE)


def switch(trial: Trial, world: World, equal_flops: bool = False) -> dict[str, float]:
    model = to_switch(llama(trial, world), trial.generator)
    steps = world.steps
    if equal_flops:
        each = step_flops(model, LAYERS * BATCH * CONTEXT)
        steps = round(evomoe_flops(model, steps, trial.generator) / each)

    with capture_routing(model) as routing:

        def add_balance(model: Any, inputs: Any, output: Any) -> Any:
            if model.training:
                layers = [load_balancing_loss(each.logits, top_k=1) for each in routing]
                output["loss"] = output.loss + BALANCE * torch.stack(layers).mean()
            return output

        model.register_forward_hook(add_balance)
        return train(trial, world, model, steps, SWITCH_RATE)


def evomoe_flops(model: Any, steps: int, generator: torch.Generator) -> float:
    """What EvoMoE would spend if its gates never preferred an expert."""
    tokens = BATCH * CONTEXT * LAYERS
    begin, end = round(DENSE * steps), round(DENSE * steps) + round(GATE * steps)
    total = step_flops(model, tokens) * (steps - (end - begin))
    for step in range(begin, end):
        temperature = dts_temperature(step - begin, end - begin)
        mask = dts_gate(torch.zeros(BATCH * CONTEXT, EXPERTS), temperature, generator=generator).mask
        total += step_flops(model, LAYERS * int(mask.sum()))
    return total


def evomoe(trial: Trial, world: World, dense_share: float = DENSE, **settings: Any) -> dict[str, float]:
    begin, end = round(dense_share * world.steps), round((DENSE + GATE) * world.steps)
    callback = EvoMoECallback(EXPERTS, dense_steps=begin, gate_steps=end - begin, balance=BALANCE, **settings)
    return train(trial, world, llama(trial, world), world.steps, EVOMOE_RATE, callback)


study = Study(
    method="evomoe",
    prepare=prepare,
    arms={
        "Switch": switch,
        "EvoMoE": evomoe,
        "Switch, equal FLOPs": partial(switch, equal_flops=True),
        "EvoMoE, no masks": partial(evomoe, mask_prob=0.0),
        "EvoMoE, no dense phase": partial(evomoe, dense_share=0.0),
        "dense": dense,
    },
    claim=beats("EvoMoE", "Switch", on="bits per byte", lower_is_better=True),
    also=[
        beats("EvoMoE", "Switch, equal FLOPs", on="bits per byte", lower_is_better=True),
        beats("EvoMoE", "EvoMoE, no masks", on="bits per byte", lower_is_better=True),
        beats("EvoMoE", "EvoMoE, no dense phase", on="bits per byte", lower_is_better=True),
        beats("EvoMoE", "dense", on="bits per byte", lower_is_better=True),
    ],
    equal="tokens (but for 'Switch, equal FLOPs'), initial weights outside the experts, batches, optimiser (rates tuned)",
    data=("docs", "source"),
)
