"""Peri-LN: normalise what goes into each sub-layer of a transformer, and what comes out of it."""

import copy
import math
import statistics
from collections.abc import Collection
from contextlib import ExitStack
from functools import cache, partial
from typing import Any, Literal

import torch
import torchmetrics
from jaxtyping import Float
from torch import Tensor, nn

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError:  # GradientSpikes still serves a loop of one's own
    ExportableState = TrainerCallback = object  # type: ignore[assignment, misc]

Placement = Literal["pre", "post", "peri", "output-only"]

# Where hosts keep what a block consists of: norm before the attention, attention, norm before the MLP, MLP. Named one by one and
# not guessed from attributes: some hosts have the same attributes and use them in another order, or add the residual elsewhere.
_LLAMA = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_PRE_NORM = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA, "gpt2": ("ln_1", "attn", "ln_2", "mlp"),
    "granite": _LLAMA, "phi3": _LLAMA, "mixtral": _LLAMA, "qwen3_moe": _LLAMA, "hyperclovax": _LLAMA,
}  # fmt: skip
_OTHER: dict[str, Placement] = {
    "bert": "post", "roberta": "post", "openai-gpt": "post", "gemma2": "peri", "gemma3_text": "peri", "gemma3": "peri",
    "glm4": "peri", "olmo2": "output-only", "olmo3": "output-only",
}  # fmt: skip
_PARALLEL = {"gpt_neox", "gptj", "phi", "cohere", "cohere2", "falcon"}
_SCALED = {"granite", "phi3", "hyperclovax"}  # these do something to a sub-layer's output before they add it


class PeriLN(nn.Module):
    r"""A residual sub-layer that is normalised on both sides, for models of one's own.

    $$ y = x + N_\mathrm{out}(M(N_\mathrm{in}(x))) $$

    Args:
        module: M, an attention or MLP that keeps the last dimension. Of a tuple that it returns, the first is taken.
        dim: size of the last dimension.
        norm: `"rms"` or `"layer"`; both have learnable gains.
        eps: added to the mean square (or variance) under the root.
        gamma_init: initial gain of the output norm; the input norm's is 1. 0 makes an untrained sub-layer silent.

    Raises:
        ValueError: `norm` is unknown, `dim` below 1, `eps` negative or `gamma_init` not finite.

    Source:
        Kim et al., "Peri-LN: Revisiting Normalization Layer in the Transformer Architecture", ICML 2025, arXiv 2502.02732. The
        paper's gains start at 1 (as reported in notes on the paper); another `gamma_init` is our addition.
    """

    def __init__(self, module: nn.Module, dim: int, norm: str = "rms", eps: float = 1e-6, gamma_init: float = 1.0) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if not 0 <= eps < math.inf:
            raise ValueError(f"eps must be at least 0 and finite, got {eps}")
        if norm not in _NORMS:
            raise ValueError(f"norm must be 'rms' or 'layer', got {norm!r}")
        _check_gain(gamma_init)
        self.module = module
        self.norm_in = _NORMS[norm](dim, eps=eps)
        self.norm_out = _NORMS[norm](dim, eps=eps)
        nn.init.constant_(self.norm_out.weight, gamma_init)

    def forward(self, x: Float[Tensor, "... dim"], *args: Any, **kwargs: Any) -> Float[Tensor, "... dim"]:
        """`args` and `kwargs` go to the module."""
        output = self.module(self.norm_in(x), *args, **kwargs)
        return x + self.norm_out(output[0] if isinstance(output, tuple) else output)


_NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


def to_peri_ln(
    model: Any,
    *,
    gamma_init: float = 1.0,
    embedding_norm: bool = False,
    which: Collection[str] = ("attention", "mlp"),
    norm: str = "same",
) -> Any:
    r"""Give a pre-norm decoder of transformers a norm after each sub-layer, before the residual sum.

    $$ h = x + N(\mathrm{Attention}(N(x))), \qquad y = h + N(\mathrm{MLP}(N(h))) $$

    For a model that is to be trained from its initial weights: it changes what a trained model computes. Changes the model in
    place: each block gets `post_norm1` (attention) and `post_norm2` (MLP), names that make the state dict of a converted Llama
    that of a `HyperCLOVAXForCausalLM` with `use_post_norm=True`. No weight or key that was there changes. The new norms run as
    forward hooks of the sub-layers, so generation, caches, gradient checkpointing and adapters work as before; make optimisers
    after the conversion. With all sub-layers converted, `model.config.use_post_norm` becomes True.

    transformers does not know the new norms when it loads: `from_pretrained` would leave them out and warn. Build, convert, then
    load::

        model = to_peri_ln(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))
        safetensors.torch.load_model(model, folder / "model.safetensors")

    Args:
        model: `...ForCausalLM` or bare decoder of Llama, Mistral, Mixtral, Qwen2, Qwen3 (also MoE), GPT-2, Granite, Phi-3, or
            HyperCLOVAX made with `use_post_norm=False`.
        gamma_init: initial gain of the new norms. The paper's is 1; it also finds that freezing it there costs a little.
        embedding_norm: also normalise the token embeddings (`embedding_norm` of the decoder), an option in the paper. It is
            part of the embedding module: what `get_input_embeddings()(ids)` returns is normalised.
        which: the sub-layers to convert: `"attention"`, `"mlp"` or both.
        norm: `"same"` as the block's own, `"rms"` or `"layer"`.

    Returns:
        `model`.

    Raises:
        ValueError: `model` is not one of these or not pre-norm (any more), or an argument is out of range.
        NotImplementedError: its blocks run attention and MLP in parallel, or have cross-attention.

    Source:
        arXiv 2502.02732, the Peri-LN module. Hosts apply dropout, where they have any, inside the sub-layer (GPT-2) or after
        our norm (Phi-3), and scale what is added after our norm (Granite, HyperCLOVAX). Partial conversion is our addition.
    """
    blocks, names = _pre_norm_blocks(model)
    if not which or not set(which) <= {"attention", "mlp"}:
        raise ValueError(f"which must name 'attention', 'mlp' or both, got {which!r}")
    _check_norm(norm, gamma_init)
    for block in blocks:
        if "attention" in which:
            _normalise(block, names[1], "post_norm1", _like(getattr(block, names[0]), norm, gamma_init))
        if "mlp" in which:
            _normalise(block, names[3], "post_norm2", _like(getattr(block, names[2]), norm, gamma_init))
    if embedding_norm:
        decoder = _decoder(model)
        decoder.embedding_norm = _like(getattr(blocks[0], names[0]), norm, 1.0)
        decoder.get_input_embeddings().register_forward_hook(partial(_normalise_output, decoder, "embedding_norm"))
    if {"attention", "mlp"} <= set(which):
        model.config.use_post_norm = True
    return model


def to_output_only(model: Any, *, gamma_init: float = 1.0, norm: str = "same") -> Any:
    r"""Normalise what comes out of each sub-layer and not what goes in, in place, as OLMo 2 does.

    $$ h = x + N(\mathrm{Attention}(x)), \qquad y = h + N(\mathrm{MLP}(h)) $$

    As `to_peri_ln`, which see for arguments, errors and loading, but the norms at the inputs become `nn.Identity`: their weights
    leave the state dict. One of the variants that the paper compares with.
    """
    blocks, names = _pre_norm_blocks(model)
    to_peri_ln(model, gamma_init=gamma_init, norm=norm)
    model.config.use_post_norm = False  # the name that HyperCLOVAX knows means both norms
    for block in blocks:
        setattr(block, names[0], nn.Identity())
        setattr(block, names[2], nn.Identity())
    return model


def to_post_ln(model: Any) -> Any:
    r"""Normalise the sum, as the first transformers did, in place: the baseline from before Pre-LN.

    $$ h = N(x + \mathrm{Attention}(x)), \qquad y = N(h + \mathrm{MLP}(h)) $$

    The block's own two norms move behind the sums and keep their names, so nothing changes in the state dict: save and load
    weights, not the pickled model. The decoder's final norm stays; after a normalised sum it has only its gain to add.

    Args:
        model: as for `to_peri_ln`, but not Granite, Phi-3 and HyperCLOVAX.

    Returns:
        `model`.

    Raises:
        ValueError: `model` is not one of these, or not pre-norm (any more).
        NotImplementedError: its blocks run in parallel, have cross-attention, or scale or drop what they add.
    """
    blocks, names = _pre_norm_blocks(model)
    if model.config.model_type in _SCALED:
        raise NotImplementedError(f"to_post_ln knows no {type(model).__name__}: its blocks do more than add a sub-layer's output")
    for block in blocks:
        block.__class__ = _post_ln(type(block), names)
    return model


def norm_placement(model: Any) -> Placement:
    """Where a model of transformers has its norms: `"pre"`, `"post"`, `"peri"` (some sub-layers suffice) or `"output-only"`.

    Raises:
        ValueError: unknown model.
        NotImplementedError: blocks that run attention and MLP in parallel.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind in _PARALLEL and getattr(config, "use_parallel_residual", True):
        raise NotImplementedError(
            f"{type(model).__name__} runs attention and MLP in parallel; norms around each are not defined here"
        )
    if kind in _OTHER:
        return _OTHER[kind]
    if kind not in _PRE_NORM:
        raise ValueError(f"model must be one of the pre-norm decoders {', '.join(_PRE_NORM)}, got {type(model).__name__}")
    block = _blocks(model)[0]
    if getattr(block, "is_post_ln", False):
        return "post"
    outputs = [getattr(block, name, None) for name in ("post_norm1", "post_norm2")]
    if all(output is None or isinstance(output, nn.Identity) for output in outputs):
        return "pre"
    return "output-only" if isinstance(getattr(block, _PRE_NORM[kind][0]), nn.Identity) else "peri"


def _pre_norm_blocks(model: Any) -> tuple[nn.ModuleList, tuple[str, str, str, str]]:
    placement = norm_placement(model)
    if placement != "pre":
        raise ValueError(f"model must be pre-norm, {type(model).__name__} is {placement} already")
    if getattr(model.config, "add_cross_attention", False):
        raise NotImplementedError(f"{type(model).__name__} has cross-attention, around which no norms are put")
    return _blocks(model), _PRE_NORM[model.config.model_type]


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The first list of modules, which is the list of blocks: what else is a list (experts) is inside one."""
    for module in _decoder(model).modules():
        if isinstance(module, nn.ModuleList) and len(module):
            return module
    raise ValueError(f"{type(model).__name__} has no list of blocks")


def _decoder(model: Any) -> Any:
    return model.get_decoder() if hasattr(model, "get_decoder") else model


def _normalise(block: nn.Module, sub_layer: str, name: str, norm: nn.Module) -> None:
    has_a_place = isinstance(getattr(block, name, None), nn.Identity)  # HyperCLOVAX calls it itself
    setattr(block, name, norm)
    if not has_a_place:
        getattr(block, sub_layer).register_forward_hook(partial(_normalise_output, block, name))


def _normalise_output(owner: nn.Module, name: str, module: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook. The norm is looked up at each call, so that one put in its place later is used; and because the owner is an
    argument of a `partial`, not a variable of a closure, a deep copy of the model gets a hook of its own."""
    norm = getattr(owner, name)
    return (norm(output[0]), *output[1:]) if isinstance(output, tuple) else norm(output)


def _like(host: nn.Module, norm: str, gain: float) -> nn.Module:
    """A new norm for the same vectors as `host`, with the same eps, on the same device, in the same dtype."""
    if norm == "same":
        new = copy.deepcopy(host)
    else:
        eps = host.eps if hasattr(host, "eps") else host.variance_epsilon
        new = _NORMS[norm](host.weight.shape[-1], eps=eps, device=host.weight.device, dtype=host.weight.dtype)
    nn.init.constant_(new.weight, gain)
    if getattr(new, "bias", None) is not None:
        nn.init.zeros_(new.bias)
    return new


@cache
def _post_ln(block: type[nn.Module], names: tuple[str, str, str, str]) -> type[nn.Module]:
    """The class of a block with its norms behind the sums. A subclass, so that transformers treats it as the block it was."""
    first, attention, second, mlp = names

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attended = getattr(self, attention)(hidden_states, *args, **kwargs)[0]
        hidden_states = getattr(self, first)(hidden_states + attended)
        return getattr(self, second)(hidden_states + getattr(self, mlp)(hidden_states))

    return type(f"PostLN{block.__name__}", (block,), {"forward": forward, "is_post_ln": True})


def _check_norm(norm: str, gamma_init: float) -> None:
    if norm not in ("same", *_NORMS):
        raise ValueError(f"norm must be 'same', 'rms' or 'layer', got {norm!r}")
    _check_gain(gamma_init)


def _check_gain(gamma_init: float) -> None:
    if not math.isfinite(gamma_init):
        raise ValueError(f"gamma_init must be finite, got {gamma_init}")


class ResidualStats(torchmetrics.Metric):
    """Size of the residual stream before the first block and after each one, over all entries seen.

    With x an entry of the stream, `compute` gives three vectors of length `num_blocks + 1`: `mean_square`, E[x²]; `max_abs`,
    max |x|, to be held against the largest number of the dtype (65 504 in float16); `kurtosis`, E[x⁴] / E[x²]², which is 3 for a
    Gaussian stream and the number of channels where one channel has it all.

    ```python
    stats = ResidualStats(model.config.num_hidden_layers)
    with stats.attach(model):
        model(input_ids)
    stats.compute()["mean_square"]
    ```

    Args:
        num_blocks: number of blocks.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: `num_blocks` is negative.

    Source:
        arXiv 2502.02732 follows the variance of hidden states over depth. Moments about zero and not about the mean (as RMSNorm
        measures size) and the kurtosis are our choice. Padding counts as any other position.
    """

    full_state_update = False
    square_sum: Tensor
    fourth_sum: Tensor
    max_abs: Tensor
    count: Tensor

    def __init__(self, num_blocks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_blocks < 0:
            raise ValueError(f"num_blocks must be at least 0, got {num_blocks}")
        self.num_blocks = num_blocks
        for name, reduce in {"square_sum": "sum", "fourth_sum": "sum", "max_abs": "max"}.items():
            self.add_state(name, default=torch.zeros(num_blocks + 1), dist_reduce_fx=reduce)
        self.add_state("count", default=torch.zeros(num_blocks + 1, dtype=torch.int64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, block: int, hidden: Float[Tensor, "..."]) -> None:
        """Add the stream after block number `block`; 0 is the stream before the first.

        Raises:
            ValueError: there is no such block.
        """
        if not 0 <= block <= self.num_blocks:
            raise ValueError(f"block must be in 0..{self.num_blocks}, got {block}")
        square = hidden.detach().float().square().to(self.square_sum.device)
        self.square_sum[block] += square.sum()
        self.fourth_sum[block] += square.square().sum()
        self.max_abs[block] = torch.maximum(self.max_abs[block], square.max().sqrt())
        self.count[block] += square.numel()

    def compute(self) -> dict[str, Float[Tensor, " points"]]:
        """The statistics by name.

        Raises:
            ValueError: after some block nothing was seen.
        """
        if not self.count.all():
            raise ValueError(f"nothing seen after block {int((self.count == 0).nonzero()[0])}")
        mean_square = self.square_sum / self.count
        # A stream of zeros has no shape; the smallest number in place of its mean square makes its kurtosis 0.
        kurtosis = self.fourth_sum / self.count / mean_square.square().clamp(min=torch.finfo(mean_square.dtype).tiny)
        return {"mean_square": mean_square, "max_abs": self.max_abs.clone(), "kurtosis": kurtosis}

    def attach(self, model: nn.Module) -> ExitStack:
        """Update from every forward pass of a transformer until the returned context is left (or its `close` called).

        Raises:
            ValueError: the model has another number of blocks, or no list of blocks.
        """
        blocks = _blocks(model)
        if len(blocks) != self.num_blocks:
            raise ValueError(f"the model has {len(blocks)} blocks, the metric was made for {self.num_blocks}")

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.update(0, args[0] if args else kwargs["hidden_states"])

        def after(index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.update(index, output[0] if isinstance(output, tuple) else output)

        hooks = ExitStack()
        hooks.callback(blocks[0].register_forward_pre_hook(before, with_kwargs=True).remove)
        for index, block in enumerate(blocks, start=1):
            hooks.callback(block.register_forward_hook(partial(after, index)).remove)
        return hooks


class GradientSpikes(TrainerCallback, ExportableState):
    r"""Count the steps whose gradient is far larger than usual.

    $$ \|g_t\| > \mathrm{threshold} \cdot \mathrm{median}(\|g_{t-\mathrm{window}}\|, \dots, \|g_{t-1}\|) $$

    As a callback of `transformers.Trainer` it reads the norm before clipping from the logs: set `logging_steps=1`, or it sees
    only the steps that are logged. In a loop of one's own, call `observe` with each norm.

    Args:
        threshold: the smallest multiple of the median that is a spike, above 1.
        window: how many steps back the median looks.
        warmup: norms needed before anything is judged, in `[1, window]`. A norm that is not finite is always a spike.

    Attributes:
        count: spikes so far.
        ratio: last norm over the median before it; NaN before there is one, infinity for a norm that is not finite.
        norms: the finite norms in the window.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2502.02732 shows gradient spikes as curves; the ratio to a running median, the threshold of 5 and the window of
        100 are our choice.
    """

    def __init__(self, threshold: float = 5.0, window: int = 100, warmup: int = 10) -> None:
        if not threshold > 1:
            raise ValueError(f"threshold must be above 1, got {threshold}")
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if not 1 <= warmup <= window:
            raise ValueError(f"warmup must be in 1..window ({window}), got {warmup}")
        self.threshold, self.window, self.warmup = threshold, window, warmup
        self.count = 0
        self.ratio = math.nan
        self.norms: list[float] = []

    def observe(self, norm: float) -> bool:
        """Take the norm of a step's gradient, before clipping, and say whether it is a spike.

        Raises:
            ValueError: `norm` is negative.
        """
        if norm < 0:
            raise ValueError(f"norm must be at least 0, got {norm}")
        if math.isfinite(norm):
            enough = len(self.norms) >= self.warmup
            median = statistics.median(self.norms) if enough else math.nan
            self.ratio = norm / median if median > 0 else (math.inf if enough and norm > 0 else math.nan)
            self.norms = [*self.norms, norm][-self.window :]
        else:
            self.ratio = math.inf
        spike = self.ratio > self.threshold
        self.count += spike
        return spike

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "grad_norm" in logs:
            self.observe(float(logs["grad_norm"]))

    def state(self) -> dict[str, Any]:
        """What `Trainer` writes into a checkpoint; `from_state` makes it a callback again."""
        settings = {"threshold": self.threshold, "window": self.window, "warmup": self.warmup}
        return {"args": settings, "attributes": {"count": self.count, "ratio": self.ratio, "norms": list(self.norms)}}

    def state_dict(self) -> dict[str, Any]:
        """Settings and everything counted so far."""
        state = self.state()
        return state["args"] | state["attributes"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            ValueError: it is of a callback with other settings, or something is missing.
        """
        own = self.state()
        if set(state_dict) != set(own["args"]) | set(own["attributes"]):
            raise ValueError(f"state_dict must have {', '.join(self.state_dict())}; it has {', '.join(state_dict) or 'nothing'}")
        for name, value in own["args"].items():
            if state_dict[name] != value:
                raise ValueError(f"state_dict must be of the same {name}: here it is {value}, there {state_dict[name]}")
        for name in own["attributes"]:
            setattr(self, name, copy.copy(state_dict[name]))
