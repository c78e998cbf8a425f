"""What a study measured, as one JSON document: claims with verdicts, metrics, costs, curves, and where they come from."""

import datetime
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from firsthand import __version__
from firsthand.harness.claims import Claim, Metrics
from firsthand.harness.published import Evidence
from firsthand.harness.store import Record
from firsthand.harness.study import Study, study_name
from firsthand.harness.verdict import decide

SCHEMA = 1
CURVE_POINTS = 60
COSTS = ("wall_s", "cpu_s", "peak_memory_mb", "parameters", "active_parameters", "trained_parameters")


def summarise(
    study: Study,
    records: Sequence[Record],
    *,
    seeds: Sequence[int],
    smoke: bool,
    device: str,
    data: Sequence[str],
    fallback: bool,
    fingerprint: str,
    versions: Mapping[str, str],
) -> Evidence:
    """Evidence from the records of all trials (`prepare` included, where there is one)."""
    arms = list(study.arms)
    by_trial = {(record["arm"], record["seed"]): record for record in records}
    metrics = {
        seed: {arm: by_trial[arm, seed]["metrics"] for arm in arms if by_trial[arm, seed]["status"] == "ok"} for seed in seeds
    }
    rows = [arm for arm in ("prepare", *arms) if any((arm, seed) in by_trial for seed in seeds)]
    failures = [
        {"arm": record["arm"], "seed": record["seed"], "error": record["error"], "traceback": record["traceback"]}
        for record in records
        if record["status"] != "ok"
    ]
    assert study.path is not None
    flags = " --smoke" * smoke + f" --device {device}" * (device != "cpu") + " --fallback" * fallback
    consecutive = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    named = study_name(study.path)
    return {
        "schema": SCHEMA,
        "method": study.method,
        "question": study.question,
        "equal": study.equal,
        "arms": arms,
        "seeds": list(seeds),
        "smoke": smoke,
        "device": device,
        "data": list(data),
        "claims": [_claim(claim, claim is study.claim, metrics, len(arms)) for claim in study.claims],
        "metrics": _metrics_by_arm(arms, metrics),
        "costs": {arm: _costs([by_trial[arm, seed] for seed in seeds if (arm, seed) in by_trial]) for arm in rows},
        "curves": {arm: curves for arm in rows if (curves := _curves([by_trial[arm, s] for s in seeds if (arm, s) in by_trial]))},
        "failures": failures,
        "versions": {"firsthand": __version__, **versions},
        "machine": _machine(),
        "date": datetime.date.today().isoformat(),
        "fingerprint": fingerprint,
        "wall_s": _short(sum(record["costs"].get("wall_s", 0.0) for record in records)),
        "command": f"firsthand run {Path(named).name} --seeds {len(seeds)} --first-seed {seeds[0]}{flags}" if consecutive else "",
    }


def _claim(claim: Claim, primary: bool, metrics: Mapping[int, Metrics], arms: int) -> dict[str, Any]:
    effects: dict[int, float] = {}
    failure = ""
    for seed, of_seed in metrics.items():
        try:
            if len(of_seed) < arms:  # whatever the claim needs, it is not made on part of a study
                raise ValueError("a trial failed")
            effects[seed] = float(claim.effect(of_seed))
        except Exception as error:
            failure = f"seed {seed}: {error if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'}"
    verdict = decide(list(effects.values()), claim.low, claim.high, failure)
    return {
        "text": claim.text,
        "kind": claim.kind,
        "primary": primary,
        "low": _short(claim.low),
        "high": _short(claim.high),
        "needs": [list(pair) for pair in claim.needs],
        "effects": {str(seed): _short(effects[seed]) if seed in effects else None for seed in metrics},
        "mean": _short(verdict.mean),
        "interval": [_short(verdict.low), _short(verdict.high)],
        "p": _short(verdict.p),
        "verdict": verdict.outcome,
        "reason": verdict.reason,
    }


def _metrics_by_arm(arms: Iterable[str], metrics: Mapping[int, Metrics]) -> dict[str, dict[str, dict[str, float | None]]]:
    table: dict[str, dict[str, dict[str, float | None]]] = {arm: {} for arm in arms}
    for seed, of_seed in metrics.items():
        for arm, values in of_seed.items():
            for name, value in values.items():
                table[arm].setdefault(name, {})[str(seed)] = _short(value)
    return table


def _costs(records: Sequence[Record]) -> dict[str, float | None]:
    """Mean over seeds of each cost; none where no trial could tell."""
    means: dict[str, float | None] = {}
    for cost in COSTS:
        values = [value for record in records if (value := record["costs"].get(cost)) is not None]
        means[cost] = _short(float(np.mean(values))) if values else None
    return means


def _curves(records: Sequence[Record]) -> dict[str, dict[str, list[float | None]]]:
    """Mean, lowest and highest over seeds at each recorded point, thinned. Points are matched by their number in the curve."""
    curves = {}
    for name in dict.fromkeys(name for record in records for name in record["curves"]):
        per_seed = [np.asarray(record["curves"][name], dtype=float) for record in records if name in record["curves"]]
        length = min(map(len, per_seed))
        keep = np.unique(np.linspace(0, length - 1, min(length, CURVE_POINTS)).round().astype(int))
        points = np.stack([curve[:length][keep] for curve in per_seed])  # seed, point, (step, value)
        values = points[..., 1]
        curves[name] = {
            "step": [_short(v) for v in points[..., 0].mean(0)],
            "mean": [_short(v) for v in values.mean(0)],
            "low": [_short(v) for v in values.min(0)],
            "high": [_short(v) for v in values.max(0)],
        }
    return curves


def _short(value: float) -> float | None:
    """Seven digits are more than any measurement here has; JSON knows no infinity."""
    return float(f"{value:.7g}") if isfinite(value) else None


@cache
def _machine() -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    memory = None
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, ValueError):
        pass
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gb": memory, "system": f"{platform.system()} {platform.machine()}"}
