"""Deep incubation: the modules of a deep model are trained apart, each inside a shallow frozen helper, then put together."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from firsthand.weights.layers import find_layers, with_layers

Weights = dict[str, Float[Tensor, "..."]]


def split_modules(
    model: nn.Module, num_modules: int, depths: Sequence[int] | None = None, layers: str | None = None
) -> list[list[str]]:
    """Which parameters each of `num_modules` modules of a model owns: so many layers in a row, and what stands beside them.

    What comes before the layers (embeddings) belongs to the first module, what comes after them (last norm, head) to the last.
    A parameter with two names, such as embeddings that are the head too, is in the list once, where it comes first.

    Args:
        model: of transformers, with one list of equal layers: ViT, BERT, Llama, GPT-2 and most others.
        num_modules: K, at least 1.
        depths: layers of each module; None for equal shares.
        layers: dotted path of the list; None to look for it.

    Returns:
        For each module the names of its parameters, as `named_parameters` has them. Together they are all.

    Raises:
        ValueError: no such list, K does not divide its length where `depths` is None, or `depths` are not K positive numbers that
            sum to it.

    Source:
        Ni et al., "Deep Model Assembling", 2022, arXiv 2212.04129, and its released code. What comes before the layers is told by
        the order in which the model registers its parts, our choice.
    """
    path = find_layers(model, layers)
    starts = _starts(len(model.get_submodule(path)), num_modules, depths)
    owned: list[list[str]] = [[] for _ in range(num_modules)]
    seen = False
    for name, _ in model.named_parameters():
        if name.startswith(f"{path}."):
            seen = True
            layer = int(name.removeprefix(f"{path}.").partition(".")[0])
            module = sum(start <= layer for start in starts[1:])
        else:
            module = num_modules - 1 if seen else 0
        owned[module].append(name)
    return owned


def meta_model(model: Any, num_modules: int, blocks_per_module: int = 1, layers: str | None = None) -> Any:
    """The shallow helper: the same model with K × `blocks_per_module` layers, freshly initialised. Train it first, end to end.

    Args:
        model: the deep model, see `split_modules`; left as it is.
        num_modules: K, at least 1.
        blocks_per_module: layers that stand for a module, at least 1.
        layers: dotted path of its layers.

    Raises:
        ValueError: a number is below 1, or see `firsthand.weights.layers.with_layers`.

    Source:
        arXiv 2212.04129: one layer for each module, in paper and code.
    """
    if num_modules < 1 or blocks_per_module < 1:
        raise ValueError(f"num_modules and blocks_per_module must be at least 1, got {num_modules} and {blocks_per_module}")
    return with_layers(model, num_modules * blocks_per_module, layers)


def hybrid_network(
    meta: Any,
    target: Any,
    index: int,
    num_modules: int,
    depths: Sequence[int] | None = None,
    layers: str | None = None,
) -> Any:
    """The meta model with one of its modules replaced by that of the deep model, in which this one is trained.

    Its forward is the models'. The module's parameters are those of `target` themselves, not copies, and the only ones that
    require a gradient; all others are copies of the meta model's. Gradients go through the frozen modules behind it, and no
    graph is kept for those before it.

    Args:
        meta: the trained meta model; left as it is.
        target: the deep model, of the same class and width.
        index: which module, from 0.
        num_modules: K.
        depths: layers of each module of `target`; None for equal shares.
        layers: dotted path of the layers, the same in both.

    Returns:
        A model of the same class. It keeps no key-value cache: numbers of layers would come twice in it. Normalisation by
        batches stays in evaluation mode in frozen modules if you set it so; none of the named models has it.

    Raises:
        ValueError: the models are of different classes or widths, K does not fit them, or `index` is out of range.

    Source:
        arXiv 2212.04129, "module incubation", and its released code.
    """
    path = find_layers(target, layers)
    if type(meta) is not type(target):
        raise ValueError(f"meta must be of the class of target, {type(target).__name__}, got {type(meta).__name__}")
    if not 0 <= index < num_modules:
        raise ValueError(f"index must be in [0, {num_modules}), got {index}")
    stages, blocks = _starts(len(meta.get_submodule(path)), num_modules, None), target.get_submodule(path)
    starts = _starts(len(blocks), num_modules, depths)
    _check_widths(meta, target, path)

    hybrid = copy.deepcopy(meta).requires_grad_(False)
    own = hybrid.get_submodule(path)
    trained = blocks[starts[index] : starts[index + 1]]
    hybrid.set_submodule(path, nn.ModuleList([*own[: stages[index]], *trained, *own[stages[index + 1] :]]))
    own_names = set(split_modules(target, num_modules, depths, path)[index])
    trained_here = {id(target.get_parameter(name).requires_grad_(True)) for name in own_names}
    for name, parameter in target.named_parameters(remove_duplicate=False):  # a tied head goes where its embeddings go
        if id(parameter) in trained_here and not name.startswith(f"{path}."):
            parent, _, key = name.rpartition(".")
            hybrid.get_submodule(parent)._parameters[key] = parameter
    config = hybrid.config
    config.num_hidden_layers = len(hybrid.get_submodule(path))
    config.use_cache = False
    return hybrid


def trainable_parameters(hybrid: nn.Module) -> list[nn.Parameter]:
    """The parameters of the module that is trained: what to give to an optimiser, and nothing else, for it may decay weights.

    Args:
        hybrid: a hybrid network.

    Returns:
        Those of its parameters that require a gradient.

    Source:
        arXiv 2212.04129: only the module is in the optimiser.
    """
    return [parameter for parameter in hybrid.parameters() if parameter.requires_grad]


def incubate(
    meta: Any,
    target: Any,
    index: int,
    num_modules: int,
    batches: Sequence[Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    mode: str = "incubation",
    depths: Sequence[int] | None = None,
    layers: str | None = None,
) -> Any:
    r"""Train one module of the deep model in place, one step of AdamW for each batch, the learning rate falling as a cosine.

    In `"incubation"` the loss is that of the task, at the end of the hybrid network. In `"imitation"` the module learns to
    put out what the meta model's module does, $\lVert h - h_\mathrm{meta} \rVert^2$ averaged; the last module's output is the
    logits.

    Args:
        meta: see `hybrid_network`; with it `target`, `index`, `num_modules`, `depths` and `layers`.
        batches: one for each step.
        loss: from a model and a batch to a scalar. For imitation it must run the model, and its value is not used.
        lr: largest learning rate, positive.
        weight_decay: of the module's parameters.
        mode: `"incubation"` or `"imitation"`.

    Returns:
        `target`.

    Raises:
        ValueError: an unknown `mode`, a learning rate that is not positive, or see `hybrid_network`.

    Source:
        arXiv 2212.04129 and its code: AdamW with weight decay 0.05 and a learning rate of 2e-3 for a batch of 2048, cosine.
        Imitation is what the paper argues against (from memory, unverified).
    """
    if mode not in ("incubation", "imitation"):
        raise ValueError(f"mode must be 'incubation' or 'imitation', got {mode!r}")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    path = find_layers(target, layers)
    hybrid = hybrid_network(meta, target, index, num_modules, depths, path)
    optimizer = torch.optim.AdamW(trainable_parameters(hybrid), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, len(batches)), eta_min=lr / 100)
    ends = None, None  # what the meta model's module and ours put out: the logits, or the output of a layer
    if index < num_modules - 1:
        behind = _starts(len(meta.get_submodule(path)), num_modules, None)[index + 1]
        more = len(hybrid.get_submodule(path)) - len(meta.get_submodule(path))
        ends = f"{path}.{behind - 1}", f"{path}.{behind + more - 1}"
    hybrid.train()
    for batch in batches:
        if mode == "incubation":
            value = loss(hybrid, batch)
        else:
            with torch.no_grad():
                wanted = _output_of(meta, ends[0], loss, batch)
            value = F.mse_loss(_output_of(hybrid, ends[1], loss, batch), wanted)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
    return target


def incubate_apart(
    meta: Any,
    target: Any,
    num_modules: int,
    train: Callable[[Any, int], object],
    folder: Path | str,
    *,
    workers: int = 2,
    depths: Sequence[int] | None = None,
    layers: str | None = None,
) -> Any:
    """Train all modules in processes of their own, several at once, and assemble them.

    Nothing goes between the processes. Each leaves its module in `folder` as `module-0.safetensors` and so on, whole or not at
    all; a module whose file is there is not trained again, so that a run that was killed goes on.

    Args:
        meta: see `hybrid_network`; with it `target`, `num_modules`, `depths` and `layers`. Both are left as they are.
        train: from a hybrid network and the number of its module to nothing; it trains `trainable_parameters(hybrid)`. A function
            of a module that the processes can import, which loads its own data. Seed what it draws by the number.
        folder: made if it is not there.
        workers: processes at a time, at least 1. Each has its share of torch's threads.

    Returns:
        A copy of `target` with the trained modules, to be trained on end to end.

    Raises:
        ValueError: `workers` is below 1, or see `hybrid_network`. What `train` raises comes through; finished modules are kept.

    Source:
        arXiv 2212.04129: modules are trained without any communication.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    split = split_modules(target, num_modules, depths, layers)
    files = [folder / f"module-{index}.safetensors" for index in range(num_modules)]
    threads = max(1, torch.get_num_threads() // workers)
    missing = [index for index, file in enumerate(files) if not file.exists()]
    if missing:
        with ProcessPoolExecutor(min(workers, len(missing)), get_context("spawn")) as pool:
            jobs = [
                pool.submit(_train_module, meta, target, index, num_modules, train, files[index], threads, depths, layers)
                for index in missing
            ]
            for job in jobs:
                job.result()
    from safetensors.torch import load_file

    states = [load_file(file) for file in files]
    for file, state, names in zip(files, states, split, strict=True):
        if set(state) != set(names):
            raise ValueError(f"folder must hold modules of this model, {file} has other parameters")
    return assemble(target, states)


def assemble(model: Any, modules: Sequence[Mapping[str, Float[Tensor, ...]]]) -> Any:
    """A copy of a model with its weights from separately trained modules.

    Args:
        model: the deep model; left as it is.
        modules: for each module its parameters by name. Together they must be all of the model's, each once.

    Raises:
        ValueError: a parameter is missing, comes twice, is none of the model's or has another shape.

    Source:
        arXiv 2212.04129.
    """
    parameters = dict(model.named_parameters())
    given = [name for module in modules for name in module]
    if len(set(given)) < len(given) or set(given) != set(parameters):
        wrong = sorted({name for name in given if given.count(name) > 1} | set(given) ^ set(parameters))
        raise ValueError(f"modules must have each parameter of the model once, which is not so for {', '.join(wrong[:3])}")
    assembled = copy.deepcopy(model)
    with torch.no_grad():
        for module in modules:
            for name, weight in module.items():
                if weight.shape != parameters[name].shape:
                    raise ValueError(f"{name} must have shape {tuple(parameters[name].shape)}, got {tuple(weight.shape)}")
                assembled.get_parameter(name).copy_(weight)
    return assembled


def module_state(model: nn.Module, names: Iterable[str]) -> Weights:
    """Copies of a module's parameters by name, as `assemble` takes them.

    Args:
        model: that has them.
        names: of its parameters, one of the lists of `split_modules`.

    Source:
        Ours.
    """
    return {name: model.get_parameter(name).detach().clone() for name in names}


def _train_module(
    meta: Any,
    target: Any,
    index: int,
    num_modules: int,
    train: Callable[[Any, int], object],
    file: Path,
    threads: int,
    depths: Sequence[int] | None,
    layers: str | None,
) -> None:
    from safetensors.torch import save_file

    torch.set_num_threads(threads)
    target = copy.deepcopy(target)  # torch hands tensors to another process as shared memory
    train(hybrid_network(meta, target, index, num_modules, depths, layers), index)
    state = module_state(target, split_modules(target, num_modules, depths, layers)[index])
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        save_file({name: weight.cpu().contiguous() for name, weight in state.items()}, Path(scratch) / file.name)
        os.replace(Path(scratch) / file.name, file)


def _output_of(model: Any, layer: str | None, loss: Callable[[Any, Any], Tensor], batch: Any) -> Tensor:
    """What a layer, or the model at its end, puts out while the loss runs it."""
    heard: list[Any] = []
    module = model if layer is None else model.get_submodule(layer)
    hook = module.register_forward_hook(lambda *call: heard.append(call[2]))
    try:
        loss(model, batch)
    finally:
        hook.remove()
    output = heard[-1]
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits


def _starts(length: int, num_modules: int, depths: Sequence[int] | None) -> list[int]:
    """Where each module begins, and at last the end."""
    if num_modules < 1:
        raise ValueError(f"num_modules must be at least 1, got {num_modules}")
    if depths is None:
        if length % num_modules:
            raise ValueError(f"num_modules must divide the number of layers, {length}, or depths be given; got {num_modules}")
        depths = [length // num_modules] * num_modules
    if len(depths) != num_modules or min(depths) < 1 or sum(depths) != length:
        raise ValueError(f"depths must be {num_modules} positive numbers that sum to {length}, got {list(depths)}")
    return [sum(depths[:index]) for index in range(num_modules + 1)]


def _check_widths(meta: nn.Module, target: nn.Module, path: str) -> None:
    def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
        own = {f"{path}.0.{name}": p for name, p in model.get_submodule(path)[0].named_parameters()}
        own |= {name: p for name, p in model.named_parameters() if not name.startswith(f"{path}.")}
        return {name: tuple(parameter.shape) for name, parameter in own.items()}

    theirs, ours = shapes(meta), shapes(target)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise ValueError(
                f"meta must have the widths of target: {name} is {theirs.get(name)} there and {ours.get(name)} in target"
            )
