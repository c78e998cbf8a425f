"""MCMI: both forms of the information, the streaming metric, gradients, centroids and fine-tuning."""

import copy
import io

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.distill.mcmi import (
    ClassCentroids,
    ConditionalMutualInformation,
    class_centroids,
    conditional_mutual_information,
    mcmi_finetune,
    mcmi_loss,
)

CLASSES = 4


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(60, CLASSES, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (60,), generator=generator)


def jensen_shannon(logits, target):
    probs, total = logits.softmax(-1).numpy(), 0.0
    for label in range(CLASSES):
        own = probs[(target == label).numpy()]
        entropies = [scipy.stats.entropy(row) for row in own]
        total += len(own) / len(probs) * (scipy.stats.entropy(own.mean(0)) - np.mean(entropies))
    return total


def test_without_lambda_it_is_cross_entropy(batch):
    centroids = class_centroids(*batch, CLASSES)
    torch.testing.assert_close(mcmi_loss(*batch, centroids, lam=0.0), F.cross_entropy(*batch))
    each = mcmi_loss(*batch, centroids, lam=0.3, reduction="none")
    apart = conditional_mutual_information(*batch, CLASSES, reduction="none")
    torch.testing.assert_close(each, F.cross_entropy(*batch, reduction="none") - 0.3 * apart)


def test_one_answer_a_class_has_no_information(batch):
    _, target = batch
    logits = torch.randn(CLASSES, CLASSES, dtype=torch.float64)[target]
    assert conditional_mutual_information(logits, target, CLASSES).item() == pytest.approx(0.0, abs=1e-12)


def test_both_forms_agree(batch):
    assert conditional_mutual_information(*batch, CLASSES).item() == pytest.approx(jensen_shannon(*batch))


def test_one_hot_answers_have_the_entropy_of_the_centroids(batch):
    _, target = batch
    said = torch.arange(60) % CLASSES
    logits = 200.0 * F.one_hot(said, CLASSES).double()
    centroids = class_centroids(logits, target, CLASSES)
    shares = torch.bincount(target, minlength=CLASSES) / 60
    expected = (shares.numpy() * scipy.stats.entropy(centroids.numpy(), axis=1)).sum()
    assert conditional_mutual_information(logits, target, CLASSES).item() == pytest.approx(expected)


def test_other_centroids_never_make_it_less(batch):
    own = class_centroids(*batch, CLASSES)
    least = conditional_mutual_information(*batch, CLASSES, own)
    for seed in range(5):
        other = torch.softmax(own.log() + torch.randn(own.shape, generator=torch.Generator().manual_seed(seed)), -1)
        assert conditional_mutual_information(*batch, CLASSES, other) > least


def test_gradients(batch):
    logits, target = batch
    centroids = class_centroids(logits, target, CLASSES).requires_grad_()
    z = logits.clone().requires_grad_()
    divergence = conditional_mutual_information(z, target, CLASSES, centroids)
    (gradient,) = torch.autograd.grad(divergence, z)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(60, dtype=torch.float64), atol=1e-12, rtol=0)
    mcmi_loss(z, target, centroids).backward()
    assert centroids.grad is None
    assert torch.autograd.gradcheck(lambda z: mcmi_loss(z, target, centroids.detach(), 0.4), z)


def test_certainty_beyond_floats_stays_finite():
    logits = torch.tensor([[500.0, 0.0], [-500.0, 0.0]], requires_grad=True)
    loss = mcmi_loss(logits, torch.tensor([0, 1]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_absent_classes_have_uniform_centroids(batch):
    logits, target = batch
    centroids = class_centroids(logits, target.clamp(max=2), CLASSES)
    torch.testing.assert_close(centroids[3], torch.full((CLASSES,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(centroids.sum(1), torch.ones(CLASSES, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_metric_is_exact_over_batches(batch, size):
    metric = ConditionalMutualInformation(CLASSES)
    for logits, target in zip(batch[0].split(size), batch[1].split(size), strict=True):
        metric.update(logits, target)
    assert metric.compute().item() == pytest.approx(jensen_shannon(*batch), rel=1e-10)
    shares = torch.bincount(batch[1], minlength=CLASSES) / 60
    assert (metric.by_class * shares).sum().item() == pytest.approx(metric.compute().item(), rel=1e-6)


def test_the_metric_keeps_few_numbers_and_adds_up_with_another(batch):
    whole, half = ConditionalMutualInformation(CLASSES), ConditionalMutualInformation(CLASSES)
    whole.update(*batch)
    half.update(batch[0][:30], batch[1][:30])
    other = ConditionalMutualInformation(CLASSES)
    other.update(batch[0][30:], batch[1][30:])
    states = ("answers", "negentropy", "counts")
    assert sum(getattr(whole, name).numel() for name in states) == CLASSES**2 + 2 * CLASSES
    for name in states:  # what distributed processes do
        setattr(half, name, getattr(half, name) + getattr(other, name))
    torch.testing.assert_close(half.compute(), whole.compute())
    whole.reset()
    with pytest.warns(UserWarning, match="before the ``update``"), pytest.raises(ValueError, match="sample to compute"):
        whole.compute()


def test_half_precision(batch):
    logits, target = batch[0].bfloat16(), batch[1]
    centroids = class_centroids(logits, target, CLASSES)
    assert centroids.dtype == torch.float32
    torch.testing.assert_close(mcmi_loss(logits, target, centroids), mcmi_loss(logits.float(), target, centroids))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, CLASSES))


def loader(count=120):
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(CLASSES, (count,), generator=generator)
    inputs = torch.randn(count, 6, generator=generator) + 1.5 * F.one_hot(target, 6)
    return list(zip(inputs.split(20), target.split(20), strict=True))


def test_centroids_of_a_loader_are_those_of_all_its_samples():
    model, data = network(), loader()
    kept = ClassCentroids(CLASSES).fit(model, data)
    logits = model(torch.cat([inputs for inputs, _ in data])).detach()
    target = torch.cat([labels for _, labels in data])
    torch.testing.assert_close(kept.centroids, class_centroids(logits, target, CLASSES))
    torch.testing.assert_close(kept(target), kept.centroids[target])


def test_a_moving_average_moves_the_classes_that_are_there(batch):
    logits, target = batch[0].float(), batch[1].clamp(max=2)
    kept = ClassCentroids(CLASSES, refresh="ema", decay=0.9)
    kept.update(logits, target)
    expected = 0.9 * 0.25 + 0.1 * class_centroids(logits, target, CLASSES)
    torch.testing.assert_close(kept.centroids[:3], expected[:3])
    torch.testing.assert_close(kept.centroids.sum(1), torch.ones(CLASSES))
    still = ClassCentroids(CLASSES, refresh="epoch")
    still.update(logits, target)
    torch.testing.assert_close(still.centroids, torch.full((CLASSES, CLASSES), 0.25))


def test_centroids_are_saved():
    kept = ClassCentroids(CLASSES).fit(network(), loader())
    file = io.BytesIO()
    torch.save(kept.state_dict(), file)
    file.seek(0)
    again = ClassCentroids(CLASSES)
    again.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(again.centroids, kept.centroids)


def information(model, data):
    metric = ConditionalMutualInformation(CLASSES)
    for inputs, target in data:
        metric.update(model(inputs), target)
    return metric.compute().item()


@pytest.mark.parametrize("refresh", ["once", "epoch", "ema"])
def test_fine_tuning_raises_the_information(refresh):
    data, trained = loader(), network()
    mcmi_finetune(trained, data, CLASSES, lam=0.0, epochs=15)
    plain, spread = copy.deepcopy(trained), copy.deepcopy(trained)
    mcmi_finetune(plain, data, CLASSES, lam=0.0, epochs=10)
    assert mcmi_finetune(spread, data, CLASSES, lam=0.3, epochs=10, refresh=refresh) is spread
    assert information(spread, data) > information(plain, data) + 0.01
    assert not spread.training


def test_the_best_epoch_is_kept():
    told = iter([0.2, 0.9, 0.1])
    seen = []

    def val_fn(model):
        seen.append(copy.deepcopy(model.state_dict()))
        return next(told)

    model = mcmi_finetune(network(), loader(), CLASSES, epochs=3, val_fn=val_fn)
    torch.testing.assert_close(model.state_dict(), seen[1])


def test_in_a_trainer(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=12, max_position_embeddings=8, num_labels=CLASSES, **sizes))
    centroids = ClassCentroids(CLASSES).centroids
    heard = []

    def loss(outputs, labels, num_items_in_batch=None):
        heard.append(mcmi_loss(outputs.logits, labels, centroids))
        return heard[-1]

    rows = [{"input_ids": torch.tensor([i % 12, 1, 2]), "labels": i % CLASSES} for i in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss).train()
    assert len(heard) == 2
    assert all(value.isfinite() for value in heard)


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_trainer_that_accumulates_has_the_gradient_of_the_whole_batch(tmp_path, accumulated):
    """As the docstring of `mcmi_loss` says it: the `Trainer` divides by nothing."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=12, max_position_embeddings=8, num_labels=CLASSES, **sizes))
    centroids = ClassCentroids(CLASSES).centroids
    inputs, labels = torch.stack([torch.tensor([i % 12, 1, 2]) for i in range(16)]), torch.arange(16) % CLASSES
    mcmi_loss(model(input_ids=inputs).logits, labels, centroids).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    model.zero_grad()

    def loss(outputs, labels, num_items_in_batch):
        return mcmi_loss(outputs.logits, labels, centroids, reduction="none").sum() / num_items_in_batch

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=16 // accumulated, gradient_accumulation_steps=accumulated,
        max_grad_norm=1e6, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": label} for row, label in zip(inputs, labels, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda z, y, q: mcmi_loss(z, y, q, lam=-0.1), "lam"),
        (lambda z, y, q: mcmi_loss(z, y + 1, q), r"target must be in \[0, 4\)"),
        (lambda z, y, q: mcmi_loss(z, y, 2 * q), "sum to 1"),
        (lambda z, y, q: mcmi_loss(z, y, q, reduction="sum"), "reduction"),
        (lambda z, y, q: class_centroids(z, y, 3), "shape"),
        (lambda z, y, q: ClassCentroids(1), "num_classes"),
        (lambda z, y, q: ClassCentroids(4, refresh="never"), "refresh"),
        (lambda z, y, q: ClassCentroids(4, decay=1.0), "decay"),
        (lambda z, y, q: ClassCentroids(4).fit(network(), []), "at least one sample"),
        (lambda z, y, q: ConditionalMutualInformation(1), "num_classes"),
        (lambda z, y, q: mcmi_finetune(network(), loader(), 4, epochs=0), "epochs"),
        (lambda z, y, q: mcmi_finetune(network(), iter(loader()), 4, epochs=1), "loader must give"),
    ],
)
def test_bad_input(batch, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(*batch, class_centroids(*batch, CLASSES))
