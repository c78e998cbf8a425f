"""SMoE-Dropout: experts chosen by a router that is random and never trained, more of them as training goes on."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from firsthand.moe.experts import Activation, moe_forward
from firsthand.moe.ffn import FFNWeights, ffn_slots
from firsthand.moe.layer import Routing, check_sizes

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError:  # a loop of one's own calls `smoe_dropout_num_experts` and `set_active_experts` itself
    TrainerCallback = None  # type: ignore[assignment, misc]

Mode = Literal["linear_increase", "linear_decrease", "cosine_increase", "cosine_decrease", "exp_increase", "multi_step"]
_MODES = ("linear_increase", "linear_decrease", "cosine_increase", "cosine_decrease", "exp_increase", "multi_step")


def smoe_dropout_num_experts(step: int, total_steps: int, k_min: int, k_max: int, mode: Mode = "linear_increase") -> int:
    r"""How many experts are active at a step of training.

    With $t = s/S$ the share of training that is done, $\Delta = k_\max - k_\min$ and [.] rounding half to even:

    - `"linear_increase"`: $k_\min + [\Delta t]$; `"linear_decrease"`: $k_\max - [\Delta t]$
    - `"cosine_increase"`: $k_\max - [\Delta \cos(\pi t/2)]$; `"cosine_decrease"`: $k_\min + [\Delta \cos(\pi t/2)]$
    - `"exp_increase"`: $k_\max - [\Delta \cdot 0.99^{\lfloor 300 t \rfloor}]$. What is left at the end, 0.049 Δ, is rounded off
      for Δ up to 10; from a wider range this mode ends below `k_max`.
    - `"multi_step"`: `k_min`, doubled until it is `k_max`, each value for an equal share of the steps

    Args:
        step: steps that have been made, at least 0. At and beyond `total_steps` it is the end of the schedule.
        total_steps: S, at least 1.
        k_min: fewest experts, at least 1.
        k_max: most experts, at least `k_min`.
        mode: see above.

    Raises:
        ValueError: a number is out of range, or the mode unknown.

    Source:
        Chen et al., "Sparse MoE as the New Dropout: Scaling Dense and Self-Slimmable Transformers", ICLR 2023, arXiv 2303.01610;
        the formulas are those of its code, whose runs go linearly from 8 to 16 of 16 experts over all steps. There
        `"exp_increase"` takes the floor of s / ⌊S/300⌋, which is the same where 300 divides S and is not defined below 300 steps.
        When `"multi_step"` steps is our choice.
    """
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 1 <= k_min <= k_max:
        raise ValueError(f"k_min and k_max must satisfy 1 <= k_min <= k_max, got {k_min} and {k_max}")
    step, span = min(step, total_steps), k_max - k_min
    if mode == "multi_step":
        levels = [k_min]
        while levels[-1] < k_max:
            levels.append(min(2 * levels[-1], k_max))
        return levels[min(step * len(levels) // total_steps, len(levels) - 1)]
    if mode == "exp_increase":
        return k_max - round(span * 0.99 ** (300 * step // total_steps))
    kind, _, direction = mode.partition("_")
    if kind == "linear":
        done = round(span * step / total_steps)
        return k_min + done if direction == "increase" else k_max - done
    left = round(span * math.cos(math.pi / 2 * step / total_steps))
    return k_max - left if direction == "increase" else k_min + left


class RandomRouter(nn.Module):
    r"""A linear router that is drawn once and never trained; the scores of the chosen experts are weighed among themselves.

    $$ z = W x + b, \qquad C = \mathrm{top}_k(z), \qquad w_e = \frac{e^{z_e}}{\sum_{c \in C} e^{z_c}} \quad (e \in C) $$

    W and b are buffers: no optimiser sees them, whatever `requires_grad_` says. Gradients do reach x through the weights. How
    many experts are active is a buffer as well, so that it is saved and loaded with the model.

    Args:
        dim: D, size of a token, at least 1.
        num_experts: N, at least 1.
        top_k: experts active at first, in 1..N; change it later by setting `top_k`.
        bias: whether there is b.
        generator: draws W and b, uniformly between ±1/√D as `nn.Linear` does. It must be on the CPU.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2303.01610, section 3, and its code for the bias, the initialisation and the softmax over the chosen. The order
        of the results is that of transformers' routers, so that this one can stand in `firsthand.moe.MoE` too.
    """

    weight: Float[Tensor, "experts dim"]
    bias: Float[Tensor, " experts"] | None
    active_experts: Int64[Tensor, ""]

    def __init__(
        self, dim: int, num_experts: int, top_k: int, bias: bool = True, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_experts=num_experts)
        bound = dim**-0.5
        self.num_experts = num_experts
        self.register_buffer("weight", torch.empty(num_experts, dim).uniform_(-bound, bound, generator=generator))
        self.register_buffer("bias", torch.empty(num_experts).uniform_(-bound, bound, generator=generator) if bias else None)
        self.register_buffer("active_experts", torch.tensor(num_experts))
        self.top_k = top_k
        self.register_load_state_dict_post_hook(_read_active_experts)

    @property
    def top_k(self) -> int:
        """Active experts, in 1..N."""
        return self._top_k

    @top_k.setter
    def top_k(self, k: int) -> None:
        if not 1 <= k <= self.num_experts:
            raise ValueError(f"top_k must be in 1..{self.num_experts}, the number of experts, got {k}")
        self._top_k = int(k)  # the same number again: to read a buffer, a GPU would have to be waited for in every forward
        self.active_experts.fill_(k)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Routing:
        """The scores of all experts, the weights of the chosen, which sum to 1, and which were chosen, highest first."""
        logits = F.linear(x, self.weight, self.bias)
        chosen, index = logits.topk(self._top_k, dim=-1)
        return Routing(logits, chosen.softmax(dim=-1, dtype=torch.float32).to(x.dtype), index)


def _read_active_experts(router: nn.Module, incompatible_keys: Any) -> None:
    router.top_k = int(router.active_experts)


class SMoEDropout(nn.Module):
    r"""A feed-forward layer cut into experts, of which a random, frozen router activates any number.

    $$ y = b_2 + \sum_{e \in C} w_e W_2^{(e)} \varphi(W_1^{(e)} x + b_1^{(e)}) $$

    with C and w of `RandomRouter`; gated, φ(W₁x) is act(gate) · up. Experts are slices of a dense layer with $W_2$ multiplied by
    N (see `smoe_dropout_convert`), or networks of their own. For slices and equal scores, all N active are the dense layer, and
    k active are N/k times the chosen slices: the scaling of inverted dropout, with slices of neurons in place of neurons.

    Only the chosen experts are computed (`firsthand.moe.moe_forward`), unless k is near N, from 7/8 of it up. Then all of them
    are, as one dense layer whose hidden activations are multiplied by w, which is 0 for experts that were not chosen: no sorting
    and no gathering, for at most 1/7 more arithmetic. From where is our choice: in our benchmark, on a CPU, small layers
    gain by it from there on, and large ones lose a little.

    Args:
        dim: D, size of a token.
        hidden_dim: F, hidden neurons of each expert.
        num_experts: N.
        top_k: experts active at first, in 1..N; None for all.
        act: as `firsthand.moe.moe_forward` names it.
        gated: whether experts have a gate, as in Llama.
        bias: whether there are biases. One output bias is shared by all experts.
        generator: draws the router, then the experts, on the CPU, all as `nn.Linear` draws its weights.

    Attributes:
        router: the `RandomRouter`.
        gate_up_proj: (N, F, D), or gated (N, 2F, D) with the gate first.
        down_proj: (N, D, F).
        gate_up_bias: like `gate_up_proj` without D, or None.
        output_bias: (D), or None.
        last_routing: logits, weights and index of the last forward.
        impl: `"auto"`, or `"sparse"` or `"masked"` to compute it that way at any k. Both give the same.

    Raises:
        ValueError: a size is below 1, or `top_k` not in 1..N.

    Source:
        arXiv 2303.01610. In its code each expert has an output bias of its own; since the weights sum to 1, one for all of them
        stands for N equal ones (our choice).
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        act: Activation = "gelu",
        gated: bool = False,
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts)
        if not callable(act) and act not in _ACTIVATIONS:
            raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)} or a function, got {act!r}")
        self.act, self.gated, self.impl = act, gated, "auto"
        self.router = RandomRouter(dim, num_experts, num_experts if top_k is None else top_k, generator=generator)
        inner = 2 * hidden_dim if gated else hidden_dim

        def drawn(fan_in: int, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator))

        self.gate_up_proj = drawn(dim, num_experts, inner, dim)
        self.down_proj = drawn(hidden_dim, num_experts, dim, hidden_dim)
        self.gate_up_bias = drawn(dim, num_experts, inner) if bias else None
        self.output_bias = drawn(hidden_dim, dim) if bias else None
        self.last_routing: Routing | None = None

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """See the class."""
        if self.impl not in ("auto", "sparse", "masked"):
            raise ValueError(f"impl must be 'auto', 'sparse' or 'masked', got {self.impl!r}")
        flat = x.reshape(-1, x.shape[-1])
        routing = self.router(flat)
        self.last_routing = Routing(*(part.detach() for part in routing))
        many = 8 * self.router.top_k >= 7 * self.router.num_experts
        if self.impl == "masked" or (self.impl == "auto" and many):
            y = self._masked(flat, routing)
        else:
            y = moe_forward(
                flat,
                routing.index,
                routing.weights,
                self.gate_up_proj,
                self.down_proj,
                act=self.act,
                bias1=self.gate_up_bias,
            )
        return (y if self.output_bias is None else y + self.output_bias).to(x.dtype).view_as(x)

    def _masked(self, x: Float[Tensor, "tokens dim"], routing: Routing) -> Float[Tensor, "tokens dim"]:
        """All experts as one dense layer, whose hidden activations are multiplied by the weight of their expert or by 0."""
        experts, dim, hidden = self.down_proj.shape
        bias = None if self.gate_up_bias is None else self.gate_up_bias.flatten()
        h = F.linear(x, self.gate_up_proj.flatten(0, 1), bias).unflatten(-1, (experts, -1))
        act = self.act if callable(self.act) else _ACTIVATIONS[self.act]
        h = act(h[..., :hidden]) * h[..., hidden:] if self.gated else act(h)
        weights = torch.zeros_like(routing.logits, dtype=x.dtype).scatter(1, routing.index, routing.weights)
        h = (h * weights.unsqueeze(-1)).flatten(1)
        return F.linear(h, self.down_proj.transpose(0, 1).reshape(dim, experts * hidden))

    def extra_repr(self) -> str:
        experts, dim, hidden = self.down_proj.shape
        return f"{dim}, hidden_dim={hidden}, num_experts={experts}, act={self.act!r}, gated={self.gated}"


_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


def smoe_dropout_convert(
    model: Any,
    num_experts: int,
    *,
    k_min: int | None = None,
    layers: str | Sequence[int] = "all",
    fresh: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Cut the feed-forward blocks of a model into experts behind random routers, in place.

    The neurons of a block are dealt out to N experts in order, H/N to each. With $W_2$ multiplied by N and equal scores, the
    model with all experts on is the dense model; with a router's own scores, which differ, it is not quite. So this is done
    before training, or before a training that goes on. No parameter is added, and the host keeps its residuals and dropout.
    Make optimisers after the conversion.

    Args:
        model: a Llama-like, GPT-2 or BERT-like model, see `firsthand.moe.ffn_slots`.
        num_experts: N, which divides the number of hidden neurons of each block.
        k_min: experts active at first, in 1..N; None for all.
        layers: `"all"`, or the indices of those to convert.
        fresh: draw the experts anew, each as two layers by itself as in the paper, in place of slices of what is there.
        generator: draws the routers, and the experts if they are fresh, on the CPU.

    Returns:
        `model`.

    Raises:
        ValueError: an unknown model, one whose blocks are not dense (any more), or an argument out of range. `model` is as it
            was.

    Source:
        arXiv 2303.01610, section 3, where models are built with experts from the start (`fresh`). Slices with $W_2$ multiplied by
        N and one output bias are our choice.
    """
    check_sizes(num_experts=num_experts)
    if k_min is not None and not 1 <= k_min <= num_experts:
        raise ValueError(f"k_min must be in 1..{num_experts}, the number of experts, got {k_min}")
    slots = ffn_slots(model, layers)
    for slot in slots:
        hidden = len(slot.weights().up)
        if hidden % num_experts:
            raise ValueError(f"num_experts must divide the {hidden} hidden neurons of {slot.name}, got {num_experts}")
    for slot in slots:
        slot.replace(_experts_of(slot.weights(), num_experts, k_min, fresh, generator))
    return model


@torch.no_grad()
def _experts_of(
    dense: FFNWeights, num_experts: int, k_min: int | None, fresh: bool, generator: torch.Generator | None
) -> SMoEDropout:
    hidden, dim = dense.up.shape
    layer = SMoEDropout(
        dim,
        hidden // num_experts,
        num_experts,
        k_min,
        act=dense.act,
        gated=dense.gate is not None,
        bias=dense.up_bias is not None,
        generator=generator,
    )
    if not fresh:
        shape = num_experts, hidden // num_experts  # of the rows, by expert
        rows = [each.unflatten(0, shape) for each in (dense.gate, dense.up) if each is not None]
        layer.gate_up_proj.copy_(torch.cat(rows, dim=1))
        layer.down_proj.copy_(num_experts * dense.down.unflatten(1, shape).transpose(0, 1))
        if layer.gate_up_bias is not None:
            biases = [each.unflatten(0, shape) for each in (dense.gate_bias, dense.up_bias) if each is not None]
            layer.gate_up_bias.copy_(torch.cat(biases, dim=1))
        if layer.output_bias is not None:
            layer.output_bias.copy_(dense.down_bias)
    return layer.to(dense.up)


def set_active_experts(model: nn.Module, k: int) -> None:
    """Let k experts of every SMoE-Dropout layer be active, in training or in use: more cost more and should do better.

    Args:
        model: has `SMoEDropout` layers, see `smoe_dropout_convert`.
        k: in 1..N. It is saved and loaded with the model's weights.

    Raises:
        ValueError: `k` is out of range for one of the layers, or there is none. The model is unchanged.

    Source:
        arXiv 2303.01610: a model trained by SMoE-Dropout is "self-slimmable".
    """
    fewest = _fewest_experts(model)
    if not 1 <= k <= fewest:
        raise ValueError(f"k must be in 1..{fewest}, the experts that every layer has, got {k}")
    for module in model.modules():
        if isinstance(module, SMoEDropout):
            module.router.top_k = k


def _fewest_experts(model: nn.Module) -> int:
    experts = [module.router.num_experts for module in model.modules() if isinstance(module, SMoEDropout)]
    if not experts:
        raise ValueError(f"model must have SMoEDropout layers, {type(model).__name__} has none")
    return min(experts)


class SMoEDropoutCallback(TrainerCallback or object):  # type: ignore[misc]
    """Set the number of active experts by `smoe_dropout_num_experts` while `transformers.Trainer` trains.

    Before the first step there are `k_min`, and after the last `k_max`, with which the trained model is then used (for the modes
    that increase). Evaluations and checkpoints in between have what the schedule says for the next step. A resumed run reads its
    place from the trainer's global step, so it goes on with the right number.

    Args:
        k_min: fewest active experts, at least 1.
        k_max: most, at least `k_min` and at most N of the model's layers.
        mode: of `smoe_dropout_num_experts`.

    Raises:
        ValueError: an argument is out of range; or, as training begins, the model has fewer experts or no `SMoEDropout` layers.
        ImportError: transformers is not installed.

    Source:
        arXiv 2303.01610; its runs go from half of the experts to all of them over all steps.
    """

    def __init__(self, k_min: int, k_max: int, mode: Mode = "linear_increase") -> None:
        if TrainerCallback is None:
            raise ImportError("SMoEDropoutCallback needs transformers: pip install 'firsthand[hf]'")
        smoe_dropout_num_experts(0, 1, k_min, k_max, mode)  # to refuse bad numbers here and not hours later
        self.k_min, self.k_max, self.mode = k_min, k_max, mode

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        fewest = _fewest_experts(model)
        if self.k_max > fewest:
            raise ValueError(f"k_max must be at most {fewest}, the experts that every layer has, got {self.k_max}")
        self.on_step_end(args, state, control, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        k = smoe_dropout_num_experts(state.global_step, state.max_steps, self.k_min, self.k_max, self.mode)
        set_active_experts(model, k)
