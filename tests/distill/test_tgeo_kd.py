"""TGeo-KD: its loss, features and ratios, the gradient through the student's virtual step, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.distill.tgeo_kd import (
    FusionRatioNet,
    annealed_ratio,
    class_mean_probs,
    fused_kd_loss,
    fusion_ratio_step,
    loss_ratio,
    tgeo_kd_step,
    trilateral_features,
)

CLASSES, INPUTS = 4, 5


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 2 * torch.randn(2, 30, CLASSES, generator=generator, dtype=torch.float64)
    return student, teacher, torch.randint(CLASSES, (30,), generator=generator)


def means(teacher, target):
    return class_mean_probs(teacher.softmax(-1), target, CLASSES)


@pytest.mark.parametrize("temperature", [1.5, 4.0])
def test_the_ends_of_the_ratio(batch, temperature):
    student, teacher, target = batch
    soft = temperature**2 * F.kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    hard = F.cross_entropy(student, target)
    torch.testing.assert_close(fused_kd_loss(*batch, 0.0, temperature), hard)
    torch.testing.assert_close(fused_kd_loss(*batch, 1.0, temperature), soft)
    # torchdistill's KDLoss with alpha = 0.7, whose alpha weighs the labels
    torch.testing.assert_close(fused_kd_loss(*batch, 0.3, temperature), 0.7 * hard + 0.3 * soft)


def test_ratios_by_sample(batch):
    ratio = torch.rand(30, dtype=torch.float64)
    each = fused_kd_loss(*batch, ratio, reduction="none")
    apart = [fused_kd_loss(*(part[i : i + 1] for part in batch), ratio[i].item()) for i in range(30)]
    torch.testing.assert_close(each, torch.stack(apart))
    torch.testing.assert_close(fused_kd_loss(*batch, ratio), each.mean())


def test_edges_vanish_where_all_agree():
    target = torch.tensor([0, 1, 2])
    truth = torch.eye(CLASSES)[target]
    features = trilateral_features(truth, truth, target, torch.eye(CLASSES), parts=("edges",))
    assert features.shape == (3, 5 * CLASSES)
    assert not features.any()


@pytest.mark.parametrize(
    ("parts", "blocks"),
    [
        (("vertices", "edges"), 9), (("vertices",), 4), (("edges",), 5), (("angles",), 2), (("vertices", "angles"), 6),
        (("edges", "angles"), 5), (("angles", "edges", "vertices"), 9),
    ],
)  # fmt: skip
def test_blocks_of_features(batch, parts, blocks):
    student, teacher, target = batch
    features = trilateral_features(student.softmax(-1), teacher.softmax(-1), target, means(teacher, target), parts)
    assert features.shape == (30, blocks * CLASSES)
    assert FusionRatioNet(CLASSES, parts=parts)(features.float()).shape == (30,)


def test_features_by_hand(batch):
    student, teacher, target = batch
    s, t, o = student.softmax(-1), teacher.softmax(-1), means(teacher, target)[target]
    g = F.one_hot(target, CLASSES).double()
    expected = [s, t, g, o, (o - s) ** 2, (g - s) ** 2, (t - s) ** 2, (t - g) ** 2, (o - g) ** 2]
    torch.testing.assert_close(trilateral_features(s, t, target, means(teacher, target)), torch.cat(expected, 1))


def test_permuting_classes_permutes_each_block(batch):
    student, teacher, target = batch
    order = torch.tensor([2, 0, 3, 1])
    place = order.argsort()
    before = trilateral_features(student.softmax(-1), teacher.softmax(-1), target, means(teacher, target))
    after = trilateral_features(
        student[:, order].softmax(-1), teacher[:, order].softmax(-1), place[target], means(teacher[:, order], place[target])
    )
    torch.testing.assert_close(after, before.view(30, 9, CLASSES)[:, :, order].flatten(1))


def test_mean_answers(batch):
    _, teacher, target = batch
    probs, target = teacher.softmax(-1), target.clamp(max=2)
    mean = class_mean_probs(probs, target, CLASSES)
    for label in range(3):
        torch.testing.assert_close(mean[label], probs[target == label].mean(0))
    torch.testing.assert_close(mean[3], torch.full((CLASSES,), 0.25, dtype=torch.float64))


@pytest.fixture
def world():
    torch.manual_seed(0)
    student = nn.Linear(INPUTS, CLASSES).double()
    net = FusionRatioNet(CLASSES).double()
    data = torch.randn(40, INPUTS, dtype=torch.float64), torch.randint(CLASSES, (40,))
    train, val = (data[0][:30], data[1][:30]), (data[0][30:], data[1][30:])
    teacher = torch.randn(30, CLASSES, dtype=torch.float64) * 2
    return student, net, train, val, teacher, means(teacher, train[1])


def validation_loss(student, net, train, val, teacher, mean, inner_lr, temperature=4.0):
    """After one step of plain gradient descent, by hand."""
    weight, bias = (p.detach().clone().requires_grad_() for p in student.parameters())
    logits = train[0] @ weight.T + bias
    ratio = net(trilateral_features(logits.softmax(-1), teacher.softmax(-1), train[1], mean)).detach()
    gradients = torch.autograd.grad(fused_kd_loss(logits, teacher, train[1], ratio, temperature), [weight, bias])
    moved = [p - inner_lr * g for p, g in zip((weight, bias), gradients, strict=True)]
    return F.cross_entropy(val[0] @ moved[0].T + moved[1], val[1]).item()


def ratio_gradients(student, net, train, val, teacher, mean, inner_lr):
    said = fusion_ratio_step(student, train, val, teacher, net, torch.optim.SGD(net.parameters(), lr=0.0), mean, inner_lr)
    return said, [p.grad.clone() for p in net.parameters()]


def test_the_upper_gradient_is_that_of_finite_differences(world):
    student, net, *rest = world
    said, gradients = ratio_gradients(*world, inner_lr=0.5)
    assert said["val_loss"] == pytest.approx(validation_loss(*world, inner_lr=0.5))
    bias, size = list(net.parameters())[-1], 1e-4
    bias.data += size
    above = validation_loss(student, net, *rest, inner_lr=0.5)
    bias.data -= 2 * size
    below = validation_loss(student, net, *rest, inner_lr=0.5)
    assert gradients[-1].item() == pytest.approx((above - below) / (2 * size), rel=1e-3)


def test_without_a_virtual_step_there_is_no_gradient(world):
    _, gradients = ratio_gradients(*world, inner_lr=0.0)
    assert not any(gradient.any() for gradient in gradients)


def test_the_student_is_as_it_was(world):
    student = nn.Sequential(nn.BatchNorm1d(INPUTS), world[0]).double().train()
    before = copy.deepcopy(student.state_dict())
    ratio_gradients(student, *world[1:], inner_lr=0.5)
    torch.testing.assert_close(student.state_dict(), before)
    assert all(p.grad is None for p in student.parameters())
    assert student.training


def test_a_part_of_the_student_in_evaluation_mode_stays_so(world):
    student = nn.Sequential(nn.BatchNorm1d(INPUTS), world[0]).double().train()
    student[0].eval()
    ratio_gradients(student, *world[1:], inner_lr=0.5)
    assert [student.training, student[0].training, student[1].training] == [True, False, True]


def test_a_student_of_transformers():
    """With its default attention, and inputs by name; the gradient is that of attention written out."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=12, max_position_embeddings=8, num_labels=CLASSES, **sizes)
    ids, target, teacher = torch.randint(12, (8, 6)), torch.arange(8) % CLASSES, torch.randn(8, CLASSES)
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(6) < 4).long().expand(8, 6)}
    torch.manual_seed(0)
    net, found = FusionRatioNet(CLASSES), []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(1)
        student = BertForSequenceClassification._from_config(config, attn_implementation=attention)
        batch = (inputs, target)
        found.append(ratio_gradients(student, net, batch, batch, teacher, means(teacher, target), inner_lr=0.5)[1])
        said = tgeo_kd_step(
            student, torch.optim.SGD(student.parameters(), lr=0.1), batch, teacher, net, means(teacher, target),
            val_batch=batch, ratio_optimizer=torch.optim.SGD(net.parameters(), lr=0.0),
        )  # fmt: skip
        assert said["loss"] > 0
    assert any(gradient.any() for gradient in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_the_students_step_leaves_the_ratio_network_alone(world):
    student, net, train, _, teacher, mean = world
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    expected = copy.deepcopy(student)
    said = tgeo_kd_step(student, optimizer, train, teacher, net, mean)
    assert all(p.grad is None for p in net.parameters())
    assert set(said) == {"loss", "ratio"}
    loss = fused_kd_loss(expected(train[0]), teacher, train[1], said["ratio"])
    for (name, p), gradient in zip(
        expected.named_parameters(), torch.autograd.grad(loss, list(expected.parameters())), strict=True
    ):
        torch.testing.assert_close(dict(student.named_parameters())[name], p - 0.1 * gradient)


def test_the_network_learns_every_so_often(world):
    student, net, train, val, teacher, mean = world
    optimizer, ratio_optimizer = torch.optim.SGD(student.parameters(), lr=0.0), torch.optim.Adam(net.parameters(), lr=0.1)
    learnt = []
    for step in range(5):
        said = tgeo_kd_step(
            student, optimizer, train, teacher, net, mean, val_batch=val, ratio_optimizer=ratio_optimizer, step=step, every=2
        )
        learnt.append("val_loss" in said)
    assert learnt == [True, False, True, False, True]


def test_it_learns_to_trust_the_teacher_where_labels_are_wrong():
    torch.manual_seed(0)
    inputs = torch.randn(300, INPUTS)
    right = (inputs @ torch.randn(INPUTS, CLASSES)).argmax(1)
    place = torch.arange(300)
    labels = torch.where(place < 100, (right + 1) % CLASSES, right)
    taught = torch.where((place >= 100) & (place < 200), (right + 2) % CLASSES, right)  # where the labels are right it errs
    teacher = 8.0 * F.one_hot(taught, CLASSES).float()
    student, net = nn.Linear(INPUTS, CLASSES), FusionRatioNet(CLASSES)
    optimizer, ratio_optimizer = torch.optim.SGD(student.parameters(), lr=0.1), torch.optim.Adam(net.parameters(), lr=0.03)
    mean = class_mean_probs(teacher[:200].softmax(-1), labels[:200], CLASSES)
    for _ in range(60):
        said = tgeo_kd_step(
            student, optimizer, (inputs[:200], labels[:200]), teacher[:200], net, mean,
            val_batch=(inputs[200:], right[200:]), ratio_optimizer=ratio_optimizer, inner_lr=1.0,
        )  # fmt: skip
    assert said["ratio"][:100].mean() > said["ratio"][100:].mean() + 0.3


def test_baselines(batch):
    student, teacher, target = batch
    own, theirs = (F.cross_entropy(z.float(), target, reduction="none") for z in (student, teacher))
    torch.testing.assert_close(loss_ratio(student, teacher, target), 1 - torch.exp(-own / theirs))
    assert [annealed_ratio(step, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert annealed_ratio(0, 1) == 1.0


def test_half_precision(batch):
    student, teacher = batch[0].bfloat16(), batch[1].bfloat16()
    loss = fused_kd_loss(student, teacher, batch[2], 0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, fused_kd_loss(student.float(), teacher.float(), batch[2], 0.5))


def test_in_a_trainer(tmp_path):
    """The teacher's logits come along with the labels."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=12, max_position_embeddings=8, num_labels=CLASSES, **sizes))
    net, mean = FusionRatioNet(CLASSES), torch.full((CLASSES, CLASSES), 0.25)

    def loss(outputs, labels, num_items_in_batch=None):
        target, teacher = labels[:, 0].long(), labels[:, 1:]
        probs = outputs.logits.softmax(-1)
        ratio = net(trilateral_features(probs, teacher.softmax(-1), target, mean)).detach()
        return fused_kd_loss(outputs.logits, teacher, target, ratio)

    rows = [{"input_ids": torch.tensor([i % 12, 1]), "labels": torch.tensor([i % CLASSES, 1.0, 0, 0, 0])} for i in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, report_to=[], save_strategy="no", use_cpu=True,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    assert Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss).train().training_loss > 0


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda s, t, y: fused_kd_loss(s, t, y, 1.1), "ratio"),
        (lambda s, t, y: fused_kd_loss(s, t, y, torch.rand(3)), "ratio"),
        (lambda s, t, y: fused_kd_loss(s, t, y, 0.5, 0.0), "temperature"),
        (lambda s, t, y: fused_kd_loss(s, t, y + CLASSES, 0.5), "target"),
        (lambda s, t, y: fused_kd_loss(s, t, y, 0.5, reduction="sum"), "reduction"),
        (lambda s, t, y: trilateral_features(s, t, y + 9, torch.eye(CLASSES).double()), "target"),
        (lambda s, t, y: trilateral_features(s, t, y, torch.eye(CLASSES).double(), parts=("faces",)), "parts"),
        (lambda s, t, y: FusionRatioNet(1), "num_classes"),
        (lambda s, t, y: FusionRatioNet(3, parts=()), "parts"),
        (lambda s, t, y: class_mean_probs(s, y, 3), "classes"),
        (lambda s, t, y: annealed_ratio(5, 5), "step"),
    ],
)
def test_bad_input(batch, call, expected):
    with pytest.raises(ValueError, match=expected):
        call(*batch)


def test_bad_steps(world):
    student, net, train, val, teacher, mean = world
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="inner_lr"):
        ratio_gradients(*world, inner_lr=-1.0)
    with pytest.raises(ValueError, match="every"):
        tgeo_kd_step(student, optimizer, train, teacher, net, mean, every=0)
    with pytest.raises(ValueError, match="ratio_optimizer"):
        tgeo_kd_step(student, optimizer, train, teacher, net, mean, val_batch=val)
