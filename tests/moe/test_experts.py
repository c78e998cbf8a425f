"""The experts' core: against a plain loop, against dense blocks, against finite differences."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.moe.experts import activation_name, dispatch, moe_forward

ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


def problem(
    tokens=33, dim=16, hidden=24, experts=5, k=2, gated=True, bias=False, dtype=torch.float64, seed=0, ragged=False
) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    inner = 2 * hidden if gated else hidden
    scores = torch.rand(tokens, experts, generator=generator)
    index = scores.topk(k).indices
    if ragged:
        index[torch.rand(tokens, k, generator=generator) < 0.4] = experts
    return {
        "x": normal(tokens, dim),
        "index": index,
        "weights": torch.rand(tokens, k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(),
        "gate_up": normal(experts, inner, dim),
        "down": normal(experts, dim, hidden),
        "bias1": normal(experts, inner) if bias else None,
        "bias2": normal(experts, dim) if bias else None,
    }


def by_definition(x, index, weights, gate_up, down, bias1=None, bias2=None, act=F.silu):
    """Token by token."""
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for j, e in enumerate(index[t].tolist()):
            if e == len(down):
                continue
            h = gate_up[e] @ x[t] + (0 if bias1 is None else bias1[e])
            hidden = down.shape[2]
            a = act(h) if len(h) == hidden else act(h[:hidden]) * h[hidden:]
            total = total + weights[t, j] * (down[e] @ a + (0 if bias2 is None else bias2[e]))
        rows.append(total)
    return torch.stack(rows)


def gradients(output, inputs):
    wanted = {name: value for name, value in inputs.items() if value is not None and value.requires_grad}
    generator = torch.Generator().manual_seed(7)
    direction = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return dict(zip(wanted, torch.autograd.grad(output, list(wanted.values()), direction), strict=True))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("gated", "bias", "ragged"), [(True, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("recompute", [False, True])
def test_is_the_definition_with_all_gradients(act, gated, bias, ragged, recompute):
    inputs = problem(gated=gated, bias=bias, ragged=ragged)
    ours = moe_forward(**inputs, act=act, recompute=recompute)
    expected = by_definition(**inputs, act=ACTS[act])
    torch.testing.assert_close(ours, expected)
    right = gradients(expected, inputs)
    for name, value in gradients(ours, inputs).items():
        torch.testing.assert_close(value, right[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(bias):
    inputs = problem(tokens=5, dim=3, hidden=4, experts=3, bias=bias, ragged=True)
    names = [name for name, value in inputs.items() if value is not None and value.requires_grad]

    def f(*values):
        return moe_forward(**(inputs | dict(zip(names, values, strict=True))))

    assert torch.autograd.gradcheck(f, [inputs[name] for name in names])


def test_any_elementwise_function_is_an_activation():
    inputs = problem()
    ours, expected = moe_forward(**inputs, act=torch.tanh), by_definition(**inputs, act=torch.tanh)
    torch.testing.assert_close(ours, expected)
    right = gradients(expected, inputs)
    for name, value in gradients(ours, inputs).items():
        torch.testing.assert_close(value, right[name])


@pytest.mark.parametrize("sizes", [{}, {"tokens": 700, "dim": 64, "hidden": 160, "experts": 3}, {"dim": 7, "hidden": 9}])
def test_float32_on_every_path(sizes):
    """Small and large products take different libraries; 7 and 9 are sizes that `grouped_mm` refuses."""
    inputs = problem(dtype=torch.float32, **sizes)
    double = {
        name: value.detach().double().requires_grad_() for name, value in inputs.items() if value is not None and name != "index"
    }
    double["index"] = inputs["index"]
    expected = moe_forward(**double)
    right = gradients(expected, double)
    for impl in ["loop", "auto", *(["grouped"] if sizes.get("dim") != 7 else [])]:
        ours = moe_forward(**inputs, impl=impl)
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
        for name, value in gradients(ours, inputs).items():
            close = 1e-5 * right[name].abs().max()
            torch.testing.assert_close(
                value.double(), right[name], rtol=1e-5, atol=close, msg=lambda text, name=name: name + text
            )


@pytest.mark.parametrize("impl", ["loop", "grouped"])
@pytest.mark.parametrize("bias", [False, True])
def test_bfloat16(impl, bias):
    inputs = problem(dtype=torch.bfloat16, bias=bias, ragged=True)
    exact = {
        name: value if value is None or name == "index" else value.detach().double().requires_grad_()
        for name, value in inputs.items()
    }
    ours, expected = moe_forward(**inputs, impl=impl), moe_forward(**exact)
    assert ours.dtype == torch.bfloat16
    right = gradients(expected, exact) | {"output": expected}
    for name, value in (gradients(ours, inputs) | {"output": ours}).items():
        assert (value.double() - right[name]).abs().max() < 0.03 * right[name].abs().max(), name


@pytest.mark.parametrize("impl", ["loop", "grouped"])
def test_an_expert_that_nobody_chose_has_zero_gradients(impl):
    inputs = problem(dtype=torch.float32, bias=True)
    inputs["index"] = torch.tensor([[0, 2]]).repeat(len(inputs["x"]), 1)
    grads = gradients(moe_forward(**inputs, impl=impl), inputs)
    for name in ("gate_up", "down", "bias1", "bias2"):
        assert (grads[name][[1, 3, 4]] == 0).all()
        assert (grads[name][[0, 2]] != 0).any()
    assert all(value.isfinite().all() for value in grads.values())


@pytest.mark.parametrize("impl", ["loop", "grouped"])
def test_no_token_and_no_choice_at_all(impl):
    inputs = problem(dtype=torch.float32, bias=True)
    inputs["index"] = torch.full_like(inputs["index"], 5)
    output = moe_forward(**inputs, impl=impl)
    assert (output == 0).all()
    assert all((value == 0).all() for value in gradients(output, inputs).values())
    none = {"x": inputs["x"][:0], "index": inputs["index"][:0], "weights": inputs["weights"][:0]}
    assert moe_forward(**(inputs | none), impl=impl).shape == (0, 16)


def test_all_experts_with_equal_weights_are_the_mean_of_the_dense_blocks():
    inputs = problem(experts=4)
    tokens = len(inputs["x"])
    inputs["index"] = torch.arange(4).repeat(tokens, 1)
    inputs["weights"] = torch.full((tokens, 4), 0.25, dtype=torch.float64)
    hidden = inputs["down"].shape[2]
    dense = [
        (F.silu(inputs["x"] @ w[:hidden].T) * (inputs["x"] @ w[hidden:].T)) @ d.T
        for w, d in zip(inputs["gate_up"], inputs["down"], strict=True)
    ]
    torch.testing.assert_close(moe_forward(**inputs), torch.stack(dense).mean(0))


def test_names_of_experts_do_not_matter():
    inputs = problem()
    order = torch.tensor([3, 0, 4, 1, 2])  # new place -> old expert
    renamed = inputs | {
        "gate_up": inputs["gate_up"][order],
        "down": inputs["down"][order],
        "index": torch.argsort(order)[inputs["index"]],
    }
    torch.testing.assert_close(moe_forward(**renamed), moe_forward(**inputs))


def test_order_of_tokens_does_not_matter():
    inputs = problem()
    order = torch.randperm(len(inputs["x"]), generator=torch.Generator().manual_seed(3))
    shuffled = inputs | {name: inputs[name][order] for name in ("x", "index", "weights")}
    torch.testing.assert_close(moe_forward(**shuffled), moe_forward(**inputs)[order])


def test_leading_dimensions_are_kept():
    inputs = problem(tokens=12)
    output = moe_forward(**(inputs | {"x": inputs["x"].view(3, 4, 16)}))
    torch.testing.assert_close(output.view(12, 16), moe_forward(**inputs))


def test_only_what_asks_for_a_gradient_gets_one():
    inputs = problem()
    for name in ("gate_up", "down", "weights"):
        inputs[name] = inputs[name].detach()
    only_x = gradients(moe_forward(**inputs), inputs)
    assert list(only_x) == ["x"]
    full = problem()
    torch.testing.assert_close(only_x["x"], gradients(moe_forward(**full), full)["x"])


def test_backward_twice_through_a_kept_graph():
    inputs = problem()
    output = moe_forward(**inputs)
    first = torch.autograd.grad(output.sum(), inputs["gate_up"], retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(output.sum(), inputs["gate_up"])[0], first)


def test_results_are_the_same_each_time():
    inputs = problem(tokens=500, dtype=torch.float32)
    first, second = (gradients(moe_forward(**inputs), inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_works_under_autocast():
    inputs = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = moe_forward(**inputs)
    assert output.dtype == torch.float32
    exact = moe_forward(**inputs)
    assert 0 < (output - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("experts", [3, 300, 40_000])
def test_dispatch_sorts_by_expert_and_then_by_token(experts):
    generator = torch.Generator().manual_seed(1)
    index = torch.randint(experts + 1, (50, 3), generator=generator)
    order, counts, offsets = dispatch(index, experts)
    flat = index.flatten()
    assert flat[order].tolist() == sorted(value for value in flat.tolist() if value < experts)
    assert order.tolist() == sorted(order.tolist(), key=lambda place: (flat[place].item(), place))
    chosen, times = flat[flat < experts].unique(return_counts=True)
    assert counts[chosen].tolist() == times.tolist()
    assert counts.sum() == len(order)
    assert offsets.tolist() == counts.cumsum(0).tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.full((33, 2), 6)}, r"index must be in \[0, 5\], got values in \[6, 6\]"),
        ({"index": torch.full((33, 2), -1)}, r"index must be in \[0, 5\]"),
        ({"gate_up": torch.zeros(5, 47, 16, dtype=torch.float64)}, "gate_up must have shape"),
        ({"x": torch.zeros(33, 15, dtype=torch.float64)}, "x must have 16 features, as the experts have, got 15"),
        ({"index": torch.zeros(32, 2, dtype=torch.int64)}, "index must be integers of shape"),
        ({"weights": torch.ones(33, 3, dtype=torch.float64)}, "weights must have the shape of index"),
        ({"act": "swish9"}, "act must be one of silu, gelu, gelu_tanh, relu or a function, got 'swish9'"),
        ({"bias2": torch.zeros(5, 15, dtype=torch.float64)}, "bias2 must have shape"),
        ({"impl": "fast"}, "impl must be"),
        ({"impl": "grouped"}, "impl='grouped' needs float32"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(moe_forward)(**(problem() | change))


def test_bad_number_of_experts():
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        dispatch(torch.zeros(2, 1, dtype=torch.int64), 0)


def test_activation_names_are_those_of_the_hosts():
    transformers = pytest.importorskip("transformers")
    x = torch.linspace(-4, 4, 101)
    for host in ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"):
        module = transformers.activations.ACT2FN[host]
        name = activation_name(module)
        assert isinstance(name, str), host
        torch.testing.assert_close(ACTS[name](x), module(x))
    other = nn.Mish()
    assert activation_name(other) is other
    assert copy.deepcopy(other)(x).shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes", [{"tokens": 1}, {"tokens": 2}, {"tokens": 8, "experts": 40, "dim": 64}, {"tokens": 1, "dim": 256, "hidden": 320}]
)
@pytest.mark.parametrize("extra", [{}, {"bias": True}, {"ragged": True}, {"gated": False}])
def test_few_tokens_without_a_backward_pass_take_other_ways_to_the_same_place(dtype, sizes, extra):
    inputs = problem(dtype=dtype, **sizes, **extra)
    with torch.no_grad():
        ours, expected = moe_forward(**inputs), moe_forward(**inputs, impl="loop")
        assert (ours - expected).abs().max() <= (0.03 if dtype == torch.bfloat16 else 1e-5) * expected.abs().max()
    with torch.no_grad(), pytest.raises(ValueError, match="index must be in"):
        moe_forward(**(inputs | {"index": inputs["index"] - 50}))
