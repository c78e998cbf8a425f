import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from firsthand.weights.layers import layer_weights
from firsthand.weights.sws import StageSharedModel, expansion_schedule, layer_stages, stagewise_expand

# transformers has a new name for it, which its first releases of version 5 do not know.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

REPEATS = [2, 1, 2]
DEPTH = 5
TEXT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
}
BUILD = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**IMAGE, num_hidden_layers=DEPTH, num_labels=3)),
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=DEPTH, n_head=2, n_positions=32)),
}
every_host = pytest.mark.parametrize("host", BUILD)


def build(host="vit"):
    """With weights far from the initial ones, so that one in a wrong place shows."""
    torch.manual_seed(0)
    model = BUILD[host]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def shared(host="vit", repeats=REPEATS):
    return StageSharedModel(build(host), repeats).eval()


def inputs(host="vit"):
    generator = torch.Generator().manual_seed(2)
    if host == "vit":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(48, (2, 9), generator=generator)}


def layers_of(count):
    generator = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(2, 3, generator=generator), "b": torch.randn(3, generator=generator)} for _ in range(count)]


# --- which layer is in which stage


def test_the_papers_auxiliary_model_and_its_one_published_map():
    assert layer_stages([3, 3, 4, 3, 3]) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert expansion_schedule(12, 5) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]


def test_fewer_layers_than_stages():
    assert expansion_schedule(3, 5) == [0, 2, 4]
    assert expansion_schedule(2, 5) == [0, 4]
    assert expansion_schedule(1, 5) == [0]


@given(layers=st.integers(1, 60), stages=st.integers(1, 12))
def test_a_schedule_spreads_its_layers_in_order(layers, stages):
    schedule = expansion_schedule(layers, stages)
    assert len(schedule) == layers
    assert schedule == sorted(schedule)
    counts = [schedule.count(stage) for stage in range(stages)]
    if layers >= stages:
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)
    else:
        assert max(counts) == 1
        assert schedule[0] == 0
        assert layers == 1 or schedule[-1] == stages - 1


def test_maps_that_are_none():
    for repeats in ([], [2, 0]):
        with pytest.raises(ValueError, match="repeats must be at least one number, each at least 1"):
            layer_stages(repeats)
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        expansion_schedule(0, 3)
    with pytest.raises(ValueError, match="num_stages must be at least 1, got -1"):
        expansion_schedule(3, -1)


# --- stagewise_expand


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_are_copies_of_their_stages(dtype):
    stages = [{name: weight.to(dtype) for name, weight in layer.items()} for layer in layers_of(2)]
    layers = stagewise_expand(stages, [0, 0, 1])
    for layer, stage in zip(layers, [0, 0, 1], strict=True):
        assert layer.keys() == stages[stage].keys()
        assert all(torch.equal(layer[name], stages[stage][name]) for name in layer)
        assert layer["w"].dtype == dtype
    layers[0]["w"].zero_()
    assert torch.equal(layers[1]["w"], stages[0]["w"])
    assert stages[0]["w"].any()


def test_gradients_of_a_stage_add_up():
    stages = layers_of(2)
    stages[0]["w"].requires_grad_()
    layers = stagewise_expand(stages, [0, 0, 1])
    (2 * layers[0]["w"] + 3 * layers[1]["w"]).sum().backward()
    torch.testing.assert_close(stages[0]["w"].grad, torch.full((2, 3), 5.0))


def test_stages_out_of_order_or_range():
    with pytest.raises(ValueError, match=r"layer_to_stage must never decrease .*got \[1, 0\]"):
        stagewise_expand(layers_of(2), [1, 0])
    assert len(stagewise_expand(layers_of(2), [1, 0], allow_unordered=True)) == 2
    for stage in (-1, 2):
        with pytest.raises(ValueError, match=rf"layer_to_stage must be in \[0, 2\), got {stage}"):
            stagewise_expand(layers_of(2), [0, stage])
    with pytest.raises(ValueError, match="at least one layer, got none"):
        stagewise_expand(layers_of(2), [])


# --- StageSharedModel


@every_host
def test_without_repeats_it_is_the_model(host):
    model = build(host)
    wrapped = StageSharedModel(model, [1] * DEPTH).eval()
    torch.testing.assert_close(wrapped(**inputs(host)).logits, model(**inputs(host)).logits)
    assert sum(p.numel() for p in wrapped.parameters()) == sum(p.numel() for p in model.parameters())


@every_host
def test_expanded_by_its_own_map_it_computes_the_same(host):
    model = shared(host)
    expanded = model.expand()
    assert type(expanded) is type(build(host))
    torch.testing.assert_close(expanded(**inputs(host)).logits, model(**inputs(host)).logits)
    again = model.expand(layer_to_stage=[0, 0, 1, 2, 2])
    torch.testing.assert_close(again(**inputs(host)).logits, model(**inputs(host)).logits)


@every_host
@pytest.mark.parametrize("depth", [1, 2, 7])
def test_any_depth_and_no_ties(host, depth):
    model = shared(host)
    expanded = model.expand(depth)
    layers = layer_weights(expanded)
    assert len(layers) == expanded.config.num_hidden_layers == depth
    for layer, stage in zip(layers, expansion_schedule(depth, 3), strict=True):
        for name, weight in model.stage_layers()[stage].items():
            assert torch.equal(layer[name], weight)
    assert len({weight.data_ptr() for layer in layers for weight in layer.values()}) == depth * len(layers[0])
    assert not {weight.data_ptr() for weight in expanded.parameters()} & {weight.data_ptr() for weight in model.parameters()}
    assert expanded(**inputs(host)).logits.shape == model(**inputs(host)).logits.shape


@every_host
def test_a_stage_has_the_sum_of_the_gradients_of_its_layers(host):
    model = shared(host)
    unshared = model.expand()
    for each in (model, unshared):
        each(**inputs(host)).logits.square().mean().backward()
    layers = layer_weights(unshared)
    for stage, weights in enumerate(model.stage_layers()):
        for name, weight in weights.items():
            expected = sum(layer[name].grad for layer, its in zip(layers, model.stages, strict=True) if its == stage)
            torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-5)


@every_host
def test_it_holds_one_layer_a_stage(host):
    model = build(host)
    of_layer = sum(weight.numel() for weight in layer_weights(model)[0].values())
    size = sum(parameter.numel() for parameter in shared(host).parameters())
    assert size == sum(parameter.numel() for parameter in model.parameters()) - (DEPTH - len(REPEATS)) * of_layer


def test_one_stage_is_albert():
    """BERT with all layers shared, against transformers' ALBERT with one group: the same weights, output and gradients."""
    sizes = TEXT | {"hidden_act": "gelu"}
    torch.manual_seed(0)
    bert = BertForMaskedLM(BertConfig(**sizes)).bert
    model = StageSharedModel(bert, [DEPTH]).eval()
    albert = AlbertModel(AlbertConfig(**sizes, embedding_size=16, num_hidden_groups=1), add_pooling_layer=False).eval()
    block, group = model.stage_layers()[0], albert.encoder.albert_layer_groups[0].albert_layers[0]
    with torch.no_grad():
        for theirs, ours in zip(albert.embeddings.parameters(), bert.embeddings.parameters(), strict=True):
            theirs.copy_(ours)
        hidden = albert.encoder.embedding_hidden_mapping_in
        hidden.weight.copy_(torch.eye(16))
        hidden.bias.zero_()
        renamed = {albert_name(name): weight for name, weight in block.items()}
        assert renamed.keys() == dict(group.named_parameters()).keys()
        group.load_state_dict(renamed)
    ours, theirs = (each(**inputs("bert")).last_hidden_state for each in (model, albert))
    torch.testing.assert_close(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for name, weight in block.items():
        torch.testing.assert_close(weight.grad, group.get_parameter(albert_name(name)).grad, rtol=1e-3, atol=1e-4)


def albert_name(name):
    for theirs, ours in (
        ("attention.self.", "attention."),
        ("attention.output.dense.", "attention.dense."),
        ("attention.output.LayerNorm.", "attention.LayerNorm."),
        ("intermediate.dense.", "ffn."),
        ("output.dense.", "ffn_output."),
        ("output.LayerNorm.", "full_layer_layer_norm."),
    ):
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    raise AssertionError(name)


def test_what_a_step_changes_stays_shared():
    model = shared().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(set(optimizer.param_groups[0]["params"]))
    model(**inputs()).logits.square().sum().backward()
    optimizer.step()
    layers = layer_weights(model.model)
    assert all(torch.equal(layers[0][name], layers[1][name]) for name in layers[0])
    assert not torch.equal(layers[0]["mlp.fc1.weight"], layers[2]["mlp.fc1.weight"])
    for moved in (model.to(torch.bfloat16), model.to(torch.float32)):
        assert all(mine is its for mine, its in zip(*(moved.model.vit.layers[i].parameters() for i in (0, 1)), strict=True))


def test_generation_and_checkpointing_work_as_ever():
    model = shared("llama")
    prompt = torch.randint(48, (1, 4), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.expand().generate(prompt, use_cache=False, **settings)
    assert torch.equal(model.model.generate(prompt, **settings), expected)
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.model.gradient_checkpointing_enable()
        model(**inputs("llama"), use_cache=False).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("host", ["bert", "llama, tied"])
def test_what_is_stored_is_small_and_gives_the_same_again(host, tmp_path):
    model = shared(host)
    save_model(model, tmp_path / "learngene.safetensors")
    torch.manual_seed(7)
    again = StageSharedModel(BUILD[host](), REPEATS).eval()
    load_model(again, tmp_path / "learngene.safetensors")
    torch.testing.assert_close(again(**inputs(host)).logits, model(**inputs(host)).logits)
    stored = (tmp_path / "learngene.safetensors").stat().st_size
    assert stored < sum(parameter.nbytes for parameter in model.parameters()) + 20_000


def test_the_model_given_is_left_alone():
    model = build()
    before = model(**inputs()).logits
    with torch.no_grad():
        for parameter in StageSharedModel(model, REPEATS).parameters():
            parameter.zero_()
    assert torch.equal(model(**inputs()).logits, before)


def test_bfloat16():
    model = shared().to(torch.bfloat16)
    given = {name: value.to(torch.bfloat16) for name, value in inputs().items()}
    torch.testing.assert_close(model.expand()(**given).logits, model(**given).logits)


def test_bad_input():
    with pytest.raises(ValueError, match=r"repeats must add up to the 5 layers of model, got \[2, 2\]"):
        StageSharedModel(build(), [2, 2])
    with pytest.raises(ValueError, match="model must have one list of equal layers, Linear has none"):
        StageSharedModel(nn.Linear(2, 2), [1])
    with pytest.raises(ValueError, match="num_layers and layer_to_stage exclude each other"):
        shared().expand(3, layer_to_stage=[0, 1, 2])
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        shared().expand(0)
    with pytest.raises(ValueError, match="must never decrease"):
        shared().expand(layer_to_stage=[2, 1, 0])


LOAD = """
import sys, torch
from transformers import BertForMaskedLM, LlamaForCausalLM, ViTForImageClassification
for name, kind in (("vit", ViTForImageClassification), ("bert", BertForMaskedLM), ("llama", LlamaForCausalLM)):
    inputs, logits = torch.load(f"{sys.argv[1]}/{name}.pt")
    model, info = kind.from_pretrained(f"{sys.argv[1]}/{name}", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    torch.testing.assert_close(model.eval()(**inputs).logits, logits)
assert "firsthand" not in sys.modules
"""


def test_expanded_models_are_plain_checkpoints(tmp_path):
    for host in ("vit", "bert", "llama"):
        expanded = shared(host).expand(4)
        expanded.save_pretrained(tmp_path / host)
        torch.save((inputs(host), expanded(**inputs(host)).logits.detach()), tmp_path / f"{host}.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True)


def test_trainer_learns_the_shared_model(tmp_path):
    torch.manual_seed(0)
    images, teacher = torch.randn(64, 1, 8, 8), torch.randn(64, 3)
    data = [{"pixel_values": image, "teacher_logits": logits} for image, logits in zip(images, teacher, strict=True)]

    def distil(logits):
        return nn.functional.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean").item()

    class Distil(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            teacher_logits = inputs.pop("teacher_logits")
            log_probs = model(**inputs).logits.log_softmax(-1)
            return nn.functional.kl_div(log_probs, teacher_logits.softmax(-1), reduction="batchmean")

    model = StageSharedModel(BUILD["vit"](), REPEATS)
    before = distil(model(pixel_values=images).logits)
    settings = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=16, learning_rate=1e-2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0, remove_unused_columns=False,
    )  # fmt: skip
    Distil(model, settings, train_dataset=data).train()
    assert distil(model(pixel_values=images).logits) < before
    layers = layer_weights(model.model)
    assert all(mine is its for mine, its in zip(layers[0].values(), layers[1].values(), strict=True))
