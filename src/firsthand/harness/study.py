"""A study: arms that share everything but the method, and one claim about them."""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firsthand.harness.claims import Claim

Arm = Callable[..., Mapping[str, float]]


class StudyError(Exception):
    """A study that cannot be run as written. The message is one line for the user."""


@dataclass
class Study:
    """The paper's claim as an experiment.

    Args:
        method: slug of the method under study.
        arms: name -> function from a `Trial` (and what `prepare` returned) to metrics. The first is the baseline.
        claim: the one claim that decides the verdict.
        also: secondary claims: shown, not counted.
        equal: what the arms share, in words.
        prepare: run once per seed before the arms. Each arm gets its own copy of what it returns.
        seeds: how many seeds a verdict takes.
        data: names of the data sets it reads (`firsthand data list`).
        fallback: names of data that need nothing extra, used instead of `data` only when the user asks for it.

    Raises:
        StudyError: no arms, an arm called `"prepare"`, a claim about an arm that is not there, fewer than 3 seeds.
    """

    method: str
    arms: Mapping[str, Arm]
    claim: Claim
    equal: str
    also: Sequence[Claim] = ()
    prepare: Callable[..., Any] | None = None
    seeds: int = 5
    data: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    path: Path | None = field(default=None, compare=False)  # the file it was read from, known to `load_study`

    def __post_init__(self) -> None:
        if not self.arms:
            raise StudyError(f"study {self.method!r} has no arms")
        if "prepare" in self.arms:
            raise StudyError(f"study {self.method!r}: an arm may not be called 'prepare'")
        for claim in self.claims:
            for arm, _ in claim.needs:
                if arm not in self.arms:
                    raise StudyError(
                        f"study {self.method!r}: the claim {claim.text!r} names the arm {arm!r}, "
                        f"the arms are {', '.join(map(repr, self.arms))}"
                    )
        if self.seeds < 3:
            raise StudyError(f"study {self.method!r}: seeds must be at least 3 for a verdict, got {self.seeds}")

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The primary claim, then the secondary ones."""
        return (self.claim, *self.also)

    @property
    def question(self) -> str:
        """First line of the docstring of the file the study is written in."""
        if self.path is None:
            return ""
        return (ast.get_docstring(ast.parse(self.path.read_text())) or "").partition("\n")[0]


def load_study(name: str) -> Study:
    """The study of a method by its slug, or the one in a user's file by its path.

    Raises:
        StudyError: there is no such study or file, the file does not run, or holds no `study`.
    """
    path = study_path(name)
    if is_shipped(path):
        module_name = f"firsthand.studies.{path.stem}"
    else:
        module_name = f"firsthand_user_study_{path.stem}"
        if str(path.parent) not in sys.path:  # so that the file may import its neighbours
            sys.path.insert(0, str(path.parent))
    try:
        if is_shipped(path):
            module = importlib.import_module(module_name)
        else:
            spec = importlib.util.spec_from_file_location(module_name, path)
            if spec is None or spec.loader is None:
                raise ImportError("not a Python file")
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
    except StudyError as error:
        raise StudyError(f"{name}: {error}") from error
    except SyntaxError as error:
        raise StudyError(f"{name}: line {error.lineno}: not valid Python: {error.msg}") from error
    except Exception as error:
        raise StudyError(f"{name}: could not be imported: {type(error).__name__}: {error}") from error
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise StudyError(f"{name}: defines no `study` (a firsthand.Study at the top level of the file)")
    study.path = path
    return study


def study_path(name: str) -> Path:
    """Where the study called `name` is written: a slug, or a path to a `.py` file."""
    if name.endswith(".py"):
        path = Path(name).resolve()
        if not path.is_file():
            raise StudyError(f"{name}: no such file")
        return path
    path = SHIPPED / f"{name.replace('-', '_')}.py"
    if not path.is_file():
        raise StudyError(f"{name!r} is neither a method with a study nor a .py file; `firsthand list` names the methods")
    return path


def study_name(path: Path) -> str:
    """What `load_study` finds the file by, on this machine or, for a shipped study, on another."""
    return path.stem.replace("_", "-") if is_shipped(path) else str(path)


SHIPPED = Path(__file__).parent.parent / "studies"


def is_shipped(path: Path) -> bool:
    return path.parent == SHIPPED
