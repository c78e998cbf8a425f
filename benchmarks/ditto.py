"""Ditto's hot paths: blocking against faiss, scoring pairs against `CrossEncoder`, and what the collator costs.

`python benchmarks/ditto.py` prints ratios of times: below 1, ours is faster.
"""

import resource
import tempfile
import time
from collections.abc import Callable
from statistics import median

import faiss
import numpy as np
import torch
from sentence_transformers import CrossEncoder
from torch.utils.benchmark import Timer
from transformers import BertForSequenceClassification

from firsthand.match.blocking import block
from firsthand.match.ditto import DittoCollator, DittoModel
from firsthand.match.matcher import DittoMatcher
from firsthand.match.records import DomainKnowledge, TfidfSummarizer, serialize
from firsthand.testbeds import embedding

RECORDS = 10_000


def race(rounds: int = 3, **racers: Callable[[], object]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(each) for name, each in times.items()}


def people(count: int, seed: int) -> list[dict[str, str]]:
    """Made-up names, streets and numbers."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("aabcdeefghiijklmnoopqrstuuvwxyz"))
    words = ["".join(letters[rng.integers(len(letters), size=rng.integers(4, 10))]) for _ in range(4000)]
    drawn = rng.integers(len(words), size=(count, 4))
    numbers = rng.integers(1000, size=count)
    return [
        {"name": f"{words[a]} {words[b]}", "street": f"{n} {words[c]} street", "suburb": words[d]}
        for (a, b, c, d), n in zip(drawn.tolist(), numbers.tolist(), strict=True)
    ]


def misread(record: dict[str, str]) -> dict[str, str]:
    return {name: value[:-2] + value[-1:] for name, value in record.items()}


def blocking() -> None:
    left = people(RECORDS, 0)
    texts = [serialize(record) for record in left], [serialize(misread(record)) for record in left]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begin = time.process_time()
    found = block(*texts, k=5, progress=False)
    seconds = time.process_time() - begin
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    hits = np.mean([i == j for i, j, _ in found[::5]])
    print(f"blocking {RECORDS:,} x {RECORDS:,} records by trigrams, k=5: {len(found):,} of {RECORDS**2:,} pairs")
    print(f"  {seconds:.1f} s of CPU, {more:.0f} MB more at peak, the twin comes first for {hits:.1%}")

    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(RECORDS, 384)).astype(np.float32) for _ in range(2)]
    for side in vectors:
        side /= np.linalg.norm(side, axis=1, keepdims=True)
    tables = {"l": vectors[0], "r": vectors[1]}
    sides = [[f"{side}{row}" for row in range(RECORDS)] for side in "lr"]

    def ours() -> list[tuple[int, int, float]]:
        return block(*sides, lambda wanted: tables[wanted[0][0]], k=5, progress=False)

    def theirs() -> np.ndarray:
        index = faiss.IndexFlatIP(384)
        index.add(vectors[1])
        return index.search(vectors[0], 5)[1]

    same = np.mean(np.array([j for _, j, _ in ours()]).reshape(-1, 5) == theirs())
    if same < 0.999:
        raise SystemExit(f"ours and faiss agree on {same:.4f} of the neighbours only")
    seconds_of = race(rounds=2, ours=ours, faiss=theirs, limit=lambda: vectors[0] @ vectors[1].T)
    print(f"  vectors of width 384: ours / faiss = {seconds_of['ours'] / seconds_of['faiss']:.2f}, ", end="")
    print(f"ours / matrix product = {seconds_of['ours'] / seconds_of['limit']:.2f}")


def pairs_and_model() -> tuple[list[tuple[dict[str, str], dict[str, str]]], object, object]:
    records = people(512, 1)
    pairs = [(record, misread(records[(row + row % 2) % 512])) for row, record in enumerate(records)]
    tokenizer = embedding.tokenizer([serialize(record) for record in records], 2000)
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    model = embedding.bert(torch.Generator().manual_seed(0), len(tokenizer), hidden=256, layers=2, heads=4, context=160)
    return pairs, tokenizer, model


def scoring() -> None:
    pairs, tokenizer, model = pairs_and_model()
    labels = [1 - row % 2 for row in range(len(pairs))]
    matcher = DittoMatcher(model, tokenizer, op=None, max_len=128, epochs=1, batch_size=32, progress=False)
    matcher.fit(pairs[:32], labels[:32], valid=(pairs[:32], labels[:32]))
    texts = [(serialize(left), serialize(right)) for left, right in pairs]

    peer = BertForSequenceClassification(model.config.__class__(**{**model.config.to_dict(), "num_labels": 2}))
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        cross = CrossEncoder(folder, max_length=128, device="cpu")
    inputs = DittoCollator(tokenizer, 128)([{"left": left, "right": right} for left, right in pairs])

    @torch.no_grad()
    def limit() -> None:
        for start in range(0, len(pairs), 32):
            matcher.model_(**{name: tensor[start : start + 32] for name, tensor in inputs.items()})

    with torch.no_grad():
        expected = matcher.model_(**inputs).logits.softmax(dim=1)
    torch.testing.assert_close(torch.from_numpy(matcher.predict_proba(pairs)).float(), expected, atol=1e-5, rtol=1e-4)
    matcher.predict_proba(pairs)
    cross.predict(texts[:32], batch_size=32, show_progress_bar=False)
    seconds = race(
        ours=lambda: matcher.predict_proba(pairs),
        cross_encoder=lambda: cross.predict(texts, batch_size=32, show_progress_bar=False),
        limit=limit,
    )
    print(f"scoring {len(pairs)} pairs of records, hidden size 256, 2 layers")
    print(f"  ours / CrossEncoder = {seconds['ours'] / seconds['cross_encoder']:.2f}, ", end="")
    print(f"ours / forward passes alone, padded to the longest pair = {seconds['ours'] / seconds['limit']:.2f}")


def collator() -> None:
    pairs, tokenizer, lm = pairs_and_model()
    summarizer = TfidfSummarizer(length_fn=lambda word: len(tokenizer.tokenize(word)))
    summarizer.fit([serialize(left) for left, _ in pairs])
    examples = [{"left": left, "right": right, "label": 0} for left, right in pairs[:32]]
    everything = DittoCollator(tokenizer, 128, "all", summarizer, DomainKnowledge("general"), seed=0)
    plain, model = DittoCollator(tokenizer, 128), DittoModel(lm)
    batches = plain(examples), everything(examples)

    def step(batch: dict[str, torch.Tensor]) -> None:
        model.zero_grad()
        model(**batch).loss.backward()

    seconds = race(
        rounds=7,
        plain_batch=lambda: plain(examples),
        batch=lambda: everything(examples),
        plain_step=lambda: step(batches[0]),
        step=lambda: step(batches[1]),
    )
    print("making a batch of 32 pairs, as a share of the training step without the optimiser")
    print(f"  plain {seconds['plain_batch'] / seconds['plain_step']:.3f}; ", end="")
    print(f"with augmentation, knowledge and summaries {seconds['batch'] / seconds['step']:.3f}")
    print(f"a step with MixDA / a plain one = {seconds['step'] / seconds['plain_step']:.2f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    blocking()
    scoring()
    collator()
