"""Cards and evidence as a report may meet them, for its tests."""

import json
import math

import numpy as np

from firsthand.catalogue import Card
from firsthand.harness.verdict import decide

SEEDS = range(1000, 1005)
EVIL = """"><script>window.hacked = 1</script><img src=x onerror="window.hacked=1"> ' & {{ 7*7 }}"""


def make_card(slug: str, title: str, area: str, reach: str, **fields) -> Card:
    body = f"""**Reach for it when** {reach}. **Costs** one more forward pass of a `small` model.
**Leave it when** there is nothing to gain.

## How it works
The loss of a pair is weighted by what the guide says about it, see [the paper](https://arxiv.org/abs/2402.16829). With
`margin=0` it is the plain loss.

| where | what |
|---|---|
| early | many false negatives, which the guide takes out of the sum |
| late | few |

## Use it
```python
import torch
from firsthand.{area} import loss  # the function is the method

anchors = torch.randn(32, 256)
print(f"loss {{loss(anchors, anchors, temperature=0.05):.3f}}", None)
```

## Where we depart from the paper
Nowhere.
"""
    known = {
        "paper": f"{title}: a paper",
        "year": 2024,
        "changes": "loss",
        "api": (f"firsthand.{area}.loss",),
        "arxiv": "2402.16829",
    }
    return Card(**{**known, "slug": slug, "title": title, "area": area, "body": body, **fields})


def make_claim(text: str, effects: list[float | None], low: float | None = 0.0, high: float | None = None, **fields) -> dict:
    infinite = (-math.inf if low is None else low, math.inf if high is None else high)
    failed = "seed 1002: a trial failed" if None in effects else ""
    verdict = decide([effect for effect in effects if effect is not None], *infinite, failed)
    shown = {
        name: value if math.isfinite(value) else None
        for name, value in (("mean", verdict.mean), ("low", verdict.low), ("high", verdict.high), ("p", verdict.p))
    }
    return {
        "text": text,
        "kind": "beats",
        "primary": True,
        "low": low,
        "high": high,
        "needs": [],
        "effects": dict(zip(map(str, SEEDS), effects, strict=True)),
        "mean": shown["mean"],
        "interval": [shown["low"], shown["high"]],
        "p": shown["p"],
        "verdict": verdict.outcome,
        "reason": verdict.reason,
        **fields,
    }


def make_evidence(method: str, effect: float, arms: tuple[str, ...] = ("baseline", "method"), seed: int = 0, **fields) -> dict:
    """What a run of `method` could have found: the last arm is better by `effect`, give or take 0.02."""
    rng = np.random.default_rng(seed)
    metrics = {arm: {name: {} for name in ("accuracy", "nll", "steps")} for arm in arms}
    curves = {}
    steps = np.arange(0, 600, 10)
    for i, arm in enumerate(arms):
        lift = effect * i / max(1, len(arms) - 1)
        for s in SEEDS:
            accuracy = 0.71 + lift + 0.012 * rng.normal()
            metrics[arm] |= {
                name: {**metrics[arm][name], str(s): value}
                for name, value in (("accuracy", accuracy), ("nll", -math.log(accuracy)), ("steps", 600.0))
            }
        loss = 0.9 - lift + 1.9 * np.exp(-steps / (90 + 25 * i)) + 0.02 * rng.normal(size=60)
        gradient = 200 * np.exp(-steps / 60) + 0.05 + 0.02 * i
        curves[arm] = {
            "train loss": {"step": steps, "mean": loss, "low": loss * 0.95, "high": loss * 1.05},
            "gradient norm": {"step": steps, "mean": gradient, "low": gradient * 0.7, "high": gradient * 1.4},
        }
    gains = [metrics[arms[-1]]["accuracy"][str(s)] - metrics[arms[0]]["accuracy"][str(s)] for s in SEEDS]
    costs = {
        arm: {
            "wall_s": 12.3 * (1 + 0.31 * i),
            "cpu_s": 12.1 * (1 + 0.3 * i),
            "peak_memory_mb": 612.0 + 41 * i,
            "parameters": 11_234_567,
            "active_parameters": 11_234_567,
            "trained_parameters": 120_330 + 2048 * i,
        }
        for i, arm in enumerate(arms)
    }
    costs["prepare"] = {**dict.fromkeys(costs[arms[0]]), "wall_s": 0.41, "cpu_s": 0.4, "peak_memory_mb": 590.0}
    found = {
        "schema": 1,
        "method": method,
        "question": f"Does {method} help where the paper says it helps?",
        "equal": "optimiser steps, batches, initial weights",
        "seeds": list(SEEDS),
        "device": "cpu",
        "data": ["docstrings"],
        "smoke": False,
        "arms": list(arms),
        "claims": [
            make_claim(f"{arms[-1]} beats {arms[0]} on accuracy", gains, needs=[[arms[-1], "accuracy"], [arms[0], "accuracy"]]),
            make_claim(
                f"{arms[-1]} matches {arms[0]} on nll within 0.05",
                [-g / 9 for g in gains],
                -0.05,
                0.05,
                primary=False,
                kind="matches",
            ),
        ],
        "metrics": metrics,
        "costs": costs,
        "curves": curves,
        "failures": [],
        "versions": {"firsthand": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "sentence-transformers": "5.1.2"},
        "machine": {"cpu": "AMD EPYC 9B45 96-Core Processor", "cores": 2, "memory_gb": 24, "system": "Linux x86_64"},
        "date": "2026-11-22",
        "fingerprint": "9f2c1ab07de4",
        "wall_s": 187.0,
        "command": f"firsthand run {method} --seeds 5 --first-seed 1000",
        **fields,
    }
    return json.loads(json.dumps(found, default=np.ndarray.tolist))  # as it comes from a file


def sample() -> dict:
    """Arguments of `write_report`: five methods with cards, one study without."""
    cards = [
        make_card(
            "gistembed",
            "Guided in-sample selection of negatives",
            "embed",
            "in-batch negatives of a retriever are often no negatives",
        ),
        make_card(
            "smoe-dropout",
            "Fixed random router with a growing number of experts",
            "moe",
            "experts collapse onto one",
            extras=("hf",),
        ),
        make_card(
            "rankme", "Effective rank of embeddings", "diagnose", "you must choose among encoders and have no labels", arxiv=""
        ),
        make_card(
            "peri-ln",
            "Layer norm around sublayers",
            "pretrain",
            "activations grow with depth and a run diverges",
            changes="layer",
        ),
        make_card("read-me", "Dense model to domain experts", "moe", "serving many domains from one model is too slow"),
    ]
    four = ("in-batch", "gistembed", "gistembed, margin 0.1", "oracle")
    failed = make_evidence("peri-ln", 0.06, seed=3)
    failed["claims"] = [make_claim("method beats baseline on accuracy", [0.05, 0.07, None, 0.06, 0.05])]
    failed["failures"] = [
        {"arm": "method", "seed": 1002, "error": "RuntimeError: loss is not finite", "traceback": "Traceback ...\n  line 1"}
    ]
    evidence = [
        make_evidence("gistembed", 0.05, arms=four, seed=1),
        make_evidence("smoe-dropout", -0.04, arms=("dense", "smoe-dropout"), seed=2),
        make_evidence("rankme", 0.004, seed=5, curves={}),
        failed,
        make_evidence("my study", 0.03, seed=4, data=[]),
    ]
    return {
        "cards": {card.slug: card for card in cards},
        "evidence": {each["method"]: each for each in evidence},
        "stale": {"smoe-dropout"},
    }
