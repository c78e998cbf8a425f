import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firsthand import run
from firsthand.harness.engines import Local
from firsthand.harness.published import primary
from firsthand.harness.runner import Ended, Kept, Warned
from firsthand.harness.study import StudyError, load_study
from firsthand.harness.worker import Finished, Work, run_seed


@pytest.fixture
def go(tmp_path):
    """Run a study with a store of the test's own; returns the evidence, and what was told."""

    def go(path, **options):
        told = []
        options.setdefault("engine", Local(1))
        evidence = run(path, root=tmp_path / "store", tell=told.append, **options)
        return evidence, told

    return go


def files(tmp_path):
    return sorted((tmp_path / "store").rglob("*.json"))


def outcome(evidence):
    return {(f["arm"], f["seed"]): f["error"] for f in evidence["failures"]}


def test_verdict_and_effects_of_a_plain_study(write_study, go):
    evidence, _ = go(write_study())
    claim = primary(evidence)
    assert evidence["seeds"] == [1000, 1001, 1002, 1003, 1004]
    assert claim["verdict"] == "reproduced"
    # Both arms draw the same normal number, so what is left is one, and a hundredth of the seed modulo three.
    assert claim["effects"] == {str(seed): pytest.approx(1 + 0.01 * (seed % 3)) for seed in evidence["seeds"]}
    assert evidence["failures"] == []
    assert set(evidence["costs"]) == {"prepare", "plus", "base"}
    assert evidence["curves"]["base"]["loss"]["mean"] == [1, 0.5, pytest.approx(1 / 3), 0.25]
    json.dumps(evidence, allow_nan=False)


def test_same_numbers_with_one_job_two_jobs_a_bare_loop_and_again(write_study, tmp_path):
    path = write_study()
    seeds = [1000, 1001, 1002, 1003]
    results = [run(path, seeds=seeds, engine=Local(jobs), root=tmp_path / str(i))["metrics"] for i, jobs in enumerate((1, 2, 1))]
    bare = {"plus": {"score": {}}, "base": {"score": {}}}
    for seed in seeds:
        for event in run_seed(Work(path, seed, ("plus", "base"))):
            if isinstance(event, Finished) and event.record["arm"] != "prepare":
                bare[event.record["arm"]]["score"][str(seed)] = pytest.approx(event.record["metrics"]["score"], rel=1e-6)
    assert results[0] == results[1] == results[2] == bare


def test_finished_trials_are_kept_and_a_damaged_one_is_run_again(write_study, go, tmp_path):
    path = write_study()
    first, _ = go(path)
    again, told = go(path)
    assert sum(isinstance(t, Kept) for t in told) == 10
    assert not any(isinstance(t, Ended) for t in told)
    assert again["metrics"] == first["metrics"]

    victim = next(p for p in files(tmp_path) if json.loads(p.read_text())["record"]["arm"] == "plus")
    victim.write_text(victim.read_text()[:40])
    repaired, told = go(path)
    assert [t.message for t in told if isinstance(t, Warned)] == [f"{victim} is damaged; the trial is run again"]
    assert {t.record["arm"] for t in told if isinstance(t, Ended)} == {"prepare", "plus"}
    assert repaired["metrics"] == first["metrics"]


def test_changed_code_never_meets_old_results(write_study, go):
    path = write_study()
    go(path)
    Path(path).write_text(Path(path).read_text().replace('["offset"] += 1', '["offset"] += 2'))
    evidence, told = go(path)
    assert not any(isinstance(t, Kept) for t in told)
    assert primary(evidence)["mean"] == pytest.approx(2, abs=0.1)


def test_smoke_and_full_results_are_apart(write_study, go):
    path = write_study()
    go(path, smoke=True)
    _, told = go(path, seeds=1)
    assert not any(isinstance(t, Kept) for t in told)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('raise RuntimeError("out of luck")', "RuntimeError: out of luck"),
        ('return {"score": float("nan")}', "ValueError: the metric 'score' is nan"),
        ('return {"other": 1.0}', "ValueError: no metric 'score', which the claim needs; returned: other"),
        ("return 3", "ValueError: an arm returns a dict of metrics, 'bad' returned int"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "its process was killed (out of memory?)"),
        ("os._exit(7)", "its process ended with exit code 7"),
        ("return {'score': float(len(bytearray(1 << 60)))}", "MemoryError: "),
    ],
)
def test_a_trial_that_fails_is_named_and_the_others_go_on(write_arms, go, body, message):
    evidence, _ = go(write_arms(body), seeds=3)
    assert outcome(evidence) == {("bad", seed): message for seed in evidence["seeds"]}
    assert set(evidence["metrics"]["good"]["score"]) == {"1000", "1001", "1002"}
    assert primary(evidence)["verdict"] == "inconclusive"
    assert "a trial failed" in primary(evidence)["reason"]


def test_a_trial_that_hangs_is_ended(write_arms, go):
    begun = time.monotonic()
    evidence, _ = go(write_arms("time.sleep(600)"), seeds=1, timeout=1.0)
    assert outcome(evidence) == {("bad", 1000): "timed out after 1 s"}
    assert set(evidence["metrics"]["good"]["score"]) == {"1000"}
    assert time.monotonic() - begun < 60


def test_what_a_dead_worker_printed_is_kept(write_arms, go):
    evidence, _ = go(write_arms('print("last words", flush=True); os._exit(7)'), seeds=1)
    assert "last words" in evidence["failures"][0]["traceback"]


def test_an_arm_may_start_processes_of_its_own(write_arms, go):
    head = "from torch.utils.data import DataLoader"
    body = "return {'score': float(sum(len(batch) for batch in DataLoader(range(10), batch_size=4, num_workers=1)))}"
    evidence, _ = go(write_arms(body, head), seeds=1)
    assert evidence["failures"] == []
    assert evidence["metrics"]["bad"]["score"] == {"1000": 10.0}


def test_a_failed_trial_is_tried_again(write_arms, go, tmp_path):
    path = write_arms(f'return {{"score": 1.0}} if os.path.exists({str(tmp_path / "now")!r}) else 1 / 0')
    evidence, _ = go(path, seeds=3)
    assert len(evidence["failures"]) == 3
    (tmp_path / "now").touch()
    evidence, told = go(path, seeds=3)
    assert evidence["failures"] == []
    assert sum(isinstance(t, Kept) for t in told) == 3


def test_prepare_that_fails_fails_its_seed(write_study, go):
    text = """
        from firsthand import Study, beats
        def prepare(trial):
            if trial.seed == 1001:
                raise ValueError("no data")
        arms = {"a": lambda trial, world: {"x": 0}, "b": lambda trial, world: {"x": 1}}
        study = Study(method="p", prepare=prepare, arms=arms, claim=beats("b", "a", on="x"), equal="all")
    """
    evidence, _ = go(write_study(text), seeds=3)
    assert outcome(evidence) == {(arm, 1001): "prepare: ValueError: no data" for arm in "ab"}


def test_a_statistic_that_raises_is_no_traceback(write_arms, go):
    head = "from firsthand import Claim"
    path = write_arms('return {"score": 1.0}', head)
    Path(path).write_text(
        Path(path).read_text().replace('equal="nothing"', 'equal="", also=[holds("h", lambda m: m["x"], above=0)]')
    )
    evidence, _ = go(path, seeds=3)
    assert evidence["claims"][1]["verdict"] == "inconclusive"
    assert "KeyError" in evidence["claims"][1]["reason"]


def test_costs_are_measured(write_study, go):
    text = """
        import time
        import torch
        from firsthand import Study, beats

        def train(trial, width):
            model = torch.nn.Linear(width, 1)
            model.bias.requires_grad_(False)
            trial.count(model, active=5)
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            model(torch.ones(1, width)).sum().backward()
            optimizer.step()
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})  # as when experts are spawned
            optimizer.step()
            begun = time.process_time()
            while time.process_time() - begun < 0.3:
                pass
            return {"x": width}

        def hungry(trial):
            block = bytearray(200 << 20)
            block[::4096] = b"x" * len(block[::4096])
            time.sleep(0.3)
            return {"x": 0}

        arms = {"train": lambda trial: train(trial, 10), "hungry": hungry}
        study = Study(method="c", arms=arms, claim=beats("train", "hungry", on="x"), equal="all")
    """
    evidence, _ = go(write_study(text), seeds=1)
    train, hungry = evidence["costs"]["train"], evidence["costs"]["hungry"]
    assert (train["parameters"], train["active_parameters"], train["trained_parameters"]) == (11, 5, 13)
    assert hungry["trained_parameters"] is None
    assert train["cpu_s"] > 0.29
    assert hungry["wall_s"] > 0.29 > hungry["cpu_s"]
    assert hungry["peak_memory_mb"] > train["peak_memory_mb"] + 150  # measured for each trial, not for the process


KILLED = """
import sys
from pathlib import Path
from firsthand import run
from firsthand.harness.engines import Local
if __name__ == "__main__":
    run(sys.argv[1], seeds=3, engine=Local(1), root=Path(sys.argv[2]))
"""


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_kill_9_loses_only_what_was_in_flight(write_study, go, tmp_path):
    log = tmp_path / "log"
    path = write_study(f"""
        import os, time
        from firsthand import Study, beats
        def arm(trial):
            with open({str(log)!r}, "a") as file:
                file.write(f"{{trial.arm}} {{trial.seed}} {{os.getpid()}}\\n")
            if trial.seed == 1001 and not os.path.exists({str(tmp_path / "free")!r}):
                time.sleep(600)
            return {{"x": float(trial.arm == "b")}}
        study = Study(method="k", arms={{"a": arm, "b": arm}}, claim=beats("b", "a", on="x"), equal="all")
    """)
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), path, str(tmp_path / "store")])
    deadline = time.monotonic() + 60
    while not (log.exists() and "a 1001" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    worker = int(log.read_text().split()[-1])
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _alive(worker):  # no orphan goes on burning a core
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(files(tmp_path)) == 2

    log.write_text("")
    (tmp_path / "free").touch()
    evidence, told = go(path, seeds=3)
    assert [(t.record["arm"], t.record["seed"]) for t in told if isinstance(t, Kept)] == [("a", 1000), ("b", 1000)]
    assert [line.split()[:2] for line in log.read_text().splitlines()] == [[arm, s] for s in ("1001", "1002") for arm in "ab"]
    assert primary(evidence)["verdict"] == "reproduced"


def test_two_runs_at_once_do_not_harm_each_other(write_study, go, tmp_path):
    path = write_study()
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    both = [subprocess.Popen([sys.executable, str(script), path, str(tmp_path / "store")]) for _ in range(2)]
    assert [process.wait(120) for process in both] == [0, 0]
    evidence, told = go(path, seeds=3)
    assert not any(isinstance(t, Ended | Warned) for t in told)
    assert evidence["failures"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "one or more different numbers"),
        ({"seeds": [1, 1]}, "one or more different numbers"),
        ({"seeds": [-1]}, "from 0 up"),
        ({"timeout": 0.0}, "timeout must be positive"),
    ],
)
def test_bad_options(write_study, go, options, message):
    with pytest.raises(ValueError, match=message):
        go(write_study(), **options)


def test_no_fallback(write_study, go):
    with pytest.raises(StudyError, match="no fallback data"):
        go(write_study(), fallback=True)


def test_fallback_data_are_named(write_study, go):
    text = """
        from firsthand import Study, beats
        arms = {"a": lambda trial: {"x": 0}, "b": lambda trial: {"x": len(trial.data[0])}}
        study = Study(method="f", arms=arms, claim=beats("b", "a", on="x"), equal="", data=("large",), fallback=("small one",))
    """
    path = write_study(text)
    full, _ = go(path, seeds=3)
    less, told = go(path, seeds=3, fallback=True)
    assert (full["data"], less["data"]) == (["large"], ["small one"])
    assert not any(isinstance(t, Kept) for t in told)
    assert primary(full)["mean"] == 5


def test_jobs_must_be_positive():
    with pytest.raises(ValueError, match="jobs must be at least 1, got 0"):
        Local(0)


def test_a_study_must_come_from_a_file(write_study, go):
    study = load_study(write_study())
    study.path = None
    with pytest.raises(StudyError, match="from the file"):
        go(study)
