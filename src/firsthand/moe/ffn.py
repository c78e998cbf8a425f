"""The dense feed-forward blocks of transformers' models, seen alike: read one, put another module in its place, put it back.

Known are the blocks of Llama and its kin (Mistral, Qwen2, Qwen3, ...: `gate_proj`, `up_proj`, `down_proj`), of GPT-2 (`c_fc`,
`c_proj`) and of BERT (`intermediate`, `output`). What the host does around the block, dropout and residual included, stays as
it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from firsthand.moe.experts import Activation, activation_name


class FFNWeights(NamedTuple):
    r"""What a dense block computes with: $W^\downarrow(\phi(W^\uparrow x + b^\uparrow)) + b^\downarrow$, or, gated,
    $W^\downarrow(\phi(W^g x + b^g) \odot (W^\uparrow x + b^\uparrow)) + b^\downarrow$. Absent parts are None.
    """

    up: Float[Tensor, "hidden dim"]
    down: Float[Tensor, "dim hidden"]
    gate: Float[Tensor, "hidden dim"] | None
    up_bias: Float[Tensor, " hidden"] | None
    gate_bias: Float[Tensor, " hidden"] | None
    down_bias: Float[Tensor, " dim"] | None
    act: Activation


class FFNSlot:
    """The place of one feed-forward block in a model; see `ffn_slots`.

    Attributes:
        name: of the layer that holds it, as in `named_modules`.
        layer_index: its number among the model's feed-forward blocks, from 0.
    """

    def __init__(self, name: str, layer_index: int, owner: nn.Module) -> None:
        self.name, self.layer_index, self._owner = name, layer_index, owner

    @property
    def module(self) -> nn.Module | None:
        """What was put in place of the dense block; None while the dense block is there."""
        return getattr(self._owner, _entry(self._owner)) if "_dense_ffn" in self._owner.__dict__ else None

    def weights(self) -> FFNWeights:
        """The dense block's parameters themselves, not copies (GPT-2's are transposed views).

        Raises:
            ValueError: the block was replaced.
        """
        if self.module is not None:
            raise ValueError(f"{self.name} holds {type(self.module).__name__} in place of its dense block")
        parts, act = _dense(self._owner)
        up, down, gate = parts["up"], parts["down"], parts.get("gate")
        return FFNWeights(
            _weight(up),
            _weight(down),
            None if gate is None else _weight(gate),
            up.bias,
            None if gate is None else gate.bias,
            down.bias,
            activation_name(act),
        )

    def replace(self, module: nn.Module) -> None:
        """Put `module`, from (..., dim) to (..., dim), in the place of the dense block (or of what replaced it)."""
        owner = self._owner
        if "_dense_ffn" not in owner.__dict__:
            # The form of the dense block, without its weights, so that `restore` need not know how hosts build theirs.
            # Into __dict__ and not as an attribute: it is no part of the model.
            owner.__dict__["_dense_ffn"] = {path: copy.deepcopy(owner.get_submodule(path)).to("meta") for path in _paths(owner)}
        first, *others = _paths(owner)
        owner.set_submodule(first, module)
        for path in others:  # the new module does all the work, so the rest of a block in several parts passes it on
            owner.set_submodule(path, nn.Identity())

    def restore(self, weights: FFNWeights) -> None:
        """Put a dense block of the host's own class back, with copies of these weights.

        Raises:
            ValueError: the dense block was not replaced, or a weight has another shape than it had, or is missing.
        """
        if self.module is None:
            raise ValueError(f"{self.name} still has its dense block")
        owner = self._owner
        kept, mode = owner.__dict__.pop("_dense_ffn"), owner.training
        replaced = {path: owner.get_submodule(path) for path in _paths_of(kept)}
        for path, form in kept.items():
            owner.set_submodule(path, form.to_empty(device=weights.up.device).to(weights.up.dtype).train(mode))
        try:
            parts, _ = _dense(owner)
            for name, part in parts.items():
                _copy(f"{self.name}: {name}", getattr(weights, name), part.weight.T if _transposed(part) else part.weight)
                if part.bias is not None:
                    _copy(f"{self.name}: {name}_bias", getattr(weights, f"{name}_bias"), part.bias)
        except ValueError:
            for path, module in replaced.items():
                owner.set_submodule(path, module)
            owner.__dict__["_dense_ffn"] = {path: form.to("meta") for path, form in kept.items()}
            raise


def ffn_slots(model: nn.Module, layers: str | Sequence[int] = "all") -> list[FFNSlot]:
    """The feed-forward blocks of a model, from the first layer to the last, replaced ones included.

    Args:
        model: of transformers, or any module that holds blocks of the same form.
        layers: "all", or the numbers of those wanted; negative ones count from the end.

    Raises:
        ValueError: no block of a known form, or a number out of range.
    """
    found = [(name, module) for name, module in model.named_modules() if "_dense_ffn" in module.__dict__ or _kind(module)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no feed-forward block of a known form: Llama and its kin, GPT-2 or BERT")
    slots = [FFNSlot(name, place, owner) for place, (name, owner) in enumerate(found)]
    if layers == "all":
        return slots
    for layer in layers:
        if not (isinstance(layer, int) and -len(slots) <= layer < len(slots)):
            raise ValueError(f"layers must be 'all' or numbers in [{-len(slots)}, {len(slots)}), got {layer!r}")
    return [slots[place] for place in sorted({layer % len(slots) for layer in layers})]  # type: ignore[operator]


# The three forms: where the block's own modules are, seen from the module that owns the slot.
_FORMS: dict[str, tuple[str, ...]] = {
    "llama": ("mlp",),
    "gpt2": ("c_fc", "act", "c_proj"),
    "bert": ("intermediate", "output.dense"),
}


def _kind(owner: nn.Module) -> str | None:
    def has(*paths: str) -> bool:
        return all(_at(owner, path) is not None for path in paths)

    if has("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight", "mlp.act_fn"):
        return "llama"
    if has("c_fc.weight", "c_proj.weight", "act"):
        return "gpt2"
    if has("intermediate.dense.weight", "intermediate.intermediate_act_fn", "output.dense.weight"):
        return "bert"
    return None


def _at(owner: Any, path: str) -> Any:
    for part in path.split("."):
        owner = getattr(owner, part, None)
    return owner


def _paths(owner: nn.Module) -> tuple[str, ...]:
    kind = _kind(owner)
    return _FORMS[kind] if kind else _paths_of(owner.__dict__["_dense_ffn"])


def _paths_of(kept: dict[str, nn.Module]) -> tuple[str, ...]:
    return tuple(kept)


def _entry(owner: nn.Module) -> str:
    return _paths(owner)[0]


def _dense(owner: nn.Module) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
    kind = _kind(owner)
    if kind == "llama":
        mlp: Any = owner.mlp
        return {"up": mlp.up_proj, "down": mlp.down_proj, "gate": mlp.gate_proj}, mlp.act_fn
    host: Any = owner
    if kind == "gpt2":
        return {"up": host.c_fc, "down": host.c_proj}, host.act
    return {"up": host.intermediate.dense, "down": host.output.dense}, host.intermediate.intermediate_act_fn


def _transposed(part: nn.Module) -> bool:
    return type(part).__name__ == "Conv1D"


def _weight(part: Any) -> Tensor:
    return part.weight.T if _transposed(part) else part.weight


@torch.no_grad()
def _copy(name: str, source: Tensor | None, target: Tensor) -> None:
    if source is None or source.shape != target.shape:
        raise ValueError(f"{name} must have shape {tuple(target.shape)}, got {None if source is None else tuple(source.shape)}")
    target.copy_(source)
