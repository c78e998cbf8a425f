"""How evenly the experts are used, layer by layer and domain by domain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric


class ExpertLoad(Metric):
    r"""Counts how often each expert is chosen, and says how uneven that is.

    With $f_{le}$ the share of layer l's choices that went to expert e (each layer's shares sum to 1) and E experts, `compute`
    returns, for each layer by itself,

    - `counts` (L, E): choices, summed over groups; `frequency` (L, E): $f_{le}$;
    - `cv` (L): standard deviation of $f_l$ over experts divided by its mean $1/E$; 0 is balanced, $\sqrt{E-1}$ is one expert
    for all;
    - `max_over_mean` (L): $E \max_e f_{le}$, the load of the busiest expert in units of a fair share, in [1, E];
    - `dead` (L): experts that were never chosen;
    - `by_group` (G, L, E): the frequencies within each group (a domain, a language); not a number for a group without tokens.

    Never pool over layers: four layers that each send everything to an expert of their own look perfectly balanced together.

    Args:
        num_experts: E, at least 1.
        num_layers: L, at least 1.
        num_groups: G, at least 1.
        top_k: how many experts a token has; needed if `update` is given logits.

    Raises:
        ValueError: a size below 1, or `top_k` above `num_experts`.

    Source:
        The usual diagnostics of a router, in no one paper; the warning about pooling is what transformers'
        `load_balancing_loss_func` runs into.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_experts: int, num_layers: int = 1, num_groups: int = 1, top_k: int | None = None) -> None:
        super().__init__()
        for name, size in (("num_experts", num_experts), ("num_layers", num_layers), ("num_groups", num_groups)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in [1, {num_experts}], got {top_k}")
        self.num_experts, self.num_layers, self.num_groups, self.top_k = num_experts, num_layers, num_groups, top_k
        self.add_state("counts", torch.zeros(num_groups, num_layers, num_experts, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        layers: Sequence[Int[Tensor, "tokens k"] | Float[Tensor, "tokens experts"]],
        group: int | Int[Tensor, " tokens"] | None = None,
        token_mask: Tensor | None = None,
    ) -> None:
        """Count the choices of a batch.

        Args:
            layers: for each layer the chosen experts (integers; `num_experts` means none), or the router's logits (their
                `top_k` largest are the choice). transformers' `outputs.router_logits` is just this.
            group: of the whole batch, or of each token, in `[0, num_groups)`; all tokens are of group 0 if None.
            token_mask: (tokens) true where a token counts; all do if None. Padding should not.

        Raises:
            ValueError: another number of layers, logits without `top_k` or with another number of experts, an index, group or
                mask out of range.
        """
        if len(layers) != self.num_layers:
            raise ValueError(f"layers must be of the {self.num_layers} layers, got {len(layers)}")
        tokens = len(layers[0])
        groups = torch.as_tensor(0 if group is None else group, device=layers[0].device).expand(tokens)
        if tokens and (int(groups.min()) < 0 or int(groups.max()) >= self.num_groups):
            raise ValueError(f"group must be in [0, {self.num_groups}), got values in [{groups.min()}, {groups.max()}]")
        if token_mask is not None and token_mask.numel() != tokens:
            raise ValueError(f"token_mask must have one entry for each of the {tokens} tokens, got {token_mask.numel()}")
        for place, layer in enumerate(layers):
            index = self._index(layer)
            if len(index) != tokens:
                raise ValueError(f"layers must have the same tokens, got {tokens} and, in layer {place}, {len(index)}")
            cell = groups[:, None] * (self.num_experts + 1) + index
            if token_mask is not None:
                cell = cell[token_mask.flatten().bool()]
            counts = torch.bincount(cell.flatten(), minlength=self.num_groups * (self.num_experts + 1))
            self.counts[:, place] += counts.view(self.num_groups, -1)[:, : self.num_experts]

    def _index(self, layer: Tensor) -> Tensor:
        if layer.is_floating_point():
            if self.top_k is None:
                raise ValueError("top_k must be given to count the choices that logits stand for")
            if layer.shape[1] != self.num_experts:
                raise ValueError(f"logits must have {self.num_experts} columns, got {layer.shape[1]}")
            return layer.topk(self.top_k).indices
        if layer.numel() and (int(layer.min()) < 0 or int(layer.max()) > self.num_experts):
            raise ValueError(f"an index must be in [0, {self.num_experts}], got values in [{layer.min()}, {layer.max()}]")
        return layer

    def compute(self) -> dict[str, Tensor]:
        """See the class.

        Raises:
            ValueError: a layer has no choices yet.
        """
        counts = self.counts.sum(0)
        total = counts.sum(1, keepdim=True)
        if (total == 0).any():
            raise ValueError("no expert was chosen yet: call update first")
        frequency = counts / total
        return {
            "counts": counts,
            "frequency": frequency,
            "cv": frequency.std(1, correction=0) * self.num_experts,
            "max_over_mean": frequency.max(1).values * self.num_experts,
            "dead": (counts == 0).sum(1),
            "by_group": self.counts / self.counts.sum(2, keepdim=True),
        }
