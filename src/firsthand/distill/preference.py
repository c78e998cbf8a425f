"""Preference distillation: DPO and KTO whose reference is the frozen teacher and not the student as it was."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def sequence_logps(
    logits: Float[Tensor, "batch length vocab"],
    labels: Int[Tensor, "batch length"],
    ignore_index: int = -100,
    average: bool = False,
) -> Float[Tensor, " batch"]:
    """Log-probability of each response under a causal model: the sum over its tokens, each given those before it.

    Args:
        logits: as the model returns them, not shifted.
        labels: token ids of the response, `ignore_index` elsewhere. The first token of a text never counts: nothing predicts it.
        ignore_index: label of what does not count.
        average: the mean over the tokens instead of the sum.

    Returns:
        In float32 or wider.

    Raises:
        ValueError: shapes that do not belong together, or a text without a response token.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(f"labels must have shape {tuple(logits.shape[:2])} like logits, got {tuple(labels.shape)}")
    targets = labels[:, 1:]
    counts = (targets != ignore_index).sum(dim=1)
    if not counts.all():
        raise ValueError(
            f"labels must have a response token in every text, got none in {int((counts == 0).sum())} of {len(counts)}"
        )
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=ignore_index)
    total = -losses.view(targets.shape).sum(dim=1)
    return total / counts if average else total


def preference_distillation_loss(
    policy_chosen_logps: Float[Tensor, " batch"],
    policy_rejected_logps: Float[Tensor, " batch"],
    teacher_chosen_logps: Float[Tensor, " batch"],
    teacher_rejected_logps: Float[Tensor, " batch"],
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    detach_kl: bool = False,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Preference optimisation with the frozen teacher as the reference: the student must tell good from bad better than it.

    With $c = \log \pi_S(y^+) - \log \pi_T(y^+)$ and $r = \log \pi_S(y^-) - \log \pi_T(y^-)$:

    $$ L_\mathrm{sigmoid} = -\log \sigma(\beta (c - r)) $$

    $$ L_\mathrm{kto\_pair} = \tfrac12 \big[1 - \sigma(\beta (c - \max(\bar r, 0)))\big]
       + \tfrac12 \big[1 - \sigma(\beta (\max(\bar c, 0) - r))\big] $$

    where a bar is the mean over the batch. `trl.DPOTrainer(student, ref_model=teacher)` trains with the first.

    Args:
        policy_chosen_logps: log-probability of the preferred response under the student, see `sequence_logps`.
        policy_rejected_logps: of the other one.
        teacher_chosen_logps: the same under the teacher, which gets no gradient.
        teacher_rejected_logps: of the other one.
        beta: β, positive and finite.
        loss_type: `"sigmoid"` or `"kto_pair"`.
        label_smoothing: share of pairs that are taken to be the wrong way round, in `[0, 0.5)`; for `"sigmoid"` only.
        detach_kl: whether the means of `"kto_pair"` are constants. TRL's KTO has them so, the release has not.
        reduction: `"mean"`, `"sum"`, or `"none"` for one number for each pair (`"kto_pair"`: those of the chosen, then those of
            the rejected).

    Raises:
        ValueError: shapes that differ, or an argument out of range.

    Source:
        arXiv 2408.15881, preference distillation, is `"sigmoid"`; the scripts of its release ask for `"kto_pair"`. Smoothing is
        that of conservative DPO, our addition. The release adds the balance losses of both responses: add
        `0.01 * moe_aux_loss(student)` (`DPOTrainer` does not know it).
    """
    shapes = {
        tuple(logps.shape) for logps in (policy_chosen_logps, policy_rejected_logps, teacher_chosen_logps, teacher_rejected_logps)
    }
    if len(shapes) > 1 or len(policy_chosen_logps.shape) != 1 or not len(policy_chosen_logps):
        raise ValueError(f"all log-probabilities must have one shape, (pairs,), got {', '.join(map(str, sorted(shapes)))}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if loss_type not in ("sigmoid", "kto_pair"):
        raise ValueError(f"loss_type must be 'sigmoid' or 'kto_pair', got {loss_type!r}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type != "sigmoid"):
        raise ValueError(f"label_smoothing must be in [0, 0.5), and 0 for 'kto_pair', got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    chosen = policy_chosen_logps - teacher_chosen_logps.detach()
    rejected = policy_rejected_logps - teacher_rejected_logps.detach()
    if loss_type == "sigmoid":
        margin = beta * (chosen - rejected)
        losses = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    else:
        chosen_kl, rejected_kl = (ratios.mean().clamp(min=0) for ratios in (chosen, rejected))
        if detach_kl:
            chosen_kl, rejected_kl = chosen_kl.detach(), rejected_kl.detach()
        losses = torch.cat([torch.sigmoid(-beta * (chosen - rejected_kl)), torch.sigmoid(-beta * (chosen_kl - rejected))])
    return losses if reduction == "none" else getattr(losses, reduction)()
