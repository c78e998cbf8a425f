"""Does tuning a model as the experts its neurons already form generalise better than tuning it whole?

A pretrained sentence encoder learns to say which package of Python's standard library a sentence is about, from sentences of
the docstrings. In-domain it is tested on other such sentences; out-of-domain on comments in the same packages' code, which are
terser, more informal and about details. All weights are trained in all arms.

Beside plain fine-tuning and EMoE there are three arms that take EMoE apart: the same neurons in random groups, the gate learned
instead of taken from the weights, and no groups at all but as many neurons dropped at random while training.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import Tensor, nn

from firsthand import Study, Trial, beats, data, holds
from firsthand.moe.emoe import EMoEMLP, emoe_convert, emoe_merge
from firsthand.moe.ffn import ffn_slots
from firsthand.moe.layer import Routing
from firsthand.testbeds import lm, text

TOPICS = ("asyncio", "email", "http", "importlib", "logging", "tkinter", "unittest", "xml")
LENGTH = 16  # tokens of a sentence that the encoder reads
LAYERS = (4, 5)  # of 6
EXPERTS, CHOSEN = 16, 8
STEPS, BATCH = 100, 8
RATE, HEAD_RATE = 1e-4, 1e-2


@dataclass
class Sentences:
    ids: Tensor
    topic: Tensor

    def take(self, rows: Any) -> tuple[Tensor, Tensor]:
        """Without columns that only hold padding, which is 0."""
        ids = self.ids[rows]
        return ids[:, : int((ids != 0).sum(dim=1).max())], self.topic[rows]


@dataclass
class World:
    encoder: Any
    train: Sentences
    in_domain: Sentences
    out_of_domain: Sentences


def prepare(trial: Trial) -> World:
    docstrings, comments = corpus()
    train, inside, outside = (8, 4, 4) if trial.smoke else (50, 50, 100)
    drawn: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for number, topic in enumerate(TOPICS):
        prose, code = (trial.rng.permutation(texts[topic]) for texts in (docstrings, comments))
        for name, texts in (("train", prose[:train]), ("in", prose[train:][:inside]), ("out", code[:outside])):
            drawn[name] += [(str(text), number) for text in texts]

    load = pretrained if "minilm" in trial.data else from_nothing
    encoder, encode = load(trial)

    def tokens(pairs: list[tuple[str, int]]) -> Sentences:
        texts, topics = zip(*pairs, strict=True)
        return Sentences(encode(list(texts)), torch.tensor(topics))

    return World(encoder, *(tokens(drawn[name]) for name in ("train", "in", "out")))


def pretrained(trial: Trial) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """MiniLM, and what turns sentences into token ids, padded with 0."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = data.load("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoder = AutoModel.from_pretrained(folder)
    encoder.pooler = None  # its sentence embeddings are means of tokens
    how = {"padding": True, "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    return encoder, lambda sentences: tokenizer(sentences, **how)["input_ids"]


def from_nothing(trial: Trial) -> tuple[Any, Callable[[list[str]], Tensor]]:
    """Where MiniLM is not at hand: a small BERT that has learned nothing, whose neurons form no experts yet."""
    tokenizer = text.byte_tokenizer()
    tokenizer.enable_truncation(4 * LENGTH)
    tokenizer.enable_padding(pad_id=text.PAD)
    encoder = lm.bert(trial.generator, tokenizer.get_vocab_size(), layers=6, intermediate=384).bert
    return encoder, lambda sentences: torch.tensor([each.ids for each in tokenizer.encode_batch(sentences)])


def corpus() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Sentences of docstrings, and of comments, by topic. None comes twice, in all."""
    seen: set[str] = set()
    found: tuple[dict[str, list[str]], dict[str, list[str]]] = defaultdict(list), defaultdict(list)
    for document in data.load("docs"):
        topic = document["name"].partition(".")[0]
        if document["domain"] == "docstrings" and topic in TOPICS:
            found[0][topic] += new(sentences(document["text"].split("\n\n")), seen)
    for document in data.load("source"):
        topic = document["name"].partition("/")[0]
        if topic in TOPICS:
            blocks = re.findall(r"(?:^[ \t]*#.*\n)+", document["text"], flags=re.MULTILINE)
            found[1][topic] += new(sentences(re.sub(r"^[ \t#]+", "", block, flags=re.MULTILINE) for block in blocks), seen)
    return found


def sentences(paragraphs: Any) -> Iterator[str]:
    for paragraph in paragraphs:
        for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
            if 6 <= len(sentence.split()) <= 40:
                yield sentence


def new(texts: Iterator[str], seen: set[str]) -> list[str]:
    kept = [text for text in dict.fromkeys(texts) if text.lower() not in seen]
    seen.update(text.lower() for text in kept)
    return kept


class Classifier(nn.Module):
    """The mean of a sentence's tokens, and a linear layer, zero at first, so that all arms start from the same predictions."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, len(TOPICS))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        mask = ids != 0
        states = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return self.head((states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True))


def fine_tune(trial: Trial, world: World, surgery: Callable[[Any, int], Any], merge: bool = False) -> dict[str, float]:
    model = Classifier(surgery(world.encoder, trial.seed)).to(trial.device).train()
    trial.count(model, active=active_parameters(model))
    steps, size = (3, 4) if trial.smoke else (STEPS, BATCH)
    rates = (RATE, HEAD_RATE)
    parts = [{"params": list(part.parameters())} for part in (model.encoder, model.head)]
    optimizer = torch.optim.AdamW(parts, weight_decay=0.0, fused=True)
    batches = lm.batches(torch.arange(len(world.train.topic))[:, None], size, trial.generator)
    for step in trial.track(range(steps), "fine-tuning"):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lm.learning_rate(step, steps, rate, warmup=0.1, floor=0.0)
        ids, topic = world.train.take(next(batches).squeeze(1))
        loss = F.cross_entropy(model(ids.to(trial.device)), topic.to(trial.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trial.record(step, loss=loss.item())
    metrics = score(model, world, trial)
    if merge:
        emoe_merge(model.encoder)
        metrics |= {f"merged {name}": value for name, value in score(model, world, trial).items()}
    return metrics


def active_parameters(model: nn.Module) -> int:
    """Without the experts that a token does not use."""
    layers = [module for module in model.modules() if isinstance(module, EMoEMLP)]
    idle = sum(layer.gate_up_proj.numel() + layer.down_proj.numel() for layer in layers) * (EXPERTS - CHOSEN) // EXPERTS
    return sum(parameter.numel() for parameter in model.parameters()) - idle


@torch.no_grad()
def score(model: nn.Module, world: World, trial: Trial) -> dict[str, float]:
    model.eval()
    return {
        "in-domain F1": macro_f1(model, world.in_domain, trial),
        "out-of-domain F1": macro_f1(model, world.out_of_domain, trial),
    }


def macro_f1(model: nn.Module, test: Sentences, trial: Trial) -> float:
    by_length = (test.ids != 0).sum(dim=1).argsort()  # little padding
    predicted, topics = [], []
    for rows in by_length.split(32):
        ids, topic = test.take(rows)
        predicted.append(model(ids.to(trial.device)).argmax(dim=1).cpu())
        topics.append(topic)
    return float(f1_score(torch.cat(topics), torch.cat(predicted), average="macro"))


class LearnedGate(nn.Module):
    """Cosine similarity to learned vectors over a temperature of 0.5; chosen experts weigh 1 on average, as EMoE's do."""

    def __init__(self, dim: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim)
        self.experts = nn.Parameter(torch.randn(experts, dim))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Routing:
        logits = F.normalize(self.project(x), dim=-1) @ F.normalize(self.experts, dim=-1).T / 0.5
        weights, index = logits.softmax(dim=-1).topk(self.chosen, dim=-1)
        return Routing(logits, self.chosen * weights / weights.sum(dim=-1, keepdim=True), index)


def experts(encoder: Any, seed: int, method: str = "balanced_kmeans", learned_gate: bool = False) -> Any:
    emoe_convert(encoder, LAYERS, EXPERTS, CHOSEN, method=method, seed=seed)
    if learned_gate:
        for slot in ffn_slots(encoder, LAYERS):
            slot.module.router = LearnedGate(encoder.config.hidden_size, EXPERTS, CHOSEN)
    return encoder


def dropped_neurons(encoder: Any, seed: int) -> Any:
    """The share of neurons that EMoE leaves out for a token, left out at random, in training only."""
    for layer in LAYERS:
        block = encoder.encoder.layer[layer].intermediate
        block.intermediate_act_fn = nn.Sequential(block.intermediate_act_fn, nn.Dropout(1 - CHOSEN / EXPERTS))
    return encoder


study = Study(
    method="emoe",
    prepare=prepare,
    arms={
        "fine-tuning": partial(fine_tune, surgery=lambda encoder, seed: encoder),
        "EMoE": partial(fine_tune, surgery=experts, merge=True),
        "random experts": partial(fine_tune, surgery=partial(experts, method="random")),
        "learned gate": partial(fine_tune, surgery=partial(experts, learned_gate=True)),
        "dropped neurons": partial(fine_tune, surgery=dropped_neurons),
    },
    claim=beats("EMoE", "fine-tuning", on="out-of-domain F1"),
    also=[
        beats("EMoE", "fine-tuning", on="in-domain F1"),
        beats("EMoE", "random experts", on="out-of-domain F1"),
        beats("EMoE", "learned gate", on="out-of-domain F1"),
        beats("EMoE", "dropped neurons", on="out-of-domain F1"),
        holds(
            "EMoE, merged to a dense model again, beats fine-tuning on out-of-domain F1",
            lambda metrics: metrics["EMoE"]["merged out-of-domain F1"] - metrics["fine-tuning"]["out-of-domain F1"],
            above=0.0,
        ),
    ],
    equal="pretrained weights, sentences, batches, steps, optimiser, learning rate",
    seeds=8,
    data=("minilm", "docs", "source"),
    fallback=("docs", "source"),
)
