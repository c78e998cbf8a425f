"""The ray engine on a real cluster of one machine, started as its users would."""

import subprocess
import sys
from pathlib import Path

import pytest

from firsthand import run
from firsthand.harness.engines import Local, Ray

pytest.importorskip("ray", reason="the ray extra is not installed")
RAY = Path(sys.executable).parent / "ray"

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster():
    command = [RAY, "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    subprocess.run(command, check=True, capture_output=True)
    yield
    subprocess.run([RAY, "stop", "--force"], check=False, capture_output=True)


def test_same_numbers_as_local(cluster, write_study, tmp_path):
    path = write_study()
    here = run(path, engine=Local(2), root=tmp_path / "local")
    there = run(path, engine=Ray(), root=tmp_path / "ray")
    assert there["metrics"] == here["metrics"]
    assert there["claims"] == here["claims"]
    assert there["curves"] == here["curves"]


def test_a_dead_worker_and_a_hanging_trial_are_named(cluster, write_arms, tmp_path):
    body = """
    if trial.seed == 1000:
        os._exit(1)
    time.sleep(600)"""
    evidence = run(write_arms(body), seeds=2, engine=Ray(), timeout=3.0, root=tmp_path)
    errors = {failure["seed"]: failure["error"] for failure in evidence["failures"]}
    assert errors == {1000: "its worker died", 1001: "timed out after 3 s"}
    assert set(evidence["metrics"]["good"]["score"]) == {"1000", "1001"}


def test_no_cluster():
    with pytest.raises(ConnectionError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        Ray("127.0.0.1:1")
