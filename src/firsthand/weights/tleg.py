"""TLEG: a transformer of any depth from the weights of two layers, linear in the position of a layer."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from firsthand.weights.layers import find_layers, layer_weights, with_layer_weights

Weights = dict[str, Float[Tensor, "..."]]


def linear_expand(
    base: Mapping[str, Float[Tensor, "..."]], slope: Mapping[str, Float[Tensor, "..."]], num_layers: int
) -> list[Weights]:
    r"""The weights of each layer of a model with `num_layers` of them.

    $$ \theta_l = \mathrm{base} + \frac{l}{L}\, \mathrm{slope}, \qquad l = 0, \dots, L - 1 $$

    So the first layer is `base`, whatever the depth, and no layer is ever `base + slope`. Gradients flow to both.

    Args:
        base: tensors by name, floating point, of any shape.
        slope: tensors of the same names and shapes.
        num_layers: L, at least 1.

    Returns:
        For each layer its tensors, new ones, in the dtype of `base`.

    Raises:
        ValueError: the names or shapes of `base` and `slope` differ, or `num_layers` is below 1.

    Source:
        Xia et al., "Transformer as Linear Expansion of Learngene", AAAI 2024, arXiv 2312.05614. That l counts from 0 and L is the
        depth of the model that is made is so in its released code.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    _check_equal("slope", slope, base, "base")
    return [
        {name: torch.add(weight, slope[name], alpha=index / num_layers) for name, weight in base.items()}
        for index in range(num_layers)
    ]


@torch.no_grad()
def fit_linear_learngene(
    layers: Sequence[Mapping[str, Float[Tensor, "..."]]],
) -> tuple[Weights, Weights, dict[str, float]]:
    r"""The base and slope that come closest to the weights of given layers, and how close that is.

    $$ \min_{\mathrm{base},\,\mathrm{slope}} \sum_l \lVert \theta_l - \mathrm{base} - \tfrac lL\, \mathrm{slope} \rVert^2,
       \qquad R^2 = 1 - \frac{\sum_l \lVert \theta_l - \hat\theta_l \rVert^2}{\sum_l \lVert \theta_l - \bar\theta \rVert^2} $$

    As a diagnostic it says whether a trained model is near to linear in depth; it also is a start for `LinearLearngene`. Hold
    R² against 1 / (L - 1), about what layers that have nothing to do with each other come to; for two layers it is always 1.

    Args:
        layers: the weights of each of L layers by name (`firsthand.weights.layers.layer_weights`), all of the same names and
            shapes.

    Returns:
        Base and slope, in the dtype of the weights, and R² of each tensor. The slope of a single layer is 0, and so is that of
        a tensor that is the same in all layers; R² is then 1.

    Raises:
        ValueError: there are no layers, or their names or shapes differ.

    Source:
        The paper motivates the method with trained layers that are near to linear in depth after PCA (arXiv 2312.05614); this
        measure of it, and least squares, are our choice.
    """
    if not layers:
        raise ValueError("layers must be at least one, got none")
    for index, layer in enumerate(layers):
        _check_equal(f"layers[{index}]", layer, layers[0], "layers[0]")
    base, slope, r2 = {}, {}, {}
    for name, first in layers[0].items():
        stack = torch.stack([layer[name] for layer in layers]).to(torch.promote_types(first.dtype, torch.float32))
        place = torch.arange(len(layers), dtype=stack.dtype, device=stack.device) / len(layers)
        centred, mean = place - place.mean(), stack.mean(dim=0)
        deviation = (stack - mean).flatten(1)
        steepness = centred @ deviation / centred.square().sum().clamp(min=torch.finfo(stack.dtype).tiny)
        total, explained = deviation.square().sum().item(), (centred[:, None] * steepness).square().sum().item()
        r2[name] = explained / total if total > 0 else 1.0
        steepness = steepness.reshape(first.shape)
        base[name], slope[name] = (mean - place.mean() * steepness).to(first.dtype), steepness.to(first.dtype)
    return base, slope, r2


class LinearLearngene(nn.Module):
    """A model of transformers whose layers are computed from two: what is trained to become a learngene.

    Train it as any model, the paper does so by soft distillation alone (`firsthand.distill.soft`); then `expand` it to
    models of whatever depths, which are trained on without any tie between their layers. The parameters are those of the model
    outside of its layers, `base.*` and `slope.*`: as many as a model of two layers has, whatever the depth. `state_dict()` holds
    these and nothing else; it is what there is to store.

    ```python
    learngene = LinearLearngene(ViTForImageClassification(config))  # config.num_hidden_layers: depth to train at
    loss = soft_distillation_loss(learngene(pixel_values=images).logits, teacher_logits)
    small, large = learngene.expand(4), learngene.expand(12)  # two ViTForImageClassification
    ```

    In `Trainer`, set `remove_unused_columns=False`: it reads the signature of `forward`, which has none of its own.

    Args:
        model: of transformers, with one list of equal layers: ViT, BERT, Llama, GPT-2 and most others. It is copied.
        layers: dotted path of that list; None to look for it.
        start: `"random"`: the base is the model's first layer, so an untrained model gives an untrained base; slopes of matrices
            are normal with the deviation transformers begins with (`config.initializer_range`, else 0.02), those of vectors
            (biases, gains) are 0. `"fit"`: base and slope are those of `fit_linear_learngene`, for a trained model.
        generator: draws the slopes, on the CPU; None for torch's global one.

    Raises:
        ValueError: no such list of layers, or an unknown `start`. In `forward`: gradient checkpointing is on.

    Source:
        arXiv 2312.05614 and its released code, where base and slope of matrices have deviation 0.02 (of a normal that is cut off
        a hundred deviations out), biases are 0, gains begin at 1 with slope 0. What is not in a layer is stored once. Paper and
        code pool patches without a class token; here the model is whatever it is, and the order of pooling and last norm is the
        same before and after expansion, unlike in that code. `start="fit"` is our addition.
    """

    def __init__(
        self, model: Any, layers: str | None = None, start: str = "random", generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if start not in ("random", "fit"):
            raise ValueError(f"start must be 'random' or 'fit', got {start!r}")
        self.path = find_layers(model, layers)
        self.model = copy.deepcopy(model)
        blocks = self.model.get_submodule(self.path)
        self.num_layers = len(blocks)
        self.base, self.slope = copy.deepcopy(blocks[0]), copy.deepcopy(blocks[0])
        if start == "fit":
            base, slope, _ = fit_linear_learngene(layer_weights(model, self.path))
            self.base.load_state_dict(base, strict=False)
            self.slope.load_state_dict(slope, strict=False)
        else:
            deviation = getattr(model.config, "initializer_range", None) or 0.02
            _draw_slopes(self.slope, deviation, generator)
        for block in blocks:
            _empty(block)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says, with its layers computed anew; the arguments are the model's."""
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
            raise ValueError("model must not use gradient checkpointing: by the time it recomputes a layer, its weights are gone")
        expanded = linear_expand(*self._learngene(), self.num_layers)
        weights = {f"{self.path}.{index}.{name}": w for index, layer in enumerate(expanded) for name, w in layer.items()}
        return torch.func.functional_call(self.model, weights, args, kwargs)

    @torch.no_grad()
    def expand(self, num_layers: int | None = None) -> Any:
        """An ordinary model of the same class and any depth; nothing ties its layers, and it shares no memory with this.

        Its embeddings, last norm and head are copies too: for another task, give it a head of its own.

        Args:
            num_layers: at least 1; None for the depth trained at, where the model computes what this one does.

        Raises:
            ValueError: `num_layers` is below 1, or the configuration of the model does not decide its depth.
        """
        weights = linear_expand(*self._learngene(), self.num_layers if num_layers is None else num_layers)
        return with_layer_weights(self.model, weights, self.path, clone=False)

    def _learngene(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(self.base.named_parameters()), dict(self.slope.named_parameters())


@torch.no_grad()
def _draw_slopes(slope: nn.Module, deviation: float, generator: torch.Generator | None) -> None:
    for parameter in slope.parameters():
        if parameter.ndim > 1:
            parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.zero_()


def _empty(layer: nn.Module) -> None:
    """Put a place where each parameter was: it is filled for the time of a call, is no parameter and is not stored."""
    for module in layer.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, torch.empty(0), persistent=False)


def _check_equal(name: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor], whose: str) -> None:
    shapes = [{key: tuple(weight.shape) for key, weight in each.items()} for each in (given, expected)]
    for key in sorted(shapes[0].keys() | shapes[1].keys()):
        ours, theirs = (each.get(key, "none") for each in shapes)
        if ours != theirs:
            raise ValueError(f"{name} must have the tensors of {whose}: shape of {key!r} there {theirs}, here {ours}")
