import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

from firsthand.moe.blocks import capture_routing, moe_blocks
from firsthand.moe.layer import MoE
from firsthand.moe.uoe import (
    SingleExpertUnlearner,
    expert_affinity,
    expert_affinity_from,
    npo_loss,
    rmu_loss,
    router_anchor_loss,
    select_experts,
    selection_overlap,
    sequence_log_probs,
)

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
QWEN = {"num_experts": 6, "moe_intermediate_size": 16, "intermediate_size": 48}


class OwnModel(nn.Module):
    """A model of one's own, of our layers: with biases and a shared expert."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.layers = nn.ModuleList(MoE(32, 16, 6, 2, bias=True, shared_hidden_dim=8) for _ in range(3))
        self.head = nn.Linear(32, 40)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return SimpleNamespace(logits=self.head(x))


HOSTS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6, intermediate_size=16)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=6, intermediate_size=16)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **QWEN, shared_expert_intermediate_size=24)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **QWEN, head_dim=8)),
    "own": OwnModel,
}


def build(host="mixtral"):
    torch.manual_seed(0)
    return HOSTS[host]().eval()


def batch(seed=0, padded=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, 5:] = 0
        ids[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def busy_target(model, layer=1):
    """An expert of that layer which the forget batch uses."""
    return layer, int(expert_affinity_from(model, [batch()])[layer].argmax())


def cross_entropy(model, inputs):
    logits = model(**inputs).logits
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


# Attribution


def test_affinities_of_a_layer_sum_to_one_and_texts_count_the_same_whatever_their_length():
    generator = torch.Generator().manual_seed(0)
    long, short = torch.randn(50, 2, 5, generator=generator), torch.randn(2, 2, 5, generator=generator)
    affinity = expert_affinity(iter([long, short]))
    torch.testing.assert_close(affinity.sum(1), torch.ones(2))
    torch.testing.assert_close(affinity, (long.softmax(-1).mean(0) + short.softmax(-1).mean(0)) / 2)
    assert not torch.allclose(affinity, torch.cat([long, short]).softmax(-1).mean(0), atol=1e-3)


def test_affinity_of_a_router_that_always_answers_the_same():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(7, 1, 4)
    torch.testing.assert_close(expert_affinity([logits]), torch.tensor([[0.5, 0.25, 0.125, 0.125]]))


def test_affinity_in_bfloat16_is_computed_in_float32():
    logits = torch.zeros(3, 1, 3, dtype=torch.bfloat16)
    affinity = expert_affinity([logits])
    assert affinity.dtype == torch.float32
    torch.testing.assert_close(affinity, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize("host", HOSTS)
def test_affinity_of_a_model_is_that_of_its_texts_one_by_one_without_padding(host):
    model = build(host).train()
    texts = batch(padded=True)
    expected = []
    for ids, mask in zip(texts["input_ids"], texts["attention_mask"], strict=True):
        with torch.no_grad(), capture_routing(model) as kept:
            model(input_ids=ids[None, mask.bool()])
        expected.append(torch.stack([routing.logits.softmax(-1).mean(0) for routing in kept]))
    affinity = expert_affinity_from(model, [texts, {"input_ids": texts["input_ids"][1:2]}])
    torch.testing.assert_close(affinity, torch.stack([*expected, expected[1]]).mean(0))
    assert model.training


def test_affinity_agrees_with_transformers_own_router_logits():
    model, texts = build(), batch()
    logits = model(**texts, output_router_logits=True).router_logits
    expected = torch.stack([each.softmax(-1).mean(0) for each in logits])
    torch.testing.assert_close(expert_affinity_from(model, [texts]), expected)


def test_affinity_without_texts_or_tokens():
    with pytest.raises(ValueError, match="at least one text"):
        expert_affinity([])
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        expert_affinity([torch.zeros(2, 1, 3), torch.zeros(0, 1, 3)])
    with pytest.raises(ValueError, match="at least one text"):
        expert_affinity_from(build(), [])
    with pytest.raises(ValueError, match="no tokens"):
        expert_affinity_from(build(), [batch() | {"attention_mask": torch.zeros(3, 9, dtype=torch.int64)}])
    with pytest.raises(ValueError, match="must have input_ids"):
        expert_affinity_from(build(), [{"tokens": torch.zeros(1, 2)}])


def test_affinity_of_models_without_equal_sparse_blocks():
    with pytest.raises(ValueError, match="no sparse block"):
        expert_affinity_from(nn.Linear(2, 2), [batch()])
    model = OwnModel()
    model.layers[1] = MoE(32, 16, 4, 2)
    with pytest.raises(ValueError, match=r"equally many experts, got \[4, 6\]"):
        expert_affinity_from(model, [batch()])


AFFINITY = torch.tensor([[0.1, 0.5, 0.4], [0.3, 0.0, 0.7], [0.45, 0.45, 0.1]])


@pytest.mark.parametrize(
    ("scope", "num", "expected"),
    [
        ("global", 1, [(1, 2)]),
        ("global", 3, [(1, 2), (0, 1), (2, 0)]),
        ("same_layer", 2, [(1, 2), (1, 0)]),
        ("per_layer", 3, [(1, 2), (0, 1), (2, 0)]),
    ],
)
def test_selected_experts(scope, num, expected):
    assert select_experts(AFFINITY, num, scope) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, r"num must be in \[1, 9\]"),
        ({"num": 4, "scope": "same_layer"}, r"num must be in \[1, 3\]"),
        ({"affinity": AFFINITY / 0}, "must be finite"),
    ],
)
def test_selecting_what_is_not_there(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_experts(**{"affinity": AFFINITY} | arguments)


def test_overlap():
    before = torch.tensor([[0, 1], [2, 3], [4, 5]])
    assert selection_overlap(before, before.flip(1)) == 1
    assert selection_overlap(before, torch.tensor([[1, 2], [2, 3], [0, 1]])).item() == pytest.approx(3 / 6)
    assert selection_overlap(before, before + 6) == 0
    with pytest.raises(ValueError, match="not be empty"):
        selection_overlap(before[:0], before[:0])


# Losses


def test_anchor_is_zero_exactly_where_the_target_has_all_the_probability():
    logits = torch.tensor([[0.0, 200.0, 0.0], [200.0, 0.0, 0.0], [1.0, 3.0, 0.0]])
    loss = router_anchor_loss(logits, 1, reduction="none")
    torch.testing.assert_close(loss[:2], torch.tensor([0.0, 2.0]))
    assert loss[2] > 0


@pytest.mark.parametrize("experts", [1, 4, 60])
def test_anchor_of_a_router_that_has_no_preference(experts):
    expected = (1 - 1 / experts) ** 2 + (experts - 1) / experts**2
    assert router_anchor_loss(torch.zeros(5, experts), 0).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_of_the_anchor(dtype):
    """dL/dz = 2 p ⊙ (d - <p, d>) with d = p - onehot."""
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    router_anchor_loss(logits, 3, reduction="sum").backward()
    p = logits.detach().float().softmax(-1)
    d = p - F.one_hot(torch.tensor(3), 5)
    torch.testing.assert_close(logits.grad, (2 * p * (d - (p * d).sum(-1, keepdim=True))).to(dtype))


def test_anchor_counts_only_the_tokens_of_the_mask():
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, False, True, True, False, False])
    assert router_anchor_loss(logits, 2, mask) == pytest.approx(router_anchor_loss(logits[mask], 2).item())
    assert router_anchor_loss(logits, 2, mask, "sum") == pytest.approx(
        router_anchor_loss(logits[mask], 2, reduction="sum").item()
    )
    assert (router_anchor_loss(logits, 2, mask, "none")[~mask] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_expert": 4}, r"target_expert must be in \[0, 4\)"),
        ({"target_expert": -1}, r"target_expert must be in \[0, 4\)"),
        ({"target_expert": 0, "reduction": "max"}, "reduction must be"),
        ({"target_expert": 0, "token_mask": torch.zeros(3, dtype=torch.bool)}, "a token that counts"),
    ],
)
def test_bad_anchors(arguments, message):
    with pytest.raises(ValueError, match=message):
        router_anchor_loss(torch.zeros(3, 4), **arguments)


def test_log_probabilities_of_texts():
    """Of independent tokens with known probabilities; neither the first token nor one that does not count has a part."""
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(2, 4, 3)
    labels = torch.tensor([[2, 0, 0, 1], [0, -100, 1, -100]])
    torch.testing.assert_close(sequence_log_probs(logits, labels).exp(), torch.tensor([0.7 * 0.7 * 0.2, 0.2]))


def test_npo_where_nothing_is_unlearnt_yet_and_where_all_is():
    reference = torch.tensor([-5.0, -9.0])
    assert npo_loss(reference, reference, beta=0.5).item() == pytest.approx(4 * math.log(2))
    assert npo_loss(reference - 1000, reference, beta=0.5).item() == pytest.approx(0, abs=1e-6)


def test_npo_is_gradient_ascent_for_small_beta_and_lets_go_of_what_is_unlikely():
    reference = torch.tensor([-5.0, -9.0])
    for beta in (1e-6, 0.5):
        log_probs = (reference - torch.tensor([0.0, 20.0])).requires_grad_()
        npo_loss(log_probs, reference, beta).backward()
        weight = 2 * torch.sigmoid(beta * (log_probs.detach() - reference))  # 1 at the reference, then down to 0
        torch.testing.assert_close(log_probs.grad, weight / 2)
    assert log_probs.grad[1] < 1e-4


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
def test_npo_with_a_bad_beta(beta):
    with pytest.raises(ValueError, match="beta must be positive"):
        npo_loss(torch.zeros(2), torch.zeros(2), beta)


def test_rmu_is_zero_where_it_wants_to_be_and_quadratic_around():
    u = F.normalize(torch.ones(4), dim=0)
    there = (8.0 * u).expand(3, 4)
    kept = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    assert rmu_loss(there, u, 8.0, kept, kept).item() == pytest.approx(0, abs=1e-10)
    assert rmu_loss(there + 0.5, u, 8.0).item() == pytest.approx(4 * 0.25)
    assert rmu_loss(there, u, 8.0, kept + 0.5, kept, retain_weight=3.0).item() == pytest.approx(3 * 4 * 0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_hidden": torch.zeros(0, 4)}, "at least one token"),
        ({"direction": torch.ones(4)}, "length 1"),
        ({"retain_hidden": torch.zeros(1, 4)}, "go together"),
        ({"retain_weight": -1.0}, "retain_weight must be"),
    ],
)
def test_bad_rmu(changes, message):
    with pytest.raises(ValueError, match=message):
        rmu_loss(**{"forget_hidden": torch.zeros(2, 4), "direction": torch.eye(4)[0]} | changes)


# Training one expert


@pytest.mark.parametrize("host", HOSTS)
def test_it_computes_the_gradients_of_the_whole_model_for_what_it_trains_and_no_other(host):
    """Against autograd through the untouched model, for objective and anchor together."""
    model, inputs = build(host), batch(padded=True)
    layer, expert = busy_target(model)
    whole = copy.deepcopy(model)
    with capture_routing(whole) as kept:
        loss = -cross_entropy(whole, inputs)
        loss = loss + 0.5 * router_anchor_loss(kept[layer].logits, expert, inputs["attention_mask"].flatten().bool())
    loss.backward()

    unlearner = SingleExpertUnlearner(model, [(layer, expert)], anchor_weight=0.5)
    out = unlearner(inputs)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], loss)
    reference = moe_blocks(whole)[layer]
    for name, parameter in unlearner.slices[0].weights.items():
        torch.testing.assert_close(parameter.grad[0], getattr(reference.experts, name).grad[expert], atol=1e-5, rtol=1e-4)
        assert parameter.grad.any()
    mine = dict(moe_blocks(model)[layer].router.named_parameters())
    for name, parameter in reference.router.named_parameters():
        torch.testing.assert_close(mine[name].grad, parameter.grad, atol=1e-5, rtol=1e-4)
    assert sum(p.grad is not None for p in unlearner.parameters()) == len(unlearner.trainable_parameters())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("targets", [[(1, 0)], [(0, 3), (2, 5), (2, 1)]])
def test_only_the_targets_change_and_the_merged_model_is_the_trained_one(host, targets):
    model, inputs = build(host), batch()
    before = copy.deepcopy(model)
    logits = model(**inputs).logits.detach()
    unlearner = SingleExpertUnlearner(model, targets)
    torch.testing.assert_close(model(**inputs).logits, logits)
    assert model.state_dict().keys() == before.state_dict().keys()

    optimizer = torch.optim.AdamW(unlearner.trainable_parameters(), lr=0.02, weight_decay=0.5)
    for _ in range(3):
        unlearner(inputs)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model(**inputs).logits.detach()
    assert (trained - logits).abs().max() > 0.05
    with unlearner.original():
        torch.testing.assert_close(model(**inputs).logits, logits)
    assert unlearner.merge() is model
    torch.testing.assert_close(model(**inputs).logits, trained)

    layers = {moe_blocks(model)[layer].name: [e for at, e in targets if at == layer] for layer, _ in targets}
    for (name, now), was in zip(model.named_parameters(), before.parameters(), strict=True):
        assert now.requires_grad
        block = next((block for block in layers if name.startswith(block + ".")), None)
        if block is None or "shared" in name:
            assert torch.equal(now, was), name
        elif "gate.weight" not in name and "router" not in name:  # the experts, stacked
            moved = {e for e in range(6) if not torch.equal(now[e], was[e])}
            assert moved == set(layers[block]), name
        else:
            assert not torch.equal(now, was), name
    assert all("forward" not in vars(module) for module in model.modules())


def test_flags_are_as_before_after_the_merge():
    model = build()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    unlearner = SingleExpertUnlearner(model, [(1, 2)])
    assert sum(p.requires_grad for p in model.parameters()) == 1  # its router
    unlearner.merge()
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(RuntimeError, match="merged"):
        unlearner(batch())


def test_the_graph_begins_at_the_layer_of_the_target():
    model = build()
    unlearner = SingleExpertUnlearner(model, [(1, 2)])
    hidden = model(**batch(), output_hidden_states=True).hidden_states
    assert [state.requires_grad for state in hidden] == [False, False, True, True]
    assert unlearner(batch())["loss"].requires_grad


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm"])
def test_any_experts_backend_of_the_host(backend):
    model = build()
    expected = model(**batch()).logits
    model.set_experts_implementation(backend)
    SingleExpertUnlearner(model, [(1, 2)])
    torch.testing.assert_close(model(**batch()).logits, expected)


def test_gdiff_is_ga_and_the_retained_cross_entropy():
    model, forget, retain = build(), batch(0), batch(1, padded=True)
    expected = -cross_entropy(model, forget) + 0.3 * cross_entropy(model, retain)
    for objective in ("ga", "gdiff", lambda logits, labels: -F.cross_entropy(logits[:, :-1].mT, labels[:, 1:])):
        unlearner = SingleExpertUnlearner(copy.deepcopy(model), [(1, 2)], objective, anchor_weight=0.0, retain_weight=0.3)
        torch.testing.assert_close(unlearner(forget, retain)["loss"], expected)


def test_labels_say_which_tokens_are_unlearnt():
    model, inputs = build(), batch()
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, 4] = inputs["input_ids"][:, 4]
    loss = SingleExpertUnlearner(model, [(1, 2)], anchor_weight=0.0)(inputs | {"labels": labels})["loss"]
    torch.testing.assert_close(loss, -F.cross_entropy(model(**inputs).logits[:, 3], labels[:, 4]))


def steps(unlearner, optimizer, seeds):
    losses = []
    for seed in seeds:
        loss = unlearner(batch(seed), batch(100 + seed))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def make(model, objective):
    unlearner = SingleExpertUnlearner(
        model, [(1, 2)], objective, steer=5.0, beta=0.05, generator=torch.Generator().manual_seed(0)
    )
    return unlearner, torch.optim.AdamW(unlearner.trainable_parameters(), lr=0.01)


@pytest.mark.parametrize("objective", ["npo", "rmu"])
def test_the_reference_is_the_model_before_unlearning(objective):
    """Against a second model that is a copy of the first."""
    model, forget, retain = build(), batch(0), batch(1)
    second = copy.deepcopy(model)
    unlearner, optimizer = make(model, objective)
    steps(unlearner, optimizer, range(3))
    out = unlearner(forget, retain)
    out["loss"].backward()
    mine = [p.grad.clone() for p in unlearner.trainable_parameters()]
    optimizer.zero_grad()

    if objective == "npo":
        ids = forget["input_ids"]
        with torch.no_grad():
            reference = sequence_log_probs(second(**forget).logits, ids)
        with capture_routing(model) as kept:
            loss = npo_loss(sequence_log_probs(model(**forget).logits, ids), reference, 0.05)
        loss = loss + cross_entropy(model, retain)
    else:
        with torch.no_grad():
            reference = second(**retain, output_hidden_states=True).hidden_states[2].flatten(0, 1)
        with capture_routing(model) as kept:
            states = model(**forget, output_hidden_states=True).hidden_states[2].flatten(0, 1)
            logits = kept[1].logits
            now = model(**retain, output_hidden_states=True).hidden_states[2].flatten(0, 1)
        loss = rmu_loss(states, unlearner.direction, 5.0, now, reference, 1.0)
        kept = {1: SimpleNamespace(logits=logits)}
    loss = loss + router_anchor_loss(kept[1].logits, 2)
    loss.backward()
    torch.testing.assert_close(out["loss"], loss)
    for gradient, parameter in zip(mine, unlearner.trainable_parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("objective", ["ga", "gdiff", "npo", "rmu"])
def test_stopping_and_resuming_is_the_same_run(objective):
    straight, optimizer = make(build(), objective)
    expected = steps(straight, optimizer, range(4))

    first, optimizer = make(build(), objective)
    losses = steps(first, optimizer, range(2))
    second, resumed = make(build(), objective)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert losses + steps(second, resumed, range(2, 4)) == expected


def test_a_copy_trains_apart_from_the_first():
    unlearner, _ = make(build(), "gdiff")
    twin = copy.deepcopy(unlearner)
    before = unlearner.model(**batch()).logits
    steps(twin, torch.optim.AdamW(twin.trainable_parameters(), lr=0.01), range(2))
    assert torch.equal(unlearner.model(**batch()).logits, before)
    assert not torch.allclose(twin.model(**batch()).logits, before, atol=1e-3)


def test_the_anchor_alone_brings_the_router_to_the_target():
    model = build()
    unlearner = SingleExpertUnlearner(model, [(1, 2)], lambda logits, labels: logits.sum() * 0)
    optimizer = torch.optim.Adam(unlearner.trainable_parameters(), lr=0.1)
    for _ in range(50):
        out = unlearner(batch())
        out["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert out["anchor"] < 0.01
    with capture_routing(model) as kept:
        model(**batch())
    assert (kept[1].index == 2).any(1).all()


def test_ascent_makes_the_forgotten_text_unlikely():
    model = build()
    before = cross_entropy(model, batch()).item()
    unlearner = SingleExpertUnlearner(model, select_experts(expert_affinity_from(model, [batch()])))
    optimizer = torch.optim.Adam(unlearner.trainable_parameters(), lr=0.02)
    steps_taken = [unlearner(batch())["loss"].backward() or optimizer.step() or optimizer.zero_grad() for _ in range(20)]
    assert len(steps_taken) == 20
    assert cross_entropy(model, batch()).item() > before + 0.5


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("host", ["mixtral", "own"])
def test_bfloat16(host, device):
    model = build(host).to(device, torch.bfloat16)
    inputs = {name: value.to(device) for name, value in batch().items()}
    expected = model(**inputs).logits
    unlearner = SingleExpertUnlearner(model, [(1, 2)], "npo", beta=0.1)
    torch.testing.assert_close(model(**inputs).logits, expected, atol=0.1, rtol=0.05)
    unlearner(inputs, inputs)["loss"].backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.bfloat16 for p in unlearner.trainable_parameters())


def test_transformers_trainer_trains_it(tmp_path):
    unlearner = SingleExpertUnlearner(build(), [(1, 2)], "gdiff")
    before = [p.detach().clone() for p in unlearner.trainable_parameters()]
    ids = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"forget": {"input_ids": row}, "retain": {"input_ids": row.flip(0)}} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, report_to="none", save_strategy="no",
        use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(unlearner, arguments, train_dataset=rows, data_collator=torch.utils.data.default_collate)
    trainer.train()
    assert all(not torch.equal(p, was) for p, was in zip(unlearner.trainable_parameters(), before, strict=True))


class OtherMoE(MoE):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": []}, "at least one"),
        ({"targets": [(3, 0)]}, r"layer must be in \[0, 3\), the number of sparse blocks, got 3"),
        ({"targets": [(0, 6)]}, r"expert must be in \[0, 6\), got 6 for layer 0"),
        ({"targets": [(0, -1)]}, r"expert must be in \[0, 6\)"),
        ({"targets": [(0, 1), (0, 1)]}, "different from each other"),
        ({"objective": "dpo"}, "objective must be one of ga, gdiff, npo, rmu or a function, got 'dpo'"),
        ({"anchor_weight": -1.0}, "anchor_weight must be at least 0"),
        ({"retain_weight": math.nan}, "retain_weight must be at least 0"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"steer": math.inf}, "steer must be positive"),
        ({"objective": "rmu", "steer_at": "model.layer.9"}, "steer_at must name a module"),
        ({"model": nn.Linear(2, 2)}, "no sparse block"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments, message):
    arguments = {"model": build(), "targets": [(0, 0)]} | arguments
    with pytest.raises(ValueError, match=message):
        SingleExpertUnlearner(**arguments)
    assert all(p.requires_grad for p in arguments["model"].parameters())


def test_a_layer_cannot_be_trained_twice_nor_one_that_has_a_forward_of_its_own():
    model = build()
    first = SingleExpertUnlearner(model, [(1, 2)])
    with pytest.raises(ValueError, match="trained by another"):
        SingleExpertUnlearner(model, [(1, 3)])
    first.merge()
    SingleExpertUnlearner(model, [(1, 3)])
    own = OwnModel()
    own.layers[1] = OtherMoE(32, 16, 6, 2)
    with pytest.raises(ValueError, match="OtherMoE, which runs its experts in its own way"):
        SingleExpertUnlearner(own, [(1, 3)])


@pytest.mark.parametrize(
    ("objective", "forget", "retain", "message"),
    [
        ("gdiff", batch(), None, "retain must be given for the objective 'gdiff'"),
        ("rmu", batch(), None, "retain must be given"),
        ("ga", {"attention_mask": batch()["attention_mask"]}, None, "must have input_ids"),
        ("ga", batch() | {"attention_mask": torch.zeros(3, 9)}, None, "tokens to predict"),
        ("ga", {"input_ids": torch.full((2, 1), 3)}, None, "tokens to predict"),
        ("gdiff", batch(), batch() | {"labels": torch.full((3, 9), -100)}, "tokens to predict"),
    ],
)
def test_bad_batches(objective, forget, retain, message):
    unlearner = SingleExpertUnlearner(build(), [(1, 2)], objective)
    with pytest.raises(ValueError, match=message):
        unlearner(forget, retain)


def test_steering_below_the_trained_expert():
    unlearner = SingleExpertUnlearner(build(), [(1, 2)], "rmu", steer_at="model.layers.0")
    with pytest.raises(ValueError, match="that the trained experts reach"):
        unlearner(batch(), batch(1))
