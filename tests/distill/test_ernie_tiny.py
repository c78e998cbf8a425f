import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from firsthand import data
from firsthand.distill.ernie_tiny import (
    DistillationLoss,
    Stage,
    attention_distillation_loss,
    ernie_tiny_stages,
    hidden_distillation_loss,
    identity_projection,
    label_distillation_loss,
    progressive_distill,
)

SIZES = {"vocab_size": 40, "num_attention_heads": 2, "max_position_embeddings": 16, "num_labels": 3}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
DISTANCES = pytest.mark.parametrize("distance", ["mse", "kl"])


def bert(hidden=8, layers=2, seed=0, **config):
    torch.manual_seed(seed)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    sizes = BertConfig(**(SIZES | no_dropout | sizes | config))
    model = BertForSequenceClassification._from_config(sizes, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture
def batch():
    ids = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 3:] = mask[1, 5:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


LABELS = torch.tensor([0, 2, 1, 1])


def read(model, batch):
    return model(**batch, output_attentions=True, output_hidden_states=True)


def latent(student, teacher, batch, projection, **how):
    """Both parts, apart."""
    outputs, taught, mask = read(student, batch), read(teacher, batch), batch.get("attention_mask")
    return (
        attention_distillation_loss(outputs.attentions, taught.attentions, mask, **how),
        hidden_distillation_loss(outputs.hidden_states, taught.hidden_states, projection, mask),
    )


# The losses


@DISTANCES
def test_a_student_that_is_its_teacher_has_nothing_to_learn(batch, distance):
    student = bert()
    for part in latent(student, copy.deepcopy(student), batch, nn.Identity(), distance=distance):
        assert part.item() == pytest.approx(0.0, abs=1e-6)


@DISTANCES
def test_padding_changes_no_loss(batch, distance):
    student, teacher = bert(seed=1), bert(hidden=12, layers=4, seed=2)
    projection = identity_projection(student, teacher)
    padded = {name: F.pad(value, (0, 5)) for name, value in batch.items()}
    expected = latent(student, teacher, batch, projection, distance=distance)
    torch.testing.assert_close(latent(student, teacher, padded, projection, distance=distance), expected)


def test_the_losses_are_the_means_that_the_equations_say(batch):
    """Pair by pair, text by text, query by query, over the tokens that are there."""
    student, teacher = bert(seed=1), bert(hidden=12, layers=4, seed=2)
    projection = nn.Linear(8, 12, bias=False)
    outputs, taught = read(student, batch), read(teacher, batch)
    lengths = batch["attention_mask"].sum(1).tolist()
    queries, divergences, vectors = [], [], []
    for layer, teacher_layer in ((1, 2), (2, 4)):
        for text, length in enumerate(lengths):
            for head in range(2):
                for query in range(length):
                    mine = outputs.attentions[layer - 1][text, head, query, :length]
                    its = taught.attentions[teacher_layer - 1][text, head, query, :length]
                    queries.append(F.mse_loss(mine, its))
                    divergences.append((its * (its / mine).log()).sum())
    for layer, teacher_layer in ((0, 0), (1, 2), (2, 4)):
        for text, length in enumerate(lengths):
            mine = projection(outputs.hidden_states[layer][text, :length])
            vectors += [*(mine - taught.hidden_states[teacher_layer][text, :length]).square().mean(-1)]
    mse, hidden = latent(student, teacher, batch, projection)
    kl, _ = latent(student, teacher, batch, projection, distance="kl")
    torch.testing.assert_close(mse, torch.stack(queries).mean())
    torch.testing.assert_close(kl, torch.stack(divergences).mean())
    torch.testing.assert_close(hidden, torch.stack(vectors).mean())


def test_the_layer_map_chooses_the_teachers_layers(batch):
    student, teacher = bert(layers=2, seed=1), bert(layers=3, seed=2)
    outputs, taught = read(student, batch), read(teacher, batch)
    mask = batch["attention_mask"]
    chosen = attention_distillation_loss(outputs.attentions, taught.attentions, mask, layer_map=[3, 1])
    by_hand = attention_distillation_loss(outputs.attentions, [taught.attentions[2], taught.attentions[0]], mask)
    torch.testing.assert_close(chosen, by_hand)
    hidden = taught.hidden_states
    torch.testing.assert_close(
        hidden_distillation_loss(outputs.hidden_states, hidden, nn.Identity(), mask, layer_map=[3, 1]),
        hidden_distillation_loss(outputs.hidden_states, [hidden[0], hidden[3], hidden[1]], nn.Identity(), mask),
    )


def test_with_another_number_of_heads_their_means_are_compared(batch):
    two, four = (torch.randn(4, heads, 6, 6).softmax(-1) for heads in (2, 4))
    expected = F.mse_loss(two.mean(1), four.mean(1))
    torch.testing.assert_close(attention_distillation_loss([two], [four]), expected)


def test_kl_of_zeros_is_finite():
    student, teacher = torch.eye(3).expand(1, 1, 3, 3), torch.full((1, 1, 3, 3), 1 / 3)
    assert attention_distillation_loss([student], [teacher], distance="kl").isfinite()
    certain = attention_distillation_loss([teacher], [student], distance="kl")
    assert certain.item() == pytest.approx(math.log(3))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_soft_terms_gradient(temperature):
    """T² KL has the gradient T (softmax(z_s / T) - softmax(z_t / T)), over the batch."""
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    label_distillation_loss(student, teacher, temperature=temperature, hard_weight=0.0).backward()
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)) / 5
    torch.testing.assert_close(student.grad, expected.detach())
    assert teacher.grad is None


def test_a_certain_teacher_is_a_label():
    student, labels = torch.randn(5, 4), torch.tensor([0, 3, 1, 1, 2])
    certain = 1000 * F.one_hot(labels, 4).float()
    soft = label_distillation_loss(student, certain, hard_weight=0.0)
    torch.testing.assert_close(soft, F.cross_entropy(student, labels))
    torch.testing.assert_close(label_distillation_loss(student, certain, labels), 2 * soft)


def test_regression():
    student, teacher, numbers = torch.randn(5, 1), torch.randn(5, 1), torch.randn(5)
    loss = label_distillation_loss(student, teacher, numbers, soft_weight=2.0, hard_weight=0.5, problem="regression")
    torch.testing.assert_close(loss, 2 * F.mse_loss(student, teacher) + 0.5 * F.mse_loss(student[:, 0], numbers))


@DTYPES
def test_dtypes_and_no_gradient_to_the_teacher(batch, dtype):
    student, teacher = bert(seed=1).to(dtype), bert(hidden=12, layers=4, seed=2).to(dtype)
    exact = latent(bert(seed=1), bert(hidden=12, layers=4, seed=2), batch, nn.Linear(8, 12, bias=False))
    projection = identity_projection(student, teacher)
    loss = sum(latent(student, teacher, batch, projection))
    loss = loss + label_distillation_loss(read(student, batch).logits, read(teacher, batch).logits, LABELS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert projection.weight.dtype == dtype
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    lower = latent(student, teacher, batch, projection)
    torch.testing.assert_close(lower[0], exact[0], atol=2e-2, rtol=0.1)


def test_a_text_without_tokens_counts_nothing(batch):
    student, teacher = bert(seed=1), bert(seed=2)
    longer = {name: torch.cat([value, torch.zeros_like(value[:1])]) for name, value in batch.items()}
    expected = latent(student, teacher, batch, nn.Identity())
    torch.testing.assert_close(latent(student, teacher, longer, nn.Identity()), expected)


# The loss of a stage, in a loop


def test_it_is_the_sum_of_its_parts_and_leaves_the_student_as_it_was(batch):
    student, teacher = bert(seed=1), bert(hidden=12, layers=4, seed=2)
    before = copy.deepcopy(student.state_dict())
    with DistillationLoss(student, teacher, latent=0.5, soft=2.0, hard=3.0, temperature=2.0) as loss:
        value = loss(student(**batch), LABELS)
        projection = student.hidden_projection
    logits = read(student, batch).logits, read(teacher, batch).logits
    expected = 0.5 * sum(latent(student, teacher, batch, projection)) + label_distillation_loss(*logits, LABELS, 2.0, 2.0, 3.0)
    torch.testing.assert_close(value, expected)
    assert student.state_dict().keys() == before.keys()
    assert student(**batch).attentions is None


def test_the_projection_begins_as_the_identity_and_is_trained(batch):
    student, teacher = bert(seed=1), bert(hidden=12, layers=4, seed=2)
    with DistillationLoss(student, teacher) as loss:
        torch.testing.assert_close(student.hidden_projection.weight, torch.eye(12, 8))
        assert any(parameter is student.hidden_projection.weight for parameter in student.parameters())
        loss(student(**batch)).backward()
        assert student.hidden_projection.weight.grad.abs().sum() > 0


def test_a_teacher_without_a_head_teaches_all_but_logits(batch):
    student, teacher = bert(seed=1), bert(layers=4, seed=2)
    with DistillationLoss(student, teacher.bert) as loss:
        bare = loss(student(**batch))
    with DistillationLoss(student, teacher) as loss:
        torch.testing.assert_close(loss(student(**batch)), bare)
    with (
        DistillationLoss(student, teacher.bert, soft=1.0) as loss,
        pytest.raises(ValueError, match="teacher_logits must be given"),
    ):
        loss(student(**batch))


def test_another_family(batch):
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
    models = [
        RobertaForSequenceClassification._from_config(RobertaConfig(**sizes), attn_implementation="eager").eval()
        for _ in range(2)
    ]
    with DistillationLoss(*models, soft=1.0, hard=1.0) as loss:
        loss(models[0](**batch), LABELS).backward()
    assert loss.student.classifier.dense.weight.grad.abs().sum() > 0


# In a Trainer


class Rows(torch.utils.data.Dataset):
    """Texts of one to six tokens, and their labels."""

    def __init__(self, count, labelled=True):
        generator = torch.Generator().manual_seed(3)
        lengths = torch.randint(1, 7, (count, 1), generator=generator)
        mask = (torch.arange(6) < lengths).long()
        self.columns = {
            "input_ids": torch.randint(3, 40, (count, 6), generator=generator) * mask,
            "attention_mask": mask,
        }
        if labelled:
            self.columns["labels"] = torch.randint(3, (count,), generator=generator)

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, row):
        return {name: column[row] for name, column in self.columns.items()}


def trainer(student, loss, rows, folder, **arguments):
    settings = {"max_steps": 3, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    settings |= {"use_cpu": True, "per_device_train_batch_size": 4, "dataloader_pin_memory": False, "seed": 0}
    return Trainer(student, TrainingArguments(folder, **(settings | arguments)), train_dataset=rows, compute_loss_func=loss)


@pytest.mark.parametrize("labelled", [True, False])
def test_batches_that_a_trainer_accumulates_are_one_large_batch(tmp_path, labelled):
    """What a text weighs in the latent loss depends on its batch, by its length: here all are as long."""
    rows = Rows(8, labelled)
    rows.columns["attention_mask"][:] = 1
    rows.columns["input_ids"].clamp_(min=3)
    found = []
    for accumulated in (1, 2):
        student, teacher = bert(seed=1), bert(hidden=12, layers=4, seed=2)
        labels = {"soft": 1.0, "hard": 1.0} if labelled else {}
        with DistillationLoss(student, teacher, **labels) as loss:
            sizes = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
            run = trainer(student, loss, rows, tmp_path, optim="sgd", max_steps=2, **sizes)
            run.loss_is_scaled_for_ga = None if labelled else False
            run.train()
            found.append(student.hidden_projection.weight.detach().clone())
        found.append(student.bert.pooler.dense.weight.detach() if labelled else student.bert.embeddings.word_embeddings.weight)
    torch.testing.assert_close(found[:2], found[2:])
    assert not torch.equal(found[0], torch.eye(12, 8))


def test_a_trainer_does_what_the_plain_loop_does(tmp_path):
    rows, teacher = Rows(4), bert(hidden=12, layers=4, seed=2)
    by_trainer, by_loop = bert(seed=1), bert(seed=1)
    with DistillationLoss(by_trainer, teacher, soft=1.0, hard=1.0) as loss:
        trainer(by_trainer, loss, rows, tmp_path, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0).train()
    with DistillationLoss(by_loop, teacher, soft=1.0, hard=1.0) as loss:
        optimizer = torch.optim.SGD(by_loop.train().parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            batch = dict(rows.columns)
            labels = batch.pop("labels")
            loss(by_loop(**batch), labels).backward()
            optimizer.step()
    torch.testing.assert_close(by_trainer.state_dict(), by_loop.state_dict(), atol=1e-5, rtol=1e-4)


def test_a_trainer_evaluates_and_what_is_saved_is_the_plain_student(tmp_path, recwarn):
    rows, student, teacher = Rows(8), bert(seed=1), bert(hidden=12, layers=4, seed=2)
    with DistillationLoss(student, teacher, soft=1.0, hard=1.0) as loss:
        run = trainer(student, loss, rows, tmp_path, prediction_loss_only=True)
        run.train()
        assert math.isfinite(run.evaluate(rows)["eval_loss"])
    student.save_pretrained(tmp_path / "student")
    again, report = BertForSequenceClassification.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(report.values())
    batch = {name: column for name, column in rows.columns.items() if name != "labels"}
    torch.testing.assert_close(again.eval()(**batch).logits, student.eval()(**batch).logits)


# The stages


@pytest.fixture
def world():
    return {
        "pretrained_teacher": bert(hidden=12, layers=4, seed=2).bert,
        "finetuned_teacher": bert(hidden=12, layers=4, seed=3),
        "general_data": DataLoader(Rows(12, labelled=False), batch_size=4),
        "task_data": DataLoader(Rows(8), batch_size=4),
    }


def test_the_stages_are_those_of_the_papers_table(world):
    stages = ernie_tiny_stages(**world, steps=(1, 2, 3, 4), lr=(1e-1, 1e-2, 1e-3, 1e-4))
    assert [stage.name for stage in stages] == ["GD", "GED", "TAD", "TSD"]
    assert stages[0].teacher is world["pretrained_teacher"]
    assert all(stage.teacher is world["finetuned_teacher"] for stage in stages[1:])
    assert all(stage.data is world["general_data"] for stage in stages[:2])
    assert all(stage.data is world["task_data"] for stage in stages[2:])
    assert [(stage.latent, stage.soft, stage.hard) for stage in stages] == [(1, 0, 0), (1, 0, 0), (1, 0, 0), (1, 1, 1)]
    assert [stage.steps for stage in stages] == [1, 2, 3, 4]
    assert [stage.lr for stage in stages] == [1e-1, 1e-2, 1e-3, 1e-4]
    one_thing = [(a.teacher is not b.teacher) + (a.data is not b.data) + (a.hard != b.hard) for a, b in pairwise(stages)]
    assert one_thing == [1, 1, 1]


def test_labels_are_read_in_the_last_stage_only(world):
    class Unreadable:
        """A label that may be carried around but not used."""

    first = world["task_data"]
    world["task_data"] = [{**batch, "labels": Unreadable()} for batch in first]
    stages = ernie_tiny_stages(**world, steps=(1, 1, 3, 1))
    student = bert(seed=1)
    progressive_distill(student, stages[:3])
    with pytest.raises(AttributeError):
        progressive_distill(student, stages[3:])


def test_stages_one_by_one_are_the_stages_at_once(world):
    """So a run that was stopped after a stage goes on as if it had not been, from the saved weights."""
    stages = ernie_tiny_stages(**world, steps=(3, 3, 3, 3))
    at_once = progressive_distill(bert(seed=1), stages)
    student, projection = bert(seed=1), nn.Linear(8, 12, bias=False)
    nn.init.eye_(projection.weight)
    progressive_distill(student, stages[:2], projection=projection)
    saved = copy.deepcopy((student.state_dict(), projection.state_dict()))
    student, projection = bert(seed=7), nn.Linear(8, 12, bias=False)
    student.load_state_dict(saved[0])
    projection.load_state_dict(saved[1])
    progressive_distill(student, stages[2:], projection=projection)
    for mine, its in zip(student.parameters(), at_once.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_the_loop_learns_reports_and_leaves_no_trace(world):
    student, seen = bert(seed=1).eval(), []
    before = copy.deepcopy(world["finetuned_teacher"].state_dict())
    stages = ernie_tiny_stages(**world, steps=(0, 40, 40, 5), lr=(1e-2, 1e-2, 1e-3, 1e-3))
    progressive_distill(student, stages, callback=lambda *event: seen.append(event))
    assert [(name, step) for name, step, _ in seen[:2]] == [("GED", 1), ("GED", 2)]
    assert len(seen) == 85
    assert seen[39][2] < 0.7 * seen[0][2]
    assert not student.training
    assert not hasattr(student, "hidden_projection")
    torch.testing.assert_close(world["finetuned_teacher"].state_dict(), before)


def test_the_real_minilm_teaches_a_tiny_student():
    """Four stages over all-MiniLM-L6-v2: its encoder, its tokenizer, real sentences."""
    try:
        folder = data.load("minilm")
    except data.DataMissing:
        pytest.skip("minilm is not here")
    pretrained = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    config = copy.deepcopy(pretrained.config)
    config.num_labels = 2
    torch.manual_seed(0)
    finetuned = BertForSequenceClassification._from_config(config, attn_implementation="eager").eval()
    finetuned.bert.load_state_dict(pretrained.state_dict())
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 24, 48, 3
    student = BertForSequenceClassification._from_config(config, attn_implementation="eager")

    texts = ["Return the largest eigenvalue.", "Open a socket.", "Sort a list in place.", "The mean of each column."]
    batch = dict(AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt"))
    labelled = [{**batch, "labels": torch.tensor([0, 1, 1, 0])}]
    seen = []
    stages = ernie_tiny_stages(pretrained, finetuned, [batch], labelled, steps=(4, 2, 2, 2), lr=(5e-3,) * 4)
    progressive_distill(student, stages, callback=lambda *event: seen.append(event))
    assert [name for name, _, _ in seen] == ["GD"] * 4 + ["GED"] * 2 + ["TAD"] * 2 + ["TSD"] * 2
    assert seen[3][2] < seen[0][2]
    assert all(math.isfinite(value) for _, _, value in seen)


# Bad input


def test_bad_settings_of_the_losses(batch):
    outputs = read(bert(), batch)
    attentions, hidden, logits = outputs.attentions, outputs.hidden_states, outputs.logits
    with pytest.raises(ValueError, match="no multiple of the student's 2"):
        attention_distillation_loss(attentions, attentions[:1] * 3)
    for layer_map in ([1], [0, 1], [1, 3]):
        with pytest.raises(ValueError, match="layer_map must name a teacher's layer, 1 to 2"):
            attention_distillation_loss(attentions, attentions, layer_map=layer_map)
    with pytest.raises(ValueError, match="eager"):
        attention_distillation_loss((), attentions)
    with pytest.raises(ValueError, match="teacher_hidden must be"):
        hidden_distillation_loss(hidden, (), nn.Identity())
    with pytest.raises(ValueError, match="projection's output must have shape"):
        hidden_distillation_loss(hidden, hidden, nn.Linear(8, 4))
    for temperature in (0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            label_distillation_loss(logits, logits, LABELS, temperature)
    with pytest.raises(ValueError, match="soft_weight must be at least 0"):
        label_distillation_loss(logits, logits, LABELS, soft_weight=-1.0)
    with pytest.raises(ValueError, match="labels must be given"):
        label_distillation_loss(logits, logits)
    with pytest.raises(ValueError, match="one column for a regression"):
        label_distillation_loss(logits, logits, LABELS, problem="regression")


def test_bad_models(batch):
    student, teacher = bert(seed=1), bert(seed=2)
    with pytest.raises(ValueError, match="share one vocabulary, got 40 and 50"):
        DistillationLoss(student, bert(vocab_size=50))
    with pytest.raises(ValueError, match="teacher must be in evaluation mode"):
        DistillationLoss(student, bert().train())
    flash = BertModel._from_config(BertConfig(**SIZES, hidden_size=8), attn_implementation="sdpa").eval()
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        DistillationLoss(student, flash)
    with pytest.raises(ValueError, match="latent must be at least 0"):
        DistillationLoss(student, teacher, latent=-1.0)
    with pytest.raises(ValueError, match="must not all be 0"):
        DistillationLoss(student, teacher, latent=0.0)
    with DistillationLoss(student, teacher) as loss:
        with pytest.raises(ValueError, match="close the one before"):
            DistillationLoss(student, teacher)
        with pytest.raises(ValueError, match="with keywords"):
            student(batch["input_ids"])
        outputs = student(**batch)
        loss(outputs)
        with pytest.raises(ValueError, match="not called since"):
            loss(outputs)
    assert not hasattr(student, "hidden_projection")


def test_bad_stages(world):
    stages = ernie_tiny_stages(**world, steps=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="steps of stage GED must be at least 0"):
        ernie_tiny_stages(**world, steps=(1, -1, 1, 1))
    with pytest.raises(ValueError, match="lr of stage GD must be positive"):
        ernie_tiny_stages(**world, steps=(1, 1, 1, 1), lr=(0.0, 1e-3, 1e-3, 1e-3))
    for wrong in ({"warmup": 1.0}, {"weight_decay": -1.0}, {"clip": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            progressive_distill(bert(), stages, **wrong)
    spent = (batch for batch in ())
    with pytest.raises(ValueError, match="data of stage GD must have batches"):
        progressive_distill(bert(), [Stage("GD", bert(), spent, 1, 1e-3)])
    with pytest.raises(ValueError, match="labels must be given"):
        progressive_distill(bert(), [Stage("TSD", bert(), world["general_data"], 1, 1e-3, hard=1.0)])
