"""From a causal language model to an encoder: the causal mask goes, the padding mask stays."""

from typing import Any

import torch

MISSING = object()


def make_bidirectional(model: Any) -> Any:
    """Let every token of a decoder attend to every other, in place.

    Sets `is_causal=False` and `use_cache=False` on the model's configurations, which turns the mask that transformers builds
    into one of padding only, and `is_causal=False` on its attention modules, which attention kernels read where there is no mask.
    A sliding window stays a window, now to both sides. Then makes sure of it: the first state must depend on the last token.

    `save_pretrained` keeps the configuration, and transformers 5.23 goes by that, so a loaded model is bidirectional too.

    Args:
        model: a transformers decoder (Llama, Mistral, Qwen2, ...), with or without a head, on any device.

    Returns:
        The same model.

    Raises:
        ValueError: `model` is no transformers model with input embeddings, or ignores the settings and is still causal; then it
            is left as it was.

    Source:
        Lee et al., "NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models", 2024, arXiv 2405.17428: no
        causal mask in training or inference, and no extra training to get used to that. The probe is ours.
    """
    if not (hasattr(model, "config") and hasattr(model, "get_input_embeddings") and hasattr(model, "base_model")):
        raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
    configs = {id(part): part for module in model.modules() if (part := getattr(module, "config", None)) is not None}
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    settings = [(config, name) for config in configs.values() for name in ("is_causal", "use_cache")]
    settings += [(module, "is_causal") for module in attentions]
    before = [(owner, name, vars(owner).get(name, MISSING)) for owner, name in settings]
    for owner, name in settings:
        setattr(owner, name, False)
    if not _first_sees_last(model):
        for owner, name, value in before:
            delattr(owner, name) if value is MISSING else setattr(owner, name, value)
        raise ValueError(
            f"model must follow config.is_causal, as Llama, Mistral and Qwen2 do; the first token of this {type(model).__name__} "
            "still does not see the last"
        )
    return model


@torch.enable_grad()
def _first_sees_last(model: Any) -> bool:
    """Whether the gradient of the first state by the last input is not zero. Finite where a difference would be rounded away."""
    weight = model.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    inputs, direction = torch.randn(2, 1, 3, weight.shape[1], generator=draw).to(weight)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        states = model.base_model(inputs_embeds=inputs.requires_grad_(), use_cache=False).last_hidden_state
        (gradient,) = torch.autograd.grad((states[0, 0] * direction[0, 0]).sum(), inputs)
    finally:
        for module in training:
            module.training = True
    return bool(gradient[0, -1].abs().max() > 0)
