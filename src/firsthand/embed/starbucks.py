"""Starbucks: train an embedding model on a fixed list of sizes (layers, dimensions), all of them in every step.

A size (n, d) is the model's first n layers and the first d numbers of an embedding. Pre-training on the same list is in
`firsthand.embed.smae`.
"""

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Sizes = Sequence[Sequence[int]]
"""(layer, dim) of each size, both growing."""


def default_sizes(num_layers: int, hidden: int, rungs: int = 6) -> list[tuple[int, int]]:
    """Sizes at equal steps in layers, each about twice as wide as the one before.

    For 12 layers of width 768 this is the paper's list: (2, 32), (4, 64), (6, 128), (8, 256), (10, 512), (12, 768).

    Args:
        num_layers: of the full model, which is the last size.
        hidden: its width. The others are `hidden / 2^k`, rounded up to a power of two.
        rungs: how many sizes, in [1, num_layers].

    Raises:
        ValueError: there are too few layers or too little width for so many sizes.

    Source:
        arXiv 2410.13230 for the list above; the rule that continues it to other models is our choice.
    """
    if not 1 <= rungs <= num_layers:
        raise ValueError(f"rungs must be in [1, {num_layers}], the number of layers, got {rungs}")
    if hidden < 2 ** (rungs - 1):
        raise ValueError(f"hidden must be at least {2 ** (rungs - 1)} for {rungs} sizes, got {hidden}")
    layers = [math.ceil(num_layers * (k + 1) / rungs) for k in range(rungs)]
    dims = [2 ** math.ceil(math.log2(hidden / 2 ** (rungs - 1 - k))) for k in range(rungs - 1)]
    return list(zip(layers, [*dims, hidden], strict=True))


def pool_layers(
    hidden_states: Sequence[Float[Tensor, "batch tokens dim"]],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"],
    *,
    pooling: str = "cls",
    normalize: bool = False,
) -> Float[Tensor, "layers batch dim"]:
    """One vector a text after each layer.

    Args:
        hidden_states: what a transformers model returns with `output_hidden_states=True`: L + 1 tensors, the embeddings first.
        attention_mask: 1 or true for the tokens of a text, at least one; padding may be on either side.
        pooling: `"cls"`, the first token of a text; `"mean"` of its tokens; or `"last"` of them.
        normalize: scale vectors to unit length at their full width. Their first numbers then have unit length no more.

    Returns:
        The vectors, (L + 1, B, d), in the dtype of the states. A mean is computed in float32 or wider.

    Raises:
        ValueError: no states, states of other tokens than the mask's, a text without tokens, an unknown `pooling`.

    Source:
        arXiv 2410.13230, as in the code for retrieval.
    """
    if pooling not in ("cls", "mean", "last"):
        raise ValueError(f"pooling must be 'cls', 'mean' or 'last', got {pooling!r}")
    if not hidden_states:
        raise ValueError("hidden_states must hold the states of at least one layer, got none")
    for states in hidden_states:
        if states.ndim != 3 or states.shape[:2] != attention_mask.shape:
            expected = (*attention_mask.shape, "d")
            raise ValueError(f"hidden_states must have shape {expected} as attention_mask has, got {tuple(states.shape)}")
    mask = attention_mask.bool()
    if not mask.any(dim=1).all():
        raise ValueError("attention_mask must have a token in each row, got a row of zeros")
    rows, length = torch.arange(len(mask), device=mask.device), mask.shape[1]
    if pooling == "mean":
        vectors = [_mean(states, mask) for states in hidden_states]
    else:
        first, last = mask.int().argmax(dim=1), length - 1 - mask.flip(1).int().argmax(dim=1)
        vectors = [states[rows, first if pooling == "cls" else last] for states in hidden_states]
    stacked = torch.stack(vectors)
    return F.normalize(stacked, dim=-1) if normalize else stacked


def srl_loss(
    query_layers: Float[Tensor, "layers batch dim"],
    passage_layers: Float[Tensor, "layers passages dim"],
    sizes: Sizes,
    *,
    temperature: float = 1.0,
    kl_weight: float = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, "*batch"]:
    r"""Contrastive loss at every size, and the distance of the smaller ones from the largest.

    With the scores of size k, $s_k = q^{n_k}_{:d_k} \cdot c^{n_k}_{:d_k}$, and $p_k = \mathrm{softmax}(s_k / \tau)$ over all
    passages of the batch:

    $$ L = \mathrm{CE}(p_m) + \sum_{k<m} \bigl[ \mathrm{CE}(p_k) + w\,\mathrm{KL}(\mathrm{sg}(p_m) \,\Vert\, p_k) \bigr] $$

    It is a sum over sizes and not a mean, and no gradient reaches $p_m$ through the divergence.

    Args:
        query_layers: embeddings of the queries after each layer, (L + 1, B, d), see `pool_layers`.
        passage_layers: of the passages, (L + 1, B·g, d): rows i·g to i·g + g - 1 belong to query i, the first is its positive.
        sizes: (layer, dim), both strictly growing, layer in [1, L] and dim in [1, d]. The last teaches the others.
        temperature: τ, positive. The paper's 1 goes with inner products of unnormalised embeddings; cosines want 0.01 to 0.1.
        kl_weight: w, at least 0.
        reduction: `"mean"`, `"sum"` or `"none"` (one loss per query).

    Returns:
        The loss, in the dtype of `query_layers`. Scores are computed in float32 or wider, under autocast too.

    Warns:
        UserWarning: the last size is not the full model, which then is not trained.

    Raises:
        ValueError: shapes or sizes that do not belong together, a number out of range, an unknown `reduction`.

    Source:
        Zhuang et al., "Starbucks: Improved Training for 2D Matryoshka Embeddings", 2024, arXiv 2410.13230, as in the code for
        retrieval. That code keeps B·N·d numbers a size until it sums; here a product of matrices makes B·N.
    """
    for name, value in (("query_layers", query_layers), ("passage_layers", passage_layers)):
        if value.ndim != 3 or not value.is_floating_point():
            raise ValueError(f"{name} must be floating point of shape (L + 1, B, d), got {value.dtype} {tuple(value.shape)}")
    layers, rows, width = query_layers.shape
    passages = passage_layers.shape[1]
    if passage_layers.shape[::2] != (layers, width) or not rows or not passages or passages % rows:
        raise ValueError(
            f"passage_layers must have shape ({layers}, g·{rows}, {width}) with a whole number g of passages a query, "
            f"got {tuple(passage_layers.shape)}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    _check_weight("kl_weight", kl_weight)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    sizes = check_sizes(sizes, layers - 1, width)

    own = torch.arange(rows, device=query_layers.device) * (passages // rows)
    full = _log_probabilities(query_layers, passage_layers, *sizes[-1], temperature)
    loss, teacher = F.nll_loss(full, own, reduction="none"), full.detach()
    for layer, dim in sizes[:-1]:
        student = _log_probabilities(query_layers, passage_layers, layer, dim, temperature)
        loss = loss + F.nll_loss(student, own, reduction="none")
        if kl_weight:
            loss = loss + kl_weight * F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    return (loss if reduction == "none" else getattr(loss, reduction)()).to(query_layers.dtype)


def _log_probabilities(queries: Tensor, passages: Tensor, layer: int, dim: int, temperature: float) -> Tensor:
    """Of each passage for each query, at a size."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries[layer, :, :dim].to(dtype) @ passages[layer, :, :dim].to(dtype).T
    return (scores / temperature).log_softmax(dim=-1)


class StarbucksLoss(nn.Module):
    r"""Any sentence-transformers loss at every size of a fixed list, as a sentence-transformers loss.

    With $e_m$ the model's embeddings, $e_k$ what it makes of the states after layer $n_k$ (by pooling and all that follows), and
    $e_{k,d}$ the first $d$ numbers of it:

    $$ L = \ell(e_m) + \sum_{k<m} \bigl[ \ell(e_{k,d_k} / \lVert e_{k,d_k} \rVert)
       + 0.3\,w\,\mathrm{KL}(\mathrm{softmax}(\mathrm{sg}(e_{m,d_k})) \,\Vert\, \mathrm{softmax}(e_{k,d_k})) \bigr] $$

    The softmax is over the numbers of an embedding, before it gets unit length. The transformer runs once a step, whatever the
    number of sizes. The model is as it was after each step, and after an error.

    Args:
        model: the `SentenceTransformer` to train; its first module is a `Transformer`.
        loss: a loss on the same model, e.g. `MultipleNegativesRankingLoss(model)`. Not one that embeds in its backward pass
            (`Cached...Loss`).
        sizes: (layer, dim), both strictly growing; see `default_sizes`. The last teaches the others.
        kl_weight: w, at least 0.
        kl_scale: the factor beside it, at least 0. The code calls it a temperature, but it divides nothing.
        detach_teacher: whether the divergence leaves the teacher alone. The paper's code for this loss lets it move the teacher.

    Warns:
        UserWarning: the last size is not the full model, which then is not trained.

    Raises:
        ValueError: sizes that the model does not have, a loss on another model or with a gradient cache, a number out of range.
            In `forward`: a loss that embeds other texts at one size than at another.
        ImportError: sentence-transformers is not there.

    Source:
        arXiv 2410.13230, as in its code for sentence similarity, which is written for width 768 and whose last size gets unit
        length, too. A model with a norm after its last layer (Llama, ModernBERT) has it after a smaller one too, here and in
        `extract_submodel`; the paper trains BERT, which has none. `detach_teacher=True` is our choice.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        sizes: Sizes,
        kl_weight: float = 1.0,
        kl_scale: float = 0.3,
        detach_teacher: bool = True,
    ) -> None:
        super().__init__()
        transformer = _transformer(model)
        if getattr(loss, "uses_gradient_cache", False):
            raise ValueError(
                f"loss must embed in its forward pass, got {type(loss).__name__}, which does so in the backward pass"
            )
        if not any(module is model for module in loss.modules()):
            raise ValueError(f"loss must be a loss on the same model, got {type(loss).__name__} on another")
        _check_weight("kl_weight", kl_weight)
        _check_weight("kl_scale", kl_scale)
        self.model = model
        self.loss = loss
        self.sizes = check_sizes(sizes, len(_layers(transformer)), _embedding_dim(model))
        self.kl_weight = kl_weight
        self.kl_scale = kl_scale
        self.detach_teacher = detach_teacher

    def forward(self, sentence_features: Iterable[Any], labels: Tensor | None = None) -> Float[Tensor, ""]:
        features = list(sentence_features)
        with _at_sizes(_unwrap(self.model)) as at:
            at.size = self.sizes[-1]
            total, teacher = self.loss(features, labels), at.embeddings()
            teacher = teacher.detach() if self.detach_teacher else teacher
            for layer, dim in self.sizes[:-1]:
                at.size = layer, dim
                total = total + self.loss(features, labels)
                student = at.embeddings()
                if self.kl_weight * self.kl_scale:
                    log_p, log_q = (each[:, :dim].float().log_softmax(dim=-1) for each in (teacher, student))
                    divergence = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
                    total = total + self.kl_scale * self.kl_weight * divergence
        return total

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card records."""
        names = ("sizes", "kl_weight", "kl_scale", "detach_teacher")
        return {"loss": type(self.loss).__name__, **{name: getattr(self, name) for name in names}}


class _AtSize:
    """A model's forward pass at a size. The states of a batch are computed at the first size and kept for the others."""

    def __init__(self, model: Any) -> None:
        self.transformer, self.run_transformer, self.run_model = model[0], model[0].forward, model.forward
        self.layers = len(_layers(_transformer(model)))
        self.norm = _final_norm(_transformer(model))
        self.full = _embedding_dim(model)
        self.calls: list[tuple[Tensor | None, dict[str, Any]]] = []  # texts, and the transformer's output
        self.raw: list[Tensor] = []  # embeddings as they come out of the model
        self._size = (self.layers, self.full)

    @property
    def size(self) -> tuple[int, int]:
        return self._size

    @size.setter
    def size(self, size: tuple[int, int]) -> None:
        self._size = size
        self.raw = []

    def embeddings(self) -> Tensor:
        return torch.cat(self.raw)

    def transform(self, features: MutableMapping[str, Any], **kwargs: Any) -> Any:
        call, texts = len(self.raw), features.get("input_ids")
        if call == len(self.calls):
            config = self.transformer.auto_model.config
            before = config.output_hidden_states
            config.output_hidden_states = True
            try:
                self.calls.append((texts, self.run_transformer(dict(features), **kwargs)))
            finally:
                config.output_hidden_states = before
        seen, output = self.calls[call]
        if seen is not texts and (seen is None or texts is None or not torch.equal(seen, texts)):
            raise ValueError("loss must embed the same texts in the same order at every size, it did not")
        output = dict(output)
        states = output.pop("all_layer_embeddings")
        layer, _ = self.size
        if layer < self.layers:
            output["token_embeddings"] = self.norm(states[layer])
        return output

    def embed(self, features: MutableMapping[str, Any], **kwargs: Any) -> Any:
        output = self.run_model(features, **kwargs)
        embedding, (layer, dim) = output["sentence_embedding"], self.size
        self.raw.append(embedding)
        if (layer, dim) != (self.layers, self.full):
            output["sentence_embedding"] = F.normalize(embedding[:, :dim], dim=-1)
        return output


@contextmanager
def _at_sizes(model: Any) -> Iterator[_AtSize]:
    """Put the forward passes of `_AtSize` in the place of the model's own: inner losses call the model they hold."""
    at = _AtSize(model)
    before = [(module, vars(module).get("forward")) for module in (model[0], model)]
    model[0].forward, model.forward = at.transform, at.embed
    try:
        yield at
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward  # the class's own shows again
            else:
                module.forward = forward


def extract_submodel(model: Any, layer: int, dim: int | None = None) -> Any:
    """The model of one size, as its host knows models: it saves and loads without this package.

    Args:
        model: a `SentenceTransformer`, or a transformers model.
        layer: how many layers stay, in [1, L].
        dim: how many numbers of an embedding stay: the `truncate_dim` of the result, which `encode` applies and `save_pretrained`
            keeps. All by default. Only for a `SentenceTransformer`, since a transformers model has states and no embeddings.

    Returns:
        A copy with the later layers gone, on the same device, with the model's prompts and similarity function. `encode` does
        not scale what it has cut to unit length: search by cosine, or with `normalize_embeddings=True`.

    Raises:
        ValueError: sizes that the model does not have, or a model whose layers are not found.

    Source:
        arXiv 2410.13230: what is deployed after training. A norm after the last layer stays, see `StarbucksLoss`.
    """
    if not hasattr(model, "encode"):
        if dim is not None:
            raise ValueError(f"dim goes with a SentenceTransformer, got dim={dim} and a {type(model).__name__}")
        return _first_layers(copy.deepcopy(model), layer)
    full = _embedding_dim(model)
    if dim is not None and not 1 <= dim <= full:
        raise ValueError(f"dim must be in [1, {full}], got {dim}")
    # The modules and not the model, which after training holds on to its trainer and data.
    modules = OrderedDict((name, copy.deepcopy(module)) for name, module in model.named_children())
    _first_layers(next(iter(modules.values())).auto_model, layer)
    small = type(model)(
        modules=modules,
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
        truncate_dim=model.truncate_dim if dim in (None, full) else dim,
    )
    small.module_kwargs = copy.copy(model.module_kwargs)
    return small.train(model.training)


def _first_layers(transformer: Any, layer: int) -> Any:
    layers = _layers(transformer)
    if not 1 <= layer <= len(layers):
        raise ValueError(f"layer must be in [1, {len(layers)}], the number of layers, got {layer}")
    del layers[layer:]
    config = transformer.config.get_text_config()
    config.num_hidden_layers = layer
    if getattr(config, "layer_types", None):  # which layers attend how, one entry each
        config.layer_types = list(config.layer_types)[:layer]
    return transformer


def check_sizes(sizes: Sizes, layers: int, width: int) -> list[tuple[int, int]]:
    """The sizes as pairs, if a model with so many layers of this width has them."""
    pairs = [tuple(size) for size in sizes]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"sizes must be pairs (layer, dim), at least one, got {list(sizes)}")
    for (layer, dim), (next_layer, next_dim) in pairwise(pairs):
        if not (layer < next_layer and dim < next_dim):
            raise ValueError(f"sizes must grow strictly in layers and in dim, got {(layer, dim)} before {(next_layer, next_dim)}")
    if pairs[0][0] < 1 or pairs[-1][0] > layers:
        raise ValueError(f"sizes must have layers in [1, {layers}], got {pairs[0][0]} to {pairs[-1][0]}")
    if pairs[0][1] < 1 or pairs[-1][1] > width:
        raise ValueError(f"sizes must have dim in [1, {width}], got {pairs[0][1]} to {pairs[-1][1]}")
    if pairs[-1] != (layers, width):
        warnings.warn(f"the last size is {pairs[-1]}: the full model, {(layers, width)}, is not trained", stacklevel=3)
    return [(int(layer), int(dim)) for layer, dim in pairs]


def _check_weight(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    return (wide.masked_fill(~mask[..., None], 0).sum(dim=1) / mask.sum(dim=1, keepdim=True)).to(states.dtype)


def _unwrap(model: Any) -> Any:
    """The model itself, of one wrapped for several devices or compiled."""
    while not hasattr(model, "encode"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise ValueError(f"model must be a SentenceTransformer, got {type(model).__name__}")
        model = inner
    return model


def _transformer(model: Any) -> Any:
    first = next(iter(model.children()), None) if hasattr(model, "encode") else None
    transformer = getattr(first, "auto_model", None)
    if transformer is None:
        raise ValueError(f"model must be a SentenceTransformer that begins with a Transformer, got {type(model).__name__}")
    return transformer


def _embedding_dim(model: Any) -> int:
    """Before `truncate_dim`."""
    with model.truncate_embeddings(None):
        return int(model.get_embedding_dimension())


def _layers(transformer: nn.Module) -> nn.ModuleList:
    """The first list with as many modules as the configuration has layers."""
    count = transformer.config.get_text_config().num_hidden_layers
    for module in transformer.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"model must keep its {count} layers in a list, {type(transformer).__name__} does not")


def _final_norm(transformer: nn.Module) -> nn.Module:
    """What a model applies after its last layer, under the names that hosts have for it. BERT has nothing there."""
    for name in ("norm", "final_norm", "ln_f", "final_layer_norm", "final_layernorm"):
        if isinstance(norm := getattr(transformer, name, None), nn.Module):
            return norm
    return nn.Identity()
