"""What an arm is handed: its seed, its randomness, where to run, and how to say what it is doing."""

from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")


@dataclass
class Trial:
    """One arm at one seed.

    The same seed gives every arm the same `rng` and `generator`, so arms that draw in the same order share data, split, order
    and initial weights. `prepare` has streams of its own.

    Attributes:
        seed: the seed.
        arm: name of the arm, or `"prepare"`.
        device: where to put models and data.
        smoke: tiny sizes, to see that everything runs; results mean nothing.
        data: names of the data sets in use (the study's own, or its fallback where the user asked for it).
    """

    seed: int
    arm: str = ""
    smoke: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    data: tuple[str, ...] = ()
    on_progress: Callable[[str, int, int | None], None] | None = None

    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict, init=False)
    parameters: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def _stream(self) -> int:
        return 1 if self.arm == "prepare" else 0

    @cached_property
    def rng(self) -> np.random.Generator:
        """NumPy generator of this seed."""
        return np.random.default_rng([self.seed, self._stream])

    @cached_property
    def generator(self) -> torch.Generator:
        """Torch generator of this seed, on the CPU, so that a draw does not depend on the device."""
        words = np.random.SeedSequence([self.seed, self._stream]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]))

    def track(self, iterable: Iterable[T], label: str = "") -> Iterator[T]:
        """Yield from `iterable` and show how far it is."""
        total = len(iterable) if isinstance(iterable, Sized) else None
        for done, item in enumerate(iterable):
            if self.on_progress:
                self.on_progress(label, done, total)
            yield item

    def record(self, step: float, **values: float) -> None:
        """Add a point to the curves, one curve a keyword; the evidence keeps them, thinned."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append((float(step), float(value)))

    def count(self, model: torch.nn.Module, active: int | None = None) -> None:
        """Say how big the model is: its parameters, and how many of them one input uses (all, unless `active` is given).

        How many are trained need not be said: the harness sees what the optimisers step.
        """
        total = sum(p.numel() for p in model.parameters())
        self.parameters = {"parameters": total, "active_parameters": total if active is None else active}
