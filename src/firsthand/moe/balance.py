"""Balance losses of mixtures of experts: over a micro-batch or over the whole batch of a step, and the router's z-loss."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

try:
    from transformers import TrainerCallback
except ImportError:  # the losses serve any loop; BalanceCallback says what is missing
    TrainerCallback = None  # type: ignore[assignment, misc]


def load_balancing_loss(
    router_logits: Float[Tensor, "tokens experts"],
    top_k: int,
    *,
    counts: Int[Tensor, " experts"] | Float[Tensor, " experts"] | None = None,
    token_mask: Bool[Tensor, " tokens"] | None = None,
    normalize: str = "selections",
) -> Float[Tensor, ""]:
    r"""How far the experts of one layer are from sharing the tokens evenly.

    $$ L = E \sum_{e=1}^{E} f_e P_e, \qquad P_e = \frac1T \sum_t \mathrm{softmax}(z_t)_e, \qquad
       f_e = \frac{c_e}{\sum_{e'} c_{e'}} $$

    with $c_e$ how often expert e was selected. Only P has a gradient; counts are integers. With the counts of the global batch
    the router may send all tokens of a micro-batch to few experts, as long as the other micro-batches use the others.

    Args:
        router_logits: of one layer. Several layers are averaged over their losses, not pooled: four layers that each use one
            expert, each another, are not balanced.
        top_k: k, how many experts a token is sent to, in [1, E]. The softmax is over all experts, then come the k largest.
        counts: c, how often each expert was selected in the batch that should be balanced; of the given logits if None.
        token_mask: true for the tokens that count; padding is false. All of them if None.
        normalize: `"selections"`, or `"tokens"` for f that sums to k, and so k times the loss.

    Returns:
        A scalar in float32 or wider: 1 if either f or P is uniform, E if all tokens go to one expert with k = 1; less than 1 only
        if f and P disagree. 0 where no token counts.

    Raises:
        ValueError: `top_k` or `normalize` out of range, or shapes that do not belong together.

    Source:
        Qiu et al., "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models",
        2025, arXiv 2501.11873, equations 3 to 6; without `counts` it is the loss of Switch Transformer for any k. That f sums
        to 1 is our choice, so that balanced is 1 for every k; transformers' loss is that of `"tokens"`, and pools its layers.
    """
    if normalize not in ("selections", "tokens"):
        raise ValueError(f"normalize must be 'selections' or 'tokens', got {normalize!r}")
    _check_logits(router_logits, token_mask)
    _check_top_k(top_k, router_logits.shape[1])
    probabilities = _softmax(router_logits)
    if counts is None:
        counts = _count(_select(probabilities, top_k), router_logits.shape[1], token_mask)
    if counts.shape != router_logits.shape[1:]:
        raise ValueError(f"counts must have one number for each of {router_logits.shape[1]} experts, got {tuple(counts.shape)}")
    loss = _balance(counts, _token_mean(probabilities, token_mask))
    return loss * top_k if normalize == "tokens" else loss


def router_z_loss(
    router_logits: Float[Tensor, "tokens experts"], token_mask: Bool[Tensor, " tokens"] | None = None
) -> Float[Tensor, ""]:
    r"""Keeps router logits small, so that they are not rounded away in low precision.

    $$ L_z = \frac1T \sum_t \Big( \log \sum_e e^{z_{te}} \Big)^2 $$

    Args:
        router_logits: z, of one layer.
        token_mask: true for the tokens that count; all of them if None.

    Returns:
        A scalar in float32 or wider, 0 where no token counts. The usual weight is 0.001.

    Raises:
        ValueError: shapes that do not belong together.

    Source:
        Zoph et al., "ST-MoE", 2022, arXiv 2202.08906, equation 5 (formula from memory of the paper).
    """
    _check_logits(router_logits, token_mask)
    square = router_logits.to(_wide(router_logits)).logsumexp(dim=-1, keepdim=True).square()
    return _token_mean(square, token_mask).squeeze(-1)


@torch.no_grad()
def selection_counts(
    routing: Float[Tensor, "tokens experts"] | Int[Tensor, "tokens k"],
    top_k: int | None = None,
    num_experts: int | None = None,
    token_mask: Bool[Tensor, " tokens"] | None = None,
) -> Int64[Tensor, " experts"]:
    """How often each expert of a layer is selected.

    Args:
        routing: router logits, of which the `top_k` largest of each token count; or the selected experts themselves (integers),
            where `num_experts` as an entry stands for no expert.
        top_k: k, in [1, experts]; for router logits only.
        num_experts: E; for selected experts only, elsewhere it must be that of the logits.
        token_mask: true for the tokens that count; all of them if None.

    Returns:
        The counts, without a gradient. They sum to k times the number of tokens, less the entries that stand for no expert.

    Raises:
        ValueError: `top_k` or `num_experts` missing, out of range, or not those of `routing`; an entry that is no expert.
    """
    _check_logits(routing, token_mask, name="routing")
    if routing.is_floating_point():
        if num_experts not in (None, routing.shape[1]):
            raise ValueError(f"num_experts must be the number of columns of routing, {routing.shape[1]}, got {num_experts}")
        _check_top_k(top_k, routing.shape[1])
        return _count(_select(_softmax(routing), top_k), routing.shape[1], token_mask)
    if num_experts is None or num_experts < 1:
        raise ValueError(f"num_experts must be at least 1 where routing is the selected experts, got {num_experts}")
    if top_k not in (None, routing.shape[1]):
        raise ValueError(f"top_k must be the number of columns of routing, {routing.shape[1]}, got {top_k}")
    index = routing.long()
    if not torch.compiler.is_compiling() and index.numel() and not 0 <= index.min() <= index.max() <= num_experts:
        raise ValueError(f"routing must be in [0, {num_experts}], got values in [{index.min()}, {index.max()}]")
    return _count(index, num_experts, token_mask)


class GlobalBatchBalance(nn.Module):
    r"""The balance loss of a training step, worked out one micro-batch at a time.

    Of micro-batch j, on whatever rank and in whatever accumulation step, averaged over layers:

    $$ L_j = w\, E \sum_e \bar f_e\, \frac{n_j}{\bar n} P_e^j $$

    $\bar f$ are the frequencies in the batch that `scope` names, $n_j$ the tokens of the micro-batch, $\bar n$ their mean over
    the micro-batches in scope. The gradient flows through the micro-batch's own P. The losses are meant to be averaged over
    micro-batches, as DDP does with gradients and `(loss / accumulation_steps).backward()` does with losses. What that comes to:

    - `"micro"`: the mean of the micro-batches' own losses. No communication.
    - `"global"`: without accumulation exactly the loss of the whole batch over all ranks, of unequal sizes too, and its gradient.
      With accumulation, the mean of that over the accumulation steps.
    - `"buffer"`: the counts of the accumulation steps before are added, so f̄ is that of the whole batch in the last of them, and
      an estimate from fewer tokens in the others. Exact without accumulation, an approximation with it. Call `reset` after each
      optimizer step.
    - `"ahead"`: exactly the loss of the whole batch over all ranks and accumulation steps, and its gradient. f̄ must be known
      before the first backward pass, so all micro-batches are run forward once more, without a gradient, for `count_ahead`: about
      a third more compute. Exact if those passes route as the later ones do: without dropout, and without noise in the router.

    A call counts once: when activation checkpointing repeats it in the backward pass, the counts of the latest forward pass are
    used again. In `eval` mode it looks at the buffer and adds nothing to it.

    Args:
        top_k: k, experts per token, at least 1.
        weight: w, at least 0.
        scope: see above.
        group: the ranks; all of them if None.
        micro_weight: adds the micro-batch's own loss, times this and times w; at least 0. Limits the imbalance within a
            micro-batch; 0.01 is the paper's choice.

    Raises:
        ValueError: a setting is out of range.

    Source:
        Qiu et al., 2025, arXiv 2501.11873, equations 4 to 6 and Algorithm 1 (the buffer), weight from table 4. The
        factor $n_j/\bar n$ and the scope `"ahead"` are ours; the paper's micro-batches have equal sizes. The counts of all layers
        travel in one message.
    """

    def __init__(
        self,
        top_k: int,
        weight: float = 0.008,
        scope: str = "global",
        group: dist.ProcessGroup | None = None,
        micro_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if scope not in ("micro", "global", "buffer", "ahead"):
            raise ValueError(f"scope must be 'micro', 'global', 'buffer' or 'ahead', got {scope!r}")
        for name, value in (("weight", weight), ("micro_weight", micro_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        self.top_k, self.weight, self.scope, self.group, self.micro_weight = top_k, weight, scope, group, micro_weight
        self._warned = False
        self._latest: tuple[Tensor, Tensor, int] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the counts: the optimizer has stepped."""
        self.counts: Tensor | None = None  # (layers, experts), over all ranks
        self.expected = 0  # micro-batches of this rank that were counted ahead
        self.seen = 0  # and how many of them have come

    def forward(
        self,
        router_logits: Sequence[Float[Tensor, "tokens _"]],
        token_mask: Bool[Tensor, " tokens"] | None = None,
        share: float | Float[Tensor, ""] | None = None,
    ) -> Float[Tensor, ""]:
        r"""See the class.

        Args:
            router_logits: of each layer; transformers' `outputs.router_logits`.
            token_mask: true for the tokens that count; all of them if None.
            share: this micro-batch's share of the step's tokens over all ranks and accumulation steps, if you know it. Then it
                stands for $n_j/\bar n$, and the losses are meant to be summed, as those of a loop that divides its token losses
                by the number of tokens in the step. Not for the scope `"ahead"`, which knows it.

        Raises:
            ValueError: no layers, layers that do not belong together, a mask that does not, `top_k` above the number of experts,
                a `share` with `"ahead"`, or more micro-batches than were counted ahead.
        """
        if share is not None and self.scope == "ahead":
            raise ValueError("share is not for the scope 'ahead', which counts the tokens itself")
        probabilities = _softmax(self._stack(router_logits, token_mask))
        counts = _count(_select(probabilities, self.top_k), probabilities.shape[-1], token_mask)
        if torch._C._current_graph_task_id() == -1 or self._latest is None:
            self._latest = self._in_scope(counts)
        # Else this is inside a backward pass: checkpointing computes again what has been counted, on all ranks, before.
        totals, together, groups = self._latest
        factor, selections = (groups, together) if share is None else (share, counts)
        tokens = selections.sum(-1, keepdim=True).clamp(min=1).to(probabilities) / self.top_k  # in each layer
        weighted = _token_sum(probabilities, token_mask) * factor / tokens
        loss = _balance(totals, weighted)
        if self.micro_weight:
            loss = loss + self.micro_weight * _balance(counts, weighted)
        return self.weight * loss.mean()

    def count_ahead(
        self,
        router_logits: Iterable[Sequence[Float[Tensor, "_ _"]]],
        token_masks: Iterable[Bool[Tensor, " _"] | None] | None = None,
    ) -> None:
        """Count the selections of all micro-batches of the step to come, for the scope `"ahead"`.

        Every rank calls it once a step, before the first `forward` with a gradient.

        Args:
            router_logits: of each layer, for each micro-batch of this rank. From a generator that runs the model, one
                micro-batch at a time is kept, and no graph.
            token_masks: of each micro-batch, as for `forward`.

        Raises:
            ValueError: the scope is another, there are no micro-batches, or see `forward`.
        """
        if self.scope != "ahead":
            raise ValueError(f"count_ahead is for the scope 'ahead', got {self.scope!r}")
        self.reset()
        masks = None if token_masks is None else iter(token_masks)
        with torch.no_grad():
            for logits in router_logits:
                mask = None if masks is None else next(masks)
                probabilities = _softmax(self._stack(logits, mask))
                counts = _count(_select(probabilities, self.top_k), probabilities.shape[-1], mask)
                self.counts = counts if self.counts is None else self.counts + counts
                self.expected += 1
        if self.counts is None:
            raise ValueError("router_logits must be those of at least one micro-batch, got none")
        self.counts = self._all_reduce(self.counts)

    def get_extra_state(self) -> dict[str, Any]:
        """What has been counted since the last optimizer step; `state_dict` and `load_state_dict` use it."""
        return {"counts": self.counts, "expected": self.expected, "seen": self.seen}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        self.counts, self.expected, self.seen = state["counts"], state["expected"], state["seen"]

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, weight={self.weight}, scope={self.scope!r}, micro_weight={self.micro_weight}"

    def _in_scope(self, counts: Tensor) -> tuple[Tensor, Tensor, int]:
        """The counts for f̄; those of the micro-batches that are weighed against each other; and how many these are."""
        if self.scope == "micro":
            return counts, counts, 1
        if self.counts is not None and self.counts.shape != counts.shape:
            shapes = f"{tuple(self.counts.shape)}, got {tuple(counts.shape)}"
            raise ValueError(f"router_logits must be of as many layers and experts as those counted before, {shapes}")
        if self.scope == "ahead":
            if self.counts is None or self.seen == self.expected:
                raise ValueError(
                    f"count_ahead must be called before each step: it was given {self.expected} micro-batches, got one more"
                )
            self.seen += self.training
            totals = self.counts.to(counts.device)
            return totals, totals, self._ranks() * self.expected
        together = self._all_reduce(counts)
        totals = together
        if self.scope == "buffer":
            totals = together if self.counts is None else together + self.counts.to(counts.device)
            if self.training:
                self.counts = totals
        return totals, together, self._ranks()

    def _stack(self, router_logits: Sequence[Tensor], token_mask: Tensor | None) -> Tensor:
        if not len(router_logits):
            raise ValueError("router_logits must be those of at least one layer, got none")
        for logits in router_logits:
            _check_logits(logits, token_mask)
            if logits.shape != router_logits[0].shape:
                shapes = f"{tuple(router_logits[0].shape)} and {tuple(logits.shape)}"
                raise ValueError(f"router_logits must have the same tokens and experts in all layers, got {shapes}")
        _check_top_k(self.top_k, router_logits[0].shape[1])
        return torch.stack([logits.to(router_logits[0].device) for logits in router_logits])  # a model may span devices

    def _ranks(self) -> int:
        return dist.get_world_size(self.group) if dist.is_available() and dist.is_initialized() else 1

    def _all_reduce(self, counts: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            counts = counts.clone()
            dist.all_reduce(counts, group=self.group)
        elif self.scope == "global" and not self._warned:
            self._warned = True
            warnings.warn(
                "scope='global' without a process group balances each micro-batch by itself; "
                "scope='buffer' counts the micro-batches accumulated before it too",
                stacklevel=2,
            )
        return counts


class BalanceCallback(TrainerCallback or object):
    """`GlobalBatchBalance` for the sparse causal language models that `Trainer` trains, as one of its `callbacks`.

    While training, hooks ask the model for its router logits and add the balance loss to the model's loss; they are gone
    afterwards. Evaluation and generation are as ever. The model's own balance loss (`router_aux_loss_coef`) is off for that time.
    Padding, by `attention_mask`, does not count.

    The balance loss of a micro-batch has the weight that `Trainer` gives its cross-entropy: its share of the step's label tokens,
    or, where the model does not take `num_items_in_batch`, the same for all. (transformers' own balance loss is added in full in
    every accumulation step, so its weight grows with their number.) The scope `"ahead"` weighs by tokens and is exact.

    Args:
        weight: of the balance loss.
        scope: as in `GlobalBatchBalance`. `"ahead"` takes a `Trainer` that calls `count_ahead` in `get_batch_samples`.
        group: the ranks; all of them if None.
        micro_weight: see `GlobalBatchBalance`.

    Raises:
        ImportError: transformers is not installed.
        ValueError: a setting is out of range; or, in training, the model has no experts or returns no router logits or no loss.
    """

    def __init__(
        self,
        weight: float = 0.008,
        scope: str = "buffer",
        group: dist.ProcessGroup | None = None,
        micro_weight: float = 0.0,
    ) -> None:
        if TrainerCallback is None:
            raise ImportError("BalanceCallback needs transformers: pip install 'firsthand[hf]'")
        self.balance = GlobalBatchBalance(1, weight, scope, group, micro_weight)  # top_k comes with the model
        self._undo: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.on_train_end()
        config = model.config.get_text_config()
        top_k = getattr(config, "num_experts_per_tok", None)
        if top_k is None:
            raise ValueError(f"model must have experts, but {type(config).__name__} has no num_experts_per_tok")
        self.balance.top_k = top_k
        self.balance.reset()
        self._sums_over_ranks = args.average_tokens_across_devices
        for module in model.modules():
            if hasattr(module, "router_aux_loss_coef"):
                self._undo.append(
                    lambda module=module, own=module.router_aux_loss_coef: setattr(module, "router_aux_loss_coef", own)
                )
                module.router_aux_loss_coef = 0.0
        self._undo.append(model.register_forward_pre_hook(self._ask, with_kwargs=True).remove)
        self._undo.append(model.register_forward_hook(self._add, with_kwargs=True).remove)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.balance.reset()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        while self._undo:
            self._undo.pop()()

    def count_ahead(self, model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> None:
        """Run the micro-batches of a step forward without a gradient, to count for the scope `"ahead"`.

        Args:
            model: the trainer's `model`. It is put into training mode.
            batches: as `Trainer.get_batch_samples` returns them.

        Raises:
            ValueError: see `GlobalBatchBalance.count_ahead`.
        """
        device = next(model.parameters()).device
        left_out = ("labels", "shift_labels", "num_items_in_batch")
        inputs = [{name: _to(value, device) for name, value in batch.items() if name not in left_out} for batch in batches]
        asked = {"output_router_logits": True, "use_cache": False, "logits_to_keep": 1}
        model.train()
        with torch.no_grad():
            self.balance.count_ahead(
                (model(**each, **asked).router_logits for each in inputs), [_padding_mask(each) for each in inputs]
            )

    def _ask(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return (args, kwargs | {"output_router_logits": True}) if self._is_step(model) else None

    def _add(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Any:
        if not self._is_step(model):
            return None
        logits, loss = getattr(outputs, "router_logits", None), getattr(outputs, "loss", None)
        if not logits:
            raise ValueError(f"{type(model).__name__} must return router_logits, got {type(outputs).__name__} without")
        if loss is None:
            raise ValueError(
                f"{type(model).__name__} must return a loss to add to; with a compute_loss_func (or label smoothing), add "
                "GlobalBatchBalance to the loss there, and reset it after each optimizer step"
            )
        if not any(each.requires_grad for each in logits):
            raise ValueError(
                "router_logits must have a gradient, got none that has: checkpoint activations with use_reentrant=False, "
                "and leave something to train before the last router"
            )
        items, mask = kwargs.get("num_items_in_batch"), _padding_mask(kwargs)
        if items is None:  # Trainer will divide by the accumulation steps
            value = self.balance(logits, mask)
        elif self.balance.scope == "ahead":
            ranks = self.balance._ranks() if self._sums_over_ranks else 1  # Trainer will multiply by them
            value = self.balance(logits, mask) / (self.balance.expected * ranks)
        else:
            labels = kwargs["shift_labels"] if kwargs.get("shift_labels") is not None else kwargs["labels"][..., 1:]
            value = self.balance(logits, mask, share=(labels != -100).sum() / items)
        outputs.loss = loss + value.to(loss.device)
        return outputs

    def _is_step(self, model: nn.Module) -> bool:
        return model.training and torch.is_grad_enabled()


def _padding_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    if mask is None:
        return None
    if mask.ndim != 2:
        raise ValueError(f"attention_mask must have shape (batch, tokens) to tell padding, got {tuple(mask.shape)}")
    return mask.flatten().bool()


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _select(probabilities: Tensor, top_k: int) -> Tensor:
    # Of the probabilities and not of the logits, as routers do: rounding makes ties.
    return probabilities.detach().topk(top_k, dim=-1).indices


def _count(index: Tensor, num_experts: int, token_mask: Tensor | None) -> Tensor:
    if token_mask is not None:  # dropping rows instead would make the shape depend on the data
        index = index.masked_fill(~token_mask[:, None], num_experts)
    # A scatter and not bincount: the shape of its result is known beforehand, so that on a GPU nothing waits for it.
    flat = index.flatten(-2)
    return flat.new_zeros(*flat.shape[:-1], num_experts + 1).scatter_add_(-1, flat, torch.ones_like(flat))[..., :num_experts]


def _balance(counts: Tensor, mean_probability: Tensor) -> Tensor:
    frequency = counts.to(mean_probability) / counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (frequency * mean_probability).sum(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=-1, dtype=_wide(logits))


def _token_sum(values: Tensor, token_mask: Tensor | None) -> Tensor:
    return (values if token_mask is None else values.masked_fill(~token_mask[:, None], 0)).sum(-2)


def _token_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    tokens = max(values.shape[-2], 1) if token_mask is None else token_mask.sum().clamp(min=1)
    return _token_sum(values, token_mask) / tokens


def _check_top_k(top_k: int | None, experts: int) -> None:
    if top_k is None or not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be in [1, {experts}], the number of experts, got {top_k}")


def _check_logits(logits: Tensor, token_mask: Tensor | None, name: str = "router_logits") -> None:
    if logits.ndim != 2:
        raise ValueError(f"{name} must have shape (tokens, experts), got {tuple(logits.shape)}")
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != logits.shape[:1]):
        raise ValueError(
            f"token_mask must be boolean of shape ({len(logits)},), got {token_mask.dtype} of shape {tuple(token_mask.shape)}"
        )
