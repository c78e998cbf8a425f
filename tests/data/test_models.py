import json

import pytest
import torch

from firsthand.data import load
from firsthand.data.models import convert_smollm2


def test_minilm_folder_is_what_transformers_wants():
    folder = load("minilm")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("bert", 384, 6)
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert "embeddings.word_embeddings.weight" in weights.keys()  # noqa: SIM118


def test_minilm_puts_like_things_together():
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs firsthand[embed]")
    model = sentence_transformers.SentenceTransformer(str(load("minilm")), device="cpu", local_files_only=True)
    cat, kitten, tax = model.encode(["a cat", "a kitten", "the tax return"], normalize_embeddings=True)
    assert cat @ kitten > 0.5 > 0.2 > cat @ tax


def test_mobilenet_is_read_without_running_what_is_pickled(empty_cache):
    folder = empty_cache / "mobilenet-v2/weights"
    folder.mkdir(parents=True)
    weights = {"features.0.0.weight": torch.ones(2, 3)}
    torch.save(weights, folder / "mobilenet_v2-b0353104.pth")
    torch.testing.assert_close(load("mobilenet-v2"), weights)
    torch.save({"evil": print}, folder / "mobilenet_v2-b0353104.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        load("mobilenet-v2")


def test_smollm2_folder(empty_cache):
    folder = empty_cache / "smollm2"
    folder.mkdir(parents=True)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        (folder / file).touch()
    assert load("smollm2") == folder


def test_conversion_writes_a_plain_model_in_bfloat16(tmp_path, monkeypatch):
    """The GGUF reader is transformers' own: here it is stood in for by a tiny model that claims to be quantised."""
    transformers = pytest.importorskip("transformers", reason="needs firsthand[hf]")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(config)
    original.config.quantization_config = {"quant_method": "gguf"}

    class Tokenizer:
        bos_token_id, eos_token_id = 1, 2

        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    asked = []

    def read(result):
        return lambda folder, gguf_file, **options: asked.append((folder, gguf_file)) or result

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read(Tokenizer()))
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read(original))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/small.Q4_1.gguf").touch()
    (tmp_path / "out").mkdir()
    convert_smollm2(tmp_path / "in", tmp_path / "out")
    assert asked == [(tmp_path / "in", "small.Q4_1.gguf")] * 2

    read_back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert read_back.dtype == torch.bfloat16
    assert not hasattr(read_back.config, "quantization_config")
    assert read_back.generation_config.eos_token_id == 2
    ids = torch.arange(8)[None]
    expected = original.to(torch.bfloat16)(ids).logits
    torch.testing.assert_close(read_back(ids).logits, expected)
