"""Find a function by the sentence that says what it does: real pairs from installed packages, a small encoder, ranking metrics.

Different functions are described by one sentence ("Fit the model according to the given training data."). To a contrastive loss
that takes the rest of the batch for negatives these are false negatives, and here they can be counted. For the same reason no
sentence stands on both sides of the split.

Needs transformers (`pip install 'firsthand[hf]'`), and for the guide `minilm` sentence-transformers (`'firsthand[embed]'`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from firsthand import data
from firsthand.testbeds import lm, text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PACKAGES = ("scipy", "sklearn", "networkx", "sympy")
"""Besides the standard library: what firsthand and torch bring with them."""

SENTENCE, CODE = 20, 48
"""How many tokens of a sentence and of a code the encoder reads."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the embeddings of a batch's sentences and of its codes, and its rows in the training pairs, to a scalar."""


@dataclass(frozen=True)
class Pairs:
    """Sentences and the functions they describe. Pairs of one group have the same sentence, but for case and punctuation."""

    sentences: list[str]
    codes: list[str]
    groups: Int[np.ndarray, " pairs"]

    def __len__(self) -> int:
        return len(self.sentences)

    def take(self, rows: Int[np.ndarray, " rows"]) -> Pairs:
        return Pairs([self.sentences[row] for row in rows], [self.codes[row] for row in rows], self.groups[rows])


def pairs(packages: Sequence[str] = PACKAGES) -> Pairs:
    """All functions of the standard library and these packages that a docstring describes, without copies."""
    found: dict[tuple[str, str], str] = {}
    for record in data.load("docstrings", packages=tuple(packages), distinct=False):
        found.setdefault((normalise(record["sentence"]), record["code"]), record["sentence"])
    number = {sentence: index for index, sentence in enumerate(dict.fromkeys(sentence for sentence, _ in found))}
    groups = np.array([number[sentence] for sentence, _ in found])
    return Pairs(list(found.values()), [code for _, code in found], groups)


def normalise(sentence: str) -> str:
    """The words of a sentence, in lower case, one space between."""
    return " ".join(re.findall(r"\w+", sentence.lower()))


def split(everything: Pairs, rng: np.random.Generator, *, train: int, test: int, repeated: float) -> tuple[Pairs, Pairs]:
    """Draw training and test pairs that have no sentence in common.

    Args:
        everything: the pairs to draw from.
        rng: decides which.
        train: how many pairs to train on.
        test: how many sentences to test on, with all their functions; any sentences.
        repeated: share of the training pairs whose sentence describes several functions, in [0, 1]. Also of these sentences
            all functions are taken.

    Raises:
        ValueError: there are not enough pairs of either kind.
    """
    _, group, count = np.unique(everything.groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(count))
    testing, rest = order[:test], order[test:]
    several, single = rest[count[rest] > 1], rest[count[rest] == 1]
    enough = int(np.searchsorted(np.cumsum(count[several]), repeated * train, side="right"))  # that stay within the share
    room = train - int(count[several[:enough]].sum())
    if len(testing) < test or count[several].sum() < repeated * train or room > len(single):
        raise ValueError(
            f"there are {len(everything)} pairs of {len(count)} sentences, {count[count > 1].sum()} of them of repeated ones: "
            f"not enough for train={train}, test={test}, repeated={repeated}"
        )
    training = np.append(several[:enough], single[:room])
    of = [everything.take(rng.permutation(np.flatnonzero(np.isin(group, chosen)))) for chosen in (training, testing)]
    return of[0], of[1]


@dataclass(frozen=True)
class World:
    """What to train on, and what to look for among what.

    `relevant` says which of the test codes the sentence of a query describes.
    """

    train: Pairs
    sentences: Int[Tensor, "pairs length"]
    codes: Int[Tensor, "pairs tokens"]
    test: Pairs  # its codes are the documents
    queries: Int[Tensor, "queries length"]  # each test sentence once
    documents: Int[Tensor, "documents tokens"]
    relevant: Bool[Tensor, "queries documents"]
    vocab: int


def code_search(
    rng: np.random.Generator, *, train: int, test: int, repeated: float, vocab: int, packages: Sequence[str] = PACKAGES
) -> World:
    """A `split` of `pairs(packages)` as tokens. The tokenizer, of `vocab` tokens, has seen the training pairs only."""
    training, testing = split(pairs(packages), rng, train=train, test=test, repeated=repeated)
    learnt = tokenizer([*training.sentences, *training.codes], vocab)
    groups, first = np.unique(testing.groups, return_index=True)
    return World(
        train=training,
        sentences=tokens(learnt, training.sentences, SENTENCE),
        codes=tokens(learnt, training.codes, CODE),
        test=testing,
        queries=tokens(learnt, [testing.sentences[row] for row in first], SENTENCE),
        documents=tokens(learnt, testing.codes, CODE),
        relevant=torch.from_numpy(groups[:, None] == testing.groups),
        vocab=learnt.get_vocab_size(),
    )


def tokenizer(texts: Sequence[str], vocab: int) -> Tokenizer:
    """Byte-pair tokens of words in lower case, names split at `_`, so that sentences and code share their words.

    Not WordPiece: the trainer of that one finds another vocabulary in every process.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learnt = Tokenizer(models.BPE(unk_token="<unknown>"))
    learnt.normalizer = normalizers.Lowercase()
    learnt.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()])
    special = ["<pad>", "<unknown>"]
    learnt.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, show_progress=False))
    return learnt


def tokens(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Int[Tensor, "texts length"]:
    """The first `length` tokens of each text, filled up with padding."""
    rows = [encoding.ids[:length] for encoding in tokenizer.encode_batch(list(texts))]
    return torch.tensor([row + [text.PAD] * (length - len(row)) for row in rows])


class Encoder(nn.Module):
    """A small BERT of random weights; a text is the mean of its tokens."""

    def __init__(self, generator: torch.Generator, vocab: int, width: int = 128, layers: int = 1) -> None:
        super().__init__()
        shape = {"hidden": width, "layers": layers, "heads": 4, "intermediate": 2 * width, "context": max(SENTENCE, CODE)}
        self.bert = lm.bert(generator, vocab, **shape).bert

    def forward(self, ids: Int[Tensor, "texts length"]) -> Float[Tensor, "texts width"]:
        mask = ids != text.PAD
        longest = int(mask.sum(dim=1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        states: Tensor = self.bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


def batches(
    groups: Int[np.ndarray, " pairs"], rng: np.random.Generator, *, size: int, steps: int, together: bool
) -> list[Int[Tensor, " size"]]:
    """The rows of each step: pass after pass over the pairs in random order, the incomplete last batch of a pass left out.

    Args:
        groups: of the pairs.
        rng: decides the order.
        size: rows in a batch.
        steps: how many batches.
        together: with `True`, pairs of a group stand side by side, so that batches hold false negatives; with `False`, no batch
            holds two pairs of a group.

    Raises:
        ValueError: not even one batch of this size can be made.
    """
    made: list[Tensor] = []
    while len(made) < steps:
        cut = _side_by_side(groups, rng, size) if together else _apart(groups, rng, size)
        before = len(made)
        made += map(torch.from_numpy, cut)
        if len(made) == before:
            raise ValueError(f"{len(groups)} pairs of {len(set(groups.tolist()))} sentences make no batch of {size}")
    return made[:steps]


def _side_by_side(groups: np.ndarray, rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    _, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((rng.random(len(groups)), rng.permutation(group.max() + 1)[group]))
    yield from order[: len(order) // size * size].reshape(-1, size)


def _apart(groups: np.ndarray, rng: np.random.Generator, size: int) -> Iterator[np.ndarray]:
    waiting = rng.permutation(len(groups)).tolist()
    while True:
        batch: dict[int, int] = {}
        put_off = []
        for row in waiting:
            if len(batch) < size and groups[row] not in batch:
                batch[groups[row]] = row
            else:
                put_off.append(row)
        if len(batch) < size:
            return
        yield np.array(list(batch.values()))
        waiting = put_off


def fit(
    encoder: Encoder,
    world: World,
    loss: Loss,
    steps: Sequence[Int[Tensor, " size"]],
    *,
    lr: float,
    trial: Any,  # where to run; progress; a curve of the test nDCG@10
    look: int = 100,
) -> None:
    """Train with AdamW, the learning rate first rising and then falling on a cosine; look at the test every `look` steps."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr)
    for step, rows in enumerate(trial.track(steps, "training")):
        for group in optimizer.param_groups:
            group["lr"] = lm.learning_rate(step, len(steps), lr)
        encoder.train()
        optimizer.zero_grad()
        sentences, codes = (encoder(part[rows].to(trial.device)) for part in (world.sentences, world.codes))
        loss(sentences, codes, rows).backward()
        optimizer.step()
        if (step + 1) % look == 0:
            trial.record(step + 1, **{"ndcg@10": score(encoder, world)["ndcg@10"]})


@torch.no_grad()
def score(encoder: Encoder, world: World) -> dict[str, float]:
    """nDCG@10 and MRR@10 of the test sentences over all test codes, by cosine."""
    encoder.eval()
    device = next(encoder.parameters()).device
    queries, documents = encoder(world.queries.to(device)), encoder(world.documents.to(device))
    return ranking(queries.cpu(), documents.cpu(), world.relevant)


def ranking(
    queries: Float[Tensor, "queries width"],
    documents: Float[Tensor, "documents width"],
    relevant: Bool[Tensor, "queries documents"],
) -> dict[str, float]:
    """nDCG@10 and MRR@10 of a search by cosine."""
    cosines = F.normalize(queries, dim=-1) @ F.normalize(documents, dim=-1).T
    return {
        "ndcg@10": ndcg(cosines, relevant, k=10).mean().item(),
        "mrr@10": reciprocal_rank(cosines, relevant, k=10).mean().item(),
    }


def ndcg(
    scores: Float[Tensor, "queries documents"], relevant: Bool[Tensor, "queries documents"], k: int
) -> Float[Tensor, " queries"]:
    r"""Normalised discounted cumulative gain of the first k documents, for relevance yes or no.

    $$ \mathrm{nDCG@}k = \sum_{r \le k} \frac{y_r}{\log_2(r + 1)} \Big/ \sum_{r \le \min(k, |y|)} \frac{1}{\log_2(r + 1)} $$

    Raises:
        ValueError: `k` is below 1, or a query has no relevant document.
    """
    hits = _hits(scores, relevant, k)
    discount = 1 / torch.arange(2, hits.shape[1] + 2, device=scores.device).log2()
    best = discount.cumsum(0)[relevant.sum(dim=1).clamp(max=hits.shape[1]) - 1]
    return (hits * discount).sum(dim=1) / best


def reciprocal_rank(
    scores: Float[Tensor, "queries documents"], relevant: Bool[Tensor, "queries documents"], k: int
) -> Float[Tensor, " queries"]:
    """1 / rank of the first relevant document; 0 if it is not among the first k.

    Raises:
        ValueError: `k` is below 1, or a query has no relevant document.
    """
    hits = _hits(scores, relevant, k)
    return (hits / torch.arange(1, hits.shape[1] + 1, device=scores.device)).amax(dim=1)


def _hits(scores: Tensor, relevant: Tensor, k: int) -> Tensor:
    """Whether each of the first k documents is relevant, 0 or 1, best first."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not relevant.any(dim=1).all():
        raise ValueError(f"relevant must have a document for every query, got none for {int((~relevant.any(dim=1)).sum())}")
    return relevant.gather(1, scores.topk(min(k, scores.shape[1])).indices).to(scores.dtype)


# Frozen models that know better, or not


def minilm(texts: Sequence[str], length: int = 48) -> Float32[Tensor, "texts 384"]:
    """Embeddings by all-MiniLM-L6-v2, on the CPU, each distinct text once; a text is cut after `length` tokens."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(data.load("minilm")), device="cpu")
    model.max_seq_length = length
    distinct = {sentence: row for row, sentence in enumerate(dict.fromkeys(texts))}
    embeddings = model.encode(list(distinct), batch_size=32, convert_to_tensor=True, show_progress_bar=False)
    return embeddings[[distinct[sentence] for sentence in texts]].clone()


def tfidf(texts: Sequence[str]) -> Float32[Tensor, "texts words"]:
    """How often each word that two of the texts have stands in each, rare words weighted up (TF-IDF), at unit length."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(token_pattern=r"[A-Za-z][a-z]+", sublinear_tf=True, min_df=2).fit_transform(texts)
    return torch.from_numpy(vectors.toarray().astype(np.float32))
