"""OPERA: all candidates in one forward pass against one pass each, and both against plain beam search.

Time that a new token takes with a Llama of random weights and one prompt, 5 beams, no rollback. The peer is the loop one would
write first, and that the paper's code has: for each rank of candidate one pass over the beams, the attention of all of them
stacked to a matrix whose columns are multiplied anew for each token, and one more pass for the tokens that were chosen. The limit
is one pass a token of as many rows, which is beam search with beams × candidates beams. What OPERA costs a user who comes from
beam search is the ratio to plain beam search with 5 beams.

Then what going back costs: putting the cache back and running the last token, against running prompt and response again.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from firsthand.decode.opera import opera_search
from firsthand.decode.over_trust import over_trust_penalty

ROUNDS, BEAMS, NEW = 3, 5, 12


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=704,
        initializer_range=0.1, eos_token_id=None, pad_token_id=0, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()


def one_by_one(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, num_candidates: int = 5,
    past_key_values: Any = None, **model_kwargs: Any,
) -> Tensor:  # fmt: skip
    """The same search, without an end token and without rollback."""
    cache, (beams, prompt) = past_key_values, input_ids.shape
    sequences, scores = input_ids, torch.tensor([0.0] + [-torch.inf] * (beams - 1))
    rows = torch.zeros(beams, 0, 0)  # attention of the response, [beams, response, length]
    logits = model(sequences, past_key_values=cache).logits[:, -1]
    while sequences.shape[1] < generation_config.max_length:
        top = logits.log_softmax(-1).topk(num_candidates)
        penalties, grown = [], []
        for rank in range(num_candidates):
            output = model(top.indices[:, rank, None], past_key_values=cache, output_attentions=True)
            cache.crop(-1)
            row = output.attentions[-1][:, :, -1].amax(1)
            widened = torch.nn.functional.pad(rows, (0, row.shape[1] - rows.shape[2]))
            grown.append(torch.cat([widened, row[:, None]], 1))
            square = torch.nn.functional.pad(grown[-1], (0, 0, prompt, 0))
            penalties.append(over_trust_penalty(square, None, prompt)[0])
        log_probs = (top.values - torch.stack(penalties, 1)).log_softmax(-1) + scores[:, None]
        scores, chosen = log_probs.flatten().topk(beams)
        parents, ranks = chosen // num_candidates, chosen % num_candidates
        tokens = top.indices[parents, ranks, None]
        sequences = torch.cat([sequences[parents], tokens], 1)
        rows = torch.stack(grown)[ranks, parents]
        cache.reorder_cache(parents)
        stopping_criteria(sequences, None)
        logits = model(tokens, past_key_values=cache).logits[:, -1]
    return sequences[:1]


class Clock:
    """A stopping criterion that never stops: it sees when each token is done, so that the prompt's time can be left out."""

    def __init__(self) -> None:
        self.times: list[tuple[int, float]] = []

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        self.times.append((input_ids.shape[1], perf_counter()))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    def between_tokens(self) -> float:
        """Median milliseconds from one token to the next of the same response."""
        return 1e3 * median(after - before for (n, before), (m, after) in pairwise(self.times) if m == n + 1)


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(ROUNDS):
        for name, call in racers.items():
            times[name].append(Timer("call()", globals={"call": call}).timeit(1).median)
    return {name: 1e3 * median(seconds) for name, seconds in times.items()}


def decoding(model: Any, prompt: int, candidates: int) -> None:
    tokens = torch.randint(1, 4096, (1, prompt), generator=torch.Generator().manual_seed(1))
    generate = partial(model.generate, tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW)

    search = partial(generate, num_candidates=candidates, num_beams=BEAMS)
    racers = {
        "opera": partial(search, custom_generate=opera_search, rollback_threshold=None),
        "one by one": partial(search, custom_generate=one_by_one),
        "beam search": partial(generate, num_beams=BEAMS),
        "as many beams": partial(generate, num_beams=BEAMS * candidates),
    }
    assert torch.equal(racers["opera"](), racers["one by one"]())
    clocks = {name: Clock() for name in racers}
    for _ in range(ROUNDS):
        for name, call in racers.items():
            call(stopping_criteria=[clocks[name]])
    token = {name: clock.between_tokens() for name, clock in clocks.items()}
    print(
        f"  prompt {prompt:4d}, {candidates} candidates: {token['opera']:6.1f} ms a token; "
        f"opera / one by one = {token['opera'] / token['one by one']:.2f}, "
        f"opera / beam search of {BEAMS * candidates} beams = {token['opera'] / token['as many beams']:.2f}, "
        f"opera / beam search of {BEAMS} beams = {token['opera'] / token['beam search']:.2f}"
    )


@torch.no_grad()
def going_back(model: Any, prompt: int) -> None:
    tokens = torch.randint(1, 4096, (BEAMS, prompt + 40), generator=torch.Generator().manual_seed(1))
    full = DynamicCache(config=model.config)
    model(tokens, past_key_values=full)
    back = prompt + 25

    def crop() -> Tensor:
        cache = DynamicCache(config=model.config)
        for layer, old in enumerate(full.layers):  # not a copy: what follows makes new tensors
            cache.update(old.keys, old.values, layer)
        cache.reorder_cache(torch.arange(BEAMS))
        cache.crop(-(prompt + 40 - back) - 1)
        return model(tokens[:, back - 1 : back], past_key_values=cache).logits[:, -1]

    def again() -> Tensor:
        return model(tokens[:, :back], past_key_values=DynamicCache(config=model.config), logits_to_keep=1).logits[:, -1]

    torch.testing.assert_close(crop(), again(), atol=1e-2, rtol=1e-3)
    took = race({"crop": crop, "again": again})
    print(f"  prompt {prompt:4d}: crop / run again = {took['crop'] / took['again']:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = llama()
    print(f"{BEAMS} beams, {NEW} new tokens, float32, one thread")
    for prompt, candidates in ((64, 1), (64, 5), (256, 5)):
        decoding(model, prompt, candidates)
    print("going back 15 tokens")
    for prompt in (64, 256):
        going_back(model, prompt)
