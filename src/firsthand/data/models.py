"""Small real models: the folder `from_pretrained` takes, or the weights."""

import contextlib
import io
from pathlib import Path
from typing import Any


def minilm(folder: Path) -> Path:
    """The folder of all-MiniLM-L6-v2, for `SentenceTransformer(str(folder))` or `AutoModel.from_pretrained(folder)`."""
    return folder / "model"


def smollm2(folder: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct, for `AutoModelForCausalLM.from_pretrained(folder)` and `AutoTokenizer`.

    The weights went through 4 bits (Q4_1) before they came to us: they are what llama.cpp users run, not the original.
    """
    return folder


def mobilenet_v2(folder: Path) -> dict[str, Any]:
    """The state dict of MobileNetV2 (width 1) trained on ImageNet-1k, with torchvision's names (`features.0.0.weight` ...)."""
    import torch

    weights: dict[str, Any] = torch.load(folder / "weights/mobilenet_v2-b0353104.pth", weights_only=True, map_location="cpu")
    return weights


def convert_smollm2(unpacked: Path, converted: Path) -> None:
    """Write the GGUF file as a folder for `from_pretrained`, in bfloat16: reading GGUF takes 15 s, reading that next to none.

    A model read from GGUF remembers that it was quantised and refuses to be saved, so its weights go into a plain one.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    file = next(unpacked.glob("*.gguf")).name
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
        tokenizer = AutoTokenizer.from_pretrained(unpacked, gguf_file=file)
        quantised = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=file, dtype=torch.float32)
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)
        model: Any = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(quantised.state_dict())
        model.tie_weights()
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        model.generation_config = GenerationConfig(bos_token_id=begin, eos_token_id=end, pad_token_id=end)  # type: ignore[no-untyped-call]
        model.to(torch.bfloat16).save_pretrained(converted)
        tokenizer.save_pretrained(converted)
    (converted / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner alone
