"""Functions of installed packages, each with the sentence that says what it does, and what an embedding of them is good for.

Real text with labels for free: a sentence finds its function (retrieval), a function has a module (classification) in a package
(clustering), and modules stand nearer or farther in the tree of packages (similarity). Encoders are small, and real
`SentenceTransformer`s, so that what trains here trains in a user's code.

Needs transformers and sentence-transformers (`pip install 'firsthand[embed]'`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn

from firsthand import data
from firsthand.testbeds import lm
from firsthand.testbeds.retrieval import normalise, ranking

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerBase

PACKAGES = ("scipy", "sklearn", "networkx", "sympy")
"""Besides the standard library: what firsthand and torch bring with them."""

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
"""The first tokens of every vocabulary. A text stands between `<s>` and `</s>`."""


@dataclass(frozen=True)
class Functions:
    """What each function is for, its source, and where it stands. Functions of one group have the same sentence.

    Attributes:
        sentences: the first of the docstring.
        codes: signature and body, without the docstring.
        names: `"function"` or `"Class.method"`.
        modules: with dots between, the package first (`"sklearn.linear_model"`); of the standard library without its name.
        packages: `"stdlib"`, or the import name.
        groups: equal where sentences are, but for case and punctuation.
    """

    sentences: list[str]
    codes: list[str]
    names: list[str]
    modules: list[str]
    packages: list[str]
    groups: Int[np.ndarray, " functions"]

    def __len__(self) -> int:
        return len(self.sentences)

    def take(self, rows: Int[np.ndarray, " rows"] | Sequence[int]) -> Functions:
        lists = (self.sentences, self.codes, self.names, self.modules, self.packages)
        return Functions(*([column[row] for row in rows] for column in lists), self.groups[np.asarray(rows, dtype=np.int64)])


def functions(packages: Sequence[str] = PACKAGES) -> Functions:
    """All functions of the standard library and these packages that a docstring describes, without copies, in order of file."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for record in data.load("docstrings", packages=tuple(packages), distinct=False):
        found.setdefault((normalise(record["sentence"]), record["code"]), record)
    number = {sentence: index for index, sentence in enumerate(dict.fromkeys(sentence for sentence, _ in found))}
    columns = ([record[key] for record in found.values()] for key in ("sentence", "code", "name", "module", "package"))
    return Functions(*columns, np.array([number[sentence] for sentence, _ in found], dtype=np.int64))


def split(everything: Functions, rng: np.random.Generator, *, train: int, test: int) -> tuple[Functions, Functions]:
    """Draw functions to train and to test on, at random, so that no sentence is on both sides.

    Args:
        everything: the functions to draw from.
        rng: decides which.
        train: how many to train on.
        test: how many to test on.

    Raises:
        ValueError: there are not enough.
    """
    groups = rng.permutation(np.unique(everything.groups))
    place = np.empty(groups.max() + 1, dtype=np.int64)
    place[groups] = np.arange(len(groups))  # sentences in random order, all functions of one side by side
    order = np.lexsort((rng.random(len(everything)), place[everything.groups]))
    rest = order[~np.isin(everything.groups[order], everything.groups[order[:test]])]
    if len(order) < test or len(rest) < train:
        raise ValueError(f"there are {len(everything)} functions, not enough for train={train} and test={test}")
    return everything.take(rng.permutation(rest[:train])), everything.take(rng.permutation(order[:test]))


# Small encoders


def tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerBase:
    """Byte-pair tokens of words in lower case, names split at `_`, so that sentences and code share their words.

    Args:
        texts: what it learns from.
        vocab: how many tokens at most, with the `SPECIAL` ones.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    learnt = Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.normalizer = normalizers.Lowercase()
    learnt.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.Whitespace()])
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL), show_progress=False)
    learnt.train_from_iterator(texts, trainer)
    ends = [(token, SPECIAL.index(token)) for token in ("<s>", "</s>")]
    learnt.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends
    )
    roles = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    roles |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=learnt, **roles)


def bert(
    generator: torch.Generator,
    vocab: int,
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    context: int = 64,
    **config: Any,
) -> BertModel:
    """A BERT without a head, with weights from `generator`, no dropout, feed-forward blocks twice as wide as `hidden`."""
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "intermediate": 2 * hidden, "context": context}
    model: BertModel = lm.bert(generator, vocab, **(sizes | config)).bert
    return model


def llama(
    generator: torch.Generator,
    vocab: int,
    *,
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    context: int = 64,
    **config: Any,
) -> LlamaForCausalLM:
    """A Llama with weights from `generator`, feed-forward blocks twice as wide as `hidden`; its `.model` is an encoder."""
    sizes = {"hidden": hidden, "layers": layers, "heads": heads, "intermediate": 2 * hidden, "context": context}
    model = lm.llama(generator, vocab, **(sizes | config))
    model.config.bos_token_id, model.config.eos_token_id = SPECIAL.index("<s>"), SPECIAL.index("</s>")
    return model


def sentence_transformer(
    model: Any,  # a transformers model without a head
    tokenizer: PreTrainedTokenizerBase,
    *,
    pooling: str | nn.Module = "mean",
    length: int = 48,
    normalize: bool = False,
) -> SentenceTransformer:
    """A `SentenceTransformer` of a model and a tokenizer in memory.

    Args:
        model: its weights are copied.
        tokenizer: see `tokenizer`.
        pooling: `"mean"`, `"cls"` or `"lasttoken"`, or the module that pools.
        length: how many tokens of a text are read.
        normalize: whether embeddings get unit length.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    without_pooler = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    # The host builds its first module from a folder only, and shows progress bars meanwhile.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=length, model_kwargs=without_pooler)
    pool = Pooling(model.config.hidden_size, pooling) if isinstance(pooling, str) else pooling
    return SentenceTransformer(modules=[transformer, pool, *([Normalize()] if normalize else [])], device="cpu")


def fit(
    model: SentenceTransformer,
    columns: Sequence[Sequence[str]],
    loss: nn.Module,
    order: Sequence[Int[Tensor, " batch"]],
    *,
    lr: float,
    trial: Any,  # where to run; progress; a curve of the loss
    labels: Tensor | None = None,
) -> None:
    """Train with a sentence-transformers loss: AdamW, the learning rate first rising and then falling on a cosine.

    Args:
        model: trained in place, on the trial's device.
        columns: of texts, as the loss takes them (queries, positives, ...).
        loss: called as `loss(features, labels)`.
        order: the rows of each step.
        lr: peak of the learning rate.
        labels: one a row, for losses that want them.
    """
    model.to(trial.device).train()
    loss.to(trial.device)
    weights = {id(p): p for p in [*model.parameters(), *loss.parameters()] if p.requires_grad}  # the loss holds the model
    optimizer = torch.optim.AdamW(list(weights.values()), lr=lr)
    every = max(1, len(order) // 50)
    for step, rows in enumerate(trial.track(order, "training")):
        for group in optimizer.param_groups:
            group["lr"] = lm.learning_rate(step, len(order), lr)
        optimizer.zero_grad()
        features = [features_of(model, [column[row] for row in rows.tolist()]) for column in columns]
        value = loss(features, None if labels is None else labels[rows].to(trial.device))
        value.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        if (step + 1) % every == 0:
            trial.record(step + 1, loss=value.item())


def embed(model: SentenceTransformer, texts: Sequence[str], batch_size: int = 64) -> Float[Tensor, "texts width"]:
    """The embeddings of texts, in evaluation mode, on the CPU."""
    model.eval()
    embeddings = model.encode(list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    return embeddings.float().cpu().clone()  # the host computes in inference mode: a copy may be trained on


def features_of(model: SentenceTransformer, texts: list[str]) -> dict[str, Any]:
    """What a sentence-transformers loss takes for a column of texts."""
    features = model.preprocess(texts)
    return {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in features.items()}


def frozen(texts: Sequence[str], *, length: int = 64) -> Float32[Tensor, "texts 384"]:
    """Embeddings by all-MiniLM-L6-v2, at unit length, kept in the user's cache: the same list of texts is embedded once.

    Args:
        texts: the whole list that a study ever needs, so that seeds share it; a seed takes its rows from the result.
        length: how many tokens of a text are read.
    """
    from safetensors.torch import load_file, save_file
    from sentence_transformers import SentenceTransformer

    key = hashlib.sha256("\0".join([f"minilm {length}", *texts]).encode()).hexdigest()[:24]
    kept = data.access.cache_folder() / "embedded" / f"{key}.safetensors"
    if kept.exists():
        return load_file(kept)["embeddings"]
    model = SentenceTransformer(str(data.load("minilm")), device="cpu")
    model.max_seq_length = length
    row_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    embeddings = F.normalize(embed(model, list(row_of), batch_size=32), dim=-1)[[row_of[text] for text in texts]]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as place:  # written whole or not at all
        whole = Path(place) / kept.name
        save_file({"embeddings": embeddings.contiguous()}, whole)
        os.replace(whole, kept)
    return embeddings


# What an embedding is good for


def relevance(
    queries: Int[np.ndarray, " queries"], documents: Int[np.ndarray, " documents"]
) -> Bool[Tensor, "queries documents"]:
    """Which documents a query is to find: those of its group."""
    return torch.from_numpy(queries[:, None] == documents)


def retrieval(
    queries: Float[Tensor, "queries width"],
    documents: Float[Tensor, "documents width"],
    relevant: Bool[Tensor, "queries documents"],
) -> dict[str, float]:
    """nDCG@10 and MRR@10 of a search by cosine."""
    return ranking(queries, documents, relevant)


def classification(embeddings: Float[Tensor, "texts width"], labels: Sequence[Any], rng: np.random.Generator) -> float:
    """Accuracy of logistic regression on embeddings at unit length, learnt on half of each class and tested on the other half.

    Raises:
        ValueError: a class has only one member, or there is only one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    features = F.normalize(embeddings, dim=-1).numpy()
    x, x_test, y, y_test = train_test_split(
        features, np.asarray(labels), test_size=0.5, stratify=labels, random_state=int(rng.integers(2**31))
    )
    return float(LogisticRegression(C=10.0, max_iter=1000).fit(x, y).score(x_test, y_test))


def clustering(embeddings: Float[Tensor, "texts width"], labels: Sequence[Any], seed: int) -> float:
    """V-measure of k-means with as many clusters as labels, on embeddings at unit length."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import v_measure_score

    features = F.normalize(embeddings, dim=-1).numpy()
    clusters = KMeans(len(set(labels)), n_init=3, random_state=seed).fit_predict(features)
    return float(v_measure_score(labels, clusters))


def similarity(
    embeddings: Float[Tensor, "texts width"], modules: Sequence[str], rng: np.random.Generator, pairs: int = 2000
) -> float:
    """Rank correlation of the cosine of two texts with how near their modules are in the tree, over random pairs.

    Most random pairs have nothing in common (`nearness` 0): half of the pairs are drawn from one package.
    """
    from scipy.stats import spearmanr

    members: dict[str, list[int]] = {}
    for row, module in enumerate(modules):
        members.setdefault(module.partition(".")[0], []).append(row)
    left, right = rng.integers(len(modules), size=(2, pairs))
    for k in range(pairs // 2):
        peers = members[modules[left[k]].partition(".")[0]]
        right[k] = peers[rng.integers(len(peers))]
    apart = left != right
    left, right = left[apart], right[apart]
    near = [nearness(modules[i], modules[j]) for i, j in zip(left, right, strict=True)]
    unit = F.normalize(embeddings, dim=-1)
    cosines = (unit[torch.from_numpy(left)] * unit[torch.from_numpy(right)]).sum(dim=1)
    return float(spearmanr(cosines.numpy(), near).statistic)


def nearness(first: str, second: str) -> float:
    """How much of the way to two modules is common: 2 · common / (one + other), in [0, 1]; counted in names between dots."""
    one, other = first.split("."), second.split(".")
    common = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        common += 1
    return 2 * common / (len(one) + len(other))


def evaluate(encode: Callable[[list[str]], Tensor], test: Functions, rng: np.random.Generator) -> dict[str, float]:
    """All four at once.

    Args:
        encode: texts to embeddings, (texts, width).
        test: its sentences are queries and its codes documents; modules with at least 6 functions are the classes of the
            codes; packages are the clusters of the codes; similarity is of the sentences.
        rng: draws the halves and pairs.

    Returns:
        `"ndcg@10"`, `"mrr@10"`, `"accuracy"`, `"v-measure"` and `"spearman"`.
    """
    queries, documents = encode(test.sentences).cpu().float(), encode(test.codes).cpu().float()
    groups, first = np.unique(test.groups, return_index=True)
    names, label, count = np.unique(test.modules, return_inverse=True, return_counts=True)
    classes = np.flatnonzero(count[label] >= min(6, np.sort(count)[-2]))  # of a small test at least the two largest
    return {
        **retrieval(queries[torch.from_numpy(first)], documents, relevance(groups, test.groups)),
        "accuracy": classification(documents[torch.from_numpy(classes)], names[label[classes]].tolist(), rng),
        "v-measure": clustering(documents, test.packages, int(rng.integers(2**31))),
        "spearman": similarity(queries, test.modules, rng),
    }
