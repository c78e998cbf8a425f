"""RankMe: the effective rank of embeddings, which tells good pre-training runs from collapsed ones without any label."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric

try:
    from transformers import TrainerCallback
except ImportError:  # the functions and the metric need no transformers; the callback says so when it is made
    TrainerCallback = None

PRECISION = torch.finfo(torch.float64).eps


def rankme(
    Z: Float[Tensor, "rows features"], *, eps: float = 1e-7, center: bool = False, normalize: bool = False
) -> Float[Tensor, ""]:
    r"""Effective rank of embeddings: between 1, all in one direction, and `min(rows, features)`, all directions used alike.

    $$ \mathrm{RankMe}(Z) = \exp\Bigl(-\sum_{k=1}^{\min(N,K)} p_k \log p_k\Bigr), \qquad
       p_k = \frac{\sigma_k(Z)}{\lVert\sigma(Z)\rVert_1} + \varepsilon $$

    Compare runs of one method and one architecture on the same data. A high rank is needed for a good linear probe but
    does not make one: white noise has full rank.

    Args:
        Z: embeddings, one a row: the output of the *projector* on the data the model was pre-trained on. The paper takes
            25 600 rows, neither centred nor normalised.
        eps: the paper's ε, in `[0, 1)`. The p's then sum to a little over 1, as they do in the paper.
        center: subtract the mean row first.
        normalize: scale each row to length 1 first (a row of zeros stays one).

    Returns:
        A float64 scalar on the device of `Z`, without gradient.

    Raises:
        ValueError: `Z` is no floating-point matrix, is not finite, has fewer than 2 rows or is all zero (where the rank is
            undefined); `eps` outside `[0, 1)`.

    Warns:
        UserWarning: fewer rows than twice the features: the number of rows then limits the rank.

    Source:
        Garrido, Balestriero, Najman, LeCun, "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
        Representations by Their Rank", ICML 2023, arXiv 2210.02885, equation 1.
        Our choice: the singular values are square roots of the eigenvalues of ZᵀZ, summed in float64 (products of float32
        numbers are exact there); with fewer rows than features they come from an SVD. `center` and `normalize` are ours.
    """
    _check_eps(eps)
    sigma = spectrum(Z, center=center, normalize=normalize)
    _check_rows(*Z.shape)
    return _entropy_rank(sigma, eps)


def spectrum(
    Z: Float[Tensor, "rows features"], *, center: bool = False, normalize: bool = False
) -> Float[Tensor, " min_rows_features"]:
    """Singular values of embeddings in float64, largest first: what to plot when RankMe is low.

    Args:
        Z: embeddings, one a row.
        center: subtract the mean row first.
        normalize: scale each row to length 1 first.

    Raises:
        ValueError: `Z` is no floating-point matrix or not finite.
    """
    _check_embeddings(Z)
    Z = Z.detach()
    if normalize:
        Z = F.normalize(Z.double(), dim=1)
    rows, features = Z.shape
    if rows >= features:
        return _singular_values(*_moments(Z), rows, center)
    Z = Z.double()
    _check_finite(Z.square().sum(), Z)
    if not center:
        return torch.linalg.svdvals(Z)
    sigma = torch.linalg.svdvals(Z - Z.mean(dim=0))
    return sigma.where(sigma.square() > _rounding(Z.square().sum(), rows), 0.0)


def select_by_rankme(runs: Mapping[str, Tensor]) -> str:
    """Name of the run whose embeddings have the highest RankMe; the first of equals.

    Args:
        runs: name -> embeddings `(rows, features)` of the same data, from runs of one method that differ in their
            hyper-parameters.

    Raises:
        ValueError: no runs, runs of unequal width (their ranks do not compare), or embeddings that `rankme` refuses.

    Source:
        arXiv 2210.02885, the use the paper makes of RankMe: choose hyper-parameters without labels.
    """
    if not runs:
        raise ValueError("runs must not be empty")
    widths = {name: Z.shape[-1] for name, Z in runs.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(f"runs must all have the same width to be compared, got {widths}")
    return max(runs, key=lambda name: rankme(runs[name]).item())


class RankMe(Metric):
    """RankMe of embeddings that come in batches, over any number of processes: the same number as `rankme` of all rows.

    What is kept is a `features × features` sum, however many rows come by. It goes into `state_dict`, so a measurement
    can stop and resume.

    Args:
        num_features: width of the embeddings; `None` takes that of the first batch. Give it where some process may see no
            row at all.
        eps: as in `rankme`.
        max_samples: rows to look at, at least 2; each process leaves the later ones out. `None` looks at all.
        center: as in `rankme`.
        kwargs: options of `torchmetrics.Metric`.

    Raises:
        ValueError: an argument out of range; at `update`, what `rankme` refuses or another width than before; at
            `compute`, fewer than 2 rows or all of them zero.

    Source:
        arXiv 2210.02885, equation 1. Streaming is ours: ZᵀZ is a sum over rows, hence over batches and processes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = True  # how many rows of a batch count depends on how many came before
    gram: Tensor
    total: Tensor
    count: Tensor

    def __init__(
        self,
        num_features: int | None = None,
        eps: float = 1e-7,
        max_samples: int | None = None,
        center: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_eps(eps)
        if num_features is not None and num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}")
        if max_samples is not None:
            _check_max_samples(max_samples)
        self.num_features = num_features
        self.eps = eps
        self.max_samples = max_samples
        self.center = center
        width = num_features or 0  # 0 until the first batch
        float64 = torch.float64
        self.add_state("gram", torch.zeros(width, width, dtype=float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("total", torch.zeros(width, dtype=float64), dist_reduce_fx="sum", persistent=True)
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum", persistent=True)

    def update(self, Z: Float[Tensor, "rows features"]) -> None:
        """Add a batch of embeddings."""
        _check_embeddings(Z)
        width = self.gram.shape[0] or self.num_features
        if width and Z.shape[1] != width:
            raise ValueError(f"Z must have width {width} like the rows before it, got {Z.shape[1]}")
        self.num_features = Z.shape[1]
        if self.max_samples is not None:
            Z = Z[: max(0, self.max_samples - int(self.count))]
        gram, total = _moments(Z.detach())
        # Out of place, so that a checkpoint that shares memory with the state is not written to.
        self.gram = self.gram + gram if self.gram.numel() else gram
        self.total = self.total + total if self.total.numel() else total
        self.count = self.count + len(Z)

    def compute(self) -> Float[Tensor, ""]:
        """RankMe of all rows so far, of all processes."""
        rows = int(self.count)
        _check_rows(rows, len(self.total))
        return _entropy_rank(_singular_values(self.gram, self.total, rows, self.center), self.eps)


class RankMeCallback(TrainerCallback or object):
    """Logs `rankme` while a Hugging Face `Trainer` trains, to see a collapse when it happens.

    The model is measured in evaluation mode, without gradient, and the global random state is put back, so training goes on as
    it would have without the callback.

    Args:
        embed_fn: from the model and one of `batches` to embeddings `(rows, features)`. Moves the batch to the model's
            device where needed.
        batches: what to measure on, for instance a `DataLoader` over (a part of) the training data. Under distributed
            training each process may bring its own part, or all the same: copies of all rows do not change RankMe.
        every_n_steps: measure each time this many optimiser steps are done.
        max_samples: stop a measurement after this many rows in each process. 25 600 is the paper's number.
        log: where the number goes, `trainer.log` say, which reaches every logger; a trainer does not tell its callbacks
            how, so set it once the trainer is there: `callback.log = trainer.log`. `None` writes to the trainer's
            `state.log_history` only.

    Raises:
        ImportError: transformers is not installed.
        ValueError: `every_n_steps` below 1, or `max_samples` below 2.
    """

    def __init__(
        self,
        embed_fn: Callable[[nn.Module, Any], Tensor],
        batches: Iterable[Any],
        every_n_steps: int,
        max_samples: int = 25_600,
        log: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        if TrainerCallback is None:
            raise ImportError("RankMeCallback needs transformers: pip install 'firsthand[hf]'")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        _check_max_samples(max_samples)
        self.embed_fn = embed_fn
        self.batches = batches
        self.every_n_steps = every_n_steps
        self.max_samples = max_samples
        self.log = log

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        if state.global_step % self.every_n_steps:
            return
        value = self._measure(model)
        if self.log is None:
            state.log_history.append({"rankme": value, "epoch": state.epoch, "step": state.global_step})
            return
        due = control.should_log  # logging clears it, and the trainer's own entry of this step would be lost
        self.log({"rankme": value})
        control.should_log = due

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> float:
        metric = RankMe(max_samples=self.max_samples)
        training = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]):  # a shuffling loader draws from the global generator
                for batch in self.batches:
                    Z = self.embed_fn(model, batch)
                    metric.to(Z.device).update(Z)
                    if metric.count >= self.max_samples:
                        break
        finally:
            for module, mode in training.items():  # not model.train(): parts may be frozen in evaluation mode
                module.training = mode
        return metric.compute().item()


# Not RankMe: other numbers that people read off the same spectrum.


def alpha_req(Z: Float[Tensor, "rows features"], *, first: int = 4, last: int | None = 100) -> float:
    r"""Exponent α of the power law that the eigenvalues of the covariance follow: $\lambda_k \propto k^{-\alpha}$.

    The line through $(\log k, \log\lambda_k)$ with weights $1/k$. By this criterion the run whose α is nearest to 1 is best.

    Args:
        Z: features, one a row; centred here.
        first: first rank of the fit, counted from 1: the largest eigenvalues seldom lie on the line.
        last: last rank of the fit; `None`, or more than there are, means all that are not zero.

    Raises:
        ValueError: fewer than 2 non-zero eigenvalues between `first` and `last`, `first` not below `last`, or what `spectrum`
            refuses.

    Source:
        Agrawal, Mondal, Ghosh, Richards, "α-ReQ: Assessing Representation Quality in Self-Supervised Learning by measuring
        eigenspectrum decay", NeurIPS 2022. Weights and the default range, ranks 4 to 100, follow how their released code
        is reported to be used (second hand, unverified).
    """
    if first < 1 or (last is not None and last <= first):
        raise ValueError(f"the fit needs 1 <= first < last, got first={first}, last={last}")
    eigenvalues = _eigenvalues(Z, center=True)
    eigenvalues = eigenvalues[eigenvalues > 0][first - 1 : last]
    if len(eigenvalues) < 2:
        raise ValueError(f"Z must have at least 2 non-zero eigenvalues from rank {first} on, got {len(eigenvalues)}")
    k = np.arange(first, first + len(eigenvalues), dtype=np.float64)
    slope, _ = np.polyfit(np.log(k), np.log(eigenvalues), 1, w=k**-0.5)  # polyfit squares its weights
    return -float(slope)


def eigenvalue_entropy_rank(Z: Float[Tensor, "rows features"], *, center: bool = True) -> float:
    r"""Exponential of the entropy of the covariance's eigenvalues: RankMe with $\sigma_k^2$ in place of $\sigma_k$ and no ε.

    Large directions weigh more than in RankMe. On rows of unit length, uncentred, it is the Vendi score with the cosine kernel
    (Friedman and Dieng, 2022, arXiv 2210.02410; from memory of the paper, unverified).

    Raises:
        ValueError: what `rankme` refuses.
    """
    p = _eigenvalues(Z, center)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def participation_ratio(Z: Float[Tensor, "rows features"], *, center: bool = True) -> float:
    r"""$(\sum_k \lambda_k)^2 / \sum_k \lambda_k^2$ of the covariance's eigenvalues: how many directions share the variance.

    Raises:
        ValueError: what `rankme` refuses.
    """
    eigenvalues = _eigenvalues(Z, center)
    return float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum())


def stable_rank(Z: Float[Tensor, "rows features"], *, center: bool = False) -> float:
    r"""$\lVert Z\rVert_F^2 / \lVert Z\rVert_2^2$: the total over the largest eigenvalue of ZᵀZ. Never above the rank.

    Raises:
        ValueError: what `rankme` refuses.
    """
    eigenvalues = _eigenvalues(Z, center)
    return float(eigenvalues.sum() / eigenvalues[0])


def _moments(Z: Tensor) -> tuple[Tensor, Tensor]:
    """ZᵀZ and the column sums in float64, without a float64 copy of all of Z. Refuses what is not finite."""
    features = Z.shape[1]
    gram = torch.zeros(features, features, dtype=torch.float64, device=Z.device)
    total = torch.zeros(features, dtype=torch.float64, device=Z.device)
    for block in Z.split(4096) if len(Z) else ():
        block = block.double()
        total += block.sum(dim=0)
        gram.addmm_(block.T, block)
    _check_finite(gram.trace(), Z)
    return gram, total


def _singular_values(gram: Tensor, total: Tensor, rows: int, center: bool) -> Tensor:
    floor = 0.0
    if center:
        floor = _rounding(gram.trace(), rows)
        gram = gram - torch.outer(total, total) / rows
    eigenvalues = torch.linalg.eigvalsh(gram).flip(0)[: min(rows, len(gram))]
    return eigenvalues.where(eigenvalues > floor, 0.0).sqrt()


def _rounding(square_norm: Tensor, rows: int) -> Tensor:
    """What subtracting a constant from itself may leave of its squared norm."""
    return PRECISION * rows * square_norm


def _entropy_rank(sigma: Tensor, eps: float) -> Tensor:
    norm = sigma.sum()
    if norm == 0:
        raise ValueError("Z must not be all zero (after centring, if asked for): its rank is undefined")
    p = sigma / norm + eps
    return torch.special.entr(p).sum().exp()  # entr(p) = -p log p, 0 at p = 0


def _eigenvalues(Z: Tensor, center: bool) -> np.ndarray:
    """Eigenvalues of ZᵀZ, largest first, those that are only rounding set to zero."""
    sigma = spectrum(Z, center=center)
    _check_rows(*Z.shape)
    eigenvalues = sigma.square().cpu().numpy()
    if eigenvalues[0] == 0:
        raise ValueError("Z must not be all zero (after centring, if asked for): its rank is undefined")
    return np.where(eigenvalues > PRECISION * max(Z.shape) * eigenvalues[0], eigenvalues, 0.0)


def _check_embeddings(Z: Tensor) -> None:
    if Z.ndim != 2 or not Z.is_floating_point() or Z.shape[1] == 0:
        raise ValueError(f"Z must be a floating-point matrix (rows, features), got shape {tuple(Z.shape)} of {Z.dtype}")


def _check_finite(square_norm: Tensor, Z: Tensor) -> None:
    if not square_norm.isfinite():  # a sum of squares shows every NaN and infinity, and costs no further pass over Z
        bad = int((~Z.isfinite()).sum())
        raise ValueError(f"Z must be finite, and its square too, got {bad} of {Z.numel()} entries that are NaN or infinite")


def _check_rows(rows: int, features: int) -> None:
    if rows < 2:
        raise ValueError(f"Z must have at least 2 rows, got {rows}")
    if rows < 2 * features:
        warnings.warn(
            f"{rows} rows of width {features}: with fewer than twice as many rows as features the rank says more about the "
            "number of rows than about the embeddings",
            UserWarning,
            stacklevel=3,
        )


def _check_eps(eps: float) -> None:
    if not 0 <= eps < 1:
        raise ValueError(f"eps must be in [0, 1), got {eps}")


def _check_max_samples(max_samples: int) -> None:
    if max_samples < 2:
        raise ValueError(f"max_samples must be at least 2, got {max_samples}")
