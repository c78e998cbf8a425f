"""Tiny language models, trained from nothing in seconds: Llama and BERT, one training loop, bits per byte.

Needs transformers (`pip install 'firsthand[hf]'`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from firsthand.testbeds import text

if TYPE_CHECKING:
    from transformers import BertForMaskedLM, LlamaForCausalLM

Loss = Callable[[Any, Tensor], Tensor]


def llama(
    generator: torch.Generator,
    vocab: int,
    hidden: int = 96,
    layers: int = 3,
    heads: int = 4,
    intermediate: int = 256,
    context: int = 128,
    **config: Any,
) -> LlamaForCausalLM:
    """A Llama with its initial weights drawn from `generator`; `config` goes to `LlamaConfig` as it is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=context,
        pad_token_id=text.PAD,
        bos_token_id=text.END,
        eos_token_id=text.END,
        **config,
    )
    return _initialised(lambda: LlamaForCausalLM(sizes), generator)


def bert(
    generator: torch.Generator,
    vocab: int,
    hidden: int = 96,
    layers: int = 3,
    heads: int = 4,
    intermediate: int = 256,
    context: int = 128,
    **config: Any,
) -> BertForMaskedLM:
    """A BERT with its initial weights drawn from `generator`; `config` goes to `BertConfig`. No dropout unless asked for."""
    from transformers import BertConfig, BertForMaskedLM

    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = BertConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=context,
        pad_token_id=text.PAD,
        **(no_dropout | config),
    )
    return _initialised(lambda: BertForMaskedLM(sizes), generator)


def _initialised(build: Callable[[], Any], generator: torch.Generator) -> Any:
    """transformers draws initial weights from the global generator: lend it one seeded from ours."""
    seed = torch.randint(2**62, (), generator=generator).item()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def batches(
    blocks: Int64[Tensor, "blocks block"], batch: int, generator: torch.Generator
) -> Iterator[Int64[Tensor, "batch block"]]:
    """Batches without end: every block once, in random order, then every block again in another order.

    Raises:
        ValueError: `batch` is below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:batch]]
        order = order[batch:]


def next_token_loss(model: nn.Module, batch: Int64[Tensor, "batch block"]) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of each token given those before it."""
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def mask_tokens(
    batch: Int64[Tensor, "batch block"], generator: torch.Generator, vocab: int, share: float = 0.15
) -> tuple[Int64[Tensor, "batch block"], Int64[Tensor, "batch block"]]:
    """BERT's corruption: of the chosen tokens 80 % become `MASK`, 10 % a random token, 10 % stay.

    Args:
        batch: token ids; special tokens are never chosen.
        generator: draws the choice, on the CPU.
        vocab: number of tokens, to draw random ones from.
        share: of the tokens to choose, in (0, 1].

    Returns:
        The corrupted batch, and the labels: the token where one was chosen, -100 elsewhere.

    Raises:
        ValueError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    chosen, kind = torch.rand(2, *batch.shape, generator=generator).to(batch.device)
    noise = torch.randint(len(text.SPECIAL), vocab, batch.shape, generator=generator).to(batch.device)
    is_chosen = (chosen < share) & (batch >= len(text.SPECIAL))
    inputs = torch.where(is_chosen & (kind < 0.8), text.MASK, batch)
    inputs = torch.where(is_chosen & (kind >= 0.9), noise, inputs)
    return inputs, torch.where(is_chosen, batch, -100)


def masked_loss(generator: torch.Generator, vocab: int, share: float = 0.15) -> Loss:
    """A loss for `train`: the mean cross-entropy of the tokens that `mask_tokens` chose."""

    def loss(model: nn.Module, batch: Int64[Tensor, "batch block"]) -> Float[Tensor, ""]:
        inputs, labels = mask_tokens(batch, generator, vocab, share)
        logits = model(input_ids=inputs).logits
        # A sum over at least one: a batch in which nothing was chosen costs 0 and not 0/0.
        total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return total / (labels != -100).sum().clamp(min=1)

    return loss


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.05, floor: float = 0.1) -> float:
    """Linear rise over the share `warmup` of the steps to `peak`, then a cosine down to `floor` of it, reached in the last step.

    `step` counts from 0.
    """
    rise = round(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    progress = (step - rise + 1) / (steps - rise)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass
class Run:
    """What a training run was like.

    Attributes:
        losses: of each step, before its update; all finite.
        gradient_norms: of each step, before clipping.
        diverged: whether a loss or a gradient was not finite. The run ended there, without the update.
    """

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    diverged: bool = False


def train(
    model: nn.Module,
    stream: Iterable[Tensor],
    *,
    steps: int,
    lr: float,
    loss: Loss = next_token_loss,
    clip: float | None = 1.0,
    weight_decay: float = 0.1,
    warmup: float = 0.05,
    floor: float = 0.1,
    trial: Any = None,
    curve: str = "",
    label: str = "training",
) -> Run:
    """Train with AdamW (0.9, 0.95); learning rate as in `learning_rate`; decay on matrices only, not on gains and biases.

    Args:
        model: trained in place, where it is. What does not require a gradient stays.
        stream: of batches, at least `steps` of them.
        steps: number of updates.
        lr: peak learning rate.
        loss: from the model and a batch to a scalar.
        clip: largest norm of the whole gradient; None leaves gradients alone.
        weight_decay: of AdamW, at least 0.
        warmup: share of the steps in which the learning rate rises.
        floor: last learning rate as a share of the peak.
        trial: shows the progress (`track`) and keeps the curve (`record`), if given.
        curve: name under which the losses are recorded; empty for not at all.
        label: what the progress is called.

    Raises:
        ValueError: a setting is out of range, or `stream` ends too early.
    """
    _check(steps >= 1, "steps", "at least 1", steps)
    _check(0 < lr < math.inf, "lr", "positive and finite", lr)
    _check(clip is None or clip > 0, "clip", "positive, or None", clip)
    _check(0 <= weight_decay < math.inf, "weight_decay", "at least 0 and finite", weight_decay)
    _check(0 <= warmup < 1, "warmup", "in [0, 1)", warmup)
    _check(0 <= floor <= 1, "floor", "in [0, 1]", floor)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
            {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
        ],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,  # one pass over all parameters: a tiny model spends its time in calls, not in arithmetic
    )
    model.train()
    run = Run()
    source = iter(stream)
    for step in trial.track(range(steps), label) if trial else range(steps):
        batch = next(source, None)
        if batch is None:
            raise ValueError(f"batches ended after {step} of {steps} steps")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr, warmup, floor)
        value = loss(model, batch.to(device))
        value.backward()
        norm = nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip)
        if not (value.isfinite() and norm.isfinite()):
            run.diverged = True
            optimizer.zero_grad()
            break
        optimizer.step()
        optimizer.zero_grad()
        run.losses.append(value.item())
        run.gradient_norms.append(norm.item())
        if trial and curve:
            trial.record(step, **{curve: run.losses[-1]})
    return run


def _check(right: bool, name: str, expected: str, value: object) -> None:
    if not right:
        raise ValueError(f"{name} must be {expected}, got {value}")


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, blocks: Int64[Tensor, "blocks block"], byte_lengths: Int64[Tensor, " vocab"], batch: int = 64
) -> float:
    r"""How well a causal model predicts text, whatever its tokens.

    $$ \frac{-\sum_i \log_2 p(x_i \mid x_{<i})}{\sum_i \mathrm{bytes}(x_i)} $$

    Over all tokens but the first of each block. The ends of documents are predicted too but have no bytes.

    Args:
        model: returns `.logits`; evaluated where it is, its mode is left as it was.
        blocks: token ids.
        byte_lengths: bytes of each token (`text.byte_lengths`).
        batch: blocks at a time.

    Returns:
        Bits per byte; infinity where the model's probabilities are not finite.

    Raises:
        ValueError: the blocks have no bytes.
    """
    size = byte_lengths[blocks[:, 1:]].sum().item()
    if size == 0:
        raise ValueError("the blocks have no bytes: none of their tokens has a positive byte length")
    device = next(model.parameters()).device
    mode = model.training
    model.eval()
    nats = 0.0
    for part in blocks.split(batch):
        nats += next_token_loss(model, part.to(device)).item() * part[:, 1:].numel()
    model.train(mode)
    return nats / math.log(2) / size if math.isfinite(nats) else math.inf
