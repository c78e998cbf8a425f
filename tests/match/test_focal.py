import math
from functools import partial

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError

from firsthand.match.focal import focal_compute_loss, focal_loss, sigmoid_focal_loss


@pytest.fixture
def binary():
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(50, generator=generator), torch.randint(2, (50,), generator=generator)


@pytest.fixture
def classes():
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(40, 5, generator=generator), torch.randint(5, (40,), generator=generator)


# --- closed forms and other libraries


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_focus_it_is_torchs_binary_cross_entropy(binary, reduction):
    logits, target = binary
    plain = F.binary_cross_entropy_with_logits(logits, target.float(), reduction=reduction)
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, alpha=0.5, gamma=0.0, reduction=reduction), plain / 2)
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, alpha=None, gamma=0.0, reduction=reduction), plain)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_without_focus_it_is_torchs_cross_entropy(classes, reduction):
    logits, target = classes
    plain = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(focal_loss(logits, target, gamma=0.0, reduction=reduction), plain)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.9, 0.5), (None, 3.0)])
def test_the_formula_written_out_one_number_at_a_time(binary, alpha, gamma):
    logits, target = binary
    expected = []
    for z, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        p_t = p if y else 1 - p
        weight = 1.0 if alpha is None else (alpha if y else 1 - alpha)
        expected.append(-weight * (1 - p_t) ** gamma * math.log(p_t))
    torch.testing.assert_close(
        sigmoid_focal_loss(logits.double(), target, alpha=alpha, gamma=gamma, reduction="none"),
        torch.tensor(expected, dtype=torch.float64),
    )


def test_the_formula_with_classes(classes):
    logits, target = classes
    alpha = torch.tensor([0.1, 0.2, 1.0, 2.0, 0.0])
    p = logits.double().softmax(dim=1)[torch.arange(40), target]
    expected = -alpha[target].double() * (1 - p) ** 2 * p.log()
    torch.testing.assert_close(focal_loss(logits.double(), target, alpha=alpha, reduction="none"), expected)


def test_two_classes_are_one_decision(binary):
    logits, target = binary
    both = torch.stack([torch.zeros_like(logits), logits], dim=1)
    weights = torch.tensor([0.7, 0.3])
    torch.testing.assert_close(focal_loss(both, target, alpha=weights), sigmoid_focal_loss(logits, target, alpha=0.3))


def test_a_soft_target_costs_the_expected_loss(binary):
    logits, _ = binary
    one, zero = (sigmoid_focal_loss(logits, torch.full_like(logits, y), reduction="none") for y in (1.0, 0.0))
    torch.testing.assert_close(sigmoid_focal_loss(logits, torch.full_like(logits, 0.3), reduction="none"), 0.3 * one + 0.7 * zero)


# --- what it is for


def test_the_gradient_of_what_is_classified_well_fades_faster():
    z = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64, requires_grad=True)
    y = torch.ones(3)
    focal = torch.autograd.grad(sigmoid_focal_loss(z, y, alpha=None, reduction="sum"), z)[0]
    plain = torch.autograd.grad(F.binary_cross_entropy_with_logits(z, y.double(), reduction="sum"), z)[0]
    ratio = focal / plain
    assert (ratio[1:] < ratio[:-1] / 5).all()
    assert ratio[-1] < 1e-4


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_far_out_it_is_exact_and_its_gradient_finite(gamma):
    z = torch.tensor([1e3, -1e3, 1e3, -1e3, 0.0], requires_grad=True)
    y = torch.tensor([1, 0, 0, 1, 1])
    loss = sigmoid_focal_loss(z, y, alpha=None, gamma=gamma, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.0, 1e3, 1e3, 0.5**gamma * math.log(2)]))
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[:4], torch.tensor([0.0, 0.0, 1.0, -1.0]))

    z = torch.tensor([[1e3, 0.0, 0.0], [0.0, 1e3, 0.0]], requires_grad=True)
    loss = focal_loss(z, torch.tensor([0, 0]), gamma=gamma, reduction="none")
    torch.testing.assert_close(loss, torch.tensor([0.0, 1e3]))
    assert torch.autograd.grad(loss.sum(), z)[0].isfinite().all()


def test_gradients_agree_with_finite_differences(binary, classes):
    logits, target = binary
    assert torch.autograd.gradcheck(lambda z: sigmoid_focal_loss(z, target, gamma=1.5), logits.double().requires_grad_())
    logits, target = classes
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, target, gamma=1.5), logits.double().requires_grad_())


def test_rows_to_ignore_cost_nothing_and_do_not_count(classes):
    logits, target = classes
    half = torch.where(torch.arange(40) < 20, target, -100)
    torch.testing.assert_close(focal_loss(logits, half), focal_loss(logits[:20], target[:20]))
    none = focal_loss(logits.requires_grad_(), half, reduction="none")
    assert (none[20:] == 0).all()


# --- dtypes, devices, compilation


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_logits_is_kept_and_the_arithmetic_is_wide(binary, classes, dtype, device):
    for loss, (logits, target) in ((sigmoid_focal_loss, binary), (focal_loss, classes)):
        narrow = logits.to(device, dtype)
        value = loss(narrow, target.to(device))
        assert value.dtype == dtype
        torch.testing.assert_close(value.float().cpu(), loss(narrow.float().cpu(), target), rtol=8e-3, atol=0)


def test_the_whole_graph_compiles(binary, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks of the tests cannot be traced
    logits, target = binary
    compiled = torch.compile(sigmoid_focal_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(logits, target), sigmoid_focal_loss(logits, target))


# --- bad input


def test_out_of_range(binary, classes):
    for loss, (logits, target) in ((sigmoid_focal_loss, binary), (focal_loss, classes)):
        for gamma in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="gamma must be at least 0"):
                loss(logits, target, gamma=gamma)
        with pytest.raises(ValueError, match="reduction must be"):
            loss(logits, target, reduction="median")
        with pytest.raises(ValueError, match="must have entries"):
            loss(logits[:0], target[:0])
        with pytest.raises((ValueError, TypeCheckError)):
            loss(logits, target[:-1])
    logits, target = binary
    with pytest.raises(ValueError, match="alpha must be None or in"):
        sigmoid_focal_loss(logits, target, alpha=1.5)
    with pytest.raises(ValueError, match="target must be in"):
        sigmoid_focal_loss(logits, target * 2)
    logits, target = classes
    with pytest.raises(ValueError, match="target must be in"):
        focal_loss(logits, target + 1)
    with pytest.raises(ValueError, match="alpha must be None or 5 weights"):
        focal_loss(logits, target, alpha=-torch.ones(5))
    with pytest.raises(ValueError, match="at least 2 classes"):
        focal_loss(logits[:, :1], torch.zeros_like(target))


# --- in a Trainer


def test_in_a_trainer_accumulated_batches_are_one_large_batch(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(30, (6,), generator=generator), "labels": torch.randint(3, (), generator=generator)}
        for _ in range(8)
    ]

    def train(batch, accumulated):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, max_steps=1,
            learning_rate=0.1, max_grad_norm=0.0, optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        loss = partial(focal_compute_loss, alpha=[0.2, 0.3, 0.5], gamma=2.0)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss)
        output = trainer.train()
        return model.classifier.weight.detach(), output.training_loss

    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    loss = focal_loss(model(batch["input_ids"]).logits, batch["labels"], alpha=torch.tensor([0.2, 0.3, 0.5]))
    loss.backward()
    by_hand = (model.classifier.weight - 0.1 * model.classifier.weight.grad).detach()
    for weights, reported in (train(8, 1), train(2, 4)):
        torch.testing.assert_close(weights, by_hand, atol=1e-6, rtol=1e-5)
        assert reported == pytest.approx(loss.item(), rel=1e-4)


def test_one_logit_or_several_labels_are_decisions_of_their_own(binary):
    logits, target = binary
    outputs = {"logits": logits[:, None]}
    torch.testing.assert_close(focal_compute_loss(outputs, target, alpha=0.3), sigmoid_focal_loss(logits, target, alpha=0.3))
    outputs, labels = {"logits": logits.view(10, 5)}, target.view(10, 5).float()
    torch.testing.assert_close(
        focal_compute_loss(outputs, labels, 10), sigmoid_focal_loss(logits, target, alpha=None, reduction="sum") / 10
    )
