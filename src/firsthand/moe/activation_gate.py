"""Activation gate: pass a router's linear scores through a nonlinearity, so that a temperature can be learned beside them."""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple, no_type_check

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

Activation = str | Callable[[Tensor], Tensor] | None
"""Name or elementwise function; None and `"identity"` are the plain temperature gate."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda scores: scores, "sigmoid": torch.sigmoid, "tanh": torch.tanh,
    "gelu": F.gelu, "silu": F.silu, "relu": F.relu,
}  # fmt: skip

# r replicates, n rows, d features, k experts. Inside a fit rows come last, x is [r, d, n] and what experts say of it [r, k, n]:
# sums over a handful of experts are several times as fast in this order.


class GaussianMoEParameters(NamedTuple):
    r"""Parameters of one Gaussian mixture of experts, or of a batch of them.

    $$ p(y \mid x) = \sum_i \pi_i(x)\, N(y;\, a_i^\top x + b_i,\, \nu_i), \qquad
       \pi(x) = \mathrm{softmax}_i\big((\sigma(\beta_i^\top x) + c_i) / \tau\big) $$

    Attributes:
        gate_weight: β.
        gate_bias: c, up to a constant that all experts share; what is fitted has 0 for the last expert.
        temperature: τ, positive.
        expert_weight: a.
        expert_bias: b.
        expert_variance: ν, positive.

    Source:
        Nguyen, Akbarian and Ho, "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", ICML 2024,
        arXiv 2401.13875. The bias outside σ is from memory of the paper, unverified.
    """

    gate_weight: Float[Tensor, "*batch k d"]
    gate_bias: Float[Tensor, "*batch k"]
    temperature: Float[Tensor, "*batch"]
    expert_weight: Float[Tensor, "*batch k d"]
    expert_bias: Float[Tensor, "*batch k"]
    expert_variance: Float[Tensor, "*batch k"]


class GaussianMoEFit(NamedTuple):
    """What `fit_gaussian_moe` found for each replicate."""

    parameters: GaussianMoEParameters
    log_likelihood: Float[Tensor, " r"]  # mean over rows
    n_iter: Int[Tensor, " r"]
    converged: Bool[Tensor, " r"]


def gate_logits(
    x: Float[Tensor, "*#batch n d"],
    weight: Float[Tensor, "*#batch k d"],
    bias: Float[Tensor, "*#batch k"],
    temperature: Float[Tensor, "*#batch"],
    activation: Activation = "sigmoid",
) -> Float[Tensor, "... n k"]:
    r"""Scores of the experts before the softmax.

    $$ s_i(x) = \frac{\sigma(\beta_i^\top x) + c_i}{\tau} $$

    With σ the identity this is the temperature gate, whose scores do not change when (β, c, τ) are all multiplied by one number:
    no data tells these apart. A σ that bends fixes the scale.

    Args:
        x: inputs.
        weight: β.
        bias: c.
        temperature: τ, positive.
        activation: σ: `"sigmoid"`, `"tanh"`, `"gelu"`, `"silu"`, `"relu"`, `"identity"` (also None), or an elementwise function.

    Raises:
        ValueError: unknown activation.

    Source:
        arXiv 2401.13875, the activation gate (the idea from the abstract, c outside σ from memory, unverified).
    """
    return (_activation(activation)(x @ weight.mT) + bias.unsqueeze(-2)) / temperature[..., None, None]


def log_density(
    X: Float[Tensor, "*#batch n d"],
    y: Float[Tensor, "*#batch n"],
    parameters: GaussianMoEParameters,
    activation: Activation = "sigmoid",
) -> Float[Tensor, "... n"]:
    """Log p(y | x) of each row under a Gaussian mixture of experts (equation at `GaussianMoEParameters`).

    Args:
        X: inputs.
        y: outputs.
        parameters: of one mixture for each entry of the batch, or one for all.
        activation: σ of the gate, see `gate_logits`.

    Raises:
        ValueError: unknown activation.

    Source:
        arXiv 2401.13875.
    """
    return torch.logsumexp(_log_joint(X.mT, y, parameters, activation)[0], dim=-2)


def _log_joint(x: Tensor, y: Tensor, parameters: GaussianMoEParameters, activation: Activation) -> tuple[Tensor, Tensor]:
    """log π_i(x) N(y; ...) and log π_i(x), both [..., k, n]."""
    log_gate = _log_gate(x, parameters, activation)
    residual = y.unsqueeze(-2) - parameters.expert_weight @ x - parameters.expert_bias.unsqueeze(-1)
    variance = parameters.expert_variance.unsqueeze(-1)
    return log_gate - 0.5 * (residual.square() / variance + torch.log(2 * math.pi * variance)), log_gate


def _log_gate(x: Tensor, parameters: GaussianMoEParameters, activation: Activation) -> Tensor:
    """`gate_logits` after the softmax, with rows last."""
    weight, bias, temperature = parameters[:3]
    logits = (_activation(activation)(weight @ x) + bias.unsqueeze(-1)) / temperature[..., None, None]
    return F.log_softmax(logits, dim=-2)


@torch.no_grad()
def fit_gaussian_moe(
    X: Float[Tensor, "r n d"],
    y: Float[Tensor, "r n"],
    init: GaussianMoEParameters,
    *,
    activation: Activation = "sigmoid",
    learn_temperature: bool = True,
    max_iter: int = 200,
    tol: float = 1e-6,
    min_variance: float = 1e-6,
) -> GaussianMoEFit:
    r"""Maximum likelihood by EM, for many data sets of one size at once.

    The E-step finds responsibilities ρ. The M-step solves weighted least squares for each expert, and takes one damped
    Gauss-Newton step in (β, c, log τ) on $\sum_t \sum_i \rho_{ti} \log \pi_i(x_t)$, which is kept if it is uphill; so no
    iteration lowers the likelihood. All steps are batched over replicates; a replicate that has converged leaves the batch.

    With the plain temperature gate the likelihood does not change along (β, c, τ), and nothing but `init` decides the scale that
    comes out: a start with twice the β, c and τ gives a fit with twice the β, c and τ.

    Args:
        X: inputs, one data set a replicate; finite.
        y: outputs; finite.
        init: starting point of each replicate.
        activation: σ, see `gate_logits`.
        learn_temperature: False keeps τ at its initial value.
        max_iter: largest number of iterations, at least 1.
        tol: a replicate is done when an iteration raises its mean log-likelihood by less; at least 0.
        min_variance: lower bound of ν as a fraction of the variance of y, without which the likelihood has no upper bound;
            positive.

    Returns:
        Parameters in float64 (last gate bias 0, for the temperature gate also last gate weight 0), mean log-likelihood per row,
        iterations made, and whether `tol` was met.

    Raises:
        ValueError: shapes that do not belong together, fewer rows than the experts have coefficients, k (d + 1), values that are
            not finite, a temperature or variance that is not positive, an unknown activation, a setting out of range.

    Source:
        arXiv 2401.13875 fits by EM (details unverified). Our choices: one Gauss-Newton step a round for the gate and not its full
        maximum, the damping, the relative bound of the variances.
    """
    _check_data(X, y, init)
    replicates, _, d = X.shape
    if max_iter < 1:
        raise ValueError(f"max_iter must be at least 1, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if not 0 < min_variance < math.inf:
        raise ValueError(f"min_variance must be positive and finite, got {min_variance}")
    x, y = X.double().mT.contiguous(), y.double()
    parameters = _anchored(GaussianMoEParameters(*(value.double() for value in init)), _activation(activation))
    free = _free_directions(parameters.gate_weight.shape[1], d, _activation(activation), learn_temperature).to(x.device)
    rounding = (1e-12 * y.abs().amax(dim=1)).square() + torch.finfo(torch.float64).tiny
    floor = torch.maximum(min_variance * y.var(dim=1, correction=0), rounding).unsqueeze(1)
    damping = torch.full((replicates,), 1e-3, dtype=torch.float64, device=x.device)

    # `found` has all replicates, everything else those of `active` only, which have not converged yet.
    active = torch.arange(replicates, device=x.device)
    value, joint, log_gate = _e_step(x, y, parameters, activation)
    found = GaussianMoEFit(
        GaussianMoEParameters(*(part.clone() for part in parameters)),
        value.clone(),
        torch.zeros_like(active),
        torch.zeros_like(active, dtype=torch.bool),
    )
    for iteration in range(1, max_iter + 1):
        share = joint.exp()
        parameters, kept = _gate_step(x, parameters, share, log_gate, damping, free, activation)
        parameters = _expert_step(x, y, parameters, share, floor)
        before, (value, joint, log_gate) = value, _e_step(x, y, parameters, activation)
        # A gate step that was refused says nothing, unless only a step of no length would do.
        done = (value - before < tol) & (kept | (damping >= _MOST_DAMPING))
        damping = torch.where(kept, damping / 4, damping * 8).clamp(1e-12, _MOST_DAMPING)

        for whole, part in zip(found.parameters, parameters, strict=True):
            whole[active] = part
        found.log_likelihood[active], found.n_iter[active], found.converged[active] = value, iteration, done
        if done.all():
            break
        if done.any():
            left = ~done
            active, x, y, floor, damping, value = (part[left] for part in (active, x, y, floor, damping, value))
            joint, log_gate = joint[left], log_gate[left]
            parameters = GaussianMoEParameters(*(part[left] for part in parameters))
    return found


_MOST_DAMPING = 1e8


def _e_step(x: Tensor, y: Tensor, parameters: GaussianMoEParameters, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    """Mean log-likelihood [r], log responsibilities and log gate [r, k, n]."""
    joint, log_gate = _log_joint(x, y, parameters, activation)
    density = torch.logsumexp(joint, dim=1, keepdim=True)
    return density.mean(dim=(1, 2)), joint - density, log_gate


def _expert_step(x: Tensor, y: Tensor, parameters: GaussianMoEParameters, share: Tensor, floor: Tensor) -> GaussianMoEParameters:
    """Weighted least squares for each expert, in standardised features, and the weighted variance of what is left."""
    mean, deviation = x.mean(dim=2, keepdim=True), x.std(dim=2, correction=0, keepdim=True)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    centre = y.mean(dim=1, keepdim=True)
    design = F.pad((x - mean) / deviation, (0, 0, 0, 1), value=1.0).unsqueeze(1)  # [r, 1, d + 1, n]
    weighted = share.unsqueeze(2) * design  # [r, k, d + 1, n]
    total = share.sum(dim=2).clamp(min=torch.finfo(torch.float64).tiny)
    gram = weighted @ design.mT
    # A hair of ridge, for features that say the same and experts that have lost all their rows.
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-12 * total.unsqueeze(-1) + 1e-100)
    solution = torch.linalg.solve(gram, weighted @ (y - centre)[:, None, :, None]).squeeze(-1)
    slope = solution[..., :-1] / deviation.mT
    intercept = solution[..., -1] + centre - (slope @ mean).squeeze(-1)
    residual = y.unsqueeze(1) - slope @ x - intercept.unsqueeze(2)
    variance = (share * residual.square()).sum(dim=2) / total
    return parameters._replace(expert_weight=slope, expert_bias=intercept, expert_variance=torch.maximum(variance, floor))


def _gate_step(
    x: Tensor,
    parameters: GaussianMoEParameters,
    share: Tensor,
    log_gate: Tensor,
    damping: Tensor,
    free: Tensor,
    activation: Activation,
) -> tuple[GaussianMoEParameters, Tensor]:
    """One damped Gauss-Newton step of the gate; the replicates [r] in which it went uphill get it, the others stay."""
    replicates, dim, n = x.shape
    weight, bias, temperature = parameters[:3]
    tau = temperature[:, None, None]
    with torch.enable_grad():
        scores = (weight @ x).requires_grad_()
        bent = _activation(activation)(scores)
        (slope,) = torch.autograd.grad(bent.sum(), scores)
    # u_i = d logit_i / d (β_i, c_i, log τ): expert i's logit has no other arguments.
    experts, width = weight.shape[1], dim + 2
    u = x.new_empty(replicates, experts, width, n)
    torch.mul((slope / tau).unsqueeze(2), x.unsqueeze(1), out=u[:, :, :dim])
    u[:, :, dim] = 1 / tau
    u[:, :, dim + 1] = -(bent.detach() + bias.unsqueeze(2)) / tau
    gate = log_gate.exp()
    weighted = gate.unsqueeze(2) * u
    # E[u uᵀ] - E[u] E[u]ᵀ under the gate. `free` then adds up the columns of the one log τ and drops what is fixed.
    second = x.new_zeros(replicates, experts, width, experts, width)
    second.diagonal(dim1=1, dim2=3).copy_((weighted @ u.mT).permute(0, 2, 3, 1))
    mean = weighted.flatten(1, 2)
    curvature = free.T @ (second.flatten(3).flatten(1, 2) - mean @ mean.mT) @ free / n
    gradient = (u @ (share - gate).unsqueeze(3)).flatten(1) @ free / n

    # In proportion to the diagonal, so that neither the units of x nor the scale of the plain gate change what is done.
    curvature.diagonal(dim1=-2, dim2=-1).mul_(1 + damping.unsqueeze(1)).add_(1e-100)
    step = (torch.linalg.solve(curvature, gradient) @ free.T).view(replicates, experts, width)
    moved = parameters._replace(
        gate_weight=weight + step[..., :dim],
        gate_bias=bias + step[..., dim],
        temperature=temperature * step[:, 0, -1].clamp(-1, 1).exp(),
    )
    uphill = (share * (_log_gate(x, moved, activation) - log_gate)).sum(dim=(1, 2)) >= 0
    return GaussianMoEParameters(
        *(torch.where(uphill.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(moved, parameters, strict=True))
    ), uphill


def _free_directions(experts: int, dim: int, activation: Callable[[Tensor], Tensor], learn_temperature: bool) -> Tensor:
    """Columns: what a gate step may change, in the coordinates (β_i, c_i, log τ) of each expert side by side."""
    width = dim + 2
    coordinate = torch.eye(experts * width, dtype=torch.float64).view(experts, width, experts * width)
    weights = coordinate[: experts - 1 if _is_linear(activation) else experts, :dim].flatten(0, 1)
    columns = [weights, coordinate[:-1, dim]]
    if learn_temperature:
        columns.append(coordinate[:, dim + 1].sum(dim=0, keepdim=True))
    return torch.cat(columns).T


def _anchored(parameters: GaussianMoEParameters, activation: Callable[[Tensor], Tensor]) -> GaussianMoEParameters:
    """The same density with nothing in the gate that all experts share."""
    weight, bias = parameters.gate_weight, parameters.gate_bias
    if _is_linear(activation):
        weight = weight - weight[..., -1:, :]
    return parameters._replace(gate_weight=weight, gate_bias=bias - bias[..., -1:])


def _activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    if activation is None:
        return _ACTIVATIONS["identity"]
    if callable(activation):
        return activation
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None, {', '.join(map(repr, _ACTIVATIONS))} or a function, got {activation!r}")
    return _ACTIVATIONS[activation]


def _check_gate(activation: Activation, temperature: float) -> None:
    _activation(activation)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


_GRID = torch.linspace(-4, 4, 33, dtype=torch.float64)


def _is_linear(activation: Callable[[Tensor], Tensor]) -> bool:
    return torch.allclose(activation(_GRID), _GRID * activation(torch.ones(1, dtype=torch.float64)), atol=1e-10)


def _keeps_scale(activation: Callable[[Tensor], Tensor]) -> bool:
    """σ(2z) = 2 σ(z), as of the identity and ReLU: then (β, c, τ) and (2β, 2c, 2τ) are one gate."""
    return torch.allclose(activation(2 * _GRID), 2 * activation(_GRID), atol=1e-10)


def _check_data(X: Tensor, y: Tensor, init: GaussianMoEParameters) -> None:
    if X.ndim != 3 or y.shape != X.shape[:2]:
        raise ValueError(f"X must have shape (r, n, d) and y (r, n), got {tuple(X.shape)} and {tuple(y.shape)}")
    replicates, n, d = X.shape
    experts = init.gate_bias.shape[-1]
    shapes = (
        [(replicates, experts, d), (replicates, experts), (replicates,)]
        + [(replicates, experts, d)]
        + [(replicates, experts)] * 2
    )
    for name, value, shape in zip(init._fields, init, shapes, strict=True):
        if value.shape != shape:
            raise ValueError(f"init.{name} must have shape {shape}, got {tuple(value.shape)}")
        if not value.isfinite().all():
            raise ValueError(f"init.{name} must be finite, got {value.flatten()[~value.flatten().isfinite()][0].item()}")
    for name in ("temperature", "expert_variance"):
        if not (getattr(init, name) > 0).all():
            raise ValueError(f"init.{name} must be positive, got {getattr(init, name).min().item():g}")
    if experts < 1:
        raise ValueError("init must have at least 1 expert, got 0")
    if n < experts * (d + 1):
        raise ValueError(f"n_samples={n} is less than the {experts * (d + 1)} coefficients of {experts} experts on {d} features")
    for name, value in (("X", X), ("y", y)):
        if not value.isfinite().all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")


class GaussianMoE(RegressorMixin, BaseEstimator):
    r"""Gaussian mixture of experts for scikit-learn: linear experts, and a softmax gate whose temperature may be learned.

    $$ p(y \mid x) = \sum_i \pi_i(x)\, N(y;\, a_i^\top x + b_i,\, \nu_i), \qquad
       \pi(x) = \mathrm{softmax}_i\big((\sigma(\beta_i^\top x) + c_i) / \tau\big) $$

    Args:
        num_experts: k, at least 1.
        activation: σ, see `gate_logits`. None is the plain temperature gate.
        learn_temperature: whether τ is fitted.
        temperature: τ to begin with, or to keep; positive. Logits of two experts differ by at most 1/τ through a sigmoid and 2/τ
            through tanh, so a fixed τ should be well below 1 there.
        max_iter: see `fit_gaussian_moe`.
        tol: see `fit_gaussian_moe`.
        init: `"kmeans"` on standardised (X, y), or parameters to begin with: `GaussianMoEParameters` (without batch) or a
            mapping of the same names to arrays. Its temperature then takes the place of `temperature`.
        min_variance: see `fit_gaussian_moe`.
        random_state: of k-means; a seed or `numpy.random.RandomState`.

    Attributes:
        gate_weight_: β, (k, d). For the temperature gate relative to the last expert.
        gate_bias_: c, (k,), relative to the last expert.
        temperature_: τ.
        expert_weight_: a, (k, d).
        expert_bias_: b, (k,).
        expert_variance_: ν, (k,).
        log_likelihood_: mean over the training rows.
        n_iter_: EM iterations.

    Raises:
        ValueError: in `fit`, an argument out of range, or fewer rows than the experts have coefficients, k (d + 1).

    Warns:
        UserWarning: τ is to be learned, but σ(2z) = 2σ(z), as for the identity and ReLU: the scale of (β, c, τ) is arbitrary.
        ConvergenceWarning: `max_iter` was too small for `tol`.

    Source:
        arXiv 2401.13875. With two experts and an odd σ (tanh; sigmoid up to a constant) there is a twin (our observation):
        (β_1, β_2) and (-β_2, -β_1) are the same gate. The k-means start is our choice: experts by
        least squares in each cluster, β from the clusters' centres as in discriminant analysis, c from their sizes.
    """

    @no_type_check  # nor `fit`: scikit-learn wants any value to be taken here, and bad ones refused there, in its words
    def __init__(
        self,
        num_experts: int = 2,
        activation: Activation = "sigmoid",
        learn_temperature: bool = True,
        temperature: float = 1.0,
        max_iter: int = 200,
        tol: float = 1e-6,
        init: Any = "kmeans",
        min_variance: float = 1e-6,
        random_state: Any = None,
    ) -> None:
        self.num_experts = num_experts
        self.activation = activation
        self.learn_temperature = learn_temperature
        self.temperature = temperature
        self.max_iter = max_iter
        self.tol = tol
        self.init = init
        self.min_variance = min_variance
        self.random_state = random_state

    @no_type_check
    def fit(self, X: ArrayLike, y: ArrayLike) -> "GaussianMoE":
        """Fit by EM. X is (n, d), y (n,)."""
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {self.num_experts}")
        _check_gate(self.activation, self.temperature)
        if self.learn_temperature and self.num_experts > 1 and _keeps_scale(_activation(self.activation)):
            warnings.warn(
                f"activation {self.activation!r} keeps scale: gate weights, biases and a learned temperature can all be "
                "multiplied by one number without any change; use sigmoid or tanh, or learn_temperature=False",
                UserWarning,
                stacklevel=2,
            )
        X, y = validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        if len(y) < (needed := self.num_experts * (X.shape[1] + 1)):  # said here, for k-means would say it in other words
            raise ValueError(f"n_samples={len(y)} is less than the {needed} coefficients of {self.num_experts} experts")
        fit = fit_gaussian_moe(
            _tensor(X)[None],
            _tensor(y)[None],
            self._start(X, y),
            activation=self.activation,
            learn_temperature=self.learn_temperature,
            max_iter=self.max_iter,
            tol=self.tol,
            min_variance=self.min_variance,
        )
        for name, value in zip(fit.parameters._fields, fit.parameters, strict=True):
            setattr(self, f"{name}_", value[0].numpy() if value.ndim > 1 else value[0].item())
        self.log_likelihood_, self.n_iter_ = fit.log_likelihood.item(), int(fit.n_iter)
        if not fit.converged:
            message = f"EM gained more than tol = {self.tol:g} in the last of {self.max_iter} iterations; raise max_iter or tol"
            warnings.warn(message, ConvergenceWarning, stacklevel=2)
        return self

    def _start(self, X: np.ndarray, y: np.ndarray) -> GaussianMoEParameters:
        if isinstance(self.init, str):
            if self.init != "kmeans":
                raise ValueError(f"init must be 'kmeans', GaussianMoEParameters or a mapping of its names, got {self.init!r}")
            return _kmeans_start(X, y, self.num_experts, self.temperature, self.random_state)
        given = self.init._asdict() if isinstance(self.init, GaussianMoEParameters) else dict(self.init)
        if set(given) != set(GaussianMoEParameters._fields):
            raise ValueError(f"init must have {', '.join(GaussianMoEParameters._fields)}, got {', '.join(given) or 'nothing'}")
        return GaussianMoEParameters(**{name: _tensor(value)[None] for name, value in given.items()})

    @property
    def parameters_(self) -> GaussianMoEParameters:
        """The fitted parameters as tensors, for `log_density`, `voronoi_loss` and as `init` of another fit."""
        check_is_fitted(self)
        values = {name: getattr(self, f"{name}_") for name in GaussianMoEParameters._fields}
        return GaussianMoEParameters(**{name: _tensor(value) for name, value in values.items()})

    def predict_proba_gate(self, X: ArrayLike) -> Float[np.ndarray, "n k"]:
        """Probability π of each expert before y is seen."""
        rows = self._rows(X)
        return torch.softmax(gate_logits(rows, *self.parameters_[:3], self.activation), dim=-1).numpy()

    def predict(self, X: ArrayLike) -> Float[np.ndarray, " n"]:
        """Mean of the mixture, Σ π_i(x) (a_i x + b_i)."""
        return (self.predict_proba_gate(X) * self._expert_means(X)).sum(axis=1)

    def log_density(self, X: ArrayLike, y: ArrayLike) -> Float[np.ndarray, " n"]:
        """Log p(y | x) of each row. Not called `score_samples`, which scikit-learn calls without y."""
        check_is_fitted(self)
        X, y = validate_data(self, X, y, reset=False, y_numeric=True, dtype=np.float64)
        return log_density(_tensor(X), _tensor(y), self.parameters_, self.activation).numpy()

    def score(self, X: ArrayLike, y: ArrayLike) -> float:
        """Mean log-likelihood, as of `sklearn.mixture.GaussianMixture`. For R² take `sklearn.metrics.r2_score` of `predict`."""
        return float(self.log_density(X, y).mean())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.regressor_tags.poor_score = True  # "score" is a log-likelihood and has no 1 to come close to
        return tags

    def sample(self, X: ArrayLike, random_state: Any = None) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """A y for each row of X drawn from the mixture, and the expert it came from."""
        random = check_random_state(random_state)
        cumulative = self.predict_proba_gate(X).cumsum(axis=1)
        chosen = (random.random_sample((len(cumulative), 1)) * cumulative[:, -1:] >= cumulative).sum(axis=1)
        mean = np.take_along_axis(self._expert_means(X), chosen[:, None], axis=1)[:, 0]
        return mean + np.sqrt(self.expert_variance_[chosen]) * random.standard_normal(len(mean)), chosen

    def _rows(self, X: ArrayLike) -> Tensor:
        check_is_fitted(self)
        return _tensor(validate_data(self, X, reset=False, dtype=np.float64))

    def _expert_means(self, X: ArrayLike) -> np.ndarray:
        return (self._rows(X) @ _tensor(self.expert_weight_).mT).numpy() + self.expert_bias_


def _kmeans_start(X: np.ndarray, y: np.ndarray, experts: int, temperature: float, random_state: Any) -> GaussianMoEParameters:
    """Clusters of (X, y): each is given an expert, its centre and size make the gate."""
    joint = np.column_stack([X, y])
    deviation = joint.std(axis=0)
    deviation[deviation == 0] = 1.0
    joint = (joint - joint.mean(axis=0)) / deviation
    cluster = KMeans(experts, n_init=4, random_state=check_random_state(random_state)).fit_predict(joint)
    share = _tensor(np.eye(experts)[cluster].T)[None]
    size = share.sum(dim=2).clamp(min=1)
    centre = share @ _tensor(joint[:, :-1])[None] / size.unsqueeze(-1)
    # Of two clusters of one size the centres are opposite, and opposite weights are where the twins (see GaussianMoE) meet: the
    # gradient has no reason to leave there. So the lengths are made to differ.
    length = torch.arange(1, experts + 1, dtype=torch.float64).unsqueeze(1)
    start = GaussianMoEParameters(
        gate_weight=temperature * centre / _tensor(deviation[:-1]) / length,
        gate_bias=temperature * size.log(),
        temperature=torch.full((1,), float(temperature), dtype=torch.float64),
        expert_weight=torch.zeros_like(centre),
        expert_bias=torch.zeros_like(size),
        expert_variance=torch.ones_like(size),
    )
    floor = torch.full((1, 1), max(1e-3 * float(np.var(y)), 1e-300), dtype=torch.float64)
    return _expert_step(_tensor(X.T)[None], _tensor(y)[None], start, share, floor)


def _tensor(values: ArrayLike) -> Tensor:
    """A copy: what scikit-learn hands over may be read-only memory, or integers."""
    return torch.tensor(np.asarray(values, dtype=np.float64))


class FisherInformation(NamedTuple):
    """Fisher information per row, the parameters its rows stand for, and its eigenvalues from the smallest up."""

    matrix: Float[np.ndarray, "p p"]
    names: list[str]
    eigenvalues: Float[np.ndarray, " p"]


def fisher_information(model: GaussianMoE, X: ArrayLike, y: ArrayLike) -> FisherInformation:
    r"""Which directions of the parameters the data tell nothing about.

    $$ I = \frac1n \sum_t s_t s_t^\top, \qquad s_t = \nabla_\theta \log p(y_t \mid x_t; \theta) $$

    θ holds what the model is free to fit: τ only if it is learned, gate biases (and weights of the temperature gate) relative
    to the last expert. An eigenvalue that is 0 beside the others means that many parameters are one density. The learned
    temperature gate always has one, along (β, c, τ) itself.

    Args:
        model: a fitted `GaussianMoE`.
        X: rows to average over, (n, d), usually those it was fitted on.
        y: their outputs, (n,).

    Raises:
        ValueError: X or y do not fit the model.

    Source:
        arXiv 2401.13875 shows the interaction by a partial differential equation; the empirical Fisher matrix as a diagnostic is
        our choice.
    """
    check_is_fitted(model)
    X, y = validate_data(model, X, y, reset=False, y_numeric=True, dtype=np.float64)
    parameters = _anchored(model.parameters_, _activation(model.activation))
    free = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in zip(parameters._fields, parameters, strict=True)}
    free["gate_bias"][-1] = False
    free["gate_weight"][-1] = not _is_linear(_activation(model.activation))
    free["temperature"].fill_(model.learn_temperature)
    names = [
        name + (f"[{', '.join(str(int(i)) for i in index)}]" if mask.ndim else "")
        for name, mask in free.items()
        for index in mask.nonzero()
    ]
    flat = torch.cat([value.flatten() for value in parameters])
    mask = torch.cat([part.flatten() for part in free.values()])
    place = torch.eye(len(flat), dtype=flat.dtype)[:, mask]

    def density(theta: Tensor, x: Tensor, target: Tensor) -> Tensor:
        pieces = (torch.where(mask, 0, flat) + place @ theta).split([value.numel() for value in parameters])
        moved = GaussianMoEParameters(*(new.view_as(old) for new, old in zip(pieces, parameters, strict=True)))
        return torch.logsumexp(_log_joint(x[:, None], target[None], moved, model.activation)[0], dim=-2).squeeze()

    scores = torch.func.vmap(torch.func.grad(density), in_dims=(None, 0, 0), chunk_size=4096)(flat[mask], _tensor(X), _tensor(y))
    matrix = (scores.T @ scores / len(scores)).numpy()
    return FisherInformation(matrix, names, np.linalg.eigvalsh(matrix))


class VoronoiLoss(NamedTuple):
    """Distance from fitted to true parameters, whole and by part, one of each batch entry."""

    total: Float[Tensor, "*batch"]
    gate: Float[Tensor, "*batch"]  # weights and biases (or masses)
    temperature: Float[Tensor, "*batch"]
    experts: Float[Tensor, "*batch"]


def voronoi_loss(
    fitted: GaussianMoE | GaussianMoEParameters,
    true: GaussianMoE | GaussianMoEParameters,
    kind: Literal["exact", "over"] = "exact",
    *,
    activation: Activation = "sigmoid",
) -> VoronoiLoss:
    r"""How far fitted parameters are from the true ones, whatever the order of the experts.

    `"exact"`, for as many experts as there are: the smallest sum of absolute differences over all ways to match them,

    $$ L = \min_\pi \sum_i \|\beta_{\pi i} - \beta^*_i\|_1 + |c_{\pi i} - c^*_i| + \|a_{\pi i} - a^*_i\|_1 + |b_{\pi i} - b^*_i|
       + |\nu_{\pi i} - \nu^*_i| \; + \; |\tau - \tau^*| $$

    with c (for the temperature gate also β) about its mean over the experts, since what all share does not count.

    `"over"`, for at least as many: each fitted expert is assigned to the true one nearest in (a, b, ν). With cells $A_j$ and
    masses $m = \mathrm{softmax}(c / \tau)$, the loss is the sum of $|\sum_{i \in A_j} m_i - m^*_j|$, $|\tau - \tau^*|^q$ and

    $$ \sum_j \sum_{i \in A_j} m_i \left( \|\beta_i - \beta^*_j\|^q + \|a_i - a^*_j\|^q + |b_i - b^*_j|^{r}
       + |\nu_i - \nu^*_j|^{r/2} \right) $$

    In cells of one, q = 1 and all differences are absolute (norms are sums of absolute values); in cells of 2 and 3, q = 2 and
    r = 4 and 6, the slower rates at which experts that share a truth are found; in larger ones r = 7, a lower bound. For τ, q is
    1 if all cells have one, else 2.

    Args:
        fitted: one model, or parameters with any batch.
        true: with the batch of `fitted`, or none.
        kind: see above.
        activation: of the gate, if neither is a `GaussianMoE`; it matters only whether it is linear.

    Raises:
        ValueError: unknown `kind`, numbers of experts that do not go with it, features that differ.

    Source:
        arXiv 2401.13875, the Voronoi losses, from memory and unverified in detail. Our choices: sums of absolute values, cells by
        the experts alone, masses in place of exp(c / τ), the power of τ, and r for cells of more than 3.
    """
    if kind not in ("exact", "over"):
        raise ValueError(f"kind must be 'exact' or 'over', got {kind!r}")
    for model in (fitted, true):
        if isinstance(model, GaussianMoE):
            activation = model.activation
    linear = _is_linear(_activation(activation))
    fitted, true = (model.parameters_ if isinstance(model, GaussianMoE) else model for model in (fitted, true))
    experts, known = fitted.gate_bias.shape[-1], true.gate_bias.shape[-1]
    if experts < known or (kind == "exact" and experts != known):
        relation = "as many experts as" if kind == "exact" else "at least as many experts as"
        raise ValueError(f"fitted must have {relation} true, {known}, got {experts}")
    if fitted.gate_weight.shape[-1] != true.gate_weight.shape[-1]:
        raise ValueError(
            f"fitted must have {true.gate_weight.shape[-1]} features as true has, got {fitted.gate_weight.shape[-1]}"
        )
    return (_exact_loss if kind == "exact" else _over_loss)(fitted, true, linear)


def _exact_loss(fitted: GaussianMoEParameters, true: GaussianMoEParameters, linear: bool) -> VoronoiLoss:
    def gate(p: GaussianMoEParameters) -> Tensor:
        weight = p.gate_weight - p.gate_weight.mean(dim=-2, keepdim=True) if linear else p.gate_weight
        return torch.cat([weight, (p.gate_bias - p.gate_bias.mean(dim=-1, keepdim=True)).unsqueeze(-1)], dim=-1)

    gates = _distances(gate(fitted), gate(true))
    experts = _distances(_expert_coordinates(fitted), _expert_coordinates(true))
    temperature = (fitted.temperature - true.temperature).abs()
    batch, known = gates.shape[:-2], gates.shape[-1]
    cost = (gates + experts).reshape(-1, known, known).detach().cpu().numpy()
    match = torch.from_numpy(np.stack([linear_sum_assignment(each)[1] for each in cost])).to(gates.device).view(*batch, known, 1)
    gate_loss, expert_loss = (part.gather(-1, match).sum(dim=(-2, -1)) for part in (gates, experts))
    return VoronoiLoss(gate_loss + expert_loss + temperature, gate_loss, temperature, expert_loss)


def _over_loss(fitted: GaussianMoEParameters, true: GaussianMoEParameters, linear: bool) -> VoronoiLoss:
    cell = F.one_hot(
        _distances(_expert_coordinates(fitted), _expert_coordinates(true)).argmin(dim=-1), true.gate_bias.shape[-1]
    ).to(fitted.gate_bias)  # [*batch, fitted, true]
    mass, true_mass = (F.softmax(p.gate_bias / p.temperature.unsqueeze(-1), dim=-1) for p in (fitted, true))
    members = (cell @ cell.sum(dim=-2).unsqueeze(-1)).squeeze(-1)  # how many share an expert's cell, itself included
    power = torch.where(members > 1, 2.0, 1.0)
    slow = torch.where(members > 1, torch.where(members > 2, torch.where(members > 3, 7.0, 6.0), 4.0), 1.0)
    slow_variance = torch.where(members > 1, slow / 2, 1.0)

    def differences(name: str) -> Tensor:
        mine, theirs = getattr(fitted, name), getattr(true, name)
        if mine.ndim < fitted.gate_weight.ndim:
            mine, theirs = mine.unsqueeze(-1), theirs.unsqueeze(-1)
        return mine - cell @ theirs

    gate_weight = differences("gate_weight")
    if linear:
        gate_weight = gate_weight - (mass.unsqueeze(-1) * gate_weight).sum(dim=-2, keepdim=True)
    cells = ((mass.unsqueeze(-2) @ cell).squeeze(-2) - true_mass).abs().sum(dim=-1)
    gate = cells + (mass * gate_weight.abs().sum(dim=-1) ** power).sum(dim=-1)
    experts = (
        mass
        * (
            differences("expert_weight").abs().sum(dim=-1) ** power
            + differences("expert_bias").abs().squeeze(-1) ** slow
            + differences("expert_variance").abs().squeeze(-1) ** slow_variance
        )
    ).sum(dim=-1)
    temperature = (fitted.temperature - true.temperature).abs() ** power.amax(dim=-1)
    return VoronoiLoss(gate + experts + temperature, gate, temperature, experts)


def _expert_coordinates(p: GaussianMoEParameters) -> Tensor:
    return torch.cat([p.expert_weight, p.expert_bias.unsqueeze(-1), p.expert_variance.unsqueeze(-1)], dim=-1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Sums of absolute differences between each row of a and each of b."""
    return (a.unsqueeze(-2) - b.unsqueeze(-3)).abs().sum(dim=-1)


class ActivationRouter(nn.Module):
    r"""Top-k router with an activation between its linear scores and the temperature, for `firsthand.moe.MoE(router=...)`.

    $$ p = \mathrm{softmax}_i\!\left(\frac{\sigma(\beta_i^\top x) + c_i}{\tau}\right), \qquad
       w = p_{\text{top-}k} \;\big(/ \textstyle\sum p_{\text{top-}k}\big), \qquad \tau = \log(1 + e^{\rho}) $$

    Scores and softmax are computed in float32 or wider; the weights come in the input's dtype.

    Args:
        dim: size of a token, at least 1.
        num_experts: at least 1.
        top_k: experts per token, in [1, `num_experts`].
        activation: σ, see `gate_logits`.
        learn_temperature: train ρ; otherwise it is a buffer.
        temperature: initial τ, positive. A sigmoid lets logits differ by at most 1/τ before the bias, so that at 1 no expert has
            more than e times another's weight; start well below 1 to route sharply.
        normalize_top_k: whether the k weights are divided by their sum.

    Attributes:
        weight: β, (num_experts, dim), normal with deviation 0.02.
        bias: c, (num_experts,), zero. Outside σ, it moves an expert's share of all tokens.

    Raises:
        ValueError: a size or `temperature` is out of range, or `activation` unknown.

    Source:
        arXiv 2401.13875; the paper has no top-k, normalisation or initial values: those are as in our `TopKRouter`. τ by softplus
        is our choice. A weight decay also pulls on ρ: leave it out of the decayed parameters as you would a bias.
    """

    weight: Float[Tensor, "experts dim"]
    bias: Float[Tensor, " experts"]
    raw_temperature: Float[Tensor, ""]

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        activation: Activation = "sigmoid",
        learn_temperature: bool = True,
        temperature: float = 1.0,
        *,
        normalize_top_k: bool = True,
    ) -> None:
        super().__init__()
        for name, size in {"dim": dim, "num_experts": num_experts, "top_k": top_k}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts = {num_experts}, got {top_k}")
        _check_gate(activation, temperature)
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        nn.init.normal_(self.weight, std=0.02)
        self._add_gate(activation, learn_temperature, temperature, normalize_top_k)

    def _add_gate(self, activation: Activation, learn_temperature: bool, temperature: float, normalize_top_k: bool) -> None:
        """What a router with a weight lacks; it goes where the weight is."""
        self.activation, self.normalize_top_k = activation, normalize_top_k
        if getattr(self, "bias", None) is None:
            self.bias = nn.Parameter(self.weight.new_zeros(len(self.weight)))
        raw = self.weight.new_tensor(temperature + math.log(-math.expm1(-temperature)))  # the inverse of softplus
        if learn_temperature:
            self.raw_temperature = nn.Parameter(raw)
        else:
            self.register_buffer("raw_temperature", raw)

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """τ."""
        return F.softplus(self._wide(self.raw_temperature))

    def forward(
        self, x: Float[Tensor, "*tokens dim"]
    ) -> tuple[Float[Tensor, "t experts"], Float[Tensor, "t k"], Int[Tensor, "t k"]]:
        """Logits (divided by τ), weights and indices of the chosen experts, largest first; the order of transformers' routers."""
        flat = x.reshape(-1, x.shape[-1])
        logits = gate_logits(self._wide(flat), self._wide(self.weight), self._wide(self.bias), self.temperature, self.activation)
        weights, index = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        if self.normalize_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights.to(x.dtype), index

    @staticmethod
    def _wide(value: Tensor) -> Tensor:
        return value.to(torch.promote_types(value.dtype, torch.float32))

    def extra_repr(self) -> str:
        experts, dim = self.weight.shape
        return f"{dim}, {experts}, top_k={self.top_k}, activation={self.activation!r}, temperature={self.temperature.item():.3g}"


def to_activation_gate(
    model: Any, activation: Activation = "sigmoid", *, learn_temperature: bool = True, temperature: float = 1.0
) -> Any:
    """Turn every router of a mixture-of-experts model into an `ActivationRouter`, in place.

    A router keeps its weight, and whether it normalises, and gets a bias of zeros (if it has none) and ρ; so `gate.bias` and
    `gate.raw_temperature` are new in the state dict. transformers does not know these when it loads: build, convert, then
    `load_state_dict`. The object stays the same and stays an instance of its family's router, so `output_router_logits`, the
    model's own balance loss and hooks work as before. Make optimisers after the conversion.

    Args:
        model: Mixtral, OLMoE, Qwen2-MoE or Qwen3-MoE of transformers, or one with `firsthand.moe.MoE` layers.
        activation: see `gate_logits`.
        learn_temperature: see `ActivationRouter`.
        temperature: see `ActivationRouter`.

    Returns:
        `model`.

    Raises:
        ValueError: no such layer, a router without a weight matrix, one that is an `ActivationRouter` already, an unknown
            activation or a temperature that is not positive.

    Source:
        arXiv 2401.13875 has no trained hosts: this is for training from initial weights, or for a router to be trained anew.
    """
    from firsthand.moe.blocks import moe_blocks

    _check_gate(activation, temperature)
    blocks = moe_blocks(model)
    for block in blocks:
        if isinstance(block.router, ActivationRouter):
            raise ValueError(f"{block.name} has an ActivationRouter already")
        weight = getattr(block.router, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(
                f"{block.name} needs a router with a weight of shape (experts, dim), got {type(block.router).__name__}"
            )
    for block in blocks:
        router: Any = block.router
        # OLMoE and Qwen say it in `norm_topk_prob`, ours in `normalize_top_k`; Mixtral always does.
        normalize = getattr(router, "norm_topk_prob", getattr(router, "normalize_top_k", True))
        router.__class__ = _with_activation(type(router))
        router._add_gate(activation, learn_temperature, temperature, normalize)
    return model


@cache
def _with_activation(router: type[nn.Module]) -> type[nn.Module]:
    """The class of a host's router with our forward. A subclass of both, so that transformers' hooks still find it."""
    return type(f"Activation{router.__name__}", (ActivationRouter, router), {})
