"""KIND: linear layers in factors, some of which all classes share, while the others each serve their own classes."""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from firsthand.weights.layers import find_layers


def class_gate_matrix(num_classes: int, tailor_rank: int) -> Bool[Tensor, "classes tailors"]:
    """Which tailors each class opens, if every class has `tailor_rank` of its own.

    Args:
        num_classes: at least 0.
        tailor_rank: tailors of each class, at least 0; there are `num_classes * tailor_rank` in all.

    Raises:
        ValueError: a number is negative.

    Source:
        The class gate of arXiv 2408.07337. Equal groups that do not overlap are our choice: how the paper assigns tailors to
        classes is not known to us.
    """
    for name, value in (("num_classes", num_classes), ("tailor_rank", tailor_rank)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    return torch.eye(num_classes, dtype=torch.bool).repeat_interleave(tailor_rank, dim=1)


class DiversionLinear(nn.Module):
    r"""A linear layer in factors like those of a singular value decomposition, of which each sample opens those of its class.

    $$ y = U \,\mathrm{diag}\big(s \odot [\mathbf 1, g_c]\big)\, V^\top x + b $$

    The first `shared_rank` components, the learngene, are open for all samples; of the others, the tailors, the gate
    $g_c \in \{0, 1\}^{N_T}$ opens those of the sample's class c. So the learngene is trained by every class and a tailor by its
    own only. U, s and V are trained as they are: nothing keeps them orthogonal.

    A forward pass takes two thin matrix products for the learngene and two for all tailors, with the gate as a factor between. It
    is cheaper than a dense layer if learngene and tailors together are fewer than `in * out / (in + out)`. To serve, `merge` the
    layers for a class, or drop tailors with `keep_classes`.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's.
        shared_rank: components of the learngene, at least 0.
        num_classes: classes are numbered from 0.
        tailor_rank: tailors that each class opens, at least 0.
        bias: add one; it belongs to the learngene.
        gate: which class opens which of `tailors` tailors, so that classes can share some; each row opens `tailor_rank`.
            None: `class_gate_matrix(num_classes, tailor_rank)`.
        std: deviation of the entries of a class's weight at the start; None for `in_features ** -0.5`. 0 starts with U = 0.
        generator: draws the weights, on the CPU; None for torch's global one.
        device, dtype: of the weights.

    Raises:
        ValueError: a number out of range, no component at all, or a gate of another shape. In `forward`: as there.

    Source:
        Xie et al., "KIND: Knowledge Integration and Diversion in Diffusion Models" (ICML 2025 as "... for Training Decomposable
        Models"), arXiv 2408.07337, known to us from its abstract, and from a later paper of the same group that states the
        factorisation and the split again. The start is our choice: V normal with variance 1 / in_features, s = 1, and U such that
        the weight of a class has deviation `std`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shared_rank: int,
        num_classes: int,
        tailor_rank: int,
        bias: bool = True,
        gate: Bool[Tensor, "classes tailors"] | None = None,
        *,
        std: float | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("out_features", out_features, 1),
            ("shared_rank", shared_rank, 0),
            ("num_classes", num_classes, 0),
            ("tailor_rank", tailor_rank, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if shared_rank + num_classes * tailor_rank == 0:
            raise ValueError("shared_rank + num_classes * tailor_rank must be at least 1, got 0: there would be no component")
        if std is not None and not 0 <= std < math.inf:
            raise ValueError(f"std must be at least 0 and finite, got {std}")
        self.in_features, self.out_features = in_features, out_features
        self.std = in_features**-0.5 if std is None else std
        self.class_ids: Int[Tensor, " batch"] | None = None  # set by `class_gate`

        empty = partial(torch.empty, device=device, dtype=dtype)
        self.shared_u = nn.Parameter(empty(out_features, shared_rank))
        self.shared_s = nn.Parameter(empty(shared_rank))
        self.shared_v = nn.Parameter(empty(shared_rank, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.new_tailors(num_classes, tailor_rank, gate, generator=generator)
        self._draw("shared", shared_rank + tailor_rank, generator)

    @property
    def shared_rank(self) -> int:
        """Components of the learngene."""
        return len(self.shared_s)

    @property
    def num_classes(self) -> int:
        """Classes that it has a gate for."""
        return len(self.gate)

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        shared_rank: int,
        num_classes: int,
        tailor_rank: int,
        gate: Bool[Tensor, "classes tailors"] | None = None,
    ) -> "DiversionLinear":
        """The truncated singular value decomposition of a dense layer, the largest singular values in the learngene.

        The tailors get the next ones in turn. That says nothing of classes: the layer has to be trained further, or the tailors
        are replaced (`attach_tailors`).

        Args:
            linear: left as it is.
            shared_rank, num_classes, tailor_rank, gate: of the new layer.

        Raises:
            ValueError: as the class, or more components than `min(in, out)`.

        Source:
            Ours; the paper trains the factors from the start.
        """
        new = cls(
            linear.in_features,
            linear.out_features,
            shared_rank,
            num_classes,
            tailor_rank,
            bias=linear.bias is not None,
            gate=gate,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        rank, most = shared_rank + new.gate.shape[1], min(linear.weight.shape)
        if rank > most:
            raise ValueError(f"shared_rank and tailors must be at most {most} together, the rank of the weight, got {rank}")
        weight = linear.weight.detach()
        u, s, v = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        with torch.no_grad():
            for part, these in (("shared", slice(shared_rank)), ("tailor", slice(shared_rank, rank))):
                getattr(new, f"{part}_u").copy_(u[:, these])
                getattr(new, f"{part}_s").copy_(s[these])
                getattr(new, f"{part}_v").copy_(v[these])
            if new.bias is not None:
                new.bias.copy_(linear.bias)
        return new

    def forward(
        self, x: Float[Tensor, "batch *rest inputs"], class_ids: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch *rest outputs"]:
        """Apply to each sample the components of its class.

        Args:
            x: samples along the first dimension.
            class_ids: class of each sample, in `[0, num_classes)`, or -1 for the learngene alone; None for those of `class_gate`.

        Raises:
            ValueError: there are tailors and no class ids from anywhere, or not as many as samples, or some out of range (which
                is not looked at inside of `torch.compile`).
        """
        hidden = F.linear(x, self.shared_v) * self.shared_s
        y = F.linear(hidden, self.shared_u, self.bias)
        if not self.gate.shape[1]:
            return y
        ids = self._ids_for(x, class_ids)
        is_open = self.gate[ids.clamp(min=0)] & (ids >= 0)[:, None]
        scale = (is_open * self.tailor_s).view(len(ids), *[1] * (x.ndim - 2), -1)
        return y + F.linear(F.linear(x, self.tailor_v) * scale, self.tailor_u)

    def _ids_for(self, x: Tensor, class_ids: Tensor | None) -> Tensor:
        ids = self.class_ids if class_ids is None else class_ids
        if ids is None:
            raise ValueError("class_ids must be given, or the call be inside of class_gate(model, class_ids)")
        if ids.shape != x.shape[:1]:
            raise ValueError(f"class_ids must be one for each of the {len(x)} samples, got shape {tuple(ids.shape)}")
        if class_ids is not None and not torch.compiler.is_compiling():
            _check_ids(class_ids, self.num_classes)
        return ids

    def dense_weight(self, class_id: int | Sequence[int] | None = None) -> Float[Tensor, "outputs inputs"]:
        """The weight of the dense layer that does the same with some components open. Gradients flow to these.

        Args:
            class_id: a class; several, for all tailors that any of them opens; -1 for the learngene alone; None for everything.

        Raises:
            ValueError: no such class.
        """
        weight = (self.shared_u * self.shared_s) @ self.shared_v
        if class_id is None:
            return weight + (self.tailor_u * self.tailor_s) @ self.tailor_v
        ids = torch.tensor([class_id] if isinstance(class_id, int) else list(class_id), dtype=torch.long)
        _check_ids(ids, self.num_classes)
        is_open = self.gate[ids[ids >= 0].to(self.gate.device)].any(dim=0)
        return weight + (self.tailor_u * self.tailor_s)[:, is_open] @ self.tailor_v[is_open]

    def new_tailors(
        self,
        num_classes: int,
        tailor_rank: int,
        gate: Bool[Tensor, "classes tailors"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        """Replace gate and tailors by fresh ones, for other classes. Arguments and errors as of the class."""
        if gate is None:
            gate = class_gate_matrix(num_classes, tailor_rank)
        if gate.ndim != 2 or len(gate) != num_classes or (gate.sum(dim=1) != tailor_rank).any():
            raise ValueError(
                f"gate must have a row for each of {num_classes} classes that opens {tailor_rank} tailors, got shape "
                f"{tuple(gate.shape)} with {gate.sum(dim=-1).tolist()} open"
            )
        like, tailors = self.shared_u, gate.shape[1]
        self.register_buffer("gate", gate.to(like.device).clone())
        self.tailor_u = nn.Parameter(like.new_empty(self.out_features, tailors))
        self.tailor_s = nn.Parameter(like.new_empty(tailors))
        self.tailor_v = nn.Parameter(like.new_empty(tailors, self.in_features))
        self._draw("tailor", self.shared_rank + tailor_rank, generator)

    @torch.no_grad()
    def _draw(self, part: str, rank_open: int, generator: torch.Generator | None) -> None:
        """Entries of a weight with `rank_open` components open get the deviation `std`."""
        u, s, v = (getattr(self, f"{part}_{factor}") for factor in "usv")
        for tensor, deviation in ((u, self.std * (self.in_features / max(rank_open, 1)) ** 0.5), (v, self.in_features**-0.5)):
            tensor.copy_(deviation * torch.randn(tensor.shape, generator=generator))
        s.fill_(1.0)

    def keep_classes(self, classes: Sequence[int]) -> None:
        """Drop the tailors that none of these classes opens; class ids are then positions in `classes`."""
        ids = torch.tensor(list(classes), dtype=torch.long)
        _check_ids(ids, self.num_classes, least=0)
        rows = self.gate[ids.to(self.gate.device)]
        stay = rows.any(dim=0)
        self.gate = rows[:, stay].clone()
        for name, dim in (("tailor_u", 1), ("tailor_s", 0), ("tailor_v", 0)):
            old = getattr(self, name)
            kept = old.detach().index_select(dim, stay.nonzero()[:, 0])
            setattr(self, name, nn.Parameter(kept, requires_grad=old.requires_grad))

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, shared_rank={self.shared_rank}, "
            f"tailors={self.gate.shape[1]}, num_classes={self.num_classes}, bias={self.bias is not None}"
        )


def divert(
    model: Any,
    shared_rank: int,
    num_classes: int,
    tailor_rank: int,
    *,
    target: Collection[str] | None = None,
    gate: Bool[Tensor, "classes tailors"] | None = None,
    keep_weights: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    """Put `DiversionLinear` in the place of linear layers of a model, in place.

    The same gate is used everywhere. Make optimisers afterwards. To tell the layers which classes a batch is of, call the model
    inside of `class_gate`, or say once with `gate_by` which of its arguments they are.

    Args:
        model: any module.
        shared_rank: components of the learngene in each layer; half the width of the model is our default choice in the study.
        num_classes: classes, or other discrete conditions.
        tailor_rank: tailors that each class opens in each layer.
        target: names of the linear layers, the last parts of their paths, as for adapters of peft: `("q_proj", "fc1")`. None: all
            in the one list of equal layers that the model has, that is, attention and MLP of a usual transformer.
        gate: as for `DiversionLinear`.
        keep_weights: start from the singular value decomposition of the weights that are there, and not afresh (with the same
            deviation, layer by layer).
        generator: draws fresh weights.

    Returns:
        `model`.

    Raises:
        ValueError: nothing to replace, a name of `target` that no linear layer has, or as `DiversionLinear` and `find_layers`.

    Source:
        arXiv 2408.07337; that these are query, key, value, output and both of the MLP is from a later paper of the same group.
    """
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if target is None:
        path = find_layers(model)
        chosen = [name for name in names if name.startswith(f"{path}.")]
    else:
        missing = [each for each in target if not any(_is_called(name, each) for name in names)]
        if missing:
            raise ValueError(f"target must name linear layers of {type(model).__name__}, it has none called {missing[0]!r}")
        chosen = [name for name in names if any(_is_called(name, each) for each in target)]
    if not chosen:
        raise ValueError(f"model must have linear layers to replace, {type(model).__name__} has none{'' if target else ' there'}")
    ranks = (shared_rank, num_classes, tailor_rank)
    for name in chosen:
        old = model.get_submodule(name)
        if keep_weights:
            new = DiversionLinear.from_dense(old, *ranks, gate=gate)
        else:
            std = old.weight.detach().float().std(correction=0).item()
            has_bias = old.bias is not None
            kind = {"device": old.weight.device, "dtype": old.weight.dtype}
            new = DiversionLinear(
                old.in_features, old.out_features, *ranks, bias=has_bias, gate=gate, std=std, generator=generator, **kind
            )
            if has_bias:
                new.bias.data.copy_(old.bias.detach())
        model.set_submodule(name, new.train(old.training))
    return model


@contextmanager
def class_gate(model: nn.Module, class_ids: Int[Tensor, " batch"]) -> Iterator[None]:
    """Inside of it, the `DiversionLinear`s of a model know the class of each sample.

    With gradient checkpointing, which calls layers again in the backward pass, that must be inside too.

    Args:
        model: what has the layers.
        class_ids: class of each sample in `[0, num_classes)`, or -1 for the learngene alone.

    Raises:
        ValueError: the model has no such layer, or a class id is out of range.

    Source:
        The class gate of arXiv 2408.07337; the -1 is ours.
    """
    layers = _layers(model)
    _check_ids(class_ids, min(layer.num_classes for layer in layers))
    before = [layer.class_ids for layer in layers]
    for layer in layers:
        layer.class_ids = class_ids
    try:
        yield
    finally:
        for layer, ids in zip(layers, before, strict=True):
            layer.class_ids = ids


def gate_by(model: nn.Module, argument: str) -> list[RemovableHandle]:
    """Let every call of a model be inside of `class_gate`, with one of the call's arguments for class ids.

    For loops that are not one's own: transformers' `Trainer`, a pipeline. A call without that argument, or with None, leaves the
    ids as they are.

    Args:
        model: what has the layers. A deep copy of it is gated as well.
        argument: name of an argument of `forward`.

    Returns:
        The two hooks, to `remove()`.

    Raises:
        ValueError: `forward` has no such argument, or there is no `DiversionLinear`. In the call: as `class_gate`.

    Source:
        Ours.
    """
    if argument not in signature(model.forward).parameters:
        raise ValueError(f"argument must be one of {type(model).__name__}.forward, got {argument!r}")
    _layers(model)
    enter = model.register_forward_pre_hook(partial(_set_ids, argument), with_kwargs=True)
    leave = model.register_forward_hook(partial(_forget_ids, argument), with_kwargs=True, always_call=True)
    return [enter, leave]


# Hooks get the module that is called, so those of a deep copy set the ids of the copy.
def _set_ids(argument: str, model: nn.Module, args: Any, kwargs: Any) -> None:
    ids = _argument(argument, model, args, kwargs)
    layers = [module for module in model.modules() if isinstance(module, DiversionLinear)]  # none, in a merged model
    if ids is not None and layers:
        _check_ids(ids, min(layer.num_classes for layer in layers))
        for layer in layers:
            layer.class_ids = ids


def _forget_ids(argument: str, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if _argument(argument, model, args, kwargs) is not None:
        for module in model.modules():
            if isinstance(module, DiversionLinear):
                module.class_ids = None


def _argument(name: str, model: nn.Module, args: Any, kwargs: Any) -> Any:
    return signature(model.forward).bind_partial(*args, **kwargs).arguments.get(name)


def extract_learngene(model: nn.Module) -> dict[str, Tensor]:
    """What is passed on: the state of a model without its tailors and gates.

    Args:
        model: with `DiversionLinear`s. Left as it is.

    Returns:
        Tensors by name, not copies. Load them with `load_state_dict(learngene, strict=False)` into a model of the same shared
        ranks and any classes. What the host itself keeps for each class, such as an embedding, is in it; drop it if need be.

    Raises:
        ValueError: the model has no `DiversionLinear`.

    Source:
        arXiv 2408.07337.
    """
    _layers(model)
    tailors = _tailor_names(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tailors}


def attach_tailors(
    model: Any,
    num_classes: int,
    tailor_rank: int,
    *,
    gate: Bool[Tensor, "classes tailors"] | None = None,
    freeze_learngene: bool = True,
    generator: torch.Generator | None = None,
) -> Any:
    """Replace all tailors of a model by fresh ones for new classes, in place, and freeze all else.

    Make optimisers afterwards. Give the host what it needs for the new classes, such as another class embedding, after this call
    or let it be trained again (`requires_grad_()`).

    Args:
        model: with `DiversionLinear`s.
        num_classes: new classes, numbered from 0.
        tailor_rank: tailors that each of them opens in each layer.
        gate: as for `DiversionLinear`.
        freeze_learngene: let nothing but tailors be trained; False leaves what needs gradients as it is.
        generator: draws the tailors.

    Returns:
        `model`.

    Raises:
        ValueError: as `DiversionLinear`, or the model has none.

    Source:
        arXiv 2408.07337: learngenes are transferred and tailors begin at random. Their deviation is our choice: what they would
        have had in a new model.
    """
    for layer in _layers(model):
        layer.new_tailors(num_classes, tailor_rank, gate, generator=generator)
    if freeze_learngene:
        tailors = _tailor_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in tailors)
    return model


def keep_classes(model: Any, classes: Sequence[int]) -> Any:
    """Drop the tailors that none of some classes opens, in place: a smaller model for those who need only these.

    Args:
        model: with `DiversionLinear`s.
        classes: class ids that stay. Afterwards the layers know them by their positions here, while whatever the host keeps for
            each class (an embedding) is as before.

    Returns:
        `model`.

    Raises:
        ValueError: no such class, or no `DiversionLinear`.

    Source:
        arXiv 2408.07337: tailors are assembled as the task wants them.
    """
    for layer in _layers(model):
        layer.keep_classes(classes)
    return model


def merge(model: Any, class_id: int | Sequence[int] | None) -> Any:
    """An ordinary model for one class: a copy with `nn.Linear` in the place of each `DiversionLinear`.

    It has the host's own parameter names, so a model of transformers saves and loads again as if nothing had happened.

    Args:
        model: left as it is. The hooks of `gate_by` do nothing in the copy.
        class_id: as for `DiversionLinear.dense_weight`. For several classes, all their tailors are open for every sample, which
            is not what any of them was trained with.

    Returns:
        The copy, which shares no memory with `model`.

    Raises:
        ValueError: no such class, or no `DiversionLinear`.

    Source:
        Ours; arithmetic.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DiversionLinear)}
    _layers(model)
    new = copy.deepcopy(model)
    for name, layer in layers.items():
        weight = layer.dense_weight(class_id).detach()
        with torch.device("meta"):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight = nn.Parameter(weight.clone(), requires_grad=layer.shared_u.requires_grad)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
        new.set_submodule(name, dense.train(layer.training))
    return new


def _layers(model: nn.Module) -> list[DiversionLinear]:
    layers = [module for module in model.modules() if isinstance(module, DiversionLinear)]
    if not layers:
        raise ValueError(f"model must have layers of DiversionLinear (see divert), {type(model).__name__} has none")
    return layers


def _tailor_names(model: nn.Module) -> set[str]:
    parts = ("gate", "tailor_u", "tailor_s", "tailor_v")
    paths = [name for name, module in model.named_modules() if isinstance(module, DiversionLinear)]
    return {f"{path}.{part}" if path else part for path in paths for part in parts}


def _check_ids(class_ids: Tensor, num_classes: int, least: int = -1) -> None:
    if class_ids.numel() and not (class_ids.min() >= least and class_ids.max() < num_classes):
        raise ValueError(
            f"class ids must be in [{least}, {num_classes}), got {class_ids.min().item()} to {class_ids.max().item()}"
        )


def _is_called(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")
