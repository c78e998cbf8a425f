"""Emulated fine-tuning: the processor's caches against reading the prefix again, and speculative against plain decoding.

Time that a new token takes with Llamas of random weights, one prompt, greedy decoding. The peer is the processor that a user
writes in five lines, which runs the two small models over the whole prefix for each token; the limit is the large model alone.
For the speculative race the small model must agree with the large one more or less often, as trained models would: the large one
begins with the small one's layers, and what its other layers add is scaled by `NOISE`, so that a larger one has fewer drafts
accepted. The tuned model is the small one with a change of its head.
"""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor

from firsthand.decode.eft import EmulatedFineTuningLogitsProcessor
from firsthand.decode.speculative import emulated_speculative_generate

ROUNDS, NEW = 3, 16


def llama(layers: int, width: int = 384, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=width, num_hidden_layers=layers, num_attention_heads=6, intermediate_size=2 * width,
        initializer_range=0.1, eos_token_id=None, pad_token_id=None, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tune(model: LlamaForCausalLM, size: float = 0.02) -> LlamaForCausalLM:
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.lm_head.weight += size * torch.randn(tuned.lm_head.weight.shape, generator=torch.Generator().manual_seed(9))
    return tuned


class Naive(LogitsProcessor):
    def __init__(self, tuned: Any, reference: Any) -> None:
        self.tuned, self.reference = tuned, reference

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tuned, reference = (model(input_ids).logits[:, -1] for model in (self.tuned, self.reference))
        return (scores.log_softmax(-1) + tuned.log_softmax(-1) - reference.log_softmax(-1)).log_softmax(-1)


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds a new token, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(ROUNDS):
        for name, call in racers.items():
            times[name].append(Timer("call()", globals={"call": call}).timeit(1).median)
    return {name: 1e3 * median(seconds) / NEW for name, seconds in times.items()}


def plain(base: Any, prompt: Tensor, *processors: LogitsProcessor, **how: Any) -> Any:
    how = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": torch.ones_like(prompt)} | how
    return base.generate(prompt, logits_processor=list(processors), **how)


def caches() -> None:
    print("the processor with its caches, base of 8 layers, small models of 2")
    base, small = llama(8), llama(2, seed=1)
    tuned = tune(small)
    for length in (32, 256):
        prompt = torch.randint(2048, (1, length), generator=torch.Generator().manual_seed(1))

        def ours(prompt: Tensor = prompt, **how: Any) -> Any:
            return plain(base, prompt, EmulatedFineTuningLogitsProcessor(tuned, small), **how)

        def naive(prompt: Tensor = prompt, **how: Any) -> Any:
            return plain(base, prompt, Naive(tuned, small), **how)

        scores = {"output_scores": True, "return_dict_in_generate": True}
        mine, other = ours(**scores), naive(**scores)
        assert torch.equal(mine.sequences, other.sequences)
        torch.testing.assert_close(mine.scores, other.scores, atol=2e-3, rtol=1e-3)
        spent = race({"ours": ours, "naive": naive, "base": lambda prompt=prompt: plain(base, prompt)})
        print(
            f"  prompt of {length:3d}: ours {spent['ours']:.1f} ms a token, ours / naive = {spent['ours'] / spent['naive']:.3f}, "
            f"ours / base alone = {spent['ours'] / spent['base']:.2f}"
        )


NOISE = (0.0, 0.05, 0.2)


def speculative() -> None:
    print("speculative against the processor, base of 12 layers, small models of 2")
    small = llama(2)
    tuned, prompt = tune(small), torch.randint(2048, (1, 64), generator=torch.Generator().manual_seed(1))
    for noise in NOISE:
        base = llama(12)
        base.load_state_dict(small.state_dict(), strict=False)
        with torch.no_grad():
            for layer in base.model.layers[2:]:
                layer.self_attn.o_proj.weight *= noise
                layer.mlp.down_proj.weight *= noise

        def one_by_one(base: Any = base) -> Any:
            return plain(base, prompt, EmulatedFineTuningLogitsProcessor(tuned, small))

        expected = one_by_one()
        for block in (2, 5):

            def drafted(base: Any = base, block: int = block) -> Any:
                return emulated_speculative_generate(base, tuned, small, prompt, NEW, block, do_sample=False)

            tokens, stats = drafted()
            assert torch.equal(tokens, expected)
            spent = race({"speculative": drafted, "plain": one_by_one})
            print(
                f"  noise {noise:4.2f}, block {block}: {stats.accepted_per_block:.1f} drafts accepted a block, "
                f"speculative / plain = {spent['speculative'] / spent['plain']:.2f} (plain {spent['plain']:.1f} ms a token)"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    caches()
    speculative()
