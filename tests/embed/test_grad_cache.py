import itertools
import sys
import threading
from functools import partial

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firsthand.embed.contrastive import info_nce_loss
from firsthand.embed.grad_cache import grad_cache_step, split_rows

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Encoder(nn.Module):
    def __init__(self, dropout=0.0, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, width))

    def forward(self, inputs):
        return self.layers(inputs["x"])


def inputs(rows, seed):
    return {"x": torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))}


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def full_batch(model, query, target, loss_fn):
    model.zero_grad()
    loss = loss_fn(model(query), model(target))
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.fixture
def unchecked():
    """What a user runs: no shapes checked for them, so our own messages must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- the gradient -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("query_chunk", "target_chunk"), [(1, 1), (3, 5), (4, 24), (100, 2), (12, 24), (100, 100)])
def test_gradient_is_that_of_the_whole_batch(device, dtype, tolerance, query_chunk, target_chunk):
    model = Encoder().to(device, dtype)
    query, target = ({"x": part["x"].to(device, dtype)} for part in (inputs(12, 1), inputs(24, 2)))
    loss_fn = partial(info_nce_loss, temperature=0.2)
    expected_loss, expected = full_batch(model, query, target, loss_fn)
    model.zero_grad()
    loss = grad_cache_step(model, query, target, loss_fn, query_chunk=query_chunk, target_chunk=target_chunk)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients(model), expected, atol=tolerance, rtol=10 * tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_draws_the_same_masks_again(device):
    model = Encoder(dropout=0.5).to(device).train()
    query, target = ({"x": part["x"].to(device)} for part in (inputs(8, 1), inputs(8, 2)))
    torch.manual_seed(7)
    chunks = [model(chunk) for side in (query, target) for chunk in split_rows(side, 3)]  # a graph through all, drawn by chunk
    expected_loss = info_nce_loss(torch.cat(chunks[:3]), torch.cat(chunks[3:]))
    expected_loss.backward()
    expected, after = gradients(model), torch.rand(1)

    model.zero_grad()
    torch.manual_seed(7)
    loss = grad_cache_step(model, query, target, info_nce_loss, query_chunk=3, target_chunk=3)
    torch.testing.assert_close(loss, expected_loss.detach())
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(torch.rand(1), after)  # and what comes after is drawn as if chunks had gone through once


def test_gradients_add_up_and_those_of_the_loss_are_there():
    model, scale = Encoder(), nn.Parameter(torch.tensor(3.0))

    def loss_fn(query, target):
        return F.cross_entropy(scale * F.normalize(query) @ F.normalize(target).T, torch.arange(len(query)))

    query, target = inputs(6, 1), inputs(6, 2)
    _, expected = full_batch(model, query, target, loss_fn)
    of_scale, scale.grad = scale.grad.clone(), None
    model.zero_grad()
    for _ in range(2):
        grad_cache_step(model, query, target, loss_fn, query_chunk=2, target_chunk=4)
    torch.testing.assert_close(gradients(model), [2 * gradient for gradient in expected])
    torch.testing.assert_close(scale.grad, 2 * of_scale)


def test_a_loss_that_ignores_one_side():
    model = Encoder()
    query, target = inputs(4, 1), inputs(4, 2)
    _, expected = full_batch(model, query, target, lambda q, t: q.square().mean())
    model.zero_grad()
    grad_cache_step(model, query, target, lambda q, t: q.square().mean(), query_chunk=2, target_chunk=2)
    torch.testing.assert_close(gradients(model), expected)


def test_scaler():
    model, query, target = Encoder(), inputs(6, 1), inputs(6, 2)
    expected_loss, expected = full_batch(model, query, target, info_nce_loss)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for chunk in (2, 6):
        model.zero_grad()
        loss = grad_cache_step(model, query, target, info_nce_loss, query_chunk=chunk, target_chunk=chunk, scaler=scaler)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradients(model), [8 * gradient for gradient in expected], atol=1e-4, rtol=1e-4)


def test_bfloat16():
    model = Encoder().bfloat16()
    query, target = ({"x": part["x"].bfloat16()} for part in (inputs(8, 1), inputs(8, 2)))
    loss_fn = partial(info_nce_loss, temperature=1.0)
    _, expected = full_batch(model, query, target, loss_fn)
    model.zero_grad()
    grad_cache_step(model, query, target, loss_fn, query_chunk=3, target_chunk=8)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0.05)


# --- memory -----------------------------------------------------------------------------------------------------------------


class Held:
    """The most bytes that graphs keep at a time for their backward pass, counted as they are saved and let go."""

    def __init__(self):
        self.now = self.peak = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: Kept(tensor, self), lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class Kept:
    def __init__(self, tensor, held):
        self.tensor, self.held, self.size = tensor, held, tensor.numel() * tensor.element_size()
        held.now += self.size
        held.peak = max(held.peak, held.now)

    def __del__(self):
        self.held.now -= self.size


def test_memory_is_that_of_a_chunk():
    model = nn.Sequential(nn.Linear(6, 256), *(layer for _ in range(4) for layer in (nn.Tanh(), nn.Linear(256, 256))))
    encode = lambda batch: model(batch["x"])  # noqa: E731
    query, target = inputs(64, 1), inputs(64, 2)
    peaks = {}
    for chunk in (64, 16, 4):
        with Held() as held:
            grad_cache_step(encode, query, target, info_nce_loss, query_chunk=chunk, target_chunk=chunk)
        assert held.now == 0
        peaks[chunk] = held.peak
    with Held() as held:
        info_nce_loss(encode(query), encode(target)).backward()
    assert peaks[64] == held.peak
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.ndim == 2)  # any graph keeps these
    assert peaks[16] - weights < (peaks[64] - weights) / 4
    assert peaks[4] < peaks[16]


# --- against the peer, and several processes --------------------------------------------------------------------------------


def test_agrees_with_sentence_transformers():
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # noqa: F401

    from firsthand.testbeds import embedding

    texts = [f"the {a} {b}" for a, b in itertools.product(("red", "blue", "old", "cold"), ("house", "river", "tree"))]
    tokenizer = embedding.tokenizer(texts, vocab=60)
    bert = embedding.bert(torch.Generator().manual_seed(0), len(tokenizer), hidden=16, layers=1, heads=2)
    model = embedding.sentence_transformer(bert, tokenizer).eval()
    assert isinstance(model, st.SentenceTransformer)
    query, target = model.tokenize(texts[:6]), model.tokenize(texts[6:])
    columns = [{name: value for name, value in part.items() if torch.is_tensor(value)} for part in (query, target)]

    theirs = losses.CachedMultipleNegativesRankingLoss(model, scale=50, mini_batch_size=4)
    their_loss = theirs([dict(column) for column in columns], None)
    their_loss.backward()
    expected = gradients(model)
    model.zero_grad()
    encode = lambda batch: model(dict(batch))["sentence_embedding"]  # noqa: E731
    loss = grad_cache_step(encode, *columns, info_nce_loss, query_chunk=4, target_chunk=4)
    torch.testing.assert_close(loss, their_loss.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(model), expected, atol=1e-5, rtol=1e-4)


def one_process(rank, folder):
    """Three queries, six targets of its own, and the loss over all processes; prints what DDP made of it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for chunk in (2, 100):
        model = Encoder()
        ddp = nn.parallel.DistributedDataParallel(model)
        query, target = ({"x": part["x"].chunk(2)[rank]} for part in (inputs(6, 1), inputs(12, 2)))
        syncs = []
        ddp.register_comm_hook(syncs, counted)
        loss = grad_cache_step(
            ddp, query, target, info_nce_loss, query_chunk=chunk, target_chunk=chunk, gather_across_devices=True
        )
        torch.save((loss, gradients(model), len(syncs)), f"{folder}/{rank}-{chunk}.pt")
    torch.distributed.destroy_process_group()


def counted(syncs, bucket):
    syncs.append(bucket.index())
    tensor = bucket.buffer().div_(2)
    return torch.distributed.all_reduce(tensor, async_op=True).get_future().then(lambda future: future.value()[0])


def test_two_processes_make_the_gradient_of_one(tmp_path):
    import subprocess

    processes = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=90) for process in processes] == [0, 0]
    expected_loss, expected = full_batch(Encoder(), inputs(6, 1), inputs(12, 2), info_nce_loss)
    for rank, chunk in itertools.product(range(2), (2, 100)):
        loss, its_gradients, syncs = torch.load(tmp_path / f"{rank}-{chunk}.pt")
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(its_gradients, expected, atol=1e-5, rtol=1e-4)
        assert syncs == 1  # gradients travel once a step


def test_no_sync_is_used_but_for_the_last_chunk():
    model, inside = Encoder(), threading.local()
    inside.now, calls = False, []

    class NoSync:
        def __enter__(self):
            inside.now = True

        def __exit__(self, *error):
            inside.now = False

    def encode(batch):
        if torch.is_grad_enabled():
            calls.append(inside.now)
        return model(batch)

    grad_cache_step(encode, inputs(5, 1), inputs(5, 2), info_nce_loss, query_chunk=2, target_chunk=2, no_sync=NoSync)
    assert calls == [True] * 5 + [False]


# --- bad input --------------------------------------------------------------------------------------------------------------


def test_split_rows():
    chunks = split_rows({"a": torch.arange(5), "b": torch.arange(10).reshape(5, 2)}, 2)
    assert [chunk["a"].tolist() for chunk in chunks] == [[0, 1], [2, 3], [4]]
    assert chunks[2]["b"].tolist() == [[8, 9]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query_chunk": 0}, "query_chunk must be at least 1, got 0"),
        ({"target_chunk": -1}, "target_chunk must be at least 1, got -1"),
        ({"query_inputs": {"x": torch.zeros(4, 6), "y": torch.zeros(3)}}, "one row for each item.*'x': 4, 'y': 3"),
        ({"query_inputs": {"x": [1, 2]}}, "inputs must be tensors"),
        ({"query_inputs": {}}, "inputs must be tensors"),
        ({"target_inputs": {"x": torch.zeros(0, 6)}}, "at least 1 row, got 0"),
        ({"encode": lambda batch: batch["x"].sum(dim=0, keepdim=True)}, "one embedding for each of 2 rows, got shape"),
        ({"loss_fn": partial(info_nce_loss, reduction="none")}, r"loss_fn must return a scalar, got shape \(4,\)"),
    ],
)
def test_bad_input(change, message, unchecked):
    arguments = {"encode": Encoder(), "query_inputs": inputs(4, 1), "target_inputs": inputs(4, 2), "loss_fn": info_nce_loss}
    arguments |= {"query_chunk": 2, "target_chunk": 2} | change
    with pytest.raises(ValueError, match=message):
        grad_cache_step(**arguments)


if __name__ == "__main__":
    one_process(int(sys.argv[1]), sys.argv[2])
