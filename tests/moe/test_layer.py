import copy

import pytest
import torch
import torch.nn.functional as F

from firsthand.moe.layer import MoE, Routing, TopKRouter


def test_router_is_softmax_then_top_k():
    router = TopKRouter(8, 5, 2, bias=True)
    x = torch.randn(7, 8)
    routing = router(x)
    probabilities = (x @ router.weight.T + router.bias).softmax(-1)
    torch.testing.assert_close(routing.logits, x @ router.weight.T + router.bias)
    torch.testing.assert_close(routing.index, probabilities.topk(2).indices)
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(7))
    router.normalize_top_k = False
    torch.testing.assert_close(router(x).weights, probabilities.topk(2).values)


def test_router_works_in_float32_whatever_comes_in():
    router = TopKRouter(8, 5, 2).bfloat16()
    routing = router(torch.randn(7, 8).bfloat16())
    assert routing.weights.dtype == torch.bfloat16
    exact = routing.logits.float().softmax(-1).topk(2)
    assert torch.equal(routing.index, exact.indices)
    expected = exact.values / exact.values.sum(1, keepdim=True)
    assert torch.equal(routing.weights, expected.bfloat16())


def test_identical_experts_are_one_dense_block():
    layer = MoE(8, 12, 4, 2)
    with torch.no_grad():
        layer.gate_up_proj[:] = layer.gate_up_proj[:1].clone()
        layer.down_proj[:] = layer.down_proj[:1].clone()
    x = torch.randn(3, 5, 8)
    gate, up = (x @ layer.gate_up_proj[0].T).chunk(2, -1)
    torch.testing.assert_close(layer(x), (F.silu(gate) * up) @ layer.down_proj[0].T)


def test_shared_expert_is_added_for_every_token():
    layer = MoE(8, 12, 4, 2, shared_hidden_dim=6)
    x = torch.randn(5, 8)
    alone = copy.deepcopy(layer)
    alone.shared = None
    torch.testing.assert_close(layer(x) - alone(x), layer.shared(x))
    assert sum(parameter.numel() for parameter in layer.shared.parameters()) == 6 * 8 * 3


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_learns_in_both_types(gated, dtype):
    torch.manual_seed(0)
    layer = MoE(8, 16, 4, 2, gated=gated, bias=True, act="gelu").to(dtype)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(64, 8).to(dtype)
    target = x.roll(1, 1)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x).float(), target.float())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_last_routing_is_kept_and_detached():
    layer = MoE(8, 12, 4, 2)
    assert layer.last_routing is None
    layer(torch.randn(2, 3, 8))
    assert layer.last_routing.index.shape == (6, 2)
    assert not layer.last_routing.weights.requires_grad


def test_any_module_may_route():
    class First(torch.nn.Module):
        def forward(self, x):
            return Routing(x.new_zeros(len(x), 3), x.new_ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int64))

    layer = MoE(8, 12, 3, 1, router=First())
    x = torch.randn(4, 8)
    gate, up = (x @ layer.gate_up_proj[0].T).chunk(2, -1)
    torch.testing.assert_close(layer(x), (F.silu(gate) * up) @ layer.down_proj[0].T)


def test_state_dict_round_trip():
    first, second = (MoE(8, 12, 4, 2, bias=True, shared_hidden_dim=4) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(9, 8)
    assert torch.equal(first(x), second(x))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1, got 0"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        MoE(**({"dim": 8, "hidden_dim": 12, "num_experts": 4, "top_k": 2} | sizes))
