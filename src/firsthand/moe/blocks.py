"""The sparse blocks of transformers' models: find them, listen to their routers, run their experts on the fast path.

Needs transformers (`pip install 'firsthand[hf]'`) where it says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from firsthand.moe.experts import activation_name, moe_forward
from firsthand.moe.layer import MoE, Routing

_BLOCKS = {
    "MixtralSparseMoeBlock": "Mixtral",
    "OlmoeSparseMoeBlock": "OLMoE",
    "Qwen2MoeSparseMoeBlock": "Qwen2-MoE",
    "Qwen3MoeSparseMoeBlock": "Qwen3-MoE",
}


class MoEBlock(NamedTuple):
    """A sparse block of a model.

    Attributes:
        name: as in `named_modules`.
        layer_index: its number among the model's sparse blocks, from 0.
        block: the module that stands where a dense model has its feed-forward block.
        router: returns `(logits, weights, index)`.
        experts: holds `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F); the block itself if it is a `MoE`.
        num_experts: E.
        top_k: experts per token.
    """

    name: str
    layer_index: int
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    num_experts: int
    top_k: int


def moe_blocks(model: nn.Module) -> list[MoEBlock]:
    """The sparse blocks of a model, from the first layer to the last.

    Raises:
        ValueError: it has none that we know.
    """
    found: list[MoEBlock] = []
    for name, module in model.named_modules():
        host: Any = module
        if isinstance(module, MoE):
            if module.num_experts > 1:  # a shared expert is a MoE of one
                top_k = getattr(module.router, "top_k", module.top_k)
                found.append(MoEBlock(name, len(found), module, module.router, module, module.num_experts, top_k))
        elif type(module).__name__ in _BLOCKS:
            experts = len(host.experts.down_proj)
            found.append(MoEBlock(name, len(found), module, host.gate, host.experts, experts, host.gate.top_k))
    if not found:
        raise ValueError(f"{type(model).__name__} has no sparse block of {', '.join(_BLOCKS.values())} or firsthand.moe.MoE")
    return found


@contextmanager
def capture_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Keep what each router decides: after a forward pass the list holds one `Routing` per block, in order of layers.

    The list is emptied when the first router runs again, so it is always that of the latest pass. The tensors are part of
    the graph, so a loss can be made of them. Under activation checkpointing the routers run again in the backward pass: use the
    list before it.

    Raises:
        ValueError: see `moe_blocks`.
    """
    kept: list[Routing] = []
    blocks = moe_blocks(model)

    def keep(router: nn.Module, _: Any, output: Any) -> None:
        if router is blocks[0].router:
            kept.clear()
        kept.append(Routing(*output))

    handles = [block.router.register_forward_hook(keep) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def register_experts_backend(name: str = "firsthand") -> None:
    """Make our experts a choice of `model.set_experts_implementation(name)`, next to transformers' own.

    The model's parameters, its state dict, `generate` and `Trainer` stay what they are. It works for models whose experts are
    stacked the usual way: Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE and others with the same layout.

    Args:
        name: not one of transformers' own.

    Raises:
        ImportError: transformers is not installed.
        ValueError: `name` is one of transformers' own.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if name == "eager" or (name in ALL_EXPERTS_FUNCTIONS and ALL_EXPERTS_FUNCTIONS[name] is not experts_forward):
        raise ValueError(f"name must not be one of transformers' own, got {name!r}")
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)


def experts_forward(
    experts: Any,
    hidden_states: Float[Tensor, "tokens dim"],
    top_k_index: Int[Tensor, "tokens k"],
    top_k_weights: Float[Tensor, "tokens k"],
) -> Float[Tensor, "tokens dim"]:
    """`moe_forward` with the arguments that transformers hands to an experts implementation.

    Raises:
        ValueError: the experts are laid out in a way we do not know.
    """
    usual = experts.has_gate and experts.is_concatenated and not (experts.is_transposed or experts.has_post_expert_norm)
    if not usual:
        raise ValueError(
            f"{type(experts).__name__} lays out its experts in a way that is not supported; use another implementation"
        )
    return moe_forward(
        hidden_states,
        top_k_index,
        top_k_weights,
        experts.gate_up_proj,
        experts.down_proj,
        act=activation_name(experts.act_fn),
        bias1=experts.gate_up_proj_bias if experts.has_bias else None,
        bias2=experts.down_proj_bias if experts.has_bias else None,
    )


def expert_state_dict(block: MoEBlock, expert: int) -> dict[str, Tensor]:
    """Copies of the weights of one expert: `gate_up_proj` (2F, D) and `down_proj` (D, F).

    Raises:
        ValueError: `expert` is out of range.
    """
    _check_expert(block, expert)
    return {name: weight[expert].detach().clone() for name, weight in _stacked(block).items()}


@torch.no_grad()
def set_expert(block: MoEBlock, expert: int, state: dict[str, Tensor]) -> None:
    """Give one expert the weights that `expert_state_dict` returned for one of the same shape.

    Raises:
        ValueError: `expert` is out of range, or a weight is missing, unknown or of another shape.
    """
    _check_expert(block, expert)
    stacked = _stacked(block)
    if state.keys() != stacked.keys():
        raise ValueError(f"state must have {sorted(stacked)}, got {sorted(state)}")
    for name, weight in stacked.items():
        if state[name].shape != weight.shape[1:]:
            raise ValueError(f"{name} must have shape {tuple(weight.shape[1:])}, got {tuple(state[name].shape)}")
    for name, weight in stacked.items():
        weight[expert].copy_(state[name])


def _stacked(block: MoEBlock) -> dict[str, Tensor]:
    names = ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    return {name: getattr(block.experts, name) for name in names if getattr(block.experts, name, None) is not None}


def _check_expert(block: MoEBlock, expert: int) -> None:
    if not 0 <= expert < block.num_experts:
        raise ValueError(f"expert must be in [0, {block.num_experts}), got {expert}")
