"""Soft distillation: against torch's own divergence, its gradient, and what it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F

from firsthand.distill.soft import soft_distillation_loss


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 6, 5, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_it_is_the_divergence_times_the_squared_temperature(logits, temperature):
    student, teacher = logits
    expected = F.kl_div((student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="none").sum(-1)
    each = soft_distillation_loss(student, teacher, temperature, reduction="none")
    torch.testing.assert_close(each, temperature**2 * expected)
    torch.testing.assert_close(soft_distillation_loss(student, teacher, temperature), each.mean())


def test_nothing_is_lost_between_equals(logits):
    assert soft_distillation_loss(logits[0], logits[0] + 7.0).item() == pytest.approx(0.0, abs=1e-12)


def test_its_gradient_is_the_difference_of_the_answers_and_the_teacher_gets_none(logits):
    student, teacher = (each.clone().requires_grad_() for each in logits)
    soft_distillation_loss(student, teacher).backward()
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 6)
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda z: soft_distillation_loss(z, teacher, 3.0), student)


def test_tokens_are_samples_too(logits):
    student, teacher = (each.view(2, 3, 5) for each in logits)
    assert soft_distillation_loss(student, teacher, reduction="none").shape == (2, 3)
    torch.testing.assert_close(soft_distillation_loss(student, teacher), soft_distillation_loss(*logits))


def test_what_both_forbid_costs_nothing(logits):
    student, teacher = (torch.cat([each, torch.full((6, 1), -math.inf)], 1).requires_grad_() for each in logits)
    loss = soft_distillation_loss(student, teacher)
    torch.testing.assert_close(loss.detach(), soft_distillation_loss(*logits))
    loss.backward()
    assert student.grad.isfinite().all()


def test_half_precision_is_computed_in_float32(logits):
    student, teacher = logits.bfloat16()
    loss = soft_distillation_loss(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_distillation_loss(student.float(), teacher.float()))


@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_trainer_that_accumulates_has_the_gradient_of_the_whole_batch(tmp_path, accumulated):
    """As the docstring says it: the `Trainer` divides by nothing, and takes each of the teacher's logits for a label."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=12, max_position_embeddings=8, num_labels=4, **sizes))
    inputs, teacher = torch.stack([torch.tensor([i % 12, 1, 2]) for i in range(16)]), torch.randn(16, 4)
    soft_distillation_loss(model(input_ids=inputs).logits, teacher).backward()
    expected = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item()
    model.zero_grad()

    def loss(outputs, targets, num_items_in_batch):
        each = soft_distillation_loss(outputs.logits, targets, reduction="none")
        return each.sum() * targets.shape[-1] / num_items_in_batch

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=16 // accumulated, gradient_accumulation_steps=accumulated,
        max_grad_norm=1e6, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, dataloader_pin_memory=False,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": target} for row, target in zip(inputs, teacher, strict=True)]
    trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss)
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [({"temperature": 0.0}, "temperature"), ({"temperature": math.inf}, "temperature"), ({"reduction": "sum"}, "reduction")],
)
def test_bad_arguments(logits, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        soft_distillation_loss(*logits, **arguments)
