"""The command line, called as a user calls it: a process, its output, its exit code."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

FIRSTHAND = Path(sys.executable).parent / "firsthand"

TOY = '''"""Does adding one help?"""
import time
from firsthand import Study, beats

def base(trial):
    return {"score": float(trial.rng.normal())}

def plus(trial):
    return {"score": float(trial.rng.normal()) + 1 + trial.seed % 2}

study = Study(method="toy", arms={"base": base, "plus": plus}, claim=beats("plus", "base", on="score"), equal="everything")
'''
FAILING = TOY.replace('return {"score": float(trial.rng.normal()) + 1', 'raise RuntimeError("[out of luck]"); return {"score": 1')
HANGING = TOY.replace("def plus(trial):", "def plus(trial):\n    time.sleep(600)")


@pytest.fixture
def call(tmp_path):
    def call(*words, timeout=120):
        env = {**os.environ, "FIRSTHAND_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}
        return subprocess.run([FIRSTHAND, *words], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout)

    return call


def write(tmp_path, text, name="toy.py"):
    (tmp_path / name).write_text(text)
    return name


@pytest.mark.parametrize("words", [("list",), ("--help",), ("list", "--json")])
def test_answers_at_once(call, words):
    """In CPU seconds: what else the machine does is no fault of ours. The first time, all methods' code is parsed."""
    assert call(*words).returncode == 0
    before = os.times()
    assert call(*words).returncode == 0
    after = os.times()
    assert (after.children_user + after.children_system) - (before.children_user + before.children_system) < 0.5


def test_import_is_light():
    heavy = {"torch", "numpy", "scipy", "sklearn", "rich.markdown"}
    code = f"import sys, firsthand, firsthand.cli, firsthand.data; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_run_prints_claims_and_arms_in_plain_text(call, tmp_path):
    done = call("run", write(tmp_path, TOY))
    assert done.returncode == 0, done.stderr
    assert "Does adding one help?" in done.stdout
    assert "plus beats base on score" in done.stdout
    assert "reproduced" in done.stdout
    assert "\x1b[" not in done.stdout
    assert "seed 1000  base  ok" in done.stdout


def test_generated_data_are_there(call, tmp_path):
    generated = TOY.replace('equal="everything"', 'equal="everything", data=("generated",)')
    assert call("run", write(tmp_path, generated), "--smoke").returncode == 0


def test_run_json_is_one_line_of_evidence_for_each_study(call, tmp_path):
    done = call("run", write(tmp_path, TOY), write(tmp_path, TOY, "other.py"), "--seeds", "3", "--first-seed", "7", "--json")
    assert done.returncode == 0, done.stderr
    evidence = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["seeds"] for each in evidence] == [[7, 8, 9]] * 2
    assert evidence[0]["command"] == "firsthand run toy.py --seeds 3 --first-seed 7"


def test_smoke_says_so(call, tmp_path):
    done = call("run", write(tmp_path, TOY), "--smoke")
    assert done.returncode == 0
    assert "the numbers mean nothing" in done.stdout


def test_a_failed_trial_is_exit_code_1_and_no_traceback(call, tmp_path):
    done = call("run", write(tmp_path, FAILING), "--seeds", "3")
    assert done.returncode == 1
    assert "failed plus, seed 1001: RuntimeError: [out of luck]" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert "inconclusive" in done.stdout
    again = call("run", "toy.py", "--seeds", "3", "--verbose")
    assert again.returncode == 1
    assert "Traceback" in again.stdout


def test_timeout(call, tmp_path):
    done = call("run", write(tmp_path, HANGING), "--seeds", "1", "--timeout", "1")
    assert done.returncode == 1
    assert "timed out after 1 s" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "no-such-method"), "neither a method with a study nor a .py file"),
        (("run", "absent.py"), "absent.py: no such file"),
        (("run", "broken.py"), "broken.py: line 1: not valid Python"),
        (("run", "empty.py"), "empty.py: defines no `study`"),
        (("run", "unknown_arm.py"), "names the arm 'minus', the arms are 'base', 'plus'"),
        (("run", "no_data.py"), "no-such-data"),
        (("run", "not_here.py"), "Or run with --fallback, on digits."),
        (("run", "toy.py", "--fallback"), "has no fallback data"),
        (("run", "toy.py", "--smoke", "--publish"), "toy"),
        (("run", "toy.py", "--engine", "slurm"), "--engine must be local or ray, got 'slurm'"),
        (("run", "toy.py", "--address", "x:1"), "--address goes with --engine ray"),
        (("run", "toy.py", "--seeds", "0"), "--seeds"),
        (("run",), "Missing argument"),
        (("show", "no-such-method"), "no method 'no-such-method'"),
        (("list", "--verdict", "maybe"), "--verdict must be one of"),
        (("list", "--area", "nowhere"), "--area must be one of"),
        (("report", "--evidence", "toy.py"), "toy.py: no evidence"),
        (("data", "fetch", "no-such-data"), "no-such-data"),
        (("unknown",), "No such command"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(call, tmp_path, words, message):
    write(tmp_path, TOY)
    write(tmp_path, "def broken(:", "broken.py")
    write(tmp_path, "x = 1", "empty.py")
    write(tmp_path, TOY.replace('beats("plus"', 'beats("minus"'), "unknown_arm.py")
    write(tmp_path, TOY.replace('equal="everything"', 'equal="", data=("no-such-data",)'), "no_data.py")
    write(tmp_path, TOY.replace('equal="everything"', 'equal="", data=("smollm2",), fallback=("digits",)'), "not_here.py")
    done = call(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_interrupt_leaves_a_store_that_goes_on(call, tmp_path):
    write(tmp_path, HANGING.replace("time.sleep(600)", "time.sleep(0 if trial.smoke or trial.seed == 1000 else 600)"))
    env = {**os.environ, "FIRSTHAND_CACHE": str(tmp_path / "cache")}
    command = [FIRSTHAND, "run", "toy.py", "--seeds", "3", "--jobs", "1"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell that runs us in the background has it ignored
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=env, preexec_fn=heard, **pipes) as process:
        for line in process.stdout:
            if line.startswith("seed 1001  base"):
                break
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: 3 of 6 trials are kept; the same command goes on from there" in said
    assert "Traceback" not in said
    assert len(list((tmp_path / "cache" / "runs").rglob("*.json"))) == 3


def test_report_of_an_own_study(call, tmp_path):
    done = call("run", write(tmp_path, TOY), "--json")
    (tmp_path / "toy.json").write_text(done.stdout)
    done = call("report", "--output", "site", "--evidence", "toy.json")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "methods" / "toy.html").read_text()
    assert "Does adding one help?" in page
    assert "stale" not in page


def test_search_finds_by_meaning(call):
    done = call("search", "embeddings collapse onto few directions", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["slug"] == "rankme"


def test_search_for_nothing(call):
    assert call("search", "zzzzqqqq").stdout.strip() == "nothing found"


def test_show(call):
    done = call("show", "rankme")
    assert done.returncode == 0
    assert "Reach for it when" in done.stdout
    assert "What we found" in done.stdout
    shown = json.loads(call("show", "rankme", "--json").stdout)
    assert shown["slug"] == "rankme"
    assert shown["evidence"]["method"] == "rankme"


def test_list_filters(call):
    rows = json.loads(call("list", "--json").stdout)
    assert {row["slug"] for row in rows} >= {"rankme", "aem", "gistembed", "peri-ln", "learning-curve"}
    area = json.loads(call("list", "--area", "diagnose", "--json").stdout)
    assert {row["slug"] for row in area} >= {"rankme", "learning-curve"}
    assert all(row["area"] == "diagnose" for row in area)
    for verdict in ("reproduced", "contradicted", "inconclusive"):
        chosen = json.loads(call("list", "--verdict", verdict, "--json").stdout)
        assert chosen == [row for row in rows if row["verdict"] == verdict]


def test_data_list(call):
    rows = {row["name"]: row for row in json.loads(call("data", "list", "--json").stdout)}
    assert rows["digits"]["here"] is True
    assert all(row["licence"] and row["size"] and row["what"] for row in rows.values())
    assert "digits" in call("data", "list").stdout
