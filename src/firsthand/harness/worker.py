"""The unit of work, a seed: `prepare`, then the arms one after the other, in one process."""

import copy
import gc
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from firsthand.harness.store import Record
from firsthand.harness.study import Study, load_study
from firsthand.harness.trial import Trial


@dataclass(frozen=True)
class Work:
    """Some arms of one seed of one study."""

    study: str  # slug, or path of a file
    seed: int
    arms: tuple[str, ...]
    smoke: bool = False
    device: str = "cpu"
    data: tuple[str, ...] = ()


@dataclass(frozen=True)
class Started:
    """An arm (or `prepare`) begins."""

    arm: str


@dataclass(frozen=True)
class Progress:
    """How far the running arm is."""

    arm: str
    label: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Finished:
    """An arm (or `prepare`) has ended, well or not."""

    record: Record


Event = Started | Progress | Finished


def run_seed(work: Work, on_progress: Callable[[Progress], None] = lambda _: None) -> Iterator[Event]:
    """Run the arms of one seed and yield what happens. An arm that raises does not stop the others; `prepare` does."""
    study = load_study(work.study)
    prepared: list[Any] = []
    if study.prepare is not None:
        yield Started("prepare")
        record, value = _run_one(study, "prepare", study.prepare, (), work, on_progress)
        if record["status"] != "ok":
            for arm in work.arms:
                yield Finished({**record, "arm": arm, "error": f"prepare: {record['error']}"})
            return
        yield Finished(record)
        prepared = [value]
    for arm in work.arms:
        yield Started(arm)
        record, _ = _run_one(study, arm, study.arms[arm], tuple(prepared), work, on_progress)
        yield Finished(record)


def _run_one(
    study: Study,
    arm: str,
    function: Callable[..., Any],
    prepared: tuple[Any, ...],
    work: Work,
    on_progress: Callable[[Progress], None],
) -> tuple[Record, Any]:
    def tell(label: str, done: int, total: int | None) -> None:
        on_progress(Progress(arm, label, done, total))

    trial = Trial(work.seed, arm, work.smoke, torch.device(work.device), work.data, tell)
    record: Record = {"arm": arm, "seed": work.seed, "status": "ok", "metrics": {}, "costs": {}, "error": "", "traceback": ""}
    value = None
    try:
        arguments = copy.deepcopy(prepared)
        _seed_everything(work.seed)
        with _costs(record["costs"], trial):
            value = function(trial, *arguments)
        if arm != "prepare":
            record["metrics"] = _checked(study, arm, value)
    except Exception as error:
        record["status"] = "failed"
        record["error"] = f"{type(error).__name__}: {error}".partition("\n")[0]
        record["traceback"] = traceback.format_exc()
    record["curves"] = trial.curves
    return record, value


def _checked(study: Study, arm: str, value: object) -> dict[str, float]:
    """The metrics an arm returned, or a `ValueError` that says what is wrong with them."""
    if not isinstance(value, Mapping):
        raise ValueError(f"an arm returns a dict of metrics, {arm!r} returned {type(value).__name__}")
    metrics = {str(name): float(number) for name, number in value.items()}
    for name, number in metrics.items():
        if not isfinite(number):
            raise ValueError(f"the metric {name!r} is {number}")
    for claim in study.claims:
        for needed_arm, needed in claim.needs:
            if needed_arm == arm and needed not in metrics:
                raise ValueError(f"no metric {needed!r}, which the claim needs; returned: {', '.join(metrics) or 'none'}")
    return metrics


def _seed_everything(seed: int) -> None:
    """For what draws from the global generators: dropout, host libraries."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def _costs(costs: dict[str, float | None], trial: Trial) -> Iterator[None]:
    """Measure what runs inside: seconds, peak memory, and how many parameters the largest optimiser steps."""
    seen: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
    trained: list[int] = []

    def see(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        tensors = sum(len(group["params"]) for group in optimizer.param_groups)
        if seen.get(optimizer) != tensors:  # a new one, or one that was given more in the middle of training
            seen[optimizer] = tensors
            trained.append(sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad))

    cuda = trial.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats(trial.device)
    else:
        _reset_peak_memory()
    hook = register_optimizer_step_pre_hook(see)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield
        if cuda:
            torch.cuda.synchronize(trial.device)
    finally:
        costs["wall_s"] = time.perf_counter() - wall
        costs["cpu_s"] = time.process_time() - cpu
        costs["peak_memory_mb"] = torch.cuda.max_memory_allocated(trial.device) / 2**20 if cuda else _peak_memory()
        hook.remove()
        costs["parameters"] = trial.parameters.get("parameters")
        costs["active_parameters"] = trial.parameters.get("active_parameters")
        costs["trained_parameters"] = max(trained, default=None)


def _reset_peak_memory() -> None:
    """Linux forgets a process's peak when asked; elsewhere the peak is that of the process so far."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float:
    """Peak resident memory in MiB."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)
