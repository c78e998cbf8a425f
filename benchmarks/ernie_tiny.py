"""The latent losses of ERNIE-Tiny with a straightforward version, and a whole stage with what any distillation has to pay.

The peers, torchdistill's `MultiStagesDistillationBox` and TinyBERT's script, do not run beside firsthand (the first needs
torchvision). In their place stands what one would write: the real tokens of each layer picked out by the mask, `F.mse_loss` pair
by pair, and a loop that calls student and teacher. The limit of a stage is the student's forward and backward pass and the
teacher's forward pass.
"""

import copy
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertForSequenceClassification

from firsthand.distill.ernie_tiny import (
    DistillationLoss,
    attention_distillation_loss,
    hidden_distillation_loss,
    identity_projection,
    label_distillation_loss,
)

ROUNDS = 5


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def bert(hidden: int, layers: int) -> BertForSequenceClassification:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": 12}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=5000, num_labels=4, **sizes, **no_dropout)
    return BertForSequenceClassification._from_config(config, attn_implementation="eager").eval()


def straightforward(student, teacher, mask: Tensor, projection: nn.Module, layers: list[tuple[int, int]]) -> Tensor:
    """Pair by pair, the real tokens picked out. Attention text by text, since each has its own keys."""
    hidden = sum(
        F.mse_loss(projection(student.hidden_states[one][mask]), teacher.hidden_states[other][mask])
        for one, other in [(0, 0), *layers]
    )
    attention = 0.0
    for one, other in layers:
        for text, length in enumerate(mask.sum(1).tolist()):
            mine, its = (each[text, :, :length, :length] for each in (student.attentions[one - 1], teacher.attentions[other - 1]))
            attention = attention + length * F.mse_loss(mine, its)
    return hidden / (len(layers) + 1) + attention / mask.sum() / len(layers)


def main(rows: int = 8, length: int = 32) -> None:
    torch.manual_seed(0)
    student, teacher = bert(96, 3), bert(384, 6)
    projection = identity_projection(student, teacher)
    lengths = torch.randint(length // 2, length + 1, (rows, 1))
    mask = (torch.arange(length) < lengths).long()
    batch = {"input_ids": torch.randint(5000, (rows, length)), "attention_mask": mask}
    labels = torch.randint(4, (rows,))
    shown = {"output_attentions": True, "output_hidden_states": True}
    layers = [(1, 2), (2, 4), (3, 6)]

    with torch.no_grad():
        taught, outputs = teacher(**batch, **shown), student(**batch, **shown)
    leaves = [each.clone().requires_grad_() for each in (*outputs.attentions, *outputs.hidden_states)]
    outputs.attentions, outputs.hidden_states = tuple(leaves[:3]), tuple(leaves[3:])

    def ours() -> tuple[Tensor, ...]:
        loss = attention_distillation_loss(outputs.attentions, taught.attentions, mask)
        loss = loss + hidden_distillation_loss(outputs.hidden_states, taught.hidden_states, projection, mask)
        return loss, *torch.autograd.grad(loss, leaves)

    def peer() -> tuple[Tensor, ...]:
        loss = straightforward(outputs, taught, mask.bool(), projection, layers)
        return loss, *torch.autograd.grad(loss, leaves)

    for mine, other in zip(ours(), peer(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-4)
    seconds = race({"ours": ours, "peer": peer})
    print(f"latent losses, forward and backward, {rows} texts of up to {length} tokens, 6 layers of 384 to 3 of 96")
    print(f"  ours {1e3 * seconds['ours']:.1f} ms; ours / straightforward = {seconds['ours'] / seconds['peer']:.2f}")

    free = copy.deepcopy(student)  # without our hook

    def step(model: nn.Module, value: Tensor) -> Tensor:
        model.zero_grad()
        value.backward()
        return value.detach()

    def by_hand() -> Tensor:
        with torch.no_grad():
            taught = teacher(**batch, **shown)
        outputs = free(**batch, **shown)
        latent = straightforward(outputs, taught, mask.bool(), projection, layers)
        return step(free, latent + label_distillation_loss(outputs.logits, taught.logits, labels))

    def limit() -> Tensor:
        with torch.no_grad():
            teacher(**batch)
        return step(free, free(**batch).logits.sum())

    with DistillationLoss(student, teacher, soft=1.0, hard=1.0, projection=projection) as loss:

        def ours_whole() -> Tensor:
            return step(student, loss(student(**batch), labels))

        torch.testing.assert_close(ours_whole(), by_hand(), atol=1e-5, rtol=1e-4)
        seconds = race({"ours": ours_whole, "peer": by_hand, "limit": limit})
    print("an update of the last stage, without the optimiser")
    print(
        f"  ours {1e3 * seconds['ours']:.0f} ms; ours / straightforward = {seconds['ours'] / seconds['peer']:.2f}, "
        f"ours / limit = {seconds['ours'] / seconds['limit']:.2f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
