"""The README's code runs as printed, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USE, STUDY = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FIRSTHAND = Path(sys.executable).parent / "firsthand"


def test_using_a_method(capsys):
    exec(compile(USE, "README.md", "exec"), {})
    assert re.fullmatch(r"\d+\.\d of 32 directions are in use\n", capsys.readouterr().out)


def test_an_own_study(tmp_path):
    (tmp_path / "my_study.py").write_text(STUDY)
    done = subprocess.run([FIRSTHAND, "run", "my_study.py", "--smoke"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Does a wider hidden layer read digits better?" in done.stdout


def test_it_is_as_short_as_it_says():
    assert len(USE.splitlines()) <= 10


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^firsthand (\w+)", README, re.MULTILINE))))
def test_commands_exist(command):
    assert subprocess.run([FIRSTHAND, command, "--help"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (demo|test|evidence|readme)\b", README))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_the_table_is_that_of_the_evidence():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme_table.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
