import math

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from firsthand.distill.item_response import fit_2pl, select_discriminative


def simulate(takers=200, questions=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ability = torch.randn(takers, generator=generator)
    slope = (0.5 * torch.randn(questions, generator=generator)).exp()
    difficulty = torch.randn(questions, generator=generator)
    chance = torch.sigmoid(slope * (ability[:, None] - difficulty))
    return (torch.rand(takers, questions, generator=generator) < chance).double(), ability, slope, difficulty


def test_simulated_parameters_are_found():
    scores, ability, slope, difficulty = simulate()
    fit = fit_2pl(scores)
    assert spearmanr(fit.discrimination, slope).statistic > 0.8
    assert spearmanr(fit.ability, ability).statistic > 0.9
    assert spearmanr(fit.difficulty, difficulty).statistic > 0.9


def test_the_fit_is_the_mode_of_the_posterior():
    """The gradient of the log posterior, written with torch's distributions, vanishes there."""
    scores, *_ = simulate(40, 12)
    scores[3, 5] = scores[7, 2] = math.nan
    fit = fit_2pl(scores, max_iter=2000)
    parameters = (fit.ability, fit.discrimination.log(), fit.discrimination * fit.difficulty)
    ability, log_slope, intercept = (each.clone().requires_grad_() for each in parameters)
    known = ~scores.isnan()
    logits = log_slope.exp() * ability[:, None] - intercept
    normal = torch.distributions.Normal
    posterior = (
        torch.distributions.Bernoulli(logits=logits[known]).log_prob(scores[known]).sum()
        + normal(0.0, 1.0).log_prob(ability).sum()
        + normal(0.0, 3.0).log_prob(intercept).sum()
        + normal(0.0, 0.5).log_prob(log_slope).sum()
    )
    for gradient in torch.autograd.grad(posterior, (ability, log_slope, intercept)):
        assert gradient.abs().max() < 2e-2


def test_questions_are_logistic_regressions_on_ability():
    """With very many questions the abilities are pinned down, and a question's curve is what scikit-learn fits to them."""
    scores, *_ = simulate(400, 40)
    fit = fit_2pl(scores, max_iter=1000)
    for question in (0, 7):
        plain = LogisticRegression(C=1e6).fit(fit.ability[:, None].numpy(), scores[:, question].numpy())
        assert fit.discrimination[question].item() == pytest.approx(plain.coef_[0, 0], rel=0.2)


def test_a_question_that_all_answer_alike_is_no_discriminator():
    scores, *_ = simulate(60, 20)
    scores[:, 3], scores[:, 4] = 1, 0
    fit = fit_2pl(scores)
    assert all(part.isfinite().all() for part in fit)
    assert fit.difficulty[3] == fit.difficulty.min()
    assert fit.difficulty[4] == fit.difficulty.max()
    assert fit.discrimination[3:5].max() < fit.discrimination.quantile(0.25)
    assert not set(select_discriminative(fit.discrimination, 15).tolist()) & {3, 4}


def test_what_was_not_asked_says_nothing():
    scores, *_ = simulate(30, 10)
    widened = torch.cat([scores, torch.full((5, 10), math.nan)])
    alone, beside = fit_2pl(scores, max_iter=1000), fit_2pl(widened, max_iter=1000)
    torch.testing.assert_close(beside.discrimination, alone.discrimination, atol=1e-2, rtol=0)
    torch.testing.assert_close(beside.ability[30:], torch.zeros(5).double(), atol=1e-3, rtol=0)


def test_turning_right_and_wrong_around_turns_ability_and_difficulty_around():
    scores, *_ = simulate(30, 10)
    fit, turned = fit_2pl(scores, max_iter=2000), fit_2pl(1 - scores, max_iter=2000)
    torch.testing.assert_close(turned.ability, -fit.ability, atol=1e-2, rtol=0)
    torch.testing.assert_close(turned.discrimination, fit.discrimination, atol=1e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    scores, *_ = simulate(30, 10)
    torch.testing.assert_close(fit_2pl(scores.to(dtype)).ability, fit_2pl(scores).ability)


@pytest.mark.parametrize(
    ("scores", "max_iter", "message"),
    [
        (torch.tensor([[0.0, 1.5]]), 10, r"scores must be in \[0, 1\] or NaN, got 0 to 1.5"),
        (torch.tensor([[-1.0, 1.0]]), 10, r"scores must be in \[0, 1\]"),
        (torch.full((2, 2), math.nan), 10, "not NaN, got none"),
        (torch.zeros(0, 3), 10, r"got \(0, 3\)"),
        (torch.zeros(2, 2), 0, "max_iter must be at least 1"),
    ],
)
def test_bad_scores(scores, max_iter, message):
    with pytest.raises(ValueError, match=message):
        fit_2pl(scores, max_iter)


def test_selection_is_descending_and_stable():
    assert select_discriminative(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [1, 3, 2]


@pytest.mark.parametrize("k", [0, 5])
def test_too_many_or_none(k):
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\]"):
        select_discriminative(torch.ones(4), k)


def test_selection_of_what_is_not_finite():
    with pytest.raises(ValueError, match="finite"):
        select_discriminative(torch.tensor([1.0, math.nan]), 1)
