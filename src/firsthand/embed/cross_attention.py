"""The pre-norm cross-attention block with a GEGLU feed-forward that trainable poolings are made of.

The parameters live flat on the module that pools, so that a state dict names them `to_q.weight` and not `block.to_q.weight`.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

INITS = ("default", "identity")


def add_cross_attention(module: nn.Module, dim: int, num_heads: int, head_dim: int | None = None, init: str = "default") -> None:
    """Give a module the parameters of `cross_attend`.

    Sets `norm_q`, `norm_kv`, `norm_ff` (LayerNorm), `to_q` (h·dh, d), `to_kv` (2·h·dh, d; keys first), `to_out` (d, h·dh) without
    biases, and `ff_in` (8d, d), `ff_out` (d, 4d) with biases; also the numbers `num_heads` and `head_dim`.

    Args:
        module: the module that pools.
        dim: d, width of queries, keys and results.
        num_heads: h.
        head_dim: dh; by default d / h, our choice: the release of NV-Embed has heads as wide as the model.
        init: `"default"`, or `"identity"`: `to_out`, `ff_out` and its bias are zero, so that the block begins as the identity of
            its queries.

    Raises:
        ValueError: a number below 1, d not a multiple of h where `head_dim` is not given, an unknown `init`.
    """
    for name, value in (("dim", dim), ("num_heads", num_heads), ("head_dim", head_dim)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if init not in INITS:
        raise ValueError(f"init must be 'default' or 'identity', got {init!r}")
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim} where head_dim is not given, got {num_heads}")
        head_dim = dim // num_heads
    module.num_heads, module.head_dim = num_heads, head_dim
    inner = num_heads * head_dim
    module.norm_q, module.norm_kv, module.norm_ff = (nn.LayerNorm(dim) for _ in range(3))
    module.to_q = nn.Linear(dim, inner, bias=False)
    module.to_kv = nn.Linear(dim, 2 * inner, bias=False)
    module.to_out = nn.Linear(inner, dim, bias=False)
    module.ff_in = nn.Linear(dim, 8 * dim)
    module.ff_out = nn.Linear(4 * dim, dim)
    if init == "identity":
        for parameter in (module.to_out.weight, module.ff_out.weight, module.ff_out.bias):
            nn.init.zeros_(parameter)


def cross_attend(
    module: nn.Module,
    queries: Float[Tensor, "*lead_q q dim"],
    keys: Float[Tensor, "*lead_k k dim"],
    *,
    valid: Bool[Tensor, "*lead_v k"] | None = None,
) -> Float[Tensor, "*lead q dim"]:
    r"""Cross-attention and a feed-forward block, each with a norm before it and a residual around it.

    $$ Q' = Q + \mathrm{softmax}\Big(\tfrac{(\mathrm{LN}_q(Q) W_q)(\mathrm{LN}_{kv}(X) W_k)^\top}{\sqrt{d_h}}\Big)
       \mathrm{LN}_{kv}(X) W_v W_o, \qquad Q'' = Q' + W_2 (a \odot \mathrm{GELU}(g)), \quad [a|g] = W_1 \mathrm{LN}_{ff}(Q') $$

    Args:
        module: has the parameters of `add_cross_attention`.
        queries: Q, (..., q, d). Leading dimensions broadcast with those of `keys`.
        keys: X, (..., k, d). Keys without leading dimensions are shared by all queries and projected once.
        valid: (..., k), false for keys not to attend to. Each row needs at least one true.

    Returns:
        Q'', (..., q, d).

    Raises:
        ValueError: widths other than the module's.

    Source:
        The code of NV-Embed (arXiv 2405.17428) as released with its weights. The paper's formula has neither projections nor
        norms, and a feed-forward block without the gate.
    """
    hidden, gated = attend_and_gate(module, queries, keys, valid=valid)
    return hidden + module.ff_out(gated)


def attend_and_gate(
    module: nn.Module,
    queries: Float[Tensor, "*lead_q q dim"],
    keys: Float[Tensor, "*lead_k k dim"],
    *,
    valid: Bool[Tensor, "*lead_v k"] | None = None,
) -> tuple[Float[Tensor, "*lead q dim"], Float[Tensor, "*lead q four_dim"]]:
    """`cross_attend` up to its last linear map: Q' and a ⊙ GELU(g).

    For who averages over queries: the mean of `cross_attend` is `hidden.mean() + ff_out(gated.mean())`, with one product by W₂ a
    mean instead of one a query.
    """
    width = module.norm_q.normalized_shape[0]
    for name, value in (("queries", queries), ("keys", keys)):
        if value.ndim < 2 or value.shape[-1] != width:
            raise ValueError(f"{name} must have shape (..., n, {width}), got {tuple(value.shape)}")
    heads = module.num_heads
    q = module.to_q(module.norm_q(queries))
    k, v = (_split(x, heads) for x in module.to_kv(module.norm_kv(keys)).chunk(2, dim=-1))
    if keys.ndim == 2 and valid is None:
        # One set of keys for all: fold the leading dimensions into one long sequence of queries, copy no key.
        attended = _attend(_split(q.reshape(-1, q.shape[-1]), heads), k, v).unflatten(0, q.shape[:-1])
    else:
        attended = _attend(_split(q, heads), k, v, valid)
    hidden = queries + module.to_out(attended)
    value, gate = module.ff_in(module.norm_ff(hidden)).chunk(2, dim=-1)
    return hidden, value * F.gelu(gate)


def _split(x: Tensor, heads: int) -> Tensor:
    """(..., n, h·dh) to (..., h, n, dh)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def _attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
    """(..., h, q, dh) and (..., h, k, dh) to (..., q, h·dh)."""
    mask = None if valid is None else valid[..., None, None, :]
    lead = max((q.shape[:-2], k.shape[:-2]), key=len)  # the shorter has no batch, and broadcasts
    q, k, v = (x.expand(*lead, *x.shape[-2:]) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(-3, -2).flatten(-2)
