import math
import os
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from firsthand.moe.balance import BalanceCallback, GlobalBatchBalance, load_balancing_loss, router_z_loss, selection_counts

# The names without these warnings came late in transformers 5; the old ones work in every 5.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable|_kwargs)?` is deprecated:FutureWarning")

EXPERTS, TOP_K, LAYERS = 6, 2, 3


def random_logits(*tokens, seed=0, layers=LAYERS, dtype=torch.float64):
    """For each number of tokens, the logits of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(n, EXPERTS, generator=generator, dtype=dtype).mul_(2).requires_grad_() for _ in range(layers)]
        for n in tokens
    ]


def one_hot(experts, index, size=50.0):
    return F.one_hot(torch.as_tensor(index), experts) * size


def whole_batch(micro_batches, token_masks=None):
    """The loss of the concatenated batch, and its gradient with respect to every logit."""
    layers = [torch.cat(layer) for layer in zip(*micro_batches, strict=True)]
    mask = None if token_masks is None else torch.cat(token_masks)
    loss = torch.stack([load_balancing_loss(layer, TOP_K, token_mask=mask) for layer in layers]).mean()
    return loss, torch.autograd.grad(loss, [each for batch in micro_batches for each in batch])


def gradients(loss, micro_batches):
    return torch.autograd.grad(loss, [each for batch in micro_batches for each in batch])


# --- the loss of one layer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 6])
def test_a_layer_costs_what_transformers_says_divided_by_k(k, masked):
    ((logits,),) = random_logits(40, layers=1)
    mask = torch.arange(40) < 29 if masked else None
    theirs = load_balancing_loss_func((logits,), EXPERTS, k, None if mask is None else mask.view(4, 10).long())
    (expected,) = torch.autograd.grad(theirs, logits)
    loss = load_balancing_loss(logits, k, token_mask=mask)
    torch.testing.assert_close(loss * k, theirs.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(load_balancing_loss(logits, k, token_mask=mask, normalize="tokens"), loss * k)
    (gradient,) = torch.autograd.grad(loss * k, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)  # theirs is float32


def test_layers_are_not_pooled():
    """Four layers, each with all its tokens on one expert, and each on another: transformers sees perfect balance."""
    layers = [one_hot(4, [expert] * 8) for expert in range(4)]
    assert load_balancing_loss_func(tuple(layers), 4, 1).item() == pytest.approx(1)
    assert GlobalBatchBalance(1, weight=1.0, scope="micro")(layers).item() == pytest.approx(4)


def test_uniform_router_costs_one_and_collapse_costs_all():
    assert load_balancing_loss(torch.zeros(7, 5), 2).item() == pytest.approx(1)
    assert load_balancing_loss(one_hot(5, [3] * 7), 1).item() == pytest.approx(5)
    assert load_balancing_loss(one_hot(5, [0, 1, 2, 3, 4]), 1).item() == pytest.approx(1)


def test_only_probabilities_have_a_gradient():
    """With f fixed, dL/dP_e = E f_e: the gradient of the logits is that of the linear function of softmax."""
    ((logits,),) = random_logits(9, layers=1)
    counts = torch.tensor([0, 5, 1, 7, 3, 2])
    loss = load_balancing_loss(logits, TOP_K, counts=counts)
    p = logits.detach().softmax(-1)
    slope = EXPERTS * counts / counts.sum() / 9
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], p * (slope - (p * slope).sum(-1, keepdim=True)))
    own = selection_counts(logits, TOP_K)
    torch.testing.assert_close(load_balancing_loss(logits, TOP_K, counts=own), load_balancing_loss(logits, TOP_K))


def test_gradient_step_balances():
    (((logits,),), rate) = random_logits(64, layers=1), 20.0
    before = load_balancing_loss(logits, TOP_K)
    with torch.no_grad():
        moved = logits - rate * torch.autograd.grad(before, logits)[0]
    assert load_balancing_loss(moved, TOP_K) < before


def test_padding_does_not_count():
    ((logits,),) = random_logits(12, layers=1)
    mask = torch.arange(12) % 3 != 0
    for function in (lambda x, **kw: load_balancing_loss(x, TOP_K, **kw), router_z_loss):
        torch.testing.assert_close(function(logits, token_mask=mask), function(logits[mask]))
        (gradient,) = torch.autograd.grad(function(logits, token_mask=mask), logits)
        assert not gradient[~mask].any()
        assert function(logits, token_mask=torch.zeros(12, dtype=torch.bool)).item() == 0
    assert torch.equal(selection_counts(logits, TOP_K, token_mask=mask), selection_counts(logits[mask], TOP_K))


def test_z_loss_of_known_logits():
    logits = torch.log(torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.25, 0.25]]))
    assert router_z_loss(logits).item() == pytest.approx(math.log(6) ** 2 / 2)


def test_counts_of_logits_are_those_of_the_chosen():
    ((logits,),) = random_logits(50, layers=1)
    index = logits.topk(TOP_K).indices
    expected = torch.bincount(index.flatten(), minlength=EXPERTS)
    assert torch.equal(selection_counts(logits, TOP_K), expected)
    assert torch.equal(selection_counts(index, num_experts=EXPERTS), expected)
    assert torch.equal(selection_counts(index.to(torch.int32), TOP_K, EXPERTS), expected)
    assert selection_counts(torch.tensor([[0, 3], [3, 3], [1, 0]]), num_experts=3).tolist() == [2, 1, 0]  # 3 is no expert
    assert selection_counts(torch.zeros(0, 4), 2).tolist() == [0] * 4


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype, device):
    ((logits,),) = random_logits(3000, layers=1)
    logits = logits.detach().to(device, dtype).requires_grad_()
    loss = load_balancing_loss(logits, TOP_K)
    assert loss.dtype == router_z_loss(logits).dtype == torch.float32
    torch.testing.assert_close(loss.double(), load_balancing_loss(logits.double(), TOP_K), rtol=1e-5, atol=0)
    loss.backward()
    assert logits.grad.dtype == dtype


def test_compiles_to_one_graph(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks of the tests cannot be traced
    ((logits,),) = random_logits(16, layers=1, dtype=torch.float32)
    mask = torch.arange(16) < 11
    compiled = torch.compile(load_balancing_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, TOP_K, token_mask=mask), load_balancing_loss(logits, TOP_K, token_mask=mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must be in"),
        ({"top_k": 7}, "top_k must be in"),
        ({"top_k": 2, "normalize": "experts"}, "normalize must be"),
        ({"top_k": 2, "counts": torch.ones(5)}, "counts must have|experts"),
        ({"top_k": 2, "token_mask": torch.ones(9)}, "token_mask must be boolean|token_mask"),
        ({"top_k": 2, "token_mask": torch.ones(3, dtype=torch.bool)}, "token_mask must be boolean|token_mask"),
    ],
)
def test_bad_arguments_of_the_loss(arguments, message):
    ((logits,),) = random_logits(9, layers=1)
    with pytest.raises((ValueError, TypeCheckError), match=message):
        load_balancing_loss(logits, **arguments)


@pytest.mark.parametrize(
    ("routing", "arguments", "message"),
    [
        (torch.zeros(3, 4), {}, "top_k must be in"),
        (torch.zeros(3, 4), {"top_k": 2, "num_experts": 5}, "num_experts must be the number of columns"),
        (torch.zeros(3, 2, dtype=torch.long), {}, "num_experts must be at least 1"),
        (torch.zeros(3, 2, dtype=torch.long), {"top_k": 1, "num_experts": 4}, "top_k must be the number of columns"),
        (torch.full((3, 2), 5), {"num_experts": 4}, r"routing must be in \[0, 4\]"),
        (torch.full((3, 2), -1), {"num_experts": 4}, r"routing must be in \[0, 4\]"),
    ],
)
def test_bad_arguments_of_the_counts(routing, arguments, message):
    with pytest.raises(ValueError, match=message):
        selection_counts(routing, **arguments)


# --- micro-batches of a step, in one process


@pytest.mark.parametrize("sizes", [(8, 8, 8, 8), (8, 3, 11, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_counted_ahead_is_exactly_the_whole_batch(sizes, masked):
    batches = random_logits(*sizes)
    masks = [torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.7 for n in sizes] if masked else None
    balance = GlobalBatchBalance(TOP_K, weight=0.3, scope="ahead")
    balance.count_ahead(iter(batches), masks)
    losses = [balance(batch, masks[i] if masked else None) for i, batch in enumerate(batches)]
    expected, expected_gradients = whole_batch(batches, masks)
    loss = torch.stack(losses).mean()  # (loss / accumulation_steps).backward()
    torch.testing.assert_close(loss, 0.3 * expected)
    torch.testing.assert_close(gradients(loss, batches), tuple(0.3 * each for each in expected_gradients))


def test_buffer_is_algorithm_1():
    """Each accumulation step uses all counts so far; the last one therefore those of the whole batch."""
    batches = random_logits(5, 5, 5, 5)
    balance = GlobalBatchBalance(TOP_K, weight=1.0, scope="buffer")
    for step, batch in enumerate(batches):
        counts = [sum(selection_counts(each[layer], TOP_K) for each in batches[: step + 1]) for layer in range(LAYERS)]
        each_layer = [load_balancing_loss(z, TOP_K, counts=c) for z, c in zip(batch, counts, strict=True)]
        torch.testing.assert_close(balance(batch), torch.stack(each_layer).mean())
    balance.reset()
    torch.testing.assert_close(balance(batches[3]), whole_batch(batches[3:])[0])


def test_micro_is_the_mean_of_own_losses():
    batches = random_logits(5, 9)
    balance = GlobalBatchBalance(TOP_K, weight=1.0, scope="micro")
    for batch in batches:
        torch.testing.assert_close(balance(batch), whole_batch([batch])[0])


@pytest.mark.parametrize("scope", ["micro", "buffer"])
def test_a_share_of_the_step_is_a_weight_for_a_sum(scope):
    """As Trainer sums token losses that it has divided by the tokens of the step."""
    sizes = (4, 10, 6)
    plain, shared = (GlobalBatchBalance(TOP_K, 1.0, scope) for _ in range(2))
    for batch, size in zip(random_logits(*sizes), sizes, strict=True):
        torch.testing.assert_close(shared(batch, share=size / 20), plain(batch) * size / 20)


def test_eval_mode_leaves_the_buffer_alone():
    first, second = random_logits(5, 5)
    balance = GlobalBatchBalance(TOP_K, scope="buffer")
    balance(first)
    counts = balance.counts.clone()
    evaluated = balance.eval()(second)
    assert torch.equal(balance.counts, counts)
    torch.testing.assert_close(balance.train()(second), evaluated)


def test_micro_term_is_added():
    first, second = random_logits(5, 5)
    plain, with_micro = (GlobalBatchBalance(TOP_K, 1.0, "buffer", micro_weight=micro) for micro in (0.0, 0.25))
    for balance in (plain, with_micro):
        balance(first)
    torch.testing.assert_close(with_micro(second), plain(second) + 0.25 * whole_batch([second])[0])


def test_global_balance_allows_specialised_micro_batches():
    """Each micro-batch uses one expert, all together use all: balanced for the step, collapsed for each."""
    batches = [[one_hot(4, [expert] * 6)] for expert in range(4)]
    ahead, micro = (GlobalBatchBalance(1, weight=1.0, scope=scope) for scope in ("ahead", "micro"))
    ahead.count_ahead(batches)
    assert sum(ahead(batch).item() for batch in batches) / 4 == pytest.approx(1)
    assert sum(micro(batch).item() for batch in batches) / 4 == pytest.approx(4)


@pytest.mark.parametrize("scope", ["buffer", "ahead"])
def test_resumed_in_the_middle_of_a_step_bit_for_bit(scope, tmp_path):
    batches = random_logits(5, 6, 7, 8, dtype=torch.float32)
    whole = GlobalBatchBalance(TOP_K, scope=scope)
    if scope == "ahead":
        whole.count_ahead(batches)
    losses = [whole(batch) for batch in batches[:2]]
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    resumed = GlobalBatchBalance(TOP_K, scope=scope)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = [whole(batch) for batch in batches[2:]]
    assert [loss.item() for loss in rest] == [resumed(batch).item() for batch in batches[2:]]
    fresh = GlobalBatchBalance(TOP_K, scope="buffer")
    assert [loss.item() for loss in losses + rest] != [fresh(batch).item() for batch in batches[2:] + batches[:2]]
    assert torch.equal(resumed.counts, whole.counts)
    assert resumed.seen == whole.seen


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("scope", ["buffer", "ahead"])
def test_recomputed_activations_do_not_count_twice(scope, use_reentrant):
    """The loss itself inside the checkpointed part: it is computed twice, and counts once."""
    torch.manual_seed(0)
    routers = nn.ModuleList([nn.Linear(8, EXPERTS) for _ in range(LAYERS)])
    inputs = [torch.randn(n, 8).requires_grad_() for n in (6, 9, 4)]

    def run(recompute):
        routers.zero_grad()
        balance, calls = GlobalBatchBalance(TOP_K, 1.0, scope), []

        def logits(x):
            return [router(x) for router in routers]

        def loss_of(x):
            calls.append(1)
            return balance(logits(x))

        if scope == "ahead":
            with torch.no_grad():
                balance.count_ahead(logits(x) for x in inputs)
        losses = []
        for x in inputs:
            loss = checkpoint(loss_of, x, use_reentrant=use_reentrant) if recompute else loss_of(x)
            loss.backward()
            losses.append(loss.item())
        assert len(calls) == len(inputs) * (1 + recompute)
        return losses, balance.counts, balance.seen, [parameter.grad.clone() for parameter in routers.parameters()]

    plain, recomputed = run(False), run(True)
    assert plain[0] == recomputed[0]
    assert torch.equal(plain[1], recomputed[1])
    assert plain[2] == recomputed[2]
    torch.testing.assert_close(plain[3], recomputed[3])


def test_global_without_processes_warns_once():
    balance = GlobalBatchBalance(TOP_K)
    (batch,) = random_logits(4)
    with pytest.warns(UserWarning, match="without a process group"):
        loss = balance(batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(balance(batch), loss)
    torch.testing.assert_close(loss, 0.008 * whole_batch([batch])[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 2, "scope": "world"}, "scope must be"),
        ({"top_k": 2, "weight": -1.0}, "weight must be at least 0"),
        ({"top_k": 2, "weight": math.nan}, "weight must be at least 0"),
        ({"top_k": 2, "micro_weight": math.inf}, "micro_weight must be at least 0"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatchBalance(**arguments)


def test_bad_calls():
    good, other = random_logits(4, 5)
    balance = GlobalBatchBalance(TOP_K, scope="buffer")
    with pytest.raises(ValueError, match="at least one layer"):
        balance([])
    with pytest.raises(ValueError, match="the same tokens and experts in all layers"):
        balance([good[0], good[1][:, :5]])
    with pytest.raises((ValueError, TypeCheckError), match=r"all layers|router_logits"):
        balance([good[0], other[0]])
    with pytest.raises(ValueError, match="top_k must be in"):
        GlobalBatchBalance(7, scope="buffer")(good)
    with pytest.raises(ValueError, match="count_ahead is for"):
        balance.count_ahead([good])
    balance(good)
    with pytest.raises(ValueError, match="as many layers and experts"):
        balance(good[:2])

    ahead = GlobalBatchBalance(TOP_K, scope="ahead")
    with pytest.raises(ValueError, match="count_ahead must be called before each step"):
        ahead(good)
    with pytest.raises(ValueError, match="at least one micro-batch"):
        ahead.count_ahead([])
    ahead.count_ahead([good])
    with pytest.raises(ValueError, match="share is not for"):
        ahead(good, share=0.5)
    ahead(good)
    with pytest.raises(ValueError, match="it was given 1 micro-batches"):
        ahead(good)


# --- transformers' models in Trainer

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": TOP_K,
    "router_aux_loss_coef": 0.7,  # must have no say
    "initializer_range": 0.3,  # routers that have opinions
}
MODELS = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SIZES, num_experts=EXPERTS)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, moe_intermediate_size=16, head_dim=8, decoder_sparse_step=1)
    ),
}
WEIGHT, LENGTH = 0.5, 10


def build(family="mixtral"):
    torch.manual_seed(0)
    return MODELS[family]()


def sentences(number=7):
    """Of different lengths, padded at the end."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 40, (number, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (number, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    tokens = tokens * mask
    return [
        {"input_ids": t, "attention_mask": m, "labels": t.masked_fill(m == 0, -100)} for t, m in zip(tokens, mask, strict=True)
    ]


def collate(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def run(model, rows):
    """Sum of the token losses, router logits by layer, and which tokens are no padding."""
    batch = collate(rows)
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True, use_cache=False)
    token_loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    return token_loss, out.router_logits, batch["attention_mask"].flatten().bool()


def label_tokens(rows):
    return sum(int((row["labels"][1:] != -100).sum()) for row in rows)


def whole_step(model, rows):
    """Gradients of one process that sees all rows at once."""
    token_loss, logits, mask = run(model, rows)
    balance = torch.stack([load_balancing_loss(layer, TOP_K, token_mask=mask) for layer in logits]).mean()
    return gradients_of(model, token_loss / label_tokens(rows) + WEIGHT * balance)


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    taken = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return taken


class Watch(BalanceCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train(model, rows, callback, folder, steps=1, **settings):
    class CountsAhead(Trainer):  # as the card says
        def get_batch_samples(self, *arguments):
            batches, items = super().get_batch_samples(*arguments)
            callback.count_ahead(self.model, batches)
            return batches, items

    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, max_grad_norm=0, report_to=[], save_strategy="no", use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False, logging_strategy="no", train_sampling_strategy="sequential",
        accelerator_config={"even_batches": False}, **settings,
    )  # fmt: skip
    kind = CountsAhead if callback.balance.scope == "ahead" else Trainer
    kind(model, settings, train_dataset=rows, data_collator=collate, callbacks=[callback]).train()
    return callback.gradients


def assert_same_gradients(gradients, expected):
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_trainer_that_counts_ahead_takes_the_gradient_of_the_whole_batch(family, recompute, tmp_path):
    rows = sentences()  # micro-batches of 2, 2, 2 and 1 sentences
    model = build(family)
    expected = whole_step(model, rows)
    callback = Watch(WEIGHT, scope="ahead")
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": recompute}
    assert_same_gradients(train(model, rows, callback, tmp_path, **settings), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_trainer_with_the_buffer_is_algorithm_1(recompute, tmp_path):
    rows, model = sentences(), build()
    parts = [rows[:2], rows[2:4], rows[4:6], rows[6:]]
    loss, counts = 0, [0, 0]
    for part in parts:
        token_loss, logits, mask = run(model, part)
        counts = [c + selection_counts(z, TOP_K, token_mask=mask) for c, z in zip(counts, logits, strict=True)]
        layers = [load_balancing_loss(z, TOP_K, counts=c, token_mask=mask) for z, c in zip(logits, counts, strict=True)]
        share = label_tokens(part) / label_tokens(rows)  # the weight of its token losses
        loss = loss + token_loss / label_tokens(rows) + share * WEIGHT * torch.stack(layers).mean()
    expected = gradients_of(model, loss)
    callback = Watch(WEIGHT)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_checkpointing": recompute}
    assert_same_gradients(train(model, rows, callback, tmp_path, **settings), expected)
    assert callback.balance.counts is None, "reset after the step"


def test_trainer_without_accumulation_is_exact(tmp_path):
    rows, model = sentences(), build()
    expected = whole_step(model, rows)
    assert_same_gradients(train(model, rows, Watch(WEIGHT), tmp_path, per_device_train_batch_size=7), expected)


def test_models_that_take_no_number_of_items(tmp_path):
    """Trainer then divides the loss by the accumulation steps: the mean over micro-batches."""
    rows, model = sentences(8), build()
    model.accepts_loss_kwargs = False
    loss = 0
    for part in (rows[:4], rows[4:]):
        token_loss, logits, mask = run(model, part)
        loss = loss + token_loss / label_tokens(part) / 2
    mask = collate(rows)["attention_mask"].flatten().bool()
    _, logits, _ = run(model, rows)
    loss = loss + WEIGHT * torch.stack([load_balancing_loss(z, TOP_K, token_mask=mask) for z in logits]).mean()
    expected = gradients_of(model, loss)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert_same_gradients(train(model, rows, Watch(WEIGHT, scope="ahead"), tmp_path, **settings), expected)


def test_model_is_as_before_when_training_has_ended(tmp_path):
    rows, model = sentences(), build()
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    train(model, rows, Watch(WEIGHT), tmp_path, steps=2, per_device_train_batch_size=2)
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
    assert model.router_aux_loss_coef == 0.7
    batch = collate(rows)
    model.train()
    assert model(**batch).router_logits is None
    torch.testing.assert_close(model(**batch).loss, run(model, rows)[0] / label_tokens(rows))


def test_evaluation_during_training_is_of_the_tokens_alone(tmp_path):
    rows, model, seen = sentences(), build(), []

    class Evaluates(Watch):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.eval()
            with torch.no_grad():
                seen.append((model(**collate(rows)).loss, run(model, rows)[0] / label_tokens(rows)))
            model.train()

    train(model, rows, Evaluates(WEIGHT), tmp_path, per_device_train_batch_size=7)
    torch.testing.assert_close(*seen[0])


def test_callback_says_what_is_missing(tmp_path):
    rows = sentences()
    llama = LlamaForCausalLM(LlamaConfig(**{key: SIZES[key] for key in list(SIZES)[:10]}))
    with pytest.raises(ValueError, match="model must have experts"):
        train(llama, rows, Watch(), tmp_path)
    with pytest.raises(ValueError, match="must return a loss to add to"):
        train(build(), rows, Watch(), tmp_path, label_smoothing_factor=0.1)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant=False"):
        train(build(), rows, Watch(), tmp_path, **reentrant)
    with pytest.raises(ValueError, match="scope must be"):
        BalanceCallback(scope="rank")


# --- processes

RANK = """
import os, sys, torch, torch.distributed as dist
from datetime import timedelta
from firsthand.moe.balance import GlobalBatchBalance
torch.set_num_threads(1)
rank, world, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + path, rank=rank, world_size=world, timeout=timedelta(seconds=240))
steps = torch.load(path + ".pt")  # for each accumulation step, for each rank, the logits of each layer
mine = [step[rank] for step in steps]
result = {}
two = dist.new_group([0, 1])
for size, group in ((2, two), (4, None)):
    for scope in ("micro", "global", "buffer", "ahead") if rank < size else ():
        balance = GlobalBatchBalance(2, 1.0, scope, group)
        leaves = [[layer.clone().requires_grad_() for layer in step] for step in mine]
        if scope == "ahead":
            balance.count_ahead(leaves)
        losses = [balance(step) for step in leaves]
        sum(losses).div(len(steps)).backward()
        result[size, scope] = [loss.item() for loss in losses], [[layer.grad for layer in step] for step in leaves]
torch.save(result, f"{path}.{rank}")
dist.barrier()
os._exit(0)  # gloo's threads now and then abort an orderly end
"""


def in_processes(world, path, *command):
    processes = [
        subprocess.Popen(
            [sys.executable, *command, str(rank), str(world), str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"},  # the group is there already; accelerate asks all the same
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, outputs
    return [torch.load(f"{path}.{rank}") for rank in range(world)]


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    """Two accumulation steps in four processes, of unequal sizes, one empty; and once more in a group of the first two."""
    steps = [random_logits(*sizes, seed=seed) for seed, sizes in enumerate([(7, 4, 0, 9), (3, 8, 5, 5)])]
    path = tmp_path_factory.mktemp("ranks") / "rendezvous"
    torch.save([[[layer.detach() for layer in batch] for batch in step] for step in steps], f"{path}.pt")
    return steps, in_processes(4, path, "-c", RANK)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_give_what_one_gives(world, four_processes):
    """Every scope against one process on the concatenated logits, gradients too."""
    steps, results = four_processes
    steps = [step[:world] for step in steps]

    def check(scope, expected):
        """Loss and gradient, averaged over ranks as DDP does."""
        found = [result[world, scope] for result in results[:world]]
        losses = [sum(losses[step] for losses, _ in found) / world for step in range(2)]
        assert losses == pytest.approx([each.item() for each in expected], rel=1e-9)
        every = [batch for step in steps for batch in step]
        gathered = [layer / world for step in range(2) for _, gradient in found for layer in gradient[step]]
        torch.testing.assert_close(gathered, list(gradients(sum(expected) / 2, every)))

    together = [[torch.cat(layer) for layer in zip(*step, strict=True)] for step in steps]
    counts = [torch.stack([selection_counts(layer, TOP_K) for layer in step]) for step in together]

    def mean_loss(step, counts):
        return torch.stack([load_balancing_loss(z, TOP_K, counts=c) for z, c in zip(step, counts, strict=True)]).mean()

    check("global", [mean_loss(step, count) for step, count in zip(together, counts, strict=True)])
    check("buffer", [mean_loss(together[0], counts[0]), mean_loss(together[1], counts[0] + counts[1])])
    tokens = [len(step[0]) for step in together]
    whole = [mean_loss(step, counts[0] + counts[1]) * 2 * n / sum(tokens) for step, n in zip(together, tokens, strict=True)]
    check("ahead", whole)
    torch.testing.assert_close(sum(whole) / 2, whole_batch([batch for step in steps for batch in step])[0])
    own = [[torch.stack([load_balancing_loss(z, TOP_K) for z in batch]).mean() for batch in step] for step in steps]
    check("micro", [sum(step) / world for step in own])


def test_ddp_with_accumulation_and_checkpointing_takes_the_gradient_of_the_whole_batch(tmp_path):
    """All three together, in a loop of one's own and in Trainer, with an uneven last batch: 2 and 2 sentences, then 2 and 1."""
    results = in_processes(2, tmp_path / "rendezvous", __file__)
    expected = whole_step(build(), sentences())
    alone = trace_of_steps(build(), sentences(), 1, GlobalBatchBalance(TOP_K, WEIGHT, scope="micro"))
    torch.testing.assert_close(sum(result["trace"] for result in results) / 2, alone)
    assert len(set(alone.tolist())) == len(alone), "it learns something"
    for result in results:
        assert_same_gradients(result["loop"], expected)
        assert_same_gradients(result["trainer"], expected)
        assert_same_gradients(result["trainer, averaged by rank"], result["expected, averaged by rank"])


def trace_of_steps(model, rows, ranks, balance):
    """The balance loss, step after step of training on the same rows."""
    optimizer, trace = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(4):
        token_loss, logits, mask = run(model, rows)
        trace.append(balance(logits, mask))
        (ranks * token_loss / label_tokens(sentences()) + trace[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(trace).detach()


def rank_of_two(rank, path):
    """What the test above runs in each process."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timedelta(seconds=240))
    rows = sentences()
    parts = [rows[0:2], rows[4:6]] if rank == 0 else [rows[2:4], rows[6:]]
    result = {}

    model = build()
    model.gradient_checkpointing_enable()
    model.train()
    ddp = DistributedDataParallel(model)
    balance = GlobalBatchBalance(TOP_K, WEIGHT, scope="ahead")
    with torch.no_grad():
        balance.count_ahead((run(ddp, part)[1] for part in parts), [run(ddp, part)[2] for part in parts])
    for part in parts:
        token_loss, logits, mask = run(ddp, part)
        (2 * token_loss / label_tokens(rows) + balance(logits, mask) / len(parts)).backward()
    result["loop"] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    ddp = DistributedDataParallel(build())
    result["trace"] = trace_of_steps(ddp, rows[:4] if rank == 0 else rows[4:], 2, GlobalBatchBalance(TOP_K, WEIGHT))

    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    callback = Watch(WEIGHT, scope="ahead")
    result["trainer"] = train(build(), rows, callback, path.parent, ddp_backend="gloo", **settings)

    # Each rank's tokens divided by its own number of them, then averaged over ranks.
    model = build()
    own = [rows[0:2] + rows[4:6], rows[2:4] + rows[6:]]
    loss = sum(run(model, part)[0] / label_tokens(part) for part in own) / 2
    _, logits, mask = run(model, rows)
    loss = loss + WEIGHT * torch.stack([load_balancing_loss(layer, TOP_K, token_mask=mask) for layer in logits]).mean()
    result["expected, averaged by rank"] = gradients_of(model, loss)
    result["trainer, averaged by rank"] = train(
        build(), rows, Watch(WEIGHT, scope="ahead"), path.parent, average_tokens_across_devices=False, **settings
    )
    torch.save(result, f"{path}.{rank}")
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    rank_of_two(int(sys.argv[1]), Path(sys.argv[3]))
