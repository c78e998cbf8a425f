import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import firsthand
from firsthand.harness import fingerprint

STUDY = '''"""A question."""
from firsthand import Study, beats
from firsthand.area.method import loss

def arm(trial):
    """An arm."""
    return {"x": loss(1)}  # a comment

study = None
'''


@pytest.fixture
def package(tmp_path):
    """A small copy of the package: `area.method` imports `area.inner`, `area.other` is not used by the study."""
    root = tmp_path / "firsthand"
    for folder in ("area", "studies", "harness"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text("")
    shutil.copy(Path(firsthand.__file__), root / "__init__.py")
    (root / "harness" / "trial.py").write_text("trial = 1\n")
    (root / "area" / "__init__.pyi").write_text("from .method import loss as loss\n")
    (root / "area" / "method.py").write_text("from .inner import half\ndef loss(x):\n    '''Words.'''\n    return half(x)\n")
    (root / "area" / "inner.py").write_text("def half(x):\n    return x / 2\n")
    (root / "area" / "other.py").write_text("def other():\n    return 1\n")
    (root / "studies" / "method.py").write_text(STUDY)
    return root


@pytest.fixture
def code_of(package, monkeypatch):
    """The fingerprint of the copy's study after a change to one of its files."""
    monkeypatch.setattr(fingerprint, "PACKAGE", package)
    monkeypatch.setattr(fingerprint, "TRIAL", package / "harness" / "trial.py")

    def compute(file="", old="", new=""):
        if file:
            path = package / file
            assert old in path.read_text()
            path.write_text(path.read_text().replace(old, new))
        return fingerprint.code_fingerprint(package / "studies" / "method.py")

    return compute


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("studies/method.py", "loss(1)", "loss(2)"),
        ("area/method.py", "half(x)", "half(x + 1)"),
        ("area/inner.py", "x / 2", "x / 3"),
        ("harness/trial.py", "trial = 1", "trial = 2"),
    ],
)
def test_code_that_counts(code_of, file, old, new):
    assert code_of() != code_of(file, old, new)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("studies/method.py", "# a comment", "# another"),
        ("studies/method.py", '"""An arm."""', '"""The one arm."""'),
        ("studies/method.py", "A question.", "Another question."),
        ("area/method.py", "Words.", "Other words."),
        ("area/inner.py", "x / 2", "(x  /  2)"),
        ("area/other.py", "return 1", "return 2"),
    ],
)
def test_wording_and_code_elsewhere_cost_nothing(code_of, file, old, new):
    assert code_of() == code_of(file, old, new)


def test_a_name_from_a_lazy_package_is_followed_to_its_module(code_of):
    code_of("studies/method.py", "firsthand.area.method import", "firsthand.area import")
    before = code_of()
    assert before != code_of("area/inner.py", "x / 2", "x / 3")
    assert code_of() == code_of("area/other.py", "return 1", "return 2")


def test_a_neighbour_of_a_users_study_counts(tmp_path):
    study = tmp_path / "mine.py"
    study.write_text("import beside\nfrom firsthand import Study\n")
    (tmp_path / "beside.py").write_text("x = 1\n")
    assert tmp_path / "beside.py" in fingerprint.sources(study)


def test_versions_name_what_the_code_imports_and_reads(tmp_path):
    study = tmp_path / "mine.py"
    study.write_text("import json\nimport yaml\npackages = ('networkx',)\n")
    versions = fingerprint.library_versions(study)
    assert set(versions) == {"python", "torch", "numpy", "scipy", "scikit-learn", "PyYAML", "networkx"}


def test_key_differs_with_everything_that_counts():
    base = {"arm": "a", "seed": 1, "smoke": False}
    keys = {
        fingerprint.trial_key("code", {"torch": "2"}, **base),
        fingerprint.trial_key("edoc", {"torch": "2"}, **base),
        fingerprint.trial_key("code", {"torch": "3"}, **base),
        *(
            fingerprint.trial_key("code", {"torch": "2"}, **{**base, **change})
            for change in ({"arm": "b"}, {"seed": 2}, {"smoke": True})
        ),
    }
    assert len(keys) == 6


def test_it_does_not_depend_on_the_process():
    code = (
        "from firsthand.harness import fingerprint as f; from pathlib import Path; import firsthand.harness.claims as c;"
        "print(f.code_fingerprint(Path(c.__file__)))"
    )
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(prints) == 1
