import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTForImageClassification

from firsthand import Trial
from firsthand.testbeds import digits, vit


@pytest.fixture
def trial():
    return Trial(seed=3)


@pytest.fixture
def world(trial):
    return digits.split(trial.rng)


def test_the_model_is_a_vit_that_pools_its_patches(trial, world):
    model = vit.vit(trial.generator, 2).eval()
    images = world.train.images[:5, None]
    output = model(images)
    assert output.logits.shape == (5, 10)
    patches = model.vit(images).last_hidden_state
    assert patches.shape == (5, 17, 48)
    torch.testing.assert_close(output.logits, model.classifier(patches[:, 1:].mean(dim=1)))


def test_saved_and_loaded(trial, world, tmp_path):
    model = vit.vit(trial.generator, 2).eval()
    model.save_pretrained(tmp_path)
    again = vit.MeanPooledViT.from_pretrained(tmp_path)
    torch.testing.assert_close(again(world.test.images[:3, None]).logits, model(world.test.images[:3, None]).logits)
    plain = ViTForImageClassification.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("make", [lambda generator: vit.vit(generator, 2), vit.cnn])
def test_weights_come_from_the_generator(make):
    torch.manual_seed(0)
    first = make(torch.Generator().manual_seed(1)).state_dict()
    state = torch.get_rng_state()
    again, other = (make(torch.Generator().manual_seed(seed)).state_dict() for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_it_learns_and_the_seed_decides_how(world):
    images, labels = world.train.images[:320], world.train.labels[:320]
    start = vit.vit(torch.Generator().manual_seed(0), 1)
    models, seen = [], []
    for _ in range(2):
        model = copy.deepcopy(start)
        vit.fit(model, images, labels, epochs=12, lr=3e-3, trial=Trial(seed=1), after_epoch=seen.append)
        models.append(model)
    assert seen == list(range(1, 13)) * 2
    assert torch.equal(vit.predict(models[0], images), vit.predict(models[1], images))
    assert vit.accuracy(models[0], *world.test) > 0.6 > 0.3 > vit.accuracy(start, *world.test)


def test_any_target_and_any_loss(trial, world):
    images = world.train.images[:64]
    teacher = vit.predict(vit.cnn(trial.generator), images)
    model = vit.vit(trial.generator, 1)
    before = F.mse_loss(vit.predict(model, images), teacher)
    vit.fit(model, images, teacher, loss=F.mse_loss, epochs=5, lr=1e-3, trial=trial)
    assert F.mse_loss(vit.predict(model, images), teacher) < before


def test_what_needs_no_gradient_stays(trial, world):
    model = vit.vit(trial.generator, 2)
    model.vit.layers[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    vit.fit(model, world.train.images[:64], world.train.labels[:64], epochs=1, lr=1e-2, trial=trial)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, _ in model.named_parameters() if not name.startswith("vit.layers.0.")}


def test_accuracy_is_a_share(world):
    class Always(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(F.one_hot(torch.tensor(4), 10).float())

        def forward(self, images):
            return self.logits.expand(len(images), -1)

    assert vit.accuracy(Always(), *world.test) == pytest.approx((world.test.labels == 4).double().mean().item())


def test_sizes_that_do_not_fit(trial):
    with pytest.raises(ValueError, match="heads must divide hidden 48, got 5"):
        vit.vit(trial.generator, 1, heads=5)
    with pytest.raises(ValueError, match="patch must divide 8, got 3"):
        vit.vit(trial.generator, 1, patch=3)
