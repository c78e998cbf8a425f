"""Speculative decoding of an emulated fine-tuned model: the small tuned model drafts, the large one checks a block at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from firsthand.decode.eft import CachedReader, emulated_logits


@dataclass
class SpeculativeStats:
    """How the drafts fared.

    Attributes:
        tokens: new tokens.
        blocks: how often the large model was asked.
        drafted: tokens that the small tuned model proposed.
        accepted: how many of them were kept.
    """

    tokens: int = 0
    blocks: int = 0
    drafted: int = 0
    accepted: int = 0

    @property
    def accepted_per_block(self) -> float:
        """Drafts kept each time that the large model was asked; it adds one token more of its own."""
        return self.accepted / self.blocks


@torch.no_grad()
def emulated_speculative_generate(
    base: Any,
    tuned: Any,
    reference: Any,
    input_ids: Int64[Tensor, "1 prompt"],
    max_new_tokens: int,
    block: int = 5,
    do_sample: bool = True,
    generator: torch.Generator | None = None,
    *,
    weights: float = 1.0,
    top_p: float | None = None,
    nucleus_of: str = "tuned",
    eos_token_id: int | Sequence[int] | None = None,
) -> tuple[Int64[Tensor, "1 tokens"], SpeculativeStats]:
    r"""Generate from the emulated fine-tuned model with few passes of the large one.

    The small tuned model $q$ drafts a block of tokens one by one. The large base and the small reference each read the block in
    one pass, which gives the emulated prediction $p$ at each of its places. A draft $v$ is kept with probability
    $\min(1, p(v) / q(v))$; the first that is not is replaced by a draw from $(p - q)_+$, normalised, and the rest dropped. If all
    are kept, one more token is drawn from $p$. What comes out is distributed as sampling from $p$ token by token; without
    sampling it is the greedy output, each draft kept while it is the most probable token of $p$.

    Args:
        base: the large model, in evaluation mode as all three.
        tuned: the small fine-tuned model.
        reference: what it was before; None where `tuned` is a `PeftModel`: that model with its adapter off.
        input_ids: one prompt, without padding.
        max_new_tokens: at least 1.
        block: how many tokens are drafted at a time, at least 1.
        do_sample: False for greedy decoding.
        generator: draws the tokens, on the device of `base`.
        weights: see `emulated_logits`; with it `top_p` and `nucleus_of`.
        eos_token_id: a token, or several, after which to end; those of `base.generation_config` by default.

    Returns:
        The prompt with the new tokens, and how the drafts fared.

    Raises:
        ValueError: a number is out of range, not exactly one prompt of at least one token, a model in training mode, or
            vocabularies of different sizes.

    Source:
        Mitchell et al., arXiv 2310.12962 (from memory of the paper, unverified: the small tuned model drafts); the rule of
        acceptance is that of Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2023,
        arXiv 2211.17192.
    """
    if max_new_tokens < 1 or block < 1:
        raise ValueError(f"max_new_tokens and block must be at least 1, got {max_new_tokens} and {block}")
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be one prompt of at least one token, got shape {tuple(input_ids.shape)}")
    if reference is None and not hasattr(tuned, "disable_adapter"):
        raise ValueError(f"reference must be given: {type(tuned).__name__} is no PeftModel whose adapter could be turned off")
    large, drafting = CachedReader(base), CachedReader(tuned)
    before = CachedReader(tuned, adapter=False) if reference is None else CachedReader(reference)
    ends = _ends(base, eos_token_id)
    device, start, tokens = input_ids.device, input_ids.shape[1], input_ids
    stats = SpeculativeStats()

    def emulated(base_logits: Tensor, tuned_logits: Tensor, reference_logits: Tensor) -> Tensor:
        sizes = [each.shape[-1] for each in (base_logits, tuned_logits, reference_logits)]
        if len(set(sizes)) > 1:
            raise ValueError(f"all models must have one vocabulary: base, tuned and reference have {sizes} tokens")
        return emulated_logits(base_logits, tuned_logits, reference_logits, weights, top_p, nucleus_of).exp()

    while stats.tokens < max_new_tokens and not (stats.tokens and tokens[0, -1].item() in ends):
        length, seen = tokens.shape[1], []  # the tuned model's logits at each place of the block
        for _ in range(min(block, max_new_tokens - stats.tokens - 1)):  # one token more comes from the check
            seen.append(drafting(tokens)[0, -1].to(device))
            tokens = torch.cat([tokens, _draw(_probabilities(seen[-1]), do_sample, generator).view(1, 1)], 1)
            if tokens[0, -1].item() in ends:
                break
        drafts = tokens[0, length:]
        base_logits, reference_logits = (reader(tokens, places=len(drafts) + 1)[0].to(device) for reader in (large, before))
        kept, following = len(drafts), None
        if len(drafts):
            tuned_logits = torch.stack(seen)
            target = emulated(base_logits[:-1], tuned_logits, reference_logits[:-1])
            kept, following = accept(drafts, _probabilities(tuned_logits), target, do_sample, generator)
        stats.blocks += 1
        stats.drafted += len(drafts)
        stats.accepted += kept
        tokens = tokens[:, : length + kept]
        if following is None and not (kept and tokens[0, -1].item() in ends):
            target = emulated(base_logits[-1], drafting(tokens)[0, -1].to(device), reference_logits[-1])
            following = _draw(target, do_sample, generator)
        if following is not None:
            tokens = torch.cat([tokens, following.view(1, 1)], 1)
        stats.tokens = tokens.shape[1] - start
    return tokens, stats


def accept(
    drafts: Int64[Tensor, " block"],
    draft: Float[Tensor, "block vocab"],
    target: Float[Tensor, "block vocab"],
    do_sample: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[int, Int64[Tensor, ""] | None]:
    """How many of the drafts to keep, and the token that replaces the first that is not kept.

    Args:
        drafts: tokens drawn one after the other from `draft`, at least one.
        draft: the probabilities they were drawn from.
        target: the probabilities that tokens should have.
        do_sample: False keeps a draft while it is the most probable token of `target`.
        generator: draws.

    Returns:
        The number kept; the replacement, None where all were kept.

    Source:
        Leviathan et al., 2023, arXiv 2211.17192, algorithm 1.
    """
    place = torch.arange(len(drafts), device=drafts.device)
    if do_sample:
        chance = torch.rand(len(drafts), generator=generator, device=target.device)
        keep = chance * draft[place, drafts] < target[place, drafts]
    else:
        keep = drafts == target.argmax(-1)
    kept = int(keep.long().cumprod(0).sum())
    if kept == len(drafts):
        return kept, None
    if not do_sample:
        return kept, target[kept].argmax()
    missing = (target[kept] - draft[kept]).clamp(min=0)
    # Nothing is missing only where the two are equal but for rounding.
    return kept, _draw(missing if missing.sum() > 0 else target[kept], do_sample, generator)


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)


def _draw(weights: Tensor, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(weights, 1, generator=generator)[0] if do_sample else weights.argmax()


def _ends(base: Any, eos_token_id: int | Sequence[int] | None) -> set[int]:
    if eos_token_id is None:
        eos_token_id = getattr(getattr(base, "generation_config", None), "eos_token_id", None)
    return set() if eos_token_id is None else {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
