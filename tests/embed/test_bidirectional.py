import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers")

from firsthand.embed.bidirectional import make_bidirectional  # noqa: E402

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**SIZES),
    "Mistral": lambda: transformers.MistralConfig(**SIZES),
    "Mistral, window": lambda: transformers.MistralConfig(**SIZES, sliding_window=16),
    "Qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "Qwen2, window": lambda: transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
}
TOKENS = torch.tensor([[7, 3, 25, 11, 9], [2, 17, 4, 30, 8]])


def decoder(name: str, attention: str = "sdpa", head: bool = False):
    torch.manual_seed(0)
    build = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build.from_config(CONFIGS[name](), attn_implementation=attention).eval()


def states(model, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model.base_model(input_ids=tokens, attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_state_depends_on_every_token_afterwards_and_on_no_later_one_before(name, attention):
    model = decoder(name, attention)

    def sees() -> torch.Tensor:
        inputs = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        outputs = model(inputs_embeds=inputs).last_hidden_state
        direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
        rows = [torch.autograd.grad(outputs[0, t] @ direction, inputs, retain_graph=True)[0] for t in range(5)]
        return torch.stack([row[0].abs().sum(dim=-1) > 0 for row in rows])

    assert sees().equal(torch.ones(5, 5, dtype=torch.bool).tril())
    assert make_bidirectional(model) is model
    assert sees().all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_padded_equals_unpadded(name, attention):
    model = make_bidirectional(decoder(name, attention))
    alone = states(model, TOKENS)
    for left, right in ((0, 3), (3, 0), (2, 1)):
        padded = torch.nn.functional.pad(TOKENS, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(TOKENS), (left, right))
        inside = states(model, padded, mask)[:, left : left + 5]
        torch.testing.assert_close(inside, alone, atol=1e-5, rtol=1e-4)


def test_is_attention_to_all_by_hand():
    """One layer against the formula, with torch's attention and no mask at all."""
    transformers.set_seed(0)
    model = make_bidirectional(transformers.LlamaModel(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})).eval())
    layer = model.layers[0]
    hidden = model.embed_tokens(TOKENS)
    cos, sin = model.rotary_emb(hidden, torch.arange(5)[None])
    normed = layer.input_layernorm(hidden)
    heads = [getattr(layer.self_attn, f"{part}_proj")(normed).unflatten(-1, (-1, 8)).transpose(1, 2) for part in ("q", "k", "v")]
    turn = lambda x: x * cos + torch.cat([-x[..., 4:], x[..., :4]], dim=-1) * sin  # noqa: E731
    q, k, v = turn(heads[0]), turn(heads[1]).repeat_interleave(2, dim=1), heads[2].repeat_interleave(2, dim=1)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    hidden = hidden + layer.self_attn.o_proj(attended)
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    torch.testing.assert_close(states(model, TOKENS), model.norm(hidden))


def test_the_last_state_of_one_layer_is_untouched():
    """It has always seen every token; only its neighbours have not."""
    config = transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1})
    model = transformers.LlamaModel(config).eval()
    before = states(model, TOKENS)
    after = states(make_bidirectional(model), TOKENS)
    torch.testing.assert_close(after[:, -1], before[:, -1])
    assert not torch.allclose(after[:, 0], before[:, 0])


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_settings_and_everything_else_as_it_was(name):
    model = decoder(name, head=True)
    model.train()
    model.base_model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_bidirectional(model)
    assert torch.rand(3).equal(expected)  # the probe draws nothing from the global generator
    assert model.config.is_causal is False
    assert model.config.use_cache is False
    assert [module.is_causal for module in model.modules() if hasattr(module, "is_causal")] == [False, False]
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())
    assert model(TOKENS).past_key_values is None


def test_trains_and_learns_from_both_sides():
    model = make_bidirectional(decoder("Llama"))
    loss = states(model, TOKENS)[:, 0].square().sum()
    loss.backward()
    assert model.embed_tokens.weight.grad[TOKENS[:, -1]].abs().sum() > 0


def test_half_precision_and_no_grad():
    with torch.no_grad():
        model = make_bidirectional(decoder("Llama").bfloat16())
    changed = TOKENS.clone()
    changed[:, -1] = 1
    assert not states(model, TOKENS)[:, 0].equal(states(model, changed)[:, 0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_saved_and_loaded_it_is_bidirectional(tmp_path, attention):
    model = make_bidirectional(decoder("Qwen2", attention))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    torch.testing.assert_close(states(again, TOKENS), states(model, TOKENS))
    torch.testing.assert_close(states(again, TOKENS, mask)[mask.bool()], states(model, TOKENS, mask)[mask.bool()])


def test_a_model_that_builds_its_own_mask_is_refused_and_left_as_it_was():
    config = transformers.GPTNeoConfig(
        vocab_size=40,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        bos_token_id=1,
        eos_token_id=1,
    )
    model = transformers.GPTNeoModel(config).eval()
    before, settings = states(model, TOKENS), dict(vars(model.config))
    with pytest.raises(ValueError, match=r"GPTNeoModel still does not see the last"):
        make_bidirectional(model)
    assert vars(model.config) == settings
    assert states(model, TOKENS).equal(before)


def test_no_transformers_model():
    with pytest.raises(ValueError, match="model must be a transformers model, got Linear"):
        make_bidirectional(torch.nn.Linear(2, 2))
