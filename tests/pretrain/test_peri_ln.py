import copy
import inspect
import math

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from safetensors.torch import load_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    HyperCLOVAXConfig,
    HyperCLOVAXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    OlmoForCausalLM,
    Phi3Config,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Trainer,
    TrainingArguments,
)

from firsthand import Trial
from firsthand.pretrain.peri_ln import (
    GradientSpikes,
    PeriLN,
    ResidualStats,
    norm_placement,
    to_output_only,
    to_peri_ln,
    to_post_ln,
)
from firsthand.studies import peri_ln as peri_ln_study

# The name without this warning came with transformers 5.20 or so; the old one works in every 5.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "gpt2": GPT2Config(vocab_size=48, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "granite": GraniteConfig(**SIZES, residual_multiplier=0.5, embedding_multiplier=2.0),
    "phi3": Phi3Config(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **MOE, num_experts=4),
    "hyperclovax": HyperCLOVAXConfig(**SIZES, use_post_norm=False),
}
FIVE = ["llama", "mistral", "qwen2", "qwen3", "gpt2"]


def build(family="llama", **changes):
    config = copy.deepcopy(CONFIGS[family])
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def blocks_of(model):
    decoder = model.get_decoder()
    return decoder.h if hasattr(decoder, "h") else decoder.layers


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 48, (2, 10), generator=torch.Generator().manual_seed(0))


def scrambled(model):
    """Weights, biases and gains all different from their initial values, so that a wrong place or a lost gain shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


# The surgery


@pytest.mark.parametrize("family", CONFIGS)
def test_with_output_gains_of_zero_only_embedding_and_head_are_left(family, tokens):
    """x + 0 in every block: whatever the host does in its blocks, both sub-layers must be behind the new norms."""
    model = to_peri_ln(scrambled(build(family)), gamma_init=0.0)
    decoder = model.get_decoder()
    if family == "gpt2":
        stream = decoder.wte(tokens) + decoder.wpe(torch.arange(tokens.shape[1]))
        expected = model.lm_head(decoder.ln_f(stream))
    else:
        stream = decoder.embed_tokens(tokens) * getattr(model.config, "embedding_multiplier", 1.0)
        expected = model.lm_head(decoder.norm(stream))
    torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_what_the_equation_says(family, dtype, tokens):
    """Every block against x + N_out(M(N_in(x))), written out with the host's own sub-layers."""
    model = scrambled(to_peri_ln(build(family))).to(dtype)
    seen = {}
    for index, block in enumerate(blocks_of(model)):
        before, mlp_norm = (
            (block.ln_1, block.ln_2) if family == "gpt2" else (block.input_layernorm, block.post_attention_layernorm)
        )
        for name, norm in {"x": before, "h": mlp_norm, "a": block.post_norm1, "m": block.post_norm2}.items():
            norm.register_forward_hook(lambda _, args, out, key=(index, name): seen.__setitem__(key, (args[0], out)))
        block.register_forward_hook(lambda _, args, out, key=(index, "y"): seen.__setitem__(key, out))
    model(tokens)
    for index, block in enumerate(blocks_of(model)):
        (x, _), (h, mlp_input) = seen[index, "x"], seen[index, "h"]
        (_, attended), (raw, normalised) = seen[index, "a"], seen[index, "m"]
        torch.testing.assert_close(h, x + attended)
        torch.testing.assert_close(seen[index, "y"], h + normalised)
        by_hand = block.post_norm2(type(block.mlp).forward(block.mlp, mlp_input))  # the bare forward, without our hook
        torch.testing.assert_close(normalised, by_hand)
        assert not torch.allclose(raw.float(), normalised.float(), rtol=0.05, atol=0.05)
        assert normalised.dtype == dtype


@pytest.mark.parametrize("family", FIVE)
def test_keys_and_weights_that_were_there_are_untouched(family):
    plain, model = build(family), to_peri_ln(build(family))
    before, after = plain.state_dict(), model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    added = set(after) - set(before)
    assert {key.rsplit(".", 2)[1] for key in added} == {"post_norm1", "post_norm2"}
    assert len({key.rsplit(".", 1)[0] for key in added}) == 2 * 3
    assert model.config.use_post_norm is True


def as_hyperclovax(model, use_post_norm):
    config = HyperCLOVAXConfig(
        **SIZES, use_post_norm=use_post_norm, rms_norm_eps=model.config.rms_norm_eps, tie_word_embeddings=False
    )
    twin = HyperCLOVAXForCausalLM._from_config(config, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())  # strict: the names are the same
    return twin


@pytest.mark.parametrize("converted", [True, False])
def test_same_logits_and_gradients_as_hyperclovax(converted, tokens):
    model = build("llama")
    if converted:
        to_peri_ln(model)
    twin = as_hyperclovax(scrambled(model), use_post_norm=converted)
    torch.testing.assert_close(model(tokens).logits, twin(tokens).logits)
    for one in (model, twin):
        one(tokens, labels=tokens).loss.backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_hyperclovax_itself_can_be_converted(tokens):
    """It has places for these norms: they are filled, and not applied twice."""
    converted = to_peri_ln(build("hyperclovax"))
    native = HyperCLOVAXForCausalLM._from_config(
        HyperCLOVAXConfig(**SIZES, use_post_norm=True), attn_implementation="eager"
    ).eval()
    native.load_state_dict(scrambled(converted).state_dict())
    torch.testing.assert_close(converted(tokens).logits, native(tokens).logits)


def test_the_order_of_gemma2(tokens):
    """Gemma 2 has had these norms all along, under other names and with gains stored as gain - 1."""
    shared = SIZES | {"head_dim": 8, "num_hidden_layers": 2, "tie_word_embeddings": False}
    like_llama = {"final_logit_softcapping": None, "attn_logit_softcapping": None, "hidden_activation": "silu"}
    gemma_config = Gemma2Config(**shared, **like_llama, query_pre_attn_scalar=8)
    gemma = Gemma2ForCausalLM._from_config(gemma_config, attn_implementation="eager").eval()
    llama = LlamaForCausalLM._from_config(LlamaConfig(**shared, rms_norm_eps=1e-6), attn_implementation="eager").eval()
    model = to_peri_ln(llama)
    state = scrambled(gemma).state_dict()
    names = {
        "post_attention_layernorm": "post_norm1",
        "pre_feedforward_layernorm": "post_attention_layernorm",
        "post_feedforward_layernorm": "post_norm2",
    }
    renamed = {}
    for key, value in state.items():
        owner = key.rsplit(".", 2)[-2]
        renamed[key.replace(owner, names.get(owner, owner))] = value + 1 if "norm" in owner else value
    renamed["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] * math.sqrt(32)
    model.load_state_dict(renamed)
    torch.testing.assert_close(model(tokens).logits, gemma(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_scale_of_a_sub_layer_is_invisible_and_divides_its_gradient(factor, tokens):
    """N_out forgets the scale of what it normalises: logits stay, the gradient of the last matrices is divided by it."""
    model = to_peri_ln(build("llama", rms_norm_eps=0.0))
    scaled = copy.deepcopy(model)
    last = [name for name, _ in model.named_parameters() if "o_proj" in name or "down_proj" in name]
    with torch.no_grad():
        for name in last:
            scaled.get_parameter(name).mul_(factor)
    torch.testing.assert_close(scaled(tokens).logits, model(tokens).logits)
    for one in (model, scaled):
        one(tokens, labels=tokens).loss.backward()
    for name in last:
        torch.testing.assert_close(scaled.get_parameter(name).grad * factor, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def test_the_stream_grows_by_two_a_block_at_initialisation(tokens):
    # An eps far below the tiny outputs of narrow untrained sub-layers, or their norms would not come up to 1.
    model = to_peri_ln(build("llama", num_hidden_layers=12, rms_norm_eps=1e-12))
    stats = ResidualStats(12)
    with stats.attach(model):
        model(tokens)
    square = stats.compute()["mean_square"].tolist()
    slope = scipy.stats.linregress(range(13), square).slope
    assert slope == pytest.approx(2, rel=0.15)
    plain = build("llama", num_hidden_layers=12)
    stats.reset()
    with stats.attach(plain):
        plain(tokens)
    assert stats.compute()["mean_square"][-1] < 0.1, "Pre-LN hardly grows before it is trained"


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_gradient_of_the_second_matrix_is_bounded_by_the_activation_it_makes(norm):
    r"""‖∂L/∂W²_ij‖ <= 4 γ √D ‖h‖ / ‖a‖ for a cross-entropy of the sub-layer's output; a Pre-LN MLP has no such bound."""
    torch.manual_seed(0)
    dim, gain = 12, 1.5
    first, second = nn.Linear(dim, 40), nn.Linear(40, dim, bias=False)
    mlp = nn.Sequential(first, nn.ReLU(), second)
    block = PeriLN(mlp, dim, norm=norm, gamma_init=gain)
    x, direction = torch.randn(1, dim), torch.randn(dim, 40)
    target = (F.relu(first(block.norm_in(x))) @ direction.T).argmin(dim=1)  # what the MLP is most wrong about
    for scale in (0.1, 1.0, 100.0):
        with torch.no_grad():
            second.weight.copy_(direction * scale)
        hidden = F.relu(first(block.norm_in(x)))
        a = second(hidden)
        a = a - a.mean() if norm == "layer" else a
        (gradient,) = torch.autograd.grad(F.cross_entropy(block(x), target), second.weight)
        bound = 4 * gain * math.sqrt(dim) * hidden.norm() / a.norm()
        assert gradient.abs().max() <= bound
    (plain,) = torch.autograd.grad(F.cross_entropy(x + mlp(block.norm_in(x)), target), second.weight)
    assert plain.abs().max() > bound, "at a massive activation Pre-LN's gradient stays, Peri-LN's goes"


@pytest.mark.parametrize("family", FIVE)
def test_generation_with_and_without_cache(family, tokens):
    model = to_peri_ln(build(family), embedding_norm=True)
    kept = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, use_cache=True)
    redone = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(kept, redone)


@pytest.mark.parametrize("family", FIVE)
@pytest.mark.parametrize("surgery", [to_peri_ln, to_post_ln, to_output_only])
def test_gradient_checkpointing_changes_nothing(family, surgery, tokens):
    model = surgery(build(family)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("surgery", [to_peri_ln, to_post_ln, to_output_only])
def test_hidden_states_and_attentions_are_still_given(surgery, tokens):
    output = surgery(build())(tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert len(output.attentions) == 3


@pytest.mark.parametrize("surgery", [to_peri_ln, to_post_ln, to_output_only])
def test_a_copy_stands_on_its_own(surgery, tokens):
    """A copy that still used the original's norms would follow it."""
    model = surgery(build())
    twin = copy.deepcopy(model)
    expected = twin(tokens).logits
    scrambled(model)
    torch.testing.assert_close(twin(tokens).logits, expected)
    assert not torch.allclose(model(tokens).logits, expected)
    assert norm_placement(twin) == norm_placement(model)


@pytest.mark.parametrize("family", FIVE)
def test_saved_and_loaded_again(family, tokens, tmp_path):
    """The documented way: build from the saved config, convert, load the weights."""
    model = scrambled(to_peri_ln(build(family), embedding_norm=True))
    model.save_pretrained(tmp_path)
    again = to_peri_ln(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)), embedding_norm=True).eval()
    load_model(again, tmp_path / "model.safetensors")
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_a_norm_that_is_replaced_is_used(tokens):
    """Wrappers (adapters, sharding) put another module in a norm's place."""
    model = to_peri_ln(build())
    for block in model.model.layers:
        block.post_norm1 = block.post_norm2 = nn.Identity()
    torch.testing.assert_close(model(tokens).logits, build()(tokens).logits)


@pytest.mark.parametrize(("norm", "kind"), [("rms", nn.RMSNorm), ("layer", nn.LayerNorm)])
def test_norm_can_be_chosen(norm, kind, tokens):
    model = to_peri_ln(build().to(torch.bfloat16), norm=norm, gamma_init=0.5)
    norms = [module for block in model.model.layers for module in (block.post_norm1, block.post_norm2)]
    assert all(isinstance(module, kind) for module in norms)
    assert all(module.weight.dtype == torch.bfloat16 and (module.weight == 0.5).all() for module in norms)
    assert model(tokens).logits.dtype == torch.bfloat16


def test_torch_rms_norm_is_the_hosts(tokens):
    torch.testing.assert_close(to_peri_ln(build(), norm="rms")(tokens).logits, to_peri_ln(build())(tokens).logits)


@pytest.mark.parametrize("which", ["attention", "mlp"])
def test_one_kind_of_sub_layer_only(which, tokens):
    """With gains of zero the chosen sub-layers fall silent and the others still speak."""
    model = to_peri_ln(build(), which=(which,), gamma_init=0.0)
    expected = build()
    for block in expected.model.layers:
        last = block.self_attn.o_proj if which == "attention" else block.mlp.down_proj
        nn.init.zeros_(last.weight)
    torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)
    assert norm_placement(model) == "peri"
    assert not getattr(model.config, "use_post_norm", False)


def test_embedding_norm(tokens):
    model = to_peri_ln(build(), embedding_norm=True)
    with torch.no_grad():
        model.model.embedding_norm.weight.fill_(2.0)
    raw = model.model.embed_tokens.weight[tokens]
    expected = 2 * F.rms_norm(raw, (32,), eps=model.config.rms_norm_eps)
    torch.testing.assert_close(model.model.embed_tokens(tokens), expected)
    torch.testing.assert_close(model(inputs_embeds=model.model.embed_tokens(tokens)).logits, model(tokens).logits)


@pytest.mark.parametrize("family", FIVE)
def test_post_ln_is_what_the_equation_says(family, tokens):
    """x <- N(x + M(x)) for each sub-layer in turn: every block's output is normalised, and its last norm sees h + M(h)."""
    model = scrambled(to_post_ln(build(family)))
    assert set(model.state_dict()) == set(build(family).state_dict())
    states = []
    for block in blocks_of(model):
        first, second = (block.ln_1, block.ln_2) if family == "gpt2" else (block.input_layernorm, block.post_attention_layernorm)
        seen = {}
        attention = block.attn if family == "gpt2" else block.self_attn
        attention.register_forward_hook(
            lambda _, args, kwargs, out, seen=seen: seen.update(x=args[0] if args else kwargs["hidden_states"], a=out[0]),
            with_kwargs=True,
        )
        block.mlp.register_forward_hook(lambda _, args, out, seen=seen: seen.update(h=args[0], m=out))
        block.register_forward_hook(lambda _, args, out, seen=seen: seen.update(y=out))
        states.append((seen, first, second))
    model(tokens)
    previous = None
    for seen, first, second in states:
        torch.testing.assert_close(seen["h"], first(seen["x"] + seen["a"]))
        torch.testing.assert_close(seen["y"], second(seen["h"] + seen["m"]))
        if previous is not None:
            assert torch.equal(seen["x"], previous), "the sub-layer's input is not normalised again"
        previous = seen["y"]


def test_post_ln_generates(tokens):
    model = to_post_ln(build())
    kept = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False)
    redone = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(kept, redone)


def test_output_only_is_peri_without_its_input_norms(tokens):
    model = to_output_only(build())
    peri = to_peri_ln(build())
    for block in peri.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
    torch.testing.assert_close(model(tokens).logits, peri(tokens).logits)
    assert not any("input_layernorm" in key for key in model.state_dict())


# What is there already


@pytest.mark.parametrize(
    ("surgery", "placement"), [(to_peri_ln, "peri"), (to_post_ln, "post"), (to_output_only, "output-only"), (None, "pre")]
)
@pytest.mark.parametrize("family", FIVE)
def test_placement_is_seen(surgery, placement, family):
    model = build(family)
    assert norm_placement(surgery(model) if surgery else model) == placement
    if surgery:
        for again in (to_peri_ln, to_post_ln, to_output_only):
            with pytest.raises(ValueError, match=f"is {placement} already"):
                again(model)


@pytest.mark.parametrize(
    ("config", "placement"),
    [
        (Gemma2Config(**SIZES, head_dim=8), "peri"),
        (HyperCLOVAXConfig(**SIZES), "peri"),
        (BertConfig(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64), "post"),
    ],
)
def test_hosts_that_are_not_pre_norm(config, placement):
    model = BertModel(config) if config.model_type == "bert" else AutoModelForCausalLM.from_config(config)
    assert norm_placement(model) == placement
    with pytest.raises(ValueError, match=f"{type(model).__name__} is {placement} already"):
        to_peri_ln(model)


@pytest.mark.parametrize(
    ("config", "build_it"),
    [
        (
            GPTNeoXConfig(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64),
            GPTNeoXForCausalLM,
        ),
        (PhiConfig(**SIZES), PhiForCausalLM),
        (CohereConfig(**SIZES), CohereForCausalLM),
    ],
)
def test_parallel_blocks_are_refused(config, build_it):
    with pytest.raises(NotImplementedError, match="parallel"):
        to_peri_ln(build_it(config))


def test_unknown_hosts_are_refused():
    with pytest.raises(ValueError, match=r"model must be one of the pre-norm decoders llama, .* got Linear"):
        to_peri_ln(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got OlmoForCausalLM"):
        to_peri_ln(OlmoForCausalLM(OlmoConfig(**SIZES)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"which": ()}, "which must name"),
        ({"which": ("attention", "ffn")}, "which must name"),
        ({"norm": "batch"}, "norm must be"),
        ({"gamma_init": float("nan")}, "gamma_init must be finite"),
    ],
)
def test_bad_arguments(arguments, message, tokens):
    model = build()
    with pytest.raises(ValueError, match=message):
        to_peri_ln(model, **arguments)
    assert norm_placement(model) == "pre", "the model is as it was"


# The layer


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_is_what_the_equation_says(norm, dtype):
    torch.manual_seed(0)
    inner, x = nn.Linear(8, 8), torch.randn(3, 5, 8)
    block = scrambled(PeriLN(inner, 8, norm=norm)).to(dtype)
    by_hand = x.to(dtype) + block.norm_out(inner(block.norm_in(x.to(dtype))))
    torch.testing.assert_close(block(x.to(dtype)), by_hand)
    assert block(x.to(dtype)).dtype == dtype


def test_layer_passes_arguments_on_and_takes_the_first_of_a_tuple():
    class Scaled(nn.Module):
        def forward(self, x, by, *, plus):
            return x * by + plus, "weights"

    x = torch.randn(2, 8)
    block = PeriLN(Scaled(), 8)
    expected = x + F.rms_norm(F.rms_norm(x, (8,), eps=1e-6) * 3 + 1, (8,), eps=1e-6)
    torch.testing.assert_close(block(x, 3, plus=1), expected)


def test_layer_compiles(monkeypatch):
    monkeypatch.setattr(PeriLN, "forward", inspect.unwrap(PeriLN.forward))  # without the shape checks of the tests
    torch.manual_seed(0)
    block, x = PeriLN(nn.Linear(8, 8), 8), torch.randn(2, 8)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))


def test_converted_model_compiles(tokens):
    model = to_peri_ln(build(num_hidden_layers=1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "same"}, "norm must be"),
        ({"dim": 0}, "dim must be"),
        ({"eps": -1.0}, "eps must be"),
        ({"gamma_init": math.inf}, "gamma_init must be"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        PeriLN(nn.Identity(), **({"dim": 8} | arguments))


# The statistics of the stream


def test_stats_agree_with_scipy_and_do_not_depend_on_the_batches():
    x = torch.randn(60, 7, 16, generator=torch.Generator().manual_seed(0)) ** 3
    whole, parts = ResidualStats(0), ResidualStats(0)
    whole.update(0, x)
    for part in x.split([10, 30, 20]):
        parts.update(0, part)
    flat = x.double().flatten().numpy()
    second, fourth = scipy.stats.moment(flat, order=[2, 4], center=0)
    for stats in (whole, parts):
        result = stats.compute()
        assert result["mean_square"].item() == pytest.approx(second, rel=1e-5)
        assert result["kurtosis"].item() == pytest.approx(fourth / second**2, rel=1e-5)
        assert result["max_abs"].item() == x.abs().max().item()


def test_kurtosis_of_a_gaussian_stream_is_3_and_of_one_outlier_is_its_size():
    stats = ResidualStats(1)
    stats.update(0, torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)))
    stats.update(1, torch.eye(64))  # one channel of 64 has it all
    kurtosis = stats.compute()["kurtosis"]
    assert kurtosis[0].item() == pytest.approx(3, abs=0.05)
    assert kurtosis[1].item() == pytest.approx(64)


@pytest.mark.parametrize("family", FIVE)
def test_stats_see_the_streams_of_transformers(family, tokens):
    model = scrambled(build(family))
    stats = ResidualStats(3)
    with stats.attach(model):
        output = model(tokens, output_hidden_states=True)
    model(tokens[:, :3])  # detached: not seen
    square = stats.compute()["mean_square"]
    for index, state in enumerate(output.hidden_states[:-1]):  # the last one is after the final norm
        assert square[index].item() == pytest.approx(state.square().mean().item(), rel=1e-5)


def test_stats_count_a_checkpointed_block_once(tokens):
    model = to_peri_ln(build()).train()
    model.gradient_checkpointing_enable()
    stats = ResidualStats(3)
    with stats.attach(model):
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    assert stats.count.tolist() == [tokens.numel() * 32] * 4


def test_stats_of_a_merged_metric_are_those_of_all_data():
    x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    first, second, whole = ResidualStats(0), ResidualStats(0), ResidualStats(0)
    first.update(0, x[:3])
    second.update(0, x[3:])
    whole.update(0, x)
    first.merge_state(second)
    assert {key: value.item() for key, value in first.compute().items()} == {
        key: pytest.approx(value.item(), rel=1e-5) for key, value in whole.compute().items()
    }


def test_stats_in_bfloat16_are_summed_in_float32():
    stats = ResidualStats(0)
    stats.update(0, torch.full((300, 100), 0.1, dtype=torch.bfloat16))
    assert stats.compute()["mean_square"].item() == pytest.approx(torch.tensor(0.1, dtype=torch.bfloat16).item() ** 2, rel=1e-4)


def test_bad_stats(tokens):
    with pytest.raises(ValueError, match="num_blocks must be at least 0"):
        ResidualStats(-1)
    with pytest.raises(ValueError, match=r"block must be in 0\.\.2, got 3"):
        ResidualStats(2).update(3, torch.ones(1, 4))
    with pytest.raises(ValueError, match="model has 3 blocks, the metric was made for 2"):
        ResidualStats(2).attach(build())
    with pytest.raises(ValueError, match="no list of blocks"):
        ResidualStats(2).attach(nn.Linear(2, 2))
    stats = ResidualStats(1)
    stats.update(0, torch.ones(1, 4))
    with pytest.raises(ValueError, match="nothing seen after block 1"):
        stats.compute()


# Spikes


def test_a_spike_is_a_multiple_of_the_median_before_it():
    spikes = GradientSpikes(threshold=5.0, window=4, warmup=2)
    assert [spikes.observe(norm) for norm in (100.0, 1.0, 2.0, 1.0, 5.0, 5.1, 4.9, 60.0)] == [
        False, False,  # too early to say
        False, False,  # medians 50.5, 2
        False,  # of (100, 1, 2, 1): 1.5, and 5 is 3.3 times that
        False,  # of (1, 2, 1, 5): 1.5, 3.4 times
        False,  # of (2, 1, 5, 5.1): 3.5
        True,  # of (1, 5, 5.1, 4.9): 4.95, 12 times
    ]  # fmt: skip
    assert spikes.count == 1
    assert spikes.ratio == pytest.approx(60 / 4.95)


def test_the_scale_of_the_gradient_does_not_matter():
    norms = torch.rand(200, generator=torch.Generator().manual_seed(0)).pow(-2).tolist()
    one, other = GradientSpikes(), GradientSpikes()
    assert [one.observe(norm) for norm in norms] == [other.observe(1000 * norm) for norm in norms]
    assert one.count > 0


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_is_a_spike_and_is_forgotten(norm):
    spikes = GradientSpikes(warmup=1)
    assert spikes.observe(norm)
    assert spikes.ratio == math.inf
    assert spikes.norms == []


@pytest.mark.parametrize("norm", [-1.0])
def test_bad_norms(norm):
    with pytest.raises(ValueError, match="norm must be at least 0"):
        GradientSpikes().observe(norm)


@pytest.mark.parametrize(("argument", "value"), [("threshold", 1.0), ("window", 0), ("warmup", 0), ("warmup", 101)])
def test_bad_spikes(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be"):
        GradientSpikes(**{argument: value})


def test_stopping_and_resuming_counts_the_same():
    norms = torch.rand(50, generator=torch.Generator().manual_seed(0)).pow(-2).tolist()
    whole = GradientSpikes(window=20)
    expected = [whole.observe(norm) for norm in norms]
    first = GradientSpikes(window=20)
    begun = [first.observe(norm) for norm in norms[:25]]
    second = GradientSpikes(window=20)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert begun + [second.observe(norm) for norm in norms[25:]] == expected
    assert second.state_dict() == whole.state_dict()
    third = GradientSpikes.from_state(first.state())
    assert third.state_dict() == first.state_dict()


def test_state_of_another_setting_is_refused():
    with pytest.raises(ValueError, match="window"):
        GradientSpikes(window=20).load_state_dict(GradientSpikes(window=10, warmup=5).state_dict())
    with pytest.raises(ValueError, match="state_dict must have"):
        GradientSpikes().load_state_dict({"count": 1})


def test_trainer_feeds_the_callback_and_restores_it(tmp_path):
    """A run that is stopped after 4 of 8 steps and resumed has seen what an uninterrupted one has."""
    rows = [
        {"input_ids": row, "labels": row} for row in torch.randint(3, 48, (32, 8), generator=torch.Generator().manual_seed(0))
    ]

    def run(folder, resume=None):
        spikes = GradientSpikes(threshold=1.01, window=3, warmup=1)
        settings = TrainingArguments(
            output_dir=folder,
            max_steps=8,
            per_device_train_batch_size=2,
            max_grad_norm=0.1,
            logging_steps=1,
            save_steps=4,
            restore_callback_states_from_checkpoint=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(build(num_hidden_layers=1), settings, train_dataset=rows, callbacks=[spikes])
        trainer.train(resume_from_checkpoint=resume)
        (kept,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, GradientSpikes)]
        return kept

    whole = run(tmp_path / "whole")
    assert whole.count > 0
    assert min(whole.norms) > 0.1, "norms from before clipping"
    resumed = run(tmp_path / "whole", resume=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state_dict() == whole.state_dict()


def test_study_of_runs_that_diverge_has_finite_metrics(monkeypatch):
    """A diverged run is a result: it counts as the untrained model and as failed, and never gives a NaN."""
    monkeypatch.setattr(peri_ln_study, "RATES", (1e30, 1e38))
    world = peri_ln_study.prepare(Trial(1, "prepare", smoke=True))
    trial = Trial(1, "Pre-LN", smoke=True)
    metrics = peri_ln_study.study.arms["Pre-LN"](trial, world)
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert metrics["failed runs"] == 1
    assert metrics["excess over own best rate"] == 0
    assert metrics["mean bits per byte over rates"] == metrics["bits per byte at best rate"]
    assert all(math.isfinite(value) for curve in trial.curves.values() for _, value in curve)
