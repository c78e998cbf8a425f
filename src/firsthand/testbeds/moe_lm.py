"""A tiny sparse language model, to be trained by `lm.train`.

Needs transformers (`pip install 'firsthand[hf]'`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from firsthand.testbeds import text

if TYPE_CHECKING:
    from transformers import MixtralForCausalLM


def mixtral(
    generator: torch.Generator,
    vocab: int,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate: int = 64,
    experts: int = 8,
    top_k: int = 2,
    context: int = 128,
    **config: Any,
) -> MixtralForCausalLM:
    """A Mixtral with its initial weights drawn from `generator`; `config` goes to `MixtralConfig` as it is.

    Args:
        generator: draws the initial weights.
        vocab: number of tokens.
        hidden: size of a token's vector.
        layers: number of blocks.
        heads: of attention; as many for keys and values, unless `num_key_value_heads` is given.
        intermediate: hidden size of an expert.
        experts: experts in each block.
        top_k: of them, how many a token goes to.
        context: longest sequence.
        config: anything else.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = MixtralConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=context,
        pad_token_id=text.PAD,
        bos_token_id=text.END,
        eos_token_id=text.END,
        **({"num_key_value_heads": heads, "router_aux_loss_coef": 0.0} | config),
    )
    seed = torch.randint(2**62, (), generator=generator).item()
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global generator
        torch.manual_seed(int(seed))
        return MixtralForCausalLM(sizes)


def loss_with(balance: Callable[[tuple[Tensor, ...]], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A loss for `lm.train`: that of the next token, in nats, and `balance` of the router logits of each layer.

    The logits are taken from the model below the head, so that transformers does not work out a balance loss of its own.
    """

    def loss(model: Any, batch: Tensor) -> Tensor:
        out = model.model(input_ids=batch, use_cache=False, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()) + balance(out.router_logits)

    return loss
