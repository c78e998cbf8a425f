"""EvoMoE: train one expert, spawn many from it, and let a gate that begins dense become sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from firsthand.moe.ffn import FFNWeights, ffn_slots
from firsthand.moe.layer import MoE, Routing, check_sizes

try:
    from transformers.trainer_callback import TrainerCallback
except ImportError:  # everything but the callback does without
    TrainerCallback = object  # type: ignore[assignment, misc]


class DTSGateOutput(NamedTuple):
    """What the gate decided.

    Attributes:
        weights: by how much each expert's output is multiplied; 0 where the mask is false. Rows need not sum to 1.
        mask: true where a token is sent to an expert.
        aux_loss: the balance loss; it has a gradient through the weights only.
    """

    weights: Float[Tensor, "tokens experts"]
    mask: Bool[Tensor, "tokens experts"]
    aux_loss: Float[Tensor, ""]


def dts_gate(
    logits: Float[Tensor, "tokens experts"],
    temperature: float,
    threshold: float = 1e-3,
    *,
    gumbel_noise: Float[Tensor, "tokens experts"] | None = None,
    hard: bool = False,
    weight_source: str = "gumbel",
    generator: torch.Generator | None = None,
) -> DTSGateOutput:
    r"""The dense-to-sparse gate: a Gumbel-softmax, of which what is too small is left out.

    $$ g = \mathrm{softmax}\big((z + \zeta)/\tau\big), \qquad m = [\,g > c\,], \qquad w = m \odot g,
       \qquad L = E^2 \cdot \tfrac1E \sum_e \overline{w_e}\; \overline{m_e} $$

    with ζ Gumbel noise and bars for means over tokens. At a high temperature all experts share a token about equally; as τ falls,
    more and more of them fall below c, and in the limit one is left: e with probability softmax(z)_e. What remains is not
    normalised to a sum of 1.

    Args:
        logits: z, the router's scores.
        temperature: τ, positive; or 0 for the dense gate, g = softmax(z) without noise and, unless `hard`, with every expert
            chosen and no balance loss.
        threshold: c, in [0, 1). From 1/E up, a token may be left without any expert.
        gumbel_noise: ζ, to be used in place of a draw.
        hard: choose only the largest g, whatever `threshold`.
        weight_source: `"gumbel"` for w = m·g, or `"softmax"` for w = m·softmax(z), which has neither noise nor temperature in it.
        generator: draws ζ on its own device; the default generator of the device of `logits` if None.

    Returns:
        Weights, mask and balance loss; weights and loss in float32 or wider. Where the experts are used evenly, the loss is E if
        all are chosen with w = 1/E, 1 for a hard gate with w = 1, and 1/E for a hard gate with w = 1/E.

    Raises:
        ValueError: `temperature` negative or not finite, `threshold` out of range, an unknown `weight_source`, or noise of
            another shape than `logits`.

    Source:
        Nie et al., "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate", 2021,
        arXiv 2112.14397, and its published code. c = 0.001 is from memory of the paper, unverified; versions of the code have
        0.02. The code takes its weights from the softmax unless told otherwise, the paper's formula from g (from memory,
        unverified); the default here is our choice.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be positive, or 0 for the dense gate, and finite, got {temperature}")
    _check_gate(threshold, weight_source)
    if gumbel_noise is not None and gumbel_noise.shape != logits.shape:
        raise ValueError(f"gumbel_noise must have the shape of logits, {tuple(logits.shape)}, got {tuple(gumbel_noise.shape)}")
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature == 0:
        g = z.softmax(-1)
    else:
        noise = _gumbel(z, generator) if gumbel_noise is None else gumbel_noise
        g = ((z + noise) / temperature).softmax(-1)
    experts = logits.shape[1]
    if temperature == 0 and not hard:
        return DTSGateOutput(g, torch.ones_like(g, dtype=torch.bool), g.new_zeros(()))
    mask = F.one_hot(g.argmax(-1), experts).bool() if hard else g > threshold
    weights = mask * (g if weight_source == "gumbel" else z.softmax(-1))
    return DTSGateOutput(weights, mask, experts * (weights.mean(0) * mask.to(weights.dtype).mean(0)).sum())


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    exponential = torch.empty(like.shape, dtype=like.dtype, device=device).exponential_(generator=generator)
    return -exponential.clamp(min=torch.finfo(like.dtype).tiny).log().to(like.device)  # a draw of 0 has no logarithm


def _check_gate(threshold: float, weight_source: str) -> None:
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}")
    if weight_source not in ("gumbel", "softmax"):
        raise ValueError(f"weight_source must be 'gumbel' or 'softmax', got {weight_source!r}")


def dts_temperature(step: int, total_steps: int, t_max: float = 2.0, t_min: float = 0.3, kind: str = "linear") -> float:
    r"""The temperature after `step` of `total_steps`: from `t_max` down to `t_min`, and there from then on.

    $$ \tau_n = \max\big(t_{\max} - \tfrac nN (t_{\max} - t_{\min}),\ t_{\min}\big) \qquad\text{or}\qquad
       \max\big(t_{\max} (t_{\min}/t_{\max})^{n/N},\ t_{\min}\big) $$

    Args:
        step: n, at least 0.
        total_steps: N, at least 1.
        t_max: first temperature, at least `t_min`.
        t_min: last temperature, positive.
        kind: `"linear"` (the first formula) or `"exp"` (the second).

    Raises:
        ValueError: an argument is out of range.

    Source:
        Both schedules as in the code of arXiv 2112.14397. Its own defaults are 1.0 and 0.5; 2.0 and 0.3 are those of another
        implementation of the gate and of our memory of the paper.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    if not 0 < t_min <= t_max < math.inf:
        raise ValueError(f"t_min and t_max must satisfy 0 < t_min <= t_max < infinity, got {t_min} and {t_max}")
    if kind not in ("linear", "exp"):
        raise ValueError(f"kind must be 'linear' or 'exp', got {kind!r}")
    done = min(step / total_steps, 1.0)
    if done == 1:
        return t_min
    return t_max - done * (t_max - t_min) if kind == "linear" else t_max * (t_min / t_max) ** done


class DTSRouter(nn.Module):
    """`dts_gate` as the router of a `firsthand.moe.MoE`: each token goes to as many experts as the gate chose for it.

    In evaluation mode the gate is hard and has no noise: the expert with the largest score, weighted by softmax(z/τ), or by
    softmax(z) if `weight_source` is `"softmax"`. Temperature and hardness are buffers, so that they are saved with the weights;
    `set_dts_gate` sets them.

    Args:
        dim: D, of a token.
        num_experts: E.
        temperature: τ to begin with, see `dts_gate`, as for the next two.
        threshold: c, in [0, 1).
        weight_source: `"gumbel"` or `"softmax"`.
        generator: draws the noise, and the initial weights (as `nn.Linear`'s) if it is on the CPU.

    Attributes:
        last_gate: what `dts_gate` returned in the last forward pass in training mode, with its graph; None before and in
            evaluation mode. It is left out of copies.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2112.14397 and its code, in which evaluation is top-1 too, but always weighted by softmax(z). With `"gumbel"` that
        is not what the experts were trained with: a hard gate at τ = 0.3 has weights near 1, and softmax(z) may be far from it.
    """

    temperature: Tensor
    hard: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        temperature: float = 2.0,
        threshold: float = 1e-3,
        weight_source: str = "gumbel",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, num_experts=num_experts)
        _check_gate(threshold, weight_source)
        self.num_experts, self.threshold, self.weight_source, self.generator = num_experts, threshold, weight_source, generator
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        on_cpu = generator is not None and generator.device.type == "cpu"
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator if on_cpu else None)
        self.register_buffer("temperature", torch.zeros(()))
        self.register_buffer("hard", torch.tensor(False))
        self.last_gate: DTSGateOutput | None = None
        self.set(temperature)

    def set(self, temperature: float, hard: bool = False) -> None:
        """Set temperature and hardness.

        Raises:
            ValueError: `temperature` negative or not finite.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be positive, or 0 for the dense gate, and finite, got {temperature}")
        self.temperature.fill_(temperature)
        self.hard.fill_(hard)

    def forward(self, x: Float[Tensor, "tokens dim"]) -> Routing:
        """The scores, and the weights and numbers of the experts of each token.

        As wide as the largest number of experts that a token has; a token with fewer has `num_experts` in place of the others.
        """
        logits = F.linear(x, self.weight)
        gate = dts_gate(
            logits,
            float(self.temperature),
            self.threshold,
            gumbel_noise=None if self.training else torch.zeros_like(logits),
            hard=bool(self.hard) or not self.training,
            weight_source=self.weight_source,
            generator=self.generator,
        )
        self.last_gate = gate if self.training else None
        return Routing(logits, *_padded(gate.weights.to(x.dtype), gate.mask))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last_gate": None}  # tensors with a graph can be neither copied nor pickled

    def extra_repr(self) -> str:
        experts, dim = self.weight.shape
        return f"{dim}, num_experts={experts}, threshold={self.threshold}, weight_source={self.weight_source!r}"


def _padded(weights: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the chosen experts, row by row, the chosen ones first; E and 0 stand for none."""
    experts = mask.shape[1]
    width = max(int(mask.sum(1).max()), 1) if len(mask) else 1
    index = torch.where(mask, torch.arange(experts, device=mask.device), experts).sort(-1).values[:, :width]
    return F.pad(weights, (0, 1)).gather(1, index), index


def _routers(model: nn.Module) -> list[DTSRouter]:
    return [module for module in model.modules() if isinstance(module, DTSRouter)]


def set_dts_gate(model: nn.Module, temperature: float, *, hard: bool = False) -> None:
    """Set the temperature of all dense-to-sparse gates of a model, and whether they choose one expert only.

    Args:
        model: has `DTSRouter`s, as `evomoe_convert` makes them.
        temperature: τ, see `dts_gate`; usually from `dts_temperature`.
        hard: see `dts_gate`.

    Raises:
        ValueError: the model has no such gate, or `temperature` is out of range.
    """
    for router in _some_routers(model):
        router.set(temperature, hard)


def dts_balance_loss(model: nn.Module) -> Float[Tensor, ""]:
    """The balance loss of the last forward pass in training mode, averaged over a model's dense-to-sparse gates.

    To be added to the loss in a training loop of one's own; `EvoMoECallback` does it for the Trainer. The mean over layers, and
    not their sum, is our choice.

    Args:
        model: has `DTSRouter`s and has been run in training mode.

    Raises:
        ValueError: the model has no such gate, or the last forward pass of one was not in training mode.
    """
    gates = [router.last_gate for router in _some_routers(model)]
    losses = [gate.aux_loss for gate in gates if gate is not None]
    if len(losses) < len(gates):
        raise ValueError("model must have been run in training mode: its gates have no balance loss")
    return torch.stack(losses).mean()


def dts_active_experts(model: nn.Module) -> float:
    """How many experts a token had in the last forward pass, averaged over tokens and layers.

    Args:
        model: has `firsthand.moe.MoE` layers with `DTSRouter`s and has been run.

    Raises:
        ValueError: it has none, or has not been run.
    """
    layers = [module for module in model.modules() if isinstance(module, MoE) and isinstance(module.router, DTSRouter)]
    counts = [(layer.last_routing.index < layer.num_experts).sum(1) for layer in layers if layer.last_routing is not None]
    if not counts or len(counts) < len(layers):
        raise ValueError("model must have MoE layers with dense-to-sparse gates, and have been run")
    return float(torch.cat(counts).double().mean())


def _some_routers(model: nn.Module) -> list[DTSRouter]:
    routers = _routers(model)
    if not routers:
        raise ValueError(f"model must have dense-to-sparse gates, as evomoe_convert makes them; {type(model).__name__} has none")
    return routers


@torch.no_grad()
def diversify_experts(
    state: Mapping[str, Tensor],
    num_experts: int,
    mask_prob: float = 0.1,
    *,
    rescale: bool = False,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    r"""Many experts out of one: each is a copy of it with other weights set to zero.

    $$ W_e = W \odot M_e \;\big(/ (1 - p)\big) + \epsilon, \qquad M_e \sim \mathrm{Bernoulli}(1 - p) $$

    Args:
        state: the weights of one expert by name. What has fewer than two dimensions (biases) is copied as it is.
        num_experts: E, at least 1.
        mask_prob: p, in [0, 1). 0 makes copies.
        rescale: divide by 1 - p, so that the mean over many experts is W.
        noise: standard deviation of Gaussian noise added to all entries, in units of the standard deviation of W; at least 0.
        generator: draws masks and noise, on the CPU; PyTorch's global one if None.

    Returns:
        The weights of all experts, with a new first dimension, on the device and in the type of `state`.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2112.14397: experts begin as the shared expert under different random masks (from memory of the paper, unverified;
        its published code has no such step). p = 0.1, `rescale`, `noise` and unmasked biases are our choice.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    if not 0 <= mask_prob < 1:
        raise ValueError(f"mask_prob must be in [0, 1), got {mask_prob}")
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise must be at least 0 and finite, got {noise}")
    experts = {}
    for name, weight in state.items():
        stacked = weight.expand(num_experts, *weight.shape).clone()
        if weight.ndim > 1 and mask_prob:
            dropped = torch.rand(stacked.shape, generator=generator) < mask_prob
            stacked.masked_fill_(dropped.to(weight.device), 0)
            if rescale:
                stacked /= 1 - mask_prob
        if weight.ndim > 1 and noise:
            stacked += noise * weight.float().std().to(weight.dtype) * torch.randn(stacked.shape, generator=generator).to(weight)
        experts[name] = stacked
    return experts


def evomoe_convert(
    model: Any,
    num_experts: int,
    layers: Literal["all"] | Sequence[int] = "all",
    *,
    mask_prob: float = 0.1,
    rescale: bool = False,
    noise: float = 0.0,
    temperature: float = 2.0,
    threshold: float = 1e-3,
    weight_source: str = "gumbel",
    optimizer: Any = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Spawn experts from the feed-forward blocks of a dense model, in place, behind dense-to-sparse gates.

    Each block becomes a `firsthand.moe.MoE` with a `DTSRouter`, whose experts are what `diversify_experts` makes of it. Use
    `set_dts_gate` to lower the temperature in training. `from_pretrained` does not know the new layers: to load a converted
    model, build the dense one, convert it, and load the state dict.

    Args:
        model: a Llama, Mistral, Qwen2, Qwen3, GPT-2 or BERT of transformers (see `firsthand.moe.ffn`).
        num_experts: E, at least 1.
        layers: the numbers of the blocks to convert, or `"all"`.
        mask_prob: see `diversify_experts`, as for the next two.
        rescale: see there.
        noise: see there.
        temperature: the gates' first τ, see `dts_gate`, as for the next two.
        threshold: see there.
        weight_source: see there.
        optimizer: of a training run that goes on: the new parameters take the places of the old ones in its groups, so that
            rates, decay and schedules apply to them, and begin without state; the state of all others is kept. New parameters
            in place of frozen ones are frozen, their gate too.
        generator: draws masks, noise and the gates' initial weights, on the CPU; PyTorch's global one if None. The noise of the
            gates in training is of the global generator.

    Returns:
        `model`.

    Raises:
        ValueError: `model` is not one of these or is converted already, or an argument is out of range.

    Source:
        arXiv 2112.14397. That the new parameters begin without optimiser state is our choice.
    """
    if _routers(model):
        raise ValueError("model must be dense: it has dense-to-sparse gates already")
    _check_gate(threshold, weight_source)

    for slot in ffn_slots(model, layers):
        dense = slot.weights()
        state = {name: value.detach() for name, value in _stacked(dense).items() if value is not None}
        hidden, dim = dense.up.shape
        stacked = diversify_experts(state, num_experts, mask_prob, rescale=rescale, noise=noise, generator=generator)
        router = DTSRouter(
            dim, num_experts, temperature=temperature, threshold=threshold, weight_source=weight_source, generator=generator
        )
        router.generator = None
        with torch.random.fork_rng(devices=[]):  # the layer's own initial weights are not used: let them cost no draws
            gated, bias = dense.gate is not None, "gate_up_bias" in stacked or "down_bias" in stacked
            moe = MoE(dim, hidden, num_experts, 1, router=router, act=dense.act, gated=gated, bias=bias)
        moe.to(dense.up)  # device and type
        moe.load_state_dict(stacked, strict=False)
        _swap(model, partial(slot.replace, moe), optimizer)
    return model


def _stacked(dense: FFNWeights) -> dict[str, Tensor | None]:
    """A dense block's weights as `MoE` names and joins those of an expert."""
    if dense.gate is None:
        first, bias = dense.up, dense.up_bias
    else:
        first = torch.cat([dense.gate, dense.up])
        bias = None if dense.gate_bias is None or dense.up_bias is None else torch.cat([dense.gate_bias, dense.up_bias])
    return {"gate_up_proj": first, "down_proj": dense.down, "gate_up_bias": bias, "down_bias": dense.down_bias}


def _to_dense(model: Any, layers: Literal["all"] | Sequence[int], optimizer: Any) -> None:
    """Undo the conversion: each block becomes its first expert."""
    for slot in ffn_slots(model, layers):
        moe: Any = slot.module
        first, bias, down_bias = (
            None if stacked is None else stacked[0].detach() for stacked in (moe.gate_up_proj, moe.gate_up_bias, moe.down_bias)
        )
        gate, up = first.chunk(2) if moe.gated else (None, first)
        gate_bias, up_bias = bias.chunk(2) if moe.gated and bias is not None else (None, bias)
        dense = FFNWeights(up, moe.down_proj[0].detach(), gate, up_bias, gate_bias, down_bias, moe.act)
        _swap(model, partial(slot.restore, dense), optimizer)


def _swap(model: nn.Module, change: Callable[[], None], optimizer: Any) -> None:
    """Change the model, and put its new parameters where the optimiser had those that they replace.

    A group lists its parameters in the order of the model's, as the Trainer does when it makes an optimiser: the state that is
    saved then fits one that is made for the changed model.
    """
    before = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
    change()
    after = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
    gone = {key: value for key, value in before.items() if key not in after}
    new = [value for key, value in after.items() if key not in before]
    for _, parameter in new:
        parameter.requires_grad_(any(old.requires_grad for _, old in gone.values()))
    if optimizer is None:
        return
    homes = {}  # whether it is a bias -> the group
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in gone:
                homes[gone[id(parameter)][0].endswith("bias")] = group
                optimizer.state.pop(parameter, None)
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
    place = {key: number for number, key in enumerate(after)}
    for name, parameter in new:
        home = homes.get(name.endswith("bias"), homes.get(False))
        if home is not None:
            home["params"].append(parameter)
    for group in optimizer.param_groups:
        group["params"].sort(key=lambda parameter: place.get(id(parameter), len(place)))


class EvoMoECallback(TrainerCallback):
    """Training from a dense model to a sparse mixture of experts in one run of `transformers.Trainer`.

    Up to `dense_steps` the model trains as it is. Then each feed-forward block spawns its experts (`evomoe_convert`), the
    optimiser takes them on, and the gates' temperature falls over `gate_steps` (`dts_temperature`). From `hard_step` on, a gate
    chooses one expert. Give it to the Trainer when that is made, with a dense model::

        Trainer(model, args, train_dataset=..., callbacks=[EvoMoECallback(8, dense_steps=3000, gate_steps=5000)])

    A run resumes from any of its checkpoints, with a dense model as in the beginning: the experts are there before their weights
    are loaded. Beside the loss, the log has `gate_temperature` and `active_experts` (of the last batch). What the model returns
    as its loss in training has the balance loss in it; in evaluation it has not.

    Args:
        num_experts: E, at least 1.
        dense_steps: optimiser steps with one expert, at least 0.
        gate_steps: steps in which the temperature falls, at least 1.
        hard_step: the step, counted from the beginning, from which the gate is hard, at least `dense_steps`; when the
            temperature has fallen if None.
        layers: see `evomoe_convert`.
        t_max: see `dts_temperature`, as for the next two.
        t_min: see there.
        kind: see there.
        balance: weight of `dts_balance_loss`, at least 0.
        mask_prob: see `diversify_experts`, as for the next two.
        rescale: see there.
        noise: see there.
        threshold: see `dts_gate`, as for the next one.
        weight_source: see there.

    Raises:
        ValueError: an argument is out of range; or, in training, a checkpoint's experts are not those of this schedule, or the
            model returns no loss to add the balance loss to.
        NotImplementedError: training on several devices, or with DeepSpeed or FSDP, which do not let parameters come and go.
            Train the phases one by one with `evomoe_convert` there.
        ImportError: transformers is not installed.

    Source:
        arXiv 2112.14397. The weight of 0.01 is that of the scripts in its code; `hard_step` None is our choice.
    """

    def __init__(
        self,
        num_experts: int,
        dense_steps: int,
        gate_steps: int,
        hard_step: int | None = None,
        *,
        layers: Literal["all"] | Sequence[int] = "all",
        t_max: float = 2.0,
        t_min: float = 0.3,
        kind: str = "linear",
        balance: float = 0.01,
        mask_prob: float = 0.1,
        rescale: bool = False,
        noise: float = 0.0,
        threshold: float = 1e-3,
        weight_source: str = "gumbel",
    ) -> None:
        if TrainerCallback is object:
            raise ImportError("EvoMoECallback needs transformers: pip install 'firsthand[hf]'")
        dts_temperature(0, gate_steps, t_max, t_min, kind)
        diversify_experts({}, num_experts, mask_prob, noise=noise)
        _check_gate(threshold, weight_source)
        if dense_steps < 0:
            raise ValueError(f"dense_steps must be at least 0, got {dense_steps}")
        if hard_step is not None and hard_step < dense_steps:
            raise ValueError(f"hard_step must be at least dense_steps = {dense_steps}, got {hard_step}")
        if not 0 <= balance < math.inf:
            raise ValueError(f"balance must be at least 0 and finite, got {balance}")
        self.num_experts, self.dense_steps, self.layers, self.balance = num_experts, dense_steps, layers, balance
        self.hard_step = dense_steps + gate_steps if hard_step is None else hard_step
        self._temperature = partial(dts_temperature, total_steps=gate_steps, t_max=t_max, t_min=t_min, kind=kind)
        self._expert = {"mask_prob": mask_prob, "rescale": rescale, "noise": noise}
        self._gate = {"threshold": threshold, "weight_source": weight_source}
        self._model: Any = None
        self._optimizer: Any = None
        self._dense_keys: set[str] = set()
        self._hooks: dict[str, Any] = {}

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Be there before a checkpoint is loaded."""
        self._watch_loading(model)
        self._optimizer = optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Check that the model is as the schedule says, and add the balance loss from here on."""
        if args.parallel_mode.value != "not_parallel" or args.deepspeed or args.fsdp:
            raise NotImplementedError(
                "EvoMoECallback trains on one device: DDP, FSDP and DeepSpeed do not let parameters come and go. "
                "Train the phases one by one with evomoe_convert there"
            )
        spawned, step = bool(_routers(model)), state.global_step
        if not spawned and step > self.dense_steps:
            raise ValueError(
                f"the model has no experts at step {step}, with dense_steps={self.dense_steps}: to resume, give this callback to "
                "Trainer(model=..., callbacks=[...]) and not later or with model_init, with the schedule that the run began with"
            )
        if spawned and step < self.dense_steps:
            raise ValueError(f"the model has experts already at step {step}, with dense_steps={self.dense_steps}")
        self._watch_loading(model)
        self._optimizer = optimizer
        self._stop_adding()
        accumulated = args.gradient_accumulation_steps

        def add_balance(model: Any, inputs: Any, options: dict[str, Any], output: Any) -> Any:
            if not (model.training and self.balance and _routers(model)):
                return output
            if getattr(output, "loss", None) is None:
                raise ValueError(
                    "the model must return a loss for the balance loss to be added to (labels among its inputs, no label "
                    "smoothing, no compute_loss_func); or set balance=0 and add dts_balance_loss(model) yourself"
                )
            # A loss that the host divides by the tokens of the whole step is summed over its micro-batches, not averaged.
            share = 1 / accumulated if options.get("num_items_in_batch") is not None else 1.0
            output["loss"] = output.loss + share * self.balance * dts_balance_loss(model)
            return output

        self._hooks["balance"] = model.register_forward_hook(add_balance, with_kwargs=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Spawn when it is time, and set the gates."""
        step = state.global_step
        if step < self.dense_steps:
            return
        if not _routers(model):
            self._spawn(model, optimizer, **self._expert)
        set_dts_gate(model, self._temperature(step - self.dense_steps), hard=step >= self.hard_step)

    def on_log(self, args: Any, state: Any, control: Any, *, model: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add what the gates do to the log of training."""
        routers = _routers(model)
        if routers and logs and "loss" in logs and state.log_history:
            state.log_history[-1]["gate_temperature"] = float(routers[0].temperature)
            state.log_history[-1]["active_experts"] = dts_active_experts(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the loss alone from here on."""
        self._stop_adding()

    def _stop_adding(self) -> None:
        if "balance" in self._hooks:
            self._hooks.pop("balance").remove()

    def _spawn(self, model: Any, optimizer: Any, **expert: Any) -> None:
        before = set(model.state_dict())
        evomoe_convert(model, self.num_experts, self.layers, **self._gate, **expert, optimizer=optimizer)
        self._dense_keys = before - set(model.state_dict())

    def _watch_loading(self, model: Any) -> None:
        """Give the model the form of what is about to be loaded into it, whenever a state dict is."""
        if model is self._model:
            return
        if "load" in self._hooks:
            self._hooks.pop("load").remove()
        self._model = model

        # A function and not a method: a deep copy of the model then has no copy of the callback, and of the optimiser, in it.
        def fit(model: Any, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
            keys = [key for key in state_dict if key.endswith((".gate_up_proj", ".down_proj", ".router.temperature"))]
            if keys and not _routers(model):
                self._spawn(model, self._optimizer, generator=torch.Generator())  # to be overwritten: no draws of the run's
                own = {prefix + key: value.shape for key, value in model.state_dict().items()}
                for key in keys:
                    if own.get(key) != state_dict[key].shape:
                        raise ValueError(
                            f"num_experts and layers must be those of the checkpoint, got {self.num_experts}, {self.layers!r}, "
                            f"which give {key} the shape {own.get(key) and tuple(own[key])}, not {tuple(state_dict[key].shape)}"
                        )
            elif not keys and _routers(model) and any(prefix + key in state_dict for key in self._dense_keys):
                _to_dense(model, self.layers, self._optimizer)

        self._hooks["load"] = model.register_load_state_dict_pre_hook(fit)
