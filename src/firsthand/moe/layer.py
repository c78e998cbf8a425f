"""A mixture-of-experts layer: a router, and experts that each work on the tokens it sends them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from firsthand.moe.experts import Activation, moe_forward


class Routing(NamedTuple):
    """What a router decided about each token, in the order of transformers' routers.

    Attributes:
        logits: the router's scores.
        weights: by how much the chosen experts' outputs are multiplied.
        index: the chosen experts; the number of experts itself stands for none.
    """

    logits: Float[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens k"]
    index: Int64[Tensor, "tokens k"]


class TopKRouter(nn.Module):
    r"""The usual router: softmax over all experts, of which the k largest are kept.

    $$ p = \mathrm{softmax}(W_r x + b), \qquad w = p_{\text{top-}k} \;\big(/ \textstyle\sum p_{\text{top-}k}\big) $$

    The softmax is computed in float32 whatever the input's type; the weights come in the input's type.

    Args:
        dim: D, of a token.
        num_experts: E.
        top_k: k, experts per token, in [1, E].
        bias: whether the scores have one.
        normalize_top_k: whether the k weights are divided by their sum, as in Mixtral.

    Raises:
        ValueError: a size below 1, or `top_k` above `num_experts`.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, bias: bool = False, normalize_top_k: bool = True) -> None:
        super().__init__()
        check_sizes(dim=dim, num_experts=num_experts, top_k=top_k)
        self.num_experts, self.top_k, self.normalize_top_k = num_experts, top_k, normalize_top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Routing:
        """See the class. Returns the scores before the softmax, the weights and the experts, largest weight first."""
        logits = F.linear(x, self.weight, self.bias)
        weights, index = logits.softmax(-1, dtype=torch.float32).topk(self.top_k)
        if self.normalize_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        return Routing(logits, weights.to(x.dtype), index)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, num_experts={self.num_experts}, top_k={self.top_k}"


class MoE(nn.Module):
    r"""Feed-forward experts in place of one feed-forward block.

    $$ y = \sum_{e \in \text{top-}k} w_e\, W^{\downarrow}_e \left( \phi(W^{g}_e x) \odot W^{\uparrow}_e x \right) $$

    Every token reaches all the experts it is routed to: there is no capacity, nothing is dropped. Initial weights are uniform in
    $\pm 1/\sqrt{\text{inputs}}$, as in `nn.Linear`.

    Args:
        dim: D, of a token.
        hidden_dim: F, of an expert.
        num_experts: E.
        top_k: experts per token. Unused if `router` is given.
        router: a module from tokens to `(logits, weights, index)`; a `TopKRouter` if None.
        act: "silu", "gelu", "gelu_tanh", "relu" or an elementwise function φ.
        gated: with the factor $W^{\uparrow}x$; without it an expert is $W^{\downarrow}\phi(W x)$.
        bias: of both products in each expert.
        shared_hidden_dim: if positive, the hidden size of one more expert that every token goes through, with weight 1.
        normalize_top_k: see `TopKRouter`.

    Attributes:
        last_routing: what the router decided in the last forward pass, detached; None before it.

    Raises:
        ValueError: a size is out of range, or `act` is not known.
    """

    last_routing: Routing | None

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        router: nn.Module | None = None,
        act: Activation = "silu",
        gated: bool = True,
        bias: bool = False,
        shared_hidden_dim: int = 0,
        normalize_top_k: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, hidden_dim=hidden_dim, num_experts=num_experts, top_k=top_k)
        self.num_experts, self.top_k, self.act, self.gated = num_experts, top_k, act, gated
        self.router = TopKRouter(dim, num_experts, top_k, normalize_top_k=normalize_top_k) if router is None else router
        inner = 2 * hidden_dim if gated else hidden_dim
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, inner, dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.gate_up_bias = nn.Parameter(torch.zeros(num_experts, inner)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(num_experts, dim)) if bias else None
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.uniform_(weight, -(weight.shape[2] ** -0.5), weight.shape[2] ** -0.5)
        self.shared = (
            MoE(dim, shared_hidden_dim, 1, 1, router=_Everything(), act=act, gated=gated, bias=bias)
            if shared_hidden_dim
            else None
        )
        self.last_routing = None

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """See the class."""
        flat = x.reshape(-1, x.shape[-1])
        routing = Routing(*self.router(flat))
        self.last_routing = Routing(*(part.detach() for part in routing))
        y = moe_forward(
            flat,
            routing.index,
            routing.weights,
            self.gate_up_proj,
            self.down_proj,
            act=self.act,
            bias1=self.gate_up_bias,
            bias2=self.down_bias,
        )
        if self.shared is not None:
            y = y + self.shared(flat)
        return y.view_as(x)

    def extra_repr(self) -> str:
        experts, dim, hidden = self.down_proj.shape
        return f"{dim}, hidden_dim={hidden}, num_experts={experts}, act={self.act!r}, gated={self.gated}"


class _Everything(nn.Module):
    """The router of a single expert that is always on."""

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Routing:
        one = x.new_ones(len(x), 1)
        return Routing(one, one, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device))


def check_sizes(**sizes: int) -> None:
    """Raise ValueError for a size below 1, and for a `top_k` above `num_experts`."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if "top_k" in sizes and sizes["top_k"] > sizes["num_experts"]:
        raise ValueError(f"top_k must be at most num_experts = {sizes['num_experts']}, got {sizes['top_k']}")
