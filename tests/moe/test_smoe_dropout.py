import copy
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from firsthand.moe.smoe_dropout import (
    RandomRouter,
    SMoEDropout,
    SMoEDropoutCallback,
    set_active_experts,
    smoe_dropout_convert,
    smoe_dropout_num_experts,
)

DTYPES = [torch.float32, torch.bfloat16]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INCREASING = ["linear_increase", "cosine_increase", "exp_increase", "multi_step"]
SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(family):
    """A small model with random weights, biases included, and no dropout."""
    torch.manual_seed(0)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True))
    elif family == "bert":
        model = BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    else:
        sizes = {"vocab_size": 48, "n_embd": 16, "n_inner": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, SMoEDropout)]


def equal_scores(model):
    for router in (module for module in model.modules() if isinstance(module, RandomRouter)):
        router.weight.zero_()
        router.bias.zero_()
    return model


FAMILIES = pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
TOKENS = torch.randint(48, (2, 7), generator=seeded())


# The schedule


@given(
    total=st.integers(1, 2000),
    k_min=st.integers(1, 20),
    span=st.integers(0, 10),
    mode=st.sampled_from(INCREASING),
)
def test_an_increasing_schedule_goes_from_k_min_to_k_max_and_never_back(total, k_min, span, mode):
    active = [smoe_dropout_num_experts(step, total, k_min, k_min + span, mode) for step in range(total + 1)]
    assert active[0] == k_min
    assert active[-1] == k_min + span
    assert active == sorted(active)
    assert smoe_dropout_num_experts(3 * total, total, k_min, k_min + span, mode) == k_min + span


@given(total=st.integers(1, 500), k_min=st.integers(1, 20), span=st.integers(0, 30), kind=st.sampled_from(["linear", "cosine"]))
def test_a_decreasing_schedule_is_the_mirror_of_the_increasing_one(total, k_min, span, kind):
    for step in range(0, total + 1, max(1, total // 20)):
        up, down = (
            smoe_dropout_num_experts(step, total, k_min, k_min + span, f"{kind}_{way}") for way in ("increase", "decrease")
        )
        assert up + down == k_min + k_min + span


def test_linear_rounds_halves_to_even():
    assert [smoe_dropout_num_experts(step, 16, 8, 16) for step in range(9)] == [8, 8, 9, 10, 10, 10, 11, 12, 12]


def test_cosine_rises_along_the_sine():
    """k_max - Δ cos(πt/2), at t where the cosine is known: 0.866, 0.707, 0.5."""
    assert [smoe_dropout_num_experts(step, 12, 10, 110, "cosine_increase") for step in (4, 6, 8)] == [23, 39, 60]


def test_exponential_is_that_of_the_reference_where_300_divides_the_steps():
    for total in (300, 900, 400 * 300):
        for step in range(0, total + 1, total // 100):
            reference = round((8 - 16) * 0.99 ** (step // (total // 300))) + 16
            assert smoe_dropout_num_experts(step, total, 8, 16, "exp_increase") == reference
    assert smoe_dropout_num_experts(7, 7, 1, 64, "exp_increase") == 61, "0.049 of a wide range is left at the end"


def test_multi_step_doubles_in_equal_shares_of_the_steps():
    active = [smoe_dropout_num_experts(step, 100, 1, 16, "multi_step") for step in range(100)]
    assert active == [k for k in (1, 2, 4, 8, 16) for _ in range(20)]
    assert [smoe_dropout_num_experts(step, 3, 3, 7, "multi_step") for step in range(4)] == [3, 6, 7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10, 1, 2), "step must be at least 0, got -1"),
        ((0, 0, 1, 2), "total_steps must be at least 1, got 0"),
        ((0, 10, 0, 2), "1 <= k_min <= k_max, got 0 and 2"),
        ((0, 10, 3, 2), "1 <= k_min <= k_max, got 3 and 2"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        smoe_dropout_num_experts(*arguments)


def test_unknown_mode():
    unchecked = inspect.unwrap(smoe_dropout_num_experts)  # as a user has it, without the type checks of the tests
    with pytest.raises(ValueError, match=r"mode must be one of linear_increase.* got 'sideways'"):
        unchecked(0, 10, 1, 2, "sideways")


# The router


@pytest.mark.parametrize("k", [1, 2, 5])
def test_router_agrees_with_mixtral(k):
    """A softmax over the chosen is a softmax over all, renormalised over the chosen, which is what Mixtral does."""
    router = RandomRouter(16, 5, k, bias=False, generator=seeded())
    peer = MixtralTopKRouter(MixtralConfig(hidden_size=16, num_local_experts=5, num_experts_per_tok=k))
    peer.load_state_dict({"weight": router.weight})
    x = torch.randn(11, 16, generator=seeded(1))
    for ours, theirs in zip(router(x), peer(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_router_draws_as_a_linear_layer_does():
    router, bound = RandomRouter(64, 200, 1, generator=seeded()), 64**-0.5
    linear = nn.Linear(64, 200)
    for drawn, like in ((router.weight, linear.weight), (router.bias, linear.bias)):
        assert drawn.shape == like.shape
        assert drawn.abs().max() <= bound
        assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_two_routers_of_one_seed_are_the_same_and_of_two_are_not():
    one, same, other = (RandomRouter(8, 4, 2, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.weight, same.weight)
    assert torch.equal(one.bias, same.bias)
    assert not torch.equal(one.weight, other.weight)


@FAMILIES
def test_routers_are_the_same_bits_after_training_and_all_else_is_trained(family):
    model = smoe_dropout_convert(build(family), 4, k_min=2, generator=seeded()).train()
    model.requires_grad_(True)  # a user may say so
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (".router." in name), name


def test_gradients_pass_through_the_router_weights_to_the_tokens():
    router = RandomRouter(8, 4, 2, generator=seeded())
    x = torch.randn(5, 8, generator=seeded(1)).requires_grad_()
    router(x)[1][:, 0].sum().backward()
    assert x.grad.abs().sum() > 0


# The layer


def by_hand(layer, x):
    """The equation, a token and an expert at a time."""
    act = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[layer.act]
    width = layer.down_proj.shape[-1]
    logits = x @ layer.router.weight.T + layer.router.bias
    rows = []
    for token, scores in zip(x, logits, strict=True):
        chosen = scores.argsort(descending=True)[: layer.router.top_k]
        row = 0 if layer.output_bias is None else layer.output_bias
        for expert, weight in zip(chosen, scores[chosen].softmax(0), strict=True):
            hidden = layer.gate_up_proj[expert] @ token
            hidden = hidden if layer.gate_up_bias is None else hidden + layer.gate_up_bias[expert]
            hidden = act(hidden) if len(hidden) == width else act(hidden[:width]) * hidden[width:]
            row = row + weight * (layer.down_proj[expert] @ hidden)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["auto", "sparse", "masked"])
@pytest.mark.parametrize(("act", "gated", "bias"), [("gelu", False, True), ("silu", True, False), ("relu", True, True)])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_layer_is_what_the_equation_says(k, act, gated, bias, impl):
    layer = SMoEDropout(8, 12, 4, k, act=act, gated=gated, bias=bias, generator=seeded()).double()
    layer.impl = impl
    x = torch.randn(3, 5, 8, generator=seeded(1), dtype=torch.float64).requires_grad_()
    expected = by_hand(layer, x.flatten(0, 1)).view_as(x)
    torch.testing.assert_close(layer(x), expected)
    inputs = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(layer(x).square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("k", [1, 3, 4])
def test_both_ways_to_compute_agree(k, dtype, device):
    layer = SMoEDropout(16, 24, 4, k, generator=seeded()).to(device, dtype)
    x = torch.randn(33, 16, generator=seeded(1)).to(device, dtype)
    results = {}
    for impl in ("sparse", "masked"):
        layer.impl = impl
        results[impl] = (layer(x), *torch.autograd.grad(layer(x).float().square().sum(), tuple(layer.parameters())))
        assert results[impl][0].dtype == dtype
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    torch.testing.assert_close(results["sparse"], results["masked"], **tolerance)


@pytest.mark.parametrize("impl", ["sparse", "masked"])
def test_experts_that_no_token_chose_get_no_gradient(impl):
    layer = SMoEDropout(8, 12, 4, 2, generator=seeded())
    layer.impl = impl
    layer.router.bias.copy_(torch.tensor([0.0, 100.0, 0.0, 100.0]))
    layer(torch.randn(9, 8, generator=seeded(1))).square().sum().backward()
    for parameter in (layer.gate_up_proj, layer.down_proj, layer.gate_up_bias):
        assert (parameter.grad.flatten(1).abs().sum(dim=1) > 0).tolist() == [False, True, False, True]


def test_no_tokens_give_no_output():
    for k in (1, 4):
        assert SMoEDropout(8, 12, 4, k)(torch.empty(0, 3, 8)).shape == (0, 3, 8)


def test_last_routing_is_what_was_routed():
    layer = SMoEDropout(8, 12, 4, 2, generator=seeded())
    x = torch.randn(2, 5, 8, generator=seeded(1))
    layer(x)
    for kept, again in zip(layer.last_routing, layer.router(x.flatten(0, 1)), strict=True):
        torch.testing.assert_close(kept, again)


def test_layer_that_computes_all_experts_compiles(monkeypatch):
    # Without the shape checks of the tests
    for owner, name in ((SMoEDropout, "forward"), (SMoEDropout, "_masked"), (RandomRouter, "forward")):
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))
    top_k = RandomRouter.top_k
    monkeypatch.setattr(RandomRouter, "top_k", property(inspect.unwrap(top_k.fget), top_k.fset))
    layer, x = SMoEDropout(8, 12, 4, generator=seeded()), torch.randn(5, 8, generator=seeded(1))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    layer.impl = "masked"
    for k in (4, 3):  # a change is noticed
        layer.router.top_k = k
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_k": 0}, r"top_k must be in 1\.\.4, the number of experts, got 0"),
        ({"top_k": 5}, r"top_k must be in 1\.\.4, the number of experts, got 5"),
    ],
)
def test_bad_layers(arguments, message):
    with pytest.raises(ValueError, match=message):
        SMoEDropout(**({"dim": 8, "hidden_dim": 12, "num_experts": 4} | arguments))


def test_bad_settings_of_a_layer():
    with pytest.raises(ValueError, match=r"act must be one of silu, .* or a function, got 'swish'"):
        SMoEDropout(8, 12, 4, act="swish")
    layer = SMoEDropout(8, 12, 4)
    layer.impl = "dense"
    with pytest.raises(ValueError, match="impl must be 'auto', 'sparse' or 'masked', got 'dense'"):
        layer(torch.randn(2, 8))


# Models


@FAMILIES
@pytest.mark.parametrize("num_experts", [1, 2, 8])
def test_all_experts_with_equal_scores_are_the_dense_model(family, num_experts):
    dense = build(family)
    model = equal_scores(smoe_dropout_convert(copy.deepcopy(dense), num_experts, generator=seeded()))
    assert len(layers_of(model)) == 2
    torch.testing.assert_close(model(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=1e-5)


@FAMILIES
def test_slices_of_half_the_neurons_average_to_the_dense_layer(family):
    """As inverted dropout does: the mean over all sets of k experts, at equal scores, is the layer with all of them."""
    dense = build(family)
    model = equal_scores(smoe_dropout_convert(copy.deepcopy(dense), 4, k_min=2))
    layer, x = layers_of(model)[0], torch.randn(5, 16, generator=seeded(1))
    whole = dense.model.layers[0].mlp if family == "llama" else dense.transformer.h[0].mlp if family == "gpt2" else None
    if family == "bert":
        block = dense.bert.encoder.layer[0]
        expected = block.output.dense(block.intermediate(x))
    else:
        expected = whole(x)
    outputs = []
    for chosen in itertools.combinations(range(4), 2):
        layer.router.bias.zero_()
        layer.router.bias[list(chosen)] = 1.0
        outputs.append(layer(x))
    torch.testing.assert_close(torch.stack(outputs).mean(0), expected, atol=1e-5, rtol=1e-5)


@FAMILIES
def test_a_conversion_adds_no_parameter_and_gives_each_layer_a_router_of_its_own(family):
    dense = build(family)
    before = sum(parameter.numel() for parameter in dense.parameters())
    model = smoe_dropout_convert(dense, 4, generator=seeded())
    assert model is dense
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    first, second = layers_of(model)
    assert not torch.equal(first.router.weight, second.router.weight)
    again = layers_of(smoe_dropout_convert(build(family), 4, generator=seeded()))
    assert torch.equal(first.router.weight, again[0].router.weight)


@FAMILIES
def test_fresh_experts_do_not_depend_on_the_dense_weights(family):
    first, second = build(family), build(family)
    for parameter in second.parameters():
        parameter.data.mul_(2)
    models = [smoe_dropout_convert(model, 4, fresh=True, generator=seeded()) for model in (first, second)]
    for one, other in zip(*map(layers_of, models), strict=True):
        torch.testing.assert_close(one.state_dict(), other.state_dict())
        assert one.down_proj.abs().max().item() == pytest.approx(16**-0.5, rel=0.05), "as nn.Linear draws them"


def test_only_the_layers_that_were_named_are_converted():
    model = smoe_dropout_convert(build("llama"), 4, layers=[1], generator=seeded())
    assert isinstance(model.model.layers[1].mlp, SMoEDropout)
    assert not isinstance(model.model.layers[0].mlp, SMoEDropout)


@FAMILIES
def test_a_model_in_bfloat16_stays_in_it(family):
    model = smoe_dropout_convert(build(family).bfloat16(), 4, k_min=2, generator=seeded())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert layers_of(model)[0].router.weight.dtype == torch.bfloat16
    assert model(TOKENS).logits.isfinite().all()


def test_a_converted_model_generates():
    model = smoe_dropout_convert(build("llama"), 4, k_min=2, generator=seeded())
    kept = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=6, do_sample=False)
    redone = model.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(kept, redone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"num_experts": 5}, "num_experts must divide the 64 hidden neurons of .*, got 5"),
        ({"num_experts": 4, "k_min": 5}, r"k_min must be in 1\.\.4, the number of experts, got 5"),
        ({"num_experts": 4, "k_min": 0}, r"k_min must be in 1\.\.4, the number of experts, got 0"),
    ],
)
def test_a_conversion_that_cannot_be_leaves_the_model_alone(arguments, message):
    model = build("llama")
    with pytest.raises(ValueError, match=message):
        smoe_dropout_convert(model, **arguments)
    assert not layers_of(model)


def test_a_model_is_not_converted_twice():
    model = smoe_dropout_convert(build("llama"), 4, generator=seeded())
    with pytest.raises(ValueError, match="holds SMoEDropout in place of its dense block"):
        smoe_dropout_convert(model, 2)


def test_unknown_models_are_refused():
    with pytest.raises(ValueError, match="Linear"):
        smoe_dropout_convert(nn.Linear(2, 2), 2)


# The number of active experts is state


def test_active_experts_are_set_in_all_layers():
    model = smoe_dropout_convert(build("gpt2"), 4, generator=seeded())
    outputs = []
    for k in (1, 2, 3, 4):
        set_active_experts(model, k)
        assert [layer.router.top_k for layer in layers_of(model)] == [k, k]
        assert layers_of(model)[0].router(torch.randn(3, 16))[2].shape == (3, k)
        outputs.append(model(TOKENS).logits)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(outputs, 2))


def test_bad_numbers_of_active_experts():
    model = smoe_dropout_convert(build("gpt2"), 4, k_min=3)
    for k in (0, 5):
        with pytest.raises(ValueError, match=rf"k must be in 1\.\.4, the experts that every layer has, got {k}"):
            set_active_experts(model, k)
    assert [layer.router.top_k for layer in layers_of(model)] == [3, 3]
    with pytest.raises(ValueError, match="model must have SMoEDropout layers, GPT2LMHeadModel has none"):
        set_active_experts(build("gpt2"), 1)


@pytest.mark.parametrize("assign", [False, True])
def test_active_experts_are_loaded_with_the_weights(assign):
    saved = smoe_dropout_convert(build("gpt2"), 4, k_min=3, generator=seeded(1))
    loaded = smoe_dropout_convert(build("gpt2"), 4, generator=seeded(2))
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()), assign=assign)
    assert [layer.router.top_k for layer in layers_of(loaded)] == [3, 3]
    assert torch.equal(loaded(TOKENS).logits, saved(TOKENS).logits)
    set_active_experts(loaded, 2)
    assert [int(layer.router.active_experts) for layer in layers_of(loaded)] == [2, 2]


def test_active_experts_are_in_a_safetensors_file(tmp_path):
    saved = smoe_dropout_convert(build("bert"), 4, k_min=3, generator=seeded(1))
    save_model(saved, tmp_path / "model.safetensors")
    loaded = smoe_dropout_convert(build("bert"), 4)
    load_model(loaded, tmp_path / "model.safetensors")
    assert [layer.router.top_k for layer in layers_of(loaded)] == [3, 3]
    assert torch.equal(loaded(TOKENS).logits, saved(TOKENS).logits)


def test_a_copy_has_a_number_of_its_own():
    model = smoe_dropout_convert(build("bert"), 4, k_min=2)
    other = copy.deepcopy(model)
    set_active_experts(other, 4)
    other.load_state_dict(model.state_dict())
    assert layers_of(other)[0].router.top_k == 2
    set_active_experts(other, 3)
    assert layers_of(model)[0].router.top_k == 2
    assert int(layers_of(model)[0].router.active_experts) == 2


# The callback


class Watch(TrainerCallback):
    """The number of active experts in each forward of training."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for layer in layers_of(model)[:1]:
            layer.register_forward_pre_hook(lambda layer, inputs: self.seen.append(layer.router.top_k))


def train(folder, resume=None, **arguments):
    model = smoe_dropout_convert(build("gpt2"), 4, generator=seeded())
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(48, (48, 8), generator=seeded(5))]
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    watch = Watch()
    callback = SMoEDropoutCallback(**({"k_min": 1, "k_max": 4} | arguments))
    Trainer(model, settings, train_dataset=rows, callbacks=[callback, watch]).train(resume_from_checkpoint=resume)
    return model, watch.seen


def test_trainer_follows_the_schedule_and_resumes_in_its_middle(tmp_path):
    whole, seen = train(tmp_path)
    expected = [smoe_dropout_num_experts(step, 8, 1, 4) for step in range(9)]
    assert seen == [k for k in expected[:-1] for _ in range(2)], "twice: gradients of two batches are added up"
    assert len(set(seen)) == 4
    assert [layer.router.top_k for layer in layers_of(whole)] == [4, 4], "the end of the schedule, for use"
    resumed, rest = train(tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert rest == seen[6:]
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_trainer_with_another_schedule(tmp_path):
    _, seen = train(tmp_path, k_min=2, k_max=3, mode="multi_step")
    assert seen == [2] * 8 + [3] * 8


def test_bad_callbacks(tmp_path):
    with pytest.raises(ValueError, match="1 <= k_min <= k_max, got 3 and 2"):
        SMoEDropoutCallback(3, 2)
    with pytest.raises(ValueError, match="k_max must be at most 4, the experts that every layer has, got 5"):
        train(tmp_path, k_max=5)
