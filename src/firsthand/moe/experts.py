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

SCRATCH = 2**20
"""How many numbers the experts that are taken together have between their products: few enough for the cache."""


# With no backward pass to come, few tokens are better off otherwise. Up to so many numbers, the chosen experts are copied out and
# multiplied at once. Up to so many pairs per expert `grouped_mm` is used: for experts up to this size, and for a single token.
GATHERED, FEW, SMALL = 2**17, 4, 2**17


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
    if len(flat):
        low, high = (int(bound) for bound in flat.aminmax())
        if low < 0 or high > num_experts:
            raise ValueError(f"index must be in [0, {num_experts}], got values in [{low}, {high}]")
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
        impl = "loop" if reason or kind == "cpu" else "grouped"
        if kind == "cpu" and not (torch.is_grad_enabled() and _any_requires_grad(x, weights, gate_up, down, bias1, bias2)):
            pairs, expert = index.numel(), down[0].numel() + gate_up[0].numel()
            if 0 < pairs * expert <= GATHERED and bias1 is None and bias2 is None and int(index.max()) < len(down):
                return _gathered(tokens, index, weights, gate_up, down, act).to(x.dtype).view_as(x)
            if pairs <= FEW * len(down) and (expert <= SMALL or len(index) == 1) and not reason:
                impl = "grouped"
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
        busy = [(e, count) for e, count in enumerate(counts.tolist()) if count]
        rows = SCRATCH // (2 * dim + 3 * hidden + inner)
        experts, groups = [e for e, _ in busy], list(_groups([count for _, count in busy], rows))
        most = max((sum(group.counts) for group in groups), default=0)

        keep = any(ctx.needs_input_grad) and not recompute
        h_all = x.new_empty(pairs if keep else most, inner)
        y = x.new_empty(pairs, dim)
        space = [x.new_empty(most + SPARE, width) for width in (dim, hidden)]
        first, second = _pick(gate_up, experts), _pick(down, experts)
        first_bias, second_bias = (None if bias is None else _pick(bias, experts) for bias in (bias1, bias2))
        for group in groups:
            size = sum(group.counts)
            xs, a = (buffer[:size] for buffer in space)
            torch.index_select(x, 0, token[group.rows], out=xs)
            h = h_all[group.rows] if keep else h_all[:size]
            _each(group, h, xs, first, first_bias)
            _activate(act, h, hidden, a)
            a.mul_(weight[group.rows])
            _each(group, y[group.rows], a, second)
            if second_bias is not None:
                for part, w, b in group.split(y[group.rows], weight[group.rows], second_bias):
                    part.addcmul_(w, b)
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
        ctx.experts, ctx.groups, ctx.most, ctx.act, ctx.shape = experts, groups, most, act, weights.shape
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
        experts, groups = ctx.experts, ctx.groups
        new = torch.empty_like if len(experts) == len(down) else torch.zeros_like
        dgate_up = new(gate_up, memory_format=torch.contiguous_format) if needs_gate_up else None
        ddown = new(down, memory_format=torch.contiguous_format) if needs_down else None
        dbias1 = new(bias1) if needs_bias1 else None
        dbias2 = new(bias2) if needs_bias2 else None
        dfirst, dsecond, dfirst_bias, dsecond_bias = (
            None if grad is None else _pick(grad, experts) for grad in (dgate_up, ddown, dbias1, dbias2)
        )
        dweight = weight.new_empty(len(token)) if needs_weights else None
        dx = x.new_empty(len(token), dim) if needs_x else None

        first = None if h_all is not None else _pick(gate_up, experts)
        first_t, second_t = (_pick(w.transpose(1, 2), experts) for w in (gate_up, down))
        first_bias, second_bias = (None if bias is None else _pick(bias, experts) for bias in (bias1, bias2))
        widths = (dim, dim, hidden, hidden, hidden, inner, *([inner] if h_all is None else []))
        space = [x.new_empty(most + SPARE, width) for width in widths]
        for group in groups:
            rows, size = group.rows, sum(group.counts)
            w = weight[rows]
            xs, dy, a, da, slope, dh, *recomputed = (buffer[:size] for buffer in space)
            if h_all is None or dfirst is not None:
                torch.index_select(x, 0, token[rows], out=xs)
            if h_all is None:
                h = recomputed[0]
                _each(group, h, xs, first, first_bias)
            else:
                h = h_all[rows]
            torch.index_select(dout, 0, token[rows], out=dy)
            _each(group, da, dy, second_t)
            phi = a
            if gated:
                phi = _forward(act, h[:, :hidden], out=slope)
                torch.mul(phi, h[:, hidden:], out=a)
            else:
                _forward(act, h, out=a)
            if dweight is not None:
                torch.sum(torch.mul(a, da, out=dh[:, :hidden]), 1, out=dweight[rows])
                if second_bias is not None:
                    for part, d, b in group.split(dweight[rows], dy, second_bias):
                        part.addmv_(d, b)
            if dsecond is not None:
                _each_outer(group, dsecond, dy, a.mul_(w))
            if dsecond_bias is not None:
                for out, d, s in group.split(dsecond_bias, dy, w):
                    torch.mv(d.t(), s.squeeze(1).to(d.dtype), out=out)
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
            if dfirst_bias is not None:
                for out, d in group.split(dfirst_bias, dh):
                    torch.sum(d, 0, out=out)
            if dx is not None:
                _each(group, dx[rows], dh, first_t)

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
    """Experts with neighbouring rows, `rows`, that are worked on together. `mine` is their place among the experts that have
    any."""

    mine: slice
    counts: list[int]
    rows: slice

    def split(self, *tensors: Tensor | Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Each expert's rows of each tensor; of what is one tensor per expert, the expert's."""
        parts = [t.split(self.counts) if isinstance(t, Tensor) else t[self.mine] for t in tensors]
        return zip(*parts, strict=True)


def _groups(counts: Sequence[int], rows: int) -> Iterator[_Group]:
    """As many experts each as have no more than `rows` together, but at least one."""
    first, mine, start = 0, [], 0
    for count in [*counts, 0]:
        stop = start + sum(mine)
        if mine and (count == 0 or stop + count - start > rows):
            yield _Group(slice(first, first + len(mine)), mine, slice(start, stop))
            first, mine, start = first + len(mine), [], stop
        mine.append(count)


def _pick(weight: Tensor, experts: Sequence[int]) -> Sequence[Tensor]:
    """These experts' weights, as views."""
    if 4 * len(experts) < len(weight):
        return [weight[e] for e in experts]
    parts = weight.unbind()
    return parts if len(experts) == len(weight) else [parts[e] for e in experts]


def _each(group: _Group, out: Tensor, rows: Tensor, weight: Sequence[Tensor], bias: Sequence[Tensor] | None = None) -> None:
    """`rows @ weight.T + bias`, each expert on its rows; in memory, `SPARE` more rows follow them."""
    biases = [None] * len(group.counts) if bias is None else bias[group.mine]
    if not _use_onednn(rows, weight[0], smallest=2**12):
        for r, w, b, o in zip(rows.split(group.counts), weight[group.mine], biases, out.split(group.counts), strict=True):
            if b is None:
                torch.mm(r, w.t(), out=o)
            else:
                torch.addmm(b, r, w.t(), out=o)
        return
    results, start, width = [], rows.storage_offset(), rows.shape[1]
    for count, w, b in zip(group.counts, weight[group.mine], biases, strict=True):
        more = rows.as_strided((_round_up(count), width), (width, 1), start)
        results.append(_ONEDNN(more, w, b, "none", [], "")[:count])
        start += count * width
    torch.cat(results, out=out)


def _each_outer(group: _Group, out: Sequence[Tensor], left: Tensor, right: Tensor) -> None:
    """`out = left.T @ right`, over each expert's rows."""
    onednn = _use_onednn(left, out[0], smallest=2**17)
    for o, one, other in group.split(out, left, right):
        whole = len(one) // SPARE * SPARE if onednn else 0
        if whole == 0:
            torch.mm(one.t(), other, out=o)
            continue
        o.copy_(_ONEDNN(one[:whole].t(), other[:whole].t(), None, "none", [], ""))
        if whole < len(one):
            o.addmm_(one[whole:].t(), other[whole:])


def _use_onednn(x: Tensor, matrix: Tensor, smallest: int) -> bool:
    """Its results come in memory of their own: where `matrix` is small the copy costs more than the faster product gains."""
    usable = _ONEDNN is not None and torch.backends.mkldnn.enabled and x.dtype == torch.float32 and x.device.type == "cpu"
    return usable and matrix.numel() > smallest


SPARE = 32


def _round_up(count: int) -> int:
    """To one of few numbers of rows: oneDNN compiles a kernel for each shape, and experts never have as many rows twice.

    What it computes in the rows too many is thrown away.
    """
    return -(-count // SPARE) * SPARE if count > SPARE else 1 << (count - 1).bit_length()


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
    expert = None if bias1 is None and bias2 is None else index.flatten()[order]
    phi = act if callable(act) else {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}.get(act, _gelu_tanh)
    h = F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=offsets)
    if bias1 is not None:
        h = h + bias1[expert]
    hidden = down.shape[2]
    a = phi(h) if h.shape[1] == hidden else phi(h[:, :hidden]) * h[:, hidden:]
    y = F.grouped_mm(a, down.transpose(1, 2), offs=offsets)
    if bias2 is not None:
        y = y + bias2[expert]
    # Each pair in a place of its own and then a sum: unlike adding into tokens, the same in each run on a GPU.
    spread = y.new_zeros(index.numel(), y.shape[1]).index_copy_(0, order, y)
    return torch.bmm(weights.to(y.dtype).unsqueeze(1), spread.view(*index.shape, -1)).squeeze(1)


def _gathered(x: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, act: Activation) -> Tensor:
    """The same for a few tokens, of which each gets copies of its experts: no sorting, a handful of calls."""
    if int(index.min()) < 0:
        raise ValueError(f"index must be in [0, {len(down)}], got {index.min()}")
    chosen, (inner, dim), hidden = index.flatten(), gate_up.shape[1:], down.shape[2]
    first = gate_up.index_select(0, chosen).view(len(x), -1, dim)
    h = torch.bmm(first, x.unsqueeze(2)).view(-1, inner)
    a = h.new_empty(len(chosen), hidden)
    _activate(act, h, hidden, a)
    y = torch.bmm(down.index_select(0, chosen), a.unsqueeze(2)).view(*index.shape, dim)
    return torch.bmm(weights.to(y.dtype).unsqueeze(1), y).squeeze(1)


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")
