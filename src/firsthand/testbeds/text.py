"""Real text in several domains: split by file, tokenised, packed into blocks.

Needs the package `tokenizers` (`pip install 'firsthand[hf]'`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from firsthand import data

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Document = dict[str, str]  # domain, name, text

SPECIAL = ("<pad>", "<end>", "<mask>")
"""The special tokens of every tokenizer made here; their ids are their places, and no text encodes to one."""
PAD, END, MASK = range(3)


@dataclass(frozen=True)
class Split:
    train: list[Document]
    validation: list[Document]
    test: list[Document]


def documents(*names: str) -> list[Document]:
    """The documents of these data sets (`"docs"`, `"source"`, `"messages"`), one after the other.

    Raises:
        firsthand.data.DataMissing: one of them is not on this machine.
    """
    return [document for name in names for document in data.load(name)]


def split(corpus: Sequence[Document], rng: np.random.Generator, validation: float = 0.1, test: float = 0.1) -> Split:
    """Split by file, with the same shares in every domain.

    A module's source and the docstrings taken from it count as one file: apart, test text would be trained on.

    Args:
        corpus: the documents.
        rng: decides which file goes where.
        validation: share of the files to validate on.
        test: share of the files to test on. The rest is for training.

    Raises:
        ValueError: a share is negative, or they leave nothing to train on.
    """
    if not (validation >= 0 and test >= 0 and validation + test < 1):
        raise ValueError(f"validation and test must be at least 0 and below 1 together, got {validation} and {test}")
    files = defaultdict(list)
    for document in corpus:
        files[_file(document)].append(document)
    strata = defaultdict(list)  # files that are in the same domains
    for file in files.values():
        strata[tuple(sorted({document["domain"] for document in file}))].append(file)

    train, validate, held_out = [], [], []
    for domains in sorted(strata):
        stratum = strata[domains]
        order = rng.permutation(len(stratum))
        first, second = round(len(stratum) * test), round(len(stratum) * (test + validation))
        for place, part in zip(np.split(order, [first, second]), (held_out, validate, train), strict=True):
            part += [document for index in place for document in stratum[index]]
    return Split(train, validate, held_out)


def _file(document: Document) -> str:
    domain, name = document["domain"], document["name"]
    if domain in ("docstrings", "source"):
        return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    return f"{domain}: {name}"


def sample(corpus: Sequence[Document], rng: np.random.Generator, characters: int) -> list[Document]:
    """Whole documents in random order, until there are `characters` of them or none is left."""
    taken, size = [], 0
    for index in rng.permutation(len(corpus)):
        if size >= characters:
            break
        taken.append(corpus[index])
        size += len(corpus[index]["text"])
    return taken


def byte_tokenizer() -> Tokenizer:
    """A token for each of the 256 bytes, after the special ones."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _byte_level({token: id for id, token in enumerate([*SPECIAL, *alphabet])})


def bpe_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Byte-level BPE learnt from `texts`, so that any text can be encoded.

    Args:
        texts: what to learn the merges from; of the training part only.
        vocab: number of tokens, the special ones and the 256 bytes included.

    Raises:
        ValueError: `vocab` leaves no room for the bytes, or `texts` do not have so many pairs to merge.
    """
    from tokenizers import pre_tokenizers, trainers

    if vocab < 256 + len(SPECIAL):
        raise ValueError(f"vocab must be at least {256 + len(SPECIAL)}, got {vocab}")
    tokenizer = _byte_level(None)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.encode_special_tokens = True  # "<end>" in a text is five characters
    if tokenizer.get_vocab_size() < vocab:
        raise ValueError(f"too little text for a vocabulary of {vocab}: there were pairs for {tokenizer.get_vocab_size()}")
    return tokenizer


def _byte_level(vocab: dict[str, int] | None) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab, [] if vocab else None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if vocab:
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.encode_special_tokens = True
    return tokenizer


def byte_lengths(tokenizer: Tokenizer) -> Int64[Tensor, " vocab"]:
    """How many bytes of text each token stands for; 0 for the special ones."""
    lengths = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.int64)
    for token, id in tokenizer.get_vocab().items():
        if token not in SPECIAL:
            lengths[id] = len(token)  # in the byte-level alphabet a character is a byte
    return lengths


def pack(tokenizer: Tokenizer, texts: Iterable[str], block: int) -> Int64[Tensor, "blocks block"]:
    """Texts one after the other, each followed by `END`, cut into blocks; a last piece shorter than a block is dropped.

    Raises:
        ValueError: `block` is below 2, or the texts do not fill one.
    """
    if block < 2:
        raise ValueError(f"block must be at least 2, to have a token to predict, got {block}")
    stream: list[int] = []
    for encoding in tokenizer.encode_batch_fast(list(texts)):
        stream += [*encoding.ids, END]
    blocks = len(stream) // block
    if blocks == 0:
        raise ValueError(f"texts of {len(stream)} tokens fill no block of {block}")
    return torch.tensor(stream[: blocks * block]).view(blocks, block)
