"""TGeo-KD: how much a student listens to its teacher, learnt for each sample from where both are and where the truth is."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

PARTS = ("vertices", "edges", "angles")


def class_mean_probs(
    teacher_probs: Float[Tensor, "samples classes"], target: Int[Tensor, " samples"], num_classes: int
) -> Float[Tensor, "classes classes"]:
    """The teacher's mean answer to the samples of each class; a class without a sample has the uniform one.

    Args:
        teacher_probs: probabilities, of the whole training set.
        target: labels, in [0, C).
        num_classes: C.

    Raises:
        ValueError: the shapes do not fit, or a label is out of range.

    Source:
        Hu et al., "Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation", ICLR 2024,
        arXiv 2312.15112. Once for the whole training set is our choice, as the teacher does not change; the released code has the
        whole set in one batch.
    """
    _check_target(target, teacher_probs, num_classes)
    sums = teacher_probs.new_zeros(num_classes, num_classes).index_add_(0, target, teacher_probs)
    counts = torch.bincount(target, minlength=num_classes).to(sums.dtype)[:, None]
    return torch.where(counts > 0, sums / counts.clamp(min=1), 1 / num_classes)


def trilateral_features(
    student_probs: Float[Tensor, "batch classes"],
    teacher_probs: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    class_means: Float[Tensor, "classes classes"],
    parts: Sequence[str] = ("vertices", "edges"),
) -> Float[Tensor, "batch features"]:
    r"""Where student S, teacher T, truth G (one-hot) and the teacher's mean answer to the class, O, are from each other.

    | part | blocks of C numbers, all elementwise |
    |---|---|
    | vertices | $S, T, G, O$ |
    | edges | $(O-S)^2, (G-S)^2, (T-S)^2$, and without angles $(T-G)^2, (O-G)^2$ |
    | angles | $(O-S)(G-S), (T-S)(G-S)$ |

    Args:
        student_probs: S. No gradient goes into it, or into the others.
        teacher_probs: T.
        target: labels, in [0, C).
        class_means: see `class_mean_probs`.
        parts: any of the three, in any order; the blocks come in that of the table.

    Returns:
        9C features by default, at most 9C.

    Raises:
        ValueError: shapes do not fit, a label is out of range, or `parts` are none, unknown or not different.

    Source:
        arXiv 2312.15112 and its released code, whose active variant is the default here and whose other variants are subsets.
    """
    classes = student_probs.shape[-1]
    if teacher_probs.shape != student_probs.shape or student_probs.ndim != 2:
        raise ValueError(
            f"teacher_probs must have the shape of student_probs, {tuple(student_probs.shape)}, got {tuple(teacher_probs.shape)}"
        )
    if class_means.shape != (classes, classes):
        raise ValueError(f"class_means must have shape {(classes, classes)}, got {tuple(class_means.shape)}")
    _check_target(target, student_probs, classes)
    _check_parts(parts)
    s, t = student_probs.detach(), teacher_probs.detach().to(student_probs)
    g, o = F.one_hot(target, classes).to(s), class_means.detach().to(s)[target]
    blocks = []
    if "vertices" in parts:
        blocks += [s, t, g, o]
    if "edges" in parts:
        blocks += [(o - s) ** 2, (g - s) ** 2, (t - s) ** 2]
        blocks += [] if "angles" in parts else [(t - g) ** 2, (o - g) ** 2]
    if "angles" in parts:
        blocks += [(o - s) * (g - s), (t - s) * (g - s)]
    return torch.cat(blocks, dim=-1)


class FusionRatioNet(nn.Module):
    """From `trilateral_features` to the share of the teacher in the loss of each sample, in (0, 1).

    Args:
        num_classes: C, at least 2.
        hidden: widths of the hidden layers.
        parts: see `trilateral_features`.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2312.15112, released code: linear layers of 32, 16 and 1, leaky ReLU with 0.01, sigmoid; trained by Adam with
        learning rate 0.1 and weight decay 0.05.
    """

    def __init__(self, num_classes: int, hidden: Sequence[int] = (32, 16), parts: Sequence[str] = ("vertices", "edges")) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        _check_parts(parts)
        self.parts = tuple(parts)
        sizes = {"vertices": 4, "edges": 3 if "angles" in parts else 5, "angles": 2}
        widths = [num_classes * sum(sizes[part] for part in parts), *hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, hidden, strict=False):
            layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(0.01)]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, features: Float[Tensor, "batch features"]) -> Float[Tensor, " batch"]:
        """The ratios."""
        ratio: Tensor = self.layers(features).squeeze(-1).sigmoid()
        return ratio


def fused_kd_loss(
    student_logits: Float[Tensor, "batch classes"],
    teacher_logits: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    ratio: float | Float[Tensor, "..."],
    temperature: float = 4.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""Distillation and cross-entropy, mixed sample by sample.

    $$ r_i\, \tau^2\, \mathrm{KL}\big(\operatorname{softmax}(z^t_i / \tau) \,\|\, \operatorname{softmax}(z^s_i / \tau)\big)
       + (1 - r_i)\, \mathrm{CE}(z^s_i, y_i) $$

    Note that r weighs the *teacher's* term; the α of torchdistill's `KDLoss` weighs the labels'.

    Args:
        student_logits: $z^s$.
        teacher_logits: $z^t$; no gradient goes into it.
        target: labels y, in [0, C).
        ratio: r, in [0, 1]: one for all, or (batch). A gradient goes into it; detach it in the student's own step.
        temperature: τ, positive and finite.
        reduction: `"mean"`, or `"none"` for the loss of each sample.

    Raises:
        ValueError: shapes do not fit or an argument is out of range.

    Source:
        arXiv 2312.15112. τ is 1.5 in the released script for tables and 4 elsewhere. Cross-entropy takes logits, our choice: the
        release gives it probabilities.
    """
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits must have the shape of student_logits, {tuple(student_logits.shape)}, "
            f"got {tuple(teacher_logits.shape)}"
        )
    _check_target(target, student_logits, student_logits.shape[-1])
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    share = torch.as_tensor(ratio, dtype=dtype, device=student_logits.device)
    if share.ndim and share.shape != target.shape:
        raise ValueError(f"ratio must be a number or of shape {tuple(target.shape)}, got {tuple(share.shape)}")
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"ratio must be in [0, 1], got {share.min().item():g} to {share.max().item():g}")
    student, teacher = student_logits.to(dtype), teacher_logits.detach().to(dtype)
    log_student, log_teacher = (logits.div(temperature).log_softmax(dim=-1) for logits in (student, teacher))
    soft = temperature**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1)
    each = share * soft + (1 - share) * F.cross_entropy(student, target, reduction="none")
    return each.mean() if reduction == "mean" else each


def fusion_ratio_step(
    student: nn.Module,
    batch: tuple[Any, Int[Tensor, " batch"]],
    val_batch: tuple[Any, Int[Tensor, " validation"]],
    teacher_logits: Float[Tensor, "batch classes"],
    ratio_net: nn.Module,
    ratio_optimizer: torch.optim.Optimizer,
    class_means: Float[Tensor, "classes classes"],
    inner_lr: float,
    temperature: float = 4.0,
) -> dict[str, Any]:
    r"""One step of the ratio network towards ratios with which the student's next step lowers its validation loss.

    $$ \theta'(\omega) = \theta - \eta \nabla_\theta\, \mathrm{loss}(\theta, r_\omega), \qquad
       \omega \leftarrow \omega - \text{optimiser}\big(\nabla_\omega\, \mathrm{CE}_\mathrm{val}(\theta'(\omega))\big) $$

    The student itself stays as it is, its gradients too; it is in evaluation mode for both passes, and each of its modules in its
    own afterwards. Attention runs as plain products, as PyTorch's fused kernels have no second derivative.

    Args:
        student: from inputs to logits, or to an object that has `.logits`.
        batch: inputs and labels of training. A mapping of inputs is passed by keywords, as models of transformers take it.
        val_batch: inputs and labels of validation, which the student is not trained on.
        teacher_logits: for the inputs of `batch`.
        ratio_net: see `FusionRatioNet`; or any module from its features to ratios.
        ratio_optimizer: over its parameters.
        class_means: see `class_mean_probs`.
        inner_lr: η, at least 0: of the virtual step.
        temperature: see `fused_kd_loss`.

    Returns:
        `val_loss`, after the virtual step, a float; and `ratio` (batch), of the network as it is now, without a gradient.

    Raises:
        ValueError: `inner_lr` is negative or not finite, or see `fused_kd_loss` and `trilateral_features`.

    Source:
        arXiv 2312.15112; that the virtual step is one of plain gradient descent is from memory of the paper, unverified. In the
        released script the network never learns, as it is run without gradients.
    """
    if not (math.isfinite(inner_lr) and inner_lr >= 0):
        raise ValueError(f"inner_lr must be at least 0 and finite, got {inner_lr}")
    (inputs, target), (val_inputs, val_target) = batch, val_batch
    parameters = {name: p.detach().requires_grad_() for name, p in student.named_parameters() if p.requires_grad}
    modes = [(module, module.training) for module in student.modules()]
    student.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            logits = _logits(torch.func.functional_call(student, parameters, *_arguments(inputs)))
            features = _features(logits, teacher_logits, target, class_means, ratio_net)
            loss = fused_kd_loss(logits, teacher_logits, target, ratio_net(features), temperature)
            gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
            moved = {name: p - inner_lr * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
            val_loss = F.cross_entropy(_logits(torch.func.functional_call(student, moved, *_arguments(val_inputs))), val_target)
    finally:
        for module, mode in modes:  # one by one: a part of it may be frozen in evaluation mode
            module.training = mode
    ratio_optimizer.zero_grad()
    val_loss.backward(inputs=[p for p in ratio_net.parameters() if p.requires_grad])
    ratio_optimizer.step()
    with torch.no_grad():
        return {"val_loss": val_loss.item(), "ratio": ratio_net(features)}


def tgeo_kd_step(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Any, Int[Tensor, " batch"]],
    teacher_logits: Float[Tensor, "batch classes"],
    ratio_net: nn.Module,
    class_means: Float[Tensor, "classes classes"],
    temperature: float = 4.0,
    *,
    val_batch: tuple[Any, Int[Tensor, " validation"]] | None = None,
    ratio_optimizer: torch.optim.Optimizer | None = None,
    inner_lr: float = 0.1,
    step: int = 0,
    every: int = 1,
) -> dict[str, Any]:
    """One step of distillation: every so often the ratio network's, then the student's with the ratios that it gives.

    Args:
        student: see `fusion_ratio_step`; with it `batch`, `teacher_logits`, `ratio_net`, `class_means`, `inner_lr` and
            `temperature`.
        optimizer: over the student's parameters.
        val_batch: None leaves the network as it is, as the released script does.
        ratio_optimizer: over the network's parameters; needed with `val_batch`.
        step: number of this step, from 0.
        every: the network is trained in each step whose number this divides, at least 1.

    Returns:
        `loss`, a float; `ratio` (batch); and `val_loss` where the network was trained.

    Raises:
        ValueError: `every` is below 1, `val_batch` without `ratio_optimizer`, or see `fusion_ratio_step`.

    Source:
        arXiv 2312.15112. `every` is ours.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")
    if val_batch is not None and ratio_optimizer is None:
        raise ValueError("ratio_optimizer must be given with val_batch")
    said: dict[str, Any] = {}
    if val_batch is not None and step % every == 0:
        assert ratio_optimizer is not None
        said = fusion_ratio_step(
            student, batch, val_batch, teacher_logits, ratio_net, ratio_optimizer, class_means, inner_lr, temperature
        )
    inputs, target = batch
    args, kwargs = _arguments(inputs)
    logits = _logits(student(*args, **kwargs))
    with torch.no_grad():
        ratio = ratio_net(_features(logits, teacher_logits, target, class_means, ratio_net))
    loss = fused_kd_loss(logits, teacher_logits, target, ratio, temperature)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return said | {"loss": loss.item(), "ratio": ratio}


def loss_ratio(
    student_logits: Float[Tensor, "batch classes"], teacher_logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    r"""Weighting by losses, a baseline: $r_i = 1 - e^{-\mathrm{CE}^s_i / \mathrm{CE}^t_i}$, in [0, 1].

    Args:
        student_logits: the student's.
        teacher_logits: the teacher's.
        target: labels.

    Raises:
        ValueError: a label is out of range.

    Source:
        "WLS" in the released code of arXiv 2312.15112.
    """
    _check_target(target, student_logits, student_logits.shape[-1])
    own, theirs = (F.cross_entropy(z.detach().float(), target, reduction="none") for z in (student_logits, teacher_logits))
    return -torch.expm1(-own / theirs.clamp(min=1e-12))


def annealed_ratio(step: int, steps: int) -> float:
    """From 1 at the first of `steps` steps to 0 at the last, a baseline.

    Args:
        step: from 0.
        steps: at least 1.

    Raises:
        ValueError: `step` is not one of them.

    Source:
        Named in arXiv 2312.15112; that it falls linearly is our choice.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step must be in [0, {steps}), got {step}")
    return 1 - step / max(1, steps - 1)


def _features(
    logits: Tensor, teacher_logits: Tensor, target: Tensor, class_means: Tensor, ratio_net: Callable[..., Any]
) -> Tensor:
    student, teacher = (each.detach().to(class_means.dtype).softmax(dim=-1) for each in (logits, teacher_logits))
    return trilateral_features(student, teacher, target, class_means, getattr(ratio_net, "parts", ("vertices", "edges")))


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _check_target(target: Tensor, rows: Tensor, num_classes: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != num_classes or target.shape != rows.shape[:1] or not len(rows):
        raise ValueError(
            f"target must have a label for each row of {num_classes} classes, "
            f"got shapes {tuple(target.shape)} and {tuple(rows.shape)}"
        )
    if target.min() < 0 or target.max() >= num_classes:
        raise ValueError(f"target must be in [0, {num_classes}), got {target.min().item()} to {target.max().item()}")


def _check_parts(parts: Sequence[str]) -> None:
    if isinstance(parts, str) or not parts or len(set(parts)) < len(parts) or not set(parts) <= set(PARTS):
        raise ValueError(f"parts must be some of {', '.join(PARTS)}, each once, got {parts!r}")
