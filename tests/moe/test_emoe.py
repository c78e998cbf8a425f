import copy
import inspect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, Qwen2Config

from firsthand.moe.emoe import EMoEMLP, balanced_assignment, cluster_ffn_neurons, emoe_convert, emoe_merge
from firsthand.moe.ffn import FFNWeights, ffn_slots
from firsthand.moe.layer import Routing, TopKRouter

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_inner=48, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1),
    "bert": BertConfig(**SIZES, max_position_embeddings=32),
}
every_host = pytest.mark.parametrize("host", CONFIGS)
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SCORES = ["gate", "up", "up_abs", "inter", "inter_abs"]


def build(host="bert"):
    torch.manual_seed(0)
    model = AutoModel.from_config(copy.deepcopy(CONFIGS[host])).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, and large enough that a wrong one shows
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@pytest.fixture
def tokens():
    return torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def states(model, tokens):
    return model(input_ids=tokens).last_hidden_state


def block(gated=False, bias=True, hidden=24, dim=8, act="gelu", dtype=torch.float64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    return FFNWeights(
        up=draw(hidden, dim),
        down=draw(dim, hidden),
        gate=draw(hidden, dim) if gated else None,
        up_bias=draw(hidden) if bias else None,
        gate_bias=draw(hidden) if gated and bias else None,
        down_bias=draw(dim) if bias else None,
        act=act,
    )


def draw(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


ACT = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def by_hand(ffn, x, groups, chosen_of):
    """The dense block, token by token, with the columns of all experts but the chosen set to nought."""
    outputs = []
    for token in x:
        up = F.linear(token, ffn.up, ffn.up_bias)
        inner = ACT[ffn.act](up) if ffn.gate is None else ACT[ffn.act](F.linear(token, ffn.gate, ffn.gate_bias)) * up
        mask = torch.zeros(len(ffn.up), dtype=x.dtype)
        for expert in chosen_of(token, inner):
            mask[groups == expert] = 1
        outputs.append(F.linear(inner * mask, ffn.down, ffn.down_bias))
    return torch.stack(outputs)


def experts_by_score(ffn, groups, top_k, score):
    keys = ffn.up if ffn.gate is None else ffn.gate

    def chosen(token, inner):
        values = {
            "gate": keys @ token,
            "up": ffn.up @ token,
            "up_abs": F.linear(token, ffn.up, ffn.up_bias).abs(),
            "inter": inner,
            "inter_abs": inner.abs(),
        }[score]
        means = [values[groups == expert].mean().item() for expert in range(int(groups.max()) + 1)]
        return sorted(range(len(means)), key=lambda expert: -means[expert])[:top_k]

    return chosen


# The grouping


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ties", [False, True])
def test_balanced_assignment_costs_what_scipys_does_with_repeated_columns(seed, ties):
    rng = np.random.default_rng(seed)
    clusters, each = int(rng.integers(1, 9)), int(rng.integers(1, 9))
    shape = clusters * each, clusters
    cost = rng.integers(0, 4, shape).astype(float) if ties else rng.normal(size=shape) - 3 * rng.random(clusters)
    assigned = balanced_assignment(cost)
    assert np.bincount(assigned, minlength=clusters).tolist() == [each] * clusters
    repeated = np.repeat(cost, each, axis=1)
    best = repeated[linear_sum_assignment(repeated)].sum()
    assert cost[np.arange(len(cost)), assigned].sum() == pytest.approx(best, abs=1e-9)


def test_balanced_assignment_when_all_prefer_one_cluster_and_when_none_does():
    cost = np.zeros((12, 3))
    assert np.bincount(balanced_assignment(cost)).tolist() == [4, 4, 4]
    cost[:, 0] = -np.arange(12)  # the last four gain most
    assert np.flatnonzero(balanced_assignment(cost) == 0).tolist() == [8, 9, 10, 11]


def test_balanced_assignment_does_not_mind_what_a_cluster_or_a_point_costs_in_itself():
    rng = np.random.default_rng(0)
    cost = rng.normal(size=(40, 5))
    moved = cost + rng.normal(size=(40, 1)) + 100 * rng.normal(size=5)
    np.testing.assert_array_equal(balanced_assignment(cost), balanced_assignment(moved))


@pytest.mark.parametrize("method", ["balanced_kmeans", "random", "contiguous"])
def test_experts_are_of_equal_size_and_a_seed_gives_the_same_again(method):
    weight = draw(60, 7, dtype=torch.float32)
    groups = cluster_ffn_neurons(weight, 5, method, seed=3)
    assert groups.bincount().tolist() == [12] * 5
    torch.testing.assert_close(groups, cluster_ffn_neurons(weight, 5, method, seed=3))
    if method != "contiguous":
        assert (groups != cluster_ffn_neurons(weight, 5, method, seed=4)).any()


def within(weight, groups):
    rows = F.normalize(weight, dim=1)
    return sum((rows[groups == e] - rows[groups == e].mean(0)).square().sum().item() for e in range(int(groups.max()) + 1))


def test_planted_groups_are_found_whatever_the_lengths_of_the_rows():
    directions = torch.linalg.qr(draw(8, 8))[0][:6]
    truth = torch.arange(6).repeat(10)[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    weight = (directions[truth] + 0.1 * draw(60, 8)) * draw(60, 1, seed=2).exp()
    groups = cluster_ffn_neurons(weight, 6)
    same = groups[:, None] == groups
    assert torch.equal(same, truth[:, None] == truth)


@pytest.mark.parametrize("seed", range(3))
def test_kmeans_groups_are_tighter_than_random_ones_and_can_not_be_had_cheaper_around_their_means(seed):
    weight = draw(96, 6, seed=seed)
    groups = cluster_ffn_neurons(weight, 8, seed=seed)
    assert within(weight, groups) < within(weight, cluster_ffn_neurons(weight, 8, "random", seed=seed))
    rows = F.normalize(weight, dim=1)
    means = torch.stack([rows[groups == expert].mean(0) for expert in range(8)])
    cost = torch.cdist(rows, means).square().numpy()
    again = balanced_assignment(cost)
    assert cost[np.arange(96), again].sum() == pytest.approx(cost[np.arange(96), groups].sum())


def test_a_dead_neuron_is_grouped_too():
    weight = draw(12, 4)
    weight[::3] = 0
    assert cluster_ffn_neurons(weight, 3).bincount().tolist() == [4, 4, 4]


# The layer


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False), (True, True)])
def test_layer_is_the_dense_block_with_the_columns_of_the_others_masked(score, act, gated, bias):
    ffn, x, groups = block(gated, bias, act=act), draw(9, 8), cluster_ffn_neurons(draw(24, 8), 6, "random")
    layer = EMoEMLP(ffn, groups, top_k=2, score=score, impl="masked")
    chosen = experts_by_score(ffn, groups, 2, "gate" if score == "up" and not gated else score)
    torch.testing.assert_close(layer(x), by_hand(ffn, x, groups, chosen))


@pytest.mark.parametrize(("gated", "bias"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("top_k", [1, 4])
def test_computing_the_chosen_only_comes_to_the_same_with_the_same_gradients(gated, bias, device, top_k):
    ffn, groups = block(gated, bias, device=device), torch.arange(24) % 6
    for part in ffn:
        if isinstance(part, torch.Tensor):
            part.requires_grad_()
    results = []
    for impl in ("sparse", "masked"):
        layer, x = EMoEMLP(ffn, groups, top_k, impl=impl), draw(3, 5, 8).to(device).requires_grad_()
        y = layer(x)
        inputs = [x, *layer.parameters()]
        results.append([y, *torch.autograd.grad((y * draw(3, 5, 8, seed=2).to(device)).sum(), inputs)])
    for sparse, masked in zip(*results, strict=True):
        torch.testing.assert_close(sparse, masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["sparse", "masked"])
@pytest.mark.parametrize("gated", [False, True])
def test_with_all_experts_it_is_the_dense_block(dtype, device, impl, gated):
    ffn, x = block(gated, dtype=dtype, device=device), draw(6, 8, dtype=dtype).to(device)
    y = EMoEMLP(ffn, torch.arange(24) % 4, top_k=4, impl=impl)(x)
    assert y.dtype == dtype
    wide = FFNWeights(*(part.double().cpu() if isinstance(part, torch.Tensor) else part for part in ffn))
    expected = by_hand(wide, x.double().cpu(), torch.arange(24) % 4, lambda *_: range(4))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(y.double().cpu(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_the_order_of_neurons_and_the_numbers_of_experts_do_not_matter():
    ffn, x, groups = block(), draw(9, 8), cluster_ffn_neurons(draw(24, 8), 6)
    expected = EMoEMLP(ffn, groups, 2)(x)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = ffn._replace(up=ffn.up[order], up_bias=ffn.up_bias[order], down=ffn.down[:, order])
    torch.testing.assert_close(EMoEMLP(shuffled, groups[order], 2)(x), expected)
    renamed = torch.tensor([3, 5, 0, 1, 4, 2])[groups]
    torch.testing.assert_close(EMoEMLP(ffn, renamed, 2)(x), expected)


def test_what_is_not_chosen_gets_no_gradient_and_the_gate_gives_none():
    """The tokens' gradient is that of the masked block alone: nothing comes through the scores."""
    ffn, x = block(bias=False, act="relu"), draw(1, 8).requires_grad_()
    ffn.up.requires_grad_()
    layer = EMoEMLP(ffn, torch.arange(24) // 4, top_k=2)
    layer(x).sum().backward()
    (chosen,) = layer.last_routing.index.tolist()
    touched = layer.gate_up_proj.grad.flatten(1).abs().sum(1).nonzero().flatten().tolist()
    assert touched == sorted(chosen)
    kept = torch.isin(torch.arange(24) // 4, torch.tensor(chosen))
    z = x.detach().requires_grad_()
    F.linear(F.relu(F.linear(z, ffn.up.detach())) * kept, ffn.down).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_live_means_follow_the_weights_and_frozen_ones_stay():
    ffn, x = block(), draw(20, 8)
    live, frozen = (EMoEMLP(ffn, torch.arange(24) % 6, 1, update=update) for update in ("live", "frozen"))
    before = live(x), live.last_routing.index, frozen(x), frozen.last_routing.index
    torch.testing.assert_close(before[0], before[2])
    with torch.no_grad():
        for layer in (live, frozen):
            layer.gate_up_proj.neg_()
    live(x), frozen(x)
    assert torch.equal(frozen.last_routing.index, before[3])
    assert (live.last_routing.index != before[1]).all(), "the best expert is now the worst"
    assert "key" in frozen.state_dict()
    assert "key" not in live.state_dict()


@pytest.mark.parametrize("impl", ["sparse", "masked"])
def test_a_router_may_take_the_place_of_the_score_and_its_weights_count(impl):
    ffn, x, groups = block(), draw(5, 8), torch.arange(24) % 6

    class Given(nn.Module):
        def forward(self, x):
            index = torch.tensor([[0, 6], [1, 2], [6, 6], [5, 0], [3, 3 + 1]])  # 6 is no expert
            return Routing(x.new_zeros(5, 6), x.new_full((5, 2), 1.0), index)

    y = EMoEMLP(ffn, groups, 2, router=Given(), impl=impl)(x)
    chosen = iter([[0], [1, 2], [], [5, 0], [3, 4]])
    torch.testing.assert_close(y, by_hand(ffn, x, groups, lambda *_: next(chosen)))

    learned = EMoEMLP(ffn, groups, 2, router=TopKRouter(8, 6, 2).double(), impl=impl)
    learned(x).square().sum().backward()
    assert learned.router.weight.grad.abs().sum() > 0


def test_layer_compiles(monkeypatch):
    monkeypatch.setattr(EMoEMLP, "forward", inspect.unwrap(EMoEMLP.forward))  # without the shape checks of the tests
    layer, x = EMoEMLP(block(gated=True), torch.arange(24) % 6, 3), draw(2, 5, 8)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_no_tokens_and_one_token():
    for impl in ("sparse", "masked"):
        layer = EMoEMLP(block(), torch.arange(24) % 6, 2, impl=impl)
        assert layer(torch.zeros(0, 3, 8, dtype=torch.float64)).shape == (0, 3, 8)
        assert layer(draw(8)).shape == (8,)


# Dense, experts, dense


@every_host
@pytest.mark.parametrize("method", ["balanced_kmeans", "random"])
def test_dense_to_experts_to_dense_loses_not_a_bit(host, method, tokens, tmp_path):
    model = build(host)
    kept, expected = copy.deepcopy(model.state_dict()), states(model, tokens)
    emoe_convert(model, [-1, 0], num_experts=6, top_k=2, method=method)
    assert [slot.module is not None for slot in ffn_slots(model)] == [True, False, True]
    assert not torch.allclose(states(model, tokens), expected)
    emoe_merge(model)
    assert list(model.state_dict()) == list(kept)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(states(model, tokens), expected)
    assert {name: type(part) for name, part in model.named_modules()} == {n: type(p) for n, p in build(host).named_modules()}

    model.save_pretrained(tmp_path)
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(states(loaded.eval(), tokens), expected)


@every_host
def test_with_all_experts_a_converted_model_is_the_dense_one(host, tokens):
    model = build(host)
    expected = states(model, tokens)
    emoe_convert(model, "all", num_experts=4, top_k=4)
    torch.testing.assert_close(states(model, tokens), expected, atol=1e-5, rtol=1e-4)


@every_host
def test_with_all_experts_tuning_and_merging_is_tuning_the_dense_model(host, tokens, tmp_path):
    dense, experts = build(host), emoe_convert(build(host), [0, 2], num_experts=4, top_k=4)
    start = copy.deepcopy(dense.state_dict())
    for model in (dense, experts):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            states(model, tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    emoe_merge(experts)
    assert any((value - start[name]).abs().max() > 1e-3 for name, value in dense.state_dict().items())
    for name, value in experts.state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[name], atol=1e-5, rtol=1e-4, msg=lambda text, name=name: name + text)
    experts.save_pretrained(tmp_path)
    torch.testing.assert_close(
        states(AutoModel.from_pretrained(tmp_path).eval(), tokens), states(dense, tokens), atol=1e-4, rtol=1e-4
    )


@every_host
def test_merged_after_tuning_holds_the_experts_own_numbers(host, tokens):
    model = emoe_convert(build(host), [1], num_experts=6, top_k=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    states(model, tokens).square().mean().backward()
    optimizer.step()
    (slot,) = ffn_slots(model, [1])
    experts = slot.module
    emoe_merge(model)
    ffn = slot.weights()
    size = 48 // 6
    for expert, members in enumerate(experts.neurons):
        first = experts.gate_up_proj[expert]
        assert torch.equal(ffn.up[members], first[-size:])
        assert ffn.gate is None or torch.equal(ffn.gate[members], first[:size])
        assert torch.equal(ffn.down[:, members], experts.down_proj[expert])


def test_a_converted_model_is_saved_and_resumed_as_any_other(tokens):
    """Its state says which neuron is where, so that another grouping at conversion does no harm."""
    first = emoe_convert(build(), [1, 2], num_experts=6, top_k=2, seed=0)
    second = emoe_convert(build(), [1, 2], num_experts=6, top_k=2, method="random", seed=7)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.mul_(1.1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(states(first, tokens), states(second, tokens))
    one, other = emoe_merge(first).state_dict(), emoe_merge(second).state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_conversion_keeps_what_is_frozen_the_mode_and_the_type(tokens):
    model = build().to(torch.bfloat16).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layer.2" in name)
    emoe_convert(model, "all", num_experts=6, top_k=2)
    for slot in ffn_slots(model):
        assert slot.module.training
        assert {parameter.requires_grad for parameter in slot.module.parameters()} == {slot.layer_index == 2}
        assert {parameter.dtype for parameter in slot.module.parameters()} == {torch.bfloat16}
    states(model, tokens)
    emoe_merge(model)
    assert all(parameter.requires_grad == ("layer.2" in name) for name, parameter in model.named_parameters())


def test_a_copy_of_a_converted_model_is_merged_by_itself(tokens):
    model = emoe_convert(build(), [0], num_experts=6, top_k=2)
    expected = states(model, tokens)
    emoe_merge(copy.deepcopy(model))
    assert torch.equal(states(model, tokens), expected)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 7}, "num_experts must divide the 48 neurons, got 7"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"top_k": 7}, "top_k must be at most num_experts = 6, got 7"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"layers": [0, 3]}, r"layers must be .* got 3"),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"score": "inter", "update": "frozen"}, "score 'inter' needs all neurons"),
        ({"score": "up_abs", "impl": "sparse"}, "score 'up_abs' needs all neurons"),
    ],
)
def test_bad_conversions_leave_the_model_as_it_was(arguments, message, tokens):
    model = build()
    expected = states(model, tokens)
    with pytest.raises(ValueError, match=message):
        emoe_convert(model, **({"layers": "all", "num_experts": 6, "top_k": 2} | arguments))
    assert all(slot.module is None for slot in ffn_slots(model))
    assert torch.equal(states(model, tokens), expected)


def unchecked(function):
    """As it is for a user, without the check of types that the tests switch on."""
    return inspect.unwrap(function)


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="method must be one of balanced_kmeans, random, contiguous, got 'kmeans'"):
        unchecked(cluster_ffn_neurons)(draw(8, 2), 2, "kmeans")
    for argument in ("score", "update", "impl"):
        layer = EMoEMLP.__new__(EMoEMLP)
        with pytest.raises(ValueError, match=f"{argument} must be one of .* got 'none'"):
            unchecked(EMoEMLP.__init__)(layer, block(), torch.arange(24) % 6, 2, **{argument: "none"})


def test_bad_groups():
    with pytest.raises(ValueError, match="as many neurons, got "):
        EMoEMLP(block(), torch.arange(24) // 5, 1)
    with pytest.raises(ValueError, match="expert_of_neuron must be 24 numbers"):
        EMoEMLP(block(), torch.arange(12) // 4, 1)
    with pytest.raises(ValueError, match="both up_bias and gate_bias or neither"):
        EMoEMLP(block(gated=True)._replace(gate_bias=None), torch.arange(24) // 4, 1)


def test_bad_matrices():
    with pytest.raises(ValueError, match="weight must be finite"):
        cluster_ffn_neurons(torch.full((4, 2), torch.nan), 2)
    with pytest.raises(ValueError, match="cost must be finite"):
        balanced_assignment(np.full((4, 2), np.inf))
    with pytest.raises(ValueError, match=r"divides its number of rows, got shape \(5, 2\)"):
        balanced_assignment(np.zeros((5, 2)))


def test_converting_twice_merging_nothing_and_unknown_models():
    model = emoe_convert(build(), [1], num_experts=6, top_k=2)
    with pytest.raises(ValueError, match="holds EMoEMLP in place of its dense block"):
        emoe_convert(model, "all", num_experts=6, top_k=2)
    emoe_merge(model)
    with pytest.raises(ValueError, match="BertModel has none"):
        emoe_merge(model)
    for function in (emoe_merge, lambda model: emoe_convert(model, "all", 2, 1)):
        with pytest.raises(ValueError, match="Linear has no feed-forward block"):
            function(nn.Linear(2, 2))
