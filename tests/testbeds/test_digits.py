import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firsthand import Trial
from firsthand.data import load
from firsthand.testbeds import digits


@pytest.fixture
def trial():
    return Trial(seed=3)


@pytest.fixture
def world(trial):
    return digits.split(trial.rng)


def as_rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# --- data


def test_split_uses_every_image_once(world):
    assert world.train.images.shape == (1198, 8, 8)
    assert world.test.images.shape == (599, 8, 8)
    together = as_rows(world.train.images) | as_rows(world.test.images)
    assert together == as_rows(torch.from_numpy(load("digits")["images"]))


def test_split_depends_on_the_seed_alone(world):
    again, other = digits.split(Trial(seed=3).rng), digits.split(Trial(seed=4).rng)
    assert torch.equal(world.train.images, again.train.images)
    assert torch.equal(world.test.labels, again.test.labels)
    assert not torch.equal(world.train.images, other.train.images)


@pytest.mark.parametrize("label_noise", [0.0, 0.1, 1.0])
def test_label_noise_changes_that_part_and_nothing_else(world, label_noise):
    noisy = digits.split(Trial(seed=3).rng, label_noise=label_noise)
    assert torch.equal(noisy.train.images, world.train.images)
    assert (noisy.train.labels != world.train.labels).sum().item() == round(label_noise * 1198)
    assert torch.equal(noisy.test.labels, world.test.labels)
    assert set(noisy.train.labels.tolist()) == set(range(10))


def test_label_noise_out_of_range(trial):
    with pytest.raises(ValueError, match=r"label_noise must be in \[0, 1\], got 1.5"):
        digits.split(trial.rng, label_noise=1.5)


# --- the classifier


def test_weights_come_from_the_generator_and_the_global_one_is_left_alone(trial):
    before = torch.random.get_rng_state()
    one, two = digits.mlp(trial.generator), digits.mlp(Trial(seed=3).generator)
    assert torch.equal(torch.random.get_rng_state(), before)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_fit_learns_and_is_the_same_twice(world):
    scores = []
    for _ in range(2):
        trial = Trial(seed=3)
        model = digits.mlp(trial.generator)
        digits.fit(model, world.train, F.cross_entropy, epochs=8, trial=trial)
        scores.append(digits.score(model, world.test))
    assert scores[0] == scores[1]
    assert scores[0]["accuracy"] > 0.9
    losses = [value for _, value in trial.curves["loss"]]
    assert losses == sorted(losses, reverse=True)


class Logits(torch.nn.Module):
    """Says class 0 with a given probability, the others alike."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        rest = (1 - probability) / 9
        self.logits = torch.nn.Parameter(torch.tensor([probability] + [rest] * 9).log())

    def forward(self, images):
        return self.logits.expand(len(images), -1)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_score_closed_forms(world, probability):
    zeros = (world.test.labels == 0).double().mean().item()
    scores = digits.score(Logits(probability), world.test)
    assert scores["accuracy"] == pytest.approx(zeros)
    assert scores["calibration_error"] == pytest.approx(abs(probability - zeros), abs=1e-5)
    expected = -zeros * math.log(probability) - (1 - zeros) * math.log((1 - probability) / 9)
    assert scores["nll"] == pytest.approx(expected, rel=1e-5)


# --- views


def test_a_view_without_change_is_the_image(world, trial):
    images = world.test.images
    assert torch.equal(digits.augment(images, trial.generator, shift=0, noise=0, cutout=0), images)


def test_shifts_move_each_image_by_itself(trial):
    images = torch.zeros(500, 8, 8)
    images[:, 4, 4] = 1
    views = digits.augment(images, trial.generator, shift=1, noise=0, cutout=0)
    places = {tuple(place) for place in views.nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}
    assert views.sum() == 500


def test_what_moves_out_is_gone_and_black_comes_in(trial):
    images = torch.ones(200, 8, 8)
    views = digits.augment(images, trial.generator, shift=2, noise=0, cutout=0)
    lost = {round(64 - total) for total in views.sum(dim=(1, 2)).tolist()}
    assert lost == {64 - (8 - a) * (8 - b) for a in (0, 1, 2) for b in (0, 1, 2)}


@pytest.mark.parametrize("cutout", [1, 3, 8])
def test_cutout_blacks_out_a_whole_square(trial, cutout):
    views = digits.augment(torch.ones(1000, 8, 8), trial.generator, shift=0, noise=0, cutout=cutout)
    hidden = views == 0
    assert (hidden.sum(dim=(1, 2)) == cutout**2).all()
    assert (hidden.any(dim=2).sum(dim=1) == cutout).all()
    assert (hidden.any(dim=1).sum(dim=1) == cutout).all()
    assert hidden.any(dim=0).all()  # anywhere in the image


def test_noise_has_the_size_asked_for(trial):
    views = digits.augment(torch.zeros(2000, 8, 8), trial.generator, shift=0, noise=0.3, cutout=0)
    assert views.std().item() == pytest.approx(0.3, rel=0.02)
    assert views.mean().item() == pytest.approx(0, abs=0.005)


# --- pre-training and probing


def agreement(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(a, b)


def test_pretraining_lowers_the_objective_and_is_the_same_twice(world):
    def run(epochs):
        trial = Trial(seed=3)
        network = digits.JointEmbedding(trial.generator)
        loss = digits.pretrain(network, world.train.images, agreement, lr=0.01, epochs=epochs, trial=trial)
        return loss, digits.embed(network, world.test.images)

    first, _ = run(1)
    last, (representations, embeddings) = run(5)
    again, (same, _) = run(5)
    assert last < first
    assert last == again
    assert torch.equal(representations, same)
    assert representations.shape == embeddings.shape == (599, 20)
    assert not representations.requires_grad


def test_pretraining_needs_a_batch(world, trial):
    network = digits.JointEmbedding(trial.generator)
    with pytest.raises(ValueError, match="images must fill a batch of 128, got 100"):
        digits.pretrain(network, world.train.images[:100], agreement, lr=0.01, epochs=1, trial=trial)


def test_probe_reads_what_is_there_and_nothing_else(world):
    def one_hot(labels):
        return F.one_hot(labels, 10).float()

    assert (
        digits.linear_probe(one_hot(world.train.labels), world.train.labels, one_hot(world.test.labels), world.test.labels) == 1
    )
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1797, 20), dtype=np.float32))
    train, test = noise[:1198], noise[1198:]
    assert digits.linear_probe(train, world.train.labels, test, world.test.labels) < 0.2
    assert digits.cross_validated_probe(one_hot(world.train.labels), world.train.labels) == 1
    assert digits.cross_validated_probe(train, world.train.labels) < 0.2
