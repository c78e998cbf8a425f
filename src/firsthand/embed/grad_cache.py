"""GradCache: the gradient of a contrastive loss over a large batch, in the memory of a small one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Inputs = Mapping[str, Tensor]


def grad_cache_step(
    encode: Callable[[Any], Tensor],
    query_inputs: Inputs,
    target_inputs: Inputs,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    *,
    query_chunk: int = 8,
    target_chunk: int = 8,
    split: Callable[[Any, int], Sequence[Inputs]] | None = None,
    scaler: Any = None,
    no_sync: Callable[[], AbstractContextManager[Any]] | None = None,
    gather_across_devices: bool = False,
) -> Float[Tensor, ""]:
    r"""Backpropagate a loss of whole batches while holding the graph of one chunk at a time.

    With embeddings $E = f_\theta(X)$ and a loss $L(E)$ that couples all rows, the chain rule still takes rows apart:

    $$ \nabla_\theta L = \sum_{c} J_\theta(X_c)^\top\, G_c, \qquad G = \frac{\partial L}{\partial E} $$

    So: embed all chunks without a graph; compute G from the embeddings alone; embed each chunk again, now with a graph, and
    backpropagate its rows of G. The second time draws the same random numbers, so dropout keeps its masks. One chunk on each side
    has nothing to save and goes through once.

    This costs one more forward pass without a graph. It takes the place of `loss.backward()`: call `optimizer.step()` after it.

    Args:
        encode: from inputs to embeddings, one a row. May be stochastic, in what it draws from PyTorch's global generators (CPU
            and CUDA). Its mode (`train`) is yours.
        query_inputs: what `encode` takes, for all queries.
        target_inputs: the same for all targets; there may be several for each query, as `loss_fn` wants.
        loss_fn: from the embeddings of all queries and of all targets to a scalar. Parameters of its own get their gradient too.
        query_chunk: rows that are encoded at a time, at least 1. Memory grows with it, time shrinks a little.
        target_chunk: the same for targets.
        split: from inputs and a number of rows to chunks, in order. By default all tensors are cut along their first dimension;
            for images among text use `firsthand.embed.split_items`.
        scaler: a `torch.amp.GradScaler`, to train in float16.
        no_sync: where `encode` reaches a `DistributedDataParallel` model, its `no_sync`: gradients are then averaged once, with
            the last chunk. Found by itself if `encode` is that model.
        gather_across_devices: compute the loss over the batches of all processes, which must be of equal size. The gradient that
            DDP's mean over processes makes is then that of one process with the whole batch.

    Returns:
        The loss, detached and unscaled. Gradients are *added* to `.grad`, as `backward` does.

    Raises:
        ValueError: a chunk below 1, tensors of unequal length, an encoder that does not return a row for each input row, or a
            loss that is no scalar.

    Source:
        Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021,
        arXiv 2101.06983, as VLM2Vec (arXiv 2410.05160) uses it. The code of VLM2Vec falls back to the plain loss in a single
        process; here chunks decide, not the number of processes.
    """
    for name, size in (("query_chunk", query_chunk), ("target_chunk", target_chunk)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    cut = split_rows if split is None else split
    sides = [list(cut(query_inputs, query_chunk)), list(cut(target_inputs, target_chunk))]
    chunks = [chunk for side in sides for chunk in side]
    apart = getattr(encode, "no_sync", nullcontext) if no_sync is None else no_sync

    if len(sides[0]) == len(sides[1]) == 1:
        embeddings = [_encoded(encode, chunk, split is None) for chunk in chunks]
        return _backward(loss_fn, embeddings[0], embeddings[1], scaler, gather_across_devices)

    states, embeddings = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_rng_state(chunk))
            embeddings.append(_encoded(encode, chunk, split is None))
    of_queries = len(sides[0])
    query = torch.cat(embeddings[:of_queries]).requires_grad_()  # leaves: here the backward pass stops
    target = torch.cat(embeddings[of_queries:]).requires_grad_()
    loss = _backward(loss_fn, query, target, scaler, gather_across_devices)

    cached = [torch.zeros_like(side) if side.grad is None else side.grad for side in (query, target)]
    gradients = torch.split(torch.cat(cached), [len(rows) for rows in embeddings])
    for number, (chunk, state, gradient) in enumerate(zip(chunks, states, gradients, strict=True), start=1):
        with nullcontext() if number == len(chunks) else apart(), _replayed(state):
            torch.autograd.backward(encode(chunk), gradient)
    return loss


def split_rows(inputs: Inputs, size: int) -> list[dict[str, Tensor]]:
    """Cut every tensor into chunks of `size` rows; the last may be smaller.

    Args:
        inputs: tensors of equal first dimension.
        size: rows in a chunk, at least 1.

    Raises:
        ValueError: something that is no tensor, tensors of unequal length, or none at all.
    """
    lengths = {name: len(value) if isinstance(value, Tensor) and value.ndim else None for name, value in inputs.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"inputs must be tensors with one row for each item, or give split=; got lengths {lengths}")
    rows = next(iter(lengths.values())) or 0
    if not rows:
        raise ValueError("inputs must have at least 1 row, got 0")
    return [{name: value[start : start + size] for name, value in inputs.items()} for start in range(0, rows, size)]


def _encoded(encode: Callable[[Any], Tensor], chunk: Inputs, a_row_each: bool) -> Tensor:
    embeddings = encode(chunk)
    rows = len(next(iter(chunk.values()))) if a_row_each else len(embeddings)
    if embeddings.ndim != 2 or len(embeddings) != rows:
        raise ValueError(f"encode must return one embedding for each of {rows} rows, got shape {tuple(embeddings.shape)}")
    return embeddings


def _backward(
    loss_fn: Callable[[Tensor, Tensor], Tensor], query: Tensor, target: Tensor, scaler: Any, gather: bool
) -> Float[Tensor, ""]:
    processes = torch.distributed.get_world_size() if gather else 1
    if processes > 1:
        query, target = _gathered(query), _gathered(target)
    loss = loss_fn(query, target)
    if loss.ndim:
        raise ValueError(f"loss_fn must return a scalar, got shape {tuple(loss.shape)}")
    # Each process has the gradient through its own rows. DDP takes their mean; times their number, that is the sum.
    scaled = loss * processes
    (scaled if scaler is None else scaler.scale(scaled)).backward()
    return loss.detach()


def _gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, of which only this one's have a gradient."""
    shards = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(shards, rows.detach().contiguous())
    shards[torch.distributed.get_rank()] = rows
    return torch.cat(shards)


def _rng_state(chunk: Inputs) -> tuple[Tensor, dict[int, Tensor]]:
    """The state of the CPU's generator, and of those of the current GPU and of any that holds an input."""
    gpus = {value.get_device() for value in chunk.values() if isinstance(value, Tensor) and value.is_cuda}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gpus.add(torch.cuda.current_device())
    return torch.get_rng_state(), {gpu: torch.cuda.get_rng_state(gpu) for gpu in sorted(gpus)}


@contextmanager
def _replayed(state: tuple[Tensor, dict[int, Tensor]]) -> Iterator[None]:
    """Draw again what was drawn from `state` on; afterwards go on as if nothing had been."""
    cpu, gpus = state
    with torch.random.fork_rng(devices=list(gpus)):
        torch.set_rng_state(cpu)
        for gpu, its_state in gpus.items():
            torch.cuda.set_rng_state(its_state, gpu)
        yield
