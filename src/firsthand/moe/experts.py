"""Every expert on its own tokens: exact, dropless, with a backward written by hand.

The (token, expert) pairs are sorted by expert, each expert multiplies its rows, and the rows are summed back into their tokens.
On a CPU the experts are taken a few at a time, so that what is between the products stays in the cache and in memory that is
used again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = str | Callable[[Tensor], Tensor]

ROWS = 2048
"""How many rows the experts taken together should have: few enough for the cache, enough for two threads."""


class Dispatch(NamedTuple):
    """Which (token, choice) pairs each expert gets.

    Attributes:
        order: the pairs, as places in the flattened `index`, sorted by expert and, within one, by token.
        counts: pairs of each expert.
        offsets: where each expert's pairs end in `order`.
    """

    order: Int64[Tensor, " pairs"]
    counts: Int64[Tensor, " experts"]
    offsets: Int32[Tensor, " experts"]


def dispatch(index: Int[Tensor, "tokens k"], num_experts: int) -> Dispatch:
    """Sort the chosen (token, expert) pairs by expert.

    Args:
        index: the experts of each token, in `[0, num_experts]`; `num_experts` means no expert, and such a pair is left out.
        num_experts: E, at least 1.

    Raises:
        ValueError: `num_experts` below 1, or an index out of range.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    flat = index.flatten()
    if len(flat) and (int(flat.min()) < 0 or int(flat.max()) > num_experts):
        raise ValueError(f"index must be in [0, {num_experts}], got values in [{flat.min()}, {flat.max()}]")
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    # Few bits make a radix sort of few passes: a tenth of the time that int64 keys take.
    keys = flat.to(torch.uint8 if num_experts < 256 else torch.int16 if num_experts < 2**15 else torch.int64)
    order = torch.sort(keys, stable=True).indices
    offsets = counts.cumsum(0)
    return Dispatch(order[: int(offsets[-1])], counts, offsets.to(torch.int32))


def moe_forward(
    x: Float[Tensor, "*tokens dim"],
    index: Int[Tensor, "flat_tokens k"],
    weights: Float[Tensor, "flat_tokens k"],
    gate_up: Float[Tensor, "experts inner dim"],
    down: Float[Tensor, "experts dim hidden"],
    *,
    act: Activation = "silu",
    bias1: Float[Tensor, "experts inner"] | None = None,
    bias2: Float[Tensor, "experts dim"] | None = None,
    impl: Literal["auto", "loop", "grouped"] = "auto",
    recompute: bool = False,
) -> Float[Tensor, "*tokens dim"]:
    r"""The weighted sum of what each token's experts make of it.

    $$ y_t = \sum_{j=1}^{k} w_{tj}\, E_{i_{tj}}(x_t), \qquad
       E_e(x) = W^{\downarrow}_e \left( \phi(W^{g}_e x + b^{g}_e) \odot (W^{\uparrow}_e x + b^{\uparrow}_e) \right) +
       b^{\downarrow}_e $$

    Exact: no capacity, no token is dropped, and an expert without tokens gets zero gradients. Sums run in one order, so results
    are the same each time. Under autocast the products are computed in autocast's type.

    Args:
        x: tokens.
        index: the experts of each token, in `[0, experts]`; the number of experts means none, so that tokens may have unequal
            numbers of experts.
        weights: what each chosen expert's output is multiplied by.
        gate_up: $W^g$ over $W^\uparrow$ if it has 2F rows for experts of hidden size F; with F rows the experts are not gated,
            $E(x) = W^\downarrow \phi(W x + b) + b^\downarrow$.
        down: $W^\downarrow$.
        act: φ, "silu", "gelu", "gelu_tanh", "relu", or any differentiable elementwise function.
        bias1: of the first product.
        bias2: of the second.
        impl: "loop" takes the experts in turn, with a backward written by hand, for any floating type; "grouped" is
            `torch.nn.functional.grouped_mm` (float32, bfloat16 or float16, sizes that are multiples of 16 bytes); "auto" is
            "loop" on a CPU and "grouped" elsewhere, where the types and sizes allow it.
        recompute: compute the first product again in the backward pass and do not keep it: less memory, a sixth more time. For
            "loop" only.

    Raises:
        ValueError: sizes that do not fit together, an index out of range, an unknown `act` or `impl`, sizes or types that
            "grouped" cannot do.
    """
    tokens = x.reshape(-1, x.shape[-1])
    _check(tokens, index, weights, gate_up, down, act, bias1, bias2)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tokens, gate_up, down = tokens.to(dtype), gate_up.to(dtype), down.to(dtype)
        bias1, bias2 = (None if bias is None else bias.to(dtype) for bias in (bias1, bias2))
    reason = _ungrouped(tokens, gate_up, down)
    if impl == "auto":
        impl = "loop" if kind == "cpu" or reason else "grouped"
    if impl == "grouped":
        if reason:
            raise ValueError(f"impl='grouped' {reason}")
        y = _grouped(tokens, index, weights, gate_up, down, act, bias1, bias2)
    elif impl == "loop":
        y = _Experts.apply(tokens, index, weights, gate_up, down, bias1, bias2, act, recompute)
    else:
        raise ValueError(f"impl must be 'auto', 'loop' or 'grouped', got {impl!r}")
    return y.to(x.dtype).view_as(x)


def _check(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation, *biases: Tensor | None
) -> None:
    experts, dim, hidden = down.shape
    if gate_up.shape not in ((experts, 2 * hidden, dim), (experts, hidden, dim)):
        raise ValueError(
            f"gate_up must have shape {(experts, 2 * hidden, dim)}, or {(experts, hidden, dim)} for experts without a gate, "
            f"to go with down of shape {tuple(down.shape)}, got {tuple(gate_up.shape)}"
        )
    if x.shape[1] != dim:
        raise ValueError(f"x must have {dim} features, as the experts have, got {x.shape[1]}")
    if index.ndim != 2 or len(index) != len(x) or index.is_floating_point():
        raise ValueError(f"index must be integers of shape ({len(x)}, k), got {index.dtype} of shape {tuple(index.shape)}")
    if weights.shape != index.shape:
        raise ValueError(f"weights must have the shape of index, {tuple(index.shape)}, got {tuple(weights.shape)}")
    if not callable(act) and act not in _ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(_ACTIVATIONS)} or a function, got {act!r}")
    for name, bias, size in zip(("bias1", "bias2"), biases, (gate_up.shape[1], dim), strict=True):
        if bias is not None and bias.shape != (experts, size):
            raise ValueError(f"{name} must have shape {(experts, size)}, got {tuple(bias.shape)}")


class _Experts(torch.autograd.Function):
    """The loop over experts, a few at a time; see `moe_forward`.

    The gradient of a routing weight is <E(x), dy>. With da = W↓ᵀ dy at hand, which the backward needs anyway, it is <a, da>
    (and <b↓, dy>): the experts' outputs need neither be kept nor be computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        bias1: Tensor | None,
        bias2: Tensor | None,
        act: Activation,
        recompute: bool,
    ) -> Tensor:
        order, counts, _ = dispatch(index, len(down))
        token = order // index.shape[1]
        weight = weights.flatten()[order].unsqueeze(1)
        pairs, inner, hidden, dim = len(order), gate_up.shape[1], down.shape[2], x.shape[1]
        groups = list(_groups(counts.tolist()))
        most = max((group.stop - group.start for group in groups), default=0)

        keep = any(ctx.needs_input_grad) and not recompute
        h_all = x.new_empty(pairs if keep else most, inner)
        y = x.new_empty(pairs, dim)
        space = [x.new_empty(most, width) for width in (dim, hidden)]
        first, second = gate_up.unbind(), down.unbind()
        for group in groups:
            rows = slice(group.start, group.stop)
            size = group.stop - group.start
            xs, a = (buffer[:size] for buffer in space)
            torch.index_select(x, 0, token[rows], out=xs)
            h = h_all[rows] if keep else h_all[:size]
            _each(group, h, xs, first, bias1)
            _activate(act, h, hidden, a)
            a.mul_(weight[rows])
            _each(group, y[rows], a, second, None)
            if bias2 is not None:
                for expert, part, w in group.split(y[rows], weight[rows]):
                    part.addcmul_(w, bias2[expert])
        place = torch.empty(index.numel(), dtype=torch.int64, device=x.device).index_copy_(
            0, order, torch.arange(pairs, device=x.device)
        )
        if pairs < index.numel():  # some tokens have fewer experts than others
            chosen = index.flatten() < len(down)
            place = place[chosen]
            starts = chosen.view(index.shape).sum(1).cumsum(0) - chosen.view(index.shape).sum(1)
        else:
            chosen = starts = None
            place = place.view(index.shape)
        ctx.save_for_backward(x, token, weight, place, starts, chosen, gate_up, down, bias1, bias2, h_all if keep else None)
        ctx.groups, ctx.most, ctx.act, ctx.shape = groups, most, act, weights.shape
        return _sum_rows(y, place, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, token, weight, place, starts, chosen, gate_up, down, bias1, bias2, h_all = ctx.saved_tensors
        needs_x, _, needs_weights, needs_gate_up, needs_down, needs_bias1, needs_bias2, *_ = ctx.needs_input_grad
        needs_h = needs_x or needs_gate_up or needs_bias1
        act, most, dim, hidden, inner = ctx.act, ctx.most, x.shape[1], down.shape[2], gate_up.shape[1]
        gated = inner == 2 * hidden
        dout = dout.contiguous()

        # An expert without rows is in no group, so its gradients are the zeros they start with.
        busy = sum(len(group.counts) for group in ctx.groups)
        new = torch.empty_like if busy == len(down) else torch.zeros_like
        dgate_up = new(gate_up, memory_format=torch.contiguous_format) if needs_gate_up else None
        ddown = new(down, memory_format=torch.contiguous_format) if needs_down else None
        dbias1 = new(bias1) if needs_bias1 else None
        dbias2 = new(bias2) if needs_bias2 else None
        dweight = weight.new_empty(len(token)) if needs_weights else None
        dx = x.new_empty(len(token), dim) if needs_x else None

        first, first_t, second_t = gate_up.unbind(), gate_up.transpose(1, 2).unbind(), down.transpose(1, 2).unbind()
        dfirst, dsecond = (None if grad is None else grad.unbind() for grad in (dgate_up, ddown))
        widths = (dim, dim, hidden, hidden, hidden, inner, *([inner] if h_all is None else []))
        space = [x.new_empty(most, width) for width in widths]
        for group in ctx.groups:
            rows = slice(group.start, group.stop)
            size, w = group.stop - group.start, weight[group.start : group.stop]
            xs, dy, a, da, slope, dh, *recomputed = (buffer[:size] for buffer in space)
            if h_all is None or needs_gate_up:
                torch.index_select(x, 0, token[rows], out=xs)
            if h_all is None:
                h = recomputed[0]
                _each(group, h, xs, first, bias1)
            else:
                h = h_all[rows]
            torch.index_select(dout, 0, token[rows], out=dy)
            _each(group, da, dy, second_t, None)
            phi = a
            if gated:
                phi = _forward(act, h[:, :hidden], out=slope)
                torch.mul(phi, h[:, hidden:], out=a)
            else:
                _forward(act, h, out=a)
            if dweight is not None:
                torch.sum(torch.mul(a, da, out=dh[:, :hidden]), 1, out=dweight[rows])
                if bias2 is not None:
                    for expert, part, d in group.split(dweight[rows], dy):
                        part.addmv_(d, bias2[expert])
            if dsecond is not None:
                _each_outer(group, dsecond, dy, a.mul_(w))
            if dbias2 is not None:
                for expert, d, s in group.split(dy, w):
                    torch.mv(d.t(), s.squeeze(1).to(d.dtype), out=dbias2[expert])
            if not needs_h:
                continue
            da.mul_(w)
            if gated:
                torch.mul(da, phi, out=dh[:, hidden:])
                da.mul_(h[:, hidden:])
                _backward(act, da, h[:, :hidden], out=dh[:, :hidden])
            else:
                _backward(act, da, h, out=dh)
            if dfirst is not None:
                _each_outer(group, dfirst, dh, xs)
            if dbias1 is not None:
                for expert, d in group.split(dh):
                    torch.sum(d, 0, out=dbias1[expert])
            if dx is not None:
                _each(group, dx[rows], dh, first_t, None)

        if dweight is not None:
            back = dweight.new_zeros(ctx.shape.numel())
            if chosen is None:
                torch.index_select(dweight, 0, place.flatten(), out=back)
            else:
                back[chosen] = dweight[place]
            dweight = back.view(ctx.shape)
        return (
            None if dx is None else _sum_rows(dx, place, starts),
            None,
            dweight,
            dgate_up,
            ddown,
            dbias1,
            dbias2,
            None,
            None,
        )


class _Group(NamedTuple):
    """Neighbouring experts whose rows, from `start` to `stop`, are worked on together; each has at least one row."""

    first: int
    counts: list[int]
    start: int
    stop: int

    def split(self, *tensors: Tensor) -> Iterator[tuple[Any, ...]]:
        """Each expert, and its rows of each tensor."""
        parts = [tensor.split(self.counts) for tensor in tensors]
        return zip(range(self.first, self.first + len(self.counts)), *parts, strict=True)


def _groups(counts: Sequence[int]) -> Iterator[_Group]:
    first, mine, start, stop = 0, [], 0, 0
    for expert, count in enumerate([*counts, 0]):
        if mine and (count == 0 or stop + count - start > ROWS):
            yield _Group(first, mine, start, stop)
            mine = []
        if not mine:
            first, start = expert, stop
        if count:
            mine.append(count)
            stop += count


def _each(group: _Group, out: Tensor, rows: Tensor, weight: Sequence[Tensor], bias: Tensor | None) -> None:
    """`rows @ weight[expert].T + bias[expert]`, each expert on its rows."""
    last = group.first + len(group.counts)
    mine = zip(rows.split(group.counts), weight[group.first : last], strict=True)
    if bias is not None:
        results = [_linear(r, w, b) for (r, w), b in zip(mine, bias[group.first : last].unbind(), strict=True)]
    elif _use_onednn(rows, weight[0]):
        results = [_ONEDNN(r, w, None, "none", [], "") for r, w in mine]
    else:
        for (r, w), o in zip(mine, out.split(group.counts), strict=True):
            torch.mm(r, w.t(), out=o)
        return
    torch.cat(results, out=out)


def _each_outer(group: _Group, out: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
    """`out[expert] = left.T @ right`, over each expert's rows."""
    mine = out[group.first : group.first + len(group.counts)]
    parts = zip(mine, left.split(group.counts), right.split(group.counts), strict=True)
    if _use_onednn(left, mine[0], smallest=2**14):
        for o, one, other in parts:
            o.copy_(_ONEDNN(one.t(), other.t(), None, "none", [], ""))
    else:
        for o, one, other in parts:
            torch.mm(one.t(), other, out=o)


def _use_onednn(x: Tensor, matrix: Tensor, smallest: int = 2**12) -> bool:
    """Its results come in memory of their own: where `matrix` is small the copy costs more than the faster product gains."""
    usable = _ONEDNN is not None and torch.backends.mkldnn.enabled and x.dtype == torch.float32 and x.device.type == "cpu"
    return usable and matrix.numel() > smallest


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _ONEDNN(x, weight, bias, "none", [], "") if _use_onednn(x, weight) else F.linear(x, weight, bias)


# What torch's compiler calls for a float32 linear layer on a CPU, in full float32 precision. On processors that are not Intel's
# it is up to twice as fast as the BLAS behind `torch.mm`, which keeps its widest instructions for Intel's; where it is
# missing, that is what we use.
try:
    _ONEDNN = torch.ops.mkldnn._linear_pointwise.default if torch.backends.mkldnn.is_available() else None
except (AttributeError, RuntimeError):
    _ONEDNN = None


def _sum_rows(rows: Tensor, place: Tensor, starts: Tensor | None) -> Tensor:
    """The sum of each token's rows, in one pass: an embedding bag, in which a token is the bag of its experts' outputs."""
    if len(rows) == 0:  # embedding_bag refuses a table without rows
        return rows.new_zeros(len(place) if starts is None else len(starts), rows.shape[1])
    return F.embedding_bag(place, rows, starts, mode="sum")


def _activate(act: Activation, h: Tensor, hidden: int, out: Tensor) -> None:
    if h.shape[1] == hidden:
        _forward(act, h, out)
    else:
        _forward(act, h[:, :hidden], out).mul_(h[:, hidden:])


def _forward(act: Activation, z: Tensor, out: Tensor) -> Tensor:
    return out.copy_(act(z)) if callable(act) else _ACTIVATIONS[act][0](z, out)


def _backward(act: Activation, grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
    if not callable(act):
        return _ACTIVATIONS[act][1](grad, z, out)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        return out.copy_(torch.autograd.grad(act(z), z, grad)[0])


_ops = torch.ops.aten
_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "silu": (
        lambda z, out: _ops.silu.out(z, out=out),
        lambda grad, z, out: _ops.silu_backward.grad_input(grad, z, grad_input=out),
    ),
    "gelu": (
        lambda z, out: _ops.gelu.out(z, out=out),
        lambda grad, z, out: _ops.gelu_backward.grad_input(grad, z, grad_input=out),
    ),
    "gelu_tanh": (
        lambda z, out: _ops.gelu.out(z, approximate="tanh", out=out),
        lambda grad, z, out: _ops.gelu_backward.grad_input(grad, z, approximate="tanh", grad_input=out),
    ),
    "relu": (
        lambda z, out: torch.clamp(z, min=0, out=out),
        lambda grad, z, out: _ops.threshold_backward.grad_input(grad, z, 0, grad_input=out),
    ),
}


def activation_name(act: Callable[[Tensor], Tensor]) -> Activation:
    """The name under which `moe_forward` knows a host's activation module; the module itself if it knows none.

    A named one has a derivative written by hand.
    """
    return _HOSTS_NAMES.get(type(act).__name__, act)


_HOSTS_NAMES = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


def _ungrouped(x: Tensor, gate_up: Tensor, down: Tensor) -> str:
    """Why `grouped_mm` cannot do it; empty if it can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, got {x.dtype}"
    sizes = (x.shape[1], gate_up.shape[1], down.shape[2])
    if any(size * x.element_size() % 16 for size in sizes):
        return f"needs sizes of a multiple of 16 bytes, got {sizes} numbers of {x.element_size()} bytes"
    return ""


def _grouped(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    act: Activation,
    bias1: Tensor | None,
    bias2: Tensor | None,
) -> Tensor:
    """The same with one grouped product for all experts, and autograd's own backward."""
    order, _, offsets = dispatch(index, len(down))
    if len(order) == 0:  # nothing to multiply, and grouped_mm has no backward for that
        return _Experts.apply(x, index, weights, gate_up, down, bias1, bias2, act, False)
    token = order // index.shape[1]
    expert = index.flatten()[order]
    phi = act if callable(act) else {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}.get(act, _gelu_tanh)
    h = F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=offsets)
    if bias1 is not None:
        h = h + bias1[expert]
    hidden = down.shape[2]
    a = phi(h) if h.shape[1] == hidden else phi(h[:, :hidden]) * h[:, hidden:]
    y = F.grouped_mm(a, down.transpose(1, 2), offs=offsets)
    if bias2 is not None:
        y = y + bias2[expert]
    y = y * weights.flatten()[order].unsqueeze(1).to(y.dtype)
    # Each pair in a place of its own and then a sum: unlike adding into tokens, the same in each run on a GPU.
    spread = y.new_zeros(index.numel(), y.shape[1]).index_copy(0, order, y)
    return spread.view(*index.shape, -1).sum(1)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
