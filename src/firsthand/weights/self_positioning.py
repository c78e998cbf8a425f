"""Self-positioning: merge experts where a small balanced probe set says, in the span of what each has learnt.

Models may be modules, state dicts, or folders with safetensors files (of transformers or sentence-transformers), which are read
one tensor at a time.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from rich.console import Console
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

Weights = nn.Module | Mapping[str, Tensor] | str | Path
"""A module, its state dict, or a folder of safetensors files."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a folder, read from its safetensors files when they are asked for.

    Names are those in the files. A sentence-transformers folder has its modules in folders of their own: what is in `2_Dense`
    is named with the module's number, `2.linear.weight`.

    Args:
        folder: as `save_pretrained` wrote it, in one file or several.

    Raises:
        ValueError: there is no such folder or no safetensors file in it, or two tensors have one name.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files = sorted(self.folder.glob("*.safetensors")) + sorted(self.folder.glob("[0-9]*_*/*.safetensors"))
        if not self.files:
            raise ValueError(f"{self.folder} must be a folder with safetensors files, got none there")
        self._places: dict[str, tuple[Path, str]] = {}
        for file in self.files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    name = self.prefix(file) + key
                    if name in self._places:
                        raise ValueError(f"{self.folder} has {name!r} twice, in {self._places[name][0].name} and in {file.name}")
                    self._places[name] = file, key

    def prefix(self, file: Path) -> str:
        """What stands before the names of a file's tensors."""
        return "" if file.parent == self.folder else file.parent.name.split("_")[0] + "."

    def __getitem__(self, name: str) -> Tensor:
        file, key = self._places[name]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def task_vector(base: Weights, expert: Weights) -> dict[str, Tensor]:
    r"""What training has changed, $\tau = \theta - \theta_0$, for every floating tensor, in float32 at least.

    Args:
        base: the common start, $\theta_0$.
        expert: what training made of it, $\theta$.

    Raises:
        ValueError: names or shapes differ, or there are adapters that have not been merged.
    """
    start, others = _read(base, [expert])
    return {name: _change(start[name], others[0][name]) for name in _floating(start)}


def task_vector_stats(base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    r"""How far each expert has gone, and whether they have gone the same way.

    The lengths show imbalance: more data, more steps, a longer vector. A negative cosine shows conflict.

    Args:
        base: the common start.
        experts: K of them.

    Returns:
        `"norms"` (K), $\lVert\tau_i\rVert$, and `"cosines"` (K, K). A tensor with two names (tied) counts once.

    Raises:
        ValueError: as `task_vector`; or an expert is the base.
    """
    start, others = _read(base, experts)
    gram = _gram(start, others).sum(dim=0)
    _check_lengths(gram)
    norms = gram.diagonal().sqrt()
    return {"norms": norms, "cosines": gram / norms[:, None] / norms}


def merge_at(
    base: Weights,
    experts: Sequence[Weights],
    t: float | Sequence[float],
    s: float | Sequence[float] = 1.0,
    *,
    path: str = "spherical",
    granularity: str = "model",
) -> dict[str, Tensor]:
    r"""The model at a position in the span of the task vectors.

    Spherical, for two experts with the angle Ω between their task vectors and unit vectors u of these:

    $$ \theta(t, s) = \theta_0 + s\,\big[(1-t)\lVert\tau_1\rVert + t\lVert\tau_2\rVert\big]\,u(t), \qquad
       u(t) = \frac{\sin((1-t)\Omega)\,u_1 + \sin(t\Omega)\,u_2}{\sin\Omega} $$

    More experts are folded in one after the other, each with a position of its own: the first two, what came of them and the
    third, and so on. Where Ω is below 1e-4 or within 1e-4 of π, u is the normalised linear interpolation.

    Linear: $\theta = \theta_0 + s \sum_i t_i \tau_i$; equal weights that sum to 1 are the average of the experts.

    Args:
        base: the common start. Integer tensors, and the buffers of a module, are copied from it.
        experts: K of them, at least 2 for the spherical path.
        t: spherical: where between the two, 0 the first and 1 the second; for more experts K-1 numbers. Linear: K weights.
        s: length, in units of the interpolated length; spherical with more than 2 experts: K-1 numbers, or one for all.
        path: `"spherical"` or `"linear"`.
        granularity: `"model"` takes all tensors for one long vector, `"tensor"` each for itself (angle and length). Our choice;
            a tensor that one of the experts has not changed is interpolated linearly.

    Returns:
        A state dict with the base's names and dtypes.

    Raises:
        ValueError: as `task_vector_stats`; or there are not as many numbers as needed, or an unknown `path` or `granularity`.

    Source:
        Li et al., "Improving General Text Embedding Model: Tackling Task Conflict and Data Imbalance through Model Merging",
        2024, arXiv 2410.15035, of which we know the idea from a second-hand reading: the parametrisation is our choice.
    """
    _check_options(path, granularity)
    start, others = _read(base, experts)
    times, lengths = _positions(t, s, path, len(experts))
    gram = _gram(start, others)
    _check_lengths(gram.sum(dim=0))
    gram = gram if granularity == "tensor" else gram.sum(dim=0, keepdim=True)
    coefficients = _coefficients(gram, times, lengths, path)
    return _merged(start, others, coefficients)


class SelfPositioningResult(NamedTuple):
    """What a search found.

    Attributes:
        state_dict: of the merged model.
        position: spherical: (t, s) of each fold; linear: one pair of the tuple of weights and the length. `merge_at` takes it.
        history: the probe loss of every step, with `norm_penalty`.
    """

    state_dict: dict[str, Tensor]
    position: list[tuple[Any, float]]
    history: list[float]


def self_positioning(
    base_model: nn.Module,
    experts: Sequence[Weights],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    probe: Iterable[Any],
    *,
    path: str = "spherical",
    granularity: str = "model",
    steps: int = 100,
    lr: float = 0.1,
    momentum: float = 0.9,
    norm_penalty: float = 0.0,
    init: Sequence[tuple[Any, float]] | None = None,
    progress: bool = True,
) -> SelfPositioningResult:
    r"""Search, by gradient descent on a small balanced probe set, where to merge.

    With $t = \sigma(a)$ and $s = e^b$, and g the gradient of the probe loss at the merged weights, the chain rule needs two dot
    products a step and no second-order term:

    $$ \frac{\partial L}{\partial a} = \Big\langle g, \frac{\partial\theta}{\partial a}\Big\rangle, \qquad
       \frac{\partial L}{\partial b} = \Big\langle g, \frac{\partial\theta}{\partial b}\Big\rangle $$

    Since θ is a sum of task vectors with coefficients that depend on (a, b), these are the dot products of g with the task
    vectors, times the derivatives of the coefficients. The search keeps the position at which the running average of the probe
    loss was lowest. Spherical: folds, as `merge_at`, `steps` for each. Linear: $t = \mathrm{softmax}(a)$, all experts at once.

    In memory are the base, the experts (of a folder one tensor at a time), a merged model and its gradient.

    Args:
        base_model: the common start, any module, such as a `SentenceTransformer`. It is not changed, nor are the experts.
        experts: K of them, at least 2. Of a folder, each parameter is found by its name, or by the end of it.
        loss_fn: `loss_fn(model, batch)` gives a scalar. The model is the merged one, without dropout.
        probe: batches; drawn equally from all tasks, each batch from one or from all. Gone through again when they end.
        path: `"spherical"` or `"linear"` (some summaries of the paper describe a convex combination).
        granularity: see `merge_at`; one (t, s) for all tensors in either case.
        steps: of a search. All numbers here are our choice: the paper's are unknown to us.
        lr: learning rate of (a, b).
        momentum: of the descent.
        norm_penalty: adds this times s² to the loss.
        init: where to begin, like `position` of the result; by default t = ½ (equal weights) and s = 1.
        progress: whether a bar on stderr shows the steps.

    Raises:
        ValueError: as `merge_at`; or `probe` has no batch, the probe loss is not a finite scalar, a number is out of range.

    Source:
        as `merge_at`.
    """
    _check_options(path, granularity)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if len(experts) < 2:
        raise ValueError(f"experts must be at least 2, got {len(experts)}")
    if not (lr > 0 and 0 <= momentum < 1 and norm_penalty >= 0):
        raise ValueError(
            f"lr must be positive, momentum in [0, 1) and norm_penalty at least 0, got {lr}, {momentum} and {norm_penalty}"
        )
    folds = len(experts) - 1 if path == "spherical" else 1
    if init is not None and len(init) != folds:
        raise ValueError(f"init must have {folds} positions, got {len(init)}")

    model = copy.deepcopy(base_model).eval()
    start, others = _read(base_model, experts)
    parameters = dict(model.named_parameters())  # a tied one has one name here, and that one is enough
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    batches = _again_and_again(probe)
    history: list[float] = []
    found: list[tuple[Any, float]] = []
    merged: Mapping[str, Tensor] = others[0]
    for fold in range(folds):
        pair = [merged, others[fold + 1]] if path == "spherical" else others
        gram = _gram(start, pair)
        _check_lengths(gram.sum(dim=0))
        gram = gram if granularity == "tensor" else gram.sum(dim=0, keepdim=True)
        a, b = _begin(init[fold] if init is not None else None, path, len(experts))
        optimizer = torch.optim.SGD([a, b], lr=lr, momentum=momentum)
        average, best = 0.0, (math.inf, a, b)
        bar = track(
            range(steps),
            f"self-positioning {fold + 1} of {folds}",
            console=Console(stderr=True),
            transient=True,
            disable=not progress,
        )
        for step in bar:
            coefficients = _coefficients(gram, *_position(a, b, path), path)
            _write(parameters, start, pair, coefficients.detach())
            model.zero_grad()
            loss = loss_fn(model, next(batches))
            if loss.numel() != 1 or not torch.isfinite(loss):
                raise ValueError(f"loss_fn must return a finite scalar, got {loss.tolist()} in step {step + 1}")
            loss.backward()
            penalty = norm_penalty * torch.exp(2 * b)
            history.append(loss.item() + penalty.item())
            average = 0.9 * average + 0.1 * history[-1]
            smooth = average / (1 - 0.9 ** (step + 1))
            if smooth < best[0]:
                best = smooth, a.detach().clone(), b.detach().clone()
            optimizer.zero_grad()
            slopes = _slopes(parameters, start, pair, len(gram))
            torch.autograd.backward([coefficients, penalty], [slopes, torch.ones_like(penalty)])
            optimizer.step()
        times, lengths = _position(*best[1:], path)
        found.append((times[0].item() if path == "spherical" else tuple(times.tolist()), lengths[0].item()))
        merged = _merged(start, pair, _coefficients(gram, times, lengths, path))
    return SelfPositioningResult(dict(merged), found, history)


def merge_checkpoints(
    base: str | Path,
    experts: Sequence[str | Path],
    output: str | Path,
    t: float | Sequence[float],
    s: float | Sequence[float] = 1.0,
    *,
    path: str = "spherical",
    progress: bool = True,
) -> None:
    """`merge_at` from folders to a folder, with one safetensors file of the base in memory at a time.

    Everything else in the base's folder (configuration, tokenizer, sentence-transformers modules) is copied, so that
    `from_pretrained` or `SentenceTransformer` load the result.

    Args:
        base: the folder of the common start.
        experts: their folders. Names in their files must be the base's; how they are spread over files does not matter.
        output: a folder that is not there yet, or is empty.
        t: see `merge_at`, as for all that follow.
        s: length.
        path: `"spherical"` or `"linear"`. Granularity is `"model"`.
        progress: whether a bar on stderr shows the files.

    Raises:
        ValueError: as `merge_at`; or `output` is not empty.
    """
    _check_options(path, "model")
    target = Path(output)
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"output must be a folder that is empty or not there yet, got {target}")
    start, others = _read(base, experts)
    times, lengths = _positions(t, s, path, len(experts))
    gram = _gram(start, others).sum(dim=0, keepdim=True)
    _check_lengths(gram[0])
    coefficients = _coefficients(gram, times, lengths, path)
    checkpoint = Checkpoint(base)
    shutil.copytree(base, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    bar = track(checkpoint.files, "merging", console=Console(stderr=True), transient=True, disable=not progress)
    for file in bar:
        prefix = checkpoint.prefix(file)
        with safe_open(file, framework="pt") as opened:
            shard = {prefix + key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata()
        place = target / file.relative_to(checkpoint.folder)
        merged = _merged(shard, others, coefficients)
        save_file({name.removeprefix(prefix): value for name, value in merged.items()}, place, metadata=metadata)
        os.chmod(place, 0o644)  # safetensors writes it for the owner alone


# Reading models of every kind alike


def _read(base: Weights, experts: Sequence[Weights]) -> tuple[Mapping[str, Tensor], list[Mapping[str, Tensor]]]:
    """Base and experts as mappings with the same names and shapes."""
    start = _tensors("base", base)
    others = []
    for number, expert in enumerate(experts):
        what = f"experts[{number}]"
        other = _tensors(what, expert)
        if isinstance(other, Checkpoint) and not isinstance(start, Checkpoint):
            other = _Renamed(what, other, start)
        elif missing := set(start).symmetric_difference(other):
            raise ValueError(f"{what} must have the names of the base, got a difference in {_some(missing)}")
        for name in start:
            if start[name].shape != other[name].shape:
                expected, got = tuple(start[name].shape), tuple(other[name].shape)
                raise ValueError(f"{what} must have shape {expected} at {name!r}, got {got}")
        others.append(other)
    return start, others


def _tensors(what: str, weights: Weights) -> Mapping[str, Tensor]:
    if isinstance(weights, nn.Module):
        buffers = {name for name, _ in weights.named_buffers()}
        tensors: Mapping[str, Tensor] = _State(weights.state_dict(), buffers)
    else:
        tensors = Checkpoint(weights) if isinstance(weights, str | Path) else weights
    if adapters := [name for name in tensors if "lora_" in name]:
        raise ValueError(f"{what} must have its adapters merged (merge_and_unload), got {_some(adapters)}")
    return tensors


class _State(dict[str, Tensor]):
    """A state dict that knows which of its tensors are buffers."""

    def __init__(self, tensors: Mapping[str, Tensor], buffers: set[str]) -> None:
        super().__init__(tensors)
        self.buffers = buffers


class _Renamed(Mapping[str, Tensor]):
    """A checkpoint under the names of a module: `0.auto_model.embeddings.weight` is `embeddings.weight` in the first file.

    What a checkpoint leaves out is the second name of a tied tensor, or a buffer, which is copied from the base.
    """

    def __init__(self, what: str, checkpoint: Checkpoint, base: Mapping[str, Tensor]) -> None:
        self.checkpoint, self.base = checkpoint, base
        self.names: dict[str, str | None] = {}
        second = _second_names(base)
        buffers = getattr(base, "buffers", set())
        for name in base:
            ends = [name[place:] for place in range(len(name)) if not place or name[place - 1] == "."]
            module = name.partition(".")[0]
            candidates = [f"{module}.{end}" for end in ends if module.isdigit()] + ends
            self.names[name] = next((end for end in candidates if end in checkpoint), None)
        for name, first in second.items():
            self.names[first] = self.names[first] or self.names[name]
            self.names[name] = self.names[first]
        if missing := [name for name, key in self.names.items() if key is None and name not in buffers]:
            raise ValueError(f"{what} must have the base's tensors, got none for {_some(missing)}")

    def __getitem__(self, name: str) -> Tensor:
        key = self.names[name]
        return self.base[name] if key is None else self.checkpoint[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _second_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Of tied tensors: the later name -> the first. Tensors from files are never tied."""
    if isinstance(tensors, Checkpoint):
        return {}
    first: dict[tuple[Any, ...], str] = {}
    second = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device)
            if first.setdefault(place, name) != name:
                second[name] = first[place]
    return second


def _floating(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of what is merged, a tied tensor under its first name only."""
    skipped = getattr(tensors, "buffers", set()) | _second_names(tensors).keys()
    return [name for name in tensors if name not in skipped and tensors[name].is_floating_point()]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


# Arithmetic: all is a sum of task vectors with coefficients, which depend on the Gram matrix of the task vectors alone


def _change(start: Tensor, expert: Tensor) -> Tensor:
    dtype = torch.promote_types(start.dtype, torch.float32)
    return expert.to(start.device, dtype) - start.to(dtype)


def _gram(start: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> Float64[Tensor, "tensors experts experts"]:
    """Dot products of the task vectors, tensor by tensor."""
    grams = []
    for name in _floating(start):
        changes = torch.stack([_change(start[name], other[name]).flatten() for other in others]).double()
        grams.append((changes @ changes.T).cpu())
    if not grams:
        raise ValueError("base must have floating tensors, got none")
    return torch.stack(grams)


def _check_lengths(gram: Tensor) -> None:
    if not torch.isfinite(gram).all():
        raise ValueError("experts must have finite weights, got some that are not")
    for number, square in enumerate(gram.diagonal().tolist()):
        if square <= 0:
            raise ValueError(f"experts[{number}] must differ from the base, got the base")


def _coefficients(
    gram: Float64[Tensor, "groups experts experts"],
    times: Float64[Tensor, " times"],
    lengths: Float64[Tensor, " lengths"],
    path: str,
) -> Float64[Tensor, "groups experts"]:
    """What each task vector is multiplied by, in each group of tensors. Differentiable in times and lengths."""
    if path == "linear":
        return (lengths * times).expand(len(gram), -1)
    coefficients = torch.zeros_like(gram[:, 0])
    coefficients[:, 0] = 1.0
    for number, (t, s) in enumerate(zip(times, lengths, strict=True), start=1):
        product = torch.einsum("gi,gi->g", coefficients, gram[:, number])
        first = torch.einsum("gi,gij,gj->g", coefficients, gram, coefficients).sqrt()  # the length of what has been merged
        second = gram[:, number, number].sqrt()
        still = (first == 0) | (second == 0)
        angle = torch.acos((product / torch.where(still, 1.0, first * second)).clamp(-1, 1)).detach()
        near = still | (angle.sin() < 1e-4)
        sine = torch.where(near, 1.0, angle.sin())
        left = torch.where(near, 1 - t, torch.sin((1 - t) * angle) / sine)  # of the unit vectors
        right = torch.where(near, t, torch.sin(t * angle) / sine)
        length = s * ((1 - t) * first + t * second)
        cosine = torch.where(still, 0.0, angle.cos())
        straight = (left**2 + right**2 + 2 * left * right * cosine).clamp(min=1e-24).sqrt()  # 1 on the sphere
        length = length / torch.where(near, straight, 1.0)
        # A tensor that one of the two has not changed has no direction there: interpolate.
        left = torch.where(still, s * (1 - t), length * left / torch.where(still, 1.0, first))
        right = torch.where(still, s * t, length * right / torch.where(still, 1.0, second))
        added = torch.zeros_like(coefficients)
        added[:, number] = 1.0
        coefficients = left[:, None] * coefficients + right[:, None] * added
    return coefficients


def _merged(
    start: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], coefficients: Float64[Tensor, "groups experts"]
) -> dict[str, Tensor]:
    """A state dict of the base plus the task vectors times their coefficients."""
    names = _floating(start)
    tied = _second_names(start)
    rows = coefficients.expand(len(names), -1) if len(coefficients) == 1 else coefficients
    moved = {name: _moved(start, others, name, row) for name, row in zip(names, rows.tolist(), strict=True)}
    copied = {name: start[name].clone() for name in start if name not in moved and name not in tied}
    return {name: (moved | copied)[tied.get(name, name)] for name in start}


def _moved(start: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], name: str, row: Sequence[float]) -> Tensor:
    # The base times what is left of 1, plus the experts: no task vector is ever made, and nothing is copied twice.
    value = start[name].to(torch.promote_types(start[name].dtype, torch.float32)) * (1 - sum(row))
    for other, coefficient in zip(others, row, strict=True):
        value.add_(other[name].to(value.device), alpha=coefficient)
    return value.to(start[name].dtype)


# The search


def _position(a: Tensor, b: Tensor, path: str) -> tuple[Tensor, Tensor]:
    return (torch.sigmoid(a) if path == "spherical" else torch.softmax(a, dim=0)), torch.exp(b)


def _begin(position: tuple[Any, float] | None, path: str, experts: int) -> tuple[Tensor, Tensor]:
    """The numbers a and b of a position."""
    if position is None:
        position = (0.5, 1.0) if path == "spherical" else ([1.0 / experts] * experts, 1.0)
    times, lengths = _positions(*position, path, 2 if path == "spherical" else experts)
    if not ((times > 0).all() and (path == "linear" or (times < 1).all()) and (lengths > 0).all()):
        raise ValueError(f"init must be inside of the range, t in (0, 1) or weights above 0, and s above 0, got {position}")
    a = torch.logit(times) if path == "spherical" else times.log()
    return a.requires_grad_(), lengths.log().requires_grad_()


def _write(
    parameters: Mapping[str, nn.Parameter],
    start: Mapping[str, Tensor],
    others: Sequence[Mapping[str, Tensor]],
    coefficients: Float64[Tensor, "groups experts"],
) -> None:
    """Set the model's parameters to a position."""
    names = _floating(start)
    rows = coefficients.expand(len(names), -1) if len(coefficients) == 1 else coefficients
    with torch.no_grad():
        for name, row in zip(names, rows.tolist(), strict=True):
            parameters[name].copy_(_moved(start, others, name, row))


def _slopes(
    parameters: Mapping[str, nn.Parameter], start: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]], groups: int
) -> Float[Tensor, "groups experts"]:
    """The derivative of the loss by each coefficient: the gradient times the task vector."""
    slopes = torch.zeros(len(parameters), len(others), dtype=torch.float64)
    for row, name in enumerate(_floating(start)):
        gradient = parameters[name].grad
        if gradient is not None:
            for column, other in enumerate(others):
                change = _change(start[name], other[name])
                slopes[row, column] = torch.dot(gradient.to(change.dtype).flatten(), change.flatten()).item()
    return slopes if groups > 1 else slopes.sum(dim=0, keepdim=True)


def _again_and_again(probe: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in probe:
            empty = False
            yield batch
        if empty:
            raise ValueError("probe must have a batch whenever it is gone through, got none")


# What a caller may get wrong


def _check_options(path: str, granularity: str) -> None:
    if path not in ("spherical", "linear"):
        raise ValueError(f"path must be 'spherical' or 'linear', got {path!r}")
    if granularity not in ("model", "tensor"):
        raise ValueError(f"granularity must be 'model' or 'tensor', got {granularity!r}")


def _positions(t: float | Sequence[float], s: float | Sequence[float], path: str, experts: int) -> tuple[Tensor, Tensor]:
    """Times and lengths, as many as there are folds (spherical) or weights and one length (linear)."""
    folds = experts - 1 if path == "spherical" else 1
    wanted = folds if path == "spherical" else experts
    if wanted < 1:
        raise ValueError(f"experts must be at least 2 for the spherical path, got {experts}")
    times = torch.tensor(t if isinstance(t, Sequence) else [t], dtype=torch.float64)
    lengths = torch.tensor(s if isinstance(s, Sequence) else [s] * folds, dtype=torch.float64)
    if times.shape != (wanted,) or not torch.isfinite(times).all():
        raise ValueError(f"t must be {wanted} finite number(s) for {experts} experts on the {path} path, got {t}")
    if lengths.shape != (folds,) or not torch.isfinite(lengths).all():
        raise ValueError(f"s must be {folds} finite number(s) for {experts} experts on the {path} path, got {s}")
    return times, lengths
