"""Can the parameters of a mixture of experts be learned when its gate has a temperature, and does an activation in the gate help?

Data are drawn from a mixture of two linear Gaussian experts, as theory papers of this kind do, and the mixture is fitted by
maximum likelihood: by EM, from the truth times log-normal noise that is the same at every sample size. At each of eight sizes
from 10^2.5 to 10^4.5 the error is the median over replicates of the Voronoi loss. The primary claim is about the slope of log
error against log size, of gate and temperature together: a parametric rate is -1/2, an error that more data do not reduce is 0.

A seed is one batch of replicates. All arms share true parameters, inputs, uniform and normal draws and the noise on the start; an
arm's data come from its own gate, as the theory has it. That the plain temperature gate stays where it starts along (β, c, τ) is
algebra; what can fail is whether the activation brings the parametric rate at sizes that one can have, and whether the plain
gate's trouble is with its parameters only. Hence the claim about the Hellinger distance between the fitted and the true density,
and the arm whose temperature is known and not learned.

A fit with one expert too many is made as well, on half of the replicates and at the five smaller sizes. It has metrics and no
claim: its likelihood is so flat that EM does not get to the end of it in the iterations allowed.
"""

import math
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from firsthand import Study, Trial, beats, holds, matches
from firsthand.moe.activation_gate import (
    Activation,
    GaussianMoE,
    GaussianMoEFit,
    GaussianMoEParameters,
    fisher_information,
    fit_gaussian_moe,
    gate_logits,
    log_density,
    voronoi_loss,
)

SIZES = [round(10**exponent) for exponent in np.linspace(2.5, 4.5, 8)]
REACH = 3.0  # inputs are uniform in [-3, 3]
NOISE = 0.2  # of the start, in logarithms


@dataclass
class Draw:
    """What makes one batch of data sets, whatever the gate."""

    x: Tensor  # [r, n, 1]
    uniform: Tensor  # [r, n]
    normal: Tensor  # [r, n]


@dataclass
class World:
    draws: list[Draw]
    noise: GaussianMoEParameters  # factors on the truth to start from, one set a replicate
    noise_over: GaussianMoEParameters  # the same with one expert more, for half of them


@dataclass(frozen=True)
class Gate:
    activation: Activation
    learn_temperature: bool = True


def prepare(trial: Trial) -> World:
    replicates, sizes = (4, SIZES[:2]) if trial.smoke else (16, SIZES)
    device, generator = trial.device, trial.generator

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator).to(device)

    def factors(count: int, experts: int) -> GaussianMoEParameters:
        shapes = [(experts, 1), (experts,), (), (experts, 1), (experts,), (experts,)]
        return GaussianMoEParameters(*((NOISE * normal(count, *shape)).exp() for shape in shapes))

    draws = [Draw(REACH * (2 * uniform(replicates, n, 1) - 1), uniform(replicates, n), normal(replicates, n)) for n in sizes]
    return World(draws, factors(replicates, 2), factors(replicates // 2, 3))


def truth(activation: Activation, device: torch.device) -> GaussianMoEParameters:
    """The same numbers for all gates, but that the plain gate's second weight is 0: it has no other meaning there."""
    values = [[[2.5], [0.3 if activation else 0.0]], [-0.3, 0.0], 0.15, [[0.5], [-0.5]], [2.0, -2.0], [0.25, 0.5]]
    return GaussianMoEParameters(*(torch.tensor(value, dtype=torch.float64, device=device) for value in values))


def outputs(draw: Draw, true: GaussianMoEParameters, activation: Activation) -> Tensor:
    gate = torch.softmax(gate_logits(draw.x, *true[:3], activation), dim=-1)
    mean = draw.x @ true.expert_weight.mT + true.expert_bias
    first = draw.uniform < gate[..., 0]
    deviation = true.expert_variance.sqrt()
    return torch.where(first, mean[..., 0] + deviation[0] * draw.normal, mean[..., 1] + deviation[1] * draw.normal)


def hellinger(fitted: GaussianMoEParameters, true: GaussianMoEParameters, activation: Activation) -> Tensor:
    """Root of E_x ∫ (√p - √q)² dy / 2 by the midpoint rule, one for each replicate."""
    x = REACH * (2 * (torch.arange(60, dtype=torch.float64, device=fitted.temperature.device) + 0.5) / 60 - 1)
    y = 9 * (2 * (torch.arange(360, dtype=torch.float64, device=x.device) + 0.5) / 360 - 1)
    grid_x, grid_y = (part.flatten() for part in torch.meshgrid(x, y, indexing="ij"))
    replicates = len(fitted.temperature)
    p = log_density(grid_x[:, None].expand(replicates, -1, 1), grid_y.expand(replicates, -1), fitted, activation)
    q = log_density(grid_x[:, None], grid_y, true, activation)
    square = ((p / 2).exp() - (q / 2).exp()).square().sum(dim=1) * (18 / 360) / 60 / 2
    return square.sqrt()


def fit(
    x: Tensor, y: Tensor, near: GaussianMoEParameters, noise: GaussianMoEParameters, gate: Gate, tol: float
) -> GaussianMoEFit:
    start = GaussianMoEParameters(*(value * factor for value, factor in zip(near, noise, strict=True)))
    if not gate.learn_temperature:
        start = start._replace(temperature=near.temperature.expand(len(x)))
    return fit_gaussian_moe(
        x, y, start, activation=gate.activation, learn_temperature=gate.learn_temperature, max_iter=300, tol=tol
    )


def rate(trial: Trial, world: World, gate: Gate) -> dict[str, float]:
    true = truth(gate.activation, trial.device)
    # One expert too many: the first one twice, with half its mass each.
    twice = torch.tensor([0, 0, 1], device=trial.device)
    over = GaussianMoEParameters(*(value if value.ndim == 0 else value[twice] for value in true))
    over.gate_bias[:2] -= true.temperature * math.log(2)

    sizes: list[int] = []
    errors: dict[str, list[float]] = {}
    for draw in trial.track(world.draws, "sample sizes"):
        y = outputs(draw, true, gate.activation)
        sizes.append(y.shape[1])
        exact = fit(draw.x, y, true, world.noise, gate, tol=1e-12)
        loss = voronoi_loss(exact.parameters, true, activation=gate.activation)
        found = {
            "gate error": loss.gate + loss.temperature,
            "expert error": loss.experts,
            "Voronoi loss": loss.total,
            "Hellinger distance": hellinger(exact.parameters, true, gate.activation),
        }
        if len(sizes) <= 5:
            half = len(y) // 2
            more = fit(draw.x[:half], y[:half], over, world.noise_over, gate, tol=1e-9)
            found["Voronoi loss, one too many"] = voronoi_loss(more.parameters, true, "over", activation=gate.activation).total
        for name, values in found.items():
            errors.setdefault(name, []).append(values.median().item())
        trial.record(math.log10(sizes[-1]), **{name: errors[name][-1] for name in found})

    return {
        **{f"slope of {name}": slope(sizes, values) for name, values in errors.items()},
        "gate error at the largest size": errors["gate error"][-1],
        "converged at the largest size": exact.converged.double().mean().item(),
        "converged, one too many": more.converged.double().mean().item(),
        "log10 of least Fisher eigenvalue": least_information(world.draws[1], true, gate),
    }


def slope(sizes: list[int], errors: list[float]) -> float:
    """Of log error over log size, by least squares."""
    return float(np.polyfit(np.log(sizes[: len(errors)]), np.log(errors), 1)[0])


def least_information(draw: Draw, true: GaussianMoEParameters, gate: Gate) -> float:
    """Smallest eigenvalue of the Fisher information over its largest, where a fit to one replicate ends, as a power of 10."""
    X, y = draw.x[0].cpu().numpy(), outputs(draw, true, gate.activation)[0].cpu().numpy()
    init = {name: value.cpu().numpy() for name, value in true._asdict().items()}
    model = GaussianMoE(2, gate.activation, gate.learn_temperature, init=init, max_iter=300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that the plain gate's scale is arbitrary, which is what is measured here
        eigenvalues = fisher_information(model.fit(X, y), X, y).eigenvalues
    return math.log10(max(eigenvalues[0] / eigenvalues[-1], 1e-16))  # below that it is rounding


study = Study(
    method="activation-gate",
    prepare=prepare,
    arms={
        "temperature gate": partial(rate, gate=Gate(None)),
        "sigmoid gate": partial(rate, gate=Gate("sigmoid")),
        "tanh gate": partial(rate, gate=Gate("tanh")),
        "temperature known": partial(rate, gate=Gate(None, learn_temperature=False)),
    },
    claim=beats("sigmoid gate", "temperature gate", on="slope of gate error", by=0.25, lower_is_better=True),
    also=[
        holds(
            "with the temperature gate, the slope of gate error is above -0.1",
            lambda metrics: metrics["temperature gate"]["slope of gate error"],
            above=-0.1,
        ),
        holds(
            "with the sigmoid gate, the slope of the whole Voronoi loss is below -0.4",
            lambda metrics: metrics["sigmoid gate"]["slope of Voronoi loss"],
            below=-0.4,
        ),
        holds(
            "with the tanh gate, the slope of the whole Voronoi loss is below -0.4",
            lambda metrics: metrics["tanh gate"]["slope of Voronoi loss"],
            below=-0.4,
        ),
        matches("temperature gate", "sigmoid gate", on="slope of Hellinger distance", within=0.1),
        beats("temperature known", "temperature gate", on="slope of gate error", by=0.25, lower_is_better=True),
    ],
    equal="true parameters, inputs, random draws, start of EM, iterations allowed, tolerance",
    seeds=8,
    data=("generated",),
)
