"""Batched generation with a causal language model of transformers, the common beginning of the prompts computed once."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


class HFGenerator:
    """A causal language model of transformers as a function from prompts to completions.

    All prompts of a call are continued in batches. What they begin with in common, such as the one example that is shown before
    forty questions, goes through the model once; its key-value cache is then repeated for each batch. The completions are those
    of plain batching, up to rounding. ::

        answer = HFGenerator(model, tokenizer, max_new_tokens=64, stop_strings=["\\n\\n"])
        answer([example + question for question in questions])

    Args:
        model: a decoder-only model, used where it is. One with sliding windows or recurrent layers shares no prefix.
        tokenizer: its tokenizer. It adds its special tokens to each prompt; put chat templates into the prompts.
        max_new_tokens: longest completion, in tokens; at least 1.
        batch_size: how many prompts are continued at a time; at least 1.
        stop_strings: a completion ends before the first of these; they are cut off.
        share_prefix: False computes every prompt from its first token on.

    Raises:
        ValueError: a size is below 1, or the tokenizer has neither a padding nor an end token.

    Source:
        The setting is that of ARTE (arXiv 2406.19227, section 3.3): many questions after one example. Sharing the prefix is ours.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_new_tokens: int = 256,
        batch_size: int = 32,
        stop_strings: Sequence[str] = (),
        share_prefix: bool = True,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        if self.pad is None:
            raise ValueError("tokenizer must have a pad_token or an eos_token, got one with neither")
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.stop_strings, self.share_prefix = list(stop_strings), share_prefix

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], temperature: float = 0.0, seed: int = 0) -> list[str]:
        """One completion for each prompt, without the prompt.

        Args:
            prompts: the texts to continue; each at least one token.
            temperature: 0 takes the likeliest token, more samples from the distribution at that temperature.
            seed: of the sampling. The same call gives the same completions.

        Raises:
            ValueError: `temperature` is negative or not finite, or a prompt has no tokens.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if not prompts:
            return []
        rows = self.tokenizer(list(prompts))["input_ids"]
        if not all(rows):
            raise ValueError(f"prompts must have at least one token each, prompt {rows.index([])} has none")
        noise = _noise(temperature, seed)
        mode = self.model.training
        self.model.eval()
        try:
            shared = common_prefix(rows) if self.share_prefix and len(rows) > 1 else 0
            cache = self._read(rows[0][:shared]) if shared else None
            if cache is not None and not _keeps_everything(cache):
                shared, cache = 0, None  # the padding behind the prefix would count in a sliding window or a recurrent state
            order = sorted(range(len(rows)), key=lambda index: len(rows[index]))  # like lengths together: little padding
            completions = {}
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                completions |= zip(batch, self._continue([rows[index] for index in batch], shared, cache, noise), strict=True)
        finally:
            self.model.train(mode)
        return [self._cut(completions[index]) for index in range(len(rows))]

    def _read(self, prefix: list[int]) -> Any:
        """The cache after the prefix, one row."""
        ids = torch.tensor([prefix], device=self.model.device)
        return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def _continue(self, rows: list[list[int]], shared: int, cache: Any, noise: list[Any]) -> list[str]:
        ids, mask = pad_after_prefix(rows, shared, self.pad)
        if cache is not None:
            cache = copy.deepcopy(cache)  # generation appends to it
            cache.batch_repeat_interleave(len(rows))
        options = {"stop_strings": self.stop_strings, "tokenizer": self.tokenizer} if self.stop_strings else {}
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),  # positions are counted along it: padding takes none
            past_key_values=cache,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
            logits_processor=noise,
            **options,
        )
        return self.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)

    def _cut(self, completion: str) -> str:
        for stop in self.stop_strings:
            completion = completion.partition(stop)[0]
        return completion


def _keeps_everything(cache: Any) -> bool:
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in cache.layers)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with in common; one less if that is all of the shortest, so that each has one to go on from.

    Of the rows in alphabetic order, the first and the last have in common what all have.
    """
    pairs = zip(min(rows), max(rows), strict=False)
    common = next((place for place, (one, other) in enumerate(pairs) if one != other), min(map(len, rows)))
    return min(common, min(map(len, rows)) - 1)


def pad_after_prefix(
    rows: Sequence[Sequence[int]], shared: int, pad: int
) -> tuple[Int64[Tensor, "rows length"], Int64[Tensor, "rows length"]]:
    """Token ids and attention mask: the shared prefix, padding that no one attends to, the rest of each row up to the edge."""
    length = max(map(len, rows))
    ids, mask = torch.full((len(rows), length), pad), torch.zeros(len(rows), length, dtype=torch.int64)
    for index, row in enumerate(rows):
        rest = length - len(row) + shared
        ids[index, :shared], ids[index, rest:] = torch.tensor(row[:shared]), torch.tensor(row[shared:])
        mask[index, :shared] = mask[index, rest:] = 1
    return ids, mask


def _noise(temperature: float, seed: int) -> list[Any]:
    """Sampling is taking the largest logit after Gumbel noise: `generate` knows no generator, greedy decoding needs none."""
    from transformers import LogitsProcessorList

    generator = torch.Generator().manual_seed(seed)

    def add(ids: Int64[Tensor, "rows length"], logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        exponential = torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator)
        return logits.double() / temperature - exponential.log().to(logits.device)

    return LogitsProcessorList([add] if temperature else [])
