"""Matching the names of labels in one pass, and one regular expression a label.

`python benchmarks/skill_negatives.py` prints ratios of times: below 1, ours is faster.
"""

import re
from collections.abc import Callable
from statistics import median

from torch.utils.benchmark import Timer

from firsthand import data
from firsthand.embed.skill_negatives import literal_match

ROUNDS = 3


def race(**racers: Callable[[], object]) -> dict[str, float]:
    """Median seconds a call, the racers taking turns."""
    timers = {name: Timer("call()", globals={"call": call}) for name, call in racers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer.timeit(1).median)
    return {name: median(each) for name, each in times.items()}


def matching() -> None:
    entries = data.load("api-docs", packages=())
    sentences = [" ".join(sentence.split()) for entry in entries for sentence in entry["text"].split(". ")][:4000]
    names = list(dict.fromkeys(entry["name"].rpartition(".")[2] for entry in entries))[:400]
    labels = {name: [name] for name in names}

    def peer() -> dict[str, list[int]]:
        patterns = {name: re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE) for name in names}
        return {name: [row for row, text in enumerate(sentences) if pattern.search(text)] for name, pattern in patterns.items()}

    assert literal_match(sentences, labels) == peer()
    seconds = race(ours=lambda: literal_match(sentences, labels), peer=peer)
    print(
        f"  {len(names)} names in {len(sentences)} sentences: ours {seconds['ours']:.2f} s, "
        f"ours / an expression a name = {seconds['ours'] / seconds['peer']:.3f}"
    )


if __name__ == "__main__":
    matching()
