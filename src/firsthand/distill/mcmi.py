"""MCMI: fine-tune a trained teacher so that its answers within a class differ more, and say more to a student."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import Metric

LEAST = 1e-12  # of a centroid's probabilities, under the logarithm


def class_centroids(
    logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"], num_classes: int
) -> Float[Tensor, "classes classes"]:
    r"""The mean answer to the samples of each class, $Q_y = \operatorname{mean}_{x : y} \operatorname{softmax}(z(x))$.

    Args:
        logits: z, at temperature 1.
        target: labels y, in [0, C).
        num_classes: C, at least 2.

    Returns:
        Q, in float32 or wider, a row for each class. Rows sum to 1; that of a class without a sample is uniform.

    Raises:
        ValueError: the shapes do not fit, or a label is out of range.

    Source:
        Ye et al., "Bayes Conditional Distribution Estimation for Knowledge Distillation Based on Conditional Mutual Information",
        ICLR 2024, arXiv 2401.08732. The uniform row is our choice.
    """
    _check(logits, target, num_classes)
    sums, counts = _sums(_log_probabilities(logits).exp(), target, num_classes)
    return _means(sums, counts)


def conditional_mutual_information(
    logits: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    num_classes: int,
    centroids: Float[Tensor, "classes classes"] | None = None,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""How much a classifier's answer says of the sample beyond its class, in nats.

    $$ I(X; \hat Y \mid Y) = \operatorname{mean}_x \mathrm{KL}\big(p_x \,\|\, Q_{y(x)}\big), \qquad
       p_x = \operatorname{softmax}(z(x)) $$

    With centroids of the same samples it is $\sum_y P(y) [H(Q_y) - \operatorname{mean}_{x : y} H(p_x)]$; with any others it is
    larger. It is 0 where all samples of a class get one answer, and never negative.

    Args:
        logits: z.
        target: labels, in [0, C).
        num_classes: C.
        centroids: Q, see `class_centroids`; None for those of these samples. No gradient goes into them.
        reduction: `"mean"`, or `"none"` for the divergence of each sample.

    Raises:
        ValueError: see `class_centroids`; or centroids whose shape is not (C, C) or whose rows do not sum to 1, or an unknown
            `reduction`.

    Source:
        arXiv 2401.08732: the sample's answer comes first in the divergence, as in the released code. Probabilities of Q below
        1e-12 count as that (our choice; there the result would be infinite).
    """
    _check(logits, target, num_classes)
    _check_reduction(reduction)
    if centroids is None:
        centroids = class_centroids(logits.detach(), target, num_classes)
    _check_centroids(centroids, num_classes)
    each = _divergence(_log_probabilities(logits), target, centroids)
    return each.mean() if reduction == "mean" else each


def mcmi_loss(
    logits: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"],
    centroids: Float[Tensor, "classes classes"],
    lam: float = 0.15,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    r"""What a teacher's last epochs minimise: cross-entropy, less its conditional mutual information.

    $$ \mathrm{CE}(z, y) - \lambda\, \mathrm{KL}\big(\operatorname{softmax}(z) \,\|\, Q_y\big) $$

    As the `compute_loss_func` of `Trainer`, a sum has to be divided by the labels of all batches that a step accumulates::

        def loss(outputs, labels, num_items_in_batch):
            return mcmi_loss(outputs.logits, labels, centroids, reduction="none").sum() / num_items_in_batch

    Args:
        logits: z.
        target: labels y, in [0, C).
        centroids: Q, see `class_centroids` and `ClassCentroids`. No gradient goes into them.
        lam: λ, at least 0. Too large a λ costs the teacher its accuracy.
        reduction: `"mean"`, or `"none"` for the loss of each sample.

    Returns:
        A scalar, or (batch); in float32 or wider. It may be negative.

    Raises:
        ValueError: `lam` is negative or not finite, or see `conditional_mutual_information`.

    Source:
        arXiv 2401.08732 and its released code. There λ is 0.10 to 0.25 by run; which for which pair of models could not be
        determined, so 0.15 is our choice.
    """
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be at least 0 and finite, got {lam}")
    _check(logits, target, logits.shape[-1])
    _check_reduction(reduction)
    _check_centroids(centroids, logits.shape[-1])
    log_probs = _log_probabilities(logits)
    each = F.nll_loss(log_probs, target, reduction="none") - lam * _divergence(log_probs, target, centroids)
    return each.mean() if reduction == "mean" else each


class ConditionalMutualInformation(Metric):
    r"""`conditional_mutual_information` of all batches together, with the centroids of all of them. Exact, and no sample is kept.

    The sums of $p_x$ and of $\sum_k p_{xk} \log p_{xk}$ for each class are all it takes, C² + 2C numbers in float64.

    Args:
        num_classes: C, at least 2.
        kwargs: see torchmetrics.

    Raises:
        ValueError: `num_classes` below 2; when updated, see `class_centroids`. Nothing to compute of is a `ValueError` too.

    Source:
        The second form of the quantity in arXiv 2401.08732, which lets it be summed, is ours.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    answers: Tensor
    negentropy: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.add_state("answers", torch.zeros(num_classes, num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negentropy", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> None:
        """Add a batch."""
        _check(logits, target, self.num_classes)
        log_probs = logits.double().log_softmax(dim=-1)
        probs = log_probs.exp()
        sums, counts = _sums(probs, target, self.num_classes)
        self.answers += sums
        self.counts += counts
        self.negentropy.index_add_(0, target, torch.where(probs > 0, probs * log_probs, 0.0).sum(dim=-1))

    def compute(self) -> Float[Tensor, ""]:
        """In nats."""
        total = self.counts.sum()
        if total == 0:
            raise ValueError("there must be a sample to compute of, update() was not called")
        centroids = _means(self.answers, self.counts)
        return ((self.negentropy - self.counts * torch.special.xlogy(centroids, centroids).sum(dim=-1)).sum() / total).clamp(
            min=0
        )

    @property
    def by_class(self) -> Float[Tensor, " classes"]:
        """Of each class by itself; 0 where there is no sample."""
        centroids = _means(self.answers, self.counts)
        mean = self.negentropy / self.counts.clamp(min=1)
        return torch.where(self.counts > 0, mean - torch.special.xlogy(centroids, centroids).sum(dim=-1), 0.0).clamp(min=0)


class ClassCentroids(nn.Module):
    """The centroids Q of `mcmi_loss`, kept as a buffer: saved, loaded and moved with the rest.

    Args:
        num_classes: C, at least 2.
        refresh: when a training loop renews them: `"once"`, before it; `"epoch"`, before each epoch, the alternation in which
            each half lowers or keeps the same bound; `"ema"`, before it and then a little with each batch.
        decay: of `"ema"`: the share of the old, in [0, 1).

    Attributes:
        centroids: Q (C, C), uniform at first.

    Raises:
        ValueError: an argument is out of range.

    Source:
        arXiv 2401.08732: the alternation is from memory of the paper, unverified, and our default. The released code computes Q
        once, in training mode with augmentation; an update by batches with a decay of 0.9999 is there, but switched off.
    """

    centroids: Tensor

    def __init__(self, num_classes: int, refresh: str = "epoch", decay: float = 0.9999) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if refresh not in ("once", "epoch", "ema"):
            raise ValueError(f"refresh must be 'once', 'epoch' or 'ema', got {refresh!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.num_classes, self.refresh, self.decay = num_classes, refresh, decay
        self.register_buffer("centroids", torch.full((num_classes, num_classes), 1 / num_classes))

    def forward(self, target: Int[Tensor, " batch"]) -> Float[Tensor, "batch classes"]:
        """The centroid of each sample's class."""
        return self.centroids[target]

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> None:
        """With `refresh="ema"`, move the centroids of the classes in this batch towards its means; else do nothing."""
        _check(logits, target, self.num_classes)
        if self.refresh != "ema":
            return
        sums, counts = _sums(_log_probabilities(logits).exp(), target, self.num_classes)
        moved = self.decay * self.centroids + (1 - self.decay) * _means(sums, counts).to(self.centroids)
        moved = torch.where(counts[:, None] > 0, moved, self.centroids)
        self.centroids.copy_(moved / moved.sum(dim=1, keepdim=True))

    @torch.no_grad()
    def fit(self, model: Callable[[Any], Any], loader: Iterable[tuple[Any, Tensor]]) -> "ClassCentroids":
        """Compute them anew, from all batches of a loader: (inputs, labels) pairs.

        Args:
            model: from inputs to logits, or to an object that has `.logits`. A module's mode is left as it is: as in the released
                code you may leave it in training mode.
            loader: of the training set.

        Raises:
            ValueError: the loader is empty, or see `class_centroids`.
        """
        sums = self.centroids.new_zeros(self.num_classes, self.num_classes, dtype=torch.float64)
        counts = sums.new_zeros(self.num_classes)
        for inputs, target in loader:
            logits, target = _logits(model, inputs.to(self.centroids.device)), target.to(self.centroids.device)
            _check(logits, target, self.num_classes)
            more, seen = _sums(logits.double().softmax(dim=-1), target, self.num_classes)
            sums, counts = sums + more, counts + seen
        if counts.sum() == 0:
            raise ValueError("loader must have at least one sample, got none")
        self.centroids.copy_(_means(sums, counts))
        return self


def mcmi_finetune(
    teacher: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    lam: float = 0.15,
    epochs: int = 20,
    optimizer: torch.optim.Optimizer | None = None,
    refresh: str = "epoch",
    val_fn: Callable[[nn.Module], float] | None = None,
    decay: float = 0.9999,
) -> nn.Module:
    """Fine-tune a trained teacher in place with `mcmi_loss`, the learning rate falling to 0 as a cosine.

    Args:
        teacher: from inputs to logits, or to an object that has `.logits`; on the device that it is to be trained on.
        loader: (inputs, labels) pairs, shuffled anew in each pass; an iterator, which has but one, will not do.
        num_classes: C.
        lam: see `mcmi_loss`.
        epochs: at least 1.
        optimizer: over the teacher's parameters; None for SGD with momentum 0.9, weight decay 5e-4 and learning rate 0.05.
        refresh: see `ClassCentroids`; with it `decay`.
        val_fn: from the teacher to a number that is better when higher, such as validation accuracy. The weights of the best
            epoch are kept. None keeps the last ones.

    Returns:
        `teacher`, in evaluation mode.

    Raises:
        ValueError: `epochs` below 1, `loader` is an iterator, or see `mcmi_loss` and `ClassCentroids`.

    Source:
        arXiv 2401.08732, released code: 20 epochs on CIFAR-100, SGD as above, cosine, best epoch on validation.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if iter(loader) is loader:  # spent by the centroids, it would leave nothing to train on
        raise ValueError(f"loader must give its batches anew in each pass, got an iterator, {type(loader).__name__}")
    device = next(teacher.parameters()).device
    centroids = ClassCentroids(num_classes, refresh, decay).to(device)
    optimizer = optimizer or torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, kept = -math.inf, None
    for epoch in range(epochs):
        if epoch == 0 or refresh == "epoch":
            centroids.fit(teacher.eval(), loader)
        teacher.train()
        for inputs, target in loader:
            logits, target = _logits(teacher, inputs.to(device)), target.to(device)
            loss = mcmi_loss(logits, target, centroids.centroids, lam)
            centroids.update(logits.detach(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        if val_fn is not None and (reached := val_fn(teacher.eval())) > best:
            best, kept = reached, copy.deepcopy(teacher.state_dict())
    if kept is not None:
        teacher.load_state_dict(kept)
    return teacher.eval()


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _divergence(log_probs: Tensor, target: Tensor, centroids: Tensor) -> Tensor:
    log_centroids = centroids.detach().to(log_probs).clamp(min=LEAST).log()[target]
    probs = log_probs.exp()
    return torch.where(probs > 0, probs * (log_probs - log_centroids), 0.0).sum(dim=-1)


def _sums(probs: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Of the answers to the samples of each class, and how many there are."""
    sums = probs.new_zeros(num_classes, num_classes).index_add_(0, target, probs)
    return sums, torch.bincount(target, minlength=num_classes).to(probs.dtype)


def _means(sums: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), 1 / len(counts))


def _logits(model: Callable[[Any], Any], inputs: Any) -> Tensor:
    output = model(inputs)
    return output if isinstance(output, Tensor) else output.logits


def _check(logits: Tensor, target: Tensor, num_classes: int) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if logits.ndim != 2 or logits.shape[1] != num_classes or not len(logits):
        raise ValueError(f"logits must have shape (batch, {num_classes}), got {tuple(logits.shape)}")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"target must have a label for each of {len(logits)} samples, got shape {tuple(target.shape)}")
    if target.min() < 0 or target.max() >= num_classes:
        raise ValueError(f"target must be in [0, {num_classes}), got {target.min().item()} to {target.max().item()}")


def _check_centroids(centroids: Tensor, num_classes: int) -> None:
    if centroids.shape != (num_classes, num_classes):
        raise ValueError(f"centroids must have shape {(num_classes, num_classes)}, got {tuple(centroids.shape)}")
    if not torch.allclose(centroids.detach().double().sum(dim=1), centroids.new_ones(()).double(), atol=1e-3):
        raise ValueError("centroids must have rows that sum to 1")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
