import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
)

from firsthand.weights.layers import find_layers, layer_weights, with_layer_weights, with_layers

TEXT = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
BUILD = {
    "vit": lambda: ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**TEXT)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**TEXT, num_key_value_heads=1)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=48, n_embd=16, n_layer=3, n_head=2, n_positions=32)),
}
PATHS = {
    "vit": "vit.layers",
    "bert": "bert.encoder.layer",
    "llama": "model.layers",
    "llama, tied": "model.layers",
    "qwen2": "model.layers",
    "gpt2": "transformer.h",
}
every_host = pytest.mark.parametrize("host", BUILD)


def build(host):
    torch.manual_seed(0)
    model = BUILD[host]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def logits(model):
    generator = torch.Generator().manual_seed(1)
    if "pixel" in model.main_input_name:
        inputs = {"pixel_values": torch.randn(2, 1, 8, 8, generator=generator).to(model.dtype)}
    else:
        inputs = {"input_ids": torch.randint(48, (2, 9), generator=generator)}
    with torch.no_grad():
        return model(**inputs).logits


@every_host
def test_layers_are_found(host):
    model = build(host)
    assert find_layers(model) == PATHS[host]
    assert find_layers(model, PATHS[host]) == PATHS[host]
    assert [set(layer) for layer in layer_weights(model)] == [
        set(dict(model.get_submodule(PATHS[host])[0].named_parameters()))
    ] * 3


@every_host
@pytest.mark.parametrize("depth", [1, 5])
def test_another_depth_changes_nothing_else(host, depth):
    model = build(host)
    before = copy.deepcopy(model.state_dict())
    new = with_layers(model, depth)
    assert type(new) is type(model)
    assert len(new.get_submodule(PATHS[host])) == new.config.num_hidden_layers == depth
    assert model.config.num_hidden_layers == 3
    assert not new.training
    of_layer = sum(weight.numel() for weight in layer_weights(model)[0].values())
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (new, model)]
    assert sizes[0] - sizes[1] == (depth - 3) * of_layer
    assert logits(new).shape == logits(model).shape
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_fresh_weights_come_from_the_global_generator():
    model = build("vit")
    torch.manual_seed(3)
    first = with_layers(model, 2)
    torch.manual_seed(3)
    assert torch.equal(logits(first), logits(with_layers(model, 2)))
    assert not torch.equal(logits(first), logits(with_layers(model, 2)))


@every_host
def test_given_back_its_own_weights_a_model_computes_the_same(host):
    model = build(host)
    state = torch.get_rng_state()
    new = with_layer_weights(model, layer_weights(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(new), logits(model))
    ours, theirs = ({each.data_ptr() for each in one.parameters()} for one in (new, model))
    assert len(ours) == len(theirs)  # tied where the model was
    assert not ours & theirs
    assert not any(tensor.is_meta for tensor in (*new.parameters(), *new.buffers()))
    assert all(parameter.requires_grad for parameter in new.parameters())


@every_host
def test_a_layer_may_be_given_several_times(host):
    model = build(host)
    layers = layer_weights(model)
    new = with_layer_weights(model, [layers[0], layers[0], layers[2], layers[2]])
    with torch.no_grad():
        next(new.get_submodule(PATHS[host])[0].parameters()).add_(1.0)
    for mine, its in zip(layer_weights(new)[1].values(), layers[0].values(), strict=True):
        assert torch.equal(mine, its)
    assert new.config.num_hidden_layers == 4


@pytest.mark.parametrize(
    "make", [lambda model: with_layers(model, 2), lambda model: with_layer_weights(model, layer_weights(model))]
)
def test_what_the_configuration_does_not_know_is_kept(make):
    torch.manual_seed(0)
    new = make(BertModel(BertConfig(**TEXT), add_pooling_layer=False))
    assert new.pooler is None
    assert new(torch.zeros(1, 4, dtype=torch.int64)).last_hidden_state.shape == (1, 4, 16)


def test_another_head_is_kept_and_has_no_fresh_weights():
    model = build("vit")
    model.classifier = nn.Linear(16, 7)
    assert logits(with_layer_weights(model, layer_weights(model)[:1])).shape == (2, 7)
    with pytest.raises(ValueError, match=r"ViTForImageClassification has no 'classifier\.weight' of this shape"):
        with_layers(model, 2)


def test_weights_made_for_the_model_need_not_be_copied():
    model = build("vit")
    layers = [{name: weight.detach().clone() for name, weight in layer.items()} for layer in layer_weights(model)]
    new = with_layer_weights(model, layers, clone=False)
    assert next(new.vit.layers[0].parameters()).data_ptr() == next(iter(layers[0].values())).data_ptr()
    assert torch.equal(logits(new), logits(model))


def test_generation_with_a_cache():
    new = with_layer_weights(build("llama"), layer_weights(build("llama")) * 2)
    prompt = torch.randint(48, (1, 4), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(new.generate(prompt, **settings), new.generate(prompt, use_cache=False, **settings))


@pytest.mark.parametrize(
    "make", [lambda model: with_layers(model, 2), lambda model: with_layer_weights(model, layer_weights(model))]
)
def test_dtype_and_attention_are_kept(make):
    torch.manual_seed(0)
    config = LlamaConfig(**TEXT)
    config._attn_implementation = "eager"
    new = make(LlamaForCausalLM(config).to(torch.bfloat16).train())
    assert {parameter.dtype for parameter in new.parameters()} == {torch.bfloat16}
    assert new.config._attn_implementation == "eager"
    assert new.training


# --- bad input


def test_two_lists_of_layers_are_one_too_many():
    model = nn.ModuleDict({name: nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for name in ("encoder", "decoder")})
    with pytest.raises(ValueError, match="has several, encoder, decoder: choose one with layers="):
        find_layers(model)
    assert find_layers(model, "decoder") == "decoder"


def test_layers_inside_of_layers_do_not_count():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))

    assert find_layers(nn.Sequential(nn.ModuleList([Block(), Block()]))) == "0"


def test_no_list_of_equal_layers():
    with pytest.raises(ValueError, match="Linear has none"):
        find_layers(nn.Linear(2, 2))
    unequal = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])})
    with pytest.raises(ValueError, match="has none; in 'layers' layer 1 differs from layer 0 in 'bias'"):
        find_layers(unequal)
    with pytest.raises(ValueError, match="layers must be equal, in 'layers' layer 1 differs"):
        find_layers(unequal, "layers")
    mixed = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Bilinear(2, 2, 2)])})
    with pytest.raises(ValueError, match="layer 1 is Bilinear and layer 0 Linear"):
        find_layers(mixed, "layers")
    # T5 has its relative position bias in the first layer only
    t5 = T5Model(T5Config(vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    with pytest.raises(ValueError, match=r"T5Model has none; in 'encoder\.block' layer 1 differs from layer 0 in .*relative"):
        find_layers(t5)


@pytest.mark.parametrize("path", ["nowhere", "encoder", "encoder.layer.0"])
def test_path_of_no_list(path):
    with pytest.raises(ValueError, match="layers must be the path of a ModuleList"):
        find_layers(BertModel(BertConfig(**TEXT)), path)


def test_layers_of_the_wrong_shape():
    model = build("vit")
    layers = layer_weights(model)
    short = dict(list(layers[1].items())[1:])
    with pytest.raises(ValueError, match="layer 1 differs in"):
        with_layer_weights(model, [layers[0], short])
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        with_layer_weights(model, [])
    with pytest.raises(ValueError, match="num_layers must be at least 1, got 0"):
        with_layers(model, 0)


def test_models_that_cannot_have_another_depth():
    plain = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ValueError, match="model must be one of transformers"):
        with_layers(plain, 2)
    mixed = Qwen2ForCausalLM(Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=4, max_window_layers=1))
    with pytest.raises(ValueError, match="model must attend in the same way in all layers"):
        with_layers(mixed, 4)
