"""LLaVA-MoD's hot paths: mimicry over a large vocabulary, and a layer of upcycled experts.

Peers: for mimicry, the KL written straight with torch over whole (batch, length, vocabulary) tensors in float32; TRL has no
function for this without a trainer around it. For the layer, transformers' Mixtral block with the same weights.
Limits: reading both logits and writing one gradient; one dense feed-forward block of the width that a token uses.
"""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from firsthand.distill.llava_mod import mimic_distillation_loss, upcycle_ffn

ROUNDS = 5


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation of the forward pass returns, in MB."""

    megabytes = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() / 2**20 for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.megabytes = max(self.megabytes, *sizes, 0.0)
        return result


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


def mimicry(dtype: torch.dtype, batch: int = 2, length: int = 256, vocab: int = 32_000) -> None:
    torch.manual_seed(0)
    student, teacher = (torch.randn(batch, length, vocab).to(dtype) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(vocab, (batch, length))
    labels[:, : length // 2] = -100

    def ours() -> tuple[Tensor, Tensor]:
        loss = mimic_distillation_loss(student, teacher, labels, chunk=64)
        return loss, *torch.autograd.grad(loss, student)

    def straight() -> tuple[Tensor, Tensor]:
        log_student, log_teacher = (logits[:, :-1].float().log_softmax(-1) for logits in (student, teacher))
        each = F.kl_div(log_student, log_teacher, log_target=True, reduction="none").sum(-1)
        loss = each[labels[:, 1:] != -100].mean()
        return loss, *torch.autograd.grad(loss, student)

    def limit() -> Tensor:
        return student.detach() - teacher

    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-4, "rtol": 1e-2}
    for mine, other in zip(ours(), straight(), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
    largest = {}
    for name, call in (("ours", ours), ("straight", straight)):
        with Largest() as watch:
            call()
        largest[name] = watch.megabytes
    seconds = race({"ours": ours, "straight": straight, "limit": limit})
    print(
        f"mimicry, forward and backward, {dtype}, {batch} x {length} tokens, half of them response, {vocab} ids: "
        f"time ours / straight = {seconds['ours'] / seconds['straight']:.2f}, ours / limit = "
        f"{seconds['ours'] / seconds['limit']:.1f}; largest tensor {largest['ours']:.0f} MB, "
        f"ours / straight = {largest['ours'] / largest['straight']:.2f}"
    )


def layer(dim: int = 256, hidden: int = 688, tokens: int = 1024) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": dim, "intermediate_size": hidden, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = upcycle_ffn(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)))
    moe = model.model.layers[0].mlp
    with torch.no_grad():  # experts that differ, as after training
        for weight in (moe.gate_up_proj, moe.down_proj, moe.router.weight):
            weight += 0.02 * torch.randn_like(weight)
    peer = MixtralSparseMoeBlock(
        MixtralConfig(num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager", **sizes)
    )
    peer.load_state_dict(
        {"gate.weight": moe.router.weight, "experts.gate_up_proj": moe.gate_up_proj, "experts.down_proj": moe.down_proj}
    )
    dense = LlamaMLP(LlamaConfig(vocab_size=8, **(sizes | {"intermediate_size": 2 * hidden})))
    x = torch.randn(1, tokens, dim)

    def step(block: nn.Module) -> Callable[[], Tensor]:
        def call() -> Tensor:
            block.zero_grad()
            result = block(x)
            result = result[0] if isinstance(result, tuple) else result
            result.square().mean().backward()
            return result

        return call

    torch.testing.assert_close(step(moe)(), step(peer)(), atol=1e-5, rtol=1e-4)
    seconds = race({"ours": step(moe), "Mixtral": step(peer), "dense": step(dense)})
    print(
        f"upcycled layer, forward and backward, {tokens} tokens, {dim} x {hidden}, 4 experts, 2 active: time ours / Mixtral = "
        f"{seconds['ours'] / seconds['Mixtral']:.2f}, ours / dense of twice the width = {seconds['ours'] / seconds['dense']:.2f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        mimicry(dtype)
    layer()
