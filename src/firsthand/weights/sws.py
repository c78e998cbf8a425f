"""SWS: a few layers, each trained to be repeated inside its own stage, and models of any depth made by repeating them."""

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from firsthand.weights.layers import find_layers, layer_weights, with_layer_weights

Weights = dict[str, Float[Tensor, "..."]]


def layer_stages(repeats: Sequence[int]) -> list[int]:
    """Which stage each layer is in, if stage s has `repeats[s]` layers: `[2, 1, 3]` gives `[0, 0, 1, 2, 2, 2]`.

    Args:
        repeats: layers of each stage, at least one stage and at least 1 layer in each.

    Raises:
        ValueError: there are no stages, or one has no layers.

    Source:
        Xia et al., "Exploring Learngene via Stage-wise Weight Sharing for Initializing Variable-sized Models", IJCAI 2024,
        arXiv 2404.16897; its auxiliary model has 16 layers, `[3, 3, 4, 3, 3]`.
    """
    if not repeats or min(repeats) < 1:
        raise ValueError(f"repeats must be at least one number, each at least 1, got {list(repeats)}")
    return [stage for stage, count in enumerate(repeats) for _ in range(count)]


def expansion_schedule(num_layers: int, num_stages: int) -> list[int]:
    r"""Which of `num_stages` stages each of `num_layers` layers is made from.

    With D layers and K stages, each stage gets $\lfloor D / K \rfloor$ layers and the first $D \bmod K$ one more. If there are
    fewer layers than stages, stages are left out: those evenly spaced from the first to the last stay (a single layer is the
    first).

    Args:
        num_layers: D, at least 1.
        num_stages: K, at least 1.

    Returns:
        A stage for each layer, never decreasing.

    Raises:
        ValueError: a number is below 1.

    Source:
        Our rule; for the one map that the code of arXiv 2404.16897 has, 12 layers of 5 stages, it gives that map. Fewer layers
        than stages do not occur there.
    """
    for name, value in (("num_layers", num_layers), ("num_stages", num_stages)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if num_layers < num_stages:
        return [round(layer * (num_stages - 1) / max(num_layers - 1, 1)) for layer in range(num_layers)]
    each, more = divmod(num_layers, num_stages)
    return layer_stages([each + (stage < more) for stage in range(num_stages)])


def stagewise_expand(
    stage_layers: Sequence[Mapping[str, Float[Tensor, "..."]]],
    layer_to_stage: Sequence[int],
    allow_unordered: bool = False,
) -> list[Weights]:
    r"""The weights of each layer: a copy of those of its stage.

    $$ \theta_l = \theta^{\mathrm{stage}}_{s(l)} $$

    Args:
        stage_layers: the tensors of each stage's layer, by name.
        layer_to_stage: the stage s(l) of each layer (`expansion_schedule`), never decreasing.
        allow_unordered: take stages in any order, as an ablation does.

    Returns:
        For each layer its tensors, cloned: no two layers share memory. Gradients flow to the stages.

    Raises:
        ValueError: no layers, a stage that is not there, or stages out of order where that is not allowed.

    Source:
        arXiv 2404.16897 and its released code, where the map is an option of the command line.
    """
    if not layer_to_stage:
        raise ValueError("layer_to_stage must name a stage for at least one layer, got none")
    for stage in layer_to_stage:
        if not 0 <= stage < len(stage_layers):
            raise ValueError(f"layer_to_stage must be in [0, {len(stage_layers)}), got {stage}")
    if not allow_unordered and any(here > there for here, there in pairwise(layer_to_stage)):
        raise ValueError(f"layer_to_stage must never decrease (or pass allow_unordered=True), got {list(layer_to_stage)}")
    return [{name: weight.clone() for name, weight in stage_layers[stage].items()} for stage in layer_to_stage]


class StageSharedModel(nn.Module):
    """A model of transformers whose layers share one set of weights in each stage: what is trained to become a learngene.

    Train it as any model, the paper does so by soft distillation alone (`firsthand.distill.soft`): the gradients of a stage's
    layers add up. Then `expand` it to models of whatever depths, which are trained on without any sharing. `parameters()` has
    each shared parameter once. To store the learngene, use `safetensors.torch.save_model` and `load_model`, which write what is
    shared once.

    ```python
    shared = StageSharedModel(ViTForImageClassification(config), repeats=[2, 2, 2, 2])  # config.num_hidden_layers == 8
    loss = soft_distillation_loss(shared(pixel_values=images).logits, teacher_logits)
    small, large = shared.expand(4), shared.expand(12)  # two ViTForImageClassification
    ```

    Caches, generation and gradient checkpointing of the model work as ever, since only weights are shared and not layers. In
    `Trainer`, set `remove_unused_columns=False`, or give it `shared.model`.

    Args:
        model: of transformers, with one list of equal layers: ViT, BERT, Llama, GPT-2 and most others. It is copied.
        repeats: layers of each stage; together as many as the model has.
        layers: dotted path of that list; None to look for it.

    Raises:
        ValueError: no such list of layers, a stage without layers, or `repeats` do not add up to their number.

    Source:
        arXiv 2404.16897 and its released code: all tensors of a layer are shared inside its stage, norms too. A stage begins with
        the weights of the first of its layers.
    """

    def __init__(self, model: Any, repeats: Sequence[int], layers: str | None = None) -> None:
        super().__init__()
        self.stages = layer_stages(repeats)
        self.path = find_layers(model, layers)
        self.model = copy.deepcopy(model)
        blocks = self.model.get_submodule(self.path)
        if len(self.stages) != len(blocks):
            raise ValueError(f"repeats must add up to the {len(blocks)} layers of model, got {list(repeats)}")
        for index, stage in enumerate(self.stages):
            first = blocks[self.stages.index(stage)]
            for mine, its in zip(blocks[index].modules(), first.modules(), strict=True):
                mine._parameters.update(its._parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says; the arguments are the model's."""
        return self.model(*args, **kwargs)

    def stage_layers(self) -> list[dict[str, nn.Parameter]]:
        """The parameters of each stage's layer by their names in the layer: with what is outside of the layers, the learngene."""
        layers = layer_weights(self.model, self.path)
        return [layers[self.stages.index(stage)] for stage in range(self.stages[-1] + 1)]

    @torch.no_grad()
    def expand(
        self, num_layers: int | None = None, layer_to_stage: Sequence[int] | None = None, allow_unordered: bool = False
    ) -> Any:
        """An ordinary model of the same class and any depth; nothing ties its layers, and it shares no memory with this.

        Its embeddings, last norm and head are copies too: for another task, give it a head of its own.

        Args:
            num_layers: at least 1; its layers are spread over the stages as `expansion_schedule` does it.
            layer_to_stage: instead of `num_layers`, the stage of each layer. Without either, the layers are those trained with,
                and the model computes what this one does.
            allow_unordered: see `stagewise_expand`.

        Raises:
            ValueError: both `num_layers` and `layer_to_stage` are given, or one is out of range, or the configuration of the
                model does not decide its depth.
        """
        if num_layers is not None and layer_to_stage is not None:
            raise ValueError(f"num_layers and layer_to_stage exclude each other, got {num_layers} and {list(layer_to_stage)}")
        stages = self.stage_layers()
        if num_layers is not None:
            layer_to_stage = expansion_schedule(num_layers, len(stages))
        weights = stagewise_expand(stages, self.stages if layer_to_stage is None else layer_to_stage, allow_unordered)
        return with_layer_weights(self.model, weights, self.path, clone=False)
