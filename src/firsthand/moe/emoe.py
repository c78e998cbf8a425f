"""EMoE: tune a dense feed-forward block as the experts that its neurons already form, then have the dense block back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, nn

from firsthand.moe.experts import moe_forward
from firsthand.moe.ffn import FFNWeights, ffn_slots
from firsthand.moe.layer import Routing, check_sizes

Model = TypeVar("Model", bound=nn.Module)
Method = Literal["balanced_kmeans", "random", "contiguous"]
Score = Literal["gate", "up", "up_abs", "inter", "inter_abs"]

_METHODS = ("balanced_kmeans", "random", "contiguous")
_SCORES = ("gate", "up", "up_abs", "inter", "inter_abs")
_IMPLS = ("auto", "sparse", "masked")
_ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}


def cluster_ffn_neurons(
    weight: Float[Tensor, "hidden dim"],
    num_experts: int,
    method: Method = "balanced_kmeans",
    *,
    max_iter: int = 100,
    seed: int = 0,
) -> Int64[Tensor, " hidden"]:
    r"""Sort the neurons of a feed-forward block into experts of equal size.

    With $\hat w_i$ the neurons' input weights at unit length and $c_e$ the mean of those of expert $e$:

    $$ \min_{a} \sum_i \lVert \hat w_i - c_{a(i)} \rVert^2 \quad\text{with}\quad |\{i : a(i) = e\}| = H / E $$

    Args:
        weight: the neurons' input weights, a row each (of the gate, in a gated block). A row of zeros stays one.
        num_experts: E, at least 1, a divisor of `hidden`.
        method: `"balanced_kmeans"`; `"random"`, the same sizes at random; or `"contiguous"`, neighbours together.
        max_iter: most rounds of k-means, at least 1. It ends earlier where nothing changes any more.
        seed: of the first centres, or of the random experts.

    Returns:
        The expert of each neuron, on the CPU.

    Raises:
        ValueError: E does not divide `hidden`, `weight` is not finite, `method` is not known, or `max_iter` is below 1.

    Source:
        Qiu, Huang and Fu, "Unlocking Emergent Modularity in Large Language Models", NAACL 2024, arXiv 2310.10908; its code
        uses the package k-means-constrained with equal least and greatest size, up to 1000 rounds and, by its default, the best
        of several starts (from memory, unverified). Ours is one k-means++ start with `balanced_assignment` in each round (our
        choice).
    """
    check_sizes(num_experts=num_experts, max_iter=max_iter)
    hidden = len(weight)
    if hidden == 0 or hidden % num_experts:
        raise ValueError(f"num_experts must divide the {hidden} neurons, got {num_experts}")
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if not weight.isfinite().all():
        raise ValueError("weight must be finite, got infinities or NaN")
    if method == "contiguous":
        return torch.arange(hidden) // (hidden // num_experts)
    if method == "random":
        shuffled = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
        return shuffled % num_experts
    rows = F.normalize(weight.detach().cpu().double(), dim=1).numpy()
    return torch.from_numpy(_balanced_kmeans(rows, num_experts, max_iter, seed))


def _balanced_kmeans(rows: np.ndarray, clusters: int, max_iter: int, seed: int) -> np.ndarray:
    centres, _ = kmeans_plusplus(rows, clusters, random_state=seed)
    assigned, prices = np.full(len(rows), -1), np.zeros(clusters)
    for _ in range(max_iter):
        before = assigned
        cost = (centres**2).sum(axis=1) - 2 * rows @ centres.T  # the squared distance, but for the row's own length
        assigned, prices = _assign(cost, prices)
        if (assigned == before).all():
            break
        centres = rows[np.argsort(assigned, kind="stable")].reshape(clusters, -1, rows.shape[1]).mean(axis=1)
    return assigned


def balanced_assignment(cost: Float[np.ndarray, "points clusters"]) -> Int64[np.ndarray, " points"]:
    r"""The cheapest way to give each point a cluster, all clusters being of equal size.

    $$ \min_a \sum_i c_{i\,a(i)} \quad\text{with}\quad |\{i : a(i) = e\}| = \text{points} / \text{clusters} $$

    Exact, and for many points faster than an assignment problem with each cluster's column repeated: it never looks at single
    points when it searches. Every point starts where it is cheapest; then, one unit at a time, clusters that are too full hand
    points on, along the cheapest chain of clusters to one with room. A chain's link costs what moving the best point of the one
    cluster to the other costs, so the search is among clusters only.

    Args:
        cost: of each point in each cluster, finite.

    Returns:
        The cluster of each point.

    Raises:
        ValueError: the clusters do not divide the points, or a cost is not finite.

    Source:
        Successive shortest paths for the transportation problem, a textbook method; not in arXiv 2310.10908.
    """
    points, clusters = cost.shape
    if clusters == 0 or points % clusters:
        raise ValueError(f"cost must have a number of columns that divides its number of rows, got shape {cost.shape}")
    if not np.isfinite(cost).all():
        raise ValueError("cost must be finite, got infinities or NaN")
    return _assign(cost, np.zeros(clusters))[0]


def _assign(cost: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The balanced assignment, and prices of the clusters at which every point is in the one that is cheapest for it.

    Whatever the prices at the start, where each point goes by them is optimal for the sizes that come of it, which is what the
    method needs. Good prices, those of a similar problem, give sizes that are nearly equal, and little is left to do.
    """
    points, clusters = cost.shape
    cost = cost.astype(np.float64)
    assigned = (cost + prices).argmin(axis=1)
    size = np.bincount(assigned, minlength=clusters)
    step = np.full((clusters, clusters), np.inf)  # what it costs to move one point from the row's to the column's cluster,
    mover = np.zeros((clusters, clusters), dtype=np.int64)  # and which one

    def look(cluster: int) -> None:
        members = np.flatnonzero(assigned == cluster)
        if len(members):
            more = cost[members] - cost[members, cluster][:, None]
            best = more.argmin(axis=0)
            step[cluster], mover[cluster] = more[best, np.arange(clusters)], members[best]
        else:
            step[cluster] = np.inf

    for cluster in range(clusters):
        look(cluster)
    tolerance = 1e-12 * max(1.0, float(np.abs(cost).max()))  # rounding must not make a circle look like a gain
    while (size > points // clusters).any():
        distance, before = _cheapest_chains(step, np.where(size > points // clusters, 0.0, np.inf), tolerance)
        to = int(np.where(size < points // clusters, distance, np.inf).argmin())
        size[to] += 1
        chain = [to]
        while before[to] >= 0:
            assigned[mover[before[to], to]] = to
            to = int(before[to])
            chain.append(to)
        size[to] -= 1
        for cluster in chain:
            look(cluster)
    return assigned, -_cheapest_chains(step, np.zeros(clusters), tolerance)[0]


def _cheapest_chains(step: np.ndarray, start: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Bellman and Ford: the cost of the cheapest chain to each cluster from any with a finite `start`, and the link before it."""
    distance, before = start.copy(), np.full(len(start), -1)
    for _ in range(len(start)):
        through = distance[:, None] + step
        link = through.argmin(axis=0)
        shorter = through[link, np.arange(len(start))]
        better = shorter < distance - tolerance
        if not better.any():
            break
        distance[better], before[better] = shorter[better], link[better]
    return distance, before


class EMoEMLP(nn.Module):
    r"""A dense feed-forward block, of whose neurons each token uses k of N groups.

    $$ y = \sum_{e \in \text{top-}k} W^\downarrow_e\,\phi(W^\uparrow_e x + b^\uparrow_e) + b^\downarrow, \qquad
       s_e = x^\top \tfrac{1}{|e|} \textstyle\sum_{i \in e} w_i $$

    with the k experts of the highest score $s_e$, each with weight 1; $w_i$ are the rows of $W^\uparrow$, or of the gate in a
    gated block. So nothing is new and nothing is learned but the block's own weights: no router has parameters, no expert is
    scaled, and with k = N it is the dense block. What is not chosen gets no gradient from that token.

    Args:
        ffn: the dense block's weights, copied; what is frozen there is frozen here.
        expert_of_neuron: the expert of each neuron, in `[0, N)`, as many neurons in each (`cluster_ffn_neurons`).
        top_k: k, in `[1, N]`.
        score: what is averaged over an expert's neurons: `"gate"`, what goes into the activation function, without bias; or, as
            in the paper's code for Llama, `"up"`, the other product of a gated block; `"up_abs"`, its size; `"inter"`, what goes
            into the last product; or `"inter_abs"`, its size. The latter three must compute all neurons, so they save nothing.
        update: `"live"`: means of the weights as they are now, or `"frozen"`: as they were at the beginning (scores `"gate"` and
            `"up"` only). No gradient passes through them either way.
        router: a module from tokens to `(logits, weights, index)`, such as `TopKRouter`, in place of the score.
        impl: `"sparse"` computes the chosen experts only; `"masked"` computes all neurons and sets the others to 0, which is
            faster where many are chosen; `"auto"` takes `"sparse"` up to a quarter of the experts.

    Attributes:
        neurons: (N, H / N), the neurons of each expert, as numbered in the dense block.
        last_routing: `Routing(logits, weights, index)` of the last forward pass, detached; None before it.

    Raises:
        ValueError: experts of unequal size, an argument out of range, or a frozen or sparse version of a score that has none.

    Source:
        arXiv 2310.10908, EMoE with avg-k gating. The paper's code for BERT and GPT-2 adds noise to the scores while training and
        drops tokens beyond a capacity of 1.5; here there is neither (our choice). It splits the output bias among the chosen
        experts; here it is added once, which comes to the same. It copies the means into the gate after each step, which
        `"live"` amounts to.
    """

    neurons: Int64[Tensor, "experts size"]
    key: Float[Tensor, "experts dim"] | None
    last_routing: Routing | None

    def __init__(
        self,
        ffn: FFNWeights,
        expert_of_neuron: Int64[Tensor, " hidden"],
        top_k: int,
        *,
        score: Score = "gate",
        update: Literal["live", "frozen"] = "live",
        router: nn.Module | None = None,
        impl: Literal["auto", "sparse", "masked"] = "auto",
    ) -> None:
        super().__init__()
        hidden = len(ffn.up)
        if expert_of_neuron.shape != (hidden,) or hidden == 0 or int(expert_of_neuron.min()) < 0:
            raise ValueError(
                f"expert_of_neuron must be {hidden} numbers of at least 0, one a neuron, got {tuple(expert_of_neuron.shape)}"
            )
        sizes = torch.bincount(expert_of_neuron)
        if (sizes != sizes[0]).any():
            raise ValueError(f"expert_of_neuron must give each expert as many neurons, got {sizes.tolist()}")
        check_sizes(top_k=top_k, num_experts=len(sizes))
        for name, value, known in (("score", score, _SCORES), ("impl", impl, _IMPLS), ("update", update, ("live", "frozen"))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if score not in ("gate", "up") and (update == "frozen" or impl == "sparse"):
            raise ValueError(f"score {score!r} needs all neurons as they are: update='live' and impl='masked' or 'auto'")
        if score == "up" and ffn.gate is None:
            score = "gate"  # an ungated block has but one product before its activation function
        self.num_experts, self.top_k, self.act, self.gated = len(sizes), top_k, ffn.act, ffn.gate is not None
        self.score, self.update, self.router, self.impl = score, update, router, impl
        neurons = expert_of_neuron.argsort(stable=True).view(len(sizes), -1).to(ffn.up.device)
        self.register_buffer("neurons", neurons)
        self.gate_up_proj = _parameter(
            ffn.up[neurons] if ffn.gate is None else torch.cat([ffn.gate[neurons], ffn.up[neurons]], 1)
        )
        self.gate_up_bias = _joined_bias(ffn, neurons)
        self.down_proj = _parameter(ffn.down.T[neurons].transpose(1, 2))
        self.down_bias = None if ffn.down_bias is None else _parameter(ffn.down_bias)
        self.register_buffer("key", self._mean_key() if update == "frozen" else None)
        self.last_routing = None

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        """See the class."""
        flat = x.reshape(-1, x.shape[-1])
        sparse = self.impl == "sparse" or (
            self.impl == "auto" and 4 * self.top_k <= self.num_experts and (self.router or self.score in ("gate", "up"))
        )
        inner = None if sparse else self._inner(flat)
        routing = Routing(*self.router(flat)) if self.router else self._route(flat, inner)
        self.last_routing = Routing(*(part.detach() for part in routing))
        if inner is None:
            act, bias = self.act, self.gate_up_bias
            y = moe_forward(flat, routing.index, routing.weights, self.gate_up_proj, self.down_proj, act=act, bias1=bias)
        else:
            # One column more, for the index that means no expert.
            weights = routing.weights.new_zeros(len(flat), self.num_experts + 1)
            weights = weights.scatter(1, routing.index, routing.weights)[:, :-1]
            y = torch.einsum("tef,edf->td", self._activated(inner) * weights.unsqueeze(-1).to(inner.dtype), self.down_proj)
        return (y if self.down_bias is None else y + self.down_bias).view_as(x)

    @torch.no_grad()
    def merged(self) -> FFNWeights:
        """The dense block's weights as they are now, each neuron in its old place; no number is computed anew."""
        order = self.neurons.flatten().argsort()
        up, bias = self.gate_up_proj, self.gate_up_bias
        gate = gate_bias = None
        if self.gated:
            gate, up = up.chunk(2, dim=1)
            gate_bias, bias = (None, None) if bias is None else bias.chunk(2, dim=1)
        return FFNWeights(
            up=up.flatten(0, 1)[order],
            down=self.down_proj.transpose(1, 2).flatten(0, 1)[order].T,
            gate=None if gate is None else gate.flatten(0, 1)[order],
            up_bias=None if bias is None else bias.flatten()[order],
            gate_bias=None if gate_bias is None else gate_bias.flatten()[order],
            down_bias=None if self.down_bias is None else self.down_bias.clone(),
            act=self.act,
        )

    def extra_repr(self) -> str:
        experts, dim, size = self.down_proj.shape
        return f"{dim}, {experts} experts of {size} neurons, top_k={self.top_k}, score={self.score!r}, update={self.update!r}"

    def _route(self, flat: Tensor, inner: Tensor | None) -> Routing:
        with torch.no_grad():
            if self.score in ("gate", "up"):
                logits = flat @ (self._mean_key() if self.key is None else self.key).T
            else:
                values = inner if self.score == "up_abs" else self._activated(inner)
                if self.score == "up_abs" and self.gated:
                    values = values.chunk(2, dim=-1)[1]
                logits = (values.abs() if self.score.endswith("abs") else values).mean(dim=-1)
            index = logits.topk(self.top_k, dim=-1).indices
            return Routing(logits, logits.new_ones(index.shape), index)

    @torch.no_grad()
    def _mean_key(self) -> Tensor:
        rows = self.gate_up_proj
        if self.gated:
            rows = rows.chunk(2, dim=1)[self.score == "up"]
        return rows.mean(dim=1)

    def _inner(self, flat: Tensor) -> Tensor:
        """Before the activation function, (tokens, experts, neurons of one, twice where gated)."""
        inner = F.linear(
            flat, self.gate_up_proj.flatten(0, 1), None if self.gate_up_bias is None else self.gate_up_bias.flatten()
        )
        return inner.view(len(flat), *self.gate_up_proj.shape[:2])

    def _activated(self, inner: Tensor) -> Tensor:
        act = _ACTIVATIONS[self.act] if isinstance(self.act, str) else self.act
        if not self.gated:
            return act(inner)
        gate, up = inner.chunk(2, dim=-1)
        return act(gate) * up


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(memory_format=torch.contiguous_format), requires_grad=values.requires_grad)


def _joined_bias(ffn: FFNWeights, neurons: Tensor) -> nn.Parameter | None:
    """The biases before the activation function; where a block has only one of the two, the other would be a new weight."""
    if ffn.gate is None:
        return None if ffn.up_bias is None else _parameter(ffn.up_bias[neurons])
    if (ffn.gate_bias is None) != (ffn.up_bias is None):
        raise ValueError("ffn must have both up_bias and gate_bias or neither, got only one of them")
    return None if ffn.up_bias is None else _parameter(torch.cat([ffn.gate_bias[neurons], ffn.up_bias[neurons]], 1))


def emoe_convert(
    model: Model,
    layers: Literal["all"] | Sequence[int],
    num_experts: int = 64,
    top_k: int = 16,
    *,
    method: Method = "balanced_kmeans",
    score: Score = "gate",
    update: Literal["live", "frozen"] = "live",
    impl: Literal["auto", "sparse", "masked"] = "auto",
    max_iter: int = 100,
    seed: int = 0,
) -> Model:
    """Put an `EMoEMLP` in the place of dense feed-forward blocks, in place: before fine-tuning, before making the optimiser.

    The paper converts one or two late layers of BERT and GPT-2 (the last but one, and the last, of BERT-base) and every other one
    of Llama, with 64 experts, and finds a quarter to a half of them a good number to choose.

    Args:
        model: Llama and its kin, GPT-2 or BERT, of transformers.
        layers: the numbers of those to convert, negative ones counted from the end, or "all".
        num_experts: N, a divisor of the block's hidden size.
        top_k: k, in [1, N].
        method: how the neurons are grouped, see `cluster_ffn_neurons`.
        score: see `EMoEMLP`.
        update: see `EMoEMLP`.
        impl: see `EMoEMLP`.
        max_iter: see `cluster_ffn_neurons`.
        seed: see `cluster_ffn_neurons`.

    Returns:
        `model`. It computes something else than before unless k = N.

    Raises:
        ValueError: a block is not known, not there or converted already, or an argument is out of range. The model is unchanged.

    Source:
        arXiv 2310.10908.
    """
    slots = ffn_slots(model, layers)
    made = []
    for slot in slots:
        ffn = slot.weights()
        keys = ffn.up if ffn.gate is None else ffn.gate
        expert_of_neuron = cluster_ffn_neurons(keys, num_experts, method, max_iter=max_iter, seed=seed)
        made.append(EMoEMLP(ffn, expert_of_neuron, top_k, score=score, update=update, impl=impl).train(model.training))
    for slot, experts in zip(slots, made, strict=True):
        slot.replace(experts)
    return model


def emoe_merge(model: Model) -> Model:
    """Put dense blocks back in the place of all `EMoEMLP` of a model, in place, with the weights these have now.

    The model is of its old form again, all neurons on: its state dict has its old names, and it is saved, loaded and served as
    ever. A router that was learned is lost.

    Args:
        model: what `emoe_convert` returned, tuned or not.

    Returns:
        `model`.

    Raises:
        ValueError: nothing in it was converted.

    Source:
        arXiv 2310.10908: after tuning, the experts together are the dense block.
    """
    converted: list[tuple[Any, EMoEMLP]] = [(slot, slot.module) for slot in ffn_slots(model) if isinstance(slot.module, EMoEMLP)]
    if not converted:
        raise ValueError(f"model must hold blocks that emoe_convert made, {type(model).__name__} has none")
    for slot, experts in converted:
        slot.restore(experts.merged())
    return model
