"""Soft distillation: the student learns the teacher's whole answer."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def soft_distillation_loss(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Float[Tensor, "..."]:
    r"""How far the student's answers are from the teacher's, both softened by a temperature.

    $$ \tau^2\, \mathrm{KL}\big(\operatorname{softmax}(z^t / \tau) \,\|\, \operatorname{softmax}(z^s / \tau)\big) $$

    The factor keeps the size of the gradient much the same whatever the temperature. In `Trainer`, with the teacher's logits in
    place of the labels, a sum has to be divided by the items of all batches that a step accumulates, and each logit is one::

        def loss(outputs, targets, num_items_in_batch):
            each = soft_distillation_loss(outputs.logits, targets, reduction="none")
            return each.sum() * targets.shape[-1] / num_items_in_batch

    Args:
        student_logits: $z^s$. -inf forbids a class, which the teacher must forbid too.
        teacher_logits: $z^t$, of the same shape; no gradient goes into them. -inf forbids a class.
        temperature: τ, positive and finite.
        reduction: `"batchmean"` for the mean over the batch of the sums over classes; `"none"` for these sums.

    Returns:
        A scalar, or (*batch). In float32 or wider.

    Raises:
        ValueError: the shapes differ, or an argument is out of range.

    Source:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, section 2. TLEG and SWS
        train with it alone at τ = 1 (arXiv 2312.05614, 2404.16897); their code divides by the number of classes as well.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {tuple(student_logits.shape)}, "
            f"got {tuple(teacher_logits.shape)}"
        )
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if reduction not in ("batchmean", "none"):
        raise ValueError(f"reduction must be 'batchmean' or 'none', got {reduction!r}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_student = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_logits.detach().to(dtype) / temperature, dim=-1)
    forbidden = log_teacher == -math.inf
    gap = (log_teacher - log_student).masked_fill(forbidden, 0.0)
    each = temperature**2 * (log_teacher.exp() * gap).sum(dim=-1)
    return each.mean() if reduction == "batchmean" else each
