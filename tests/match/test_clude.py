import math

import numpy as np
import pytest
import scipy.optimize
import torch
from sklearn.cluster import KMeans
from torch import nn

from firsthand.match.clude import clu_de, clude_initialize, cluster, cluster_mutants, rand_1_bin


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sphere(x):
    return (x**2).sum(dim=-1)


def rosenbrock(x):
    return (100 * (x[..., 1:] - x[..., :-1] ** 2) ** 2 + (1 - x[..., :-1]) ** 2).sum(dim=-1)


# --- the operators


def test_rand_1_bin_is_the_formula():
    population = torch.randn(4, 3, generator=seeded())
    rows = torch.tensor([[1, 2, 3], [0, 2, 3], [3, 0, 1], [2, 1, 0]])
    crossed = torch.tensor([[True, False, True], [True, True, True], [False, False, True], [False, True, False]])
    trials = rand_1_bin(population, rows, crossed, 0.7)
    for i in range(4):
        r1, r2, r3 = rows[i]
        for j in range(3):
            mutant = population[r1, j] + 0.7 * (population[r2, j] - population[r3, j])
            assert trials[i, j] == pytest.approx((mutant if crossed[i, j] else population[i, j]).item())


def test_cluster_mutants_start_from_the_best_of_the_best_cluster_not_of_all():
    population = torch.randn(5, 3, generator=seeded())
    clusters = torch.tensor([0, 0, 2, 2, 2])  # cluster 1 has lost its members
    fitness = torch.tensor([0.0, 10.0, 3.0, 2.0, 4.0])  # the best of all is in the worse cluster
    pairs = torch.tensor([[0, 1], [4, 2]])
    mutants = cluster_mutants(population, fitness, clusters, pairs, 0.5)
    torch.testing.assert_close(mutants[0], population[3] + 0.5 * (population[0] - population[1]))
    torch.testing.assert_close(mutants[1], population[3] + 0.5 * (population[4] - population[2]))


def test_a_cluster_with_an_individual_that_failed_does_not_win():
    population = torch.arange(4.0)[:, None]
    fitness = torch.tensor([math.inf, 0.0, 5.0, 6.0])
    mutants = cluster_mutants(population, fitness, torch.tensor([0, 0, 1, 1]), torch.tensor([[2, 3]]), 1.0)
    assert mutants.item() == 2.0 + (2.0 - 3.0)


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("dim", [2, 300])
def test_clusters_are_those_of_scikit_learn(k, dim):
    for seed in range(5):
        population = torch.randn(30, dim, generator=seeded(seed), dtype=torch.float64) + 5
        seeds = torch.randperm(30, generator=seeded(seed))[:k]
        theirs = KMeans(k, init=population[seeds].numpy(), n_init=1, algorithm="lloyd", tol=0.0, max_iter=100).fit(
            population.numpy()
        )
        np.testing.assert_array_equal(cluster(population, seeds), theirs.labels_)


def test_equal_individuals_leave_a_cluster_empty():
    clusters = cluster(torch.ones(6, 3), torch.tensor([0, 4]))
    assert (clusters == clusters[0]).all()


# --- the search


@pytest.mark.parametrize("clustering", [True, False])
@pytest.mark.parametrize("function", [sphere, rosenbrock])
def test_the_best_never_gets_worse_and_every_evaluation_counts(clustering, function):
    sizes = []

    def counted(x):
        sizes.append(len(x))
        return function(x)

    found = clu_de(counted, dim=6, bounds=(-3.0, 3.0), pop_size=17, generations=40, clustering=clustering, generator=seeded())
    assert len(found.history) == 41
    assert all(later <= earlier for earlier, later in zip(found.history, found.history[1:], strict=False))
    assert found.fun == found.history[-1] == function(found.x).item() == function(found.population).min().item()
    assert found.evaluations == sum(sizes) == 17 + 40 * (17 + (4 if clustering else 0))
    assert found.population.shape == (17, 6)
    assert set(sizes) == ({17, 4} if clustering else {17})


@pytest.mark.parametrize(("function", "generations"), [(sphere, 100), (rosenbrock, 250)])
def test_without_clusters_it_is_as_good_as_scipys(function, generations):
    """Same strategy, sizes and evaluations; medians over seeds, of the logarithm."""
    dim, size = 5, 30
    ours, theirs = [], []
    for seed in range(5):
        found = clu_de(
            function, dim=dim, bounds=(-5.0, 5.0), pop_size=size, generations=generations, F=0.5, CR=0.9, clustering=False,
            generator=seeded(seed),
        )  # fmt: skip
        ours.append(math.log10(found.fun + 1e-30))
        reference = scipy.optimize.differential_evolution(
            lambda x: function(torch.from_numpy(x.T)).numpy(), [(-5.0, 5.0)] * dim, strategy="rand1bin", mutation=0.5,
            recombination=0.9, popsize=size // dim, maxiter=generations, init="random", tol=0.0, atol=0.0, polish=False,
            updating="deferred", vectorized=True, rng=seed,
        )  # fmt: skip
        assert reference.nit == len(found.history) - 1
        theirs.append(math.log10(reference.fun + 1e-30))
    start = math.log10(function(torch.zeros(dim) + 2.5).item())
    assert np.median(ours) < start - 3
    assert np.median(ours) == pytest.approx(np.median(theirs), abs=1.5)


def test_a_seed_gives_the_same_search_again():
    def go(seed):
        return clu_de(rosenbrock, dim=5, bounds=(-2.0, 2.0), generations=10, generator=seeded(seed)).x

    assert torch.equal(go(1), go(1))
    assert not torch.equal(go(1), go(2))


def test_it_searches_within_the_bounds_of_each_dimension():
    low, high = torch.tensor([1.0, -2.0]), torch.tensor([1.5, 5.0])
    seen = []
    found = clu_de(lambda x: (seen.append(x), sphere(x))[1], dim=2, bounds=(low, high), generator=seeded())
    everything = torch.cat(seen)
    assert ((everything >= low) & (everything <= high)).all()
    torch.testing.assert_close(found.x, torch.tensor([1.0, 0.0]), atol=0.05, rtol=0)


def test_a_given_population_is_left_alone_and_may_be_left_behind():
    init = torch.rand(25, 3, generator=seeded(), dtype=torch.float64)
    before = init.clone()
    found = clu_de(lambda x: sphere(x - 5), init=init, generations=60, generator=seeded())
    assert torch.equal(init, before)
    assert found.x.dtype == torch.float64
    assert found.fun < sphere(init - 5).min() / 10


def test_no_generations_is_random_search():
    init = torch.randn(50, 3, generator=seeded())
    found = clu_de(sphere, init=init, generations=0)
    assert torch.equal(found.x, init[sphere(init).argmin()])
    assert found.evaluations == 50


def test_what_is_not_finite_counts_as_worst_and_is_reported():
    found = clu_de(lambda x: torch.where(x[:, 0] < 0, math.nan, sphere(x)), dim=3, bounds=(-1.0, 1.0), generator=seeded())
    assert math.isfinite(found.fun)
    assert found.x[0] >= 0
    assert 0 < found.non_finite < found.evaluations
    with pytest.raises(ValueError, match="objective must be finite for some"):
        clu_de(lambda x: torch.full((len(x),), math.nan), dim=3, bounds=(-1.0, 1.0))


def test_bad_input():
    def go(**kw):
        return clu_de(sphere, **({"dim": 3, "bounds": (-1.0, 1.0)} | kw))

    for words, kw in [
        ("pop_size must be at least 4, got 3", {"pop_size": 3}),
        ("pop_size must be at least 4, got 3", {"init": torch.ones(3, 2), "dim": None}),
        ("bounds must be finite with lowest < highest", {"bounds": (1.0, 1.0)}),
        ("bounds must be finite with lowest < highest", {"bounds": (0.0, math.inf)}),
        ("bounds must be numbers or one for each of 3", {"bounds": (torch.zeros(2), torch.ones(2))}),
        ("bounds must be given with dim", {"bounds": None}),
        ("either init or dim", {"init": torch.ones(5, 3)}),
        ("either init or dim", {"dim": None}),
        ("dim must be at least 1", {"dim": 0}),
        ("init must be finite", {"init": torch.full((5, 3), math.nan), "dim": None}),
        ("generations must be at least 0", {"generations": -1}),
        ("F must be positive", {"F": 0.0}),
        ("CR must be in", {"CR": 1.1}),
        ("mutants must be from 1 to 30", {"mutants": 31}),
    ]:
        with pytest.raises(ValueError, match=words):
            go(**kw)
    with pytest.raises(ValueError, match="objective must return one value for each of 30"):
        clu_de(lambda x: x, dim=3, bounds=(-1.0, 1.0))
    with pytest.warns(UserWarning, match="hardly searches"):
        clu_de(sphere, dim=100_001, bounds=(-1.0, 1.0), pop_size=4, generations=0)


# --- starting weights of a module


def task():
    x = torch.randn(64, 4, generator=seeded())
    return x, (x[:, :1] * x[:, 1:2]).tanh()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1))


def test_the_module_gets_the_best_weights_and_is_no_worse_than_before():
    x, y = task()
    module = mlp()
    module[0].bias.requires_grad_(False)
    frozen = module[0].bias.clone()
    before = nn.functional.mse_loss(module.eval()(x), y)
    module.train()
    found = clude_initialize(module, lambda m: nn.functional.mse_loss(m(x), y), generator=seeded())
    assert module.training
    assert module[2].training
    after = nn.functional.mse_loss(module.eval()(x), y)
    assert found.fun == pytest.approx(after.item(), rel=1e-5)
    assert found.history[0] <= before + 1e-6
    assert after < before
    assert torch.equal(module[0].bias, frozen)
    weights = torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])
    assert torch.equal(weights, found.x)


def test_one_pass_and_one_by_one_find_the_same():
    x, y = task()

    def loss(module):
        return nn.functional.mse_loss(module(x), y)

    def stacked(parameters):
        hidden = torch.tanh(torch.einsum("ni,phi->pnh", x, parameters["0.weight"]) + parameters["0.bias"][:, None])
        output = torch.einsum("pnh,poh->pno", hidden, parameters["3.weight"]) + parameters["3.bias"][:, None]
        return ((output - y) ** 2).mean(dim=(1, 2))

    wide, target = x.double(), y.double()
    found = [
        clude_initialize(
            mlp().double(), lambda m: nn.functional.mse_loss(m(wide), target), generations=3, generator=seeded(), **how
        )
        for how in ({}, {"chunk_size": 7}, {"vectorize": False, "chunk_size": None})
    ]
    for other in found[1:]:
        torch.testing.assert_close(other.x, found[0].x)
    one = clude_initialize(mlp(), loss, generations=3, generator=seeded())
    torch.testing.assert_close(clude_initialize(mlp(), stacked, stacked=True, generations=3, generator=seeded()).x, one.x)


def test_the_first_population_is_the_module_and_its_spread():
    module = mlp()
    own = torch.cat([p.detach().flatten() for p in module.parameters()])
    found = clude_initialize(module, lambda m: m[0].weight.sum(), generations=0, pop_size=200, spread=2.0, generator=seeded())
    assert torch.equal(found.population[0], own)
    weight = own[:32]
    drawn = found.population[1:, :32]
    low, high = (weight.mean() + side * 2 * weight.std(correction=0) for side in (-1, 1))
    assert drawn.min() == pytest.approx(low.item(), abs=0.01)
    assert drawn.max() == pytest.approx(high.item(), abs=0.01)


def test_a_recurrent_module_is_evaluated_one_by_one():
    module = nn.GRU(3, 4)
    x = torch.randn(5, 2, 3, generator=seeded())
    before = module(x)[0].square().mean().item()
    found = clude_initialize(module, lambda m: m(x)[0].square().mean(), generations=3, pop_size=6, generator=seeded())
    assert module(x)[0].square().mean().item() == pytest.approx(found.fun, rel=1e-5)
    assert found.fun < before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype):
    x, y = (each.to(dtype) for each in task())
    module = mlp().to(dtype)
    found = clude_initialize(module, lambda m: nn.functional.mse_loss(m(x), y), generations=2, generator=seeded())
    assert all(p.dtype == dtype for p in module.parameters())
    assert math.isfinite(found.fun)


def test_a_search_that_fails_leaves_the_module_as_it_was():
    module = mlp()
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(ValueError, match="finite for some"):
        clude_initialize(module, lambda m: m[0].weight.sum() * math.nan, generations=1)
    assert module.training
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_bad_initialisation():
    x, y = task()
    for words, kw in [
        ("spread must be positive", {"spread": 0.0}),
        ("chunk_size must be None or at least 1", {"chunk_size": 0}),
        ("pop_size must be at least 4", {"pop_size": 2}),
    ]:
        with pytest.raises(ValueError, match=words):
            clude_initialize(mlp(), lambda m: nn.functional.mse_loss(m(x), y), **kw)
    with pytest.raises(ValueError, match="parameters that require a gradient"):
        clude_initialize(nn.ReLU(), lambda m: torch.tensor(0.0))
