"""Finished trials on disk, one JSON file each: there whole, or not at all."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import platformdirs

Record = dict[str, Any]


class Damaged(Exception):
    """A result file that cannot be trusted. The message names the file."""


def default_root() -> Path:
    """`$FIRSTHAND_CACHE/runs`, or `runs` in the user's cache folder."""
    base = os.environ.get("FIRSTHAND_CACHE")
    return (Path(base) if base else platformdirs.user_cache_path("firsthand")) / "runs"


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash at any moment, meets the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's own mode is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def put(path: Path, record: Record) -> None:
    """Keep a finished trial."""
    body = json.dumps(record, sort_keys=True)
    write_whole(path, json.dumps({"checksum": _checksum(body), "record": record}, sort_keys=True))


def get(path: Path) -> Record | None:
    """A kept trial, or `None` if there is none.

    Raises:
        Damaged: the file is cut short or changed.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record: Record = content["record"]
        intact = content["checksum"] == _checksum(json.dumps(record, sort_keys=True))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise Damaged(f"{path} is damaged")
    return record


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
