import numpy as np
import pytest
import torch

from firsthand.testbeds import text

SAMPLE = ["def f(x):\n    return x + 1\n", "Größe: 2 µm — naïve “quotes” 日本語 🙂\n", ""]


@pytest.fixture(scope="module")
def corpus():
    return text.documents("docs", "source")


@pytest.fixture(scope="module")
def bpe():
    return text.bpe_tokenizer(["the cat sat on the mat, the end. " * 50, "for i in range(10): print(i)\n" * 50], vocab=280)


@pytest.mark.parametrize("domain", ["topics", "docstrings", "source"])
def test_every_part_of_a_split_has_every_domain(corpus, domain):
    split = text.split(corpus, np.random.default_rng(0))
    for part in (split.train, split.validation, split.test):
        assert any(document["domain"] == domain for document in part)


def test_a_split_loses_and_repeats_nothing_and_keeps_the_shares(corpus):
    split = text.split(corpus, np.random.default_rng(0), validation=0.1, test=0.2)
    names = [(d["domain"], d["name"]) for part in (split.train, split.validation, split.test) for d in part]
    assert sorted(names) == sorted((d["domain"], d["name"]) for d in corpus)
    assert len(split.validation) == pytest.approx(0.1 * len(corpus), rel=0.1)
    assert len(split.test) == pytest.approx(0.2 * len(corpus), rel=0.1)


def test_a_module_and_its_docstrings_are_on_the_same_side(corpus):
    """The docstrings stand in the source file too: apart, the test text would have been trained on."""
    split = text.split(corpus, np.random.default_rng(0))
    side = {(d["domain"], d["name"]): part for part in ("train", "validation", "test") for d in getattr(split, part)}
    pairs = [("json", "json/__init__.py"), ("argparse", "argparse.py"), ("json.decoder", "json/decoder.py")]
    for module, file in pairs:
        assert side["docstrings", module] == side["source", file]


def test_the_split_follows_the_generator(corpus):
    first, again, other = (text.split(corpus, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again
    assert first.test != other.test


@pytest.mark.parametrize("shares", [(0.6, 0.6), (-0.1, 0.1), (0.1, float("nan"))])
def test_shares_must_leave_something_to_train_on(corpus, shares):
    with pytest.raises(ValueError, match="validation and test"):
        text.split(corpus, np.random.default_rng(0), validation=shares[0], test=shares[1])


def test_sample_takes_whole_documents_up_to_a_size(corpus):
    some = text.sample(corpus, np.random.default_rng(0), characters=200_000)
    assert sum(len(d["text"]) for d in some) >= 200_000
    assert sum(len(d["text"]) for d in some[:-1]) < 200_000
    everything = text.sample(corpus[:5], np.random.default_rng(0), characters=10**9)
    assert sorted(d["name"] for d in everything) == sorted(d["name"] for d in corpus[:5])


@pytest.mark.parametrize("sentence", SAMPLE)
def test_tokenizers_lose_nothing_and_their_byte_lengths_are_right(bpe, sentence):
    for tokenizer in (bpe, text.byte_tokenizer()):
        ids = tokenizer.encode(sentence).ids
        assert tokenizer.decode(ids) == sentence
        assert text.byte_lengths(tokenizer)[ids].sum() == len(sentence.encode())


def test_the_byte_tokenizer_has_one_token_a_byte():
    tokenizer = text.byte_tokenizer()
    assert tokenizer.get_vocab_size() == 256 + len(text.SPECIAL)
    assert len(tokenizer.encode("naïve").ids) == len("naïve".encode())


def test_bpe_has_the_size_asked_for_and_is_the_same_each_time(bpe, corpus):
    assert bpe.get_vocab_size() == 280
    texts = [d["text"] for d in corpus[:40]]
    assert text.bpe_tokenizer(texts, vocab=512).get_vocab() == text.bpe_tokenizer(texts, vocab=512).get_vocab()


def test_bpe_that_cannot_reach_its_size_says_so():
    with pytest.raises(ValueError, match="vocab must be at least 259"):
        text.bpe_tokenizer(["abc"], vocab=100)
    with pytest.raises(ValueError, match="too little text for a vocabulary of 1000"):
        text.bpe_tokenizer(["abc"], vocab=1000)


def test_special_tokens_are_never_made_from_text(bpe):
    for tokenizer in (bpe, text.byte_tokenizer()):
        assert [tokenizer.token_to_id(token) for token in text.SPECIAL] == [0, 1, 2]
        assert min(tokenizer.encode("a <end> of <mask> and <pad>").ids) >= len(text.SPECIAL)


def test_packing_keeps_every_token_but_a_tail_shorter_than_a_block(bpe):
    texts = ["the cat sat", "on the mat", "the end"]
    blocks = text.pack(bpe, texts, block=4)
    stream = [token for one in texts for token in [*bpe.encode(one).ids, text.END]]
    assert blocks.dtype == torch.int64
    assert blocks.flatten().tolist() == stream[: len(stream) // 4 * 4]


def test_packing_too_little_text(bpe):
    with pytest.raises(ValueError, match="fill no block of 64"):
        text.pack(bpe, ["short"], block=64)


def test_packing_zero_length_blocks(bpe):
    with pytest.raises(ValueError, match="block must be at least 2"):
        text.pack(bpe, ["short"], block=1)
