import math

import jaxtyping
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import Categorical

from firsthand.vision.aem import AEM, AttentionEntropy, aem_loss, aem_weight, attention_entropy
from firsthand.vision.mil import AttentionMIL

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture
def scores():
    return 3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def heads():
    return 3 * torch.randn(4, 2, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def mask():
    return torch.arange(9) < torch.tensor([9, 5, 2, 1])[:, None]


# --- oracles ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("instances", [1, 2, 1000])
def test_uniform_attention_is_the_minimum(instances):
    scores = torch.full((2, instances), 5.0, dtype=torch.float64, requires_grad=True)
    loss = aem_loss(scores)
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(instances))
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), atol=1e-12, rtol=0)


@pytest.mark.parametrize("gap", [50.0, 1e4, 1e30])
def test_attention_on_one_instance_costs_nothing_and_has_a_finite_gradient(gap):
    scores = torch.zeros(1, 6)
    scores[0, 2] = gap
    scores.requires_grad_()
    loss = aem_loss(scores)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(scores.grad, torch.zeros(1, 6), atol=1e-6, rtol=0)


def test_agrees_with_torch_and_scipy(scores):
    loss = aem_loss(scores, reduction="none")
    torch.testing.assert_close(loss, -Categorical(logits=scores).entropy())
    np.testing.assert_allclose(loss, -scipy.stats.entropy(scipy.special.softmax(scores.numpy(), axis=1), axis=1))


def test_heads_are_averaged(heads):
    expected = -Categorical(logits=heads).entropy().mean(1)
    torch.testing.assert_close(aem_loss(heads, reduction="none"), expected)
    torch.testing.assert_close(aem_loss(heads[:, :1]), aem_loss(heads[:, 0]))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduction(scores, reduction):
    torch.testing.assert_close(aem_loss(scores, reduction=reduction), getattr(aem_loss(scores, reduction="none"), reduction)())


def test_gradient_is_the_closed_form(scores):
    scores.requires_grad_()
    loss = aem_loss(scores, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    attention = scores.softmax(1)
    torch.testing.assert_close(gradient, attention * (attention.log() - loss[:, None]))
    torch.testing.assert_close(gradient.sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("top_k", [None, 3])
def test_gradient_by_finite_differences(heads, mask, top_k):
    assert torch.autograd.gradcheck(lambda f: aem_loss(f, mask, top_k=top_k), heads.requires_grad_())


def test_a_shift_of_the_scores_changes_nothing(scores):
    torch.testing.assert_close(aem_loss(scores + 1e3), aem_loss(scores))


def test_a_step_down_the_gradient_spreads_attention(scores):
    scores.requires_grad_()
    aem_loss(scores, reduction="sum").backward()
    assert (attention_entropy(scores - 0.01 * scores.grad) > attention_entropy(scores)).all()


def test_top_k_of_everything_is_the_plain_loss(heads, mask):
    for k in (9, 1000):
        torch.testing.assert_close(aem_loss(heads, mask, top_k=k), aem_loss(heads, mask))


def test_top_k_is_the_entropy_of_the_largest_weights_rescaled(scores):
    largest = np.sort(scipy.special.softmax(scores.numpy(), axis=1))[:, -4:]
    expected = -scipy.stats.entropy(largest, axis=1)  # scipy rescales to sum 1
    np.testing.assert_allclose(aem_loss(scores, top_k=4, reduction="none"), expected)
    assert aem_loss(scores, top_k=1).item() == pytest.approx(0, abs=1e-12)


def test_top_k_leaves_the_others_alone(scores):
    scores.requires_grad_()
    aem_loss(scores, top_k=3).backward()
    assert ((scores.grad != 0).sum(1) == 3).all()


@pytest.mark.parametrize("top_k", [None, 3])
def test_padding_changes_nothing(scores, mask, top_k):
    scores.requires_grad_()
    losses = aem_loss(scores, mask, top_k=top_k, reduction="none")
    losses.sum().backward()
    for bag, size in enumerate(mask.sum(1)):
        alone = scores.detach()[bag : bag + 1, :size].clone().requires_grad_()
        loss = aem_loss(alone, top_k=top_k)
        loss.backward()
        torch.testing.assert_close(losses[bag], loss)
        torch.testing.assert_close(scores.grad[bag, :size], alone.grad[0])
    assert not scores.grad[~mask].any()


@pytest.mark.parametrize("values", [0.0, 1e4, 1e30, math.nan])
def test_what_stands_at_padding_does_not_matter(scores, mask, values):
    padded = scores.float().masked_fill(~mask, values).requires_grad_()
    loss = 1e4 * aem_loss(padded, mask)
    loss.backward()
    torch.testing.assert_close(loss, 1e4 * aem_loss(scores.float(), mask))
    assert padded.grad.isfinite().all()


def test_entropy_is_the_loss_turned_round(heads, mask):
    torch.testing.assert_close(attention_entropy(heads, mask), -aem_loss(heads, mask, reduction="none"))


def test_normalised_entropy_of_uniform_attention_is_one_whatever_the_size(mask):
    torch.testing.assert_close(attention_entropy(torch.zeros(4, 9), mask, normalized=True), torch.ones(4))
    torch.testing.assert_close(attention_entropy(torch.zeros(4, 2, 9), normalized=True), torch.ones(4))


def test_normalised_entropy_by_hand():
    half_each = torch.tensor([[0.0, 0.0, -100.0, -100.0]])
    torch.testing.assert_close(attention_entropy(half_each, normalized=True), torch.tensor([0.5]))  # log 2 / log 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(scores, mask, dtype, device):
    low = scores.to(device, dtype).requires_grad_()
    loss = aem_loss(low, mask.to(device))
    loss.backward()
    assert loss.dtype == torch.float32
    assert low.grad.dtype == dtype
    torch.testing.assert_close(loss.cpu().double(), aem_loss(low.detach().cpu().double(), mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("top_k", [None, 3])
def test_compiles_in_one_graph(heads, mask, top_k, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks of the tests cannot be traced
    compiled = torch.compile(aem_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(heads, mask, top_k=top_k), aem_loss(heads, mask, top_k=top_k))


# --- metric -------------------------------------------------------------------------------------------------------------------


def test_metric_is_the_mean_over_bags_however_they_are_batched(scores, mask):
    metric = AttentionEntropy()
    metric.update(scores[:1], mask[:1])
    metric.update(scores[1:], mask[1:])
    torch.testing.assert_close(metric.compute(), attention_entropy(scores, mask, normalized=True).mean().float())
    metric.reset()
    metric.update(torch.zeros(2, 5))
    assert metric.compute().item() == pytest.approx(1)


def test_metric_resumes_from_its_state(scores):
    half, whole = AttentionEntropy(), AttentionEntropy()
    half.persistent(True)
    half.update(scores[:2])
    resumed = AttentionEntropy()
    resumed.persistent(True)
    resumed.load_state_dict(half.state_dict())
    resumed.update(scores[2:])
    for part in (scores[:2], scores[2:]):
        whole.update(part)
    assert torch.equal(resumed.compute(), whole.compute())


# --- weight -------------------------------------------------------------------------------------------------------------------


def test_weight_schedules():
    assert [aem_weight(step, 10, 0.3) for step in (0, 5, 10)] == [0.3] * 3
    cosine = [aem_weight(step, 10, 0.3, "cosine") for step in range(11)]
    assert cosine[0] == pytest.approx(0.3)
    assert cosine[5] == pytest.approx(0.15)
    assert cosine[10] == pytest.approx(0, abs=1e-12)
    assert cosine == sorted(cosine, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10), "step must be in"),
        ((11, 10), "step must be in"),
        ((0, 0), "total at least 1"),
        ((0, 10, -0.1), "weight must be finite and at least 0"),
        ((0, 10, math.inf), "weight must be finite and at least 0"),
        ((0, 10, 0.1, "linear"), "schedule must be 'constant' or 'cosine', got 'linear'"),
    ],
)
def test_weight_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        aem_weight(*arguments)


# --- wrapper ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world():
    torch.manual_seed(0)
    X = torch.randn(4, 9, 6)
    return AttentionMIL(6, hidden=8, att_dim=5, dropout=0.0), X, torch.tensor([0.0, 1.0, 1.0, 0.0])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_weight_zero_is_the_model_itself(world, mask):
    model, X, Y = world
    logits, terms = AEM(model, weight=0.0).compute_loss(Y, X, mask)
    base_logits, base_terms = model.compute_loss(Y, X, mask)
    torch.testing.assert_close(logits, base_logits)
    for ours, base in zip(gradients(model, sum(terms.values())), gradients(model, sum(base_terms.values())), strict=True):
        torch.testing.assert_close(ours, base)


def test_wrapper_adds_the_weighted_loss_of_the_scores(world, mask):
    model, X, Y = world
    expected = aem_loss(model(X, mask, return_att=True)[1], mask, top_k=3)
    for weight, factor in ((0.5, 0.5), (None, 1.0)):
        _, terms = AEM(model, weight=weight, top_k=3).compute_loss(Y, X, mask)
        assert list(terms) == ["BCEWithLogitsLoss", "AEM"]
        torch.testing.assert_close(terms["AEM"], factor * expected)


def test_wrapper_trains_attention_and_features_but_not_the_classifier(world):
    model, X, Y = world
    AEM(model).compute_loss(Y, X)[1]["AEM"].backward()
    assert model.feat_ext[0].weight.grad.any()
    assert model.pool.score.weight.grad.any()
    assert model.classifier.weight.grad is None


def test_wrapper_predicts_as_the_model_does(world, mask):
    model, X, _ = world
    wrapped = AEM(model)
    torch.testing.assert_close(wrapped(X, mask), model(X, mask))
    torch.testing.assert_close(wrapped.predict(X, mask)[1], model.predict(X, mask)[1])
    assert [name for name, _ in wrapped.named_parameters()] == [f"mil_model.{name}" for name, _ in model.named_parameters()]


def test_a_large_weight_ends_in_uniform_attention(world):
    model, X, Y = world
    wrapped = AEM(model, weight=10.0)
    model.pool.score.weight.data *= 10
    before = attention_entropy(model(X, return_att=True)[1], normalized=True).mean()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        sum(wrapped.compute_loss(Y, X)[1].values()).backward()
        optimizer.step()
    after = attention_entropy(model(X, return_att=True)[1], normalized=True).mean()
    assert before < 0.9
    assert after > 0.999


def test_wraps_torchmil(world):
    models = pytest.importorskip("torchmil.models")
    _, X, Y = world
    wrapped = AEM(models.ABMIL(in_shape=(6,)), weight=0.1)
    mask = torch.ones(4, 9)
    logits, terms = wrapped.compute_loss(Y, X, mask)
    base_logits, base_terms = wrapped.mil_model.compute_loss(Y, X, mask)
    torch.testing.assert_close(logits, base_logits)
    torch.testing.assert_close(terms["BCEWithLogitsLoss"], base_terms["BCEWithLogitsLoss"])
    assert -0.1 * math.log(9) <= terms["AEM"].item() <= 0


# --- bad input ----------------------------------------------------------------------------------------------------------------


def test_bad_input(scores):
    with pytest.raises(ValueError, match="at least one instance of each bag, got none in bag 0"):
        aem_loss(scores, torch.zeros(4, 9))
    with pytest.raises(ValueError, match=r"mask must have shape"):
        aem_loss(scores, torch.ones(4, 8))
    with pytest.raises(ValueError, match="at least one instance a bag"):
        aem_loss(scores[:, :0])
    with pytest.raises(ValueError, match=r"scores must be \(bags, instances\) or \(bags, heads, instances\)"):
        aem_loss(scores.reshape(2, 2, 3, 3))
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        aem_loss(scores, top_k=0)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none', got 'max'"):
        aem_loss(scores, reduction="max")


def test_bad_wrapper(world):
    with pytest.raises(ValueError, match="weight must be finite and at least 0, got -1"):
        AEM(world[0], weight=-1.0)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        AEM(world[0], top_k=0)
    with pytest.raises(ValueError, match="got a Linear without one"):
        AEM(torch.nn.Linear(2, 2))
