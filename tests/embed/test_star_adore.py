import json
import math
import subprocess
import sys
import textwrap

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.embed.adore import ADORELoss, adore_loss, rank_weights
from firsthand.embed.hard_negatives import (
    NegativeRefresh,
    draw_negatives,
    mine_static_negatives,
    nearest_documents,
    ranking_error_profile,
    refresh_corpus,
    relevant_ids,
)
from firsthand.embed.star import STARLoss, pairwise_negatives_loss, star_loss

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"query": random(5, 8, seed=1), "positive": random(5, 8, seed=2), "hard": random(5, 3, 8, seed=3)}


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- STAR -----------------------------------------------------------------------------------------------------------------


def pair(positive: float, negative: float) -> float:
    return -math.log(math.exp(positive) / (math.exp(positive) + math.exp(negative)))


def test_one_valid_pair_is_its_own_loss():
    query, positive, hard = torch.eye(2), torch.tensor([[0.7, 0.1], [0.3, 0.2]]), torch.tensor([[[0.5, 9.0]], [[9.0, 9.0]]])
    none, one = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([[True, False], [False, False]])
    loss = star_loss(query, positive, hard, valid_random=none, valid_hard=one)
    assert loss.item() == pytest.approx(pair(0.7, 0.5))
    loss = star_loss(query, positive, hard, valid_random=one.T.roll(1, 0), valid_hard=none)  # row 1 with positive 0
    assert loss.item() == pytest.approx(pair(0.2, 0.1))


def test_every_pair_weighs_the_same(batch):
    """The definition, as a loop over pairs."""
    query, positive, hard = batch["query"], batch["positive"], batch["hard"]
    flat = hard.reshape(-1, 8)
    valid_random = (random(5, 5, seed=4) > 0).fill_diagonal_(False)
    valid_hard = random(5, 15, seed=5) > 0
    losses = {0: [], 1: []}
    for i in range(5):
        own = float(query[i] @ positive[i])
        losses[0] += [pair(own, float(query[i] @ positive[j])) for j in range(5) if valid_random[i, j]]
        losses[1] += [pair(own, float(query[i] @ flat[c])) for c in range(15) if valid_hard[i, c]]
    for alpha in (1.0, 0.3, 0.0):
        expected = (alpha * sum(losses[0]) + sum(losses[1])) / (alpha * len(losses[0]) + len(losses[1]))
        loss = star_loss(**batch, valid_random=valid_random, valid_hard=valid_hard, alpha=alpha)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_without_hard_negatives_it_is_pairwise_with_the_other_positives(batch):
    query, positive = batch["query"], batch["positive"]
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    expected = pairwise_negatives_loss(query, positive, positive, off_diagonal)
    torch.testing.assert_close(star_loss(query, positive), expected)
    torch.testing.assert_close(star_loss(query, positive, random(5, 0, 8)), expected)


def test_alpha_0_leaves_the_hard_pairs(batch):
    expected = pairwise_negatives_loss(batch["query"], batch["positive"], batch["hard"].flatten(0, 1))
    torch.testing.assert_close(star_loss(**batch, alpha=0.0), expected)


def test_own_and_shared_negatives_agree_where_they_are_the_same(batch):
    shared = random(4, 8, seed=6)
    own = shared.expand(5, 4, 8)
    valid = random(5, 4, seed=7) > 0
    expected = pairwise_negatives_loss(batch["query"], batch["positive"], shared, valid)
    torch.testing.assert_close(pairwise_negatives_loss(batch["query"], batch["positive"], own, valid), expected)


def test_a_masked_pair_costs_nothing_and_pulls_at_nothing(batch):
    hard = batch["hard"].requires_grad_()
    valid = torch.ones(5, 15, dtype=torch.bool)
    valid[:, 4] = False  # the second of row 1
    loss = star_loss(**batch, valid_hard=valid)
    (gradient,) = torch.autograd.grad(loss, hard)
    assert not gradient[1, 1].any()
    far = hard.detach().clone()
    far[1, 1] = 1e30  # nor where it would be infinite
    torch.testing.assert_close(star_loss(batch["query"], batch["positive"], far, valid_hard=valid), loss)


def test_nothing_valid_costs_nothing(batch):
    query = batch["query"].requires_grad_()
    nothing = torch.zeros(5, 5, dtype=torch.bool)
    loss = star_loss(query, batch["positive"], valid_random=nothing)
    assert loss == 0
    assert not torch.autograd.grad(loss, query)[0].any()
    assert star_loss(query[:1], batch["positive"][:1]) == 0  # one pair, and nothing beside it


def test_reductions_and_order(batch):
    losses = star_loss(**batch, reduction="none")
    torch.testing.assert_close(star_loss(**batch, reduction="sum"), losses.sum())
    torch.testing.assert_close(star_loss(**batch), losses.sum() / (5 * 4 + 5 * 15))
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(star_loss(**permuted, reduction="none"), losses[order])


def test_gradient_numerically(batch):
    inputs = [value.double().requires_grad_() for value in batch.values()]
    assert torch.autograd.gradcheck(star_loss, inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_follows_the_input_and_computes_in_float32(batch, device):
    half = {name: value.to(device, torch.bfloat16) for name, value in batch.items()}
    loss = star_loss(**half)
    assert loss.dtype == torch.bfloat16
    assert loss.device.type == device
    expected = star_loss(**{name: value.float() for name, value in half.items()})
    torch.testing.assert_close(loss, expected.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(star_loss(**{name: value.float() for name, value in half.items()}), expected)


def test_star_compiles_into_one_graph(batch, unchecked):
    compiled = torch.compile(star_loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch), star_loss(**batch))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": random(4, 8)}, r"positive must have shape \(5, 8\) like query, got \(4, 8\)"),
        ({"query": random(8)}, r"query must be floating point, of shape \(B, d\)"),
        ({"query": torch.ones(5, 8, dtype=torch.long)}, "query must be floating point"),
        ({"hard": random(5, 8)}, r"hard must have shape \(5, K, 8\), got \(5, 8\)"),
        ({"valid_random": torch.ones(5, 5, dtype=torch.bool)}, "valid_random must be false on the diagonal"),
        ({"valid_random": torch.ones(4, 5, dtype=torch.bool)}, r"valid_random must be boolean of shape \(5, 5\)"),
        ({"valid_hard": torch.ones(5, 15)}, r"valid_hard must be boolean of shape \(5, 15\), got torch.float32"),
        ({"alpha": -1.0}, "alpha must be at least 0 and finite, got -1.0"),
        ({"alpha": float("nan")}, "alpha"),
        ({"reduction": "max"}, "reduction must be"),
    ],
)
def test_bad_input_to_star(batch, unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        star_loss(**batch | change)


def test_bad_input_to_pairwise(batch, unchecked):
    with pytest.raises(ValueError, match=r"negatives must have shape \(5, K, 8\)"):
        pairwise_negatives_loss(batch["query"], batch["positive"], random(4, 2, 8))
    with pytest.raises(ValueError, match="reduction must be"):
        pairwise_negatives_loss(batch["query"], batch["positive"], random(4, 8), reduction="max")


# --- mining ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> dict:
    """Six queries and fifty documents; some queries have several relevant ones."""
    return {
        "query": random(6, 8, seed=10),
        "corpus": random(50, 8, seed=11),
        "relevant": [[3], [7, 2], [49], [0, 1, 5], [20], [20]],
    }


def test_search_in_blocks_is_search(world, monkeypatch):
    expected = (world["query"] @ world["corpus"].T).topk(10).indices
    assert nearest_documents(world["query"], world["corpus"], 10).equal(expected)
    monkeypatch.setattr("firsthand.embed.hard_negatives.BLOCK", (4, 7))
    assert nearest_documents(world["query"], world["corpus"], 10).equal(expected)


def test_search_in_faiss_and_by_a_function(world):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(8)
    index.add(world["corpus"].numpy())
    expected = nearest_documents(world["query"], world["corpus"], 10)
    assert nearest_documents(world["query"], world["corpus"], 10, index).equal(expected)
    assert nearest_documents(world["query"], world["corpus"], 10, lambda query, k: expected).equal(expected)


def test_mined_negatives_are_the_nearest_irrelevant_ones(world):
    mined = mine_static_negatives(**world, topk=10)
    ranking = (world["query"] @ world["corpus"].T).argsort(dim=1, descending=True)
    for ids, row, known in zip(mined.tolist(), ranking.tolist(), world["relevant"], strict=True):
        assert ids == [number for number in row if number not in known][:10]


def test_mining_all_there_is_fills_up(world):
    mined = mine_static_negatives(**world, topk=60)
    for ids, known in zip(mined.tolist(), world["relevant"], strict=True):
        there = 50 - len(known)
        assert sorted(ids[:there]) == sorted(set(range(50)) - set(known))
        assert ids[there:] == [-1] * (60 - there)


def test_an_approximate_index_that_finds_less(world):
    faiss = pytest.importorskip("faiss")
    quantizer = faiss.IndexFlatIP(8)
    index = faiss.IndexIVFFlat(quantizer, 8, 5, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(world["corpus"].numpy())
    index.add(world["corpus"].numpy())  # it looks into one cell of five
    mined = mine_static_negatives(**world, topk=30, index=index)
    assert (mined == -1).any()
    for ids, known in zip(mined, world["relevant"], strict=True):
        found = ids[ids >= 0].tolist()
        assert len(found) == len(set(found))
        assert not set(found) & set(known)
    loss, lists = adore_loss(world["query"], world["corpus"], world["relevant"], topk=30, index=index, return_details=True)
    expected = [brute_force(q, world["corpus"], known, [i for i in ids.tolist() if i >= 0], None)
                for q, known, ids in zip(world["query"], world["relevant"], lists["ids"], strict=True)]  # fmt: skip
    assert loss.item() == pytest.approx(sum(expected) / 6, rel=1e-4)


def test_draws_are_uniform_and_without_repetition():
    mined = torch.tensor([[5, 6, 7, -1], [1, 2, 3, 4]])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([draw_negatives(mined, torch.tensor([0, 1, 0]), 2, generator) for _ in range(600)])
    assert (drawn[..., 0] != drawn[..., 1]).all()
    counts = torch.bincount(drawn[:, 0].flatten(), minlength=8)
    assert counts[:5].sum() == 0
    np.testing.assert_allclose(counts[5:] / 1200, 1 / 3, atol=0.05)
    with pytest.raises(ValueError, match="count must be from 1 to the number of negatives each query has, got 4"):
        draw_negatives(mined, torch.tensor([0, 1]), 4)


def test_relevant_ids_are_each_there_once():
    assert relevant_ids([[3, 1, 3], [2]], 2, 5).tolist() == [[1, 3], [2, -1]]
    assert relevant_ids(torch.tensor([[-1, 3, 1, 3], [2, -1, -1, -1]]), 2, 5).tolist() == [[1, 3], [2, -1]]


def test_wrong_pairs_counted_by_hand():
    query, corpus = torch.ones(3, 1), torch.arange(10.0)[:, None]  # document 9 comes first
    errors = ranking_error_profile(query, corpus, [[9], [5], [8, 0]], topk=3)
    assert errors["pairwise"].tolist() == [0, 4, 1 + 8]
    assert errors["top"].tolist() == [0, 3, 1 + 2]  # of 9, 8 and 7 the second is relevant


def test_corpus_is_encoded_in_parts_and_checked():
    encode = lambda texts: np.array([[len(text), 1.0] for text in texts])  # noqa: E731
    assert refresh_corpus(encode, ["a", "bb", "ccc"], batch_size=2).tolist() == [[1, 1], [2, 1], [3, 1]]
    with pytest.raises(ValueError, match="encode must return a finite vector for each of 2 texts"):
        refresh_corpus(lambda texts: np.full((len(texts), 2), np.nan), ["a", "b"])
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        refresh_corpus(encode, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevant": [[3], [7], [49], [0], [20]]}, "relevant must have a list for each of 6 queries, got 5"),
        ({"relevant": [[3], [], [49], [0], [20], [20]]}, "relevant must name a document for every query, got none for 1 of 6"),
        ({"relevant": [[]] * 6}, "relevant must name a document for every query"),
        ({"relevant": [[3], [50], [49], [0], [20], [20]]}, "relevant must hold ids below 50, got -?[01] to 50"),
        ({"relevant": [[3], [-2], [49], [0], [20], [20]]}, "relevant must hold ids of at least 0"),
        ({"corpus": random(50, 7)}, r"corpus must have shape \(documents, 8\) like query, got \(50, 7\)"),
        ({"topk": 0}, "topk must be at least 1|k must be at least 1"),
    ],
)
@pytest.mark.parametrize("function", [mine_static_negatives, adore_loss])
def test_bad_input_to_mining_and_adore(world, unchecked, function, change, message):
    with pytest.raises(ValueError, match=message):
        function(**world | change)


def test_an_index_of_something_else(world, unchecked):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(8)
    index.add(world["corpus"][:40].numpy())
    with pytest.raises(ValueError, match="index must hold the 50 documents of corpus, got 40"):
        nearest_documents(world["query"], world["corpus"], 5, index)
    with pytest.raises(ValueError, match=r"index must return integer ids below 50 of shape \(6, 5\)"):
        nearest_documents(world["query"], world["corpus"], 5, lambda query, k: torch.full((6, 5), 50))
    with pytest.warns(UserWarning, match="k = 51 is more than the 50 documents"):
        assert nearest_documents(world["query"], world["corpus"], 51).shape == (6, 50)


# --- ADORE ----------------------------------------------------------------------------------------------------------------


def brute_force(query, corpus, relevant, ids, cut) -> float:
    """The loss of one query, pair by pair."""
    relevant, ids = set(relevant), list(ids)
    if not relevant & set(ids):
        ids += sorted(relevant)
    value = [1 / rank if cut is None or rank <= cut else 0 for rank in range(1, len(ids) + 1)]
    losses = []
    for a, this in enumerate(ids):
        for b, other in enumerate(ids):
            if this in relevant and other not in relevant:
                losses.append(abs(value[a] - value[b]) * pair(float(query @ corpus[this]), float(query @ corpus[other])))
    return sum(losses) / max(1, len(losses))


@pytest.mark.parametrize("topk", [1, 5, 20, 50])
@pytest.mark.parametrize("cut", [None, 3])
def test_adore_is_the_double_loop_over_pairs(world, topk, cut):
    query, corpus, relevant = world.values()
    ranking = (query @ corpus.T).argsort(dim=1, descending=True)[:, :topk].tolist()
    expected = [brute_force(*rows, cut) for rows in zip(query, [corpus] * 6, relevant, ranking, strict=True)]
    loss, details = adore_loss(**world, topk=topk, metric_cut=cut, return_details=True)
    assert loss.item() == pytest.approx(sum(expected) / 6, rel=1e-5)
    single = [adore_loss(query[i : i + 1], corpus, relevant[i : i + 1], topk=topk, metric_cut=cut).item() for i in range(6)]
    np.testing.assert_allclose(single, expected, rtol=1e-4, atol=1e-7)
    for ids, hits, known in zip(details["ids"], details["relevant"], relevant, strict=True):
        assert set(ids[hits].tolist()) <= set(known)
        assert hits.any()  # what is missed joins the list
    padded = torch.tensor([known + known[:1] + [-1] * (3 - len(known)) for known in relevant])  # one of them twice
    torch.testing.assert_close(adore_loss(query, corpus, padded, topk=topk, metric_cut=cut), loss)


def test_relevant_first_and_far_ahead_costs_nothing():
    corpus = torch.eye(4)
    assert adore_loss(60 * corpus[:1], corpus, [[0]], topk=4).item() == pytest.approx(0, abs=1e-12)
    assert adore_loss(corpus[:1], corpus, [[0, 1, 2, 3]], topk=4) == 0  # and so does a list without wrong documents


@pytest.mark.parametrize("own", [-3.0, 1.5, 4.5, 12.0])
def test_every_list_pushes_its_relevant_document_up_and_the_others_down(own):
    corpus = torch.diag(torch.arange(1.0, 9.0))  # a query of ones scores document i with i + 1
    query = torch.ones(1, 8)
    query[0, 0] = own
    loss = adore_loss(query.requires_grad_(), corpus, [[0]], topk=8)
    (gradient,) = torch.autograd.grad(loss, query)
    assert gradient[0, 0] < 0
    assert (gradient[0, 1:] > 0).all()


def test_rank_weights():
    assert rank_weights(torch.tensor(1), torch.tensor(2)).item() == 0.5
    assert rank_weights(torch.tensor(4), torch.tensor(9), metric_cut=3).item() == 0
    assert rank_weights(torch.tensor([2, 4]), torch.tensor([4, 2]), metric_cut=3).tolist() == [0.5, 0.5]


def test_gradient_goes_to_queries_alone(world):
    query = world["query"].requires_grad_()
    loss = adore_loss(**world, topk=10)
    loss.backward()
    assert query.grad.isfinite().all()
    assert query.grad.any()
    assert world["corpus"].grad is None
    with pytest.raises(ValueError, match="corpus must not want a gradient"):
        adore_loss(world["query"], world["corpus"].clone().requires_grad_(), world["relevant"])


def test_adore_gradient_numerically(world):
    query, corpus = world["query"].double().requires_grad_(), world["corpus"].double()
    assert torch.autograd.gradcheck(lambda q: adore_loss(q, corpus, world["relevant"], topk=10), query)


@pytest.mark.parametrize("device", DEVICES)
def test_adore_in_half_precision(world, device):
    query, corpus = world["query"].to(device, torch.bfloat16), world["corpus"].to(device, torch.bfloat16)
    loss = adore_loss(query, corpus, world["relevant"], topk=10)
    assert loss.dtype == torch.bfloat16
    expected = adore_loss(query.float(), corpus.float(), world["relevant"], topk=10)
    torch.testing.assert_close(loss, expected.bfloat16())
    with torch.autocast(device, dtype=torch.bfloat16):
        torch.testing.assert_close(adore_loss(query.float(), corpus.float(), world["relevant"], topk=10), expected)
    corpus = corpus.cpu().float()  # a corpus that stays where it is
    torch.testing.assert_close(adore_loss(query.float(), corpus, world["relevant"], topk=10), expected)


def test_metric_cut_out_of_range(world):
    with pytest.raises(ValueError, match="metric_cut must be at least 1, or None, got 0"):
        adore_loss(**world, topk=10, metric_cut=0)


# --- inside sentence-transformers -----------------------------------------------------------------------------------------

WORDS = ["cat", "dog", "bird", "fish", "runs", "sleeps", "eats", "flies", "red", "green", "blue", "old"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny BERT of random weights and a tokenizer that knows a dozen words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_model(bert):
    st = pytest.importorskip("sentence_transformers")

    def make():
        transformer = st.sentence_transformer.modules.Transformer(bert)
        pooling = st.sentence_transformer.modules.Pooling(16, pooling_mode="mean")
        return st.SentenceTransformer(modules=[transformer, pooling], device="cpu")

    return make


QUERIES = [f"{one} {two}" for one in WORDS[:4] for two in WORDS[4:8]]
DOCUMENTS = [f"{colour} {query}" for colour in WORDS[8:] for query in QUERIES]  # the relevant one is red
RELEVANT = [[row] for row in range(16)]


@pytest.fixture
def pairs():
    datasets = pytest.importorskip("datasets")
    columns = {"query": QUERIES, "document": DOCUMENTS[:16], "label": [[row, row] for row in range(16)]}
    return datasets.Dataset.from_dict(columns)


def train(model, dataset, loss, folder, callbacks=(), resume=None, **options):
    st = pytest.importorskip("sentence_transformers")
    options = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 3} | options
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **options),
        train_dataset=dataset,
        loss=loss,
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def refreshing(model, every=3, **options):
    refresh = NegativeRefresh(QUERIES, DOCUMENTS, RELEVANT, every, topk=10, **options)
    return STARLoss(model, negatives=refresh), refresh


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first: dict, second: dict) -> bool:
    return all(map(torch.equal, first.values(), second.values()))


def test_negatives_are_refreshed_while_training_and_resuming_is_exact(make_model, pairs, tmp_path):
    mined = {}

    class Watched(NegativeRefresh):
        def mine(self, model):
            super().mine(model)
            mined[len(mined)] = self.mined.clone()

    model = make_model()
    refresh = Watched(QUERIES, DOCUMENTS, RELEVANT, every=3, topk=10, hard=2)
    train(model, pairs, STARLoss(model, negatives=refresh), tmp_path / "whole", [refresh], save_steps=4)
    assert len(mined) == 3  # at the beginning, after 3 and after 6
    assert not mined[0].equal(mined[1])
    assert not mined[1].equal(mined[2])
    whole = weights(model)

    def resumed(checkpoint, seed=0):
        model = make_model()
        loss, refresh = refreshing(model, hard=2, seed=seed)
        train(model, pairs, loss, tmp_path / "whole", [refresh], resume=tmp_path / "whole" / checkpoint, save_steps=100)
        return weights(model), refresh

    again, refresh = resumed("checkpoint-4")  # between two refreshes, in the middle of no epoch
    assert same(again, whole)
    assert refresh.step == 6
    assert refresh.mined.equal(mined[2])

    # The test can fail: with the negatives of the beginning instead, the run is another one.
    from safetensors.torch import load_file, save_file

    kept = tmp_path / "whole" / "checkpoint-4" / "negatives.safetensors"
    state = load_file(kept)
    save_file(state | {"mined": mined[0].int()}, kept)
    assert not same(resumed("checkpoint-4")[0], whole)
    kept.unlink()
    with pytest.raises(ValueError, match=r"to resume at step 4, .*negatives\.safetensors must be there"):
        resumed("checkpoint-4")


def test_resuming_in_the_middle_of_an_epoch_right_after_a_refresh(make_model, pairs, tmp_path):
    """The data loader has read a batch ahead by then; its negatives must be new all the same."""
    runs = []
    for resume in (None, tmp_path / "run" / "checkpoint-3"):
        model = make_model()
        loss, refresh = refreshing(model)
        train(model, pairs, loss, tmp_path / "run", [refresh], resume=resume, save_steps=3)
        runs.append(weights(model))
    assert same(*runs)


def test_mined_once_the_negatives_stay(make_model, pairs, tmp_path):
    model = make_model()
    loss, refresh = refreshing(model, every=None)
    before = mine_static_negatives(torch.tensor(model.encode(QUERIES)), torch.tensor(model.encode(DOCUMENTS)), RELEVANT, topk=10)
    train(model, pairs, loss, tmp_path, [refresh], save_strategy="no")
    assert refresh.mined.equal(before)


def test_refresh_builds_its_index_anew(make_model):
    faiss = pytest.importorskip("faiss")
    built = []

    def build(corpus):
        index = faiss.IndexFlatIP(corpus.shape[1])
        index.add(corpus.numpy())
        built.append(index)
        return index

    model = make_model().train()
    exact, searched = refreshing(model)[1], refreshing(model, index=build)[1]
    exact.mine(model)
    searched.mine(model)
    assert len(built) == 1
    assert searched.mined.sort(dim=1).values.equal(exact.mined.sort(dim=1).values)
    assert model.training


def test_state_of_the_draws_goes_on(make_model):
    model = make_model()
    refresh = refreshing(model)[1]
    with pytest.raises(ValueError, match="nothing is mined yet"):
        refresh.draw(torch.tensor([0]))
    refresh.mine(model)
    rows = torch.arange(16)
    refresh.draw(rows)
    state = {name: value.clone() for name, value in refresh.state_dict().items()}
    expected = [refresh.draw(rows) for _ in range(3)]
    other = refreshing(model, seed=9)[1]
    other.load_state_dict(state)
    assert all(map(torch.equal, expected, [other.draw(rows) for _ in range(3)]))
    assert other.draw(rows, training=False).equal(refresh.mined[:, :1])  # evaluation draws nothing
    elsewhere = NegativeRefresh(QUERIES, DOCUMENTS, RELEVANT, topk=5)
    with pytest.raises(ValueError, match=r"state must hold ids of shape \(16, 5\)"):
        elsewhere.load_state_dict(state)


def features_of(model, *columns):
    return [model.preprocess(list(column)) for column in columns]


def test_star_loss_of_columns_is_star_loss_of_embeddings(make_model):
    model = make_model().eval()
    negatives = [DOCUMENTS[17:33], DOCUMENTS[33:49]]
    columns = [QUERIES, DOCUMENTS[:16], *negatives]
    query, positive, *hard = (torch.tensor(model.encode(list(column))) for column in columns)
    hard = torch.stack(hard, dim=1)
    relevant = [[row, 33] for row in range(16)]  # document 33 is everyone's answer
    labels = torch.tensor([[row, row, 17 + row, 33 + row] for row in range(16)])
    valid = (labels[:, 2:] != 33).flatten().expand(16, -1)
    expected = star_loss(2 * query, positive, hard, valid_hard=valid, alpha=0.5)
    loss = STARLoss(model, relevant, alpha=0.5, scale=2.0)(features_of(model, *columns), labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    unlabelled = STARLoss(model)(features_of(model, *columns), None)
    torch.testing.assert_close(unlabelled, star_loss(query, positive, hard), atol=1e-5, rtol=1e-4)


def test_star_loss_draws_from_what_is_mined(make_model):
    model = make_model().eval()
    loss, refresh = refreshing(model, hard=2)
    refresh.mine(model)
    labels = torch.tensor([[row, row] for row in range(16)])
    query, positive = (torch.tensor(model.encode(list(column))) for column in (QUERIES, DOCUMENTS[:16]))
    nearest = refresh.mined[:, :2]
    hard = torch.tensor(model.encode(DOCUMENTS))[nearest]
    valid_hard = nearest.flatten()[None] != torch.arange(16)[:, None]
    expected = star_loss(query, positive, hard, valid_hard=valid_hard)
    value = loss(features_of(model, QUERIES, DOCUMENTS[:16]), labels)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


def test_adore_trains_in_the_trainer_and_resumes(make_model, tmp_path):
    datasets = pytest.importorskip("datasets")
    labels = [[row, 16 + row] if row % 2 else [row, -1] for row in range(16)]
    queries = datasets.Dataset.from_dict({"query": QUERIES, "label": labels})
    documents = make_model()
    corpus = refresh_corpus(documents.encode_document, DOCUMENTS)

    def errors(model):
        return ranking_error_profile(torch.tensor(model.encode(QUERIES)), corpus, torch.tensor(labels))["top"].mean().item()

    def run(resume=None):
        model = make_model()
        loss = ADORELoss(model, corpus, topk=64)
        train(model, queries, loss, tmp_path, resume=resume, save_steps=5, max_steps=24, learning_rate=1e-2)
        return model

    whole = run()
    assert errors(whole) < errors(make_model())
    assert same(weights(run(tmp_path / "checkpoint-5")), weights(whole))
    assert same(weights(documents), weights(make_model()))
    card = (tmp_path / "checkpoint-5" / "README.md").read_text()
    assert "ADORELoss" in card
    assert '"topk": 64' in card


@pytest.mark.filterwarnings("ignore:.*SwigPy|swigvarlink")
def test_minilm_trains_with_both_and_is_one_model_in_a_fresh_process(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    from firsthand import data

    try:
        folder = str(data.load("minilm"))
    except Exception:
        pytest.skip("all-MiniLM-L6-v2 is not here")

    def minilm():
        model = st.SentenceTransformer(folder, device="cpu")
        model.pop(len(model) - 1)  # without Normalize
        return model

    questions = ["how do I sort a list?", "open a file", "parse JSON", "raise to a power"]
    answers = ["sorted(values)", "open(path)", "json.loads(text)", "pow(base, exponent)", "sum(values)", "json.dumps(value)"]
    pairs = datasets.Dataset.from_dict({"query": questions, "document": answers[:4], "label": [[i, i] for i in range(4)]})
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "save_strategy": "no"}

    both = minilm()
    refresh = NegativeRefresh(questions, answers, [[i] for i in range(4)], every=1, topk=2)
    train(both, pairs, STARLoss(both, negatives=refresh), tmp_path / "star", [refresh], **options)
    both.save_pretrained(str(tmp_path / "star"))
    query = st.SentenceTransformer(str(tmp_path / "star"), device="cpu")
    corpus = refresh_corpus(both.encode_document, answers)
    train(query, pairs.select_columns(["query", "label"]).map(lambda row: {"label": row["label"][:1]}),
          ADORELoss(query, corpus, topk=4), tmp_path / "adore", **options)  # fmt: skip

    router = st.sentence_transformer.modules.Router.for_query_document(list(query), list(both))
    st.SentenceTransformer(modules=[router], device="cpu").save_pretrained(str(tmp_path / "saved"))
    script = f"""
        import json
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer({str(tmp_path / "saved")!r}, device="cpu")
        print(json.dumps([model.encode_query({questions!r}).tolist(), model.encode_document({answers!r}).tolist()]))
    """
    fresh = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    queries, documents = json.loads(fresh.stdout.strip().splitlines()[-1])
    np.testing.assert_allclose(queries, query.encode(questions), atol=1e-5)
    np.testing.assert_allclose(documents, both.encode(answers), atol=1e-5)
    np.testing.assert_allclose(documents, corpus, atol=1e-5)  # ADORE left them alone
    assert np.abs(query.encode(questions) - both.encode(questions)).max() > 1e-4


def test_losses_say_what_they_need(make_model, unchecked):
    model = make_model()
    two = features_of(model, QUERIES, DOCUMENTS[:16])
    for labels in (None, torch.zeros(16, dtype=torch.long), torch.zeros(16, 3, dtype=torch.long), torch.zeros(16, 2)):
        with pytest.raises(ValueError, match="labels must hold the ids of the query and of 1 documents"):
            STARLoss(model, RELEVANT)(two, labels)
    with pytest.raises(ValueError, match="relevant must not be given with negatives"):
        STARLoss(model, RELEVANT, negatives=NegativeRefresh(QUERIES, DOCUMENTS, RELEVANT))
    for loss in (lambda **options: STARLoss(model, **options), lambda **options: ADORELoss(model, random(3, 2), **options)):
        with pytest.raises(ValueError, match="scale must be positive and finite, got 0"):
            loss(scale=0.0)
    adore = ADORELoss(model, random(64, 16))
    with pytest.raises(ValueError, match="ADORELoss needs one text column, the query, got 2"):
        adore(two, torch.zeros(16, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="labels must hold the ids of the documents relevant"):
        adore(two[:1], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, or None, got 0"),
        ({"hard": 0}, "hard must be from 1 to topk = 200, got 0"),
        ({"topk": 2, "hard": 3}, "hard must be from 1 to topk = 2, got 3"),
        ({"relevant": [[0]]}, "relevant must have a list for each of 16 queries, got 1"),
    ],
)
def test_bad_refresh(options, message):
    with pytest.raises(ValueError, match=message):
        NegativeRefresh(**{"queries": QUERIES, "documents": DOCUMENTS, "relevant": RELEVANT} | options)


def test_config_for_the_model_card():
    refresh = NegativeRefresh(QUERIES, DOCUMENTS, RELEVANT, every=5)
    config = STARLoss(nn.Identity(), negatives=refresh).get_config_dict()
    assert config == {"alpha": 1.0, "scale": 1.0, "negatives": {"every": 5, "topk": 200, "hard": 1}}
    assert STARLoss(nn.Identity()).get_config_dict()["negatives"] is None


def test_ranknet_is_binary_cross_entropy_of_the_margin(batch):
    query, positive = batch["query"], batch["positive"]
    scores = query @ positive.T
    margins = (scores.diagonal()[:, None] - scores)[~torch.eye(5, dtype=torch.bool)]
    expected = F.binary_cross_entropy_with_logits(margins, torch.ones(20))
    torch.testing.assert_close(star_loss(query, positive), expected)
