"""What the two norms that Peri-LN adds to a block cost: one training step of a converted Llama.

Peer: `HyperCLOVAXForCausalLM`, which has the same norms in its own forward. Limit: the Llama before conversion.
"""

import copy
import statistics

import torch
from torch.utils.benchmark import Timer
from transformers import HyperCLOVAXConfig, HyperCLOVAXForCausalLM, LlamaConfig, LlamaForCausalLM

from firsthand.pretrain.peri_ln import to_peri_ln

ROUNDS = 7


def step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad()


def race(hidden: int, tokens: torch.Tensor, device: str) -> dict[str, float]:
    sizes = {
        "vocab_size": 512,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 4,
        "num_attention_heads": hidden // 64,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    limit = LlamaForCausalLM(LlamaConfig(**sizes)).to(device)
    ours = to_peri_ln(copy.deepcopy(limit))
    peer = HyperCLOVAXForCausalLM(HyperCLOVAXConfig(**sizes, use_post_norm=True)).to(device)
    peer.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(tokens).logits, peer(tokens).logits, atol=1e-4, rtol=1e-4)

    timers = {
        name: Timer("step(model, tokens)", globals={"step": step, "model": model, "tokens": tokens})
        for name, model in {"ours": ours, "peer": peer, "limit": limit}.items()
    }
    times: dict[str, list[float]] = {name: [] for name in timers}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):  # alternating, so that a slow moment meets all three
        for name, timer in timers.items():
            times[name].append(timer.timeit(2).mean)
    return {
        name: statistics.median(ours / other for ours, other in zip(times["ours"], times[name], strict=True)) for name in times
    }


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    tokens = torch.randint(1, 512, (2, 128), generator=torch.Generator().manual_seed(0)).to(device)
    for hidden in (64, 512):
        ratios = race(hidden, tokens, device)
        print(f"hidden {hidden:4}  ours/peer {ratios['peer']:.2f}  ours/limit {ratios['limit']:.2f}  ({device})")


if __name__ == "__main__":
    main()
