"""Starbucks' losses: a training step beside sentence-transformers' `Matryoshka2dLoss`, the loss on scores, and SMAE.

The step trains all-MiniLM-L6-v2. `Matryoshka2dLoss` computes another loss, so the check is against each sub-model run by itself,
which computes the same and is what one would do by hand. The limit is the inner loss, which trains the full model alone. SMAE is
raced with computing scores over the vocabulary for all tokens, as its paper's code does; the limit is its encoder's pass alone.
"""

from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import Matryoshka2dLoss, MultipleNegativesRankingLoss
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertForMaskedLM

from firsthand import data
from firsthand.embed.smae import BertForSMAE, smae_loss
from firsthand.embed.starbucks import StarbucksLoss, default_sizes, srl_loss

ROUNDS = 3


def race(racers: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    times: dict[str, list[float]] = {name: [] for name in racers}
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    for timer in timers.values():
        timer.timeit(1)
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(seconds) for name, seconds in times.items()}


def report(seconds: dict[str, float]) -> None:
    ratios = ", ".join(f"ours / {name} = {seconds['ours'] / value:.3f}" for name, value in seconds.items() if name != "ours")
    print(f"  ours {1e3 * seconds['ours']:.1f} ms; {ratios}")


class Given(nn.Module):
    """A model whose features already are the embeddings."""

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        return {"sentence_embedding": features}


def steps(rows: int = 6) -> None:
    sizes = default_sizes(6, 384)
    print(f"a training step of all-MiniLM-L6-v2 without the optimiser, {rows} pairs, at most 24 tokens, sizes {sizes}")
    model = SentenceTransformer(str(data.load("minilm")), device="cpu").eval()  # no dropout, so that numbers agree
    model.max_seq_length = 24
    pairs = data.load("docstrings")[:rows]
    columns = [[pair[name] for pair in pairs] for name in ("sentence", "code")]
    inner, on_embeddings = MultipleNegativesRankingLoss(model), MultipleNegativesRankingLoss(Given())
    layers, config = model[0].auto_model.encoder.layer, model[0].auto_model.config

    def one_by_one(features: list[dict[str, Tensor]], labels: None) -> Tensor:
        """Each sub-model runs for itself."""
        embedded = []
        for layer, dim in sizes:
            model[0].auto_model.encoder.layer = layers[:layer]
            config.num_hidden_layers = layer
            embedded.append(([model(dict(column))["sentence_embedding"] for column in features], dim))
        model[0].auto_model.encoder.layer = layers
        teacher = torch.cat(embedded[-1][0]).detach()
        total = on_embeddings(embedded[-1][0], labels)
        for texts, dim in embedded[:-1]:
            total = total + on_embeddings([F.normalize(text[:, :dim], dim=-1) for text in texts], labels)
            log_p, log_q = (each[:, :dim].log_softmax(dim=-1) for each in (teacher, torch.cat(texts)))
            total = total + 0.3 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return total

    def step(loss: Callable[..., Tensor]) -> Tensor:
        model.zero_grad()
        value = loss([model.preprocess(texts) for texts in columns], None)
        value.backward()
        return value

    ours = StarbucksLoss(model, inner, sizes)
    dims = [dim for _, dim in sizes]
    peers = {
        "2D": Matryoshka2dLoss(model, inner, dims, n_layers_per_step=1, n_dims_per_step=1),
        "2D, all dims": Matryoshka2dLoss(model, inner, dims, n_layers_per_step=1, n_dims_per_step=-1),
        "2D, all layers and dims": Matryoshka2dLoss(model, inner, dims, n_layers_per_step=-1, n_dims_per_step=-1),
        "each sub-model by itself": one_by_one,
        "limit": inner,
    }
    torch.testing.assert_close(step(ours), step(one_by_one), atol=1e-4, rtol=1e-4)
    report(race({"ours": lambda: step(ours)} | {name: (lambda loss=loss: step(loss)) for name, loss in peers.items()}))


def scores(rows: int = 16, group: int = 4) -> None:
    sizes = default_sizes(12, 768)
    print(f"the loss on scores, forward and backward, {rows} queries, {group * rows} passages, sizes {sizes}")
    torch.manual_seed(0)
    queries, passages = torch.randn(13, rows, 768) / 10, torch.randn(13, rows * group, 768) / 10
    inputs = [queries.requires_grad_(), passages.requires_grad_()]
    own = torch.arange(rows) * group

    def broadcast(q: Tensor, c: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """A product for each number of each pair, as in the paper's code; sums come later."""
        chosen = [layer for layer, _ in sizes]
        products = torch.einsum("lqd,lcd->lqcd", q[chosen], c[chosen])
        full = products[-1].sum(dim=-1)
        total = F.cross_entropy(full, own)
        for k, (_, dim) in enumerate(sizes[:-1]):
            student = products[k, :, :, :dim].sum(dim=-1)
            divergence = F.kl_div(student.log_softmax(-1), full.detach().softmax(-1), reduction="batchmean")
            total = total + F.cross_entropy(student, own) + divergence
        return total

    def both(loss: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        value = loss(*inputs, sizes)
        return (value, *torch.autograd.grad(value, inputs))

    for mine, other in zip(both(srl_loss), both(broadcast), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    report(race({"ours": lambda: both(srl_loss), "broadcast": lambda: both(broadcast)}))


def smae(rows: int = 6, length: int = 48) -> None:
    shape = {"vocab_size": 30522, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 256}
    sizes = default_sizes(4, 128, rungs=4)
    print(f"SMAE, forward and backward, {rows} texts of {length} tokens, 20 % and 40 % masked, vocabulary 30522, sizes {sizes}")
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**shape)).eval()
    decoder = BertForSMAE.begin(model, sizes).decoder_layer
    ids, where = torch.randint(1000, 30000, (rows, length)), torch.rand(rows, length)
    where[:, 0] = 1.0
    encoder_mask, decoder_mask = where < 0.2, where < 0.4
    batch = {
        "input_ids": ids.masked_fill(encoder_mask, 103),
        "labels": ids.masked_fill(~encoder_mask, -100),
        "decoder_input_ids": ids.masked_fill(decoder_mask, 103),
        "decoder_labels": ids.masked_fill(~decoder_mask, -100),
    }
    trained = [*model.parameters(), *decoder.parameters()]

    def ours() -> Tensor:
        return smae_loss(model, decoder, batch, sizes)

    def everywhere() -> Tensor:
        states = model.bert(batch["input_ids"], output_hidden_states=True).hidden_states
        seen, total = model.bert.embeddings(batch["decoder_input_ids"]), torch.zeros(())
        for layer, dim in sizes:
            cut = F.pad(states[layer][..., :dim], [0, 128 - dim])  # zeros see none of the other columns
            hidden = model.cls.predictions.transform(cut)
            decoded = decoder(torch.cat([hidden[:, :1], seen[:, 1:]], dim=1))
            mlm = F.cross_entropy(model.cls.predictions.decoder(hidden).flatten(0, 1), batch["labels"].flatten())
            mae = F.cross_entropy(model.cls(decoded).flatten(0, 1), batch["decoder_labels"].flatten())
            total = total + (mlm + mae) / 2 / len(sizes)
        return total

    def limit() -> Tensor:
        return model.bert(batch["input_ids"]).last_hidden_state.sum()

    def step(loss: Callable[[], Tensor]) -> Tensor:
        for parameter in trained:
            parameter.grad = None
        value = loss()
        value.backward()
        return value

    torch.testing.assert_close(step(ours), step(everywhere), atol=1e-4, rtol=1e-4)
    peers = {"scores everywhere": everywhere, "limit": limit}
    report(race({"ours": lambda: step(ours)} | {name: (lambda loss=loss: step(loss)) for name, loss in peers.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps()
    scores()
    smae()
