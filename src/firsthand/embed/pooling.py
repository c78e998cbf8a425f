"""Pooling: from one vector per token to one vector per sequence."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def last_token_pool(
    hidden: Float[Tensor, "batch time dim"], attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch dim"]:
    r"""The hidden state of each sequence's last real token.

    $$ e_b = H_{b,\,t(b)}, \qquad t(b) = \max\{t : m_{bt} \ne 0\} $$

    In a causal model this token alone has seen the whole sequence. The rule is the same for padding on the left and on the right,
    so the side need not be guessed.

    Args:
        hidden: token states, usually those of the last layer.
        attention_mask: not 0 (or True) at real tokens, 0 (or False) at padding.

    Returns:
        One row of `hidden` per sequence, differentiable, in `hidden`'s dtype.

    Raises:
        ValueError: `attention_mask` of another batch or length than `hidden`, or a sequence without any real token. The second is
            not checked while `torch.compile` traces, since the answer depends on the data.

    Source:
        Jiang et al., "VLM2Vec: Training Vision-Language Models for Massive Multimodal Embedding Tasks", 2025, arXiv 2410.05160,
        which pools so. Its code takes position -1 if every row of the mask ends in 1 and else counts the ones from the left; ours
        agrees with that on both sides and is also right for masks with gaps.
    """
    if hidden.dim() != 3 or attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            "hidden must be [batch, time, dim] and attention_mask [batch, time], "
            f"got {tuple(hidden.shape)} and {tuple(attention_mask.shape)}"
        )
    real = attention_mask != 0
    if not torch.compiler.is_compiling() and not bool(real.any(dim=1).all()):
        empty = (~real.any(dim=1)).nonzero().flatten().tolist()
        raise ValueError(f"attention_mask must have a real token in every row, got none in rows {empty[:8]}")
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (positions * real).argmax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
