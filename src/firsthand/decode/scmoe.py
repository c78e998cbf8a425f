"""Self-contrast decoding: push a sparse model's prediction away from what its less suited experts would have predicted."""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from firsthand.moe.blocks import moe_blocks
from firsthand.moe.layer import Routing
from firsthand.moe.routing import renormalizes, route_at_random, route_by_rank, routing_override

try:
    from transformers import LogitsProcessor
except ImportError:  # only `generate` of transformers has a use for the processor
    LogitsProcessor = object  # type: ignore[assignment, misc]


def self_contrast_logits(
    strong: Float[Tensor, "*batch vocab"],
    weak: Float[Tensor, "*batch vocab"],
    beta: float = 0.5,
    alpha: float = 0.1,
    strong_temperature: float = 1.0,
    weak_temperature: float = 1.0,
) -> Float[Tensor, "*batch vocab"]:
    r"""Contrast two predictions of the next token.

    $$ z = (1 + \beta)\, z_s - \beta\, z_w \quad\text{where}\quad z_s \ge \log \alpha + \max z_s, \qquad
       z = -\infty \text{ elsewhere} $$

    The condition keeps the tokens with at least the share α of the strong prediction's largest probability: the weak prediction
    cannot lift a token that the strong one rules out.

    Args:
        strong: $z_s$, logits with the model's usual experts.
        weak: $z_w$, logits with less suited ones.
        beta: β, at least 0. 0 leaves the strong logits, without the implausible tokens.
        alpha: α, in (0, 1]. 1 keeps the strong prediction's best token only.
        strong_temperature: what $z_s$ is divided by first; positive.
        weak_temperature: what $z_w$ is divided by first; positive.

    Returns:
        z, in float32 or wider. Greedy decoding takes its argmax, sampling its softmax.

    Raises:
        ValueError: a setting is out of range, or the shapes differ.

    Source:
        Shi et al., "Unchosen Experts Can Contribute Too: Unleashing MoE Models' Power by Self-Contrast", NeurIPS 2024,
        arXiv 2405.14507, section 2.3; the two temperatures are those of its reference code. The paper takes α = 0.1 and β from
        {0.1, 0.3, 0.5, 0.7, 0.9}.
    """
    _check_settings(beta, alpha, strong_temperature, weak_temperature)
    if strong.shape != weak.shape:
        raise ValueError(f"strong and weak must have the same shape, got {tuple(strong.shape)} and {tuple(weak.shape)}")
    dtype = torch.promote_types(strong.dtype, torch.float32)
    strong, weak = strong.to(dtype) / strong_temperature, weak.to(dtype) / weak_temperature
    plausible = strong >= strong.amax(-1, keepdim=True) + math.log(alpha)
    return torch.where(plausible, (1 + beta) * strong - beta * weak, -torch.inf)


@contextmanager
def self_contrast(
    model: nn.Module,
    weak_rank: int | Sequence[int] | str = 2,
    beta: float = 0.5,
    alpha: float = 0.1,
    *,
    strong_temperature: float = 1.0,
    weak_temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Within this context, the model's logits are contrasted with those of its less suited experts.

    Each forward pass computes both predictions at once, as one batch of twice the rows: the first half is routed as ever, the
    second to the experts of `weak_rank`, in every layer and at every position. What comes out is what went in: as many rows, and
    `self_contrast_logits` of the two as `.logits`. So everything that works with the model works: `generate`, greedy or
    sampling, streaming, stopping criteria, scoring of given text::

        with self_contrast(model):
            model.generate(**inputs)

    The key-value cache has a row for each prediction; one that was filled outside cannot be used inside, nor the reverse. Only
    forward passes of the thread that entered are affected: enter it in the thread that generates. Within
    `routing_override(model, top_k=3)` the strong prediction is that of three experts.

    Args:
        model: a causal language model of transformers in whose blocks `firsthand.moe.blocks.moe_blocks` finds experts.
        weak_rank: the place of the weak prediction's expert when the experts are sorted by probability, from 1: 2 is the
            runner-up. Or several places; or `"random"`, one expert by chance in each layer for each token. Weights are
            renormalised if the model's own are.
        beta: see `self_contrast_logits`; with it `alpha`, `strong_temperature` and `weak_temperature`.
        generator: draws the experts of `"random"`.

    Raises:
        ValueError: on entry, a setting is out of range or the model has no MoE blocks. In a forward pass: `labels` are given
            (a loss of these logits is not what is trained), or the cache's rows do not fit, as in beam search (`num_beams` above
            1), which reorders the rows without knowing of the second half.

    Source:
        arXiv 2405.14507, section 2.3. The reference code runs two passes one after the other; the one batch is ours.
    """
    _check_settings(beta, alpha, strong_temperature, weak_temperature)
    blocks = moe_blocks(model)
    ranks = _ranks(weak_rank, min(block.num_experts for block in blocks))
    renormalize = renormalizes(blocks[0].router)
    names = list(inspect.signature(model.forward).parameters)
    owner, doubled = threading.get_ident(), False

    def double(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        nonlocal doubled
        if threading.get_ident() != owner:
            return None
        kwargs = dict(zip(names, args, strict=False)) | kwargs | {"return_dict": True}
        if kwargs.get("labels") is not None:
            raise ValueError("labels must be left out within self_contrast: its logits are for decoding, not for a loss")
        given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if given is None:
            raise ValueError("input_ids or inputs_embeds must be given")
        _check_cache(kwargs.get("past_key_values"), len(given))
        for name in ("input_ids", "inputs_embeds", "attention_mask", "position_ids"):
            if name in kwargs:
                kwargs[name] = _twice(kwargs[name], len(given))
        doubled = True
        return (), kwargs

    def contrast(_: nn.Module, args: Any, output: Any) -> Any:
        nonlocal doubled
        if threading.get_ident() != owner:
            return None
        doubled = False
        strong, weak = output.logits.chunk(2)
        for name in ("hidden_states", "attentions", "router_logits"):  # those of the strong half
            if output.get(name) is not None:
                output[name] = tuple(each.chunk(2)[0] for each in output[name])
        if output.get("aux_loss") is not None:
            output["aux_loss"] = None  # of both halves, which is nobody's
        output["logits"] = self_contrast_logits(strong, weak, beta, alpha, strong_temperature, weak_temperature)
        return output

    def route(routing: Routing) -> tuple[Tensor, Tensor]:
        if not doubled:  # someone calls the model below the head
            return routing.weights, routing.index
        logits = routing.logits.chunk(2)[1]
        if ranks == "random":
            weak_weights, weak_index = route_at_random(logits, renormalize, generator)
        else:
            weak_weights, weak_index = route_by_rank(logits, ranks, renormalize)
        weights, index = routing.weights.chunk(2)[0], routing.index.chunk(2)[0]
        width, nobody = max(index.shape[1], weak_index.shape[1]), logits.shape[1]
        return (
            torch.cat([F.pad(each, (0, width - each.shape[1])) for each in (weights, weak_weights)]),
            torch.cat([F.pad(each, (0, width - each.shape[1]), value=nobody) for each in (index, weak_index)]),
        )

    handles = [model.register_forward_pre_hook(double, with_kwargs=True), model.register_forward_hook(contrast)]
    try:
        with routing_override(model, route):
            yield
    finally:
        for handle in handles:
            handle.remove()


class SelfContrastLogitsProcessor(LogitsProcessor):
    """Self-contrast as a logits processor: a second, weak pass after each of the model's own.

    For where a context around `generate` does not reach, as behind an interface that takes logits processors. It computes what
    `self_contrast` computes, in two passes a token instead of one of twice the rows. Put it first: it wants raw logits. ::

        model.generate(**inputs, logits_processor=[SelfContrastLogitsProcessor(model, attention_mask=inputs["attention_mask"])])

    The weak pass keeps a key-value cache of its own. It is built anew whenever the tokens do not go on where they ended, so one
    processor can serve one prompt after another. It serves one `generate` at a time.

    Args:
        model: the model that generates.
        weak_rank: see `self_contrast`; with it `beta`, `alpha`, the temperatures and `generator`.
        attention_mask: of the prompts, as given to `generate`; needed if some are padded. Where `generate` returns several
            sequences for each prompt, one row for each prompt is enough.
        use_cache: False computes every weak pass from the first token on.

    Raises:
        ValueError: a setting is out of range, or the model has no MoE blocks. When called: the mask does not fit the tokens, a
            prompt begins with the padding token and there is no mask, or the scores are those of a beam search.

    Source:
        arXiv 2405.14507, section 2.3, and its reference code, without that code's switch that forbids the end token.
    """

    def __init__(
        self,
        model: Any,
        weak_rank: int | Sequence[int] | str = 2,
        beta: float = 0.5,
        alpha: float = 0.1,
        *,
        strong_temperature: float = 1.0,
        weak_temperature: float = 1.0,
        attention_mask: Int64[Tensor, "prompts prompt"] | None = None,
        use_cache: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        self.settings = (beta, alpha, strong_temperature, weak_temperature)
        _check_settings(*self.settings)
        self.ranks = _ranks(weak_rank, min(block.num_experts for block in moe_blocks(model)))
        self.model, self.attention_mask, self.use_cache, self.generator = model, attention_mask, use_cache, generator
        self._seen: Tensor | None = None
        self._cache: Any = None

    def __call__(
        self, input_ids: Int64[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Contrast the model's raw logits of the next token with the weak ones."""
        return self_contrast_logits(scores, self._weak(input_ids, scores).to(scores.device), *self.settings)

    @torch.no_grad()
    def _weak(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        known = self._known(input_ids)
        if not known:
            self._cache = None
            _refuse_beam_search(input_ids, scores)
        mask = self._mask(input_ids)
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]
        generator = self.generator if self.ranks == "random" else None
        with routing_override(self.model, self.ranks, generator=generator):
            output = self.model(
                input_ids=input_ids[:, known:],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=self.use_cache,
                logits_to_keep=1,
                return_dict=True,
            )
        self._seen, self._cache = input_ids, output.past_key_values if self.use_cache else None
        return output.logits[:, -1]

    def _known(self, input_ids: Tensor) -> int:
        """How many of the tokens the cache holds: 0 if they do not go on where it ends."""
        seen = self._seen
        if self._cache is None or seen is None or len(seen) != len(input_ids) or seen.shape[1] >= input_ids.shape[1]:
            return 0
        return seen.shape[1] if torch.equal(seen, input_ids[:, : seen.shape[1]]) else 0

    def _mask(self, input_ids: Tensor) -> Tensor | None:
        rows, length = input_ids.shape
        if self.attention_mask is None:
            pad, bos = self.model.config.get_text_config().pad_token_id, self.model.config.get_text_config().bos_token_id
            if rows > 1 and pad is not None and pad != bos and bool((input_ids[:, 0] == pad).any()):
                raise ValueError(f"attention_mask must be given: some prompts begin with the padding token {pad}")
            return None
        prompts, prompt = self.attention_mask.shape
        if rows % prompts or prompt > length:
            raise ValueError(
                f"attention_mask must be that of the prompts of {rows} sequences of {length} tokens, "
                f"got shape {(prompts, prompt)}"
            )
        if bool(self.attention_mask.all()):
            return None
        mask = self.attention_mask.to(input_ids.device).repeat_interleave(rows // prompts, dim=0)
        return F.pad(mask, (0, length - prompt), value=1)


def _twice(value: Any, rows: int) -> Any:
    if isinstance(value, dict):  # a mask for each kind of layer
        return {name: _twice(each, rows) for name, each in value.items()}
    return torch.cat([value, value]) if isinstance(value, Tensor) and len(value) == rows else value


def _check_cache(cache: Any, rows: int) -> None:
    layer = next(iter(getattr(cache, "layers", ())), None)
    if layer is not None and layer.is_initialized and len(layer.keys) != 2 * rows:
        raise ValueError(
            f"past_key_values must have 2 rows for each of the {rows} sequences, got {len(layer.keys)}: within self_contrast "
            "there is neither beam search (num_beams above 1) nor a cache that was filled outside"
        )


def _refuse_beam_search(input_ids: Tensor, scores: Tensor) -> None:
    """Beam search begins with the same tokens in several rows and hands over log-probabilities."""
    if len(input_ids) > 1 and bool((scores.logsumexp(-1).abs() < 1e-3).all()) and len(input_ids.unique(dim=0)) < len(input_ids):
        raise ValueError("num_beams must be 1: what the contrast makes of a beam's log-probabilities are none")


def _ranks(weak_rank: int | Sequence[int] | str, experts: int) -> list[int] | str:
    """Ranks from 0, or "random"."""
    if isinstance(weak_rank, str) and weak_rank == "random":
        return weak_rank
    places = [weak_rank] if isinstance(weak_rank, int) else [] if isinstance(weak_rank, str) else weak_rank
    if not places or len(set(places)) < len(places) or not all(1 <= each <= experts for each in places):
        raise ValueError(f"weak_rank must be a place in [1, {experts}], different such places, or 'random', got {weak_rank!r}")
    return [place - 1 for place in places]


def _check_settings(beta: float, alpha: float, strong_temperature: float, weak_temperature: float) -> None:
    if not 0 <= beta < math.inf:
        raise ValueError(f"beta must be at least 0 and finite, got {beta}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    for name, value in (("strong_temperature", strong_temperature), ("weak_temperature", weak_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
