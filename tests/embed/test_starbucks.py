import copy
import subprocess
import sys
from itertools import pairwise

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

from sentence_transformers.sentence_transformer import losses  # noqa: E402
from sentence_transformers.sentence_transformer.modules import Dense, Pooling  # noqa: E402

from firsthand import data  # noqa: E402
from firsthand.embed.starbucks import StarbucksLoss, default_sizes, extract_submodel, pool_layers, srl_loss  # noqa: E402
from firsthand.testbeds import embedding  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TEXTS = ["sort a list", "return the largest of all the numbers that are given", "close the file", "find the shortest path"]
SIZES = [(1, 4), (2, 8), (3, 16)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def tokenizer():
    return embedding.tokenizer(TEXTS, 120)


@pytest.fixture
def model(tokenizer):
    """Three layers of width 16."""
    backbone = embedding.bert(torch.Generator().manual_seed(0), len(tokenizer), hidden=16, layers=3, heads=2)
    for weight in backbone.parameters():
        weight.data *= 4  # so that layers do something
    return embedding.sentence_transformer(backbone, tokenizer, length=16)


def columns(model, count: int = 2):
    """The same texts in another order in each column: a column's row i and the next one's belong together."""
    return [model.preprocess(TEXTS[k:] + TEXTS[:k]) for k in range(count)]


# --- sizes ----------------------------------------------------------------------------------------------------------------


def test_sizes_of_a_bert_are_those_of_the_paper():
    assert default_sizes(12, 768) == [(2, 32), (4, 64), (6, 128), (8, 256), (10, 512), (12, 768)]
    assert default_sizes(6, 384) == [(1, 16), (2, 32), (3, 64), (4, 128), (5, 256), (6, 384)]
    assert default_sizes(4, 100, rungs=1) == [(4, 100)]


@pytest.mark.parametrize("layers", range(1, 14))
def test_sizes_grow(layers):
    for rungs in range(1, min(layers, 7) + 1):
        sizes = default_sizes(layers, 100, rungs)
        assert len(sizes) == rungs
        assert sizes[-1] == (layers, 100)
        for smaller, larger in pairwise(sizes):
            assert all(a < b for a, b in zip(smaller, larger, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"), [((3, 64, 4), "rungs must be in"), ((3, 64, 0), "rungs must be"), ((8, 16), "hidden must be at")]
)
def test_sizes_that_there_are_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        default_sizes(*arguments)


# --- pooling --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(("pooling", "theirs"), [("cls", "cls"), ("mean", "mean"), ("last", "lasttoken")])
def test_pooling_agrees_with_sentence_transformers_and_reads_no_padding(pooling, theirs, left):
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    mask = mask.flip(1) if left else mask
    states = list(random(4, 3, 5, 8))
    expected = [Pooling(8, theirs)({"token_embeddings": h, "attention_mask": mask})["sentence_embedding"] for h in states]
    torch.testing.assert_close(pool_layers(states, mask, pooling=pooling), torch.stack(expected))
    dirty = [h.masked_fill(mask[..., None] == 0, torch.nan) for h in states]
    torch.testing.assert_close(pool_layers(dirty, mask.bool(), pooling=pooling), torch.stack(expected))


def test_normalising_is_at_full_width():
    pooled = pool_layers([random(2, 3, 8)], torch.ones(2, 3, dtype=torch.long), normalize=True)
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(1, 2))
    assert (pooled[..., :4].norm(dim=-1) < 1).all()


def test_pooling_half_precision_sums_in_float32():
    states = random(1, 400, 8).bfloat16()
    mask = torch.ones(1, 400, dtype=torch.long)
    pooled = pool_layers([states], mask, pooling="mean")
    torch.testing.assert_close(pooled[0], states.float().mean(dim=1).bfloat16())


@pytest.mark.parametrize(
    ("states", "mask", "pooling", "message"),
    [
        ([torch.zeros(2, 3, 4)], torch.ones(2, 3, dtype=torch.long), "max", "pooling must be"),
        ([], torch.ones(2, 3, dtype=torch.long), "cls", "at least one layer"),
        ([torch.zeros(2, 3, 4)], torch.ones(2, 2, dtype=torch.long), "cls", "hidden_states must have shape"),
        ([torch.zeros(2, 3, 4)], torch.tensor([[1, 1, 0], [0, 0, 0]]), "cls", "a row of zeros"),
    ],
)
def test_bad_pooling(unchecked, states, mask, pooling, message):
    with pytest.raises(ValueError, match=message):
        pool_layers(states, mask, pooling=pooling)


# --- the loss on scores ---------------------------------------------------------------------------------------------------


class Given(nn.Module):
    """A model whose features already are the embeddings."""

    def forward(self, features):
        return {"sentence_embedding": features}


def test_one_size_is_multiple_negatives_ranking():
    queries, passages = random(4, 5, 16), random(4, 5, 16, seed=1)
    theirs = losses.MultipleNegativesRankingLoss(Given(), scale=1 / 0.7, similarity_fct=st.util.dot_score)
    expected = theirs([queries[3], passages[3]], None)
    torch.testing.assert_close(srl_loss(queries, passages, [(3, 16)], temperature=0.7), expected)


@pytest.mark.parametrize("group", [1, 3])
def test_without_divergence_it_is_a_sum_of_cross_entropies(group):
    queries, passages = random(4, 5, 16), random(4, 5 * group, 16, seed=1)
    own = torch.arange(5) * group
    expected = sum(F.cross_entropy(queries[n, :, :d] @ passages[n, :, :d].T / 2, own) for n, d in SIZES)
    torch.testing.assert_close(srl_loss(queries, passages, SIZES, temperature=2.0, kl_weight=0), expected)


def test_divergence_is_from_the_full_model_and_weighted():
    queries, passages = random(4, 5, 16), random(4, 10, 16, seed=1)

    def distribution(n: int, d: int) -> torch.distributions.Categorical:
        return torch.distributions.Categorical(logits=queries[n, :, :d] @ passages[n, :, :d].T / 3)

    divergence = sum(torch.distributions.kl_divergence(distribution(3, 16), distribution(*size)) for size in SIZES[:-1])
    with_it, without = (srl_loss(queries, passages, SIZES, temperature=3.0, kl_weight=w, reduction="none") for w in (0.5, 0.0))
    torch.testing.assert_close(with_it - without, 0.5 * divergence, atol=1e-5, rtol=1e-4)


def test_equal_sub_models_have_no_divergence():
    queries, passages = (random(1, 5, 16, seed=seed).repeat(4, 1, 1) for seed in (0, 1))
    queries[..., 4:] = 0  # so that no size knows more than another
    one = srl_loss(queries, passages, [(3, 16)])
    torch.testing.assert_close(srl_loss(queries, passages, SIZES, kl_weight=7.0), 3 * one)


def test_gradient_reaches_only_what_a_size_has():
    queries, passages = random(4, 5, 16).requires_grad_(), random(4, 5, 16, seed=1)
    (gradient,) = torch.autograd.grad(srl_loss(queries, passages, SIZES), queries)
    assert (gradient[0] == 0).all()  # no size has no layer
    for layer, dim in SIZES:
        assert (gradient[layer, :, dim:] == 0).all()
        assert (gradient[layer, :, :dim] != 0).all()
    (alone,) = torch.autograd.grad(srl_loss(queries, passages, SIZES[-1:]), queries)
    torch.testing.assert_close(gradient[3], alone[3])  # the teacher does not move towards its students


def test_reductions():
    queries, passages = random(4, 5, 16), random(4, 5, 16, seed=1)
    rows = srl_loss(queries, passages, SIZES, reduction="none")
    assert rows.shape == (5,)
    torch.testing.assert_close(srl_loss(queries, passages, SIZES), rows.mean())
    torch.testing.assert_close(srl_loss(queries, passages, SIZES, reduction="sum"), rows.sum())


def test_order_of_other_passages_does_not_matter():
    queries, passages = random(4, 5, 16), random(4, 15, 16, seed=1)
    shuffled = passages.reshape(4, 5, 3, 16)[:, :, [0, 2, 1]].reshape(4, 15, 16)
    torch.testing.assert_close(srl_loss(queries, passages, SIZES), srl_loss(queries, shuffled, SIZES))


def test_gradient_numerically():
    inputs = random(3, 2, 5).double().requires_grad_(), random(3, 4, 5, seed=1).double().requires_grad_()
    # The teacher is held still in the gradient but not in the differences: so the divergence is left out here.
    assert torch.autograd.gradcheck(lambda q, p: srl_loss(q, p, [(1, 2), (2, 5)], kl_weight=0.0), inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_computes_in_float32(device):
    queries, passages = random(4, 5, 16).bfloat16().to(device), random(4, 5, 16, seed=1).bfloat16().to(device)
    exact = srl_loss(queries.float(), passages.float(), SIZES, temperature=0.05)
    loss = srl_loss(queries, passages, SIZES, temperature=0.05)
    assert loss.dtype == torch.bfloat16
    torch.testing.assert_close(loss, exact.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(srl_loss(queries.float(), passages.float(), SIZES, temperature=0.05), exact)


def test_compiles_into_one_graph(unchecked):
    queries, passages = random(4, 5, 16), random(4, 5, 16, seed=1)
    compiled = torch.compile(srl_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(queries, passages, SIZES), srl_loss(queries, passages, SIZES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passage_layers": torch.zeros(4, 7, 16)}, r"passage_layers must have shape \(4, g·5, 16\)"),
        ({"passage_layers": torch.zeros(4, 0, 16)}, "passage_layers must have shape"),
        ({"passage_layers": torch.zeros(3, 5, 16)}, "passage_layers must have shape"),
        ({"query_layers": torch.zeros(5, 16)}, "query_layers must be floating point of shape"),
        ({"query_layers": torch.zeros(4, 5, 16, dtype=torch.long)}, "query_layers must be floating point"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"kl_weight": -1.0}, "kl_weight must be at least 0"),
        ({"reduction": "max"}, "reduction must be"),
        ({"sizes": []}, "sizes must be pairs"),
        ({"sizes": [(3, 16, 1)]}, "sizes must be pairs"),
        ({"sizes": [(2, 8), (2, 16)]}, "sizes must grow strictly"),
        ({"sizes": [(1, 16), (3, 16)]}, "sizes must grow strictly"),
        ({"sizes": [(0, 8), (3, 16)]}, r"layers in \[1, 3\], got 0"),
        ({"sizes": [(1, 8), (4, 16)]}, r"layers in \[1, 3\], got 1 to 4"),
        ({"sizes": [(1, 8), (3, 17)]}, r"dim in \[1, 16\], got 8 to 17"),
    ],
)
def test_bad_input(unchecked, change, message):
    given = {"query_layers": random(4, 5, 16), "passage_layers": random(4, 5, 16), "sizes": SIZES}
    with pytest.raises(ValueError, match=message):
        srl_loss(**(given | change))


def test_a_full_model_that_is_not_trained_is_worth_a_warning():
    with pytest.warns(UserWarning, match=r"the last size is \(2, 16\)"):
        srl_loss(random(4, 5, 16), random(4, 5, 16, seed=1), [(1, 4), (2, 16)])


# --- sub-models -----------------------------------------------------------------------------------------------------------


def all_layers(model, texts=TEXTS):
    """What the transformer returns for all layers, and the mask."""
    features = model.preprocess(list(texts))
    output = model[0].auto_model(
        input_ids=features["input_ids"], attention_mask=features["attention_mask"], output_hidden_states=True
    )
    return output.hidden_states, features["attention_mask"]


@pytest.mark.parametrize("size", SIZES)
def test_sub_model_embeds_as_the_layer_does(model, size):
    layer, dim = size
    model.eval()
    expected = pool_layers(*all_layers(model), pooling="mean")[layer, :, :dim].detach()
    weights = copy.deepcopy(model.state_dict())
    small = extract_submodel(model, layer, dim)
    assert small.get_embedding_dimension() == dim
    assert len(small[0].auto_model.encoder.layer) == small[0].auto_model.config.num_hidden_layers == layer
    torch.testing.assert_close(small.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-6, rtol=1e-5)
    assert model[0].auto_model.config.num_hidden_layers == 3
    small[0].auto_model.embeddings.word_embeddings.weight.data.zero_()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, weights[name])


def test_sub_model_keeps_what_the_host_knows_of_it(model):
    model.prompts = {"query": "what: ", "document": ""}
    model.default_prompt_name = "query"
    model.similarity_fn_name = "dot"
    model.train()
    small = extract_submodel(model, 2)
    assert small.prompts == model.prompts
    assert (small.default_prompt_name, small.similarity_fn_name, small.truncate_dim) == ("query", "dot", None)
    assert small.training
    assert small.max_seq_length == 16
    assert extract_submodel(extract_submodel(model, 2, 8), 1).truncate_dim == 8


def test_sub_model_of_a_transformers_model(model):
    backbone = model[0].auto_model.eval()
    features = model.preprocess(TEXTS)
    inputs = {"input_ids": features["input_ids"], "attention_mask": features["attention_mask"]}
    small = extract_submodel(backbone, 2)
    expected = backbone(**inputs, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(small(**inputs).last_hidden_state, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 8), r"layer must be in \[1, 3\]"), ((4, 8), r"layer must be in \[1, 3\]"), ((1, 0), "dim must be"), ((1, 17), "dim m")],
)
def test_sub_models_that_there_are_not(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        extract_submodel(model, *arguments)


def test_a_transformers_model_has_no_dim(model):
    with pytest.raises(ValueError, match="dim goes with a SentenceTransformer"):
        extract_submodel(model[0].auto_model, 1, 8)


# --- any loss of sentence-transformers ------------------------------------------------------------------------------------


def mnrl(model):
    return losses.MultipleNegativesRankingLoss(model)


def by_hand(model, inner, count: int, sizes=SIZES, scale: float = 0.3) -> torch.Tensor:
    """The loss out of sub-models that embed by themselves."""

    def embeddings(size) -> list[torch.Tensor]:
        small = extract_submodel(model, size[0])
        return [small(features)["sentence_embedding"] for features in columns(model, count)]

    given = inner(Given())
    teacher = embeddings(sizes[-1])
    total = given(teacher, None)
    for layer, dim in sizes[:-1]:
        student = embeddings((layer, dim))
        total = total + given([F.normalize(each[:, :dim], dim=-1) for each in student], None)
        p, q = (torch.distributions.Categorical(logits=torch.cat(each)[:, :dim].detach().double()) for each in (teacher, student))
        total = total + scale * torch.distributions.kl_divergence(p, q).mean()
    return total.float()


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_the_sum_over_sub_models(model, count):
    loss = StarbucksLoss(model, mnrl(model), SIZES)(columns(model, count), None)
    torch.testing.assert_close(loss, by_hand(model, mnrl, count), atol=1e-4, rtol=1e-4)


def test_one_size_is_the_inner_loss(model):
    inner = mnrl(model)
    torch.testing.assert_close(StarbucksLoss(model, inner, [(3, 16)])(columns(model), None), inner(columns(model), None))


def test_two_sizes_agree_with_the_matryoshka_loss_of_sentence_transformers_where_they_are_one(tokenizer):
    # With one layer and its full output there is nothing but widths: [(1, 8)] is one term of theirs.
    backbone = embedding.bert(torch.Generator().manual_seed(0), len(tokenizer), hidden=16, layers=1, heads=2)
    model = embedding.sentence_transformer(backbone, tokenizer, length=16)
    theirs = losses.MatryoshkaLoss(model, mnrl(model), [8])(columns(model), None)
    with pytest.warns(UserWarning, match="is not trained"):
        ours = StarbucksLoss(model, mnrl(model), [(1, 8)])
    torch.testing.assert_close(ours(columns(model), None), theirs)


def test_later_layers_learn_from_the_full_model_alone(model):
    def gradients(loss: nn.Module) -> list[torch.Tensor]:
        model.zero_grad()
        loss(columns(model), None).backward()
        return [weight.grad.clone() for weight in model[0].auto_model.encoder.layer[2].parameters()]

    alone = gradients(mnrl(model))
    for ours, theirs in zip(gradients(StarbucksLoss(model, mnrl(model), SIZES)), alone, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    moved = gradients(StarbucksLoss(model, mnrl(model), SIZES, kl_weight=10.0, detach_teacher=False))
    assert any(not torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(moved, alone, strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_the_transformer_runs_once(model, count):
    calls = []
    hook = model[0].auto_model.register_forward_hook(lambda *_: calls.append(1))
    mnrl(model)(columns(model, count), None)
    once = len(calls)
    StarbucksLoss(model, mnrl(model), SIZES)(columns(model, count), None)
    hook.remove()
    assert len(calls) == 2 * once


class Fails(nn.Module):
    def __init__(self, model, message: str) -> None:
        super().__init__()
        self.model, self.message, self.calls = model, message, 0

    def forward(self, features, labels):
        self.calls += 1
        if self.calls == 2:
            raise RuntimeError(self.message)
        return self.model(features[0])["sentence_embedding"].sum()


def test_the_model_is_as_before_even_after_an_error(model):
    def state() -> tuple:
        return "forward" in vars(model), "forward" in vars(model[0]), model[0].auto_model.config.output_hidden_states

    before, features = state(), columns(model)
    keys = set(features[0])
    expected = model.encode(TEXTS)
    StarbucksLoss(model, mnrl(model), SIZES)(features, None)
    assert state() == before == (False, False, False)
    assert set(features[0]) == keys
    with pytest.raises(RuntimeError, match="on the way"):
        StarbucksLoss(model, Fails(model, "on the way"), SIZES)(columns(model), None)
    assert state() == before
    np.testing.assert_allclose(model.encode(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(copy.deepcopy(model).encode(TEXTS), expected, atol=1e-6)


class Wavers(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, features, labels):
        self.calls += 1
        return self.model(features[self.calls % 2])["sentence_embedding"].sum()


def test_a_loss_that_embeds_other_texts_each_time(model):
    with pytest.raises(ValueError, match="the same texts in the same order"):
        StarbucksLoss(model, Wavers(model), SIZES)(columns(model), None)


def test_labels_reach_the_inner_loss(model):
    labels = torch.tensor([1.0, 0.0, 0.5, 0.2])
    inner = losses.CoSENTLoss(model)
    small = losses.CoSENTLoss(Given())
    loss = StarbucksLoss(model, inner, SIZES, kl_weight=0.0)(columns(model), labels)
    pooled = [pool_layers(*all_layers(model, TEXTS[k:] + TEXTS[:k]), pooling="mean") for k in range(2)]
    expected = sum(small([each[n, :, :d] for each in pooled], labels) for n, d in SIZES)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_modules_after_pooling_are_part_of_every_size(model):
    torch.manual_seed(0)
    model.append(Dense(16, 12))
    sizes = [(1, 4), (2, 8), (3, 12)]
    loss = StarbucksLoss(model, mnrl(model), sizes)(columns(model), None)
    torch.testing.assert_close(loss, by_hand(model, mnrl, 2, sizes), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "modernbert"])
def test_a_final_norm_is_part_of_every_size_and_sub_model(tokenizer, kind):
    if kind == "llama":
        backbone = embedding.llama(torch.Generator().manual_seed(0), len(tokenizer), hidden=16, layers=3, heads=2).model
    else:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
        special = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
        config = transformers.ModernBertConfig(vocab_size=len(tokenizer), global_attn_every_n_layers=2, **sizes, **special)
        backbone = transformers.ModernBertModel(config)
    model = embedding.sentence_transformer(backbone, tokenizer, length=16)
    loss = StarbucksLoss(model, mnrl(model), SIZES)(columns(model), None)
    torch.testing.assert_close(loss, by_hand(model, mnrl, 2), atol=1e-4, rtol=1e-4)


def test_composes_with_the_matryoshka_loss(model):
    inner = losses.MatryoshkaLoss(model, mnrl(model), [16])
    loss = StarbucksLoss(model, inner, [(3, 16)])(columns(model), None)
    torch.testing.assert_close(loss, inner(columns(model), None))


@pytest.mark.parametrize("device", DEVICES)
def test_trains_in_bfloat16(model, device):
    model.to(device)
    features = [{key: value.to(device) if torch.is_tensor(value) else value for key, value in c.items()} for c in columns(model)]
    exact = StarbucksLoss(model, mnrl(model), SIZES)(features, None)
    loss = StarbucksLoss(model.bfloat16(), mnrl(model), SIZES)(features, None)
    loss.backward()
    torch.testing.assert_close(loss.float(), exact, atol=0.5, rtol=0.05)


def test_bad_arguments(model, tokenizer, unchecked):
    inner = mnrl(model)
    with pytest.raises(ValueError, match="which does so in the backward pass"):
        StarbucksLoss(model, losses.CachedMultipleNegativesRankingLoss(model), SIZES)
    with pytest.raises(ValueError, match="a loss on the same model"):
        StarbucksLoss(model, mnrl(copy.deepcopy(model)), SIZES)
    with pytest.raises(ValueError, match="sizes must have layers"):
        StarbucksLoss(model, inner, [(1, 4), (7, 16)])
    with pytest.raises(ValueError, match="kl_weight must be"):
        StarbucksLoss(model, inner, SIZES, kl_weight=-1)
    with pytest.raises(ValueError, match="kl_scale must be"):
        StarbucksLoss(model, inner, SIZES, kl_scale=float("nan"))
    with pytest.raises(ValueError, match="model must be a SentenceTransformer"):
        StarbucksLoss(Given(), inner, SIZES)


def test_config_holds_every_option(model):
    config = StarbucksLoss(model, mnrl(model), SIZES).get_config_dict()
    expected = {"loss": "MultipleNegativesRankingLoss", "sizes": SIZES, "kl_weight": 1.0, "kl_scale": 0.3, "detach_teacher": True}
    assert config == expected


# --- in the host ----------------------------------------------------------------------------------------------------------


def train(model, loss, folder, steps: int = 2) -> float:
    datasets = pytest.importorskip("datasets")
    args = st.SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", learning_rate=1e-3,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"query": TEXTS, "positive": TEXTS[1:] + TEXTS[:1]})
    result = st.SentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss).train()
    return float(result.training_loss)


@pytest.mark.filterwarnings("ignore")  # of the trainer's own
def test_minilm_trains_in_the_trainer_and_plain_sentence_transformers_loads_its_sub_models(tmp_path):
    try:
        folder = data.load("minilm")
    except data.DataMissing:
        pytest.skip("all-MiniLM-L6-v2 is not on this machine")
    model = st.SentenceTransformer(str(folder), device="cpu", prompts={"query": "find: "})
    model.max_seq_length = 16
    sizes = default_sizes(6, 384)
    before = model[0].auto_model.encoder.layer[0].output.dense.weight.detach().clone()
    assert np.isfinite(train(model, StarbucksLoss(model, mnrl(model), sizes), tmp_path / "run", steps=1))
    assert not torch.equal(before, model[0].auto_model.encoder.layer[0].output.dense.weight)

    layer, dim = sizes[2]
    extract_submodel(model, layer, dim).save_pretrained(str(tmp_path / "small"))
    with torch.no_grad():
        pooled = pool_layers(*all_layers(model.eval(), [f"find: {text}" for text in TEXTS]), pooling="mean", normalize=True)
    np.save(tmp_path / "expected.npy", pooled[layer, :, :dim].numpy())
    code = f"""
import sys
from itertools import pairwise
import numpy as np
from sentence_transformers import SentenceTransformer
model = SentenceTransformer({str(tmp_path / "small")!r}, device="cpu")
assert not any(name.startswith("firsthand") for name in sys.modules)
assert len(model[0].auto_model.encoder.layer) == {layer}
embeddings = model.encode({TEXTS!r}, prompt_name="query")
np.testing.assert_allclose(embeddings, np.load({str(tmp_path / "expected.npy")!r}), atol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.filterwarnings("ignore")
def test_every_size_learns_in_the_trainer_and_is_extracted_after_it(model, tmp_path):
    loss = StarbucksLoss(model, mnrl(model), SIZES)

    def at_sizes() -> list[float]:
        embedded = [pool_layers(*all_layers(model, TEXTS[k:] + TEXTS[:k]), pooling="mean") for k in range(2)]
        given = losses.MultipleNegativesRankingLoss(Given())
        return [given([each[n, :, :d] for each in embedded], None).item() for n, d in SIZES]

    before = at_sizes()
    train(model, loss, tmp_path, steps=15)
    assert all(after < was for after, was in zip(at_sizes(), before, strict=True))
    small = extract_submodel(model, 1, 4)  # the model now knows its trainer, which must not be copied
    assert small.encode(TEXTS).shape == (4, 4)
    small.save_pretrained(str(tmp_path / "small"))
