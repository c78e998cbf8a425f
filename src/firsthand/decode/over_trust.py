"""The over-trust penalty: how strongly the tokens of a response have all come to lean on one of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

LARGEST = 65504.0  # the penalty's ceiling: the largest float16


def over_trust_penalty(
    attention: Float[Tensor, "*batch length length"],
    image_span: tuple[int, int] | None,
    response_start: int,
    scale_factor: float = 50.0,
    warmup: int = 10,
    score_scale: float = 1e-7,
) -> tuple[Float[Tensor, "*batch"], Int64[Tensor, "*batch"]]:
    r"""Penalty of a response whose later tokens all attend to one earlier token.

    $$ \phi = \max_j\; c_0 \prod_{i=j}^{n-1} \sigma\, \omega_{ij}, \qquad
       \omega_{ij} = \frac{a_{ij}}{\sum_k a_{ik}} $$

    where i and j run over the n tokens of the response and k over these and the prompt. While n is at most `warmup` it is
    instead minus the last token's attention to the image, a bonus for looking at it.

    Args:
        attention: a, by row the token that attends. The largest over the heads of the last layer; rows need not sum to 1.
            What stands above the diagonal is not read as long as it is zero, as causal attention is.
        image_span: positions of the first and the last image token in the prompt. None: no bonus, 0 during the warm-up.
        response_start: position of the first token of the response.
        scale_factor: σ, positive. A column grows where it gets more than the share 1/σ of the attention.
        warmup: length of response, in tokens, up to which attention to the image counts and not the products.
        score_scale: $c_0$, positive.

    Returns:
        φ, at most 65504, in float32 or wider; and the column j it is found in, counted from the start of the response. The
        column is that of the products during the warm-up too.

    Raises:
        ValueError: shapes or positions do not fit, attention is negative or not finite, a row of the response is all zeros, or
            a setting is out of range.

    Source:
        Huang et al., "OPERA: Alleviating Hallucination in Multi-Modal Large Language Models via Over-Trust Penalty and
        Retrospection-Allocation", CVPR 2024, arXiv 2311.17911, section 3.2. $c_0$ and the warm-up are not in the paper but in
        its code, which keeps the products in float16, where they overflow and underflow. Here they are sums of logarithms,
        and only the result is cut off at float16's largest number (our choice).
    """
    if attention.ndim < 2 or attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention must be square in its last two dimensions, got shape {tuple(attention.shape)}")
    if not 0 <= response_start < attention.shape[-1]:
        raise ValueError(f"response_start must be a position of the {attention.shape[-1]} tokens, got {response_start}")
    _check_settings(response_start, image_span, scale_factor, warmup, score_scale)
    share = _shares(attention[..., response_start:, :], "attention")
    log_share = (share[..., response_start:] * scale_factor).log()
    below = torch.ones_like(log_share, dtype=torch.bool).tril()
    log_scores = math.log(score_scale) + torch.where(below, log_share, 0.0).sum(-2)
    log_penalty, column = log_scores.max(-1)
    if log_scores.shape[-1] > warmup:
        return _bounded(log_penalty), column
    return -_on_image(share[..., -1, :], image_span), column


@dataclass(frozen=True)
class OverTrustState:
    """The over-trust penalty of growing responses, in time linear in their length for each new token.

    Nothing changes a state: `push` and `fork` make new ones. To roll back, keep the state of the step to go back to, and go on
    from there. Begin with `OverTrustState.empty`.

    Attributes:
        log_scores: logarithm of the product of each column.
        on_image: the last token's attention to the image, a share.
        response_start: see `over_trust_penalty`; with it `image_span`, `scale_factor`, `warmup` and `score_scale`.
    """

    log_scores: Float[Tensor, "sequences response"]
    on_image: Float[Tensor, " sequences"]
    response_start: int
    image_span: tuple[int, int] | None
    scale_factor: float
    warmup: int
    score_scale: float

    @classmethod
    def empty(
        cls,
        sequences: int,
        response_start: int,
        image_span: tuple[int, int] | None = None,
        scale_factor: float = 50.0,
        warmup: int = 10,
        score_scale: float = 1e-7,
        device: torch.device | str | None = None,
    ) -> OverTrustState:
        """The state of so many responses without a token.

        Raises:
            ValueError: a setting is out of range.
        """
        _check_settings(response_start, image_span, scale_factor, warmup, score_scale)
        none = torch.zeros(sequences, 0, device=device)
        return cls(none, none.sum(-1), response_start, image_span, scale_factor, warmup, score_scale)

    def push(self, row: Float[Tensor, "sequences length"]) -> OverTrustState:
        """The state with one more token.

        Args:
            row: attention of the new token to all tokens and itself, the largest over the heads; rows need not sum to 1.

        Raises:
            ValueError: the row is of another length or of other sequences, is negative, not finite or all zeros.
        """
        sequences, response = self.log_scores.shape
        if len(row) != sequences:
            raise ValueError(f"row must have {sequences} sequences, got {len(row)}")
        if row.shape[1] != self.response_start + response + 1:
            raise ValueError(
                f"row must have {self.response_start + response + 1} columns (the prompt, {response} tokens of the response "
                f"and the new one), got {row.shape[1]}"
            )
        share = _shares(row, "row")
        start = self.log_scores.new_full((sequences, 1), math.log(self.score_scale))
        log_share = (share[:, self.response_start :] * self.scale_factor).log()
        log_scores = torch.cat([self.log_scores, start], 1) + log_share
        return replace(self, log_scores=log_scores, on_image=_on_image(share, self.image_span))

    def fork(self, index: Int64[Tensor, " chosen"]) -> OverTrustState:
        """The state of these sequences, of some several times if need be."""
        return replace(self, log_scores=self.log_scores[index], on_image=self.on_image[index])

    @property
    def penalty(self) -> Float[Tensor, " sequences"]:
        """φ, see `over_trust_penalty`."""
        self._check_not_empty()
        if self.log_scores.shape[1] > self.warmup:
            return _bounded(self.log_scores.amax(-1))
        return -self.on_image

    @property
    def column(self) -> Int64[Tensor, " sequences"]:
        """The column φ is found in, counted from the start of the response."""
        self._check_not_empty()
        return self.log_scores.argmax(-1)

    def _check_not_empty(self) -> None:
        if not self.log_scores.shape[1]:
            raise ValueError("the response has no token yet: push one")


def _shares(rows: Tensor, name: str) -> Tensor:
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sums = rows.sum(-1, keepdim=True)
    if not bool((rows >= 0).all() & (sums > 0).all() & sums.isfinite().all()):
        raise ValueError(f"{name} must be finite and not negative, with something in each row of the response")
    return rows / sums


def _bounded(log_penalty: Tensor) -> Tensor:
    return log_penalty.clamp(max=math.log(LARGEST)).exp().clamp(max=LARGEST)


def _on_image(share: Tensor, image_span: tuple[int, int] | None) -> Tensor:
    if image_span is None:
        return torch.zeros_like(share[..., 0])
    return share[..., image_span[0] : image_span[1] + 1].sum(-1)


def _check_settings(
    response_start: int, image_span: tuple[int, int] | None, scale_factor: float, warmup: int, score_scale: float
) -> None:
    if image_span is not None and not 0 <= image_span[0] <= image_span[1] < response_start:
        raise ValueError(
            f"image_span must be the first and the last position of the image among the {response_start} tokens of the prompt, "
            f"got {image_span}"
        )
    if not 0 < scale_factor < math.inf:
        raise ValueError(f"scale_factor must be positive and finite, got {scale_factor}")
    if not 0 < score_scale < math.inf:
        raise ValueError(f"score_scale must be positive and finite, got {score_scale}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
