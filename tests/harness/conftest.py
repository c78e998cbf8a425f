from pathlib import Path
from textwrap import dedent

import pytest

TOY = '''
"""Does adding one help?"""
import time
from firsthand import Study, beats

def base(trial, world):
    for step in trial.track(range(4), "steps"):
        trial.record(step, loss=1 / (step + 1))
    return {"score": float(trial.rng.normal()) + world["offset"]}

def plus(trial, world):
    world["offset"] += 1  # its own copy: the other arm must not see it
    return {"score": float(trial.rng.normal()) + world["offset"] + 0.01 * (trial.seed % 3)}

def prepare(trial):
    return {"offset": float(trial.rng.normal())}

study = Study(
    method="toy", prepare=prepare, arms={"plus": plus, "base": base}, claim=beats("plus", "base", on="score"), equal="everything"
)
'''


@pytest.fixture
def write_study(tmp_path):
    """Write a study file and return its path as a user would give it."""

    def write(text: str = TOY, name: str = "toy.py") -> str:
        path = Path(tmp_path) / name
        path.write_text(dedent(text))
        return str(path)

    return write


@pytest.fixture
def write_arms(write_study):
    """Write a study of the arms `good` and `bad`, where `bad` does what the given body says."""

    def write(body: str, head: str = "", name: str = "arms.py") -> str:
        return write_study(
            f'''
"""Does bad do harm?"""
import os, signal, time
from firsthand import Study, beats, holds
{head}
def good(trial):
    return {{"score": float(trial.seed % 5)}}

def bad(trial):
    {body}

study = Study(method="arms", arms={{"bad": bad, "good": good}}, claim=beats("good", "bad", on="score"), equal="nothing")
''',
            name,
        )

    return write
