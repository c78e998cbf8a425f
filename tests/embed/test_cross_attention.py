import jaxtyping
import pytest
import torch
from torch import nn

from firsthand.embed.cross_attention import add_cross_attention, attend_and_gate, cross_attend

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(dim: int = 12, num_heads: int = 3, **options) -> nn.Module:
    torch.manual_seed(0)
    module = nn.Module()
    add_cross_attention(module, dim, num_heads, **options)
    for norm in (module.norm_q, module.norm_kv, module.norm_ff):  # nothing of them may go unnoticed
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return module


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def attention_only(module: nn.Module) -> nn.Module:
    nn.init.zeros_(module.ff_out.weight)
    nn.init.zeros_(module.ff_out.bias)
    return module


def multihead(module: nn.Module) -> nn.MultiheadAttention:
    """torch's own with the same weights."""
    dim = module.norm_q.normalized_shape[0]
    theirs = nn.MultiheadAttention(dim, module.num_heads, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([module.to_q.weight, module.to_kv.weight]))
        theirs.out_proj.weight.copy_(module.to_out.weight)
    return theirs


def test_names_and_shapes_are_the_ones_released():
    module = block(12, 3, head_dim=5)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    norms = {f"{norm}.{part}": (12,) for norm in ("norm_q", "norm_kv", "norm_ff") for part in ("weight", "bias")}
    assert shapes == norms | {
        "to_q.weight": (15, 12),
        "to_kv.weight": (30, 12),
        "to_out.weight": (12, 15),
        "ff_in.weight": (96, 12),
        "ff_in.bias": (96,),
        "ff_out.weight": (12, 48),
        "ff_out.bias": (12,),
    }


@pytest.mark.parametrize("masked", [False, True])
def test_agrees_with_multihead_attention(masked):
    module = attention_only(block())
    queries, keys = random(4, 7, 12), random(4, 5, 12, seed=1)
    valid = None
    if masked:
        valid = torch.ones(4, 5, dtype=torch.bool)
        valid[1, 3:] = valid[2, :2] = False
    q, kv = module.norm_q(queries), module.norm_kv(keys)
    expected, _ = multihead(module)(q, kv, kv, key_padding_mask=None if valid is None else ~valid)
    torch.testing.assert_close(cross_attend(module, queries, keys, valid=valid), queries + expected)


def test_shared_keys_or_shared_queries_are_the_repeated_ones():
    module = block()
    queries, keys = random(2, 4, 7, 12), random(5, 12, seed=1)
    repeated = cross_attend(module, queries, keys.expand(2, 4, 5, 12))
    torch.testing.assert_close(cross_attend(module, queries, keys), repeated)
    latents, states = random(3, 12), random(2, 4, 6, 12, seed=1)
    repeated = cross_attend(module, latents.expand(2, 4, 3, 12), states)
    torch.testing.assert_close(cross_attend(module, latents, states), repeated)


def test_shared_keys_take_a_mask_too():
    module = block()
    queries, keys = random(4, 7, 12), random(5, 12, seed=1)
    valid = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(cross_attend(module, queries, keys, valid=valid), cross_attend(module, queries, keys[valid]))
    torch.testing.assert_close(
        cross_attend(module, queries, keys, valid=valid.expand(4, 5)), cross_attend(module, queries, keys[valid])
    )


def test_shared_keys_are_projected_once():
    module = block()
    rows = []
    module.to_kv.register_forward_hook(lambda layer, inputs, output: rows.append(inputs[0].numel() // 12))
    cross_attend(module, random(4, 7, 12), random(5, 12, seed=1))
    assert rows == [5]


def test_one_key_gives_every_query_the_same_and_the_query_projection_no_gradient():
    module = attention_only(block())
    queries, key = random(2, 7, 12), random(1, 12, seed=1)
    added = cross_attend(module, queries, key) - queries
    expected = module.to_out(module.to_kv(module.norm_kv(key))[:, 12:])
    torch.testing.assert_close(added, expected.expand(2, 7, 12))
    added.sum().backward()
    assert module.to_q.weight.grad.abs().max() < 1e-6


def test_order_of_keys_is_nothing_and_order_of_queries_is_kept():
    module = block()
    queries, keys = random(2, 7, 12), random(2, 5, 12, seed=1)
    result, order = cross_attend(module, queries, keys), torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(cross_attend(module, queries, keys[:, order]), result)
    torch.testing.assert_close(cross_attend(module, queries[:, order], keys), result[:, order])


def test_feed_forward_is_gated():
    module = block()
    nn.init.zeros_(module.to_out.weight)
    queries = random(2, 7, 12)
    wide = module.norm_ff(queries) @ module.ff_in.weight.T + module.ff_in.bias
    gated = wide[..., :48] * nn.functional.gelu(wide[..., 48:])
    torch.testing.assert_close(cross_attend(module, queries, random(3, 12)), queries + module.ff_out(gated))
    nn.init.zeros_(module.ff_in.weight[48:])
    nn.init.zeros_(module.ff_in.bias[48:])
    torch.testing.assert_close(cross_attend(module, queries, random(3, 12)), queries + module.ff_out.bias)


def test_identity_begins_as_its_queries_and_learns():
    module = block(init="identity")
    queries, keys = random(2, 7, 12), random(5, 12, seed=1)
    result = cross_attend(module, queries, keys)
    assert result.equal(queries)
    result.square().sum().backward()
    assert module.to_out.weight.grad.abs().sum() > 0
    assert module.ff_out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision(device):
    module = block().to(device, torch.bfloat16)
    queries, keys = random(2, 7, 12).to(device, torch.bfloat16), random(5, 12, seed=1).to(device, torch.bfloat16)
    half = cross_attend(module, queries, keys)
    assert half.dtype == torch.bfloat16
    exact = cross_attend(module.float(), queries.float(), keys.float())
    torch.testing.assert_close(half.float(), exact, atol=0.1, rtol=0.1)


def test_compiles_into_one_graph(unchecked):
    module = block()
    compiled = torch.compile(lambda q, k: cross_attend(module, q, k), backend="eager", fullgraph=True)
    queries, keys = random(2, 7, 12), random(5, 12, seed=1)
    torch.testing.assert_close(compiled(queries, keys), cross_attend(module, queries, keys))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 12, "num_heads": 5}, "num_heads must divide dim=12 where head_dim is not given, got 5"),
        ({"dim": 0, "num_heads": 1}, "dim must be at least 1, got 0"),
        ({"dim": 12, "num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"dim": 12, "num_heads": 5, "head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"dim": 12, "num_heads": 3, "init": "zero"}, "init must be 'default' or 'identity', got 'zero'"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        add_cross_attention(nn.Module(), **arguments)


def test_other_widths(unchecked):
    with pytest.raises(ValueError, match=r"queries must have shape \(..., n, 12\), got \(2, 11\)"):
        cross_attend(block(), random(2, 11), random(2, 12))
    with pytest.raises(ValueError, match=r"keys must have shape \(..., n, 12\), got \(12,\)"):
        cross_attend(block(), random(2, 12), random(12))


def test_a_mean_over_queries_needs_the_last_map_once():
    module = block()
    queries, keys = random(2, 7, 12), random(5, 12, seed=1)
    hidden, gated = attend_and_gate(module, queries, keys)
    mean = hidden.mean(dim=1) + module.ff_out(gated.mean(dim=1))
    torch.testing.assert_close(mean, cross_attend(module, queries, keys).mean(dim=1))
