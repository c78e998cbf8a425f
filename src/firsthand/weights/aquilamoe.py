"""AquilaMoE's EfficientScale: grow a trained decoder in width and depth, then copy its MLPs into the experts of a sparse one.

Needs transformers (`pip install 'firsthand[hf]'`) for `scale_out`; the other functions work on whatever model they are given.
"""

import copy
import math
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# The models whose weights we know one by one, and the sparse model of transformers that is the same around its MLPs.
_HOSTS = {
    "LlamaForCausalLM": "Mixtral",
    "MistralForCausalLM": "Mixtral",
    "Qwen2ForCausalLM": "Qwen2Moe",
    "Qwen3ForCausalLM": "Qwen3Moe",
}
# What the (rows, columns) of each of their weights are: the stream that all layers share, the query heads, the MLP's inner units.
# None never grows. An embedding and a gain have the stream's channels as what they put out.
_AXES = {
    "embed_tokens": ("stream", None),
    "lm_head": (None, "stream"),
    "norm": ("stream", None),
    "input_layernorm": ("stream", None),
    "post_attention_layernorm": ("stream", None),
    "q_proj": ("heads", "stream"),
    "k_proj": (None, "stream"),
    "v_proj": (None, "stream"),
    "o_proj": ("stream", "heads"),
    "q_norm": (None, None),
    "k_norm": (None, None),
    "gate_proj": ("inner", "stream"),
    "up_proj": ("inner", "stream"),
    "down_proj": ("stream", "inner"),
}
_FROM_ABOVE = ("q_proj", "gate_proj", "up_proj")  # new units of these come from the next layer under AKI
_FROM_ABOVE_TOO = ("o_proj", "down_proj")  # and of these with aki_residual


def width_map(old: int, new: int, kind: str = "cyclic", generator: torch.Generator | None = None) -> Int64[Tensor, " new"]:
    r"""Which of `old` units each of `new` units is a copy of; the first `old` are themselves.

    $$ g(j) = j \bmod d \quad\text{(cyclic)}, \qquad g(j) = j \text{ if } j < d, \text{ else uniform in } [0, d)
       \quad\text{(random)} $$

    Args:
        old: number of units, at least 1.
        new: number of units after growth, at least `old`.
        kind: `"cyclic"`, or `"random"`.
        generator: draws the random copies.

    Raises:
        ValueError: a size is out of range, or an unknown `kind`.

    Source:
        AquilaMoE, arXiv 2408.06567, copies from left to right. `"random"` is bert2BERT's, arXiv 2110.07143 (from memory of
        the paper, unverified).
    """
    _check_growth("new", old, new)
    if kind not in ("cyclic", "random"):
        raise ValueError(f"kind must be 'cyclic' or 'random', got {kind!r}")
    if kind == "cyclic":
        return torch.arange(new) % old
    return torch.cat([torch.arange(old), torch.randint(old, (new - old,), generator=generator)])


def depth_map(old: int, new: int, method: str = "interpolation") -> list[int]:
    r"""Which of `old` layers each of `new` layers is a copy of.

    $$ l \mapsto \lfloor l \cdot L_1 / L_2 \rfloor \quad\text{(interpolation)}, \qquad l \mapsto l \bmod L_1
       \quad\text{(stacking)} $$

    Args:
        old: number of layers L₁, at least 1.
        new: number of layers L₂ after growth, at least `old`.
        method: `"interpolation"` repeats each layer in its place, `"stacking"` begins again after the last.

    Raises:
        ValueError: a size is out of range, or an unknown `method`.

    Source:
        arXiv 2408.06567, equation 3, which prints L₂ / L₁ for the interpolation: that would run past the last layer.
    """
    _check_growth("new", old, new)
    if method not in ("interpolation", "stacking"):
        raise ValueError(f"method must be 'interpolation' or 'stacking', got {method!r}")
    return [layer * old // new if method == "interpolation" else layer % old for layer in range(new)]


def expand_linear(
    weight: Float[Tensor, "out in"],
    in_map: Int64[Tensor, " in_new"],
    out_map: Int64[Tensor, " out_new"],
    upper: Float[Tensor, "out in"] | None = None,
) -> Float[Tensor, "out_new in_new"]:
    r"""A larger matrix that does to copied inputs what `weight` did, and copies its outputs.

    $$ W'_{ji} = \frac{W_{g_\mathrm{out}(j)\, g_\mathrm{in}(i)}}{C_{g_\mathrm{in}(i)}}, \qquad
       C_k = |\{i : g_\mathrm{in}(i) = k\}| $$

    With `x' = x[in_map]` it follows that `W' @ x' == (W @ x)[out_map]`. With `upper`, the weight of the next layer, an output
    that is not the first copy of its source is taken from there instead (AKI): it still gets inputs it understands, but is no
    longer a twin, which would get the same gradient for ever.

    Args:
        weight: of an `nn.Linear`, so outputs are rows.
        in_map: source of each new input (`width_map`). Every old input must have a copy.
        out_map: source of each new output.
        upper: the same weight of the layer above, for AKI.

    Returns:
        A new tensor, of the dtype and on the device of `weight`.

    Raises:
        ValueError: a map is out of range, or leaves out an input, or `upper` has another shape.

    Source:
        arXiv 2408.06567, equation 1 (FPI) and the equation of AKI after it. The paper writes matrices as inputs × outputs.
    """
    out_size, in_size = weight.shape
    for name, index, size in (("in_map", in_map, in_size), ("out_map", out_map, out_size)):
        outside = index[(index < 0) | (index >= size)]
        if len(outside):
            raise ValueError(f"{name} must be in [0, {size}), got {int(outside[0])}")
    copies = torch.bincount(in_map, minlength=in_size)
    if not copies.all():
        raise ValueError(f"in_map must name each of {in_size} inputs, input {int((copies == 0).nonzero()[0])} is left out")
    if upper is not None and upper.shape != weight.shape:
        raise ValueError(f"upper must have shape {tuple(weight.shape)} like weight, got {tuple(upper.shape)}")
    if torch.equal(in_map.cpu(), torch.arange(in_size)):
        return _copy_rows(weight, out_map, upper)

    def read(matrix: Tensor) -> Tensor:  # before the rows are copied: there are fewer of them
        return matrix.div(copies.to(matrix)).index_select(1, in_map.to(matrix.device))

    return _copy_rows(read(weight), out_map, None if upper is None else read(upper))


def _copy_rows(own: Tensor, out_map: Tensor, upper: Tensor | None = None) -> Tensor:
    rows = own.index_select(0, out_map.to(own.device))
    if upper is not None:
        extra = _not_first(out_map).nonzero().squeeze(1)
        rows.index_copy_(0, extra.to(own.device), upper.index_select(0, out_map[extra].to(upper.device)).to(own))
    return rows


def _not_first(index: Tensor) -> Tensor:
    """Where an entry of the map has occurred before."""
    place = torch.arange(len(index))
    first = torch.full((int(index.max()) + 1 if len(index) else 0,), len(index))
    return place != first.scatter_reduce(0, index.cpu(), place, "amin")[index.cpu()]


@torch.no_grad()
def grow_width(
    model: Any,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_attention_heads: int | None = None,
    method: str = "fpi",
    aki_residual: bool = False,
    kind: str = "cyclic",
    generator: torch.Generator | None = None,
    untie: bool = False,
) -> Any:
    """A wider model that computes the same (FPI), or nearly knows the same and can use its new width (AKI).

    Each new channel of the stream, query head or inner unit of an MLP is a copy of an old one, and whatever reads copies divides
    by their number. Heads grow inside their group of grouped-query attention: the number of key and value heads and the size of
    a head stay, so the cache stays as small as it was, and a model with as many key as query heads becomes a grouped one.

    FPI keeps the function exactly (up to rounding) where `hidden_size` grows by an integer factor; heads and inner units may grow
    by any. Otherwise some channels of the stream count more than others in each RMSNorm; a warning then says by how much that
    moves the logits. Copies under FPI are twins: they get the same gradient in every step and stay equal, apart from dropout,
    so the new width is of use only where something breaks the symmetry. AKI does: query heads and inner units beyond the
    old ones come from the next layer (the last layer takes its own), which does change the function.

    Args:
        model: `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM`. Left as it is.
        hidden_size: channels of the stream; None for as many as now, also below.
        intermediate_size: inner units of an MLP.
        num_attention_heads: query heads, a multiple of the number of key and value heads.
        method: `"fpi"` or `"aki"`.
        aki_residual: with AKI, also take the new channels that attention and MLP write to the stream from the next layer.
        kind: which units are copied, see `width_map`. With `"random"`, more of the stream is never exact.
        generator: draws the random copies.
        untie: give a model whose head is its embedding a head of its own. Such a model cannot have more channels otherwise: its
            head would have to be divided and its embedding not.

    Returns:
        A new model of the same class, dtype, device and mode, that shares no memory with `model`. It is saved and loaded as any.

    Raises:
        ValueError: a model we do not know, a size that shrinks or does not fit, a tied model, or an unknown `method` or `kind`.

    Source:
        arXiv 2408.06567, section on scale-up; FPI and AKI go back to Net2Net and bert2BERT. The rule for groups is the paper's.
        `aki_residual` and `kind` are what bert2BERT does, from memory of the paper, unverified. Qwen3's norms of queries and keys
        stay the layer's own, our choice; so does the bias of an output, which is copied.
    """
    _check_host(model)
    if method not in ("fpi", "aki"):
        raise ValueError(f"method must be 'fpi' or 'aki', got {method!r}")
    config, heads = copy.deepcopy(model.config), model.config.num_attention_heads
    wanted = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_attention_heads": num_attention_heads,
    }
    sizes = {name: getattr(config, name) if size is None else size for name, size in wanted.items()}
    for name, size in sizes.items():
        _check_growth(name, getattr(config, name), size)
    groups = config.num_key_value_heads
    if sizes["num_attention_heads"] % groups:
        raise ValueError(
            f"num_attention_heads must be a multiple of the {groups} key and value heads, got {sizes['num_attention_heads']}"
        )
    if sizes["hidden_size"] % sizes["num_attention_heads"] and hasattr(config, "validate_architecture"):
        raise ValueError(  # transformers would save such a Llama and then refuse to load it
            f"hidden_size must be a multiple of num_attention_heads for a Llama, "
            f"got {sizes['hidden_size']} and {sizes['num_attention_heads']}"
        )
    if config.tie_word_embeddings and sizes["hidden_size"] > config.hidden_size and not untie:
        raise ValueError("model ties its head to its embedding and could not have a larger hidden_size: pass untie=True")

    in_group = width_map(heads // groups, sizes["num_attention_heads"] // groups, kind, generator)
    head = (torch.arange(groups)[:, None] * (heads // groups) + in_group).flatten()
    dim = _head_dim(config)
    maps = {
        "stream": width_map(config.hidden_size, sizes["hidden_size"], kind, generator),
        "heads": (head[:, None] * dim + torch.arange(dim)).flatten(),
        "inner": width_map(config.intermediate_size, sizes["intermediate_size"], kind, generator),
    }
    from_above = _FROM_ABOVE + _FROM_ABOVE_TOO * aki_residual if method == "aki" else ()
    old, state = model.state_dict(), {}
    for key, weight in old.items():
        name = key.split(".")[-2]
        upper = old.get(_in_layer(key, _layer(key) + 1), weight) if name in from_above else None
        state[key] = _expand(weight, name, key.endswith(".bias"), maps, upper)

    for name, size in (sizes | {"head_dim": dim}).items():
        setattr(config, name, size)
    config.tie_word_embeddings = config.tie_word_embeddings and not untie
    grown = _build(type(model), config, state, model)
    if method == "fpi" and len(torch.bincount(maps["stream"]).unique()) > 1:
        warnings.warn(
            f"hidden_size {sizes['hidden_size']} does not copy all {model.config.hidden_size} channels equally often: "
            f"RMSNorm sees other statistics, which moves logits by up to {_deviation(model, grown):.3g} on random tokens",
            stacklevel=3,  # past no_grad
        )
    return grown


def _expand(weight: Tensor, name: str, is_bias: bool, maps: dict[str, Tensor], upper: Tensor | None) -> Tensor:
    rows, columns = _AXES[name]
    if name == "embed_tokens":  # looked up, not multiplied: a row is a token
        return weight.index_select(1, maps["stream"].to(weight.device))
    out_map = maps[rows] if rows else torch.arange(len(weight))
    if weight.ndim == 1 or is_bias:
        return _copy_rows(weight, out_map, upper)
    return expand_linear(weight, maps[columns] if columns else torch.arange(weight.shape[1]), out_map, upper)


@torch.no_grad()
def grow_depth(model: Any, num_hidden_layers: int, method: str = "interpolation") -> Any:
    """A deeper model whose layers are copies of the old ones; see `depth_map` for which.

    The function changes. In the paper interpolation changes it less: a layer's input still comes from much the same layers.

    Args:
        model: as for `grow_width`. Left as it is.
        num_hidden_layers: layers of the new model, at least as many as now.
        method: `"interpolation"` or `"stacking"`.

    Returns:
        A new model, as from `grow_width`.

    Raises:
        ValueError: a model we do not know, fewer layers, or an unknown `method`.

    Source:
        arXiv 2408.06567, equations 2 and 3.
    """
    _check_host(model)
    config = copy.deepcopy(model.config)
    _check_growth("num_hidden_layers", config.num_hidden_layers, num_hidden_layers)
    sources = depth_map(config.num_hidden_layers, num_hidden_layers, method)
    copies: dict[int, list[int]] = {}
    for layer, source in enumerate(sources):
        copies.setdefault(source, []).append(layer)
    state = {}
    for key, weight in model.state_dict().items():
        for layer in copies.get(_layer(key), [-1]):
            state[_in_layer(key, layer)] = weight.clone()
    config.num_hidden_layers = num_hidden_layers
    if getattr(config, "layer_types", None):  # Qwen's: full or sliding attention, layer by layer
        config.layer_types = [model.config.layer_types[source] for source in sources]
    return _build(type(model), config, state, model)


def scale_up(model: Any, target_config: Any, *, width: str = "aki", depth: str = "interpolation") -> Any:
    """Grow a trained model to the sizes of another configuration, first in width and then in depth.

    As it stands this is AKI-Pro, the paper's recipe; `width="aki", depth="stacking"` is bert2BERT's, and `width="fpi"` starts
    from a lower loss.

    Args:
        model: as for `grow_width`. Left as it is.
        target_config: configuration of the same kind of model. Its hidden size, intermediate size, number of query heads and
            number of layers are used, and whether it ties the embeddings; what else changes the function must be as in `model`.
        width: as `method` of `grow_width`.
        depth: as `method` of `grow_depth`.

    Returns:
        A new model, as from `grow_width`; all that is not a size is configured as in `model`.

    Raises:
        ValueError: the target is smaller somewhere, or is another kind of model, or has another number of key and value heads,
            another size of heads, another vocabulary, or anything else that would change what the weights mean.

    Source:
        arXiv 2408.06567. The paper names whole recipes (FPI, AKI, AKI-Pro); two choices that do not depend on each other are two
        arguments here. The order, width before depth, is the paper's.
    """
    _check_host(model)
    source = model.config
    if _head_dim(target_config) != _head_dim(source):
        raise ValueError(f"target_config must keep head_dim {_head_dim(source)}, got {_head_dim(target_config)}")
    for name in ("model_type", "vocab_size", "num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters",
                 "sliding_window", "attention_bias", "mlp_bias"):  # fmt: skip
        ours, theirs = getattr(source, name, None), getattr(target_config, name, None)
        if ours != theirs:
            raise ValueError(f"target_config must keep {name} {ours!r}, got {theirs!r}")
    if target_config.tie_word_embeddings and not source.tie_word_embeddings:
        raise ValueError("target_config must not tie the embeddings of a model that has them apart")
    _check_growth("num_hidden_layers", source.num_hidden_layers, target_config.num_hidden_layers)
    wide = grow_width(
        model,
        hidden_size=target_config.hidden_size,
        intermediate_size=target_config.intermediate_size,
        num_attention_heads=target_config.num_attention_heads,
        method=width,
        untie=not target_config.tie_word_embeddings,
    )
    return grow_depth(wide, target_config.num_hidden_layers, depth)


@torch.no_grad()
def scale_out(
    model: Any, num_experts: int = 8, top_k: int = 2, router_std: float | None = None, generator: torch.Generator | None = None
) -> Any:
    r"""Upcycle a dense model: a sparse one of transformers whose experts are all copies of its MLPs.

    $$ y = \sum_{e \in \mathrm{top}\,k} \frac{p_e}{\sum_{e' \in \mathrm{top}\,k} p_{e'}}\, \mathrm{MLP}(x) = \mathrm{MLP}(x),
       \qquad p = \mathrm{softmax}(R x), \quad R_{ei} \sim \mathcal N(0, \sigma^2) $$

    The weights of the chosen experts sum to 1, so whatever the router says, the new model computes what the old one did. The
    experts part in training, as they see different tokens. To balance the load, the paper adds the usual balance loss × 0.001
    (the configuration has this factor; `config.output_router_logits = True` switches transformers' own loss on) and a z-loss
    × 0.01; both are in `firsthand.moe.balance`.

    Args:
        model: as for `grow_width`. Left as it is. Llama and Mistral become `MixtralForCausalLM`, Qwen3 `Qwen3MoeForCausalLM`, and
            Qwen2, for the sake of its biases, `Qwen2MoeForCausalLM` with a shared expert of size 0 and normalised weights.
        num_experts: copies of each MLP, at least 1.
        top_k: experts per token, in `[1, num_experts]`.
        router_std: standard deviation σ of the routers' weights, at least 0; None for the paper's, 0.02 ** 0.5 ≈ 0.14. Many
            others use 0.02, with which the first routing is closer to uniform.
        generator: draws the routers' weights, on the CPU.

    Returns:
        A new model of the same dtype, device and mode, that shares no memory with `model`. transformers saves and loads it.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a model we do not know, or with something the sparse one has no place for (a Llama with biases, a Qwen with
            sliding windows in some layers), or a number out of range.

    Source:
        arXiv 2408.06567, section on scale-out, after sparse upcycling (Komatsuzaki et al., arXiv 2212.05055). The paper prints
        a variance of 0.02 for the router.
    """
    _check_host(model)
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must be in [1, {num_experts}], got {top_k}")
    router_std = 0.02**0.5 if router_std is None else router_std
    if not 0 <= router_std < math.inf:
        raise ValueError(f"router_std must be at least 0 and finite, got {router_std}")
    source, family = model.config, _HOSTS[type(model).__name__]
    if family == "Mixtral" and (getattr(source, "attention_bias", False) or getattr(source, "mlp_bias", False)):
        raise ValueError("model must have no biases (attention_bias, mlp_bias): Mixtral has no place for them")
    if family != "Mixtral" and "sliding_attention" in source.layer_types:
        raise ValueError(f"model must have full attention in all layers: {family} has no sliding windows in some of them")
    try:
        import transformers
    except ImportError as error:
        raise ImportError("scale_out needs transformers: pip install 'firsthand[hf]'") from error

    state: dict[str, Tensor] = {}
    old = model.state_dict()
    for key, weight in old.items():
        if ".mlp." not in key:
            state[key] = weight.clone()
    for layer in range(source.num_hidden_layers):
        mlp = f"model.layers.{layer}.mlp."
        gate, up, down = (old[f"{mlp}{name}_proj.weight"] for name in ("gate", "up", "down"))
        router = router_std * torch.randn(num_experts, source.hidden_size, generator=generator)
        state[f"{mlp}gate.weight"] = router.to(gate)
        state[f"{mlp}experts.gate_up_proj"] = torch.cat([gate, up]).repeat(num_experts, 1, 1)
        state[f"{mlp}experts.down_proj"] = down.repeat(num_experts, 1, 1)
        if family == "Qwen2Moe":
            for name, shape in (("gate", (0, gate.shape[1])), ("up", (0, gate.shape[1])), ("down", (gate.shape[1], 0))):
                state[f"{mlp}shared_expert.{name}_proj.weight"] = gate.new_empty(shape)
            state[f"{mlp}shared_expert_gate.weight"] = gate.new_zeros(1, gate.shape[1])

    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
        "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id", "dtype",
    )  # fmt: skip
    settings = {name: copy.deepcopy(getattr(source, name)) for name in same}
    settings |= {
        "Mixtral": {"num_local_experts": num_experts, "sliding_window": getattr(source, "sliding_window", None)},
        "Qwen2Moe": {"num_experts": num_experts, "shared_expert_intermediate_size": 0},
        "Qwen3Moe": {"num_experts": num_experts, "attention_bias": getattr(source, "attention_bias", False)},
    }[family]
    if family != "Mixtral":
        settings |= {"norm_topk_prob": True, "moe_intermediate_size": source.intermediate_size}
    config = getattr(transformers, f"{family}Config")(
        head_dim=_head_dim(source), num_experts_per_tok=top_k, router_aux_loss_coef=0.001, **settings
    )
    config._attn_implementation = source._attn_implementation
    return _build(getattr(transformers, f"{family}ForCausalLM"), config, state, model)


def _build(kind: Any, config: Any, state: dict[str, Tensor], source: Any) -> Any:
    """A model with these weights. None are initialised first: that would take time, memory and draws of the global generator."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = kind(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    # The only buffers, which no state dict has.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(model.model.embed_tokens.weight.device)
    model.generation_config = copy.deepcopy(source.generation_config)
    return model.train(source.training)


def _deviation(model: Any, grown: Any) -> float:
    device = model.model.embed_tokens.weight.device
    tokens = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0)).to(device)
    logits = []
    for each in (model, grown):
        mode = each.training
        logits.append(each.eval()(tokens, use_cache=False).logits.float())
        each.train(mode)
    return (logits[0] - logits[1]).abs().max().item()


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layer(key: str) -> int:
    """The number of the layer that a weight is of; -1 for what is outside of the layers."""
    return int(key.split(".")[2]) if key.startswith("model.layers.") else -1


def _in_layer(key: str, layer: int) -> str:
    """The key of the same weight in another layer."""
    if not key.startswith("model.layers."):
        return key
    return ".".join(["model", "layers", str(layer), *key.split(".")[3:]])


def _check_host(model: Any) -> None:
    if type(model).__name__ not in _HOSTS:
        raise ValueError(f"model must be one of {', '.join(_HOSTS)}, got {type(model).__name__}")
    for key, weight in model.state_dict().items():
        if key.split(".")[-2] not in _AXES or key.split(".")[-1] not in ("weight", "bias"):
            raise ValueError(f"model must be as transformers makes it, this one has the weight {key} besides")
        if not weight.is_floating_point():
            raise ValueError(f"model must have floating point weights, {key} is {weight.dtype}")


def _check_growth(name: str, old: int, new: int) -> None:
    if old < 1:
        raise ValueError(f"old must be at least 1, got {old}")
    if new < old:
        raise ValueError(f"{name} must be at least {old}, as many as there are, got {new}")
