import copy
import itertools
import math
import warnings

import jaxtyping
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.utils.estimator_checks import parametrize_with_checks
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from firsthand.moe.activation_gate import (
    ActivationRouter,
    GaussianMoE,
    GaussianMoEParameters,
    fisher_information,
    fit_gaussian_moe,
    gate_logits,
    log_density,
    to_activation_gate,
    voronoi_loss,
)
from firsthand.moe.layer import MoE, TopKRouter

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed))


def random_parameters(*batch, k=3, d=2, seed=0):
    g = seeded(seed)
    draws = [torch.randn((*batch, *shape), dtype=torch.float64, generator=g) for shape in [(k, d), (k,), (), (k, d), (k,), (k,)]]
    return GaussianMoEParameters(*draws)._replace(
        temperature=0.3 * (0.3 * draws[2]).exp(), expert_variance=(0.3 * draws[5]).exp()
    )


def select(parameters, index):
    return GaussianMoEParameters(*(part[index] for part in parameters))


def numbers(gate_weight, gate_bias, temperature, expert_weight, expert_bias, expert_variance):
    parts = (gate_weight, gate_bias, temperature, expert_weight, expert_bias, expert_variance)
    return GaussianMoEParameters(*(torch.tensor(part, dtype=torch.float64) for part in parts))


TRUE = numbers([[2.5], [0.3]], [-0.3, 0.0], 0.15, [[0.5], [-0.5]], [2.0, -2.0], [0.25, 0.5])


def draw(true=TRUE, n=400, activation="sigmoid", seed=0, replicates=None):
    """X and y from a mixture; with replicates if asked for."""
    g = seeded(seed)
    d, lead = true.gate_weight.shape[-1], () if replicates is None else (replicates,)
    X = 6 * torch.rand(*lead, n, d, dtype=torch.float64, generator=g) - 3
    gate = torch.softmax(gate_logits(X, *true[:3], activation), dim=-1)
    chosen = torch.multinomial(gate.flatten(0, -2), 1, generator=g).view(*lead, n)
    mean = (X @ true.expert_weight.mT + true.expert_bias).gather(-1, chosen[..., None])[..., 0]
    return X, mean + true.expert_variance.sqrt()[chosen] * torch.randn(*lead, n, dtype=torch.float64, generator=g)


def near(true, replicates, seed=0, noise=0.2):
    factors = [(noise * normal(replicates, *part.shape, seed=seed + i)).exp() for i, part in enumerate(true)]
    return GaussianMoEParameters(*(part * factor for part, factor in zip(true, factors, strict=True)))


# The density


@pytest.mark.parametrize("activation", [None, "sigmoid", "tanh", "gelu", "silu", "relu", torch.sin])
def test_log_density_is_that_of_a_mixture_of_scipys_normals(activation):
    parameters, X, y = random_parameters(), normal(6, 2, seed=1), normal(6, seed=2)
    function = {None: lambda z: z, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, torch.sin: torch.sin}
    function |= {"gelu": F.gelu, "silu": F.silu}
    scores = (function[activation](X @ parameters.gate_weight.T) + parameters.gate_bias) / parameters.temperature
    gate = scipy.special.softmax(scores.numpy(), axis=1)
    mean = (X @ parameters.expert_weight.T + parameters.expert_bias).numpy()
    density = (gate * scipy.stats.norm.pdf(y.numpy()[:, None], mean, parameters.expert_variance.sqrt().numpy())).sum(axis=1)
    np.testing.assert_allclose(log_density(X, y, parameters, activation).numpy(), np.log(density), rtol=1e-10)


@pytest.mark.parametrize(("activation", "same"), [(None, True), ("relu", True), ("sigmoid", False), ("tanh", False)])
def test_twice_the_gate_at_twice_the_temperature_is_the_same_density_without_a_bend(activation, same):
    parameters, X, y = random_parameters(), normal(6, 2, seed=1), normal(6, seed=2)
    doubled = parameters._replace(
        gate_weight=2 * parameters.gate_weight, gate_bias=2 * parameters.gate_bias, temperature=2 * parameters.temperature
    )
    before, after = (log_density(X, y, each, activation) for each in (parameters, doubled))
    assert torch.equal(before, after) == same  # exactly: 2 is a power of two


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_two_experts_have_a_twin(activation):
    parameters, X, y = random_parameters(k=2), normal(6, 2, seed=1), normal(6, seed=2)
    twin = parameters._replace(gate_weight=-parameters.gate_weight.flip(0))
    torch.testing.assert_close(log_density(X, y, parameters, activation), log_density(X, y, twin, activation))


def test_density_of_a_batch_is_the_density_of_each():
    parameters, X, y = random_parameters(4), normal(4, 5, 2, seed=1), normal(4, 5, seed=2)
    each = [log_density(X[i], y[i], select(parameters, i)) for i in range(4)]
    torch.testing.assert_close(log_density(X, y, parameters), torch.stack(each))


# The fit


def test_one_expert_is_linear_regression():
    X, y = normal(50, 3) * torch.tensor([1.0, 100.0, 0.01]) + 1000, normal(50, seed=1) + 50
    model, linear = GaussianMoE(1).fit(X.numpy(), y.numpy()), LinearRegression().fit(X.numpy(), y.numpy())
    np.testing.assert_allclose(model.expert_weight_[0], linear.coef_, rtol=1e-6)
    np.testing.assert_allclose(model.predict(X.numpy()), linear.predict(X.numpy()), rtol=1e-8)
    np.testing.assert_allclose(model.expert_variance_[0], np.mean((y.numpy() - linear.predict(X.numpy())) ** 2), rtol=1e-6)
    np.testing.assert_allclose(model.predict_proba_gate(X.numpy()), 1.0)


def test_where_x_says_nothing_it_is_sklearns_gaussian_mixture():
    y = np.concatenate([normal(60, seed=1).numpy() - 1, 0.5 * normal(40, seed=2).numpy() + 2])
    start = numbers([[0.0], [0.0]], [0.0, 0.0], 0.7, [[0.0], [0.0]], [-1.0, 1.0], [1.0, 1.0])
    ours = GaussianMoE(2, tol=1e-13, max_iter=2000, init=start, learn_temperature=False).fit(np.zeros((100, 1)), y)
    theirs = GaussianMixture(
        2, tol=1e-13, max_iter=2000, reg_covar=0, weights_init=[0.5, 0.5], means_init=[[-1], [1]], precisions_init=[[[1]], [[1]]]
    ).fit(y[:, None])
    np.testing.assert_allclose(ours.predict_proba_gate(np.zeros((1, 1)))[0], theirs.weights_, atol=1e-4)
    np.testing.assert_allclose(ours.expert_bias_, theirs.means_[:, 0], atol=1e-4)
    np.testing.assert_allclose(ours.expert_variance_, theirs.covariances_[:, 0, 0], atol=1e-4)
    assert ours.score(np.zeros((100, 1)), y) == pytest.approx(theirs.score(y[:, None]), abs=1e-9)


@pytest.mark.parametrize("experts", [2, 3])
def test_where_y_tells_the_expert_the_plain_gate_is_logistic_regression(experts):
    X = normal(300, 2)
    label = (X @ normal(2, experts, seed=1) + torch.randn(300, experts, generator=seeded(2))).argmax(dim=1)
    y = 100.0 * label + normal(300, seed=3)
    zeros = torch.zeros(experts, 2, dtype=torch.float64)
    start = GaussianMoEParameters(
        zeros, zeros[:, 0], torch.tensor(0.5).double(), zeros, 100.0 * torch.arange(experts).double(), zeros[:, 0] + 1
    )
    ours = GaussianMoE(experts, None, learn_temperature=False, init=start, tol=1e-14).fit(X.numpy(), y.numpy())
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(X.numpy(), label.numpy())
    np.testing.assert_allclose(ours.predict_proba_gate(X.numpy()), theirs.predict_proba(X.numpy()), atol=1e-5)


@pytest.mark.parametrize("activation", [None, "sigmoid", "tanh", "gelu", torch.sin])
@pytest.mark.parametrize("learn_temperature", [True, False])
def test_no_iteration_lowers_the_likelihood(activation, learn_temperature):
    true = random_parameters(k=2, seed=3)
    X, y = draw(true, n=60, activation="tanh", replicates=4)
    parameters = random_parameters(4, k=3, seed=4)  # far from the truth, and one expert too many
    temperature = parameters.temperature
    before = log_density(X, y, parameters, activation).mean(dim=1)
    for _ in range(25):
        fit = fit_gaussian_moe(
            X, y, parameters, activation=activation, learn_temperature=learn_temperature, max_iter=1, min_variance=1e-12
        )
        parameters = fit.parameters
        assert (fit.log_likelihood >= before - 1e-12).all()
        torch.testing.assert_close(fit.log_likelihood, log_density(X, y, parameters, activation).mean(dim=1))
        before = fit.log_likelihood
    assert torch.equal(parameters.temperature, temperature) != learn_temperature


@pytest.mark.parametrize("activation", [None, "sigmoid", "tanh"])
def test_a_fit_ends_where_the_gradient_of_the_likelihood_is_zero(activation):
    X, y = draw(n=2000, activation=activation, replicates=2)
    fit = fit_gaussian_moe(X, y, near(TRUE, 2), activation=activation, tol=0.0, max_iter=150)
    parameters = GaussianMoEParameters(*(part.clone().requires_grad_() for part in fit.parameters))
    gradients = torch.autograd.grad(log_density(X, y, parameters, activation).mean(dim=1).sum(), tuple(parameters))
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-6


def test_the_truth_is_found_again():
    X, y = draw(n=20_000)
    model = GaussianMoE(2, temperature=0.3, tol=1e-10, max_iter=1000, random_state=0).fit(X.numpy(), y.numpy())
    order = [0, 1] if model.expert_bias_[0] > 0 else [1, 0]
    np.testing.assert_allclose(model.expert_weight_[order], TRUE.expert_weight, atol=0.05)
    np.testing.assert_allclose(model.expert_bias_[order], TRUE.expert_bias, atol=0.05)
    np.testing.assert_allclose(model.expert_variance_[order], TRUE.expert_variance, atol=0.05)
    gate = torch.softmax(gate_logits(X, *TRUE[:3]), dim=-1).numpy()
    np.testing.assert_allclose(model.predict_proba_gate(X.numpy())[:, order], gate, atol=0.05)


def test_replicates_do_not_touch_each_other():
    X, y = draw(n=100, replicates=5)
    start = near(TRUE, 5)
    together = fit_gaussian_moe(X, y, start)
    assert len(set(together.n_iter.tolist())) > 1, "they should stop at different times for this to say much"
    for i in range(5):
        alone = fit_gaussian_moe(X[i : i + 1], y[i : i + 1], select(start, slice(i, i + 1)))
        assert alone.n_iter.item() == together.n_iter[i].item()
        for one, many in zip(alone.parameters, together.parameters, strict=True):
            torch.testing.assert_close(one[0], many[i], rtol=1e-7, atol=1e-9)


def test_in_other_units_it_is_the_same_fit():
    X, y = draw(n=300, replicates=2)
    start = near(TRUE, 2)
    other = start._replace(
        gate_weight=start.gate_weight / 1e3,
        expert_weight=start.expert_weight * 1e-8,
        expert_bias=start.expert_bias * 1e-5,
        expert_variance=start.expert_variance * 1e-10,
    )
    mine, scaled = fit_gaussian_moe(X, y, start, max_iter=20), fit_gaussian_moe(1e3 * X, 1e-5 * y, other, max_iter=20)
    assert torch.equal(mine.n_iter, scaled.n_iter)
    torch.testing.assert_close(1e3 * scaled.parameters.gate_weight, mine.parameters.gate_weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(scaled.parameters.expert_variance, 1e-10 * mine.parameters.expert_variance, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.log_likelihood, mine.log_likelihood + math.log(1e5))


def test_the_learned_temperature_depends_on_the_start_with_the_plain_gate_only():
    X, y = draw(n=3000, activation="sigmoid", replicates=1)
    low = near(TRUE, 1, noise=0.0)
    high = low._replace(gate_weight=2 * low.gate_weight, gate_bias=2 * low.gate_bias, temperature=2 * low.temperature)
    for activation, ratio in ((None, 2.0), ("sigmoid", 1.0)):
        found = [fit_gaussian_moe(X, y, start, activation=activation, tol=1e-13, max_iter=1000) for start in (low, high)]
        torch.testing.assert_close(found[0].log_likelihood, found[1].log_likelihood, atol=1e-9, rtol=0)
        assert (found[1].parameters.temperature / found[0].parameters.temperature).item() == pytest.approx(ratio, rel=1e-4)


def test_constant_outputs_are_no_trouble():
    model = GaussianMoE(2, random_state=0).fit(np.arange(20.0)[:, None], np.full(20, 3.0))
    np.testing.assert_allclose(model.predict([[5.0]]), 3.0, rtol=1e-6)


def test_float32_data_is_fitted_in_float64():
    X, y = draw(n=100, replicates=1)
    start = near(TRUE, 1)
    fit = fit_gaussian_moe(X.float(), y.float(), start)
    assert {part.dtype for part in fit.parameters} == {torch.float64}
    torch.testing.assert_close(fit.log_likelihood, fit_gaussian_moe(X, y, start).log_likelihood, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(1, 9)}, r"y \(r, n\), got \(1, 40, 1\) and \(1, 9\)"),
        ({"X": torch.full((1, 40, 1), math.nan)}, "X must be finite"),
        ({"X": torch.zeros(1, 3, 1), "y": torch.zeros(1, 3)}, "n_samples=3 is less than the 4"),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"tol": -1.0}, "tol must be at least 0"),
        ({"min_variance": 0.0}, "min_variance must be positive"),
        ({"activation": "softplus"}, "activation must be None, 'identity'"),
        ({"temperature": torch.zeros(1)}, "init.temperature must be positive"),
        ({"expert_variance": torch.tensor([[1.0, -1.0]])}, "init.expert_variance must be positive, got -1"),
        ({"gate_bias": torch.tensor([[math.inf, 0.0]])}, "init.gate_bias must be finite, got inf"),
        ({"expert_weight": torch.zeros(1, 2, 3)}, r"init.expert_weight must have shape \(1, 2, 1\), got \(1, 2, 3\)"),
    ],
)
def test_bad_input_of_the_fit(change, message):
    X, y = draw(n=40, replicates=1)
    start = near(TRUE, 1)
    start = start._replace(**{name: change.pop(name) for name in start._fields if name in change})
    arguments = {"X": X, "y": y, "init": start, **change}
    unchecked = getattr(fit_gaussian_moe, "__wrapped__", fit_gaussian_moe)  # as a user calls it, without shape checks
    while hasattr(unchecked, "__wrapped__"):
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=message):
        unchecked(**arguments)


# The estimator


@parametrize_with_checks([GaussianMoE(), GaussianMoE(activation=None, learn_temperature=False)])
@pytest.mark.filterwarnings("ignore:EM gained more than tol")
def test_scikit_learn_takes_it_for_an_estimator(estimator, check):
    check(estimator)


def test_prediction_is_the_mean_of_what_is_sampled():
    X, y = draw(n=500)
    model = GaussianMoE(2, temperature=0.2, random_state=0).fit(X.numpy(), y.numpy())
    points = np.repeat([[-1.0], [0.2], [2.0]], 20_000, axis=0)
    drawn, expert = model.sample(points, random_state=0)
    np.testing.assert_allclose(drawn.reshape(3, -1).mean(axis=1), model.predict(points[::20_000]), atol=0.06)
    share = (expert.reshape(3, -1, 1) == np.arange(2)).mean(axis=1)
    np.testing.assert_allclose(share, model.predict_proba_gate(points[::20_000]), atol=0.02)
    assert model.log_density(points, drawn).mean() == pytest.approx(model.score(points, drawn))
    np.testing.assert_array_equal(drawn, model.sample(points, random_state=0)[0])


def test_a_fit_begun_where_another_ended_stays_there():
    X, y = (part.numpy() for part in draw(n=500))
    first = GaussianMoE(2, tol=1e-12, max_iter=1000, temperature=0.2, random_state=0).fit(X, y)
    for init in (first.parameters_, {name: getattr(first, name + "_") for name in GaussianMoEParameters._fields}):
        second = clone(first).set_params(init=init, tol=1e-10).fit(X, y)
        assert second.n_iter_ <= 2
        np.testing.assert_allclose(second.expert_weight_, first.expert_weight_, rtol=1e-4)
    assert first.score(X, y) == pytest.approx(first.log_likelihood_)


@pytest.mark.parametrize("activation", [None, "identity", "relu", F.leaky_relu])
def test_a_learned_temperature_without_a_bend_warns(activation):
    X, y = (part.numpy() for part in draw(n=100))
    with pytest.warns(UserWarning, match="keeps scale"):
        GaussianMoE(2, activation, random_state=0, tol=1e-3).fit(X, y)
    GaussianMoE(2, activation, learn_temperature=False, random_state=0, tol=1e-3).fit(X, y)


def test_too_few_iterations_warn():
    X, y = (part.numpy() for part in draw(n=100))
    with pytest.warns(ConvergenceWarning, match="last of 1 iterations"):
        GaussianMoE(2, max_iter=1).fit(X, y)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 40}, "n_samples=60 is less than the 80 coefficients"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"activation": "cosine"}, "activation must be None"),
        ({"init": "random"}, "init must be 'kmeans'"),
        ({"init": {"gate_weight": [[1.0]]}}, "init must have gate_weight, gate_bias"),
    ],
)
def test_bad_input_of_the_estimator(arguments, message):
    X, y = (part.numpy() for part in draw(n=60))
    with pytest.raises(ValueError, match=message):
        GaussianMoE(**arguments).fit(X, y)


# The diagnostic


def fitted_at(parameters, activation, X, y, learn_temperature=True):
    """A model that stands about at `parameters`: one iteration from there."""
    model = GaussianMoE(2, activation, learn_temperature, init=parameters, tol=1e9, max_iter=50)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="activation None keeps scale")
        return model.fit(X, y)


def test_the_scale_of_gate_and_temperature_is_the_null_direction_of_the_plain_gate():
    X, y = (part.numpy() for part in draw(n=500, activation=None))
    model = fitted_at(TRUE, None, X, y)
    matrix, names, eigenvalues = fisher_information(model, X, y)
    null = np.zeros(len(names))
    null[names.index("gate_weight[0, 0]")] = model.gate_weight_[0, 0]
    null[names.index("gate_bias[0]")] = model.gate_bias_[0]
    null[names.index("temperature")] = model.temperature_
    assert np.abs(matrix @ null).max() < 1e-12 * eigenvalues[-1]
    assert eigenvalues[0] < 1e-12 * eigenvalues[-1]
    assert eigenvalues[1] > 1e-5 * eigenvalues[-1]
    vector = np.linalg.eigh(matrix)[1][:, 0]
    assert abs(vector @ null) / np.linalg.norm(null) == pytest.approx(1.0)
    known = fisher_information(fitted_at(TRUE, None, X, y, learn_temperature=False), X, y)
    assert known.eigenvalues[0] > 1e-5 * known.eigenvalues[-1]
    assert "temperature" not in known.names


@pytest.mark.parametrize("activation", ["sigmoid", "tanh"])
def test_with_an_activation_nothing_is_unknowable(activation):
    X, y = (part.numpy() for part in draw(n=2000, activation=activation))
    information = fisher_information(fitted_at(TRUE, activation, X, y), X, y)
    assert len(information.names) == 10
    assert information.eigenvalues[0] > 1e-6 * information.eigenvalues[-1]


def test_information_of_one_expert_is_that_of_linear_regression():
    X, y = normal(80, 2).numpy(), normal(80, seed=1).numpy()
    model = GaussianMoE(1, None, learn_temperature=False).fit(X, y)
    information = fisher_information(model, X, y)
    assert information.names == ["expert_weight[0, 0]", "expert_weight[0, 1]", "expert_bias[0]", "expert_variance[0]"]
    residual, variance = y - model.predict(X), model.expert_variance_[0]
    scores = np.column_stack([residual[:, None] * X, residual, (residual**2 / variance - 1) / 2]) / variance
    np.testing.assert_allclose(information.matrix, scores.T @ scores / 80, rtol=1e-6, atol=1e-9)


# The loss between parameters


@pytest.mark.parametrize("activation", [None, "sigmoid"])
@pytest.mark.parametrize("kind", ["exact", "over"])
def test_order_and_what_all_experts_share_cost_nothing(kind, activation):
    true = random_parameters(k=4)
    order = torch.tensor([2, 0, 3, 1])
    same = GaussianMoEParameters(*(part if part.ndim == 0 else part[order] for part in true))
    same = same._replace(gate_bias=same.gate_bias + 5)
    if activation is None:
        same = same._replace(gate_weight=same.gate_weight + torch.tensor([1.0, -2.0]))
    assert voronoi_loss(same, true, kind, activation=activation).total.item() == pytest.approx(0, abs=1e-12)
    assert voronoi_loss(same, same, kind).total.item() == 0


def test_exact_loss_by_brute_force():
    true, fitted = random_parameters(k=4), random_parameters(5, k=4, seed=1)

    def cost(index, order):
        mine = GaussianMoEParameters(*(part if part.ndim == 0 else part[list(order)] for part in select(fitted, index)))
        bias = [each.gate_bias - each.gate_bias.mean() for each in (mine, true)]
        differences = [mine[i] - true[i] for i in (0, 2, 3, 4, 5)] + [bias[0] - bias[1]]
        return sum(part.abs().sum().item() for part in differences)

    expected = [min(cost(index, order) for order in itertools.permutations(range(4))) for index in range(5)]
    loss = voronoi_loss(fitted, true)
    np.testing.assert_allclose(loss.total.numpy(), expected)
    torch.testing.assert_close(loss.gate + loss.temperature + loss.experts, loss.total)
    torch.testing.assert_close(loss.temperature, (fitted.temperature - true.temperature).abs())


def test_an_expert_split_in_two_costs_nothing_and_moving_a_half_costs_little():
    true = numbers([[2.0], [0.5]], [0.4, 0.0], 0.5, [[1.0], [-1.0]], [2.0, -2.0], [0.25, 0.5])
    split = GaussianMoEParameters(*(part if part.ndim == 0 else part[[0, 0, 1]] for part in true))
    split.gate_bias[:2] -= 0.5 * math.log(2)  # halves of the mass exp(c / τ)
    assert voronoi_loss(split, true, "over").total.item() == pytest.approx(0, abs=1e-12)

    mass = torch.softmax(true.gate_bias / 0.5, 0)
    moved = split._replace(
        gate_weight=split.gate_weight + torch.tensor([[0.1], [0.0], [0.2]]),
        expert_bias=split.expert_bias + torch.tensor([0.0, 0.3, 0.0]),
        expert_variance=split.expert_variance + torch.tensor([0.1, 0.0, 0.1]),
        temperature=split.temperature,
    )
    loss = voronoi_loss(moved, true, "over")
    assert loss.gate.item() == pytest.approx((mass[0] / 2 * 0.1**2 + mass[1] * 0.2).item())  # q = 2 in the cell of two, else 1
    assert loss.experts.item() == pytest.approx((mass[0] / 2 * (0.3**4 + 0.1**2) + mass[1] * 0.1).item())  # r = 4, r / 2 = 2
    assert voronoi_loss(split._replace(temperature=split.temperature), true, "over").temperature.item() == 0


def test_as_many_experts_are_compared_without_powers_and_a_batch_is_each_of_it():
    true, fitted = random_parameters(k=2, seed=5), near(random_parameters(k=2, seed=5), 3, noise=0.01)
    whole = voronoi_loss(fitted, true, "over")
    for i in range(3):
        one = voronoi_loss(select(fitted, i), true, "over")
        assert one.total.item() == pytest.approx(whole.total[i].item())
    mass = torch.softmax(fitted.gate_bias / fitted.temperature[:, None], -1)
    expected = sum((mass * (fitted[i] - true[i]).abs().reshape(3, 2, -1).sum(-1)).sum(-1) for i in (3, 4, 5))
    torch.testing.assert_close(whole.experts, expected)


def test_loss_takes_fitted_models():
    X, y = (part.numpy() for part in draw(n=200))
    model = GaussianMoE(2, temperature=0.2, random_state=0).fit(X, y)
    assert voronoi_loss(model, TRUE).total.item() == pytest.approx(voronoi_loss(model.parameters_, TRUE).total.item())
    assert voronoi_loss(model, model).total.item() == 0


@pytest.mark.parametrize(
    ("experts", "features", "kind", "message"),
    [
        (2, 1, "both", "kind must be"),
        (3, 1, "exact", "as many experts as true, 2, got 3"),
        (1, 1, "over", "at least as many experts as true, 2, got 1"),
        (2, 2, "exact", "must have 1 features"),
    ],
)
def test_bad_input_of_the_loss(experts, features, kind, message):
    unchecked = voronoi_loss
    while hasattr(unchecked, "__wrapped__"):
        unchecked = unchecked.__wrapped__
    with pytest.raises(ValueError, match=message):
        unchecked(random_parameters(k=experts, d=features), TRUE, kind)


# The router


def router(activation="sigmoid", dtype=torch.float32, device="cpu", **options):
    torch.manual_seed(0)
    made = ActivationRouter(6, 5, 2, activation, **options)
    with torch.no_grad():
        made.weight.normal_(generator=seeded(1))
        made.bias.normal_(generator=seeded(2))
    return made.to(device=device, dtype=dtype)


def tokens(dtype=torch.float32, device="cpu", count=7):
    return torch.randn(count, 6, generator=seeded(3)).to(device=device, dtype=dtype)


@pytest.mark.parametrize("normalize", [True, False])
def test_without_activation_at_temperature_one_it_is_the_usual_router(normalize):
    ours = router(None, normalize_top_k=normalize)
    usual = TopKRouter(6, 5, 2, bias=True, normalize_top_k=normalize)
    usual.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    for mine, theirs in zip(ours(tokens()), usual(tokens()), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("learn_temperature", [True, False])
def test_the_router_computes_its_equation(dtype, device, learn_temperature):
    made = router("tanh", dtype, device, temperature=0.25, learn_temperature=learn_temperature)
    x = tokens(dtype, device)
    logits, weights, index = made(x)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = (torch.tanh(x.to(wide) @ made.weight.to(wide).T) + made.bias.to(wide)) / 0.25
    torch.testing.assert_close(logits, expected, rtol=5e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-4)
    assert weights.dtype == dtype
    assert weights.shape == index.shape == (7, 2)
    torch.testing.assert_close(index, logits.topk(2).indices)
    torch.testing.assert_close(weights.sum(dim=1).to(wide), torch.ones(7, dtype=wide, device=device), rtol=1e-2, atol=0)
    assert isinstance(made.raw_temperature, torch.nn.Parameter) == learn_temperature


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 50.0])
def test_temperature_begins_where_it_is_told_and_stays_positive(temperature):
    made = ActivationRouter(4, 3, 1, temperature=temperature)
    assert made.temperature.item() == pytest.approx(temperature, rel=1e-5)
    with torch.no_grad():
        made.raw_temperature -= 20
    assert made.temperature.item() > 0


def test_the_router_learns_its_temperature():
    made = router(temperature=0.5)
    logits = made(tokens())[0]
    torch.testing.assert_close(
        torch.autograd.grad(logits.sum(), made.raw_temperature)[0],
        -(logits.sum() / made.temperature * torch.sigmoid(made.raw_temperature)).detach(),
    )


def test_a_saved_router_is_the_same_router_with_temperature_or_without():
    for learn_temperature in (True, False):
        first = router(temperature=0.3, learn_temperature=learn_temperature)
        second = ActivationRouter(6, 5, 2, learn_temperature=learn_temperature)
        second.load_state_dict(first.state_dict())
        for one, other in zip(first(tokens()), second(tokens()), strict=True):
            assert torch.equal(one, other)


def test_the_router_compiles_as_one_graph(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks of the tests cannot be traced
    made = router(temperature=0.3)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(tokens()), made(tokens()), strict=True):
        torch.testing.assert_close(one, other)


def test_in_our_layer():
    layer = MoE(6, 8, 5, 2, router=router(temperature=0.3))
    x = tokens(count=12).view(3, 4, 6)
    y = layer(x)
    _, weights, index = layer.router(x)
    by_hand = torch.zeros(12, 6)
    for token, j in itertools.product(range(12), range(2)):
        gate, up = (layer.gate_up_proj[index[token, j]] @ x.view(12, 6)[token]).chunk(2)
        by_hand[token] += weights[token, j] * (layer.down_proj[index[token, j]] @ (F.silu(gate) * up))
    torch.testing.assert_close(y, by_hand.view(3, 4, 6))
    y.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in layer.router.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 1), "dim must be at least 1, got 0"),
        ((4, 4, 5), "top_k must be at most num_experts = 4, got 5"),
        ((4, 4, 0), "top_k must be at least 1"),
        ((4, 4, 1, "softplus"), "activation must be None"),
        ((4, 4, 1, "tanh", True, 0.0), "temperature must be positive"),
        ((4, 4, 1, "tanh", True, math.nan), "temperature must be positive"),
    ],
)
def test_bad_input_of_the_router(arguments, message):
    with pytest.raises(ValueError, match=message):
        ActivationRouter(*arguments)


# In transformers

SIZES = {"vocab_size": 48, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ROUTING = {"num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, **ROUTING, intermediate_size=24, num_local_experts=4)),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig(**SIZES, **ROUTING, intermediate_size=24, num_experts=4)),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **SIZES, **ROUTING, intermediate_size=24, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=4
        ),
    ),
}
IDS = torch.randint(3, 48, (2, 9), generator=seeded(0))


def host(family):
    torch.manual_seed(0)
    make, config = FAMILIES[family]
    return make(copy.deepcopy(config)).eval()


def routers(model):
    return [layer.mlp.gate for layer in model.model.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_without_bend_and_at_temperature_one_a_host_computes_what_it_did(family):
    model = host(family)
    before = model(IDS, output_router_logits=True)
    assert to_activation_gate(model, None, temperature=1.0) is model
    after = model(IDS, output_router_logits=True)
    torch.testing.assert_close(after.logits, before.logits)
    torch.testing.assert_close(after.router_logits, before.router_logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("captured_before", [True, False])
def test_a_host_has_the_activated_logits_captured_and_trains_on_them(family, captured_before):
    model = host(family)
    if captured_before:
        model(IDS, output_router_logits=True)  # transformers puts its hooks in place here, once
    to_activation_gate(model, "tanh", temperature=0.2)
    seen = []
    for gate in routers(model):
        gate.register_forward_hook(lambda gate, args, output: seen.append((gate, args[0], output)))
    output = model(IDS, labels=IDS, output_router_logits=True)
    assert len(output.router_logits) == len(seen) == 2
    for captured, (gate, x, result) in zip(output.router_logits, seen, strict=True):
        assert isinstance(result, tuple)
        logits, weights, index = result
        assert captured.shape == logits.shape == (18, 4)
        expected = (torch.tanh(x.reshape(18, 16) @ gate.weight.T) + gate.bias) / 0.2
        torch.testing.assert_close(captured, expected)
        assert weights.shape == index.shape == (18, 2)
        if family == "mixtral":  # the others leave the weights as the softmax has them, and so must we
            torch.testing.assert_close(weights.sum(dim=1), torch.ones(18))
        else:
            torch.testing.assert_close(weights, captured.softmax(dim=1).gather(1, index))
    assert output.aux_loss.isfinite()
    output.loss.backward()
    for gate in routers(model):
        assert gate.raw_temperature.grad.abs() > 0
        assert gate.weight.grad.abs().sum() > 0


def test_a_host_is_copied_saved_and_put_on_the_fast_path():
    model = to_activation_gate(host("mixtral"), temperature=0.2)
    assert isinstance(routers(model)[0], MixtralTopKRouter)
    assert isinstance(routers(model)[0], ActivationRouter)
    expected = model(IDS).logits
    torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, expected)
    again = to_activation_gate(MixtralForCausalLM(copy.deepcopy(FAMILIES["mixtral"][1])).eval())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(IDS).logits, expected)


def test_our_own_layers_are_converted_too():
    model = torch.nn.Sequential(MoE(6, 8, 5, 2), MoE(6, 8, 5, 2, normalize_top_k=False))
    weight = model[0].router.weight
    to_activation_gate(model, "tanh", learn_temperature=False, temperature=0.5)
    assert model[0].router.weight is weight
    assert [layer.router.normalize_top_k for layer in model] == [True, False]
    logits = model[0].router(tokens())[0]
    torch.testing.assert_close(logits, torch.tanh(tokens() @ weight.T) / 0.5)


def test_what_cannot_be_converted_is_left_as_it_was():
    model = to_activation_gate(host("mixtral"))
    with pytest.raises(ValueError, match="has an ActivationRouter already"):
        to_activation_gate(model)
    untouched = host("mixtral")
    for arguments, message in (
        ({"activation": "cosine"}, "activation must be None"),
        ({"temperature": -1.0}, "temperature must be"),
    ):
        with pytest.raises(ValueError, match=message):
            to_activation_gate(untouched, **arguments)
        assert all(type(gate) is MixtralTopKRouter for gate in routers(untouched))
    with pytest.raises(ValueError, match="needs a router with a weight"):
        to_activation_gate(MoE(6, 8, 5, 2, router=torch.nn.Identity()))
    with pytest.raises(ValueError, match="no sparse block"):
        to_activation_gate(torch.nn.Linear(2, 2))
