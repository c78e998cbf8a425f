import pytest


@pytest.fixture(scope="session")
def extracted(tmp_path_factory):
    """A cache that the tests of this session share, so that a library is parsed once."""
    return tmp_path_factory.mktemp("extracted")


@pytest.fixture(autouse=True)
def cache(extracted, monkeypatch):
    """No test reads or writes the user's own cache."""
    monkeypatch.setenv("FIRSTHAND_CACHE", str(extracted))
    return extracted


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of a test's own, with nothing in it."""
    monkeypatch.setenv("FIRSTHAND_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"
