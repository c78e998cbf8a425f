"""The layers of a transformer: where a model of transformers keeps them, and the same model with more or fewer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def find_layers(model: nn.Module, layers: str | None = None) -> str:
    """Where a model keeps its layers: the dotted path of its one `nn.ModuleList` of equal layers.

    Layers are equal if they are of one class and their parameters have the same names and shapes. What is inside of a layer
    (experts, for example) is not looked at.

    Args:
        model: ViT, BERT, Llama, GPT-2 and most others of transformers; any module with such a list.
        layers: the path, where the model has several such lists. It is checked and returned.

    Returns:
        The path, as for `model.get_submodule`.

    Raises:
        ValueError: there is no such list, or several and `layers` is not given, or `layers` names none.

    Source:
        Ours: the learngene papers (arXiv 2312.05614, 2404.16897) have models of their own.
    """
    if layers is not None:
        try:
            found = model.get_submodule(layers)
        except AttributeError:
            raise ValueError(f"layers must be the path of a ModuleList in {type(model).__name__}, got {layers!r}") from None
        if not isinstance(found, nn.ModuleList) or not len(found):
            raise ValueError(
                f"layers must be the path of a ModuleList with something in it, {layers!r} is {type(found).__name__}"
            )
        difference = _difference(found)
        if difference:
            raise ValueError(f"layers must be equal, in {layers!r} {difference}")
        return layers

    paths: list[str] = []
    unequal = ""
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not any(True for _ in module.parameters()):
            continue
        if any(path.startswith(f"{outer}.") for outer in paths):
            continue
        difference = _difference(module)
        if difference:
            unequal = unequal or f"; in {path!r} {difference}"
        else:
            paths.append(path)
    if len(paths) != 1:
        found_what = f"several, {', '.join(paths)}: choose one with layers=" if paths else f"none{unequal}"
        raise ValueError(f"model must have one list of equal layers, {type(model).__name__} has {found_what}")
    return paths[0]


def with_layers(model: Any, num_layers: int, path: str | None = None) -> Any:
    """A new model of the same class with so many layers, and nothing else changed but the weights, which are fresh.

    The weights are initialised as transformers does it, from torch's global generator.

    Args:
        model: a model of transformers. Left as it is.
        num_layers: at least 1.
        path: where its layers are, see `find_layers`.

    Returns:
        A model of the same class, dtype, device and mode, with the same parts; its configuration is a copy with another number
        of layers.

    Raises:
        ValueError: `num_layers` is below 1; no model of transformers; no such list of layers; the configuration does not decide
            how long that list is, or makes its layers differ (sliding windows in some of them); or the model has parameters that
            its class would not give it.

    Source:
        Ours; the fresh model of another depth that arXiv 2312.05614 and 2404.16897 compare with.
    """
    path = find_layers(model, path)
    new = _without_layers(model, path, num_layers)
    fresh = type(model)._from_config(new.config, dtype=model.dtype).to(model.device)
    _check_depth(fresh, path, num_layers)
    weights = dict(fresh.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in new.named_parameters():
            if name not in weights or weights[name].shape != parameter.shape:
                raise ValueError(f"model must be as its class makes it, {type(model).__name__} has no {name!r} of this shape")
            parameter.copy_(weights[name])
    new.get_submodule(path).extend(fresh.get_submodule(path))
    return new.train(model.training)


@torch.no_grad()
def with_layer_weights(model: Any, layers: Sequence[Mapping[str, Tensor]], path: str | None = None, *, clone: bool = True) -> Any:
    """A new model of the same class whose layers have the given weights, and which is a copy of `model` otherwise.

    Nothing is initialised first, so no time goes into it and no draw of a generator.

    Args:
        model: a model of transformers. Left as it is.
        layers: the parameters of each layer by their names in it, as from `layer_weights`. As many layers as are given will be in
            the new model; it gets copies, so one may be given several times.
        path: where its layers are, see `find_layers`.
        clone: False takes the tensors of `layers` as they are, if they were made for the new model anyway.

    Returns:
        A model of the same class, device and mode that shares no memory with `model`. Its layers are trainable; what else is
        frozen in `model` is frozen.

    Raises:
        ValueError: as `with_layers`, but for the last; or a layer's parameters have other names or shapes than its class gives
            them.

    Source:
        Ours; the descendants of arXiv 2312.05614 and 2404.16897 are made so.
    """
    path = find_layers(model, path)
    new = _without_layers(model, path, len(layers))
    with torch.device("meta"):
        empty = type(model)(new.config)
    blocks = _check_depth(empty, path, len(layers))
    shapes = {name: tuple(parameter.shape) for name, parameter in blocks[0].named_parameters()}
    buffers = dict(model.get_submodule(path)[0].named_buffers())  # masks and the like, which all layers have alike
    for index, (block, layer) in enumerate(zip(blocks, layers, strict=True)):
        given = {name: tuple(weight.shape) for name, weight in layer.items()}
        wrong = sorted(set(shapes.items()) ^ set(given.items()))
        if wrong:
            raise ValueError(f"layers must have the parameters of the model's layers, layer {index} differs in {wrong[0][0]!r}")
        for name, module in block.named_modules():
            prefix = f"{name}." if name else ""
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    weight = layer[prefix + key].detach()
                    module._parameters[key] = nn.Parameter(weight.clone() if clone else weight)
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffers[prefix + key].clone()
    new.get_submodule(path).extend(blocks)
    return new.train(model.training)


def layer_weights(model: nn.Module, path: str | None = None) -> list[dict[str, nn.Parameter]]:
    """The parameters of each layer, by their names in the layer.

    Args:
        model: as for `find_layers`.
        path: where its layers are.

    Returns:
        For each layer its own parameters, not copies.

    Raises:
        ValueError: as `find_layers`.

    Source:
        Ours.
    """
    return [dict(layer.named_parameters()) for layer in model.get_submodule(find_layers(model, path))]


def _difference(layers: nn.ModuleList) -> str:
    """What the first layer that is not like the one before it differs in; empty if all are equal."""
    first = {name: tuple(parameter.shape) for name, parameter in layers[0].named_parameters()}
    for index, layer in enumerate(layers):
        if type(layer) is not type(layers[0]):
            return f"layer {index} is {type(layer).__name__} and layer 0 {type(layers[0]).__name__}"
        shapes = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        wrong = sorted(set(first.items()) ^ set(shapes.items()))
        if wrong:
            return f"layer {index} differs from layer 0 in {wrong[0][0]!r}"
    return ""


def _without_layers(model: Any, path: str, num_layers: int) -> Any:
    """A copy of the model with an empty list of layers, and a configuration that has another number of them.

    A copy and not a model made from the configuration, which does not know everything: a pooler left out, or another head.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if not hasattr(getattr(model, "config", None), "num_hidden_layers") or not hasattr(model, "_from_config"):
        raise ValueError(f"model must be one of transformers with num_hidden_layers, got {type(model).__name__}")
    types = getattr(model.config, "layer_types", None)  # how each layer attends, one entry each
    if types and len(set(types)) > 1:
        raise ValueError(f"model must attend in the same way in all layers, its layer_types are {types}")
    layers = model.get_submodule(path)
    new = copy.deepcopy(model, {id(layers): nn.ModuleList()})
    new.config.num_hidden_layers = num_layers
    if types:
        new.config.layer_types = list(types[:1]) * num_layers
    return new


def _check_depth(model: nn.Module, path: str, num_layers: int) -> Any:
    layers = model.get_submodule(path)
    if len(layers) != num_layers:
        raise ValueError(
            f"num_hidden_layers must decide how many layers {path!r} has, {num_layers} were asked for and {len(layers)} made"
        )
    return layers
