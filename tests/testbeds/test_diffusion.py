import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from firsthand import Trial
from firsthand.testbeds import diffusion, digits


@pytest.fixture
def trial():
    return Trial(seed=3)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_digits(trial):
    images, labels = diffusion.pictures("digits", trial.rng)
    assert images.shape == (1797, 8, 8)
    assert labels.unique().tolist() == list(range(10))
    again = diffusion.pictures("digits", np.random.default_rng([3, 0]))
    assert torch.equal(again.images, images)


def test_clothes_are_made_small(trial, monkeypatch):
    found = {"train_images": np.zeros((3, 28, 28), np.uint8), "train_labels": np.arange(3)}
    found["train_images"][:, 10:14, 2:6] = 255
    monkeypatch.setattr(diffusion, "load", lambda name: found)
    images, labels = diffusion.pictures("fashion-mnist", trial.rng, most=2)
    assert images.shape == (2, 8, 8)
    expected = torch.zeros(8, 8)
    expected[3, 1] = 1.0  # rows 12 to 15 with the border, columns 4 to 7
    torch.testing.assert_close(images[0], expected)
    assert images.dtype == torch.float32
    assert len(labels) == 2


def test_other_names(trial):
    with pytest.raises(ValueError, match="name must be 'digits' or 'fashion-mnist', got 'minilm'"):
        diffusion.pictures("minilm", trial.rng)


def test_the_denoiser_begins_silent_and_reads_all_it_is_given(generator):
    model = diffusion.Denoiser(generator, 3, width=24, layers=1)
    noisy, times, labels = torch.randn(2, 8, 8, generator=generator), torch.tensor([0.1, 0.9]), torch.tensor([0, 2])
    assert (model(noisy, times, labels) == 0).all()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    before = model(noisy, times, labels)
    for other in ((noisy.roll(1, 2), times, labels), (noisy, times.flip(0), labels), (noisy, times, labels.flip(0))):
        assert not torch.allclose(model(*other), before)
    torch.testing.assert_close(model(noisy[:1], times[:1], labels[:1]), before[:1])


def test_pictures_turn_to_noise():
    left = diffusion.signal(torch.linspace(0, 1, 101))
    assert (left.diff() <= 0).all()
    assert left[0] > 0.999
    assert left[-1] < 1e-3


def test_it_learns_to_draw_and_a_seed_draws_the_same_again(trial, generator):
    black = digits.Labelled(torch.zeros(8, 8, 8), torch.zeros(8, dtype=torch.long))
    model = diffusion.Denoiser(generator, 1, width=12, layers=1)
    labels = torch.zeros(4, dtype=torch.long)
    before = diffusion.sample(model, labels, seed=1, trial=trial)
    torch.testing.assert_close(before, diffusion.sample(model, labels, seed=1, trial=trial), rtol=0, atol=0)
    diffusion.fit(model, black, steps=60, lr=3e-2, seed=1, trial=trial, batch=16)
    after = diffusion.sample(model, labels, seed=1, trial=trial)
    assert after.min() >= 0
    assert after.mean() < 0.5 * before.mean()


def test_what_is_frozen_is_not_trained(trial, generator):
    model = diffusion.Denoiser(generator, 10, width=12, layers=1)
    model.embed.requires_grad_(False)
    kept, other = model.embed.weight.clone(), model.out.weight.clone()
    diffusion.fit(model, diffusion.pictures("digits", trial.rng), steps=2, lr=1e-2, seed=1, trial=trial, batch=4)
    assert torch.equal(model.embed.weight, kept)
    assert not torch.equal(model.out.weight, other)


def test_frechet_distance_is_that_of_scipy(generator):
    a, b = torch.randn(200, 5, generator=generator), 2 * torch.randn(150, 5, generator=generator) + 1
    b[:, 0] += b[:, 1]
    means = a.mean(dim=0) - b.mean(dim=0)
    one, two = np.cov(a.numpy().T), np.cov(b.numpy().T)
    expected = means.square().sum().item() + np.trace(one + two - 2 * scipy.linalg.sqrtm(one @ two).real)
    assert diffusion.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert diffusion.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    narrow = torch.cat([a, torch.zeros(200, 2)], dim=1)  # features that are always off
    assert diffusion.frechet_distance(narrow, narrow + 1) == pytest.approx(7, rel=1e-4)


def test_quality_tells_real_pictures_from_noise(trial, generator):
    images, labels = diffusion.pictures("digits", trial.rng)
    judge = diffusion.Classifier(generator)
    digits.fit(judge, digits.Labelled(images, labels), F.cross_entropy, epochs=3, trial=trial)
    real = diffusion.quality(judge, images[:600], labels[:600], images[600:])
    noise = diffusion.quality(judge, torch.rand(600, 8, 8, generator=generator), labels[:600], images[600:])
    assert real.accuracy > 0.9 > noise.accuracy
    assert real.distance < 0.1 * noise.distance
