"""What the harness costs: a study through `firsthand.run` against the same arms in a bare loop.

Both sides are whole processes, imports and worker start-up included, in turn. The arms do fixed work, as much in all as a small
study (`firsthand run rankme` takes about two minutes of it). The harness side uses one worker, so that both do the work one after
the other. What the harness adds is mostly a second import of torch, in the worker, so its seconds are printed too: they do not
grow with the work.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STUDY = '''"""Does the harness cost anything?"""
import torch
from firsthand import Study, holds

def arm(trial):
    generator = torch.Generator().manual_seed(trial.seed)
    x = torch.randn(256, 256, generator=generator)
    for step in trial.track(range({steps}), "steps"):
        x = torch.tanh(x @ x.T / 256)
        if step % 10 == 0:
            trial.record(step, mean=x.mean().item())
    return {{"mean": x.mean().item()}}

claim = holds("zero", lambda arms: 0.0, above=-1.0)
study = Study(method="cost", arms={{"one": arm, "two": arm}}, claim=claim, equal="all", seeds=3)
'''
BARE = """
import sys, torch
from firsthand import Trial
from firsthand.harness.study import load_study
torch.set_num_threads(1)
study = load_study(sys.argv[1])
for seed in (1000, 1001, 1002):
    for name, arm in study.arms.items():
        print(name, seed, arm(Trial(seed, name)))
"""
RUN = """
import sys
from pathlib import Path
from firsthand import run
from firsthand.harness.engines import Local
if __name__ == "__main__":
    for arm, metrics in run(sys.argv[1], engine=Local(1), root=Path(sys.argv[2]))["metrics"].items():
        print(arm, metrics)
"""


def seconds(script: Path, *arguments: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, str(script), *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40_000, help="work of an arm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study, bare, run = (Path(folder) / name for name in ("study.py", "bare.py", "run.py"))
        study.write_text(STUDY.format(steps=options.steps))
        bare.write_text(BARE)
        run.write_text(RUN)
        ratios = []
        for repeat in range(options.repeats):
            one = seconds(bare, str(study))
            other = seconds(run, str(study), str(Path(folder) / f"store{repeat}"))
            ratios.append(other / one)
            print(f"bare loop {one:6.2f} s   firsthand {other:6.2f} s   added {other - one:5.2f} s   ratio {ratios[-1]:.3f}")
    print(f"median ratio {statistics.median(ratios):.3f} (limit 1.03)")


if __name__ == "__main__":
    main()
