"""Where a data set's files are on this machine, and reading them."""

import difflib
import glob
import importlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import platformdirs

from firsthand.data.sources import SOURCES, Source


class DataMissing(Exception):
    """Data that is not on this machine. The message says which, and how to get it."""


def load(name: str, **options: Any) -> Any:
    """Read a data set, or find a model's folder, by name.

    What comes back depends on the set: `gives` of its `Source` says it in short, the docstring of its loader in full.

    Args:
        name: a key of `SOURCES`, such as `"digits"`.
        options: passed to the set's loader, such as `packages=("networkx",)` for `"docstrings"`.

    Raises:
        ValueError: there is no data set of that name.
        DataMissing: it is not on this machine; the message says how to get it.
    """
    source = source_of(name)
    folder = where(name)
    module, function = source.loader.split(".")
    return getattr(importlib.import_module(f"firsthand.data.{module}"), function)(folder, **options)


def available(name: str) -> bool:
    """Whether the files of a data set are on this machine. Looks, reads nothing.

    Raises:
        ValueError: there is no data set of that name.
    """
    return _find(source_of(name)) is not None


def require(names: Iterable[str]) -> None:
    """Check that all of these are on this machine.

    Raises:
        ValueError: there is no data set of one of these names.
        DataMissing: some are missing; the message has a line for each.
    """
    missing = [source for source in map(source_of, names) if _find(source) is None]
    if missing:
        raise DataMissing("\n".join(map(_how_to_get, missing)))


def where(name: str) -> Path:
    """The folder that holds a data set's files.

    Raises:
        ValueError: there is no data set of that name.
        DataMissing: it is not on this machine.
    """
    source = source_of(name)
    folder = _find(source)
    if folder is None:
        raise DataMissing(_how_to_get(source))
    return folder


def source_of(name: str) -> Source:
    """The entry of `SOURCES`, or a `ValueError` that names what there is."""
    try:
        return SOURCES[name]
    except KeyError:
        close = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no data set {name!r}; {hint}There are: {', '.join(SOURCES)}") from None


def cache_folder() -> Path:
    """Where fetched data is kept: `$FIRSTHAND_CACHE/data`, or `data` in the user's cache folder for firsthand."""
    chosen = os.environ.get("FIRSTHAND_CACHE")
    return (Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("firsthand")) / "data"


def package_folder(package: str) -> Path | None:
    """The folder of an installed top-level package, found without importing it; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _find(source: Source) -> Path | None:
    """The first folder that has all the files the source names."""
    folders = [cache_folder() / source.name] if source.download else []
    if source.tier == 0 and not source.package:
        folders.append(Path(sysconfig.get_paths()["stdlib"]))
    if source.package and (folder := package_folder(source.package)):
        folders.append(folder)
    if source.folder:
        folders += map(Path, sorted(glob.glob(source.folder)))
    for folder in folders:
        if all((folder / file).exists() for file in source.files):
            return folder
    return None


def _how_to_get(source: Source) -> str:
    installed = f"an installed package {source.package!r}"
    place = str(cache_folder() / source.name) if source.download else source.folder or installed
    return f"the data set {source.name!r} is not on this machine ({source.what}; looked in {place}). Get it with: {source.get}"
