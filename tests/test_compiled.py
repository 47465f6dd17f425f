"""Code that numba compiles runs whatever has become of numba's cache."""

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest

from pipelines.compiled import cached


def double(x: int) -> int:
    return 2 * x


def test_it_compiles_without_a_place_for_numbas_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only installations in which the user's home cannot be written to either."""
    monkeypatch.setattr(numba.core.caching.CacheImpl, "_locator_classes", [])
    assert cached(double)(21) == 42


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("content", [b"", b"no pickle", None], ids=["empty", "other", "cut"])
def test_a_damaged_file_in_numbas_cache_does_no_harm(
    cache_folder: Path, suffix: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert cached(double)(21) == 42
    (file,) = cache_folder.rglob(f"*.{suffix}")
    assert not caplog.messages
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    doubled = cached(double)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(doubled, range(64))) == list(range(0, 128, 2))
    (message,) = caplog.messages
    assert message.startswith("numba's cache fails (") and message.endswith("): compiled double anew.")


def test_a_full_disk_does_no_harm(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(numba.core.caching.IndexDataCacheFile, "_save_data", refuse)
    doubled = cached(double)
    assert [doubled(1), doubled(2)] == [2, 4]
    (message,) = caplog.messages
    assert "No space left" in message


def test_an_error_that_is_not_the_caches_is_raised(
    cache_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(TypeError, match="too many arguments"):
        cached(double)(1, 2)
    assert not caplog.messages
