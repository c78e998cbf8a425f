import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from firsthand.moe.blocks import moe_blocks
from firsthand.weights.aquilamoe import depth_map, expand_linear, grow_depth, grow_width, scale_out, scale_up, width_map

# Loading a shared expert of size 0, torch says that there is nothing to initialise.
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, no groups": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "mistral": MistralConfig(**SIZES, sliding_window=6, head_dim=16),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
SPARSE = {
    "llama": "MixtralForCausalLM",
    "llama, no groups": "MixtralForCausalLM",
    "mistral": "MixtralForCausalLM",
    "qwen2": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3MoeForCausalLM",
}
every_host = pytest.mark.parametrize("host", CONFIGS)
every_sparse_host = pytest.mark.parametrize("host", SPARSE)


def build(host="llama", **changes):
    """A model whose weights, gains and biases are all far from their initial values, so that one in a wrong place shows."""
    config = type(CONFIGS[host]).from_dict(CONFIGS[host].to_dict() | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 48, (2, 12), generator=torch.Generator().manual_seed(0))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def close(one, other):
    torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-4)


# One matrix


def test_the_example_of_the_paper():
    """Inputs 2 -> 3 and outputs 3 -> 4: the copied input is halved in both places, the fourth output is the first again."""
    weight = torch.tensor([[2.0, 4.0, 6.0], [1.0, 3.0, 5.0]]).T  # the paper writes inputs × outputs
    grown = expand_linear(weight, width_map(2, 3), width_map(3, 4))
    assert grown.T.tolist() == [[1, 2, 3, 1], [1, 3, 5, 1], [1, 2, 3, 1]]


@given(st.integers(1, 6), st.integers(0, 7), st.integers(1, 6), st.integers(0, 7), st.sampled_from(["cyclic", "random"]))
def test_copied_inputs_give_copied_outputs(inputs, more_inputs, outputs, more_outputs, kind):
    generator = torch.Generator().manual_seed(inputs + 7 * more_outputs)
    in_map = width_map(inputs, inputs + more_inputs, kind, generator)
    out_map = width_map(outputs, outputs + more_outputs, kind, generator)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(inputs, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(expand_linear(weight, in_map, out_map) @ x[in_map], (weight @ x)[out_map])


def test_the_matrices_of_net2net():
    """The same as a product with matrices that choose and average, the way it is written elsewhere."""
    weight, in_map, out_map = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), width_map(3, 8), width_map(5, 7)
    choose_in, choose_out = torch.eye(3)[in_map], torch.eye(5)[out_map]
    torch.testing.assert_close(expand_linear(weight, in_map, out_map), choose_out @ weight @ torch.linalg.pinv(choose_in))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_beyond_the_first_copy_come_from_above(dtype):
    own, above = torch.ones(3, 2, dtype=dtype), torch.full((3, 2), 4.0, dtype=dtype)
    grown = expand_linear(own, width_map(2, 4), torch.tensor([0, 1, 0, 2, 2]), upper=above)  # not only at the end
    assert grown[:, 0].tolist() == [0.5, 0.5, 2.0, 0.5, 2.0]
    assert grown.dtype == dtype
    torch.testing.assert_close(
        expand_linear(own, width_map(2, 4), width_map(3, 5), upper=own), expand_linear(own, width_map(2, 4), width_map(3, 5))
    )


def test_maps():
    assert width_map(3, 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert width_map(4, 4, "random").tolist() == [0, 1, 2, 3]
    drawn = [width_map(3, 3000, "random", torch.Generator().manual_seed(0)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert drawn[0][:3].tolist() == [0, 1, 2]
    assert all(900 < count < 1100 for count in drawn[0].bincount())
    assert depth_map(3, 6, "interpolation") == [0, 0, 1, 1, 2, 2]
    assert depth_map(3, 6, "stacking") == [0, 1, 2, 0, 1, 2]
    assert depth_map(24, 32)[-1] == 23
    assert sorted(set(depth_map(24, 32))) == list(range(24))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1, 2], [0, 1], (2, 2)), r"in_map must be in \[0, 2\), got 2"),
        (([0, 1], [-1, 1], (2, 2)), r"out_map must be in \[0, 2\), got -1"),
        (([0, 0, 0], [0, 1], (2, 2)), "in_map must name each of 2 inputs, input 1 is left out"),
        (([0, 1], [0, 1], (2, 3)), r"upper must have shape \(2, 2\)"),
    ],
)
def test_expand_linear_refuses(arguments, message):
    in_map, out_map, shape = arguments
    # Not through the import hook: it would refuse a wrong shape first, and a user has no hook.
    refuses = getattr(expand_linear, "__wrapped__", expand_linear)
    with pytest.raises(ValueError, match=message):
        refuses(torch.ones(2, 2), torch.tensor(in_map), torch.tensor(out_map), torch.ones(shape))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: width_map(4, 3), "new must be at least 4, as many as there are, got 3"),
        (lambda: width_map(0, 3), "old must be at least 1"),
        (lambda: width_map(2, 3, "cycle"), "kind must be 'cyclic' or 'random', got 'cycle'"),
        (lambda: depth_map(4, 3), "new must be at least 4"),
        (lambda: depth_map(2, 3, "stack"), "method must be 'interpolation' or 'stacking', got 'stack'"),
    ],
)
def test_maps_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Width


@every_host
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 64},
        {"hidden_size": 96, "intermediate_size": 60, "num_attention_heads": 8},
        {"intermediate_size": 25},
        {"num_attention_heads": 16},
    ],
)
def test_fpi_keeps_the_function(host, sizes, tokens):
    model = build(host)
    before = copy.deepcopy(model.state_dict())
    wide = grow_width(model, **sizes)
    close(logits(wide, tokens), logits(model, tokens))
    assert {name: getattr(wide.config, name) for name in sizes} == sizes
    assert wide.config.num_key_value_heads == model.config.num_key_value_heads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_width_that_is_no_multiple_says_what_it_does(tokens):
    model = build()
    with pytest.warns(UserWarning, match=r"hidden_size 48 does not copy all 32 channels equally often: .* by up to") as caught:
        wide = grow_width(model, hidden_size=48)
    said = float(str(caught[0].message).split("by up to ")[1].split()[0])
    probe = torch.randint(48, (1, 32), generator=torch.Generator().manual_seed(0))
    measured = (logits(wide, probe) - logits(model, probe)).abs().max().item()
    assert said == pytest.approx(measured, rel=1e-2)
    assert measured > 0.01
    with pytest.warns(UserWarning, match="hidden_size 64"):
        grow_width(model, hidden_size=64, kind="random", generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grow_width(model, hidden_size=48, method="aki")  # keeps no function anyway


def test_random_copies_of_heads_and_inner_units_keep_the_function(tokens):
    model = build("qwen2")
    wide = grow_width(
        model, intermediate_size=60, num_attention_heads=8, kind="random", generator=torch.Generator().manual_seed(0)
    )
    close(logits(wide, tokens), logits(model, tokens))


def test_heads_grow_inside_their_group():
    """4 heads in 2 groups become 8: [0 1][2 3] -> [0 1 0 1][2 3 2 3]. Keys and values keep their heads."""
    model = build("qwen2")
    wide = grow_width(model, num_attention_heads=8)
    for name in ("weight", "bias"):
        old, new = (each.model.layers[1].self_attn.q_proj.get_parameter(name).view(-1, 8, *([32] if name == "weight" else []))
                    for each in (model, wide))  # fmt: skip
        assert torch.equal(new, old[[0, 1, 0, 1, 2, 3, 2, 3]])
    for name in ("k_proj", "v_proj"):
        old, new = (each.model.layers[1].self_attn.get_submodule(name) for each in (model, wide))
        assert torch.equal(new.weight, old.weight)
        assert torch.equal(new.bias, old.bias)


def twins_of_inner_units(model, tokens):
    """Largest difference between the gradients of inner units and their copies, over the largest gradient."""
    model(tokens, labels=tokens).loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    first, second = gradient.chunk(2)
    return ((first - second).abs().max() / gradient.abs().max()).item()


def test_copies_are_twins_under_fpi_and_not_under_aki(tokens):
    model = build()
    assert twins_of_inner_units(grow_width(model, intermediate_size=48, method="fpi"), tokens) < 1e-5
    assert twins_of_inner_units(grow_width(model, intermediate_size=48, method="aki"), tokens) > 0.1


@pytest.mark.parametrize("aki_residual", [False, True])
def test_aki_of_equal_layers_is_fpi(aki_residual, tokens):
    model = build("qwen2")
    for layer in model.model.layers[1:]:
        layer.load_state_dict(model.model.layers[0].state_dict())
    wide = grow_width(model, hidden_size=64, intermediate_size=60, num_attention_heads=8, method="aki", aki_residual=aki_residual)
    close(logits(wide, tokens), logits(model, tokens))


def test_aki_takes_new_units_from_the_next_layer():
    model = build()
    wide = grow_width(model, hidden_size=64, intermediate_size=48, num_attention_heads=8, method="aki")
    for layer, above in ((0, 1), (1, 2), (2, 2)):
        new, own, upper = wide.model.layers[layer], model.model.layers[layer], model.model.layers[above]
        for name in ("gate_proj", "up_proj"):
            weight = new.mlp.get_submodule(name).weight
            half = [each.mlp.get_submodule(name).weight.repeat(1, 2) / 2 for each in (own, upper)]
            assert torch.equal(weight, torch.cat(half))
        query = new.self_attn.q_proj.weight.view(8, 8, 64)
        mine, others = (each.self_attn.q_proj.weight.view(4, 8, 32).repeat(1, 1, 2) / 2 for each in (own, upper))
        assert torch.equal(query, torch.cat([mine[:2], others[:2], mine[2:], others[2:]]))
        # Who writes to the stream does so as under FPI, unless told otherwise.
        assert torch.equal(new.mlp.down_proj.weight, own.mlp.down_proj.weight.repeat(2, 2) / 2)
    residual = grow_width(model, hidden_size=64, method="aki", aki_residual=True).model.layers[0].mlp.down_proj.weight
    assert torch.equal(residual, torch.cat([each.mlp.down_proj.weight for each in model.model.layers[:2]]))


# Depth


@every_host
@pytest.mark.parametrize("method", ["interpolation", "stacking"])
def test_layers_that_do_nothing_may_be_as_many_as_they_like(host, method, tokens):
    model = build(host)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    deep = grow_depth(model, 5, method)
    close(logits(deep, tokens), logits(model, tokens))
    assert len(deep.model.layers) == deep.config.num_hidden_layers == 5


def test_each_layer_is_a_copy_of_its_own():
    model = build()
    deep = grow_depth(model, 6)
    for layer, source in enumerate([0, 0, 1, 1, 2, 2]):
        for name, weight in deep.model.layers[layer].state_dict().items():
            assert torch.equal(weight, model.model.layers[source].state_dict()[name])
    pointers = [parameter.data_ptr() for each in (model, deep) for parameter in each.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_kinds_of_attention_go_with_their_layers(tokens):
    model = build("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=None)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    deep = grow_depth(model, 6)
    assert deep.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 4
    assert logits(deep, tokens).isfinite().all()


# Width and depth


@pytest.mark.parametrize("width", ["fpi", "aki"])
@pytest.mark.parametrize("depth", ["interpolation", "stacking"])
def test_scale_up_is_width_then_depth(width, depth):
    model = build()
    sizes = {"hidden_size": 64, "intermediate_size": 30, "num_attention_heads": 8}
    up = scale_up(model, LlamaConfig(**SIZES | sizes | {"num_hidden_layers": 5}), width=width, depth=depth)
    by_hand = grow_depth(grow_width(model, **sizes, method=width), 5, depth)
    assert up.config.to_dict() == by_hand.config.to_dict()
    assert all(torch.equal(value, by_hand.state_dict()[key]) for key, value in up.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 16, "head_dim": 8}, "hidden_size must be at least 32, as many as there are, got 16"),
        ({"num_hidden_layers": 2}, "num_hidden_layers must be at least 3"),
        ({"intermediate_size": 20}, "intermediate_size must be at least 24"),
        ({"hidden_size": 64}, "target_config must keep head_dim 8, got 16"),
        (
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8},
            "target_config must keep num_key_value_heads 2, got 4",
        ),
        ({"vocab_size": 50}, "target_config must keep vocab_size 48, got 50"),
        ({"tie_word_embeddings": True}, "must not tie"),
    ],
)
def test_scale_up_refuses_what_is_no_growth(changes, message):
    with pytest.raises(ValueError, match=message):
        scale_up(build(), LlamaConfig(**SIZES | changes))


# Out


@every_sparse_host
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (4, 1), (3, 3), (1, 1)])
def test_upcycling_keeps_the_function(host, num_experts, top_k, tokens):
    model = build(host)
    sparse = scale_out(model, num_experts, top_k, generator=torch.Generator().manual_seed(0))
    close(logits(sparse, tokens), logits(model, tokens))
    assert type(sparse).__name__ == SPARSE[host]
    assert not sparse.training
    blocks = moe_blocks(sparse)
    assert [(block.num_experts, block.top_k) for block in blocks] == [(num_experts, top_k)] * 3
    assert set(map(id, sparse.parameters())).isdisjoint(map(id, model.parameters()))


@every_sparse_host
def test_plain_transformers_loads_what_was_grown_and_upcycled(host, tokens, tmp_path):
    model = build(host)
    grown = grow_depth(grow_width(model, hidden_size=64, intermediate_size=36, num_attention_heads=8), 5)
    sparse = scale_out(grown, 4, 2, generator=torch.Generator().manual_seed(0))
    for each, name in ((grown, "grown"), (sparse, "sparse")):
        each.save_pretrained(tmp_path / name)
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(info.values())
        assert type(loaded) is type(each)
        assert torch.equal(logits(loaded.eval(), tokens), logits(each, tokens))
    close(logits(sparse, tokens), logits(grown, tokens))


@every_sparse_host
def test_the_cache_works_in_what_was_built(host, tokens):
    """Step by step with a cache, the tokens are those that the source model generates."""
    model = build(host)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(tokens, **options)
    assert torch.equal(grow_width(model, hidden_size=64, num_attention_heads=8).generate(tokens, **options), expected)
    assert torch.equal(scale_out(model, 4).generate(tokens, **options), expected)


def test_experts_train_apart_and_the_empty_shared_expert_does_not(tokens):
    sparse = scale_out(build("qwen2"), 4, 1, generator=torch.Generator().manual_seed(0)).train()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=1e-2, weight_decay=0.0)
    sparse(tokens, labels=tokens).loss.backward()
    optimizer.step()
    block = sparse.model.layers[0].mlp
    assert not torch.allclose(block.experts.down_proj[0], block.experts.down_proj[1])
    assert block.shared_expert.up_proj.weight.numel() == 0
    assert not block.shared_expert_gate.weight.any()


def test_the_router_is_drawn_as_it_says():
    model = build()
    weights = [
        torch.cat(
            [layer.mlp.gate.weight for layer in scale_out(model, 64, 2, std, torch.Generator().manual_seed(3)).model.layers]
        )
        for std in (None, 0.02, 0.0)
    ]
    assert weights[0].std().item() == pytest.approx(math.sqrt(0.02), rel=0.05)
    assert weights[0].mean().abs().item() < 0.01
    torch.testing.assert_close(weights[1], weights[0] * 0.02 / math.sqrt(0.02))
    assert not weights[2].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 4, "top_k": 5}, r"top_k must be in \[1, 4\], got 5"),
        ({"top_k": 0}, r"top_k must be in \[1, 8\], got 0"),
        ({"router_std": -1.0}, "router_std must be at least 0 and finite, got -1"),
        ({"router_std": math.nan}, "router_std must be at least 0 and finite, got nan"),
    ],
)
def test_scale_out_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_out(build(), **arguments)


def test_scale_out_refuses_what_the_sparse_model_cannot_hold():
    with pytest.raises(ValueError, match=r"model must have no biases .* Mixtral has no place for them"):
        scale_out(build("llama with biases"))
    sliding = build("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1, layer_types=None)
    with pytest.raises(ValueError, match="model must have full attention in all layers: Qwen2Moe"):
        scale_out(sliding)


# What all of them share

SURGERIES = {
    "width": lambda model: grow_width(model, hidden_size=64, intermediate_size=48, num_attention_heads=8),
    "depth": lambda model: grow_depth(model, 5),
    "out": lambda model: scale_out(model, 4, generator=torch.Generator().manual_seed(0)),
}
every_surgery = pytest.mark.parametrize("surgery", SURGERIES.values(), ids=SURGERIES)


@every_surgery
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_device_mode_and_settings_stay(surgery, device, dtype, tokens):
    model = build(attention_dropout=0.0).to(device, dtype).train()
    model.set_attn_implementation("eager")
    model.generation_config.max_length = 17
    drawn = torch.get_rng_state()
    new = surgery(model)
    assert torch.equal(torch.get_rng_state(), drawn), "the global generator is not ours to draw from"
    assert {parameter.dtype for parameter in new.parameters()} == {dtype}
    assert {tensor.device.type for tensor in [*new.parameters(), *new.buffers()]} == {device}
    assert all(parameter.requires_grad for parameter in new.parameters())
    assert new.training
    assert new.config._attn_implementation == "eager"
    assert new.generation_config.max_length == 17
    assert model.config.hidden_size == 32
    assert logits(new, tokens.to(device)).isfinite().all()


@pytest.mark.parametrize("name", ["width", "out"])
def test_the_function_is_kept_in_bfloat16_as_well_as_rounding_lets_it(name, tokens):
    model = build().bfloat16()
    exact = logits(build(), tokens)
    rounding = (logits(model, tokens) - exact).abs().max()
    assert (logits(SURGERIES[name](model), tokens) - logits(model, tokens)).abs().max() < 2 * rounding


@every_surgery
def test_models_that_are_not_known_are_refused(surgery):
    unknown = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    headless = LlamaModel(LlamaConfig(**SIZES))
    for model in (unknown, headless):
        with pytest.raises(ValueError, match=f"model must be one of LlamaForCausalLM, .* got {type(model).__name__}"):
            surgery(model)
    changed = build()
    changed.model.layers[0].adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"this one has the weight model.layers.0.adapter.weight besides"):
        surgery(changed)
    quantised = build()
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"floating point weights, lm_head.weight is torch.int8"):
        surgery(quantised)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden_size": 31}, "hidden_size must be at least 32"),
        ({"num_attention_heads": 7}, "num_attention_heads must be a multiple of the 2 key and value heads, got 7"),
        ({"num_attention_heads": 6}, "hidden_size must be a multiple of num_attention_heads for a Llama, got 32 and 6"),
        ({"method": "net2net"}, "method must be 'fpi' or 'aki', got 'net2net'"),
        ({"kind": "cycle"}, "kind must be 'cyclic' or 'random'"),
    ],
)
def test_grow_width_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        grow_width(build(), **arguments)


def test_tied_embeddings(tokens, tmp_path):
    model = build("qwen2", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="untie=True"):
        grow_width(model, hidden_size=64)
    untied = grow_width(model, hidden_size=64, untie=True)
    assert not untied.config.tie_word_embeddings
    close(logits(untied, tokens), logits(model, tokens))
    # Where the stream does not grow the tie holds, through saving as well.
    for name, new in (("ffn", grow_width(model, intermediate_size=48)), ("out", scale_out(model, 4))):
        assert new.lm_head.weight is new.model.embed_tokens.weight
        new.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        close(logits(loaded, tokens), logits(model, tokens))
    up = scale_up(model, Qwen2Config(**SIZES | {"hidden_size": 64, "num_attention_heads": 8}), width="fpi")
    close(logits(up, tokens), logits(model, tokens))
