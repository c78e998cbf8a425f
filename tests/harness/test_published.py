import json

import pytest

from firsthand.harness import published
from firsthand.harness.study import StudyError


@pytest.fixture
def evidence(tmp_path, monkeypatch):
    """The shipped evidence of a method, and a checkout of its own to publish into."""
    (tmp_path / "pyproject.toml").touch()
    shipped = published.FOLDER / "rankme.json"
    monkeypatch.setattr(published, "FOLDER", tmp_path / "src" / "firsthand" / "evidence")
    return json.loads(shipped.read_text(encoding="utf-8"))


def test_what_is_published_is_read_again(evidence):
    path = published.publish(evidence)
    assert json.loads(path.read_text(encoding="utf-8")) == evidence
    assert path == published.FOLDER / "rankme.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"smoke": True}, "a smoke run is no evidence"),
        ({"seeds": [3, 4, 5, 6, 7]}, "seeds below 1000 are for tuning"),
        ({"seeds": [1000, 1001, 1002]}, "asks for 5 seeds, got 3"),
        ({"failures": [{"arm": "a", "seed": 1000, "error": "no luck"}]}, "1 trials failed; a: no luck"),
        ({"fingerprint": "of a user's own file"}, "not of the shipped study 'rankme'"),
        ({"method": "my-own"}, "neither a method with a study"),
    ],
)
def test_what_is_no_evidence_is_not_published(evidence, change, message):
    with pytest.raises(StudyError, match=message):
        published.publish({**evidence, **change})
    assert not published.FOLDER.exists()


def test_an_installed_copy_publishes_nothing(evidence, tmp_path):
    (tmp_path / "pyproject.toml").unlink()
    with pytest.raises(StudyError, match="installed copy"):
        published.publish(evidence)
