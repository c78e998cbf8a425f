import json
import subprocess
import sys

import pytest

from firsthand.harness import store

RECORD = {"arm": "a", "seed": 1, "metrics": {"x": 0.1 + 0.2}}


def test_what_is_put_is_got(tmp_path):
    path = tmp_path / "folder" / "one.json"
    assert store.get(path) is None
    store.put(path, RECORD)
    assert store.get(path) == RECORD
    assert [p.name for p in path.parent.iterdir()] == ["one.json"]  # no part is left


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: text.replace("0.3", "0.4")]
)
def test_damage_is_seen(tmp_path, damage):
    path = tmp_path / "one.json"
    store.put(path, RECORD)
    path.write_text(damage(path.read_text()))
    with pytest.raises(store.Damaged, match=r"one\.json"):
        store.get(path)


def test_valid_json_of_another_kind_is_damage(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps([1, 2]))
    with pytest.raises(store.Damaged):
        store.get(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    store.put(path, RECORD)

    def full(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        store.put(path, {**RECORD, "seed": 2})
    assert store.get(path) == RECORD
    assert [p.name for p in tmp_path.iterdir()] == ["one.json"]


WRITER = """
import sys
from pathlib import Path
from firsthand.harness import store
path, seed = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(50):
    store.put(path, {"seed": seed, "padding": [seed] * 1000})
"""


def test_two_writers_do_not_mix(tmp_path):
    path = tmp_path / "one.json"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(seed)]) for seed in (1, 2)]
    while any(writer.poll() is None for writer in writers):
        record = store.get(path)  # whole at any moment
        assert record is None or set(record["padding"]) == {record["seed"]}
    assert [writer.returncode for writer in writers] == [0, 0]
    assert store.get(path) is not None


def test_default_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FIRSTHAND_CACHE", str(tmp_path))
    assert store.default_root() == tmp_path / "runs"
