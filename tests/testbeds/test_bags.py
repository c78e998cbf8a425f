import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from firsthand.harness.trial import Trial
from firsthand.testbeds import bags


def small(seed=0, **options):
    return bags.digit_bags(np.random.default_rng(seed), **{"train": 12, "val": 10, "test": 20, "size": 30, **options})


class Oracle(torch.nn.Module):
    """Scores an instance by a linear probe handed to it; a bag by the best of its instances."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, features, return_att=False):
        scores = features @ self.weight
        logits = scores.amax(1)
        return (logits, scores) if return_att else logits


def test_a_bag_is_positive_exactly_when_it_holds_the_digit():
    for part in vars(small(most=5)).values():
        found = part.instances.sum(1)
        assert torch.equal(part.labels.bool(), found > 0)
        assert found.max() <= 5
        assert part.labels.sum() == len(part) // 2


def test_no_image_is_in_two_splits_nor_twice_in_a_bag():
    world = small(train=40, val=40, test=40, noise=0.0)
    images = {name: {row.tobytes() for row in part.features.flatten(0, 1).numpy()} for name, part in vars(world).items()}
    assert not images["train"] & images["val"]
    assert not images["train"] & images["test"]
    assert not images["val"] & images["test"]
    assert all(len({row.tobytes() for row in bag.numpy()}) == 30 for bag in world.train.features)


def test_noise_has_the_size_asked_for():
    clean, noisy = small(noise=0.0), small(noise=0.3)
    assert clean.train.features.min() >= 0
    assert clean.train.features.max() <= 1
    assert noisy.train.features.std() ** 2 - clean.train.features.std() ** 2 == pytest.approx(0.09, rel=0.1)


def test_the_same_seed_gives_the_same_bags():
    for one, other in zip(vars(small(3)).values(), vars(small(3)).values(), strict=True):
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.labels, other.labels)
    assert not torch.equal(small(3).train.features, small(4).train.features)


def test_metrics_of_known_predictions():
    test = small().test
    logits = test.labels * 2 - 1
    assert bags.score_logits(logits, test) == {"auroc": 1.0, "f1": 1.0}
    assert bags.score_logits(-logits, test) == {"auroc": 0.0, "f1": 0.0}
    assert bags.score_logits(torch.ones(20), test) == {"auroc": 0.5, "f1": pytest.approx(2 / 3)}
    assert bags.instance_auroc(test.instances.float(), test) == 1.0
    assert bags.instance_auroc(torch.zeros(20, 30), test) == 0.5


def test_auroc_is_the_share_of_pairs_in_order():
    test = small().test
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0))
    won = mannwhitneyu(logits[test.labels == 1], logits[test.labels == 0]).statistic
    assert bags.score_logits(logits, test)["auroc"] == pytest.approx(won / 100)


def test_predict_is_in_eval_mode_and_whole_whatever_the_batch():
    world = small()
    model = Oracle(torch.randn(64, generator=torch.Generator().manual_seed(0))).train()
    for batch in (1, 7, 100):
        logits, scores = bags.predict(model, world.test, batch=batch)
        torch.testing.assert_close(scores, world.test.features @ model.weight)
        torch.testing.assert_close(logits, scores.amax(1))
        assert not model.training
        assert not logits.requires_grad


def fit(world, loss=bags.cross_entropy, seed=0, **options):
    torch.manual_seed(seed)
    model = Oracle(0.1 * torch.randn(64))
    generator = torch.Generator().manual_seed(seed)
    return bags.fit(model, world, loss, **{"epochs": 8, "lr": 0.05, **options}, generator=generator), model


def test_fit_learns_and_leaves_the_best_epoch():
    world = small(train=60, val=60, size=8, most=4, noise=0.0)
    auroc, model = fit(world, epochs=20)
    assert auroc > 0.9
    assert bags.score(model, world.val)["auroc"] == auroc
    assert bags.score(model, world.test)["auroc"] > 0.8


def test_fit_is_the_same_for_the_same_seed_and_needs_no_trial():
    world = small()
    auroc, model = fit(world)
    again, same = fit(world, trial=Trial(seed=1))
    assert auroc == again
    assert torch.equal(model.weight, same.weight)


def test_fit_minimises_the_loss_it_is_given():
    world = small()
    seen = []

    def pull_to_zero(model, features, labels):
        seen.append(len(labels))
        return model.weight.square().sum()

    _, model = fit(world, pull_to_zero, epochs=3, batch=5)
    assert seen == [5, 5, 2] * 3
    start = torch.manual_seed(0) and 0.1 * torch.randn(64)
    assert model.weight.norm() < start.norm()
