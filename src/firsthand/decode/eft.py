"""Emulated fine-tuning: what fine-tuning did to a small model, done to a large one while it decodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

try:
    from transformers import LogitsProcessor
except ImportError:  # only `generate` of transformers has a use for the processor
    LogitsProcessor = object  # type: ignore[assignment, misc]

Models = Any  # a causal language model of transformers, or a sequence of them


def emulated_logits(
    base: Float[Tensor, "*batch vocab"],
    tuned: Float[Tensor, "*batch vocab"] | Sequence[Float[Tensor, "*batch vocab"]],
    reference: Float[Tensor, "*batch vocab"] | Sequence[Float[Tensor, "*batch vocab"]],
    weights: float | Sequence[float] = 1.0,
    top_p: float | None = None,
    nucleus_of: str = "tuned",
) -> Float[Tensor, "*batch vocab"]:
    r"""Add to one model's prediction of the next token what fine-tuning changed in another's.

    $$ \log p(v) = \log \operatorname{softmax}_v \Big( \log p_\mathrm{base}(v)
       + \sum_i w_i \big( \log p_{\mathrm{tuned}, i}(v) - \log p_{\mathrm{reference}, i}(v) \big) \Big) $$

    Args:
        base: logits, or log-probabilities, of the model that is to seem fine-tuned. -inf forbids a token.
        tuned: logits of a fine-tuned model, or of several. May be -inf where the reference is too, or the weight positive.
        reference: logits of what each was before; one for all where they were the same.
        weights: $w_i$, any finite number, or one for each tuned model. 1 emulates the tuning, 0 leaves it out, a negative weight
            undoes or inverts it.
        top_p: in (0, 1]: change only the smallest set of most probable tokens that has this probability; elsewhere the
            difference counts as 0. None, like 1, changes all.
        nucleus_of: whose most probable tokens these are: `"tuned"`, of each tuned model for its own difference, or `"base"`.

    Returns:
        Log-probabilities, in float32 or wider. Adding a constant to any of the logits changes nothing.

    Raises:
        ValueError: the shapes differ, there is no tuned model, the lists differ in length, or a setting is out of range.

    Source:
        Mitchell et al., "An Emulator for Fine-Tuning Large Language Models using Small Language Models", ICLR 2024,
        arXiv 2310.12962: up-scaling is a small pair on a large base, down-scaling the reverse. The paper derives the sum for
        whole texts; normalising it at each token is its approximation, and ours (from memory of the paper, unverified). That
        `top_p` leaves the base as it is outside of the nucleus, and whose nucleus it is, is our choice.
    """
    tuned, reference = _as_list(tuned), _as_list(reference)
    weights = _check_settings(len(tuned), len(reference), weights, top_p, nucleus_of)
    for name, given in (("tuned", tuned), ("reference", reference)):
        for logits in given:
            if logits.shape != base.shape:
                raise ValueError(f"{name} must have the shape of base, {tuple(base.shape)}, got {tuple(logits.shape)}")
    dtype = torch.promote_types(base.dtype, torch.float32)
    total = log_base = F.log_softmax(base.to(dtype), -1)
    for each, before, weight in zip(tuned, reference * (len(tuned) // len(reference)), weights, strict=True):
        if weight == 0:  # and not 0 * inf
            continue
        log_tuned, log_reference = F.log_softmax(each.to(dtype), -1), F.log_softmax(before.to(dtype), -1)
        change = torch.where(log_tuned == log_reference, 0.0, log_tuned - log_reference)  # forbidden by both: no change
        if top_p is not None and top_p < 1:
            change = torch.where(_nucleus(log_tuned if nucleus_of == "tuned" else log_base, top_p), change, 0.0)
        total = total + weight * change
    return F.log_softmax(total, -1)


class EmulatedFineTuningLogitsProcessor(LogitsProcessor):
    """Emulated fine-tuning inside `generate`: greedy, sampling or beam search of the large base model.

    With a small model and its fine-tuned sibling::

        large.generate(**inputs, logits_processor=[EmulatedFineTuningLogitsProcessor(small_tuned, small)])

    For each token of the large model, each other model makes one step with a key-value cache of its own. The caches follow the
    rows: where the tokens go on they go on, where a beam search reorders its beams they are reordered, where tokens were taken
    back they are cut. So one processor serves one `generate` after another, but only one at a time.

    Args:
        tuned: a fine-tuned causal language model, or several. All models must share the tokenizer of the one that generates.
        reference: what each was before it was tuned; one for all, or as many as tuned. None where every tuned model is a
            `PeftModel`: then the reference is that model with its adapter off.
        weights: see `emulated_logits`; with it `top_p` and `nucleus_of`.
        prompts: for models that are to read other prompts than the one that generates, such as a chat template: from model to
            what its tokenizer returned (`input_ids` and, if padded on the left, `attention_mask`). What is generated comes after.
            A processor with such prompts is for one batch of prompts, until `reset`.
        attention_mask: of the prompts, as given to `generate`; needed if some are padded. Where `generate` returns several
            sequences for each prompt, one row for each prompt is enough.
        use_cache: False computes every step from the first token on.

    Raises:
        ValueError: a setting is out of range, lists that do not fit, or a model in training mode. When called: vocabularies of
            different sizes, a mask or prompts that do not fit the tokens, or a prompt that begins with the padding token and no
            mask.

    Source:
        arXiv 2310.12962. The paper has a sampler of its own; hosting it in `generate`, and the caches, are ours.
    """

    def __init__(
        self,
        tuned: Models,
        reference: Models = None,
        weights: float | Sequence[float] = 1.0,
        top_p: float | None = None,
        nucleus_of: str = "tuned",
        *,
        prompts: Mapping[Any, Mapping[str, Tensor]] | None = None,
        attention_mask: Int64[Tensor, "prompts prompt"] | None = None,
        use_cache: bool = True,
    ) -> None:
        self._pairs = _pairs(tuned, reference)
        self.weights = _check_settings(len(self._pairs), len(self._pairs), weights, top_p, nucleus_of)
        self.top_p, self.nucleus_of = top_p, nucleus_of
        self.prompts, self.attention_mask = dict(prompts or {}), attention_mask
        self._readers = {member: CachedReader(*member, use_cache) for pair in self._pairs for member in pair}
        unknown = [type(model).__name__ for model in self.prompts if all(model is not member for member, _ in self._readers)]
        if unknown:
            raise ValueError(f"prompts must be for the tuned and reference models, got one for another {unknown[0]}")
        self._prompt: Tensor | None = None

    def reset(self) -> None:
        """Forget all tokens, and give back the memory of the caches."""
        self._prompt = None
        for reader in self._readers.values():
            reader.reset()

    def __call__(
        self, input_ids: Int64[Tensor, "batch tokens"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """Turn logits, or log-probabilities, of the base model into log-probabilities of the emulated one."""
        if self.prompts:
            self._follow_prompt(input_ids)
        host_mask = _mask(self.attention_mask, input_ids)
        logits = {}
        for member, reader in self._readers.items():
            model = member[0]
            if model in self.prompts:
                ids, mask = self._own_prompt(model, input_ids)
            else:
                _check_padding(model, input_ids, self.attention_mask)
                ids, mask = input_ids, host_mask
            logits[member] = reader(ids, mask)[:, -1].to(scores.device)
            if logits[member].shape[-1] != scores.shape[-1]:
                raise ValueError(
                    f"all models must have one vocabulary: the base has {scores.shape[-1]} tokens, "
                    f"{type(model).__name__} has {logits[member].shape[-1]}"
                )
        tuned, reference = ([logits[member] for member in each] for each in zip(*self._pairs, strict=True))
        return emulated_logits(scores, tuned, reference, self.weights, self.top_p, self.nucleus_of)

    def _follow_prompt(self, input_ids: Tensor) -> None:
        if self._prompt is None:
            self._prompt = input_ids.clone()
        length = self._prompt.shape[1]
        if self._prompt.shape != input_ids[:, :length].shape or not torch.equal(self._prompt, input_ids[:, :length]):
            raise ValueError("prompts must be those of this call, but input_ids begins otherwise than before; call reset() first")

    def _own_prompt(self, model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The model's own prompts, and after them what was generated."""
        own, rows = self.prompts[model], len(input_ids)
        if rows % len(own["input_ids"]):
            raise ValueError(f"prompts must have a row for each prompt of {rows} sequences, got {len(own['input_ids'])}")
        prefix = own["input_ids"].to(input_ids.device).repeat_interleave(rows // len(own["input_ids"]), dim=0)
        ids = torch.cat([prefix, input_ids[:, self._prompt.shape[1] :]], 1)  # type: ignore[union-attr]
        return ids, _mask(own.get("attention_mask"), ids)


@torch.no_grad()
def emulated_nll(
    base: Any,
    tuned: Models,
    reference: Models,
    input_ids: Int64[Tensor, "batch tokens"],
    labels: Int64[Tensor, "batch tokens"],
    weights: float | Sequence[float] = 1.0,
    top_p: float | None = None,
    nucleus_of: str = "tuned",
    attention_mask: Int64[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, ""]:
    """How well the emulated model predicts given text: mean negative log-likelihood, in nats a token, one pass a model.

    Args:
        base: the model that is to seem fine-tuned.
        tuned: see `EmulatedFineTuningLogitsProcessor`; with it `reference`.
        input_ids: the text.
        labels: `input_ids`, with -100 at tokens that do not count. As in transformers, place t is predicted from those before it.
        weights: see `emulated_logits`; with it `top_p` and `nucleus_of`.
        attention_mask: of the text, where it is padded.

    Raises:
        ValueError: as the processor, or no label counts.
    """
    if bool((labels[:, 1:] == -100).all()):
        raise ValueError("labels must have a token to predict, all but the first of each row are -100")
    pairs = _pairs(tuned, reference)
    mask = _mask(attention_mask, input_ids)
    members = {(base, True), *(member for pair in pairs for member in pair)}
    logits = {member: CachedReader(*member, use_cache=False)(input_ids, mask, None).to(labels.device) for member in members}
    after, before = ([logits[member] for member in each] for each in zip(*pairs, strict=True))
    log_probs = emulated_logits(logits[base, True], after, before, weights, top_p, nucleus_of)
    return F.nll_loss(log_probs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class CachedReader:
    """A causal language model, and a cache of what it read last, so that it computes only what is new.

    Args:
        model: in evaluation mode.
        adapter: False turns the adapter of a `PeftModel` off while it reads.
        use_cache: False computes everything anew each time.
    """

    def __init__(self, model: Any, adapter: bool = True, use_cache: bool = True) -> None:
        _check_mode(model)
        self.model, self.adapter, self.use_cache = model, adapter, use_cache
        self.reset()

    def reset(self) -> None:
        """Forget what was read."""
        self._cache: Any = None
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Int64[Tensor, "batch tokens"],
        mask: Int64[Tensor, "batch tokens"] | None = None,
        places: int | None = 1,
    ) -> Float[Tensor, "batch places vocab"]:
        """Logits at the last `places` tokens, or at all of them."""
        _check_mode(self.model)
        device = getattr(self.model, "device", input_ids.device)
        input_ids, mask = input_ids.to(device), None if mask is None else mask.to(device)
        places = input_ids.shape[1] if places is None else places
        # A copy, since the host may write on where it goes on; and what is padding is no token.
        tokens = input_ids.clone() if mask is None else input_ids.masked_fill(mask == 0, -1)
        known, cache = self._rewind(tokens, input_ids.shape[1] - places)
        self.reset()  # a pass that fails leaves nothing half read
        inputs = {"input_ids": input_ids[:, known:], "past_key_values": cache, "use_cache": self.use_cache}
        if mask is not None:
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, known:]}
        with nullcontext() if self.adapter else self.model.disable_adapter():
            output = self.model(**inputs, logits_to_keep=places)
        if self.use_cache:
            self._cache, self._seen = output.past_key_values, tokens
        logits: Tensor = output.logits
        return logits

    def _rewind(self, tokens: Tensor, most: int) -> tuple[int, Any]:
        """How many of the first tokens are known, `most` at most, and the cache of them, its rows in the order of these."""
        seen, cache = self._seen, self._cache
        if seen is None or cache is None:
            return 0, None
        length = seen.shape[1]
        if length <= most and seen.shape == tokens[:, :length].shape and torch.equal(seen, tokens[:, :length]):
            return length, cache
        shorter = min(length, tokens.shape[1])
        differs = tokens[:, None, :shorter] != seen[None, :, :shorter]  # [rows, rows seen, tokens]
        common = torch.where(differs.any(-1), differs.byte().argmax(-1), shorter)
        longest, row = common.max(-1)
        known = min(int(longest.min()), most)
        if known <= 0 or (known < length and not cache.is_croppable):
            return 0, None
        if not torch.equal(row, torch.arange(len(seen), device=row.device)):
            cache.reorder_cache(row)
        if known < length:
            try:
                cache.crop(known - length)
            except RuntimeError:  # attention in a window: what has left it is gone
                return 0, None
        return known, cache


def _pairs(tuned: Models, reference: Models) -> list[tuple[tuple[Any, bool], tuple[Any, bool]]]:
    """(model, with adapter) of each tuned model and of its reference."""
    tuned = _as_list(tuned)
    if reference is None:
        without = [type(model).__name__ for model in tuned if not hasattr(model, "disable_adapter")]
        if without:
            raise ValueError(f"reference must be given: {without[0]} is no PeftModel whose adapter could be turned off")
        return [((model, True), (model, False)) for model in tuned]
    reference = _as_list(reference)
    _check_lengths(len(tuned), len(reference))
    return [
        ((each, True), (before, True)) for each, before in zip(tuned, reference * (len(tuned) // len(reference)), strict=True)
    ]


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """The smallest set of most probable tokens that has at least the probability `top_p`."""
    ordered, index = log_probs.exp().sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before < top_p)


def _mask(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """The prompts' mask for these tokens; None where nothing is padded."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    rows, length = input_ids.shape
    prompts, prompt = attention_mask.shape
    if rows % prompts or prompt > length:
        raise ValueError(
            f"attention_mask must be that of the prompts of {rows} sequences of {length} tokens, got shape {(prompts, prompt)}"
        )
    mask = attention_mask.to(input_ids.device).repeat_interleave(rows // prompts, dim=0)
    return F.pad(mask, (0, length - prompt), value=1)


def _check_padding(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> None:
    config = getattr(model, "config", None)
    if attention_mask is not None or config is None or len(input_ids) == 1:
        return
    pad, begin = config.get_text_config().pad_token_id, config.get_text_config().bos_token_id
    if pad is not None and pad != begin and bool((input_ids[:, 0] == pad).any()):
        raise ValueError(f"attention_mask must be given: some prompts begin with the padding token {pad}")


def _check_mode(model: Any) -> None:
    if model.training:
        raise ValueError(f"models must be in evaluation mode, got a {type(model).__name__} in training mode; call its eval()")


def _check_lengths(tuned: int, reference: int) -> None:
    if tuned == 0:
        raise ValueError("tuned must be a fine-tuned model or several, got none")
    if reference not in (1, tuned):
        raise ValueError(f"reference must be one or as many as tuned, {tuned}, got {reference}")


def _check_settings(tuned: int, reference: int, weights: Any, top_p: float | None, nucleus_of: str) -> list[Any]:
    """A weight for each tuned model."""
    _check_lengths(tuned, reference)
    each = [weights] * tuned if isinstance(weights, float | int) else list(weights)
    if len(each) != tuned:
        raise ValueError(f"weights must be one number or one for each of the {tuned} tuned models, got {len(each)}")
    if not all(math.isfinite(weight) for weight in each):
        raise ValueError(f"weights must be finite, got {weights}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], or None, got {top_p}")
    if nucleus_of not in ("tuned", "base"):
        raise ValueError(f"nucleus_of must be 'tuned' or 'base', got {nucleus_of!r}")
    return each
