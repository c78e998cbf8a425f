"""Send a sparse model's tokens to other experts than its routers would, without touching its weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from firsthand.moe.blocks import MoEBlock, moe_blocks
from firsthand.moe.layer import Routing

Route = Callable[[Routing], tuple[Tensor, Tensor]]
"""From what a router decided to the weights [T,k] and experts [T,k] to use instead."""


def route_by_rank(
    router_logits: Float[Tensor, "tokens experts"], ranks: Sequence[int], renormalize: bool = True
) -> tuple[Float[Tensor, "tokens chosen"], Int64[Tensor, "tokens chosen"]]:
    r"""The experts that stand at given places when a token's experts are sorted by probability.

    With $\pi$ the order of decreasing $p = \mathrm{softmax}(z)$ and $R$ the ranks,

    $$ w_r = p_{\pi(r)} \Big/ \sum_{s \in R} p_{\pi(s)}, \qquad r \in R $$

    Args:
        router_logits: z, of any float type; the weights are computed in float32 or wider and come so.
        ranks: R, places from 0 (the most probable expert), all different. `range(k)` is the usual top-k routing.
        renormalize: divide the weights by their sum. If not, the weight of an expert is its probability among all.

    Returns:
        The weights and the experts, in the order of `ranks`.

    Raises:
        ValueError: no ranks, one twice, or one outside `[0, experts)`.

    Source:
        Shi et al., "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast", NeurIPS 2024,
        arXiv 2405.14507, section 2.3 (a single rank); sets of ranks as in its reference code.
    """
    ranks = list(ranks)
    _check_ranks(ranks, router_logits.shape[-1])
    order = router_logits.topk(max(ranks) + 1, dim=-1).indices
    index = order[:, ranks]
    return _weights(router_logits, index, renormalize), index


def route_by_threshold(
    router_logits: Float[Tensor, "tokens experts"], threshold: float, renormalize: bool = True
) -> tuple[Float[Tensor, "tokens chosen"], Int64[Tensor, "tokens chosen"]]:
    r"""As many of the most probable experts as it takes to exceed a probability: *dynamic routing*.

    $$ k = \min \Big\{ m : \sum_{r<m} p_{\pi(r)} > \mathrm{threshold} \Big\} $$

    Args:
        router_logits: as in `route_by_rank`.
        threshold: in `[0, 1)`. 0 is one expert for every token; the paper tries 0.2 to 0.6.
        renormalize: as in `route_by_rank`.

    Returns:
        The weights and the experts, most probable first, as many columns as the token with the most experts needs. Where a
        token has fewer, the weight is 0 and the expert is E, which means none.

    Raises:
        ValueError: `threshold` is out of range.

    Source:
        arXiv 2405.14507, a baseline of its section 3.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    probabilities, order = _softmax(router_logits).sort(dim=-1, descending=True)
    chosen = probabilities.cumsum(-1) - probabilities <= threshold  # what comes before is not yet enough
    chosen[:, 0] = True
    most = int(chosen.sum(-1).max()) if len(chosen) else 1
    index, chosen = order[:, :most], chosen[:, :most]
    weights = _weights(router_logits, index, renormalize, chosen)
    return weights, index.masked_fill(~chosen, router_logits.shape[-1])


def route_at_random(
    router_logits: Float[Tensor, "tokens experts"], renormalize: bool = True, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "tokens 1"], Int64[Tensor, "tokens 1"]]:
    """One expert for each token, every expert being as probable.

    Args:
        router_logits: as in `route_by_rank`; they set nothing but the weight.
        renormalize: give the expert the weight 1. If not, its probability.
        generator: what to draw from, on any device; torch's global one if None.

    Returns:
        The weights and the experts.

    Source:
        arXiv 2405.14507, one of its weak activations ("random-1").
    """
    tokens, experts = router_logits.shape
    device = router_logits.device if generator is None else generator.device
    index = torch.randint(experts, (tokens, 1), generator=generator, device=device).to(router_logits.device)
    return _weights(router_logits, index, renormalize), index


def renormalizes(router: nn.Module) -> bool:
    """Whether a router divides the weights of the experts it chose by their sum.

    Mixtral always does; OLMoE, Qwen2-MoE and Qwen3-MoE if their config's `norm_topk_prob` says so; our `TopKRouter` if made with
    `normalize_top_k`. A router that does not say is taken to do it.
    """
    return bool(getattr(router, "norm_topk_prob", getattr(router, "normalize_top_k", True)))


@contextmanager
def routing_override(
    model: nn.Module,
    ranks: Sequence[int] | str | Route | None = None,
    *,
    top_k: int | None = None,
    threshold: float | None = None,
    renormalize: bool | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Within this context, every MoE block of the model routes as said here.

    Exactly one of `ranks`, `top_k` and `threshold` says how. The routers work as before and their logits are what others see
    of them (`output_router_logits`, losses on them); what changes is which experts get the tokens, with which weights. Shared
    experts stay on. Contexts nest: the innermost has the last word, and a `ranks` function is handed what those around it
    decided. Only forward passes of the thread that entered are affected, so another thread may use the model meanwhile.

    Args:
        model: anything `firsthand.moe.blocks.moe_blocks` finds blocks in.
        ranks: the ranks of the experts to use, from 0 (`route_by_rank`); or `"random"` (`route_at_random`); or a function from
            `Routing(logits, weights, index)` to the weights and experts to use, where E means no expert.
        top_k: use the `top_k` most probable experts (*ensemble routing*): the same as `ranks=range(top_k)`.
        threshold: use as many as exceed this probability together (`route_by_threshold`).
        renormalize: make the weights sum to 1. None is as the model's own router does, see `renormalizes`.
        generator: for `"random"`.

    Raises:
        ValueError: none or more than one of the three is given, one is out of range, or the model has no MoE blocks.

    Source:
        arXiv 2405.14507, sections 2.3 and 3. That `renormalize=None` follows the model is as in its code for Mixtral and
        DeepSeekMoE, except that DeepSeekMoE's never renormalises a single expert (from memory, unverified).
    """
    if sum(choice is not None for choice in (ranks, top_k, threshold)) != 1:
        raise ValueError(
            f"exactly one of ranks, top_k and threshold must be given, got ranks={ranks!r}, top_k={top_k}, threshold={threshold}"
        )
    blocks = moe_blocks(model)
    if isinstance(ranks, str) and ranks != "random":
        raise ValueError(f"ranks must be places, 'random' or a function, got {ranks!r}")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    fewest = min(block.num_experts for block in blocks)
    if top_k is not None:
        if not 1 <= top_k <= fewest:
            raise ValueError(f"top_k must be in [1, {fewest}], the number of experts, got {top_k}")
        ranks = range(top_k)
    if isinstance(ranks, Sequence) and not isinstance(ranks, str):
        ranks = list(ranks)
        _check_ranks(ranks, fewest)

    def route(block: MoEBlock, routing: Routing) -> tuple[Tensor, Tensor]:
        if callable(ranks):
            return ranks(routing)
        normalize = renormalizes(block.router) if renormalize is None else renormalize
        if threshold is not None:
            return route_by_threshold(routing.logits, threshold, normalize)
        if ranks == "random":
            return route_at_random(routing.logits, normalize, generator)
        return route_by_rank(routing.logits, ranks, normalize)

    with _rerouted(blocks, route):
        yield


def moe_block_forward(
    block: MoEBlock, hidden: Float[Tensor, "batch sequence dim"], ranks: Sequence[int], renormalize: bool | None = None
) -> Float[Tensor, "batch sequence dim"]:
    """What one MoE block makes of these vectors if only the experts of these ranks work.

    Args:
        block: one of `moe_blocks(model)`.
        hidden: what goes into the block.
        ranks: as in `route_by_rank`.
        renormalize: as in `routing_override`.

    Raises:
        ValueError: as `route_by_rank`.
    """
    _check_ranks(list(ranks), block.num_experts)
    normalize = renormalizes(block.router) if renormalize is None else renormalize
    with _rerouted([block], lambda _, routing: route_by_rank(routing.logits, ranks, normalize)):
        return block.block(hidden)


@contextmanager
def _rerouted(blocks: Sequence[MoEBlock], route: Callable[[MoEBlock, Routing], tuple[Tensor, Tensor]]) -> Iterator[None]:
    owner = threading.get_ident()

    def hook(block: MoEBlock, router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> Routing | None:
        if threading.get_ident() != owner:
            return None
        routing = Routing(*output)
        weights, index = route(block, routing)
        if not _knows_no_expert(block):  # lend the place to an expert of the token, with weight 0
            nobody = index >= block.num_experts
            weights = weights.masked_fill(nobody, 0.0)
            index = torch.where(nobody, index[:, :1], index).clamp(max=block.num_experts - 1)
        return Routing(routing.logits, weights.to(routing.weights.dtype), index)

    handles = [block.router.register_forward_hook(partial(hook, block)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _knows_no_expert(block: MoEBlock) -> bool:
    """Whether the index E costs nothing; the fast backends of transformers read it as one expert too many."""
    config = getattr(block.experts, "config", None)
    return config is None or config._experts_implementation in ("eager", "firsthand")


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _weights(logits: Tensor, index: Tensor, renormalize: bool, chosen: Tensor | None = None) -> Tensor:
    if renormalize:  # p / Σp over the chosen, without the 0 / 0 that it is where all of them underflow
        scores = logits.gather(-1, index)
        return _softmax(scores if chosen is None else scores.masked_fill(~chosen, -torch.inf))
    weights = _softmax(logits).gather(-1, index)
    return weights if chosen is None else weights.masked_fill(~chosen, 0.0)


def _check_ranks(ranks: Sequence[int], experts: int) -> None:
    if not ranks or len(set(ranks)) < len(ranks) or not all(0 <= rank < experts for rank in ranks):
        raise ValueError(f"ranks must be different places in [0, {experts}), at least one, got {list(ranks)}")
