"""Deep incubation: who owns what, hybrid networks against composition by hand, processes, and what it refuses."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from firsthand.weights.deep_incubation import (
    assemble,
    hybrid_network,
    incubate,
    incubate_apart,
    meta_model,
    module_state,
    split_modules,
    trainable_parameters,
)
from firsthand.weights.layers import find_layers
from training_step import step_by_number

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
ZERO = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def vit(layers=4):
    return ViTForImageClassification(
        ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, num_hidden_layers=layers, **SMALL, **ZERO)
    )


def bert(layers=4):
    return BertForSequenceClassification(
        BertConfig(vocab_size=20, max_position_embeddings=16, num_labels=3, num_hidden_layers=layers, **SMALL, **ZERO)
    )


def llama(layers=4):
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=16, num_hidden_layers=layers, **SMALL))


def gpt2(layers=4):
    rest = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=layers, n_head=2, **rest))


MODELS = {"vit": vit, "bert": bert, "llama": llama, "gpt2": gpt2}
IMAGES = torch.linspace(-1, 1, 5 * 16).view(5, 1, 4, 4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(name):
    return {"pixel_values": IMAGES} if name == "vit" else {"input_ids": torch.arange(30).view(5, 6) % 20}


def logits(model, name="vit"):
    return model(**inputs(name)).logits


def task_loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(pixel_values=images).logits, labels)


def batches(count=3):
    return [(IMAGES, torch.tensor([0, 1, 2, 0, 1]))] * count


@pytest.mark.parametrize("name", MODELS)
def test_the_groups_are_a_partition_in_order(name):
    model = MODELS[name]()
    groups = split_modules(model, 2)
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(names) == len(set(names))
    first, last = groups
    assert any("embed" in each or "wte" in each for each in first)
    assert any("norm" in each or "ln_f" in each or "pooler" in each for each in last)
    assert not any("embed" in each or "wte" in each for each in last)


def test_modules_may_be_of_several_depths():
    path = f"{find_layers(vit())}."
    groups = split_modules(vit(), 3, depths=[1, 2, 1])
    layers = [{each.removeprefix(path)[0] for each in group if each.startswith(path)} for group in groups]
    assert layers == [{"0"}, {"1", "2"}, {"3"}]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("index", [0, 1])
def test_a_copy_of_the_meta_module_gives_the_meta_model(name, index):
    meta = meta_model(MODELS[name](), 2).eval()
    target = meta_model(MODELS[name](), 2).eval()
    target.load_state_dict(meta.state_dict())
    hybrid = hybrid_network(meta, target, index, 2).eval()
    torch.testing.assert_close(logits(hybrid, name), logits(meta, name))


@pytest.mark.parametrize("name", MODELS)
def test_a_hybrid_runs_the_layers_in_order_and_trains_one_module(name):
    """The gradient is that of a network put together by hand, with everything trainable."""
    target, meta = MODELS[name](), meta_model(MODELS[name](), 2)
    groups = split_modules(target, 2)
    for index in range(2):
        hybrid = hybrid_network(meta, target, index, 2)
        own = {id(target.get_parameter(each)) for each in groups[index]}
        assert {id(each) for each in trainable_parameters(hybrid)} == own
        assert all(id(each) not in own or each.requires_grad for each in hybrid.parameters())
        by_hand = copy.deepcopy(hybrid).requires_grad_(True)
        logits(hybrid, name).square().sum().backward()
        logits(by_hand, name).square().sum().backward()
        for (path, one), other in zip(hybrid.named_parameters(), by_hand.parameters(), strict=True):
            if id(one) in own:
                torch.testing.assert_close(one.grad, other.grad, msg=path)
            else:
                assert one.grad is None
        target.zero_grad()


def test_depth_of_a_hybrid_and_its_order():
    target, meta = vit(6), meta_model(vit(), 3)
    path = find_layers(target)
    hybrid = hybrid_network(meta, target, 1, 3)
    made, deep, own = (each.get_submodule(path) for each in (hybrid, target, meta))
    assert len(made) == 4 == hybrid.config.num_hidden_layers
    assert made[1] is deep[2]
    assert made[2] is deep[3]
    torch.testing.assert_close(made[0].state_dict(), own[0].state_dict())
    torch.testing.assert_close(made[3].state_dict(), own[2].state_dict())
    assert meta.config.num_hidden_layers == 3


@pytest.mark.parametrize("mode", ["incubation", "imitation"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_step_changes_one_module_and_nothing_else(mode, index):
    target, meta = vit(), meta_model(vit(), 2)
    before, meta_before = copy.deepcopy(target.state_dict()), copy.deepcopy(meta.state_dict())
    incubate(meta, target, index, 2, batches(1), task_loss, mode=mode)
    changed = {name for name, weight in target.state_dict().items() if not torch.equal(weight, before[name])}
    own = set(split_modules(target, 2)[index])
    assert changed
    assert changed <= own
    assert {name for name in own if "query.weight" in name or "q_proj.weight" in name} <= changed
    assert all(torch.equal(weight, meta_before[name]) for name, weight in meta.state_dict().items())


def test_one_module_is_ordinary_training():
    target, meta, plain = vit(), meta_model(vit(), 1), vit()
    plain.load_state_dict(target.state_dict())
    incubate(meta, target, 0, 1, batches(3), task_loss, lr=1e-2, weight_decay=0.05)
    optimizer = torch.optim.AdamW(plain.train().parameters(), lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3, eta_min=1e-4)
    for batch in batches(3):
        optimizer.zero_grad()
        task_loss(plain, batch).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(target.state_dict(), plain.state_dict())


def test_imitation_comes_closer_to_the_meta_modules_output():
    target, meta = vit(), meta_model(vit(), 2).eval()

    def distance():
        return F.mse_loss(logits(hybrid_network(meta, target, 1, 2).eval()), logits(meta)).item()

    before = distance()
    incubate(meta, target, 1, 2, batches(20), task_loss, mode="imitation", lr=1e-2)
    assert distance() < 0.1 * before


def test_incubation_learns_the_task():
    target, meta = vit(), meta_model(vit(), 2)
    batch = (torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1]))
    incubate(meta_model(vit(), 1), meta, 0, 1, [batch] * 60, task_loss, lr=1e-2)  # with one module, ordinary training
    assert task_loss(meta.eval(), batch).item() < 0.3
    before = task_loss(hybrid_network(meta, target, 0, 2), batch).item()
    incubate(meta, target, 0, 2, [batch] * 60, task_loss, lr=1e-2)
    assert task_loss(hybrid_network(meta, target, 0, 2), batch).item() < 0.5 * before


@pytest.mark.parametrize("name", MODELS)
def test_a_model_taken_apart_and_put_together_is_the_same(name):
    model = MODELS[name]()
    states = [module_state(model, names) for names in split_modules(model, 2)]
    again = assemble(MODELS[name](), states)
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    states[0][next(iter(states[0]))].zero_()
    torch.testing.assert_close(again.state_dict(), model.state_dict())  # nothing is shared


def test_parts_that_do_not_make_a_model():
    model = vit()
    first, second = (module_state(model, names) for names in split_modules(model, 2))
    with pytest.raises(ValueError, match="each parameter of the model once"):
        assemble(model, [first])
    with pytest.raises(ValueError, match="each parameter of the model once"):
        assemble(model, [first, second, first])
    name = next(iter(first))
    with pytest.raises(ValueError, match="must have shape"):
        assemble(model, [{**first, name: first[name].new_zeros(1)}, second])


def test_processes_train_modules_apart_and_go_on_where_they_were(tmp_path):
    target, meta, log = vit(), meta_model(vit(), 2), tmp_path / "log"
    before = copy.deepcopy(target.state_dict())
    train = partial(step_by_number, log=log)
    made = incubate_apart(meta, target, 2, train, tmp_path / "modules", workers=2)
    expected = copy.deepcopy(target)
    for index in range(2):
        train(hybrid_network(meta, expected, index, 2), index)
    torch.testing.assert_close(made.state_dict(), expected.state_dict())
    torch.testing.assert_close(target.state_dict(), before)

    log.unlink()
    (tmp_path / "modules" / "module-1.safetensors").unlink()  # as if it had been killed
    again = incubate_apart(meta, target, 2, train, tmp_path / "modules", workers=2)
    assert log.read_text() == "1\n"
    torch.testing.assert_close(again.state_dict(), made.state_dict())
    with pytest.raises(ValueError, match="other parameters"):
        incubate_apart(meta, target, 2, train, tmp_path / "modules", depths=[1, 3])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: split_modules(vit(), 3), "divide the number of layers, 4"),
        (lambda: split_modules(vit(), 0), "at least 1"),
        (lambda: split_modules(vit(), 2, depths=[4, 0]), "sum to 4"),
        (lambda: meta_model(vit(), 2, 0), "at least 1"),
        (lambda: hybrid_network(meta_model(vit(), 2), vit(), 2, 2), "index"),
        (lambda: hybrid_network(bert(2), vit(), 0, 2), "class of target"),
        (lambda: hybrid_network(wide(), vit(), 0, 2), "widths of target"),
        (lambda: incubate(meta_model(vit(), 2), vit(), 0, 2, batches(), task_loss, mode="hope"), "mode"),
        (lambda: incubate(meta_model(vit(), 2), vit(), 0, 2, batches(), task_loss, lr=0.0), "lr"),
        (lambda: incubate_apart(meta_model(vit(), 2), vit(), 2, print, "none", workers=0), "workers"),
    ],
)
def test_bad_input(call, expected):
    with pytest.raises(ValueError, match=expected):
        call()


def wide():
    config = {**SMALL, "hidden_size": 32}
    return ViTForImageClassification(
        ViTConfig(image_size=4, patch_size=2, num_channels=1, num_labels=3, num_hidden_layers=2, **config)
    )
