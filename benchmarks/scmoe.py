"""Self-contrast decoding: one forward pass of twice the rows against two passes, and both against plain decoding.

Time that a new token takes in greedy decoding with a Mixtral of random weights and prompts of 64 tokens. The limit is plain
decoding, one pass with two experts a token. The peer that a user has without us is a second pass of the whole model, as
transformers makes it for classifier-free guidance (`guidance_scale`): two experts a token once more, where the weak pass has one.
"""

from collections.abc import Callable
from statistics import median

import torch
from torch.utils.benchmark import Timer
from transformers import MixtralConfig, MixtralForCausalLM

from firsthand.decode.scmoe import SelfContrastLogitsProcessor, self_contrast
from firsthand.moe.blocks import register_experts_backend

ROUNDS, NEW = 3, 8


def mixtral(backend: str) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1024,
        num_local_experts=8,
        initializer_range=0.1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config).eval()
    model.set_experts_implementation(backend)
    return model


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    for _ in range(ROUNDS):
        for name, call in racers.items():
            times[name].append(Timer("call()", globals={"call": call}).timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def decoding(model: MixtralForCausalLM, rows: int) -> None:
    prompts = torch.randint(1, 4096, (rows, 64), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    scores = {"return_dict_in_generate": True, "output_scores": True}

    def generate(**how):
        return model.generate(prompts, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **how)

    def one_pass(**how):
        with self_contrast(model):
            return generate(**how)

    def two_passes(**how):
        return generate(logits_processor=[SelfContrastLogitsProcessor(model)], **how)

    def guidance():
        return generate(guidance_scale=1.5, negative_prompt_ids=prompts, negative_prompt_attention_mask=mask)

    for mine, other in zip(one_pass(**scores).scores, two_passes(**scores).scores, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-3, rtol=1e-3)
    guidance()
    seconds = race({"plain": generate, "one pass": one_pass, "two passes": two_passes, "guidance": guidance})
    each = {name: 1e3 * value / NEW for name, value in seconds.items()}
    print(
        f"  {rows:2d} prompts: plain {each['plain']:.1f} ms a step; "
        f"one pass / plain = {each['one pass'] / each['plain']:.2f}, "
        f"two passes / plain = {each['two passes'] / each['plain']:.2f}, "
        f"one pass / two passes = {each['one pass'] / each['two passes']:.2f}, "
        f"one pass / whole second pass = {each['one pass'] / each['guidance']:.2f}"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    register_experts_backend()
    for backend in ("firsthand", "grouped_mm"):
        print(f"experts by {backend}, prompt and {NEW} new tokens, float32")
        for rows in (1, 8):
            decoding(mixtral(backend), rows)
