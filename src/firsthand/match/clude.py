"""Clu-DE: differential evolution with a mutation around the best cluster, to find starting weights for back-propagation."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

MEANINGFUL = 100_000  # dimensions; a few dozen individuals span next to nothing of more

Bound = float | Float[Tensor, " dim"]


@dataclass(frozen=True)
class CluDEResult:
    """What a search found.

    Attributes:
        x: the best individual.
        fun: its objective.
        history: the best objective so far: of the first population, then after each generation.
        evaluations: individuals evaluated.
        non_finite: how many of these had an objective that was NaN or infinite. They count as +inf.
        population: the last one.
    """

    x: Float[Tensor, " dim"]
    fun: float
    history: list[float]
    evaluations: int
    non_finite: int
    population: Float[Tensor, "pop dim"]


@torch.no_grad()
def clu_de(
    objective: Callable[[Tensor], Tensor],
    *,
    init: Float[Tensor, "pop dim"] | None = None,
    dim: int | None = None,
    bounds: tuple[Bound, Bound] | None = None,
    pop_size: int = 30,
    generations: int = 20,
    F: float = 0.5,
    CR: float = 0.9,
    mutants: int | None = None,
    clustering: bool = True,
    generator: torch.Generator | None = None,
) -> CluDEResult:
    r"""Minimise a function by differential evolution, each generation followed by a step around the best cluster.

    A generation is DE/rand/1/bin for every individual i, all at once,

    $$ v = x_{r_1} + F (x_{r_2} - x_{r_3}), \qquad u_j = v_j \text{ if } \rho_j < CR \text{ or } j = j_\mathrm{rand},
       \text{ else } x_{ij}, \qquad x_i \leftarrow u \text{ if } f(u) \le f(x_i) $$

    and then, with `clustering`: k-means splits the population into k clusters, k random in [2, √pop]; the cluster with the lowest
    mean objective wins; around its best member `win` come M mutants without crossover,

    $$ v = \mathrm{win} + F (x_{r_1} - x_{r_2}) $$

    and of these and M random individuals the best M stay in the population. The best individual is never lost.

    Args:
        objective: from a population, (pop, dim), to the objectives, (pop,). It is called with `pop_size` or M individuals.
        init: the first population; or else give `dim` and `bounds`.
        dim: dimension of an individual. The first population is then uniform within the bounds.
        bounds: lowest and highest values, numbers or a value for each dimension. A component that leaves them is drawn anew.
            With `init` they may be left out: then nothing bounds the search.
        pop_size: individuals, at least 4. With `init` it is its number of rows.
        generations: at least 0. At 0 the best of the first population is returned: random search.
        F: scale of the differences, positive.
        CR: probability in `[0, 1]` that a component comes from the mutant.
        mutants: M, from 1 to pop_size; a fifth of the population, rounded up, by default.
        clustering: without it this is plain DE/rand/1/bin.
        generator: draws everything, on the CPU.

    Returns:
        The best individual and the course of the search. `evaluations` is pop_size + generations · (pop_size + M), without M
        where there is no clustering.

    Raises:
        ValueError: an argument out of range, `init` not finite, an objective of the wrong shape, or one that is finite for no
            individual.

    Source:
        Mousavirad et al., "An Enhanced Differential Evolution Algorithm Using a Novel Clustering-based Mutation Operator", 2021,
        arXiv 2109.09351, as used in arXiv 2305.02374. From memory of the papers, unverified: the cluster step and how its mutants
        replace others. Our choice: that it follows the DE step, F, CR, M and the sizes, generations evaluated as a whole (the
        papers may update within one), and what happens at the bounds, which is what SciPy does.
    """
    population = _first_population(init, dim, bounds, pop_size, generator)
    size = len(population)
    mutants = math.ceil(size / 5) if mutants is None else mutants
    if generations < 0:
        raise ValueError(f"generations must be at least 0, got {generations}")
    if not 0 < F < math.inf:
        raise ValueError(f"F must be positive and finite, got {F}")
    if not 0 <= CR <= 1:
        raise ValueError(f"CR must be in [0, 1], got {CR}")
    if not 1 <= mutants <= size:
        raise ValueError(f"mutants must be from 1 to {size}, got {mutants}")
    if population.shape[1] > MEANINGFUL:
        warnings.warn(
            f"differential evolution of {size} individuals in {population.shape[1]} dimensions hardly searches", stacklevel=2
        )
    evaluations = non_finite = 0

    def evaluate(individuals: Tensor) -> Tensor:
        nonlocal evaluations, non_finite
        values = objective(individuals)
        if values.shape != (len(individuals),):
            raise ValueError(f"objective must return one value for each of {len(individuals)}, got {tuple(values.shape)}")
        evaluations += len(individuals)
        finite = values.isfinite()
        non_finite += int((~finite).sum())
        return torch.where(finite, values, math.inf).to(population.dtype)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=population.dtype).to(population.device)

    def inside(individuals: Tensor) -> Tensor:
        if bounds is None:
            return individuals
        low, high = (torch.as_tensor(bound).to(individuals) for bound in bounds)
        outside = (individuals < low) | (individuals > high)
        return torch.where(outside, low + (high - low) * draw(individuals.shape), individuals) if outside.any() else individuals

    fitness = evaluate(population)
    history = [fitness.min().item()]
    for _ in range(generations):
        rows = _distinct(size, generator).to(population.device)
        crossed = draw(population.shape) < CR
        always = torch.randint(population.shape[1], (size, 1), generator=generator).to(population.device)
        crossed.scatter_(1, always, True)
        trials = inside(rand_1_bin(population, rows, crossed, F))
        values = evaluate(trials)
        better = values <= fitness
        population = torch.where(better[:, None], trials, population)
        fitness = torch.where(better, values, fitness)
        if clustering:
            k = int(torch.randint(2, math.isqrt(size) + 1, (), generator=generator))
            clusters = cluster(population, torch.randperm(size, generator=generator)[:k].to(population.device))
            pairs = torch.stack([torch.randperm(size, generator=generator)[:2] for _ in range(mutants)]).to(population.device)
            challengers = inside(cluster_mutants(population, fitness, clusters, pairs, F))
            challenged = torch.randperm(size, generator=generator)[:mutants].to(population.device)
            both = torch.cat([population[challenged], challengers])
            of_both = torch.cat([fitness[challenged], evaluate(challengers)])
            stay = of_both.argsort(stable=True)[:mutants]
            population = population.index_copy(0, challenged, both[stay])
            fitness = fitness.index_copy(0, challenged, of_both[stay])
        history.append(fitness.min().item())
    if not math.isfinite(history[-1]):
        raise ValueError(f"objective must be finite for some individuals, was not for any of {evaluations}")
    best = int(fitness.argmin())
    return CluDEResult(population[best].clone(), history[-1], history, evaluations, non_finite, population)


def rand_1_bin(
    population: Float[Tensor, "pop dim"], rows: Int[Tensor, "pop 3"], crossed: Tensor, F: float
) -> Float[Tensor, "pop dim"]:
    """The trial vectors of one DE generation: mutants x_r1 + F (x_r2 - x_r3) where `crossed` says so, else the individuals.

    Args:
        population: the individuals.
        rows: r1, r2 and r3 of each.
        crossed: which components come from the mutant, bool (pop, dim).
        F: scale of the difference.

    Source:
        Storn and Price, "Differential Evolution", Journal of Global Optimization, 1997.
    """
    first, second, third = (population[column] for column in rows.T)
    return torch.where(crossed, first + F * (second - third), population)


def cluster_mutants(
    population: Float[Tensor, "pop dim"],
    fitness: Float[Tensor, " pop"],
    clusters: Int[Tensor, " pop"],
    pairs: Int[Tensor, "mutants 2"],
    F: float,
) -> Float[Tensor, "mutants dim"]:
    """Mutants around the best member of the cluster with the lowest mean: win + F (x_r1 - x_r2).

    Args:
        population: the individuals.
        fitness: their objectives; +inf is allowed.
        clusters: the cluster of each, from 0.
        pairs: r1 and r2 of each mutant.
        F: scale of the difference.

    Source:
        arXiv 2109.09351; from memory, unverified. `win` is the best of the winning cluster, not of the population.
    """
    means = torch.stack([fitness[clusters == c].mean() for c in range(int(clusters.max()) + 1)])
    winner = means.nan_to_num(nan=math.inf, posinf=math.inf).argmin()  # the mean of an empty cluster is NaN
    win = torch.where(clusters == winner, fitness, math.inf).argmin()
    return population[win] + F * (population[pairs[:, 0]] - population[pairs[:, 1]])


def cluster(population: Float[Tensor, "pop dim"], seeds: Int[Tensor, " k"], iterations: int = 100) -> Int[Tensor, " pop"]:
    """K-means: the cluster of each individual, starting from some of them as centres.

    Centres are means of individuals, so all distances follow from the inner products between individuals: these are computed
    once, and an iteration costs pop² and not pop · dim. A cluster that loses its members stays empty.

    Args:
        population: the individuals.
        seeds: which of them are the first centres.
        iterations: at most so many; it stops when nothing moves.
    """
    centred = population - population.mean(dim=0)
    products = (centred @ centred.T).double()
    members = torch.nn.functional.one_hot(seeds, len(population)).to(products)  # (k, pop), who makes up each centre
    clusters = torch.full_like(products[0], -1, dtype=torch.long)
    for _ in range(iterations):
        count = members.sum(dim=1)
        weights = members / count[:, None]
        # |x - c|² without |x|², which is the same for all centres
        distances = (weights @ products * weights).sum(dim=1, keepdim=True) - 2 * weights @ products
        distances = torch.where(count[:, None] > 0, distances, math.inf)
        nearest = distances.argmin(dim=0)
        if torch.equal(nearest, clusters):
            break
        clusters = nearest
        members = torch.nn.functional.one_hot(clusters, len(seeds)).to(products).T
    return clusters


def clude_initialize(
    module: nn.Module,
    loss_fn: Callable[..., Tensor],
    *,
    pop_size: int = 30,
    generations: int = 20,
    spread: float = 3.0,
    stacked: bool = False,
    vectorize: bool | None = None,
    chunk_size: int | None = 32,
    F: float = 0.5,
    CR: float = 0.9,
    mutants: int | None = None,
    clustering: bool = True,
    generator: torch.Generator | None = None,
) -> CluDEResult:
    r"""Search for starting weights, and put the best into the module.

    The first population is the module's own weights and, around them, individuals whose entries are uniform in
    mean ± `spread` · std, both taken over the present entries of each parameter tensor. Nothing bounds the search after that.

    Args:
        module: its parameters that require a gradient are searched, and changed in place. It is in evaluation mode meanwhile.
        loss_fn: from the module to its loss, a scalar: `lambda module: loss(module(x), y)`. With `stacked`, from a dictionary of
            parameters that have a population in front, (pop, *shape), to the losses, (pop,): see
            `firsthand.match.population_logits`.
        pop_size: individuals, at least 4.
        generations: at 0 this is the best of `pop_size` random starts.
        spread: width of the first population, in standard deviations; positive.
        stacked: whether `loss_fn` takes a whole population.
        vectorize: whether to run the population through `torch.vmap`; by default, unless there is an `nn.RNNBase` in the module,
            which vmap cannot run. Otherwise, individuals are evaluated one by one.
        chunk_size: individuals that are evaluated at a time; bounds the memory. `None` for all.
        F: as in `clu_de`, like all that follow.
        CR: probability that a component comes from the mutant.
        mutants: M.
        clustering: `False` for plain differential evolution.
        generator: draws everything, on the CPU.

    Returns:
        The result of `clu_de`; its individuals are the parameters side by side, in the order of `named_parameters`.

    Raises:
        ValueError: nothing to search, `spread` or `chunk_size` out of range, and as `clu_de`.

    Source:
        Moravvej et al., 2023, arXiv 2305.02374: the search only starts back-propagation. Our choice: the width of the first
        population, and that the module's own weights are in it, so that what is found is no worse a start by `loss_fn`.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("module must have parameters that require a gradient, got none")
    if not 0 < spread < math.inf:
        raise ValueError(f"spread must be positive and finite, got {spread}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be None or at least 1, got {chunk_size}")
    if vectorize is None:
        vectorize = not any(isinstance(part, nn.RNNBase) for part in module.modules())
    sizes = [p.numel() for p in parameters.values()]

    def unflatten(individuals: Tensor) -> dict[str, Tensor]:
        parts = individuals.split(sizes, dim=-1)
        shapes = ((name, p.shape, p.dtype) for name, p in parameters.items())
        return {name: part.unflatten(-1, shape).to(dtype) for part, (name, shape, dtype) in zip(parts, shapes, strict=True)}

    whole = _Loss(module, loss_fn)

    def loss_of_one(individual: Tensor) -> Tensor:
        weights = {f"module.{name}": part for name, part in unflatten(individual).items()}
        return torch.func.functional_call(whole, weights, ())

    def loss_of_all(individuals: Tensor) -> Tensor:
        if stacked:
            return loss_fn(unflatten(individuals))
        if vectorize:
            return torch.vmap(loss_of_one)(individuals)
        return torch.stack([loss_of_one(individual) for individual in individuals])

    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        found = clu_de(
            lambda individuals: torch.cat([loss_of_all(some) for some in individuals.split(chunk_size or len(individuals))]),
            init=_around(list(parameters.values()), pop_size, spread, generator),
            generations=generations,
            F=F,
            CR=CR,
            mutants=mutants,
            clustering=clustering,
            generator=generator,
        )
    finally:
        for part, mode in modes.items():
            part.training = mode
    with torch.no_grad():
        for name, weights in unflatten(found.x).items():
            parameters[name].copy_(weights)
    return found


class _Loss(nn.Module):
    """A loss of a module as a module, whose parameters `functional_call` can replace."""

    def __init__(self, module: nn.Module, loss_fn: Callable[[nn.Module], Tensor]) -> None:
        super().__init__()
        self.module = module
        self.loss_fn = loss_fn

    def forward(self) -> Tensor:
        return self.loss_fn(self.module)


@torch.no_grad()
def _around(parameters: list[nn.Parameter], pop_size: int, spread: float, generator: torch.Generator | None) -> Tensor:
    if pop_size < 4:
        raise ValueError(f"pop_size must be at least 4, got {pop_size}")
    own = [p.flatten().to(torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    means = torch.cat([p.mean().expand(p.numel()) for p in own])
    widths = torch.cat([spread * p.std(correction=0).expand(p.numel()) for p in own])
    draws = torch.rand((pop_size, len(means)), generator=generator).to(means)
    population = means + widths * (2 * draws - 1)
    population[0] = torch.cat(own)
    return population


def _first_population(
    init: Tensor | None, dim: int | None, bounds: tuple[Bound, Bound] | None, pop_size: int, generator: torch.Generator | None
) -> Tensor:
    if (init is None) == (dim is None):
        raise ValueError(f"either init or dim must be given, got {'neither' if init is None else 'both'}")
    size = pop_size if init is None else len(init)
    if size < 4:
        raise ValueError(f"pop_size must be at least 4, got {size}")
    if bounds is not None:
        low, high = (torch.as_tensor(bound, dtype=torch.float32 if init is None else init.dtype) for bound in bounds)
        width = dim if init is None else init.shape[1]
        if not (low < high).all() or not (low.isfinite() & high.isfinite()).all():
            raise ValueError(f"bounds must be finite with lowest < highest, got {bounds}")
        if any(bound.ndim and bound.shape != (width,) for bound in (low, high)):
            raise ValueError(f"bounds must be numbers or one for each of {width} dimensions, got {bounds}")
    if init is not None:
        if not init.isfinite().all():
            raise ValueError("init must be finite, has NaN or infinite entries")
        return init.detach().clone()
    if dim is None or dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    if bounds is None:
        raise ValueError("bounds must be given with dim, got None")
    return low + (high - low) * torch.rand((size, dim), generator=generator).to(low.device)


def _distinct(size: int, generator: torch.Generator | None) -> Int[Tensor, "size 3"]:
    """For each individual three others, all different."""
    lot = torch.rand((size, size), generator=generator).fill_diagonal_(2.0)
    return lot.argsort(dim=1)[:, :3]
