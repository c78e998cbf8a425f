"""Multi-layer trainable pooling: learned queries read one vector from each layer of a transformer.

Each layer's states are reduced to one vector a text as soon as they are there (`reduce_layers`), so that texts × layers × width
numbers are kept and not texts × layers × tokens × width.
"""

import threading
import warnings
from collections.abc import MutableMapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from firsthand.embed.bidirectional import make_bidirectional
from firsthand.embed.cross_attention import add_cross_attention, attend_and_gate

try:
    from sentence_transformers.base.modules import Module, Transformer
except ImportError:

    class _Missing(nn.Module):
        config_keys: ClassVar[list[str]] = []

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise ImportError(f"{type(self).__name__} needs sentence-transformers 6.2 or later: pip install 'firsthand[embed]'")

    Module = Transformer = _Missing  # type: ignore[assignment, misc]

DESIGNS = ("eos-causal", "last-causal", "multi-causal", "last-bidir", "multi-bidir")


def layer_vectors(
    states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"], token_select: str
) -> Float[Tensor, "batch dim"]:
    """One vector a text from a layer's states: the mean of the tokens in the mask, or the last of them.

    The result holds on to the states no more than their gradient does. Nothing but a product with the mask keeps padding out of
    the mean, so its states must be finite.

    Args:
        states: (B, T, d).
        mask: true for the tokens of a text that count, at least one. Padding may be on either side.
        token_select: `"mean"` or `"last"`.

    Raises:
        ValueError: states of other tokens than the mask's, an unknown `token_select`.
    """
    _check_choice("token_select", token_select, ("mean", "last"))
    if states.shape[:2] != mask.shape:
        raise ValueError(f"states must have shape {(*mask.shape, 'd')} as attention_mask has, got {tuple(states.shape)}")
    if token_select == "last":
        last = mask.shape[1] - 1 - mask.flip(1).to(torch.int32).argmax(dim=1)
        return states[torch.arange(len(mask), device=mask.device), last]
    total = (mask[:, None].to(states.dtype) @ states)[:, 0]  # a product, and not a sum of products: no copy of the states
    return total / mask.sum(dim=1, keepdim=True).to(states.dtype)


class _TrainablePooling(Module):
    """What both poolings share: learned queries, the block that they read with, and how they are saved."""

    def __init__(
        self,
        embedding_dimension: int,
        num_latents: int,
        num_heads: int,
        head_dim: int | None,
        token_select: str,
        normalize: bool,
        include_prompt: bool,
    ) -> None:
        super().__init__()
        for name, value in (("embedding_dimension", embedding_dimension), ("num_latents", num_latents)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.embedding_dimension = embedding_dimension
        self.num_latents = num_latents
        self.token_select = token_select
        self.normalize = normalize
        self.include_prompt = include_prompt
        self.latents = nn.Parameter(torch.randn(num_latents, embedding_dimension))
        add_cross_attention(self, embedding_dimension, num_heads, head_dim)

    def read(
        self, keys: Float[Tensor, "batch keys dim"], valid: Bool[Tensor, "batch keys"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """The mean over the latents of what each of them reads from the keys, at unit length if `normalize`."""
        hidden, gated = attend_and_gate(self, self.latents, keys.to(self.latents.dtype), valid=valid)
        embedding = hidden.mean(dim=-2) + self.ff_out(gated.mean(dim=-2))  # the mean of cross_attend
        return F.normalize(embedding, dim=-1) if self.normalize else embedding

    def get_embedding_dimension(self) -> int:
        return self.embedding_dimension

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, **kwargs: Any) -> Any:
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        module = cls(**cls.load_config(model_name_or_path, **hub))
        return cls.load_torch_weights(model_name_or_path, model=module, **hub)


class MultiLayerTrainablePooling(_TrainablePooling):
    r"""Pool over the layers of a transformer, as a module of sentence-transformers.

    $$ X_l = \mathrm{select}_t(h^l_t) + P_l, \qquad Z = \mathrm{block}(\Lambda, X), \qquad
       e = \tfrac1r \sum_i Z_i \,/\, \lVert\cdot\rVert_2 $$

    $h^l$ are the states after layer l = 1..L (the embeddings before the first are left out, the last are those after the model's
    final norm), P a learned vector for each layer, Λ learned queries, and the block is `cross_attend`: cross-attention from Λ to
    the L vectors, then a gated feed-forward block.

    Give a model its vectors with `reduce_layers(model)`. A model that hands over all its hidden states
    (`model[0].auto_model.config.output_hidden_states = True`) works too and needs L times the memory of its states.

    Parameters: `latents` (r, d), `layer_pos.weight` (L, d), and those of `add_cross_attention`.

    Args:
        embedding_dimension: d, width of the model and of the embedding.
        num_layers: L.
        num_latents: r; in the paper's code 768, 64 by default is our choice.
        num_heads: heads of the cross-attention; in the paper's code 32.
        head_dim: width of a head; by default d / heads, our choice, in the paper's code 2048 for d = 4096.
        token_select: `"mean"` of a text's tokens, for bidirectional models, or `"last"` token, for causal ones.
        normalize: whether embeddings get unit length.
        include_prompt: whether the tokens of the prompt count in the mean.

    Raises:
        ValueError: an argument out of range. In `forward`: no layers at hand, another number of them, a text without tokens.

    Source:
        Tang and Yang, "Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models?", 2024, arXiv
        2409.02727; sizes, initial values and the feed-forward block as in its code.
    """

    config_keys: ClassVar[list[str]] = [
        "embedding_dimension", "num_layers", "num_latents", "num_heads", "head_dim", "token_select", "normalize",
        "include_prompt",
    ]  # fmt: skip

    def __init__(
        self,
        embedding_dimension: int,
        num_layers: int,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int | None = None,
        token_select: str = "mean",
        normalize: bool = True,
        include_prompt: bool = True,
    ) -> None:
        _check_choice("token_select", token_select, ("mean", "last"))
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        super().__init__(embedding_dimension, num_latents, num_heads, head_dim, token_select, normalize, include_prompt)
        self.num_layers = num_layers
        self.layer_pos = nn.Embedding(num_layers, embedding_dimension)

    def forward(self, features: MutableMapping[str, Any], **kwargs: Any) -> MutableMapping[str, Any]:
        vectors = features.get(_key(self.token_select))
        states = features.get("all_layer_embeddings")
        if vectors is None and states is not None:
            mask = _tokens(features, self)
            vectors = torch.stack([layer_vectors(layer, mask, self.token_select) for layer in states[1:]], dim=1)
        if vectors is None:
            raise ValueError(
                f"features must hold the {self.token_select} vector of each layer, which they do after reduce_layers(model), "
                "or all_layer_embeddings, which they do if the model's config.output_hidden_states is true; "
                f"got {', '.join(features)}"
            )
        if vectors.shape[1] != self.num_layers:
            raise ValueError(f"num_layers is {self.num_layers}, the model has {vectors.shape[1]} layers")
        features["sentence_embedding"] = self.read(vectors.to(self.layer_pos.weight.dtype) + self.layer_pos.weight)
        return features


class LastLayerTrainablePooling(_TrainablePooling):
    r"""Pool over the tokens of the last layer by learned queries: what `MultiLayerTrainablePooling` is compared with.

    $$ e = \tfrac1r \sum_i \mathrm{block}(\Lambda, X)_i \,/\, \lVert\cdot\rVert_2 $$

    X are the states of all tokens after the last layer, or of the last token alone. Then attention has one key and nothing to
    choose, and the queries only shape the feed-forward block's input.

    Args:
        embedding_dimension: see `MultiLayerTrainablePooling`, as for all but the next two.
        num_latents: r.
        num_heads: heads of the cross-attention.
        head_dim: width of a head.
        token_select: `"all"` tokens, for bidirectional models, or the `"last"`, for causal ones.
        normalize: whether embeddings get unit length.
        include_prompt: whether the tokens of the prompt are read.
        official_padding: read the states at all positions, padding and prompt too, as the paper's code does (an embedding then
            depends on what it is batched with). Only for `"all"`.

    Raises:
        ValueError: an argument out of range; in `forward`, a text without tokens.

    Source:
        arXiv 2409.02727. We do not read padding, unless asked to.
    """

    config_keys: ClassVar[list[str]] = [
        "embedding_dimension", "num_latents", "num_heads", "head_dim", "token_select", "normalize", "include_prompt",
        "official_padding",
    ]  # fmt: skip

    def __init__(
        self,
        embedding_dimension: int,
        num_latents: int = 64,
        num_heads: int = 8,
        head_dim: int | None = None,
        token_select: str = "all",
        normalize: bool = True,
        include_prompt: bool = True,
        official_padding: bool = False,
    ) -> None:
        _check_choice("token_select", token_select, ("all", "last"))
        if official_padding and token_select != "all":
            raise ValueError("official_padding goes with token_select='all', got 'last'")
        super().__init__(embedding_dimension, num_latents, num_heads, head_dim, token_select, normalize, include_prompt)
        self.official_padding = official_padding

    def forward(self, features: MutableMapping[str, Any], **kwargs: Any) -> MutableMapping[str, Any]:
        states = features["token_embeddings"]
        mask = _tokens(features, self)
        if self.token_select == "last":
            embedding = self.read(layer_vectors(states, mask, "last")[:, None])
        else:
            embedding = self.read(states, None if self.official_padding else mask)
        features["sentence_embedding"] = embedding
        return features


class LayerTransformer(Transformer):
    """The `Transformer` of sentence-transformers, handing over one vector a layer and text: what `reduce_layers` makes.

    The vectors, (B, L, d), are taken by forward hooks on the layers, which are there for the time of a forward pass and serve the
    thread that runs it. So nothing is left behind by an error, a copy or a pickled model, and gradient checkpointing, mixed
    precision and adapters work as they do without.

    Args:
        model_name_or_path: see `Transformer`, as for what else it takes.
        token_select: `"mean"` or `"last"`, see `layer_vectors`.
        include_prompt: whether the tokens of the prompt count in the mean.

    Raises:
        ValueError: in `forward`: a model whose layers are not found or not all run, a text without tokens.

    Source:
        Our way to get at what arXiv 2409.02727 pools without keeping all hidden states, as its code does.
    """

    config_keys: ClassVar[list[str]] = [*Transformer.config_keys, "token_select", "include_prompt"]

    def __init__(
        self, model_name_or_path: str, *, token_select: str = "mean", include_prompt: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(model_name_or_path, **kwargs)
        self._begin(token_select, include_prompt)

    def _begin(self, token_select: str, include_prompt: bool) -> None:
        _check_choice("token_select", token_select, ("mean", "last"))
        self.token_select = token_select
        self.include_prompt = include_prompt
        self.unpad_inputs = False  # texts one after the other, without padding, have no row each to be reduced to
        if getattr(self.config, "is_causal", True) is False:
            make_bidirectional(self.model)  # of which a saved model keeps one half, its configuration

    def forward(self, features: MutableMapping[str, Any], **kwargs: Any) -> MutableMapping[str, Any]:
        mask = _tokens(features, self)
        layers = _layers(self.model)
        vectors: list[Tensor] = []
        thread = threading.get_ident()

        def keep(layer: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                states = output[0] if isinstance(output, tuple) else output
                vectors.append(layer_vectors(states, mask, self.token_select))

        with ExitStack() as hooks:
            for layer in layers[:-1]:
                hooks.callback(layer.register_forward_hook(keep).remove)
            features = super().forward(features, **kwargs)
        vectors.append(
            layer_vectors(features["token_embeddings"], mask, self.token_select)
        )  # the last layer's, after the final norm
        if len(vectors) != len(layers):
            raise ValueError(f"{type(self.model).__name__} has {len(layers)} layers, {len(vectors)} were run")
        features[_key(self.token_select)] = torch.stack(vectors, dim=1)
        return features


def reduce_layers(model: Any) -> Any:
    """Have the transformer of a `SentenceTransformer` hand its `MultiLayerTrainablePooling` one vector a layer and text.

    Its first module becomes a `LayerTransformer`, in place, and stays one when the model is saved. sentence-transformers takes
    modules from other packages for foreign code: load with `SentenceTransformer(path, trust_remote_code=True)`.

    Args:
        model: a `SentenceTransformer` whose first module is a `Transformer` and which has a `MultiLayerTrainablePooling`.

    Returns:
        `model`.

    Raises:
        ValueError: it is not like that, or its transformer has no list of layers, or another number of them than the pooling.

    Source:
        See `LayerTransformer`.
    """
    modules = list(model)
    pooling = next((module for module in modules if isinstance(module, MultiLayerTrainablePooling)), None)
    if pooling is None or type(modules[0]) not in (Transformer, LayerTransformer):
        names = ", ".join(type(module).__name__ for module in modules)
        raise ValueError(f"model must consist of a Transformer and a MultiLayerTrainablePooling, got {names}")
    layers = len(_layers(modules[0].model))
    if layers != pooling.num_layers:
        raise ValueError(f"num_layers is {pooling.num_layers}, the model has {layers} layers")
    modules[0].__class__ = LayerTransformer
    modules[0]._begin(pooling.token_select, pooling.include_prompt)
    return model


def build_design(
    name: str,
    model: Any,
    *,
    num_latents: int = 64,
    num_heads: int = 8,
    head_dim: int | None = None,
    normalize: bool = True,
    include_prompt: bool = True,
) -> Any:
    """One of the five designs that the paper compares, as a `SentenceTransformer` to train.

    | name | attention | embedding |
    |---|---|---|
    | `"eos-causal"` | causal | state of the last token after the last layer |
    | `"last-causal"` | causal | `LastLayerTrainablePooling` of that state |
    | `"multi-causal"` | causal | `MultiLayerTrainablePooling` of the last token's states after all layers |
    | `"last-bidir"` | bidirectional | `LastLayerTrainablePooling` of all tokens |
    | `"multi-bidir"` | bidirectional | `MultiLayerTrainablePooling` of the mean over tokens after each layer |

    Args:
        name: which.
        model: folder or hub name of a decoder, or a sentence-transformers `Transformer`, which becomes part of the result: its
            model is made bidirectional in place where the design is. A model of transformers alone will not do, it lacks the
            tokenizer.
        num_latents: see `MultiLayerTrainablePooling`, as for all that follow. The first design has only `normalize`.
        num_heads: heads of the cross-attention.
        head_dim: width of a head.
        normalize: whether embeddings get unit length.
        include_prompt: whether the tokens of a prompt count where tokens are averaged or all read.

    Returns:
        The model, on the CPU. How to load it once saved: see `reduce_layers`. `"last-bidir"` keeps of its bidirectionality the
        model's configuration: with flash attention call `make_bidirectional` again after loading.

    Warns:
        UserWarning: the design reads the last token, and the tokenizer does not end texts with its EOS token.

    Raises:
        ValueError: an unknown name, a causal design of a model that is bidirectional, or a bidirectional one of a model that
            cannot be made so.

    Source:
        arXiv 2409.02727. `num_latents` and `head_dim` are smaller by default than there.
    """
    _check_choice("name", name, DESIGNS)
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
    except ImportError as error:
        raise ImportError("build_design needs sentence-transformers 6.2 or later: pip install 'firsthand[embed]'") from error

    transformer = Transformer(model) if isinstance(model, str) else model
    if not isinstance(transformer, Transformer):
        raise ValueError(f"model must be a path or a sentence-transformers Transformer, got {type(model).__name__}")
    dim = transformer.get_embedding_dimension()
    pooling_, attention = name.split("-")
    if attention == "bidir":
        make_bidirectional(transformer.model)
    else:
        _check_causal(name, transformer)
    shape: dict[str, Any] = {"num_latents": num_latents, "num_heads": num_heads, "head_dim": head_dim}
    options: dict[str, Any] = {"normalize": normalize, "include_prompt": include_prompt}
    if pooling_ == "eos":
        modules = [Pooling(dim, "lasttoken"), *([Normalize()] if normalize else [])]
    elif pooling_ == "last":
        select = "last" if attention == "causal" else "all"
        modules = [LastLayerTrainablePooling(dim, **shape, **options, token_select=select)]
    else:
        select = "last" if attention == "causal" else "mean"
        modules = [MultiLayerTrainablePooling(dim, len(_layers(transformer.model)), **shape, **options, token_select=select)]
    built = SentenceTransformer(modules=[transformer, *modules], device="cpu")
    return reduce_layers(built) if pooling_ == "multi" else built


def _check_causal(name: str, transformer: Any) -> None:
    if getattr(transformer.config, "is_causal", True) is False:
        raise ValueError(f"model must be causal for the design {name!r}, it has been made bidirectional")
    tokenizer = transformer.tokenizer
    if tokenizer("a")["input_ids"][-1] != tokenizer.eos_token_id:
        warnings.warn(
            f"the tokenizer does not end texts with {tokenizer.eos_token}, so {name!r} reads the state of a word: "
            "set its post-processor, or append the token to every text",
            stacklevel=3,
        )


def _tokens(features: MutableMapping[str, Any], module: Any) -> Bool[Tensor, "batch tokens"]:
    """Which tokens count: no padding, and no prompt where `include_prompt` is false; the last token is no part of a prompt."""
    if "cu_seq_lens_q" in features:
        raise ValueError("texts must be padded, not laid one after the other: set model[0].unpad_inputs = False")
    if "attention_mask" not in features:
        raise ValueError(f"features must hold attention_mask, got {', '.join(features)}")
    mask = features["attention_mask"].bool()
    prompt = features.get("prompt_length")
    if not (module.include_prompt or module.token_select == "last" or prompt is None):
        length = int(prompt.flatten()[0]) if isinstance(prompt, Tensor) else int(prompt)  # the trainer makes a tensor of it
        mask = mask & (mask.cumsum(dim=1) > length)
    if not torch.compiler.is_compiling() and not mask.any(dim=1).all():
        empty = (~mask.any(dim=1)).nonzero()[:, 0].tolist()
        raise ValueError(f"attention_mask must leave a token to pool in each text, behind the prompt; none in rows {empty}")
    return mask


def _layers(model: nn.Module) -> nn.ModuleList:
    """The first list with as many modules as the configuration has layers: lists of experts lie inside a layer."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(model).__name__} has no list of its {count} layers")


def _key(token_select: str) -> str:
    return f"{token_select}_layer_embeddings"


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
