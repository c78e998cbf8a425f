"""Focal loss: cross-entropy that fades for what is already classified well, so that a rare class is not drowned."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor


def sigmoid_focal_loss(
    logits: Float[Tensor, "*shape"],
    target: Shaped[Tensor, "*shape"],
    *,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Focal loss of independent yes-or-no decisions.

    $$ L = -\alpha_t (1 - p_t)^\gamma \log p_t, \qquad
       (p_t, \alpha_t) = \begin{cases} (\sigma(z), \alpha) & y = 1 \\ (1 - \sigma(z), 1 - \alpha) & y = 0 \end{cases} $$

    Args:
        logits: z, any shape.
        target: y, in `[0, 1]`. Between the ends it is the probability of a 1, and the loss is the expected one.
        alpha: weight of the positives, in `[0, 1]`; negatives have 1 - alpha. `None` gives all the weight 1.
        gamma: how fast the loss fades as p_t grows, at least 0. At 0 this is (weighted) binary cross-entropy.
        reduction: `"mean"` over all entries (not over the weights), `"sum"` or `"none"`.

    Returns:
        The loss, in the dtype of `logits`. It is computed in float32 or wider.

    Raises:
        ValueError: `alpha`, `gamma` or a target out of range, shapes that differ, no entries to average, an unknown `reduction`.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002, equation 5; used for plagiarism
        detection in arXiv 2305.02374. The defaults are those of detection, where they were tuned. Soft targets are our addition.
    """
    _check(gamma, reduction)
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be None or in [0, 1], got {alpha}")
    if logits.shape != target.shape:
        raise ValueError(f"target must have the shape of logits, {tuple(logits.shape)}, got {tuple(target.shape)}")
    if not torch.compiler.is_compiling() and target.numel() and not ((target >= 0) & (target <= 1)).all():
        raise ValueError(f"target must be in [0, 1], got values from {target.min().item()} to {target.max().item()}")
    z = _wide(logits)
    y = target.to(z.dtype)
    log_p, log_q = F.logsigmoid(z), F.logsigmoid(-z)
    # (1 - p)^γ as exp(γ log(1 - p)): exact far out, and its gradient has no 0 · inf where γ < 1.
    positive = -(gamma * log_q).exp() * log_p
    negative = -(gamma * log_p).exp() * log_q
    weight, other = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    return _reduce(weight * y * positive + other * (1 - y) * negative, reduction, z.numel()).to(logits.dtype)


def focal_loss(
    logits: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    alpha: Float[Tensor, " classes"] | None = None,
    gamma: float = 2.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Focal loss of a choice between classes.

    $$ L = -\alpha_y (1 - p_y)^\gamma \log p_y, \qquad p = \mathrm{softmax}(z) $$

    Args:
        logits: z; at least two classes.
        target: y, in `[0, classes)`, or `ignore_index`.
        alpha: weight of each class, at least 0. `None` is 1 for all.
        gamma: how fast the loss fades as p_y grows, at least 0. At 0 this is cross-entropy.
        ignore_index: rows with this target cost nothing and do not count in the mean.
        reduction: `"mean"` over the rows that count (not over their weights, unlike `F.cross_entropy`), `"sum"` or `"none"`.

    Returns:
        The loss, in the dtype of `logits`. It is computed in float32 or wider.

    Raises:
        ValueError: a target, `alpha` or `gamma` out of range, shapes that do not belong together, no rows to average, an unknown
            `reduction`.

    Source:
        As `sigmoid_focal_loss`, with softmax for sigmoid. Of two classes without `alpha` it is that loss of z_1 - z_0.
    """
    _check(gamma, reduction)
    if logits.ndim < 1 or logits.shape[-1] < 2 or logits.shape[:-1] != target.shape:
        raise ValueError(
            f"logits must be (*batch, classes) with at least 2 classes and target (*batch), "
            f"got {tuple(logits.shape)} and {tuple(target.shape)}"
        )
    classes = logits.shape[-1]
    if alpha is not None and (alpha.shape != (classes,) or not (alpha >= 0).all()):
        raise ValueError(f"alpha must be None or {classes} weights of at least 0, got {alpha.tolist()}")
    counts = target != ignore_index
    if not torch.compiler.is_compiling() and not ((target >= 0) & (target < classes) | ~counts).all():
        raise ValueError(
            f"target must be in [0, {classes}) or {ignore_index}, got {target.min().item()} to {target.max().item()}"
        )
    z = _wide(logits)
    y = torch.where(counts, target, 0).long().unsqueeze(-1)
    total = z.logsumexp(dim=-1)
    log_p = z.gather(-1, y).squeeze(-1) - total
    # log(1 - p_y) from the other classes: 1 - exp(log p_y) would lose all digits near p_y = 1.
    log_q = z.scatter(-1, y, -math.inf).logsumexp(dim=-1) - total
    loss = -(gamma * log_q).exp() * log_p
    if alpha is not None:
        loss = loss * alpha.to(loss)[y.squeeze(-1)]
    return _reduce(torch.where(counts, loss, 0.0), reduction, counts.sum()).to(logits.dtype)


def focal_compute_loss(
    outputs: Any,
    labels: Tensor,
    num_items_in_batch: Tensor | float | None = None,
    *,
    alpha: Any = None,
    gamma: float = 2.0,
) -> Float[Tensor, ""]:
    """Focal loss for `transformers.Trainer(compute_loss_func=...)`.

    ```python
    trainer = Trainer(model, args, train_dataset=pairs, compute_loss_func=partial(focal_compute_loss, gamma=2.0))
    ```

    Args:
        outputs: of the model; its `logits` (or the entry of that name) are (batch, ..., classes). With one class, or with labels
            in floating point of the logits' shape, each is a decision of its own (`sigmoid_focal_loss`); else `focal_loss`.
        labels: as for these; -100 is left out of `focal_loss`.
        num_items_in_batch: given by the trainer: labels in all the batches that one step accumulates, to average over.
        alpha: weight of the positives, or of each class (a tensor or list); `None` is 1.
        gamma: as in `focal_loss`.

    Raises:
        ValueError: as the two losses.

    Source:
        As `sigmoid_focal_loss`, arXiv 1708.02002. With labels of several decisions an item is a row, as the trainer counts
        entries; the loss is then summed over entries and divided by the trainer's count.
    """
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    reduction = "mean" if num_items_in_batch is None else "sum"
    if logits.shape[-1] == 1 and labels.shape == logits.shape[:-1]:
        logits = logits.squeeze(-1)
    if labels.shape == logits.shape:
        loss = sigmoid_focal_loss(logits, labels, alpha=alpha, gamma=gamma, reduction=reduction)
    else:
        weights = None if alpha is None else torch.as_tensor(alpha, dtype=torch.float32, device=logits.device)
        loss = focal_loss(logits, labels, alpha=weights, gamma=gamma, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def _check(gamma: float, reduction: str) -> None:
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma must be at least 0 and finite, got {gamma}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _reduce(loss: Tensor, reduction: str, count: Tensor | int) -> Tensor:
    if reduction == "mean":
        if not torch.compiler.is_compiling() and not count:
            raise ValueError("logits must have entries that count to be averaged, got none")
        return loss.sum() / count
    return loss.sum() if reduction == "sum" else loss
