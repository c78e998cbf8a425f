"""Batched EM for Gaussian mixtures of experts, with what one would write for one data set and call in a loop.

The peer is EM in NumPy, with the gate fitted by SciPy's L-BFGS and its exact gradient in each round. `GaussianMixture` of
scikit-learn fits another model (clusters of (x, y), no gate that depends on x), so only the time of one of its iterations is set
beside ours. The limit of an iteration is three exponentials of each row and expert: gate, softmax and responsibility.
"""

import warnings
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit, log_softmax, logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.utils.benchmark import Timer

from firsthand.moe.activation_gate import GaussianMoEParameters, fit_gaussian_moe, gate_logits

ROUNDS, REPLICATES, TOLERANCE = 3, 16, 1e-9
TRUE = GaussianMoEParameters(
    *(
        torch.tensor(value, dtype=torch.float64)
        for value in ([[2.5], [0.3]], [-0.3, 0.0], 0.15, [[0.5], [-0.5]], [2.0, -2.0], [0.25, 0.5])
    )
)


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def data(n: int) -> tuple[Tensor, Tensor, GaussianMoEParameters]:
    """Data sets drawn from TRUE, and a start near it for each."""
    torch.manual_seed(0)
    X = 6 * torch.rand(REPLICATES, n, 1, dtype=torch.float64) - 3
    first = torch.rand(REPLICATES, n) < torch.softmax(gate_logits(X, *TRUE[:3]), -1)[..., 0]
    mean = X @ TRUE.expert_weight.mT + TRUE.expert_bias
    y = torch.where(first, mean[..., 0], mean[..., 1])
    y += torch.where(first, *TRUE.expert_variance.sqrt()) * torch.randn(REPLICATES, n, dtype=torch.float64)
    start = (part * (0.1 * torch.randn(REPLICATES, *part.shape, dtype=torch.float64)).exp() for part in TRUE)
    return X, y, GaussianMoEParameters(*start)


def numpy_em(x: np.ndarray, y: np.ndarray, start: tuple[np.ndarray, ...]) -> float:
    """One data set with one feature and two experts; returns the mean log-likelihood."""
    weight, bias, tau, slope, intercept, variance = (np.array(part) for part in start)
    theta = np.array([*weight[:, 0], bias[0] - bias[1], np.log(tau)])
    slope = slope[:, 0]
    design = np.column_stack([x, np.ones_like(x)])

    def gate(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bent = expit(x[:, None] * theta[:2])
        return bent, (bent + np.array([theta[2], 0])) / np.exp(theta[3])

    def loss(theta: np.ndarray, share: np.ndarray) -> tuple[float, np.ndarray]:
        bent, logits = gate(theta)
        log_gate = log_softmax(logits, axis=1)
        off = (share - np.exp(log_gate)) / np.exp(theta[3])
        by_weight = (off * bent * (1 - bent) * x[:, None]).mean(axis=0)
        by_tau = -(off * logits).sum(axis=1).mean() * np.exp(theta[3])
        return -(share * log_gate).sum(axis=1).mean(), -np.array([*by_weight, off[:, 0].mean(), by_tau])

    before = -np.inf
    for _ in range(300):
        residual = y[:, None] - x[:, None] * slope - intercept
        joint = log_softmax(gate(theta)[1], axis=1) - 0.5 * (residual**2 / variance + np.log(2 * np.pi * variance))
        density = logsumexp(joint, axis=1, keepdims=True)
        if density.mean() - before < TOLERANCE:
            break
        before, share = density.mean(), np.exp(joint - density)
        for i in range(2):
            root = np.sqrt(share[:, i])
            slope[i], intercept[i] = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)[0]
            variance[i] = (share[:, i] * (y - x * slope[i] - intercept[i]) ** 2).sum() / share[:, i].sum()
        theta = minimize(loss, theta, (share,), jac=True, method="L-BFGS-B").x
    return float(density.mean())


def main() -> None:
    print(f"{REPLICATES} data sets, 2 experts, 1 feature, sigmoid gate; EM until a mean log-likelihood gains < {TOLERANCE:g}")
    for n in (1_000, 5_000):
        X, y, start = data(n)
        arrays = [(X[i, :, 0].numpy(), y[i].numpy(), tuple(part[i].numpy() for part in start)) for i in range(REPLICATES)]

        def batched(X=X, y=y, start=start, **options):
            return fit_gaussian_moe(X, y, start, **{"tol": TOLERANCE, "max_iter": 300, **options})

        def looped(X=X, y=y, start=start):
            each = (slice(i, i + 1) for i in range(REPLICATES))
            options = {"tol": TOLERANCE, "max_iter": 300}
            return [fit_gaussian_moe(X[i], y[i], GaussianMoEParameters(*(part[i] for part in start)), **options) for i in each]

        def peer(arrays=arrays):
            return [numpy_em(*each) for each in arrays]

        fit = batched()
        torch.testing.assert_close(fit.log_likelihood, torch.cat([each.log_likelihood for each in looped()]))
        torch.testing.assert_close(fit.log_likelihood, torch.tensor(peer(), dtype=torch.float64), atol=2e-6, rtol=0)

        joint = np.stack([X[..., 0].numpy(), y.numpy()], axis=-1)
        mixtures = [GaussianMixture(2, max_iter=10, tol=0.0, init_params="random_from_data", random_state=0) for _ in joint]

        def mixture(joint=joint, mixtures=mixtures):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                for model, rows in zip(mixtures, joint, strict=True):
                    model.fit(rows)

        scores = torch.rand(REPLICATES, 2, n, dtype=torch.float64)

        def limit(scores=scores):
            for _ in range(30):
                torch.exp(scores)

        seconds = race(
            {
                "ours": batched,
                "one by one": looped,
                "peer": peer,
                "10 of ours": lambda: batched(tol=0.0, max_iter=10),
                "10 of GaussianMixture": mixture,
                "limit of 10": limit,
            }
        )
        print(
            f"  n = {n}: {seconds['ours']:.3f} s for all; ours / NumPy in a loop = {seconds['ours'] / seconds['peer']:.3f}, "
            f"ours / ours one by one = {seconds['ours'] / seconds['one by one']:.3f}; an iteration: "
            f"ours / GaussianMixture = {seconds['10 of ours'] / seconds['10 of GaussianMixture']:.3f}, "
            f"ours / limit = {seconds['10 of ours'] / seconds['limit of 10']:.2f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
