import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import ndcg_score
from torchmetrics.functional.retrieval import retrieval_normalized_dcg, retrieval_reciprocal_rank

from firsthand import Trial, data
from firsthand.testbeds import retrieval
from firsthand.testbeds.retrieval import Encoder, Pairs, World

NOUNS = ["array", "graph", "matrix", "tree", "queue", "table", "image", "signal", "stream", "model"]
VERBS = ["sort", "merge", "invert", "scale", "rotate", "print", "close", "fit", "plot", "cut"]


def some_pairs() -> Pairs:
    """A hundred sentences, every third of them of two functions."""
    sentences = [f"{verb} the {noun} that is given." for verb in VERBS for noun in NOUNS]
    codes = [f"def {verb}_{noun}(x):\n    return x.{verb}()" for verb in VERBS for noun in NOUNS]
    again = range(0, 100, 3)
    return Pairs(
        sentences + [sentences[row].upper() for row in again],
        codes + [codes[row].replace("x", "y") for row in again],
        np.array([*range(100), *again]),
    )


# --- pairs ----------------------------------------------------------------------------------------------------------------


def test_same_sentence_but_for_case_and_punctuation(monkeypatch):
    records = [
        {"sentence": "Fit the model to X.", "code": "def fit(): a"},
        {"sentence": "fit the  model, to x", "code": "def fit(): b"},
        {"sentence": "Fit the model to Y.", "code": "def fit(): c"},
        {"sentence": "FIT THE MODEL TO X!", "code": "def fit(): a"},  # a copy of the first
    ]
    monkeypatch.setattr(data, "load", lambda name, **options: records)
    found = retrieval.pairs()
    assert found.codes == ["def fit(): a", "def fit(): b", "def fit(): c"]
    assert found.groups.tolist() == [0, 0, 1]
    assert found.sentences[0] == "Fit the model to X."


@pytest.mark.parametrize("repeated", [0.0, 0.5])
def test_no_sentence_is_on_both_sides(repeated):
    everything = some_pairs()
    train, test = retrieval.split(everything, np.random.default_rng(0), train=30, test=20, repeated=repeated)
    assert len(train) == 30
    assert len(set(test.groups)) == 20
    assert not set(train.groups) & set(test.groups)
    for side in (train, test):  # all functions of a sentence, each once
        expected = [code for code, group in zip(everything.codes, everything.groups, strict=True) if group in side.groups]
        assert sorted(side.codes) == sorted(expected)
    _, count = np.unique(train.groups, return_counts=True)
    assert count[count > 1].sum() == pytest.approx(30 * repeated, abs=1)


def test_split_follows_the_generator():
    draw = lambda seed: retrieval.split(some_pairs(), np.random.default_rng(seed), train=30, test=20, repeated=0.3)  # noqa: E731
    assert draw(0)[0].codes == draw(0)[0].codes
    assert draw(0)[1].codes != draw(1)[1].codes


@pytest.mark.parametrize("sizes", [(200, 10, 0.1), (10, 101, 0.0), (80, 10, 0.9), (90, 10, 0.0)])
def test_not_enough_pairs(sizes):
    train, test, repeated = sizes
    with pytest.raises(ValueError, match=rf"134 pairs of 100 sentences.*train={train}, test={test}, repeated={repeated}"):
        retrieval.split(some_pairs(), np.random.default_rng(0), train=train, test=test, repeated=repeated)


# --- batches --------------------------------------------------------------------------------------------------------------


def test_batches_that_keep_a_sentence_together():
    groups = np.repeat(np.arange(20), 4)
    made = retrieval.batches(groups, np.random.default_rng(0), size=8, steps=25, together=True)
    assert len(made) == 25
    for rows in made:
        assert len(set(groups[rows])) == 2
    assert torch.cat(made[:10]).sort().values.equal(torch.arange(80))  # a pass
    assert not torch.cat(made[:10]).equal(torch.cat(made[10:20]))


def test_batches_that_keep_a_sentence_apart():
    groups = np.repeat(np.arange(20), 4)
    made = retrieval.batches(groups, np.random.default_rng(0), size=8, steps=30, together=False)
    assert len(made) == 30
    for rows in made:
        assert len(set(groups[rows])) == 8


@pytest.mark.parametrize("together", [True, False])
def test_batches_too_large(together):
    with pytest.raises(ValueError, match="make no batch of 9"):
        retrieval.batches(np.arange(8), np.random.default_rng(0), size=9, steps=1, together=together)


# --- metrics --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranked():
    generator = torch.Generator().manual_seed(0)
    relevant = torch.rand(30, 40, generator=generator) < 0.1
    relevant[:, 3] = True
    return torch.randn(30, 40, generator=generator), relevant


@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_metrics_agree_with_libraries(ranked, k):
    scores, relevant = ranked
    found = retrieval.ndcg(scores, relevant, k)
    expected = [ndcg_score(wanted[None].numpy(), row[None].numpy(), k=k) for row, wanted in zip(scores, relevant, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected).float())
    above_zero = scores.exp()  # torchmetrics takes no document below
    for metric, theirs in (
        (found, retrieval_normalized_dcg),
        (retrieval.reciprocal_rank(scores, relevant, k), retrieval_reciprocal_rank),
    ):
        each = [theirs(row, wanted, top_k=k) for row, wanted in zip(above_zero, relevant, strict=True)]
        torch.testing.assert_close(metric, torch.stack(each))


def test_metrics_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    relevant = torch.tensor([[False, True, False, True]])
    assert retrieval.reciprocal_rank(scores, relevant, 4).item() == 0.5
    assert retrieval.reciprocal_rank(scores, relevant, 1).item() == 0
    best = 1 + 1 / math.log2(3)
    assert retrieval.ndcg(scores, relevant, 4).item() == pytest.approx((1 / math.log2(3) + 1 / math.log2(5)) / best)
    assert retrieval.ndcg(scores.flip(1), relevant, 1).item() == 1


def test_bad_metrics(ranked):
    scores, relevant = ranked
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        retrieval.ndcg(scores, relevant, 0)
    with pytest.raises(ValueError, match="relevant must have a document for every query, got none for 30"):
        retrieval.reciprocal_rank(scores, torch.zeros_like(relevant), 10)


# --- the encoder ----------------------------------------------------------------------------------------------------------


def test_sentences_and_code_share_their_tokens():
    pytest.importorskip("tokenizers")
    pairs = some_pairs()
    texts = [*pairs.sentences, *pairs.codes]
    learnt = retrieval.tokenizer(texts, 200)
    assert learnt.get_vocab() == retrieval.tokenizer(texts, 200).get_vocab()
    sentence, code = retrieval.tokens(learnt, ["Rotate the Matrix.", "def rotate_matrix(x):"], 8)
    shared = set(sentence.tolist()) & set(code.tolist())
    assert {learnt.id_to_token(token) for token in shared if token} == {"rotate", "matrix"}
    assert retrieval.tokens(learnt, ["cut", "cut the image that is given"], 3)[:, 1:].tolist()[0] == [0, 0]


@pytest.fixture
def world() -> World:
    pytest.importorskip("transformers")
    train, test = retrieval.split(some_pairs(), np.random.default_rng(0), train=60, test=20, repeated=0.4)
    learnt = retrieval.tokenizer([*train.sentences, *train.codes], 200)
    groups, first = np.unique(test.groups, return_index=True)
    return World(
        train=train,
        sentences=retrieval.tokens(learnt, train.sentences, 12),
        codes=retrieval.tokens(learnt, train.codes, 20),
        test=test,
        queries=retrieval.tokens(learnt, [test.sentences[row] for row in first], 12),
        documents=retrieval.tokens(learnt, test.codes, 20),
        relevant=torch.from_numpy(groups[:, None] == test.groups),
        vocab=200,
    )


def test_padding_does_not_change_an_embedding(world):
    encoder = Encoder(torch.Generator().manual_seed(0), 200, width=16).eval()
    together = encoder(world.codes[:5])
    for row, expected in zip(world.codes[:5], together, strict=True):
        torch.testing.assert_close(encoder(row[None])[0], expected)


def test_initial_weights_come_from_the_generator(world):
    state = torch.get_rng_state()
    first, same, other = (Encoder(torch.Generator().manual_seed(seed), 200, width=16).state_dict() for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(state)
    assert all(first[name].equal(same[name]) for name in first)
    assert not all(first[name].equal(other[name]) for name in first)


def in_batch(sentences, codes, rows):
    return F.cross_entropy(F.normalize(sentences) @ F.normalize(codes).T / 0.1, torch.arange(len(rows)))


def trained(world, loss):
    trial = Trial(seed=1)
    encoder = Encoder(trial.generator, world.vocab, width=32)
    before = retrieval.score(encoder, world)
    steps = retrieval.batches(world.train.groups, trial.rng, size=20, steps=40, together=False)
    retrieval.fit(encoder, world, loss, steps, lr=5e-3, trial=trial, look=10)
    return before, retrieval.score(encoder, world), trial.curves["ndcg@10"]


def test_training_teaches_to_search_and_can_be_repeated(world):
    before, after, curve = trained(world, in_batch)
    assert after["ndcg@10"] > before["ndcg@10"] + 0.1
    assert after["mrr@10"] > before["mrr@10"]
    assert [step for step, _ in curve] == [10, 20, 30, 40]
    assert curve[-1][1] == after["ndcg@10"]
    assert trained(world, in_batch) == (before, after, curve)


def test_the_loss_is_told_the_rows(world):
    seen = []

    def loss(sentences, codes, rows):
        seen.append(rows)
        return in_batch(sentences, codes, rows)

    trained(world, loss)
    expected = retrieval.batches(world.train.groups, Trial(seed=1).rng, size=20, steps=40, together=False)
    assert all(map(torch.equal, seen, expected))


# --- guides ---------------------------------------------------------------------------------------------------------------


def test_words_in_common_make_texts_alike():
    texts = ["sort the array", "sort the old array", "close a queue", "def close_queue(): queue"]
    vectors = retrieval.tfidf(texts)
    assert vectors.dtype == torch.float32
    cosines = vectors @ vectors.T
    torch.testing.assert_close(cosines.diagonal(), torch.ones(4))
    assert cosines[0, 1] > 0.9
    assert cosines[2, 3] > 0.9
    assert cosines[0, 2] == 0


@pytest.mark.skipif(not data.available("minilm"), reason="the model is not installed")
def test_minilm_knows_what_words_mean():
    texts = ["a cat sleeps", "a kitten naps", "the stock market fell", "a cat sleeps"]
    embeddings = retrieval.minilm(texts)
    assert embeddings[0].equal(embeddings[3])
    cosines = embeddings @ embeddings.T
    assert cosines[0, 1] > cosines[0, 2] + 0.3
    cut = retrieval.minilm(["one two three", "one two three four five"], length=5)  # [CLS], three tokens, [SEP]
    torch.testing.assert_close(cut[0], cut[1], atol=1e-5, rtol=0)
