"""Attention entropy maximisation (AEM): keep a bag's attention from collapsing onto a few instances."""

from math import cos, isfinite, pi

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torchmetrics import Metric

from firsthand.vision.mil import bag_loss, mask_padding


def aem_loss(
    scores: Float[Tensor, "bags *heads instances"],
    mask: Shaped[Tensor, "..."] | None = None,
    *,
    top_k: int | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "*bags"]:
    r"""Negative entropy of the attention weights, to be added to the bag loss times a small weight λ.

    $$ s = \mathrm{softmax}(f), \qquad L = \sum_n s_n \log s_n \in [-\log N, 0], \qquad
       \frac{\partial L}{\partial f_n} = s_n (\log s_n - L) $$

    Several heads (or one attention a class) are averaged. Gradients flow into the attention and the features alike. Half
    precision is computed, and returned, in float32.

    Args:
        scores: attention scores f *before* the softmax, `(bags, instances)` or `(bags, heads, instances)`, finite: padding is
            what `mask` says, not −∞.
        mask: `(bags, instances)`, 1 (or True) where an instance is real. None: all are real. Padding gets no gradient.
        top_k: take only the k largest weights of each row, scaled to sum to 1; at least 1. None: all.
        reduction: over bags: `"mean"`, `"sum"` or `"none"` (one loss a bag).

    Returns:
        The loss in nats, not yet weighted. Its scale is log N, so a λ found on bags of 10 000 is not the λ for bags of 100.

    Raises:
        ValueError: scores of another rank, a mask of another shape, an empty bag, `top_k` below 1, or an unknown `reduction`.

    Source:
        Zhang et al., "AEM: Attention Entropy Maximization for Multiple Instance Learning based Whole Slide Image Classification",
        2024, arXiv 2406.15303, the regulariser of its method section. The mean over heads is from the authors' code, and so is
        `top_k` (k = 100 there, for one head only); that each of several heads has its own top k is our choice.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    scores = _prepare(scores, mask)
    if top_k is not None:
        scores = scores.topk(min(top_k, scores.shape[-1]), dim=-1).values  # softmax of these = their weights, rescaled
    log_attention = scores.log_softmax(dim=-1)  # finite where s itself is 0, so neither value nor gradient can be 0 · ∞
    loss = (log_attention.exp() * log_attention).sum(dim=-1)
    if loss.ndim == 2:
        loss = loss.mean(dim=1)
    return loss if reduction == "none" else getattr(loss, reduction)()


def attention_entropy(
    scores: Float[Tensor, "bags *heads instances"],
    mask: Shaped[Tensor, "..."] | None = None,
    normalized: bool = False,
) -> Float[Tensor, " bags"]:
    r"""Entropy of each bag's attention, in nats or as a share of the largest possible.

    $$ H = -\sum_n s_n \log s_n \in [0, \log N], \qquad H / \log N \in [0, 1] $$

    Near 0, one instance has all the attention; at 1, the bag is plainly averaged.

    Args:
        scores: attention scores before the softmax, as for `aem_loss`.
        mask: as for `aem_loss`.
        normalized: divide by log N, N the number of real instances of the bag. A bag of one instance gets 1: its attention is
            uniform (our choice).

    Raises:
        ValueError: as `aem_loss`.

    Source:
        As `aem_loss`. The authors' evaluation divides by the number of instances instead of its logarithm; we take the logarithm,
        so that bags of different size share one scale.
    """
    entropy = -aem_loss(scores, mask, reduction="none")
    if not normalized:
        return entropy
    count = torch.full_like(entropy, scores.shape[-1]) if mask is None else mask.bool().sum(dim=1).to(entropy.dtype)
    return torch.where(count > 1, entropy / count.clamp(min=2).log(), torch.ones_like(entropy))


class AttentionEntropy(Metric):
    """Mean over bags of the normalised attention entropy, in `[0, 1]`: falling towards 0 says that attention collapses.

    Call `update(scores, mask)` with scores before the softmax, as for `attention_entropy`. Over batches and processes the mean is
    that over all bags.

    Args:
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: in `update`, as `attention_entropy`.

    Source:
        arXiv 2406.15303, which follows attention entropy over training; normalised as `attention_entropy` says.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    total: Tensor
    bags: Tensor

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("bags", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, scores: Float[Tensor, "bags *heads instances"], mask: Shaped[Tensor, "..."] | None = None) -> None:
        """Add a batch of bags."""
        entropy = attention_entropy(scores, mask, normalized=True)
        self.total = self.total + entropy.sum().to(self.total.dtype)
        self.bags = self.bags + len(entropy)

    def compute(self) -> Float[Tensor, ""]:
        """The mean over all bags so far."""
        return self.total / self.bags


def aem_weight(step: int, total: int, weight: float = 0.1, schedule: str = "constant") -> float:
    r"""The weight λ at a step of training.

    $$ \text{constant: } \lambda_t = \lambda, \qquad \text{cosine: } \lambda_t = \lambda \cdot \tfrac12 (1 + \cos(\pi t / T)) $$

    Args:
        step: t, from 0 to `total`.
        total: T, steps of the whole training, at least 1.
        weight: λ, at least 0.
        schedule: `"constant"` or `"cosine"` (falls to 0).

    Raises:
        ValueError: an argument outside its range, or an unknown schedule.

    Source:
        arXiv 2406.15303. Version 3 names cosine annealing of the weight in its abstract; its formula was not seen, so the half
        cosine from λ to 0 is our choice.
    """
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"step must be in [0, total] and total at least 1, got step={step}, total={total}")
    _check_weight(weight)
    if schedule == "constant":
        return weight
    if schedule == "cosine":
        return weight * 0.5 * (1 + cos(pi * step / total))
    raise ValueError(f"schedule must be 'constant' or 'cosine', got {schedule!r}")


class AEM(nn.Module):
    """A bag classifier whose loss has the attention entropy in it; everything else is the classifier's.

    `compute_loss` makes one forward pass and returns the model's criterion on the bag and, under `"AEM"`, the weighted
    `aem_loss`. It does not call the model's own `compute_loss`: where that has further terms (DSMIL, CLAM), add `aem_loss` of the
    scores to it instead.

    Args:
        mil_model: called as `model(X, mask, return_att=True) -> (logits, scores)` and with a `criterion(logits, labels)`, as
            `AttentionMIL` and torchmil's `ABMIL` are.
        weight: λ, at least 0; may be changed between steps (`aem_weight`). None: the term comes back unweighted, for trainers
            that weigh the terms themselves (torchmil's `annealing_scheduler_dict`).
        top_k: as for `aem_loss`.

    Raises:
        ValueError: a negative weight, `top_k` below 1, or a model without `criterion`.

    Source:
        arXiv 2406.15303; λ = 0.1 is the example of the authors' code, for slides of thousands of patches. Search it on
        validation data.
    """

    def __init__(self, mil_model: nn.Module, weight: float | None = 0.1, top_k: int | None = None) -> None:
        super().__init__()
        if weight is not None:
            _check_weight(weight)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if not callable(getattr(mil_model, "criterion", None)):
            raise ValueError(f"mil_model must have a criterion(logits, labels), got a {type(mil_model).__name__} without one")
        self.mil_model = mil_model
        self.weight = weight
        self.top_k = top_k

    def forward(
        self, X: Float[Tensor, "bags instances *features"], mask: Shaped[Tensor, "..."] | None = None, **kwargs: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The model's own forward pass."""
        return self.mil_model(X, mask, **kwargs)

    def predict(
        self, X: Float[Tensor, "bags instances *features"], mask: Shaped[Tensor, "..."] | None = None, **kwargs: bool
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The model's own prediction."""
        return self.mil_model.predict(X, mask, **kwargs)

    def compute_loss(
        self,
        Y: Shaped[Tensor, " bags"],
        X: Float[Tensor, "bags instances *features"],
        mask: Shaped[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "bags *classes"], dict[str, Float[Tensor, ""]]]:
        """Logits of the bags, and the terms of the loss: the sum of them is what to minimise.

        Args:
            Y: labels of the bags.
            X: the instances, padded to one length.
            mask: 1 (or True) where an instance is real. None: all are real.
        """
        logits, scores = self.mil_model(X, mask, return_att=True)
        regulariser = aem_loss(scores, mask, top_k=self.top_k)
        return logits, {
            type(self.mil_model.criterion).__name__: bag_loss(self.mil_model.criterion, logits, Y),
            "AEM": regulariser if self.weight is None else self.weight * regulariser,
        }


def _prepare(scores: Tensor, mask: Tensor | None) -> Tensor:
    if scores.ndim not in (2, 3):
        raise ValueError(f"scores must be (bags, instances) or (bags, heads, instances), got shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return mask_padding(scores, mask)


def _check_weight(weight: float) -> None:
    if not (isfinite(weight) and weight >= 0):
        raise ValueError(f"weight must be finite and at least 0, got {weight}")
