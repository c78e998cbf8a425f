import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.moe.ffn import FFNWeights, ffn_slots

transformers = pytest.importorskip("transformers")

PHI = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def model_of(family):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if family == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_inner=24, bos_token_id=1, eos_token_id=2, resid_pdrop=0.5
            )
            model = transformers.GPT2LMHeadModel(config)
        elif family == "bert":
            model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, pad_token_id=0))
        else:
            extra = {"num_key_value_heads": 2} | ({"mlp_bias": True} if family == "llama with biases" else {})
            kind = "Qwen2" if family == "qwen2" else "Llama"
            config = getattr(transformers, f"{kind}Config")(**sizes, **extra, pad_token_id=0, bos_token_id=1, eos_token_id=2)
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
    return model.eval()


FAMILIES = ["llama", "llama with biases", "qwen2", "gpt2", "bert"]


class Dense(nn.Module):
    """What the weights say, computed by us."""

    def __init__(self, weights: FFNWeights):
        super().__init__()
        self.weights = weights

    def forward(self, x):
        w = self.weights
        up = F.linear(x, w.up, w.up_bias)
        a = PHI[w.act](up) if w.gate is None else PHI[w.act](F.linear(x, w.gate, w.gate_bias)) * up
        return F.linear(a, w.down, w.down_bias)


@pytest.fixture
def tokens():
    return torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_reading_replacing_and_restoring_lose_nothing(family, tokens):
    model = model_of(family)
    before, expected = copy.deepcopy(model.state_dict()), model(tokens).logits
    slots = ffn_slots(model)
    assert [slot.layer_index for slot in slots] == [0, 1, 2]
    for slot in slots:
        weights = slot.weights()
        slot.replace(Dense(weights))
    torch.testing.assert_close(model(tokens).logits, expected)
    assert all(isinstance(slot.module, Dense) for slot in ffn_slots(model))  # found again
    assert not model.state_dict().keys() & {
        name for name in before if "gate_proj" in name or "c_fc" in name or "intermediate" in name
    }
    for slot in ffn_slots(model):
        slot.restore(slot.module.weights)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(tokens).logits, expected)
    assert all(slot.module is None for slot in ffn_slots(model))


def test_the_hosts_dropout_stays(tokens):
    model = model_of("gpt2").train()
    slot = ffn_slots(model)[0]
    slot.replace(nn.Identity())
    out = model.transformer.h[0].mlp(torch.ones(4, 1000, 16))
    assert 0.45 < (out == 0).float().mean() < 0.55


def test_a_replacement_survives_a_copy(tokens):
    model = model_of("bert")
    slot = ffn_slots(model)[1]
    weights = slot.weights()
    slot.replace(Dense(weights))
    copied = copy.deepcopy(model)
    slot = ffn_slots(copied)[1]
    slot.restore(slot.module.weights)
    torch.testing.assert_close(copied(tokens).logits, model(tokens).logits)
    assert ffn_slots(model)[1].module is not None


def test_layers_may_be_chosen():
    model = model_of("llama")
    assert [slot.layer_index for slot in ffn_slots(model, [-1, 0])] == [0, 2]
    for layers in ([3], [-4], ["0"]):
        with pytest.raises((ValueError, TypeError), match="layers must be"):
            ffn_slots.__wrapped__(model, layers)


def test_bad_input():
    with pytest.raises(ValueError, match="Linear has no feed-forward block of a known form"):
        ffn_slots(nn.Linear(2, 2))
    slot = ffn_slots(model_of("llama"))[0]
    weights = slot.weights()
    with pytest.raises(ValueError, match="still has its dense block"):
        slot.restore(weights)
    module = Dense(weights)
    slot.replace(module)
    with pytest.raises(ValueError, match="holds Dense in place of its dense block"):
        slot.weights()
    with pytest.raises(ValueError, match=r"up must have shape \(24, 16\), got \(23, 16\)"):
        slot.restore(weights._replace(up=weights.up[:23]))
    assert slot.module is module  # a failed restore changes nothing
    slot.restore(weights)
    assert slot.module is None
