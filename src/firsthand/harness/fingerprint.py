"""What a result depends on: the code of the study and of what it imports, and the versions of the libraries behind it.

Code is compared as a syntax tree without comments and docstrings, so wording costs no evidence. The harness is left out, but
for `Trial`: it decides what is run and measured, not what an arm computes. So is the data layer: data are known by name, and
a loader that is to give something else gives it under a new name.
"""

import ast
import hashlib
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from firsthand.harness.store import default_root, write_whole

PACKAGE = Path(__file__).parent.parent
TRIAL = Path(__file__).parent / "trial.py"


def code_fingerprint(study: Path) -> str:
    """Fingerprint of a study file and of every module of ours (or beside it) that it reaches by imports."""
    digest = hashlib.sha256()
    for path in sources(study):
        digest.update(_name(path, study).encode() + b"\0" + _facts(path)[0].encode() + b"\0")
    return digest.hexdigest()


def trial_key(code: str, libraries: dict[str, str], **what: object) -> str:
    """Name of one trial's result: everything that may change its numbers, hashed."""
    return hashlib.sha256(json.dumps([code, libraries, what], sort_keys=True, default=str).encode()).hexdigest()[:32]


def sources(study: Path) -> list[Path]:
    """The study's file, `Trial`, and the files of ours they import, at any depth, in a fixed order."""
    found = {study, TRIAL}
    waiting = [study]
    while waiting:
        path = waiting.pop()
        new = {target for name in _imported(path) for target in _files(name, study.parent)} - found
        found |= new
        waiting += new
    return sorted(found, key=lambda path: _name(path, study))


def library_versions(study: Path) -> dict[str, str]:
    """Versions of Python, of the libraries of the core, and of each other one that the study's code imports or names.

    Names, because a library may also be what is read: `data.load("docstrings", packages=("networkx",))`.
    """
    names = {"torch", "numpy", "scipy", "sklearn"}
    for path in sources(study):
        names |= {name.partition(".")[0] for name in _imported(path)} | _strings(_read(path))
    names -= set(sys.stdlib_module_names) | {"firsthand"}
    providers = importlib.metadata.packages_distributions()
    versions = {dist: importlib.metadata.version(dist) for name in names for dist in providers.get(name, [])[:1]}
    return {"python": platform.python_version(), **dict(sorted(versions.items()))}


def _imported(path: Path) -> tuple[str, ...]:
    return _facts(path)[1]


def _facts(path: Path) -> tuple[str, tuple[str, ...]]:
    """A file's code without comments and docstrings, and what it imports."""
    return _facts_of(_read(path), _dotted(path.parent))


@cache
def _facts_of(code: str, package: str) -> tuple[str, tuple[str, ...]]:
    """Kept in the user's cache: parsing all methods would take `firsthand list` more than a second."""
    name = hashlib.sha256("\0".join([platform.python_version(), package, code]).encode()).hexdigest()
    kept = default_root().parent / "code" / f"{name}.json"
    try:
        normalised, imports = json.loads(kept.read_text(encoding="utf-8"))
        return normalised, tuple(imports)
    except (OSError, ValueError):
        found = _normalised(code), _imports(code, package)
    with suppress(OSError):  # a cache that cannot be written to is none
        write_whole(kept, json.dumps(found))
    return found


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


# What is remembered is remembered by the text, so that a file that changes while we run is seen.
@cache
def _tree(code: str) -> ast.Module:
    return ast.parse(code)


@cache
def _strings(code: str) -> set[str]:
    return {node.value for node in ast.walk(_tree(code)) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@cache
def _normalised(code: str) -> str:
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@cache
def _imports(code: str, package: str) -> tuple[str, ...]:
    """Dotted names that a file of `package` imports anywhere in it; `from a import b` gives `a.b`."""

    def names() -> Iterator[str]:
        for node in ast.walk(_tree(code)):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = package.split(".")
                    base = ".".join(parts[: len(parts) - node.level + 1] + ([base] if base else []))
                yield from (f"{base}.{alias.name}" for alias in node.names)

    return tuple(sorted(set(names())))


def _files(name: str, beside: Path) -> list[Path]:
    """The files of ours behind an imported name: none for a library, the harness and the data layer."""
    parts = name.split(".")
    if parts[0] != "firsthand":
        neighbour = beside / f"{parts[0]}.py"
        return [neighbour] if neighbour.is_file() and beside != PACKAGE / "studies" else []
    if len(parts) == 1 or parts[1] in ("harness", "data"):
        return []
    base = PACKAGE
    for depth, part in enumerate(parts[1:], 1):
        if (base / f"{part}.py").is_file():
            return [base / f"{part}.py"]
        if not (base / part).is_dir():
            return _exported(base, part)
        base = base / part
        if depth == len(parts) - 1:  # the package itself: whatever it holds may be used
            return sorted(base.glob("*.py"))
    return []


def _exported(package: Path, name: str) -> list[Path]:
    """The module that a package's lazy `__init__.pyi` takes `name` from."""
    stub = package / "__init__.pyi"
    if not stub.is_file():
        return [package / "__init__.py"] if (package / "__init__.py").is_file() else []
    for node in _tree(_read(stub)).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            target = package / f"{node.module}.py" if node.level else PACKAGE
            return [target] if target.is_file() and "harness" not in target.parts else []
    return []


def _dotted(folder: Path) -> str:
    if folder == PACKAGE or PACKAGE in folder.parents:
        return ".".join(("firsthand", *folder.relative_to(PACKAGE).parts))
    return ""


def _name(path: Path, study: Path) -> str:
    """A name of the file that does not depend on where things are installed."""
    if PACKAGE in path.parents:
        return path.relative_to(PACKAGE).as_posix()
    return "study" if path == study else path.name
