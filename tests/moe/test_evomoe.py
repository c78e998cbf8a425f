import copy
import json
import math
from pathlib import Path

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, load_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from firsthand.moe.evomoe import (
    DTSRouter,
    EvoMoECallback,
    diversify_experts,
    dts_active_experts,
    dts_balance_loss,
    dts_gate,
    dts_temperature,
    evomoe_convert,
    set_dts_gate,
)
from firsthand.moe.layer import MoE

EXPERTS = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def logits():
    return 2 * torch.randn(9, EXPERTS, generator=seeded())


# The gate


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_gate_without_threshold_is_the_gumbel_softmax_of_torch(logits, temperature):
    torch.manual_seed(1)
    expected = F.gumbel_softmax(logits, tau=temperature)
    torch.manual_seed(1)
    gate = dts_gate(logits, temperature, threshold=0.0)
    assert torch.equal(gate.weights, expected)
    torch.manual_seed(1)
    chosen = dts_gate(logits, temperature, hard=True).mask
    torch.manual_seed(1)
    assert torch.equal(chosen, F.gumbel_softmax(logits, hard=True) > 0.5)


def test_only_what_is_above_the_threshold_is_kept_and_not_normalised(logits):
    noise = torch.randn(logits.shape, generator=seeded(1))
    gate = dts_gate(logits, 0.7, threshold=0.2, gumbel_noise=noise)
    for z, n, weights, mask in zip(logits.double(), noise.double(), gate.weights, gate.mask, strict=True):
        powers = [math.exp((a + b) / 0.7) for a, b in zip(z.tolist(), n.tolist(), strict=True)]
        shares = [power / sum(powers) for power in powers]
        assert mask.tolist() == [share > 0.2 for share in shares]
        assert weights.tolist() == pytest.approx([share if share > 0.2 else 0 for share in shares], rel=1e-5)
    assert gate.weights.sum(1).min() < 0.95


def test_at_a_high_temperature_all_experts_share_a_token_equally(logits):
    gate = dts_gate(logits, 1e6, generator=seeded())
    assert gate.mask.all()
    torch.testing.assert_close(gate.weights, torch.full_like(logits, 1 / EXPERTS), atol=1e-4, rtol=0)
    assert gate.aux_loss.item() == pytest.approx(EXPERTS, rel=1e-3)


def test_at_a_low_temperature_one_expert_is_left_with_the_probability_of_the_softmax():
    z = torch.tensor([1.0, 0.0, -1.0, 0.5])
    gate = dts_gate(z.expand(20_000, -1), 1e-4, generator=seeded())
    alone = gate.mask.sum(1) == 1
    assert alone.float().mean() > 0.999
    torch.testing.assert_close(gate.weights[alone], gate.mask[alone].float(), atol=3e-3, rtol=0)  # three of at most 0.001
    chosen = gate.mask[alone].sum(0).numpy()
    assert scipy.stats.chisquare(chosen, chosen.sum() * z.softmax(0).double().numpy(), sum_check=False).pvalue > 0.01


def test_softmax_weights_have_no_noise_in_them(logits):
    gate = dts_gate(logits, 0.5, threshold=0.05, weight_source="softmax", generator=seeded())
    assert not gate.mask.all()
    torch.testing.assert_close(gate.weights, torch.where(gate.mask, logits.softmax(-1), 0.0))


def test_a_hard_gate_keeps_the_largest_whatever_the_threshold(logits):
    noise = torch.zeros_like(logits)
    gate = dts_gate(logits, 1.0, threshold=0.99, gumbel_noise=noise, hard=True)
    assert gate.mask.sum(1).eq(1).all()
    torch.testing.assert_close(gate.weights.sum(1), logits.softmax(-1).max(1).values)


def test_the_dense_gate_is_the_softmax(logits):
    gate = dts_gate(logits, 0, threshold=0.5)
    assert gate.mask.all()
    assert torch.equal(gate.weights, logits.softmax(-1))
    assert gate.aux_loss.item() == 0


def test_balance_loss_by_hand():
    even = torch.eye(EXPERTS).repeat(3, 1) * 50  # each token is sure of its expert, and the experts share the tokens
    none = torch.zeros_like(even)
    assert dts_gate(even, 1.0, hard=True, gumbel_noise=none).aux_loss.item() == pytest.approx(1)
    uniform = dts_gate(none, 1.0, hard=True, weight_source="softmax", gumbel_noise=even)
    assert uniform.aux_loss.item() == pytest.approx(1 / EXPERTS)
    one_for_all = even[:1].expand(8, -1)
    assert dts_gate(one_for_all, 1.0, hard=True, gumbel_noise=none[:8]).aux_loss.item() == pytest.approx(EXPERTS)


def test_descending_the_balance_loss_balances():
    z = torch.tensor([3.0, 0.0, 0.0, 0.0]).repeat(256, 1).requires_grad_()
    before = dts_gate(z, 0.3, generator=seeded()).aux_loss
    (gradient,) = torch.autograd.grad(before, z)
    after = dts_gate(z - 500 * gradient, 0.3, generator=seeded()).aux_loss
    assert gradient[:, 0].sum() > 0
    assert after < before


def test_one_expert_is_always_chosen_with_weight_one():
    for hard in (False, True):
        for source in ("gumbel", "softmax"):
            gate = dts_gate(torch.randn(5, 1), 0.3, hard=hard, weight_source=source)
            assert torch.equal(gate.weights, torch.ones(5, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gate_is_worked_out_in_float32_or_wider(logits, dtype):
    gate = dts_gate(logits.to(dtype), 0.3, generator=seeded())
    assert gate.weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gate.weights.isfinite().all()


def test_extreme_scores_stay_finite():
    z = torch.tensor([[1e30, -1e30, 0.0, 1e30]], requires_grad=True)
    gate = dts_gate(z, 0.3)
    gate.weights.sum().backward()
    assert gate.weights.isfinite().all()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"threshold": 1.0}, "threshold must be in"),
        ({"threshold": -0.1}, "threshold must be in"),
        ({"weight_source": "logits"}, "weight_source must be"),
    ],
)
def test_bad_gates(logits, arguments, message):
    with pytest.raises(ValueError, match=message):
        dts_gate(logits, **({"temperature": 1.0} | arguments))
    with pytest.raises(ValueError, match=message):
        DTSRouter(8, EXPERTS, **arguments)


# The schedule


def test_temperature_falls_in_a_line_or_a_geometric_series():
    assert [dts_temperature(n, 4, 2.0, 1.0) for n in (0, 1, 2, 4, 9)] == pytest.approx([2, 1.75, 1.5, 1, 1])
    assert [dts_temperature(n, 2, 4.0, 1.0, "exp") for n in (0, 1, 2, 7)] == pytest.approx([4, 2, 1, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": -1}, "step must be"),
        ({"total_steps": 0}, "total_steps must be"),
        ({"t_min": 0.0}, "t_min and t_max"),
        ({"t_min": 3.0}, "t_min and t_max"),
        ({"t_max": math.inf}, "t_min and t_max"),
        ({"kind": "cosine"}, "kind must be"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        dts_temperature(**({"step": 0, "total_steps": 5} | arguments))


# Spawning


def test_masks_are_independent_bernoulli_and_biases_are_copied():
    weight, bias = torch.randn(60, 50), torch.randn(60)
    experts = diversify_experts({"w": weight, "b": bias}, 3, 0.1, generator=seeded())
    masks = experts["w"] == 0
    assert torch.equal(experts["w"], torch.where(masks, 0.0, weight))
    assert torch.equal(experts["b"], bias.expand(3, -1))
    for mask in masks:
        assert scipy.stats.binomtest(int(mask.sum()), mask.numel(), 0.1).pvalue > 0.01
    both = int((masks[0] & masks[1]).sum())
    assert scipy.stats.binomtest(both, masks[0].numel(), 0.01).pvalue > 0.01


def test_rescaled_experts_have_the_base_as_their_mean():
    weight = torch.rand(6, 5) + 1
    mean = diversify_experts({"w": weight}, 20_000, 0.3, rescale=True, generator=seeded())["w"].mean(0)
    torch.testing.assert_close(mean, weight, atol=0.05, rtol=0)


def test_noise_is_relative_to_the_weights():
    weight = 7 * torch.randn(300, 200, generator=seeded(1))
    noisy = diversify_experts({"w": weight}, 2, 0.0, noise=0.1, generator=seeded())["w"]
    assert (noisy[0] - weight).std().item() == pytest.approx(0.7, rel=0.02)
    assert not torch.equal(noisy[0], noisy[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be"),
        ({"mask_prob": 1.0}, "mask_prob must be"),
        ({"mask_prob": -0.1}, "mask_prob must be"),
        ({"noise": -1.0}, "noise must be"),
        ({"noise": math.nan}, "noise must be"),
    ],
)
def test_bad_spawning(arguments, message):
    with pytest.raises(ValueError, match=message):
        diversify_experts(**({"state": {"w": torch.ones(2, 2)}, "num_experts": 2} | arguments))


# The layer in a model


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def build(family="llama", **config):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(
            LlamaConfig(**SIZES | {"initializer_range": 0.2, "mlp_bias": config.pop("mlp_bias", False)}, **config)
        )
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES | {"initializer_range": 0.2, "num_key_value_heads": 1}))
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, n_inner=24, initializer_range=0.2)
        )
    return BertForMaskedLM(BertConfig(**SIZES | {"initializer_range": 0.2}))


@pytest.fixture
def tokens():
    return torch.randint(40, (3, 10), generator=seeded())


def moe_layers(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "bert"])
def test_copies_behind_weights_that_sum_to_one_are_the_dense_model(family, tokens):
    model = build(family).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    expected = model(tokens).logits
    evomoe_convert(model, EXPERTS, mask_prob=0.0, threshold=0.0)
    for layer in moe_layers(model):
        layer.train()  # and not the whole model, which may have dropout
    torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert dts_active_experts(model) == EXPERTS


def test_a_llama_with_biases_is_converted_with_them(tokens):
    model = build(mlp_bias=True).eval()
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            torch.nn.init.normal_(part.bias)
    expected = model(tokens).logits
    evomoe_convert(model, 1)  # one expert without a mask is the dense model, whatever the gate
    assert moe_layers(model)[0].gate_up_bias is not None
    masked = model(tokens).logits
    assert not torch.allclose(masked, expected)
    model = evomoe_convert(build(mlp_bias=True), 1, mask_prob=0.0).eval()
    torch.testing.assert_close(model(tokens).logits, build(mlp_bias=True).eval()(tokens).logits, atol=1e-5, rtol=1e-5)


def test_only_the_chosen_experts_are_computed_and_count(tokens):
    """Against a loop over all experts that multiplies by weights, many of them 0."""
    model = evomoe_convert(build(), EXPERTS, mask_prob=0.5, threshold=0.2, temperature=0.5, generator=seeded()).train()
    layer = moe_layers(model)[0]
    x = torch.randn(7, 16, generator=seeded(2), requires_grad=True)
    y = layer(x)
    gate, routing = layer.router.last_gate, layer.last_routing
    assert int((routing.index == EXPERTS).sum()) > 0, "some tokens have fewer experts than others"
    assert int((routing.index < EXPERTS).sum()) == int(gate.mask.sum())
    assert active_experts_of(layer) == pytest.approx(gate.mask.sum(1).float().mean().item())
    each = []
    for first, down in zip(layer.gate_up_proj, layer.down_proj, strict=True):
        g, up = (x @ first.T).chunk(2, -1)
        each.append((F.silu(g) * up) @ down.T)
    expected = (torch.stack(each, 1) * gate.weights[..., None]).sum(1)
    torch.testing.assert_close(y, expected)
    probe = torch.randn(y.shape, generator=seeded(3))
    for ours, theirs in zip(
        torch.autograd.grad((y * probe).sum(), [x, layer.router.weight, layer.down_proj], retain_graph=True),
        torch.autograd.grad((expected * probe).sum(), [x, layer.router.weight, layer.down_proj]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def active_experts_of(layer):
    return dts_active_experts(torch.nn.Sequential(layer))


@pytest.mark.parametrize(("source", "scale"), [("softmax", 1), ("gumbel", 0.3)])
def test_evaluation_is_top_1_without_noise_weighted_as_in_training(source, scale):
    router = DTSRouter(8, EXPERTS, temperature=0.3, weight_source=source, generator=seeded())
    x = torch.randn(20, 8, generator=seeded(1))
    router(x)
    assert router.last_gate is not None
    logits, weights, index = router.eval()(x)
    best = (logits / scale).softmax(-1).topk(1)
    torch.testing.assert_close(weights, best.values)
    assert torch.equal(index, best.indices)
    assert router.last_gate is None
    assert torch.equal(router(x).weights, weights)


def test_a_token_without_experts_is_left_to_the_residual():
    model = torch.nn.Sequential(MoE(8, 4, EXPERTS, 1, router=DTSRouter(8, EXPERTS, temperature=100.0, threshold=0.9)))
    assert torch.equal(model(torch.randn(5, 8)), torch.zeros(5, 8))
    assert dts_active_experts(model) == 0


def test_set_gate_and_the_losses_of_all_layers(tokens):
    model = evomoe_convert(build(), EXPERTS).train()
    set_dts_gate(model, 0.5, hard=True)
    model(tokens)
    assert dts_active_experts(model) == 1
    layers = moe_layers(model)
    assert len(layers) == 2
    torch.testing.assert_close(
        dts_balance_loss(model), (layers[0].router.last_gate.aux_loss + layers[1].router.last_gate.aux_loss) / 2
    )
    dts_balance_loss(model).backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in layers)


def test_only_the_named_layers_are_converted():
    model = evomoe_convert(build(), EXPERTS, layers=[1])
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [False, True]


def test_conversion_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, other = (evomoe_convert(build(), EXPERTS, generator=seeded(7)).state_dict() for _ in range(2))
    torch.manual_seed(5)
    assert all(torch.equal(one[key], other[key]) for key in one)
    model = build()
    torch.set_rng_state(state)
    evomoe_convert(model, EXPERTS, generator=seeded(7))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_converted_models_train_in_their_type(tokens, dtype):
    model = evomoe_convert(build().to(dtype), EXPERTS).train()
    assert moe_layers(model)[0].down_proj.dtype == dtype
    (model(tokens, labels=tokens).loss + 0.01 * dts_balance_loss(model)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_a_converted_model_can_be_copied_after_a_step_saved_and_loaded(tokens, tmp_path):
    model = evomoe_convert(build(), EXPERTS).train()
    set_dts_gate(model, 0.75, hard=True)
    model(tokens, labels=tokens).loss.backward()
    twin = copy.deepcopy(model).eval()
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = evomoe_convert(build(), EXPERTS).eval()
    load_model(loaded, tmp_path / "model.safetensors")
    assert torch.equal(twin(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert loaded.model.layers[0].mlp.router.temperature.item() == 0.75
    assert loaded.model.layers[0].mlp.router.hard.item()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_optimiser_takes_the_experts_on_and_keeps_the_rest(family, tokens):
    """Groups by rate and decay, in another order than the model's: what replaces a parameter gets its group."""
    model = build(family).train()
    kinds = {
        "ffn": lambda name: not name.endswith("bias") and is_ffn(name),
        "ffn bias": lambda name: name.endswith("bias") and is_ffn(name),
        "rest": lambda name: not is_ffn(name),
    }
    groups = [
        {"params": chosen, "lr": rate}
        for rate, kind in enumerate(kinds.values(), start=1)
        if (chosen := [p for name, p in model.named_parameters() if kind(name)])
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    schedule.step()
    kept = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters() if kinds["rest"](name)}

    evomoe_convert(model, EXPERTS, optimizer=optimizer)
    own = dict(model.named_parameters())
    listed = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in listed} == {id(parameter) for parameter in own.values()}
    assert len(listed) == len(own)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in own.items():
        if name in kept:
            assert rates[id(parameter)] == optimizer.param_groups[-1]["lr"]
            for key, value in kept[name].items():
                assert torch.equal(optimizer.state[parameter][key], value)
        else:
            assert rates[id(parameter)] == 0.5 * (2 if name.endswith("bias") else 1)
            assert parameter not in optimizer.state
    assert set(optimizer.state) <= set(listed)

    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    optimizer.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    schedule.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in own.items() if parameter.grad.abs().sum() > 0)
    assert optimizer.param_groups[0]["lr"] == 0.25


def is_ffn(name):
    attention = ".attn" in name or "attention" in name
    return not attention and any(part in name for part in (".mlp.", "intermediate.", "output.dense"))


def test_experts_of_frozen_blocks_are_frozen(tokens):
    model = build()
    for layer in model.model.layers:
        layer.mlp.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    size = len(optimizer.param_groups[0]["params"])
    evomoe_convert(model, EXPERTS, optimizer=optimizer)
    assert not any(parameter.requires_grad for parameter in moe_layers(model)[0].parameters())
    assert len(optimizer.param_groups[0]["params"]) == size


def test_bad_conversions(tokens):
    model = build()
    with pytest.raises(ValueError, match="layers must be"):
        evomoe_convert(model, EXPERTS, layers=[2])
    for arguments in ({"mask_prob": 1.0}, {"threshold": 1.0}, {"temperature": -1.0}, {"weight_source": "x"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            evomoe_convert(model, EXPERTS, **arguments)
        assert not moe_layers(model), "the model is as it was"
    with pytest.raises(ValueError, match="no feed-forward block of a known form"):
        evomoe_convert(torch.nn.Linear(2, 2), EXPERTS)
    for call in (lambda: set_dts_gate(model, 1.0), lambda: dts_balance_loss(model)):
        with pytest.raises(ValueError, match="model must have dense-to-sparse gates"):
            call()
    with pytest.raises(ValueError, match="and have been run"):
        dts_active_experts(model)
    evomoe_convert(model, EXPERTS)
    with pytest.raises(ValueError, match="has dense-to-sparse gates already"):
        evomoe_convert(model, EXPERTS)
    with pytest.raises(ValueError, match="and have been run"):
        dts_active_experts(model)
    model.eval()(tokens)
    with pytest.raises(ValueError, match="training mode"):
        dts_balance_loss(model)


# The Trainer


def rows(count=48):
    return [{"input_ids": row, "labels": row} for row in torch.randint(3, 40, (count, 8), generator=seeded())]


def trainer(folder, model=None, callback=None, **settings):
    callback = callback or EvoMoECallback(EXPERTS, dense_steps=4, gate_steps=4, mask_prob=0.2)
    settings = {
        "output_dir": str(folder),
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "warmup_steps": 3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | settings
    return Trainer(
        model or build(), TrainingArguments(**settings), train_dataset=rows(), eval_dataset=rows(8), callbacks=[callback]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run through all three phases: folder, final weights and log."""
    folder = tmp_path_factory.mktemp("whole")
    run = trainer(folder)
    run.train()
    return folder, run.model.state_dict(), run.state.log_history, run


def test_the_log_shows_the_three_phases(whole):
    steps = [entry for entry in whole[2] if "loss" in entry]
    assert [("active_experts" in entry) for entry in steps] == [False] * 4 + [True] * 8
    # linear over steps 4 to 8; from there the gate is hard
    assert [entry["gate_temperature"] for entry in steps[4:]] == pytest.approx([2.0, 1.575, 1.15, 0.725] + [0.3] * 4)
    assert all(1 < entry["active_experts"] <= EXPERTS for entry in steps[4:8])
    assert [entry["active_experts"] for entry in steps[8:]] == [1] * 4
    assert [entry["learning_rate"] for entry in steps] == pytest.approx(
        [0.01 * (step / 3 if step < 3 else (12 - step) / 9) for step in range(12)]
    ), "the schedule is that of one run"


@pytest.mark.parametrize("step", [2, 4, 6, 8, 10])
def test_a_run_that_is_stopped_in_any_phase_and_resumed_is_the_same_run(whole, step, tmp_path):
    folder, final, _, _ = whole
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    state = resumed.model.state_dict()
    assert state.keys() == final.keys()
    assert all(torch.equal(state[key], final[key]) for key in final)
    ours, theirs = resumed.optimizer.state_dict(), whole[3].optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, values in theirs["state"].items():
        assert all(
            torch.equal(torch.as_tensor(ours["state"][key][name]), torch.as_tensor(value)) for name, value in values.items()
        )


def test_what_is_saved_is_dense_before_spawning_and_sparse_after(whole):
    dense, sparse = (load_file(whole[0] / f"checkpoint-{step}" / "model.safetensors") for step in (4, 6))
    assert dense.keys() == build().state_dict().keys()
    assert sparse.keys() == evomoe_convert(build(), EXPERTS).state_dict().keys()


def test_optimiser_state_of_the_rest_goes_on_at_spawning(whole):
    run = whole[3]
    steps = {name: int(run.optimizer.state[p]["step"]) for name, p in run.model.named_parameters()}
    assert {steps[name] for name in steps if ".mlp." in name} == {8}
    assert {steps[name] for name in steps if ".mlp." not in name} == {12}


def test_an_optimiser_of_ones_own_is_resumed_too(whole, tmp_path):
    def own():
        model = build()
        optimizer = torch.optim.AdamW(list(model.parameters())[::-1], lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        settings = TrainingArguments(
            str(tmp_path), max_steps=10, save_steps=5, report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False
        )
        callback = EvoMoECallback(EXPERTS, dense_steps=2, gate_steps=5)
        return Trainer(model, settings, train_dataset=rows(), callbacks=[callback], optimizers=(optimizer, schedule))

    first, second = own(), own()
    first.train()
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    expected = first.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in second.model.state_dict().items())


def test_a_dense_checkpoint_in_a_sparse_model_takes_the_experts_out(whole, tmp_path):
    """As when the best model, to be loaded at the end, is from the dense phase."""
    folder, final, _, _ = whole
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-10"))
    assert moe_layers(again.model)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))  # the same Trainer, back in the dense phase
    assert all(torch.equal(value, final[key]) for key, value in again.model.state_dict().items())


def test_load_best_model_at_end_from_the_dense_phase(tmp_path):
    run = trainer(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="runtime_stub",
        greater_is_better=True,
    )
    values = iter([1.0, *[0.0] * 5])
    evaluate = run.evaluate
    run.evaluate = lambda *args, **kwargs: evaluate(*args, **kwargs) | {"eval_runtime_stub": next(values)}
    run.train()
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    state = run.model.state_dict()
    assert state.keys() == best.keys()
    assert all(torch.equal(state[key], best[key]) for key in best)


def test_balance_is_part_of_the_loss_in_training_only_and_only_during_the_run(tokens, tmp_path):
    callback = EvoMoECallback(EXPERTS, dense_steps=0, gate_steps=4, balance=100.0)
    run = trainer(tmp_path, callback=callback, max_steps=1, learning_rate=0.0, save_strategy="no")
    run.train()
    logged = run.state.log_history[0]["loss"]
    plain = evomoe_convert(build(), EXPERTS)(tokens, labels=tokens).loss.item()
    assert plain < 20
    assert logged > 100  # 100 times a loss that is about 4 where all experts are chosen
    assert run.evaluate()["eval_loss"] < 20
    assert run.model.train()(tokens, labels=tokens).loss.item() < 20


def test_balance_does_not_grow_with_gradient_accumulation(tmp_path):
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        callback = EvoMoECallback(EXPERTS, 0, 4, balance=100.0, threshold=0.0, mask_prob=0.0)  # the loss is E exactly
        run = trainer(
            tmp_path,
            callback=callback,
            max_steps=1,
            save_strategy="no",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0] > 400


def test_mixed_precision_goes_through_all_phases(tmp_path):
    run = trainer(tmp_path, bf16=True, save_strategy="no")
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert entries[-1]["active_experts"] == 1
    assert all(math.isfinite(entry["grad_norm"]) for entry in entries)
    assert moe_layers(run.model)[0].down_proj.dtype == torch.float32


def test_activation_checkpointing_changes_nothing():
    """The gate's noise is drawn again the same, so the gradients are those without it."""
    gradients = []
    for checkpointing in (False, True):
        model = evomoe_convert(build(), EXPERTS, generator=seeded()).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        x = torch.arange(20).view(2, 10)
        loss = model(x, labels=x, use_cache=False).loss
        (loss + dts_balance_loss(model)).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_other_hosts_resume_too(family, tmp_path):
    first = trainer(tmp_path, build(family), save_steps=6, max_steps=8)
    first.train()
    second = trainer(tmp_path, build(family), max_steps=8)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    expected = first.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in second.model.state_dict().items())


def test_a_copy_of_a_watched_model_has_no_part_in_the_run(tmp_path):
    run = trainer(tmp_path)
    twin = copy.deepcopy(run.model)
    run.train()
    listed = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    twin.load_state_dict(run.model.state_dict())
    assert moe_layers(twin)
    assert [id(p) for p in listed] == [id(p) for group in run.optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ({"num_experts": 3}, "num_experts and layers must be those of the checkpoint"),
        ({"layers": [0]}, "num_experts and layers must be those of the checkpoint"),
        ({"dense_steps": 9}, "has experts already at step 6"),
    ],
)
def test_a_checkpoint_of_another_schedule_is_refused(whole, callback, message, tmp_path):
    other = EvoMoECallback(**({"num_experts": EXPERTS, "dense_steps": 4, "gate_steps": 4} | callback))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, callback=other).train(resume_from_checkpoint=str(whole[0] / "checkpoint-6"))


def test_a_callback_that_comes_too_late_says_so(whole, tmp_path):
    settings = TrainingArguments(str(tmp_path), max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True)
    late = Trainer(build(), settings, train_dataset=rows())
    late.add_callback(EvoMoECallback(EXPERTS, dense_steps=4, gate_steps=4))
    with pytest.raises(ValueError, match="no experts at step 6"):
        late.train(resume_from_checkpoint=str(whole[0] / "checkpoint-6"))


def test_a_loss_of_ones_own_needs_the_balance_added_to_it(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    for balance in (0.01, 0.0):
        run = trainer(tmp_path, callback=EvoMoECallback(EXPERTS, 1, 4, balance=balance), max_steps=2, save_strategy="no")
        run.compute_loss_func = loss
        if balance:
            with pytest.raises(ValueError, match="set balance=0 and add dts_balance_loss"):
                run.train()
        else:
            run.train()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts must be"),
        ({"dense_steps": -1}, "dense_steps must be"),
        ({"gate_steps": 0}, "total_steps must be"),
        ({"hard_step": 3}, "hard_step must be"),
        ({"t_min": 0.0}, "t_min and t_max"),
        ({"kind": "cosine"}, "kind must be"),
        ({"balance": -1.0}, "balance must be"),
        ({"mask_prob": 1.0}, "mask_prob must be"),
        ({"noise": -1.0}, "noise must be"),
        ({"threshold": 1.0}, "threshold must be"),
        ({"weight_source": "x"}, "weight_source must be"),
    ],
)
def test_bad_callbacks(arguments, message):
    with pytest.raises(ValueError, match=message):
        EvoMoECallback(**({"num_experts": 2, "dense_steps": 4, "gate_steps": 4} | arguments))


def test_several_devices_are_refused(tmp_path):
    run = trainer(tmp_path)
    run.args.fsdp = True
    callback = EvoMoECallback(EXPERTS, 4, 4)
    with pytest.raises(NotImplementedError, match="one device"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)


def test_trainer_state_names_no_callback_that_must_be_restored(whole):
    """Step and weights say it all: nothing of the callback is in the checkpoint."""
    state = json.loads(Path(whole[0] / "checkpoint-6" / "trainer_state.json").read_text())
    assert set(state["stateful_callbacks"]) == {"TrainerControl"}
