import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from firsthand import Trial
from firsthand.distill.llava_mod import (
    BalancedRouter,
    MimicLoss,
    mimic_distillation_loss,
    moe_aux_loss,
    train_only_ffn,
    upcycle_ffn,
)
from firsthand.moe.blocks import moe_blocks
from firsthand.testbeds import captions

VOCAB = 40


def llama(seed=0, **sizes):
    torch.manual_seed(seed)
    defaults = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, initializer_range=0.2, **(defaults | sizes))
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def logits():
    """Of a student and a teacher, and labels with 2 and 4 response tokens."""
    student, teacher = torch.randn(2, 2, 6, 11, generator=torch.Generator().manual_seed(0)) * 3
    labels = torch.tensor([[-100, -100, -100, 4, 9, -100], [-100, -100, 1, 2, 3, 10]])
    return student, teacher, labels


# Upcycling


@pytest.mark.parametrize("layers", ["alternate", "first_half", "second_half", "all", [1, -1]])
def test_the_upcycled_model_computes_what_the_dense_one_did(layers, tokens):
    dense = llama()
    sparse = upcycle_ffn(copy.deepcopy(dense), layers=layers)
    torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5)
    indices = [int(block.name.split(".")[-2]) for block in moe_blocks(sparse)]
    expected = {"alternate": [0, 2], "first_half": [0, 1], "second_half": [2, 3], "all": [0, 1, 2, 3]}
    assert indices == (expected[layers] if isinstance(layers, str) else [1, 3])
    assert all(block.num_experts == 4 and block.top_k == 2 for block in moe_blocks(sparse))


def test_the_upcycled_model_computes_in_bfloat16(tokens):
    dense = llama().to(torch.bfloat16)
    sparse = upcycle_ffn(copy.deepcopy(dense))
    torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits, atol=0.1, rtol=0.05)


def test_hosts_with_biases_and_without_gates(tokens):
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.2)
    sparse = upcycle_ffn(copy.deepcopy(dense), num_experts=3, layers="all")
    torch.testing.assert_close(sparse(tokens).logits, dense(tokens).logits, atol=1e-4, rtol=1e-4)
    trained = {name for name, parameter in train_only_ffn(dense).named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in dense.named_parameters() if ".mlp." in name}


def test_only_the_language_model_of_a_llava_is_upcycled():
    dense = captions.llava(Trial(seed=3).generator, 2).eval()
    batch = captions.prompt(torch.rand(2, 8, 16, generator=torch.Generator().manual_seed(0)))
    sparse = upcycle_ffn(copy.deepcopy(dense))
    torch.testing.assert_close(sparse(**batch).logits, dense(**batch).logits, atol=1e-5, rtol=1e-5)
    assert [block.name for block in moe_blocks(sparse)] == ["model.language_model.layers.0.mlp"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert sparse.generate(**batch, **settings).equal(dense.generate(**batch, **settings))


def test_routers_come_from_the_generator():
    state = torch.get_rng_state()
    one, other = (upcycle_ffn(llama(), generator=torch.Generator().manual_seed(5)).state_dict() for _ in range(2))
    assert all(one[name].equal(other[name]) for name in one)
    torch.set_rng_state(state)
    upcycle_ffn(llama(), generator=torch.Generator())
    weight = torch.cat([block.router.weight for block in moe_blocks(upcycle_ffn(llama(), 64, router_std=0.5))])
    assert weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_only_feed_forward_blocks_and_routers_train(tokens):
    sparse = train_only_ffn(upcycle_ffn(llama()))
    trained = {name for name, parameter in sparse.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in sparse.named_parameters() if ".mlp." in name}
    assert any("router" in name for name in trained)
    assert any("gate_proj.weight" in name for name in trained), "the dense blocks between"


def test_training_makes_experts_differ_and_copies_and_saves(tokens, tmp_path):
    sparse = upcycle_ffn(llama())
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for _ in range(2):
        loss = sparse(input_ids=tokens, labels=tokens).loss + 0.01 * moe_aux_loss(sparse)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first = moe_blocks(sparse)[0].experts.down_proj
    assert not first[0].allclose(first[1])
    copied = copy.deepcopy(sparse)
    assert copied(tokens).logits.equal(sparse(tokens).logits)
    torch.save(sparse.state_dict(), tmp_path / "weights.pt")
    loaded = upcycle_ffn(llama(seed=1))
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert loaded(tokens).logits.equal(sparse(tokens).logits)


def test_balance_of_a_uniform_router_is_1_a_layer_and_of_a_stuck_one_the_number_of_experts(tokens):
    sparse = upcycle_ffn(llama(), router_std=0.0)
    sparse(tokens)
    assert moe_aux_loss(sparse).item() == pytest.approx(2)
    router = BalancedRouter(3, 4, 2)
    with torch.no_grad():
        router.weight.zero_()[1] = 100.0
    router(torch.ones(5, 3))
    assert moe_aux_loss(router).item() == pytest.approx(4)


def test_balance_is_what_the_equation_says():
    torch.manual_seed(0)
    router, x = BalancedRouter(8, 4, 2), torch.randn(20, 8) * 30
    router(x)
    p = (x @ router.weight.T).softmax(dim=1)
    first = F.one_hot(p.argmax(dim=1), 4).float()
    torch.testing.assert_close(moe_aux_loss(router), 4 * (p.mean(dim=0) * first.mean(dim=0)).sum())
    moe_aux_loss(router).backward()
    assert router.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
        ({"layers": "sparse"}, "layers must be numbers or one of alternate, .*'sparse'"),
        ({"layers": [4]}, "numbers in"),
        ({"router_std": -1.0}, "router_std must be at least 0"),
    ],
)
def test_bad_upcycling(arguments, message):
    with pytest.raises(ValueError, match=message):
        upcycle_ffn(llama(), **arguments)


def test_models_that_cannot_be_upcycled():
    with pytest.raises(ValueError, match="no feed-forward block of a known form"):
        upcycle_ffn(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model must be dense, got one with MoE in layers\.0"):
        upcycle_ffn(upcycle_ffn(llama()))
    with pytest.raises(ValueError, match="got 0 routers"):
        moe_aux_loss(llama())
    with pytest.raises(ValueError, match="got 2 routers, 0 of them called"):
        moe_aux_loss(upcycle_ffn(llama()))


# Mimic


def kl(student, teacher):
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_mimic_loss_is_the_mean_kl_where_the_response_is_predicted(logits, chunk):
    student, teacher, labels = logits
    rows = [(0, 2), (0, 3), (1, 1), (1, 2), (1, 3), (1, 4)]
    each = torch.stack([kl(student[row], teacher[row]) for row in rows])
    torch.testing.assert_close(mimic_distillation_loss(student, teacher, labels, reduction="none", chunk=chunk), each)
    torch.testing.assert_close(mimic_distillation_loss(student, teacher, labels, chunk=chunk), each.mean())
    torch.testing.assert_close(mimic_distillation_loss(student, teacher, labels, reduction="sum"), each.sum())


def test_without_the_shift_the_positions_of_the_response_itself_count(logits):
    student, teacher, labels = logits
    expected = kl(student, teacher)[labels != -100].mean()
    torch.testing.assert_close(mimic_distillation_loss(student, teacher, labels, shift=False), expected)


def test_all_tokens(logits):
    student, teacher, labels = logits
    loss = mimic_distillation_loss(student, teacher, labels, tokens="all")
    torch.testing.assert_close(loss, kl(student, teacher)[:, :-1].mean())
    unshifted = mimic_distillation_loss(student, teacher, labels, tokens="all", shift=False)
    torch.testing.assert_close(unshifted, kl(student, teacher).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_student_that_is_its_teacher_costs_nothing_but_entropy(logits, dtype):
    _, teacher, labels = logits
    teacher = teacher.to(dtype)
    student = teacher.clone().requires_grad_()
    loss = mimic_distillation_loss(student, teacher, labels)
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.abs() < 1e-6
    assert student.grad.abs().max() < 1e-6
    wide = teacher.to(loss.dtype).log_softmax(-1)
    entropy = -(wide.exp() * wide).sum(-1)[:, :-1][labels[:, 1:] != -100].mean()
    torch.testing.assert_close(mimic_distillation_loss(student, teacher, labels, subtract_entropy=False), entropy)


@pytest.mark.parametrize("subtract_entropy", [True, False])
@pytest.mark.parametrize("chunk", [2, 1024])
def test_gradient_is_that_of_cross_entropy_weighted_by_the_teacher(logits, subtract_entropy, chunk):
    student, teacher, labels = logits
    student.requires_grad_()
    loss = mimic_distillation_loss(student, teacher, labels, subtract_entropy=subtract_entropy, chunk=chunk)
    (gradient,) = torch.autograd.grad(3 * loss, student)
    soft = F.cross_entropy(student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1).softmax(-1), reduction="none")
    (expected,) = torch.autograd.grad(3 * soft[labels[:, 1:].flatten() != -100].mean(), student)
    torch.testing.assert_close(gradient, expected)


def test_gradient_is_numerically_right_and_the_teacher_gets_none(logits):
    student, teacher, labels = (part.double() if part.is_floating_point() else part for part in logits)
    student.requires_grad_()
    teacher.requires_grad_()
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda x: (weights * mimic_distillation_loss(x, teacher, labels, reduction="none", chunk=4)).sum(), (student,)
    )
    mimic_distillation_loss(student, teacher, labels).backward()
    assert teacher.grad is None


def test_forbidden_tokens_count_for_nothing(logits):
    student, teacher, labels = logits
    student[..., 3] = teacher[..., 3] = -math.inf
    student.requires_grad_()
    kept = [token for token in range(11) if token != 3]
    for subtract_entropy in (True, False):
        loss = mimic_distillation_loss(student, teacher, labels, subtract_entropy=subtract_entropy)
        without = mimic_distillation_loss(student[..., kept], teacher[..., kept], labels, subtract_entropy=subtract_entropy)
        torch.testing.assert_close(loss, without)
    loss.backward()
    assert student.grad.isfinite().all()


def test_vocabularies_are_cut_to_what_they_share(logits):
    student, teacher, labels = logits
    loss = mimic_distillation_loss(student[..., :9], teacher, labels, vocab=8)
    torch.testing.assert_close(loss, mimic_distillation_loss(student[..., :8], teacher[..., :8], labels))


def test_bad_mimicry(logits):
    student, teacher, labels = logits
    for arguments, message in (
        ({"tokens": "some"}, "tokens must be"),
        ({"reduction": "batchmean"}, "reduction must be"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"vocab": 12}, r"vocab must be in \[1, 11\]"),
    ):
        with pytest.raises(ValueError, match=message):
            mimic_distillation_loss(student, teacher, labels, **arguments)
    with pytest.raises(ValueError, match="must share one vocabulary, got 9 and 11 ids"):
        mimic_distillation_loss(student[..., :9], teacher, labels)
    with pytest.raises(ValueError, match="labels must have a response token"):
        mimic_distillation_loss(student, teacher, torch.full_like(labels, -100))


# The teacher at work


def response_only(tokens):
    labels = tokens.clone()
    labels[:, :3] = -100
    labels[0, 5:] = -100
    return labels


def test_mimic_loss_in_a_plain_loop(tokens):
    student, teacher, labels = upcycle_ffn(llama(hidden_size=16)), llama(seed=1), response_only(tokens)
    with MimicLoss(student, teacher, lm_weight=1.0, aux_coef=0.01) as loss:
        outputs = student(input_ids=tokens, labels=labels)
        value = loss(outputs, labels)
        expected = (
            mimic_distillation_loss(outputs.logits, teacher(tokens).logits, labels) + outputs.loss + 0.01 * moe_aux_loss(student)
        )
        torch.testing.assert_close(value, expected)
        value.backward()
        assert all(parameter.grad is None for parameter in teacher.parameters())
        assert moe_blocks(student)[0].router.weight.grad is not None
        with pytest.raises(ValueError, match="was not called since"):
            loss(outputs, labels)
        with pytest.raises(ValueError, match="called with keywords"):
            student(tokens)
    student(tokens)  # no longer watched


def test_mimic_loss_sees_the_pictures():
    trial = Trial(seed=3)
    student, teacher = captions.llava(trial.generator, 2, hidden=16), captions.llava(trial.generator, 2).eval()
    batch = captions.encode(captions.tokenizer(), torch.rand(2, 8, 16, generator=trial.generator), ["a one", "a one"])
    with MimicLoss(student, teacher) as loss:
        value = loss(student(**batch), batch["labels"])
    taught = teacher(**{name: value for name, value in batch.items() if name != "labels"}).logits
    torch.testing.assert_close(value, mimic_distillation_loss(student(**batch).logits, taught, batch["labels"]))


def test_accumulated_batches_are_one_batch(tokens):
    student, teacher, labels = llama(), llama(seed=1), response_only(tokens)
    items = (labels[:, 1:] != -100).sum()
    with MimicLoss(student, teacher, lm_weight=0.5) as loss:
        whole = loss(student(input_ids=tokens), labels)
        parts = [
            loss(student(input_ids=tokens[rows]), labels[rows], num_items_in_batch=items) for rows in (slice(1), slice(1, 3))
        ]
    torch.testing.assert_close(sum(parts), whole)


def test_mimic_loss_in_trainer(tmp_path, tokens):
    """Two accumulated batches of Trainer move the student as one step on both does."""
    teacher, labels = llama(seed=1), response_only(tokens)[:2]
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(tokens[:2], labels, strict=True)]
    by_trainer, by_hand = llama(num_hidden_layers=2), llama(num_hidden_layers=2)
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        dataloader_pin_memory=False,
    )
    with MimicLoss(by_trainer, teacher, lm_weight=1.0) as loss:
        Trainer(by_trainer, settings, train_dataset=rows, compute_loss_func=loss).train()
    with MimicLoss(by_hand, teacher, lm_weight=1.0) as loss:
        loss(by_hand(input_ids=tokens[:2]), labels).backward()
    torch.optim.SGD(by_hand.parameters(), lr=0.1).step()
    for (name, one), other in zip(by_trainer.named_parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_bad_mimics():
    student, teacher = llama(), llama(seed=1)
    with pytest.raises(ValueError, match="lm_weight must be at least 0"):
        MimicLoss(student, teacher, lm_weight=-1.0)
    with pytest.raises(ValueError, match="aux_coef must be at least 0 and finite, got inf"):
        MimicLoss(student, teacher, aux_coef=math.inf)
    with pytest.raises(ValueError, match="evaluation mode"):
        MimicLoss(student, teacher.train())
    with pytest.raises(ValueError, match="leave reduction and ignore_index alone"):
        MimicLoss(student, teacher.eval(), reduction="sum")
