"""Run a study: every arm at every seed, on an engine, kept trial by trial."""

import importlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firsthand.harness import fingerprint, store
from firsthand.harness.engines import Died, Done, Engine, Local
from firsthand.harness.published import Evidence
from firsthand.harness.store import Record
from firsthand.harness.study import Study, StudyError, load_study, study_name
from firsthand.harness.worker import Finished, Progress, Started, Work

FIRST_VERDICT_SEED = 1000
POLL = 0.2  # seconds


@dataclass(frozen=True)
class Kept:
    """A trial of an earlier run is used again."""

    record: Record


@dataclass(frozen=True)
class Warned:
    """Something the user should know, and which stops nothing."""

    message: str


@dataclass(frozen=True)
class At:
    """An event of a running trial, and of which seed it is."""

    seed: int
    event: Started | Progress


@dataclass(frozen=True)
class Ended:
    """A trial has ended, well or not."""

    record: Record


Told = Kept | Warned | At | Ended


def run(
    study: Study | str,
    *,
    seeds: int | Iterable[int] | None = None,
    first_seed: int = FIRST_VERDICT_SEED,
    smoke: bool = False,
    device: str = "cpu",
    fallback: bool = False,
    engine: Engine | None = None,
    timeout: float | None = None,
    root: Path | None = None,
    tell: Callable[[Told], None] = lambda _: None,
) -> Evidence:
    """Run a study and return its evidence.

    Trials that an earlier run has finished, with the same code and libraries, are not run again. A trial that fails is
    recorded, and run again next time.

    Args:
        study: a study read by `load_study`, a slug, or the path of a file.
        seeds: how many, or which; by default as many as the study asks for, or 1 with `smoke`.
        first_seed: the first, if `seeds` is a number. Below 100 is for tuning, from 1000 on for verdicts.
        smoke: tiny sizes, only to see that everything runs.
        device: `"cpu"`, `"cuda"`, ...
        fallback: use the study's fallback data.
        engine: where to run; by default `Local()`, one worker per core.
        timeout: seconds after which a trial is ended and counted as failed.
        root: folder of the store.
        tell: called with what happens, as it happens.

    Returns:
        The evidence: a dict that can be written as JSON (see `firsthand.harness.evidence`).

    Raises:
        StudyError: the study cannot be run as written.
        ValueError: no seeds, or a timeout that is not positive.
    """
    if isinstance(study, str):
        study = load_study(study)
    if study.path is None:
        raise StudyError("a study is run from the file it is written in: give its path, or use load_study")
    if fallback and not study.fallback:
        raise StudyError(f"study {study.method!r} has no fallback data")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive, got {timeout}")
    chosen = _seeds(study, seeds, first_seed, smoke)
    data = study.fallback if fallback else study.data
    code = fingerprint.code_fingerprint(study.path)
    libraries = fingerprint.library_versions(study.path)
    folder = (root or store.default_root()) / study.method

    def place(arm: str, seed: int) -> Path:
        name = fingerprint.trial_key(code, libraries, arm=arm, seed=seed, smoke=smoke, device=device.partition(":")[0], data=data)
        return folder / f"{name}.json"

    def kept(arm: str, seed: int) -> Record | None:
        try:
            return store.get(place(arm, seed))
        except store.Damaged as error:
            tell(Warned(f"{error}; the trial is run again"))
            return None

    def end(record: Record) -> None:
        if record["status"] == "ok":
            store.put(place(record["arm"], record["seed"]), record)
        records[record["arm"], record["seed"]] = record
        tell(Ended(record))

    records: dict[tuple[str, int], Record] = {}
    waiting: deque[Work] = deque()
    for seed in chosen:
        for arm in ("prepare", *study.arms):
            if record := kept(arm, seed):
                records[arm, seed] = record
                if arm != "prepare":
                    tell(Kept(record))
        if missing := tuple(arm for arm in study.arms if (arm, seed) not in records):
            waiting.append(Work(study_name(study.path), seed, missing, smoke, device, data))

    if waiting:
        engine = engine or Local()
        # Statistics take half a second to import: let that be while the workers start.
        threading.Thread(target=importlib.import_module, args=("firsthand.harness.evidence",)).start()
        try:
            _work_through(waiting, engine, timeout, end, tell)
        finally:
            engine.close()
    from firsthand.harness.evidence import summarise

    return summarise(
        study,
        list(records.values()),
        seeds=chosen,
        smoke=smoke,
        device=device,
        data=data,
        fallback=fallback,
        fingerprint=code,
        versions=libraries,
    )


def _work_through(
    waiting: deque[Work], engine: Engine, timeout: float | None, end: Callable[[Record], None], tell: Callable[[Told], None]
) -> None:
    """Keep the engine's slots full until nothing waits. What a dead or stopped worker left undone goes back to the queue."""
    running: dict[Any, _Running] = {}

    def lost(state: _Running, error: str, output: str = "") -> None:
        arm = state.arm or "prepare"
        failed = _failure(arm, state.work.seed, error, output)
        if arm == "prepare":
            for each in state.left:
                end({**failed, "arm": each, "error": f"prepare: {error}"})
        else:
            end(failed)
            if left := tuple(each for each in state.left if each != arm):
                waiting.appendleft(Work(**{**vars(state.work), "arms": left}))

    while waiting or running:
        while waiting and len(running) < engine.slots:
            work = waiting.popleft()
            running[engine.start(work)] = _Running(work, list(work.arms))
        for handle, event in engine.wait(POLL):
            state = running[handle]
            match event:
                case Started(arm):
                    state.arm, state.since = arm, time.monotonic()
                    tell(At(state.work.seed, event))
                case Progress():
                    tell(At(state.work.seed, event))
                case Finished(record):
                    state.arm = ""
                    if record["arm"] in state.left:
                        state.left.remove(record["arm"])
                    end(record)
                case Done():
                    del running[handle]
                case Died(reason, output):
                    del running[handle]
                    lost(state, reason, output)
        if timeout is not None:
            for handle, state in list(running.items()):
                if state.arm and time.monotonic() - state.since > timeout:
                    engine.stop(handle)
                    del running[handle]
                    lost(state, f"timed out after {timeout:g} s")


@dataclass
class _Running:
    work: Work
    left: list[str]
    arm: str = ""
    since: float = 0.0


def _failure(arm: str, seed: int, error: str, output: str) -> Record:
    empty: Record = {"metrics": {}, "costs": {}, "curves": {}}
    return {"arm": arm, "seed": seed, "status": "failed", "error": error, "traceback": output, **empty}


def _seeds(study: Study, seeds: int | Iterable[int] | None, first: int, smoke: bool) -> list[int]:
    if seeds is None:
        seeds = 1 if smoke else study.seeds
    chosen = list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise ValueError(f"seeds must be one or more different numbers from 0 up, got {chosen}")
    return chosen
