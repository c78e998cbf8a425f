"""Latent attention pooling: with one set of latents, without padding, and with the last map on the mean.

The peer is the same mathematics as released with NV-Embed: latents repeated for each text, every token through every map, padding
too. The floor is sentence-transformers' mean pooling, and the limit the matrix products that cannot be left out.
"""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from torch.utils.benchmark import Timer

from firsthand.embed.cross_attention import cross_attend
from firsthand.embed.nv_embed import LatentAttentionPooling

ROUNDS = 5
TEXTS, TOKENS, WIDTH, LATENTS, HEADS = 16, 128, 384, 512, 8


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    times: dict[str, list[float]] = {name: [] for name in racers}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def products(module: LatentAttentionPooling, tokens: int) -> Callable[[], object]:
    """The matrix products of the block for so many tokens, and nothing else."""
    x = torch.randn(tokens, WIDTH)
    q, k = torch.randn(HEADS, tokens, WIDTH // HEADS), torch.randn(HEADS, LATENTS, WIDTH // HEADS)
    few = torch.randn(TEXTS, 4 * WIDTH)

    def call() -> None:
        x @ module.to_q.weight.T
        module.latents @ module.to_kv.weight.T
        (q @ k.transpose(1, 2)) @ k
        x @ module.to_out.weight.T
        x @ module.ff_in.weight.T
        few @ module.ff_out.weight.T

    return call


@torch.no_grad()
def pooling() -> None:
    torch.manual_seed(0)
    module = LatentAttentionPooling(WIDTH, LATENTS, HEADS).eval()
    states = torch.randn(TEXTS, TOKENS, WIDTH)
    print(f"pooling {TEXTS} texts of up to {TOKENS} tokens, width {WIDTH}, {LATENTS} latents, {HEADS} heads, float32, forward")
    for name, lengths in {
        "all as long": torch.full((TEXTS,), TOKENS),
        "half as long on average": torch.linspace(4, TOKENS - 4, TEXTS).long(),
        "one long, others short": torch.tensor([TOKENS] + [TOKENS // 8] * (TEXTS - 1)),
    }.items():
        mask = (torch.arange(TOKENS) < lengths[:, None]).long()

        def ours(mask: Tensor = mask) -> Tensor:
            return module({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]

        def repeated(mask: Tensor = mask) -> Tensor:
            weights = mask[..., None].float()
            tokens = cross_attend(module, states, module.latents.repeat(TEXTS, 1, 1))
            return F.normalize((tokens * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)

        def mean(mask: Tensor = mask) -> Tensor:
            return Pooling(WIDTH, "mean")({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]

        torch.testing.assert_close(ours(), repeated(), atol=1e-5, rtol=1e-4)
        seconds = race({"ours": ours, "repeated": repeated, "mean": mean, "limit": products(module, int(mask.sum()))})
        ratios = {peer: seconds["ours"] / seconds[peer] for peer in ("repeated", "limit", "mean")}
        print(
            f"  {name}: ours {1e3 * seconds['ours']:.1f} ms; ours / repeated latents = {ratios['repeated']:.3f}, "
            f"ours / limit = {ratios['limit']:.2f}, ours / mean = {ratios['mean']:.0f}"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    pooling()
