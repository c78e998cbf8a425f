import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from firsthand.moe.blocks import moe_blocks, register_experts_backend
from firsthand.moe.layer import MoE
from firsthand.moe.routing import (
    moe_block_forward,
    renormalizes,
    route_at_random,
    route_by_rank,
    route_by_threshold,
    routing_override,
)

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "num_experts_per_tok": 2,
}  # fmt: skip
FINE = {"num_experts": 6, "moe_intermediate_size": 8, "pad_token_id": 0}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=6),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=6),
    "qwen2-moe": lambda: Qwen2MoeConfig(**SIZES, **FINE, shared_expert_intermediate_size=12),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **FINE, head_dim=8, norm_topk_prob=True),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
BACKENDS = pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm", "firsthand"])


def build(family="mixtral", backend="eager", seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.5 if "norm" not in name else 0.1)
    register_experts_backend()
    model.set_experts_implementation(backend)
    return model


@pytest.fixture
def logits():
    return 2 * torch.randn(11, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tokens():
    return torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hidden():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))


def expert_outputs(block, hidden):
    """Every expert's own output for every token, [T, E, D], from the weights alone."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    gate, up = torch.einsum("ehd,td->teh", block.experts.gate_up_proj, flat).chunk(2, -1)
    return torch.einsum("edf,tef->ted", block.experts.down_proj, torch.nn.functional.silu(gate) * up)


# Routing as functions of the logits


def test_ranks_are_places_in_the_sorted_order(logits):
    order = sorted(range(6), key=lambda expert: -logits[0, expert].item())
    for rank in range(6):
        weights, index = route_by_rank(logits, [rank])
        assert index[0].tolist() == [order[rank]]
        assert torch.equal(weights, torch.ones(11, 1))
    assert route_by_rank(logits, [3, 0])[1][0].tolist() == [order[3], order[0]]


def test_weights_are_the_probabilities_renormalised_or_not(logits):
    probabilities = logits.softmax(-1)
    for ranks in ([0], [1, 4], [5, 0, 2], range(6)):
        raw, index = route_by_rank(logits, ranks, renormalize=False)
        torch.testing.assert_close(raw, probabilities.gather(1, index))
        weights, again = route_by_rank(logits, ranks)
        assert torch.equal(again, index)
        torch.testing.assert_close(weights, raw / raw.sum(-1, keepdim=True))


def test_an_expert_whose_probability_underflows_has_weight_one_all_the_same():
    logits = torch.tensor([[0.0, -1000.0, -2000.0]])
    weights, index = route_by_rank(logits, [2])
    assert weights.item() == 1
    assert index.item() == 2
    assert route_by_rank(logits, [1, 2])[0].tolist() == [[1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_float32_or_wider(logits, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for weights, _ in (
        route_by_rank(logits.to(dtype), [1]),
        route_by_threshold(logits.to(dtype), 0.5),
        route_at_random(logits.to(dtype)),
    ):
        assert weights.dtype == wide
        torch.testing.assert_close(weights.sum(-1), torch.ones(11, dtype=wide))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("renormalize", [True, False])
def test_threshold_takes_the_smallest_prefix_that_exceeds_it(logits, threshold, renormalize):
    weights, index = route_by_threshold(logits, threshold, renormalize)
    probabilities = logits.softmax(-1)
    for token in range(len(logits)):
        chosen = [expert for expert in index[token].tolist() if expert < 6]
        assert chosen == logits[token].argsort(descending=True)[: len(chosen)].tolist()
        assert probabilities[token, chosen].sum() > threshold
        assert probabilities[token, chosen[:-1]].sum() <= threshold
        kept = probabilities[token, chosen]
        expected = kept / kept.sum() if renormalize else kept
        torch.testing.assert_close(weights[token, : len(chosen)], expected)
        assert not weights[token, len(chosen) :].any()
    assert (index < 6).any(0).all(), "no column is empty"


def test_threshold_at_its_ends():
    assert route_by_threshold(torch.zeros(4, 5), 0.0)[1].shape == (4, 1)
    weights, _ = route_by_threshold(torch.zeros(4, 5), 0.9999)
    torch.testing.assert_close(weights, torch.full((4, 5), 0.2))


def test_random_routing_is_uniform_and_repeats_with_its_seed():
    logits = torch.tensor([[5.0, 0.0, -5.0, 1.0]]).expand(40_000, 4)
    weights, index = route_at_random(logits, generator=torch.Generator().manual_seed(3))
    shares = index.flatten().bincount(minlength=4) / len(index)
    assert (shares - 0.25).abs().max() < 0.01  # four standard deviations
    assert torch.equal(weights, torch.ones(40_000, 1))
    assert torch.equal(index, route_at_random(logits, generator=torch.Generator().manual_seed(3))[1])
    raw, index = route_at_random(logits, renormalize=False)
    torch.testing.assert_close(raw, logits.softmax(-1).gather(1, index))


@pytest.mark.parametrize("ranks", [[], [6], [-1], [1, 1]])
def test_bad_ranks(logits, ranks):
    with pytest.raises(ValueError, match=r"ranks must be different places in \[0, 6\)"):
        route_by_rank(logits, ranks)
    with pytest.raises(ValueError, match="ranks must be different places"), routing_override(build(), ranks):
        pass


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_bad_thresholds(logits, threshold):
    with pytest.raises(ValueError, match="threshold must be in"):
        route_by_threshold(logits, threshold)
    with pytest.raises(ValueError, match="threshold must be in"), routing_override(build(), threshold=threshold):
        pass


# One block


@FAMILIES
def test_one_rank_is_that_expert_alone(family, hidden):
    block = moe_blocks(build(family))[1]
    each = expert_outputs(block, hidden)
    logits, _, _ = block.router(hidden.reshape(-1, 16))
    shared = 0
    if family == "qwen2-moe":
        flat = hidden.reshape(-1, 16)
        shared = block.block.shared_expert_gate(flat).sigmoid() * block.block.shared_expert(flat)
    for rank in range(6):
        expert = logits.argsort(-1, descending=True)[:, rank]
        for renormalize, scale in ((True, 1.0), (False, logits.softmax(-1).gather(1, expert[:, None]))):
            expected = scale * each[torch.arange(10), expert] + shared
            out = moe_block_forward(block, hidden, [rank], renormalize)
            torch.testing.assert_close(out.reshape(10, 16), expected, atol=1e-5, rtol=1e-4)


@FAMILIES
def test_the_first_ranks_are_the_models_own_routing(family, hidden):
    block = moe_blocks(build(family))[0]
    torch.testing.assert_close(moe_block_forward(block, hidden, [0, 1]), block.block(hidden))


def test_all_ranks_are_the_mean_weighted_by_probability(hidden):
    block = moe_blocks(build())[0]
    logits, _, _ = block.router(hidden.reshape(-1, 16))
    expected = torch.einsum("te,ted->td", logits.softmax(-1), expert_outputs(block, hidden))
    torch.testing.assert_close(moe_block_forward(block, hidden, range(6)).reshape(10, 16), expected, atol=1e-5, rtol=1e-4)


def test_our_own_layer(hidden):
    torch.manual_seed(0)
    layer = MoE(16, 8, num_experts=4, top_k=2, normalize_top_k=False, shared_hidden_dim=8)
    torch.nn.init.normal_(layer.router.weight)
    (block,) = moe_blocks(layer)
    torch.testing.assert_close(moe_block_forward(block, hidden, [0, 1]), layer(hidden))
    with routing_override(layer, threshold=0.8):
        ragged = layer(hidden)
    assert (layer.last_routing.index == 4).any(), "some tokens have fewer experts"
    assert ragged.isfinite().all()


# A whole model


@FAMILIES
@BACKENDS
def test_top_k_is_what_another_config_would_do(family, backend, tokens):
    model = build(family, backend)
    with torch.no_grad(), routing_override(model, top_k=4):
        overridden = model(tokens).logits
    for block in moe_blocks(model):
        block.router.top_k = 4
    torch.testing.assert_close(overridden, model(tokens).logits, atol=1e-4, rtol=1e-4)


@FAMILIES
@BACKENDS
def test_no_expert_is_no_expert_in_every_backend(family, backend, tokens):
    """A ragged routing equals the same weights over all experts, most of them 0."""
    model = build(family, backend)

    def dense(routing):
        weights, index = route_by_threshold(routing.logits, 0.5, renormalizes(moe_blocks(model)[0].router))
        full = torch.zeros(len(index), 7).scatter(1, index, weights)[:, :6]
        return full, torch.arange(6).expand(len(index), 6)

    with torch.no_grad():
        with routing_override(model, threshold=0.5):
            ragged = model(tokens).logits
        with routing_override(model, dense):
            torch.testing.assert_close(ragged, model(tokens).logits, atol=1e-4, rtol=1e-4)


@FAMILIES
@BACKENDS
def test_what_is_said_of_no_expert_does_not_matter(family, backend, tokens):
    """Whatever weight comes with the index E, and even where it comes first."""
    model = build(family, backend)
    with torch.no_grad():
        with routing_override(model, lambda routing: (routing.weights[:, :1], routing.index[:, :1])):
            alone = model(tokens).logits

        def with_nobody(routing):
            nobody = torch.full_like(routing.index[:, :1], 6)
            return torch.cat([routing.weights[:, 1:], routing.weights[:, :1]], 1), torch.cat([nobody, routing.index[:, :1]], 1)

        with routing_override(model, with_nobody):
            torch.testing.assert_close(model(tokens).logits, alone, atol=1e-4, rtol=1e-4)


def test_equal_experts_make_routing_irrelevant(tokens):
    model = build()
    for block in moe_blocks(model):
        for weight in (block.experts.gate_up_proj, block.experts.down_proj):
            weight.data[:] = weight.data[:1]
    with torch.no_grad():
        usual = model(tokens).logits
        for how in ({"ranks": [5]}, {"ranks": "random"}, {"top_k": 4}, {"threshold": 0.5}):
            with routing_override(model, **how):
                torch.testing.assert_close(model(tokens).logits, usual, atol=1e-4, rtol=1e-4)


def test_the_routers_logits_stay_what_others_see(tokens):
    model = build()
    first = model(tokens, output_router_logits=True).router_logits[0]
    with routing_override(model, [3]):
        seen = model(tokens, output_router_logits=True).router_logits
    assert torch.equal(seen[0], first)
    assert len(seen) == 2


def test_nothing_is_left_behind(tokens):
    model = build()
    with torch.no_grad():
        before = model(tokens).logits
        with pytest.raises(RuntimeError, match="inside"), routing_override(model, [2]):
            raise RuntimeError("inside")
        assert torch.equal(model(tokens).logits, before)
    assert not any(block.router._forward_hooks for block in moe_blocks(model))


def test_the_innermost_has_the_last_word(tokens):
    model = build()

    def logits(ranks):
        with routing_override(model, ranks):
            return model(tokens).logits

    with torch.no_grad():
        second, third = logits([1]), logits([2])
        with routing_override(model, [1]):
            assert torch.equal(logits([2]), third)
            assert torch.equal(model(tokens).logits, second)
            with routing_override(model, lambda routing: (routing.weights, routing.index)):
                assert torch.equal(model(tokens).logits, second), "a function gets what is decided around it"


def test_another_thread_is_left_alone(tokens):
    model = build()
    with torch.no_grad():
        usual = model(tokens).logits
    seen = []

    def other():
        with torch.no_grad():
            seen.append(model(tokens).logits)

    with routing_override(model, [3]):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert torch.equal(seen[0], usual)


def test_many_threads_with_a_routing_each(tokens):
    model = build(backend="firsthand")
    rounds = 20

    @torch.no_grad()
    def logits(rank):
        with routing_override(model, [rank]):
            return model(tokens).logits

    expected = [logits(rank) for rank in range(4)]
    wrong = []

    def work(rank):
        try:
            wrong.extend(rank for _ in range(rounds) if not torch.allclose(logits(rank), expected[rank], atol=1e-5))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_flow_through_the_weights(tokens):
    model = build(backend="firsthand")
    with routing_override(model, [1, 2]):
        model(tokens, labels=tokens).loss.backward()
    assert all(block.router.weight.grad.abs().sum() > 0 for block in moe_blocks(model))


def test_bfloat16_stays(tokens):
    model = build("olmoe").to(torch.bfloat16)
    with torch.no_grad(), routing_override(model, [1]):
        assert model(tokens).logits.dtype == torch.bfloat16
    with routing_override(model, [1]):
        _, weights, _ = moe_blocks(model)[0].router(torch.randn(3, 16, dtype=torch.bfloat16))
    assert weights.dtype == torch.bfloat16


def test_random_routing_repeats_with_its_seed(tokens):
    model = build()

    @torch.no_grad()
    def logits(seed):
        with routing_override(model, "random", generator=torch.Generator().manual_seed(seed)):
            return model(tokens).logits

    assert torch.equal(logits(0), logits(0))
    assert not torch.equal(logits(0), logits(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of"),
        ({"ranks": [1], "top_k": 2}, "exactly one of"),
        ({"ranks": "second"}, "ranks must be places, 'random' or a function, got 'second'"),
        ({"top_k": 0}, r"top_k must be in \[1, 6\]"),
        ({"top_k": 7}, r"top_k must be in \[1, 6\]"),
    ],
)
def test_bad_overrides(arguments, message):
    with pytest.raises(ValueError, match=message), routing_override(build(), **arguments):
        pass


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no sparse block"), routing_override(torch.nn.Linear(2, 2), [1]):
        pass


def test_who_renormalises():
    assert renormalizes(moe_blocks(build("mixtral"))[0].router)
    assert not renormalizes(moe_blocks(build("olmoe"))[0].router)
    assert not renormalizes(moe_blocks(build("qwen2-moe"))[0].router)
    assert renormalizes(moe_blocks(build("qwen3-moe"))[0].router)
    assert not renormalizes(MoE(4, 4, 3, 2, normalize_top_k=False).router)
