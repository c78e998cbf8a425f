"""UOE (also SEUF): unlearn by training one expert, the one that the forgotten text uses most, and hold the router to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from firsthand.moe.blocks import MoEBlock, capture_routing, expert_state_dict, moe_blocks, set_expert
from firsthand.moe.experts import activation_name, moe_forward
from firsthand.moe.layer import MoE, Routing

Objective = Callable[[Tensor, Tensor], Tensor]
"""From logits (B, L, V) and labels (B, L) of the forget batch, not shifted, to a scalar that training lowers."""

_OBJECTIVES = ("ga", "gdiff", "npo", "rmu")


# Attribution


def expert_affinity(router_logits: Iterable[Float[Tensor, "_ layers experts"]]) -> Float[Tensor, "layers experts"]:
    r"""How much a set of texts uses each expert: the mean over texts of the mean router probability over a text's tokens.

    $$ s^l_i = \frac{1}{Z} \sum_{j=1}^{Z} \frac{1}{L_j} \sum_{t=1}^{L_j} g^l_{i,t}, \qquad g^l_t = \mathrm{softmax}(z^l_t) $$

    The softmax is over all routed experts, not over the chosen ones. A short text counts as much as a long one.

    Args:
        router_logits: of each text, the scores $z$ of its tokens at every sparse layer; texts may differ in length.

    Returns:
        Affinities in [0, 1], in float32; each layer's sum to 1.

    Raises:
        ValueError: no texts, or one without tokens.

    Source:
        Zhuang et al., "UOE: Unlearning One Expert Is Enough for Mixture-of-Experts LLMs", 2024, arXiv 2411.18797 (ACL 2025 as
        "SEUF").
    """
    means = []
    for each in router_logits:
        if len(each) == 0:
            raise ValueError(f"router_logits: text {len(means)} has no tokens")
        means.append(each.softmax(-1, dtype=torch.float32).mean(0))
    if not means:
        raise ValueError("router_logits must hold at least one text, got none")
    return torch.stack(means).mean(0)


@torch.no_grad()
def expert_affinity_from(model: Any, batches: Iterable[Mapping[str, Any]]) -> Float[Tensor, "layers experts"]:
    """`expert_affinity` of a model on batches of texts, which need no labels; the paper uses 100,000 tokens of the forget set.

    Args:
        model: see `firsthand.moe.moe_blocks`; called with each batch, in evaluation mode.
        batches: each with `input_ids` (B, L) and, if padded, `attention_mask` (B, L), which is 0 where a token does not count.

    Returns:
        One row per sparse block, in the order of `moe_blocks`.

    Raises:
        ValueError: no batches, a text without tokens, a model without sparse blocks or with layers of different size.
    """
    blocks = moe_blocks(model)
    sizes = {block.num_experts for block in blocks}
    if len(sizes) > 1:
        raise ValueError(f"the sparse blocks of model must have equally many experts, got {sorted(sizes)}")

    def texts() -> Iterator[Tensor]:
        for batch in batches:
            mask = _token_mask(batch)
            model(**_inputs(batch))
            logits = torch.stack([routing.logits for routing in kept], dim=1)  # tokens, layers, experts
            yield from (rows[keep] for rows, keep in zip(logits.unflatten(0, mask.shape), mask, strict=True))

    mode = model.training
    model.eval()
    try:
        with capture_routing(model) as kept:
            return expert_affinity(texts())
    finally:
        model.train(mode)


def select_experts(
    affinity: Float[Tensor, "layers experts"], num: int = 1, scope: Literal["global", "same_layer", "per_layer"] = "global"
) -> list[tuple[int, int]]:
    """The experts to train: those with the largest affinity, as (layer, expert), the largest first.

    Args:
        affinity: of `expert_affinity` on the forget set.
        num: how many. The paper finds one to be best.
        scope: `"global"` ranks the experts of all layers together. `"same_layer"` takes those of the layer that has the largest.
            `"per_layer"` takes at most one of each layer.

    Raises:
        ValueError: `num` below 1 or above what the scope holds, an affinity that is not finite, an unknown scope.

    Source:
        arXiv 2411.18797, which compares the three.
    """
    layers, experts = affinity.shape
    if not affinity.isfinite().all():
        raise ValueError("affinity must be finite")
    if scope == "global":
        candidates = [(layer, expert) for layer in range(layers) for expert in range(experts)]
    elif scope == "same_layer":
        layer = int(affinity.max(1).values.argmax())
        candidates = [(layer, expert) for expert in range(experts)]
    elif scope == "per_layer":
        candidates = list(enumerate(affinity.argmax(1).tolist()))
    else:
        raise ValueError(f"scope must be 'global', 'same_layer' or 'per_layer', got {scope!r}")
    if not 1 <= num <= len(candidates):
        raise ValueError(f"num must be in [1, {len(candidates)}] for scope {scope!r}, got {num}")
    return sorted(candidates, key=lambda place: -float(affinity[place]))[:num]


def selection_overlap(before: Int[Tensor, "tokens k"], after: Int[Tensor, "tokens k"]) -> Float[Tensor, ""]:
    r"""Share of a layer's expert selections that a change of the model left as they were.

    $$ \frac{1}{Tk} \sum_t |S_t \cap S'_t| $$

    Args:
        before: the experts of each token in the original model, no expert twice.
        after: those of the same tokens now. The order of a token's experts does not matter.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: shapes that differ, or no selections.

    Source:
        arXiv 2411.18797 follows this ratio on forgotten text to show how unlearning moves the routing.
    """
    if before.shape != after.shape or before.numel() == 0:
        raise ValueError(f"before and after must have the same shape and not be empty, got {before.shape} and {after.shape}")
    return (before.unsqueeze(2) == after.unsqueeze(1)).any(2).float().mean()


# Losses


def router_anchor_loss(
    router_logits: Float[Tensor, "tokens experts"],
    target_expert: int,
    token_mask: Bool[Tensor, " tokens"] | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "*tokens"]:
    r"""Keep forgotten text on the expert that unlearns it.

    $$ L_t = \lVert \mathrm{softmax}(z_t) - \mathrm{onehot}(e^*) \rVert^2 $$

    Without it the router may send the forgotten text to experts that still know it.

    Args:
        router_logits: scores of the layer's router, for tokens of the forget set.
        target_expert: $e^*$, in [0, experts).
        token_mask: tokens that count; all if None.
        reduction: `"mean"` or `"sum"` over the tokens that count, or `"none"` (per token, 0 where it does not count).

    Returns:
        The loss in float32, at least 0 and below 2 a token.

    Raises:
        ValueError: `target_expert` out of range, an unknown `reduction`, a mask of another length or, for the mean, no tokens.

    Source:
        arXiv 2411.18797. The paper leaves open how tokens are reduced; the mean is our choice, so that α does not depend on
        the batch.
    """
    tokens, experts = router_logits.shape
    if not 0 <= target_expert < experts:
        raise ValueError(f"target_expert must be in [0, {experts}), got {target_expert}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if token_mask is not None and token_mask.shape != (tokens,):
        raise ValueError(f"token_mask must have shape ({tokens},), got {tuple(token_mask.shape)}")
    probabilities = router_logits.softmax(-1, dtype=torch.float32)
    # |p - onehot|² without the one-hot: Σ p² - 2 p* + 1.
    loss = probabilities.square().sum(-1) - 2 * probabilities[:, target_expert] + 1
    if token_mask is not None:
        loss = loss * token_mask
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    counted = tokens if token_mask is None else int(token_mask.sum())
    if counted == 0:
        raise ValueError("there must be a token that counts to take the mean over, got none")
    return loss.sum() / counted


def sequence_log_probs(
    logits: Float[Tensor, "batch length vocab"], labels: Int[Tensor, "batch length"]
) -> Float[Tensor, " batch"]:
    """Log-probability of each text under a causal model, in float32: the sum over its tokens given those before.

    Args:
        logits: not shifted.
        labels: the tokens; -100 where one does not count. The first of a text never does, nothing predicts it.
    """
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none")
    return -losses.view(len(labels), -1).sum(1)


def npo_loss(
    log_probs: Float[Tensor, " batch"], reference_log_probs: Float[Tensor, " batch"], beta: float = 0.001
) -> Float[Tensor, ""]:
    r"""Negative preference optimisation: gradient ascent that lets go of a text once it is unlikely.

    $$ L = -\frac{2}{\beta}\, \mathrm{E} \log \sigma\!\left(-\beta\,(\log\pi_\theta - \log\pi_\mathrm{ref})\right) $$

    As β goes to 0 its gradient becomes that of gradient ascent on the sum over a text's tokens.

    Args:
        log_probs: of the texts to be forgotten, under the model in training.
        reference_log_probs: of the same texts under the model before unlearning; no gradient goes there.
        beta: β, positive.

    Raises:
        ValueError: `beta` is not positive and finite, or the two are of different length.

    Source:
        Zhang et al., "Negative Preference Optimization", 2024, arXiv 2404.05868; β as used in arXiv 2411.18797.
    """
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if log_probs.shape != reference_log_probs.shape:
        raise ValueError(f"log_probs and reference_log_probs must match, got {log_probs.shape} and {reference_log_probs.shape}")
    return -(2 / beta) * F.logsigmoid(-beta * (log_probs - reference_log_probs.detach())).mean()


def rmu_loss(
    forget_hidden: Float[Tensor, "forget dim"],
    direction: Float[Tensor, " dim"],
    steer: float = 8000.0,
    retain_hidden: Float[Tensor, "retain dim"] | None = None,
    retain_reference: Float[Tensor, "retain dim"] | None = None,
    retain_weight: float = 1200.0,
) -> Float[Tensor, ""]:
    r"""Representation misdirection: hidden states of forgotten text go to a fixed random vector, those of retained text stay.

    $$ L = \mathrm{E}_t \lVert h_t - c\,u \rVert^2 + \alpha_r\, \mathrm{E}_t \lVert h^r_t - h^{r,\mathrm{ref}}_t \rVert^2 $$

    Args:
        forget_hidden: states of the tokens to be forgotten, at the steered layer.
        direction: $u$, of length 1.
        steer: $c$. The paper takes 8000 for Qwen1.5-MoE and 32000 for DeepSeek-V2-Lite; what it should be depends on the size
            of the model's hidden states.
        retain_hidden: states of tokens that should stay.
        retain_reference: the same in the model before unlearning; no gradient goes there.
        retain_weight: $\alpha_r$, at least 0.

    Raises:
        ValueError: no tokens, only one of the retained, a `direction` of another length than 1, a negative weight.

    Source:
        Li et al., "The WMDP Benchmark", 2024, arXiv 2403.03218; c and α_r as used in arXiv 2411.18797.
    """
    if len(forget_hidden) == 0 or (retain_hidden is not None and len(retain_hidden) == 0):
        raise ValueError("forget_hidden and retain_hidden must have at least one token")
    if (retain_hidden is None) != (retain_reference is None):
        raise ValueError("retain_hidden and retain_reference go together, got only one of them")
    if not abs(float(direction.float().norm()) - 1) < 1e-2:
        raise ValueError(f"direction must have length 1, got {float(direction.float().norm())}")
    if not 0 <= retain_weight < math.inf:
        raise ValueError(f"retain_weight must be at least 0 and finite, got {retain_weight}")
    loss = (forget_hidden.float() - steer * direction.float()).square().sum(-1).mean()
    if retain_hidden is None or retain_reference is None:
        return loss
    return loss + retain_weight * (retain_hidden.float() - retain_reference.detach().float()).square().sum(-1).mean()


# Training one expert


class SingleExpertUnlearner(nn.Module):
    r"""Train nothing but the chosen experts and the routers of their layers, with any unlearning objective.

    $$ L = \ell_f(D_f) + \lambda\, \ell_r(D_r) + \alpha\, L_\mathrm{anchor}(D_f) $$

    The experts to train become parameters of their own, apart from the stacked weights, so that neither a gradient nor weight
    decay reaches the others. No layer below the first of them takes part in the backward pass, and no frozen weight gets a
    gradient. The reference model that `"npo"` and `"rmu"` ask for is the model itself with the few original weights put back,
    not a second model.

    ```python
    layer_and_expert = select_experts(expert_affinity_from(model, forget_batches))
    unlearner = SingleExpertUnlearner(model, layer_and_expert, objective="npo")
    optimizer = torch.optim.AdamW(unlearner.trainable_parameters(), lr=1e-4)
    for forget, retain in batches:
        unlearner(forget, retain)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    model = unlearner.merge()
    ```

    It is a module that returns its loss, so `transformers.Trainer(model=unlearner)` trains it as it is, from a data set of
    `{"forget": ..., "retain": ...}` and a collator that keeps the two (`torch.utils.data.default_collate` does).

    Args:
        model: a causal model with sparse blocks (`firsthand.moe.moe_blocks`). Changed in place until `merge`; its other
            parameters are frozen until then.
        targets: (layer, expert) pairs of `select_experts`; the layer counts sparse blocks from 0.
        objective: $\ell_f$. `"ga"`: minus the cross-entropy of the forget batch. `"gdiff"`: the same, and there must be a retain
            batch. `"npo"`: see `npo_loss`. `"rmu"`: see `rmu_loss`; it has a retain term of its own and needs a retain batch. Or
            a function of logits and labels. For all but `"rmu"`, $\ell_r$ is the cross-entropy of the retain batch, if there is
            one.
        anchor_weight: α, at least 0.
        retain_weight: λ, at least 0. For `"rmu"`, α_r (the paper's is 1200).
        beta: of `npo_loss`.
        steer: c of `rmu_loss`.
        steer_at: name of the module whose output `"rmu"` steers; the layer around the first of the trained blocks if None.
        generator: draws u for `"rmu"`: entries uniform in [0, 1), then length 1. On the CPU.

    Attributes:
        targets: as given.

    Raises:
        ValueError: `targets` is empty, has a pair twice or one out of range; their layer is trained by another unlearner; an
            unknown `objective`; a weight out of range; a `steer_at` that names no module.

    Source:
        arXiv 2411.18797. From the paper: what is trained, the loss, α = λ = 1, learning rate 1e-4 with 16 texts a step. Our
        choices: the anchor is averaged over the tokens of the forget batch that are not padding, and over several targets. That
        RMU draws u's entries uniform in [0, 1) is from memory of its paper, unverified.
    """

    def __init__(
        self,
        model: Any,
        targets: Sequence[tuple[int, int]],
        objective: str | Objective = "ga",
        anchor_weight: float = 1.0,
        retain_weight: float = 1.0,
        *,
        beta: float = 0.001,
        steer: float = 8000.0,
        steer_at: str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        blocks = moe_blocks(model)
        _check_targets(blocks, targets)
        if isinstance(objective, str) and objective not in _OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(_OBJECTIVES)} or a function, got {objective!r}")
        for name, value in (("anchor_weight", anchor_weight), ("retain_weight", retain_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        for name, value in (("beta", beta), ("steer", steer)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")
        self.targets = list(targets)
        self.objective, self.anchor_weight, self.retain_weight = objective, anchor_weight, retain_weight
        self.beta, self.steer = beta, steer

        layers = sorted({layer for layer, _ in targets})
        if objective == "rmu":
            self.steer_at = _steered(model, blocks[layers[0]].name, steer_at)

        self.model = model
        self._was_trained = [parameter.requires_grad for parameter in model.parameters()]
        model.requires_grad_(False)
        self.slices = nn.ModuleList(_Slices(blocks[at], [expert for layer, expert in targets if layer == at]) for at in layers)
        for each in self.slices:
            each.block.router.requires_grad_(True)
        for place, parameter in enumerate(self.trainable_parameters()):
            self.register_buffer(f"original_{place}", parameter.detach().clone())
        if objective == "rmu":
            width = blocks[layers[0]].experts.down_proj.shape[1]
            direction = F.normalize(torch.rand(width, generator=generator), dim=0)
            self.register_buffer("direction", direction.to(next(model.parameters()).device))

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The chosen experts' weights and their layers' routers, for the optimiser."""
        return [p for each in self.slices for p in (*each.parameters(), *each.block.router.parameters())]

    def forward(self, forget: Mapping[str, Any], retain: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        """The loss of a step.

        Args:
            forget: `input_ids` (B, L); `attention_mask` (B, L) if some are padding; `labels` (B, L), the tokens or -100, if
                not all tokens should be unlearnt. The anchor holds all that are not padding. What else is in it goes to the
                model.
            retain: of the same form.

        Returns:
            `loss`, which has the gradient, and its parts without weights and gradient: `forget`, `retain` (where there is one;
            of `"rmu"` the two are one) and `anchor`.

        Raises:
            ValueError: a batch without tokens that count, no `retain` for `"gdiff"` or `"rmu"`, or a `steer_at` that no trained
                expert reaches.
            RuntimeError: after `merge`.
        """
        if not self.slices:
            raise RuntimeError("the trained experts are merged; make a new SingleExpertUnlearner to go on")
        if retain is None and self.objective in ("gdiff", "rmu"):
            raise ValueError(f"retain must be given for the objective {self.objective!r}, got None")
        labels = _labels(forget)
        with self._listening() as heard:
            logits = self.model(**_inputs(forget)).logits
        anchor = self._anchor(heard, _token_mask(forget).flatten())

        kept = None  # the retained batch's share, where it is a term of its own
        if self.objective == "rmu":
            unlearning = self._rmu(heard["hidden"], forget, retain)
        else:
            unlearning = self._unlearning(logits, labels, forget)
            if retain is not None:
                kept = _cross_entropy(self.model(**_inputs(retain)).logits, _labels(retain))
        loss = unlearning + self.anchor_weight * anchor
        parts = {"forget": unlearning.detach(), "anchor": anchor.detach()}
        if kept is not None:
            loss = loss + self.retain_weight * kept
            parts["retain"] = kept.detach()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def merge(self) -> Any:
        """Write the trained experts into the model, take everything else away again, and return the model.

        Which parameters require a gradient is as it was before; what was frozen is what it was, bit for bit.
        """
        for each in self.slices:
            each.fold()
        self.slices = nn.ModuleList()
        for parameter, was_trained in zip(self.model.parameters(), self._was_trained, strict=True):
            parameter.requires_grad_(was_trained)
        return self.model

    @contextmanager
    def original(self) -> Iterator[None]:
        """Inside, the model computes what it did before unlearning, without gradients."""
        with torch.no_grad():
            self._exchange()
            try:
                yield
            finally:
                self._exchange()

    def _exchange(self) -> None:
        for place, parameter in enumerate(self.trainable_parameters()):
            name = f"original_{place}"
            held = getattr(self, name)
            setattr(self, name, parameter.data)
            parameter.data = held

    @contextmanager
    def _listening(self) -> Iterator[dict[Any, Tensor]]:
        """Keeps the scores of the trained layers' routers, and the states that are steered, of the passes inside."""
        heard: dict[Any, Tensor] = {}

        def router(layer: int, module: nn.Module, args: Any, output: Any) -> None:
            heard[layer] = Routing(*output).logits

        def hidden(module: nn.Module, args: Any, output: Any) -> None:
            heard["hidden"] = output[0] if isinstance(output, tuple) else output

        handles = [each.block.router.register_forward_hook(partial(router, each.block.layer_index)) for each in self.slices]
        if self.objective == "rmu":
            handles.append(self.model.get_submodule(self.steer_at).register_forward_hook(hidden))
        try:
            yield heard
        finally:
            for handle in handles:
                handle.remove()

    def _anchor(self, heard: dict[Any, Tensor], mask: Bool[Tensor, " tokens"]) -> Float[Tensor, ""]:
        losses = [router_anchor_loss(heard[layer], expert, mask) for layer, expert in self.targets]
        return torch.stack(losses).mean()

    def _unlearning(self, logits: Tensor, labels: Tensor, forget: Mapping[str, Any]) -> Tensor:
        if callable(self.objective):
            return self.objective(logits, labels)
        if self.objective == "npo":
            with self.original():
                reference = sequence_log_probs(self.model(**_inputs(forget)).logits, labels)
            return npo_loss(sequence_log_probs(logits, labels), reference, self.beta)
        return -_cross_entropy(logits, labels)

    def _rmu(self, hidden: Tensor, forget: Mapping[str, Any], retain: Mapping[str, Any]) -> Tensor:
        if not hidden.requires_grad:
            raise ValueError(f"steer_at must be a module that the trained experts reach, got {self.steer_at!r}")
        with self._listening() as heard:
            self.model(**_inputs(retain))
            now = heard["hidden"]
            with self.original():
                self.model(**_inputs(retain))
            before = heard["hidden"]
        counts = _token_mask(retain)
        return rmu_loss(hidden[_token_mask(forget)], self.direction, self.steer, now[counts], before[counts], self.retain_weight)


class _Slices(nn.Module):
    """Trained copies of some experts of one block, standing in for theirs there."""

    def __init__(self, block: MoEBlock, experts: list[int]) -> None:
        super().__init__()
        self.block, self.experts = block, experts
        states = [expert_state_dict(block, expert) for expert in experts]
        self.weights = nn.ParameterDict({name: torch.stack([state[name] for state in states]) for name in states[0]})
        # From an expert of the block to its place here; past the last place for one that is not here, or for none.
        place = torch.full((block.num_experts + 1,), len(experts))
        place[experts] = torch.arange(len(experts))
        self.register_buffer("place", place.to(block.experts.down_proj.device), persistent=False)
        # On the instance, so that the host's class, its parameters and its state dict stay what they are.
        block.experts.forward = partial(_run_own if isinstance(block.experts, MoE) else _run_host, self)

    def run(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        host: Any = self.block.experts
        act = host.act if isinstance(host, MoE) else activation_name(host.act_fn)
        place = self.place[index]
        rest = index.masked_fill(place < len(self.experts), self.block.num_experts)
        biases = ("gate_up_bias", "down_bias")
        frozen = [getattr(host, name, None) for name in biases]
        own = [self.weights.get(name, None) for name in biases]
        y = moe_forward(x, rest, weights, host.gate_up_proj, host.down_proj, act=act, bias1=frozen[0], bias2=frozen[1])
        mine = self.weights["gate_up_proj"], self.weights["down_proj"]
        return y + moe_forward(x, place, weights, *mine, act=act, bias1=own[0], bias2=own[1])

    def fold(self) -> None:
        del self.block.experts.forward
        for place, expert in enumerate(self.experts):
            set_expert(self.block, expert, {name: weight[place] for name, weight in self.weights.items()})


def _run_host(slices: _Slices, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In place of the forward method of transformers' experts."""
    return slices.run(hidden_states, top_k_index, top_k_weights)


def _run_own(slices: _Slices, x: Tensor) -> Tensor:
    """In place of the forward method of a `MoE`."""
    host: Any = slices.block.block
    flat = x.reshape(-1, x.shape[-1])
    routing = Routing(*host.router(flat))
    host.last_routing = Routing(*(part.detach() for part in routing))
    y = slices.run(flat, routing.index, routing.weights)
    if host.shared is not None:
        y = y + host.shared(flat)
    return y.view_as(x)


def _check_targets(blocks: list[MoEBlock], targets: Sequence[tuple[int, int]]) -> None:
    if not targets:
        raise ValueError("targets must name at least one (layer, expert), got none")
    if len(set(targets)) < len(targets):
        raise ValueError(f"targets must be different from each other, got {list(targets)}")
    for layer, expert in targets:
        if not 0 <= layer < len(blocks):
            raise ValueError(f"targets: layer must be in [0, {len(blocks)}), the number of sparse blocks, got {layer}")
        if not 0 <= expert < blocks[layer].num_experts:
            raise ValueError(f"targets: expert must be in [0, {blocks[layer].num_experts}), got {expert} for layer {layer}")
        experts = blocks[layer].experts
        if isinstance(experts, MoE) and type(experts).forward is not MoE.forward:
            raise ValueError(f"targets: layer {layer} is a {type(experts).__name__}, which runs its experts in its own way")
        forward = vars(experts).get("forward")
        if isinstance(forward, partial) and isinstance(forward.args[0], _Slices):
            raise ValueError(f"layer {layer} of model is being trained by another SingleExpertUnlearner; merge that first")


def _steered(model: nn.Module, block: str, steer_at: str | None) -> str:
    """Name of the module whose output is steered: by default what contains the block, which is the layer with its residual."""
    if steer_at is None:
        return block.rpartition(".")[0] or block
    if steer_at not in dict(model.named_modules()):
        raise ValueError(f"steer_at must name a module of the model, got {steer_at!r}")
    return steer_at


def _inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the model is called with: all but the labels, whose loss is taken here."""
    if "input_ids" not in batch:
        raise ValueError(f"a batch must have input_ids, got {', '.join(batch) or 'nothing'}")
    return {name: value for name, value in batch.items() if name != "labels"}


def _token_mask(batch: Mapping[str, Any]) -> Bool[Tensor, "batch length"]:
    """Tokens that are no padding."""
    ids = _inputs(batch)["input_ids"]
    mask = batch.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _labels(batch: Mapping[str, Any]) -> Int[Tensor, "batch length"]:
    labels = batch["labels"] if "labels" in batch else _inputs(batch)["input_ids"]
    labels = labels.masked_fill(~_token_mask(batch), -100)
    if not (labels[:, 1:] != -100).any():
        raise ValueError(f"a batch must have tokens to predict, got none in input_ids of shape {tuple(labels.shape)}")
    return labels


def _cross_entropy(logits: Tensor, labels: Tensor) -> Float[Tensor, ""]:
    """Mean over all tokens that count, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
