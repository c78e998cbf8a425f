"""transformers' sparse models on our experts: the same numbers, the same state dict, the same ways to use them."""

import copy
import inspect

import pytest
import torch
from torch import nn

from firsthand.moe.blocks import (
    capture_routing,
    expert_state_dict,
    experts_forward,
    moe_blocks,
    register_experts_backend,
    set_expert,
)
from firsthand.moe.layer import MoE

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "Mixtral": {"intermediate_size": 48, "num_local_experts": 6},
    "Olmoe": {"intermediate_size": 48, "num_experts": 6},
    "Qwen2Moe": {
        "intermediate_size": 40,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 24,
        "num_experts": 6,
        "decoder_sparse_step": 1,
    },
    "Qwen3Moe": {"intermediate_size": 40, "moe_intermediate_size": 48, "num_experts": 6, "decoder_sparse_step": 1, "head_dim": 8},
}


def sparse_model(family: str):
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        with torch.no_grad():  # initial weights of 0.02 would leave the experts almost silent
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5)
    return model


@pytest.fixture
def tokens():
    return torch.randint(3, 97, (3, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_eager(family, tokens):
    register_experts_backend()
    model = sparse_model(family)
    results = {}
    for backend in ("eager", "firsthand"):
        model.set_experts_implementation(backend)
        model.zero_grad()
        out = model(tokens, labels=tokens)
        out.loss.backward()
        results[backend] = {"logits": out.logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, expected in results["eager"].items():
        assert (results["firsthand"][name] - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item()), name


@pytest.mark.parametrize(
    "block", ["MixtralSparseMoeBlock", "OlmoeSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock"]
)
def test_one_block_alone(block):
    register_experts_backend()
    family = block.removesuffix("SparseMoeBlock")
    family = {"Olmoe": "Olmoe"}.get(family, family)
    host = next(b for b in moe_blocks(sparse_model(family)) if type(b.block).__name__ == block)
    x = torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
    found = {}
    for backend in ("eager", "firsthand"):
        host.experts.config._experts_implementation = backend
        y = host.block(x)
        y = y[0] if isinstance(y, tuple) else y
        found[backend] = [y, *torch.autograd.grad(y.square().sum(), [x, *host.block.parameters()])]
    for ours, expected in zip(found["firsthand"], found["eager"], strict=True):
        assert (ours - expected).abs().max() <= 1e-5 * max(1, expected.abs().max().item())


def test_state_dict_and_generation_are_untouched(tokens):
    register_experts_backend()
    model = sparse_model("Mixtral").eval()
    before = copy.deepcopy(model.state_dict())
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("firsthand")
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_saved_and_loaded_by_plain_transformers(tmp_path, tokens):
    register_experts_backend()
    model = sparse_model("Olmoe").eval()
    model.set_experts_implementation("firsthand")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer(tmp_path, tokens):
    register_experts_backend()
    losses = {}
    for backend in ("eager", "firsthand"):
        model = sparse_model("Mixtral")
        model.set_experts_implementation(backend)
        rows = [{"input_ids": row, "labels": row} for row in tokens.repeat(4, 1)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=3, max_steps=4, logging_steps=1, report_to=[], use_cpu=True, seed=0,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses[backend] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses["eager"]) == 4
    assert losses["firsthand"] == pytest.approx(losses["eager"], abs=1e-3)


def test_an_index_of_num_experts_is_no_expert():
    """Where experts are spread over processes, transformers marks those of other processes like this."""
    experts = moe_blocks(sparse_model("Mixtral"))[0].experts
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    index = torch.tensor([[0, 6], [6, 6], [5, 1], [6, 2]])
    weights = torch.rand(4, 2, generator=torch.Generator().manual_seed(3))
    experts.config._experts_implementation = "eager"
    torch.testing.assert_close(experts_forward(experts, x, index, weights), experts(x, index, weights))


def test_other_layouts_are_refused():
    experts = moe_blocks(sparse_model("Mixtral"))[0].experts
    experts.is_transposed = True
    with pytest.raises(ValueError, match="MixtralExperts lays out its experts in a way that is not supported"):
        experts_forward(experts, torch.zeros(1, 32), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_names_of_transformers_are_not_taken(name):
    with pytest.raises(ValueError, match="name must not be one of transformers' own"):
        register_experts_backend(name)


def test_registering_twice_is_harmless():
    register_experts_backend("again")
    register_experts_backend("again")


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_what_their_routers_decide(family, tokens):
    model = sparse_model(family)
    blocks = moe_blocks(model)
    assert [(block.layer_index, block.num_experts, block.top_k) for block in blocks] == [(0, 6, 2), (1, 6, 2)]
    with capture_routing(model) as routing:
        model(tokens)
        out = model(tokens, output_router_logits=True)
    assert len(routing) == 2
    for kept, expected in zip(routing, out.router_logits, strict=True):
        torch.testing.assert_close(kept.logits, expected)
        assert kept.index.shape == kept.weights.shape == (60, 2)
    model(tokens)
    assert len(routing) == 2  # no longer listening


def test_blocks_of_our_own():
    model = nn.Sequential(MoE(8, 16, 4, 2, shared_hidden_dim=8), nn.ReLU(), MoE(8, 16, 3, 1))
    blocks = moe_blocks(model)
    assert [(block.name, block.num_experts, block.top_k) for block in blocks] == [("0", 4, 2), ("2", 3, 1)]
    with capture_routing(model) as routing:
        model(torch.randn(5, 8)).sum().backward()
    assert [kept.logits.shape[1] for kept in routing] == [4, 3]


def test_a_dense_model_has_no_blocks():
    with pytest.raises(ValueError, match="Linear has no sparse block of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE"):
        moe_blocks(nn.Linear(2, 2))


def test_experts_are_read_and_written():
    first, second = moe_blocks(sparse_model("Mixtral"))
    state = expert_state_dict(first, 3)
    assert {name: tuple(value.shape) for name, value in state.items()} == {"gate_up_proj": (96, 32), "down_proj": (32, 48)}
    others = second.experts.down_proj[[0, 2, 3, 4, 5]].clone()
    set_expert(second, 1, state)
    assert torch.equal(second.experts.gate_up_proj[1], first.experts.gate_up_proj[3])
    assert torch.equal(second.experts.down_proj[1], first.experts.down_proj[3])
    assert torch.equal(second.experts.down_proj[[0, 2, 3, 4, 5]], others)
    with pytest.raises(ValueError, match=r"expert must be in \[0, 6\), got 6"):
        expert_state_dict(first, 6)
    with pytest.raises(ValueError, match=r"state must have \['down_proj', 'gate_up_proj'\]"):
        set_expert(first, 0, {"down_proj": state["down_proj"]})
    with pytest.raises(ValueError, match="down_proj must have shape"):
        inspect.unwrap(set_expert)(first, 0, state | {"down_proj": state["gate_up_proj"]})
