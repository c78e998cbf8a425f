import copy

import pytest
import torch
import torch.nn.functional as F

from firsthand import Trial
from firsthand.testbeds import learngene, vit


@pytest.fixture(scope="module")
def world():
    return learngene.world(Trial(seed=3, smoke=True))


def small(seed=0, layers=1):
    return vit.vit(torch.Generator().manual_seed(seed), layers)


def as_rows(images):
    return {image.numpy().tobytes() for image in images}


def test_parts_do_not_overlap_and_the_teacher_has_seen_one():
    world = learngene.world(Trial(seed=3))
    parts = [as_rows(part.images) for part in (world.ancestry, world.task, world.test)]
    assert [len(part) for part in parts] == [599, 599, 599]
    assert len(parts[0] | parts[1] | parts[2]) == 1797
    assert as_rows(world.labelled.images) == parts[0] | parts[1]
    right = (world.teacher_logits.argmax(1) == world.ancestry.labels).double().mean()
    assert right > 0.95
    again = learngene.world(Trial(seed=3))
    assert torch.equal(world.teacher_logits, again.teacher_logits)
    assert world.order == again.order


def test_distilling_brings_a_model_to_its_teacher_and_is_counted(world):
    def loss(logits, teacher):
        return F.kl_div(logits.log_softmax(1), teacher.softmax(1), reduction="batchmean")

    model = small(layers=2)
    before = loss(vit.predict(model, world.ancestry.images), world.teacher_logits)
    cost = learngene.distil(model, 2, world, loss, epochs=8, lr=2e-3, trial=Trial(seed=1))
    assert loss(vit.predict(model, world.ancestry.images), world.teacher_logits) < before
    assert cost == 8 * 3 * 2  # 96 images are three batches
    assert learngene.steps(world.ancestry, 2) == 6


def test_tuning_a_family(world):
    trial = Trial(seed=1)
    models = {1: small(), 3: small(layers=3)}
    metrics = learngene.fine_tune(models, world.task, world, epochs=2, lr=1e-3, trial=trial, spent=100, kept=7)
    each = [vit.accuracy(model, *world.test) for model in models.values()]
    assert [metrics["accuracy at depth 1"], metrics["accuracy at depth 3"]] == each
    assert metrics["accuracy"] == pytest.approx(sum(each) / 2)
    assert metrics["training cost"] == 100 + 2 * 3 * (1 + 3)
    assert metrics["stored parameters"] == 7
    assert trial.curves["accuracy_by_depth"] == [(1.0, each[0]), (3.0, each[1])]
    cost, quality = zip(*trial.curves["accuracy_by_training_cost"], strict=True)
    assert cost == (100, 112, 124)
    assert quality == pytest.approx([metrics[name] for name in ("accuracy before", "accuracy after 1 epoch", "accuracy")])


def test_batches_do_not_depend_on_what_was_drawn_before(world):
    start, results = small(), []
    for draws in (0, 5):
        trial = Trial(seed=1)
        torch.rand(draws, generator=trial.generator)
        model = copy.deepcopy(start)
        learngene.fine_tune({1: model}, world.task, world, epochs=1, lr=1e-3, trial=trial)
        results.append(vit.predict(model, world.test.images))
    assert torch.equal(*results)


def test_what_is_shared_is_stored_once():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert learngene.stored(model) == 12
    model[1] = model[0]
    assert learngene.stored(model) == 6


def test_no_epochs(world):
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        learngene.fine_tune({1: small()}, world.task, world, epochs=0, lr=1e-3, trial=Trial(seed=1))
