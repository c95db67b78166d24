"""The read-through cache: nothing is downloaded twice, and nothing damaged is believed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlorq.artifacts.cache import Cache, cache_folder
from mlorq.artifacts.hashing import digest_bytes
from mlorq.errors import StoreError

DATA = b"some content"
DIGEST = digest_bytes(DATA)


class Download:
    """Counts how often it is called."""

    def __init__(self, data: bytes = DATA) -> None:
        self.data = data
        self.calls = 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.data


def test_a_content_is_downloaded_once(tmp_path: Path) -> None:
    hits: list[int] = []
    cache, download = Cache(str(tmp_path), hits.append), Download()
    for _ in range(3):
        assert cache.fetch(DIGEST, len(DATA), download) == DATA
    assert Cache(str(tmp_path)).fetch(DIGEST, len(DATA), download) == DATA  # another process
    assert download.calls == 1
    assert hits == [len(DATA)] * 2
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [DIGEST]


@pytest.mark.parametrize("harm", [b"", b"some contenT", DATA + b"!"])
def test_a_damaged_entry_is_downloaded_again(tmp_path: Path, harm: bytes) -> None:
    cache, download = Cache(str(tmp_path)), Download()
    cache.fetch(DIGEST, len(DATA), download)
    Path(cache.path(DIGEST)).write_bytes(harm)
    assert cache.fetch(DIGEST, len(DATA), download) == DATA
    assert download.calls == 2
    assert cache.find(DIGEST, len(DATA)) == DATA


def test_what_is_kept_need_not_be_downloaded(tmp_path: Path) -> None:
    cache, download = Cache(str(tmp_path)), Download()
    cache.keep(DIGEST, DATA)
    assert cache.fetch(DIGEST, len(DATA), download) == DATA
    assert download.calls == 0


def test_a_download_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    cache = Cache(str(tmp_path))

    def fails() -> bytes:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        cache.fetch(DIGEST, len(DATA), fails)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_threads_wait_for_one_download(tmp_path: Path) -> None:
    started, go = threading.Event(), threading.Event()
    calls: list[int] = []

    def slow() -> bytes:
        calls.append(1)
        started.set()
        assert go.wait(10)
        return DATA

    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(Cache(str(tmp_path)).fetch(DIGEST, len(DATA), slow)))
        for _ in range(4)
    ]
    threads[0].start()
    assert started.wait(10)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert found == [DATA] * 4
    assert calls == [1]


def test_a_process_that_is_killed_holds_no_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys; from mlorq.artifacts.cache import Cache; "
        f"Cache({str(tmp_path)!r}).fetch({DIGEST!r}, {len(DATA)}, lambda: os.kill(os.getpid(), 9))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == -9
    assert Path(f"{Cache(str(tmp_path)).path(DIGEST)}.lock").exists()
    assert Cache(str(tmp_path)).fetch(DIGEST, len(DATA), Download()) == DATA


def test_a_cache_that_cannot_be_written_is_left_aside(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache, download = Cache(str(tmp_path / "file" / "cache")), Download()
    with pytest.warns(UserWarning, match="continuing without a cache"):
        assert cache.fetch(DIGEST, len(DATA), download) == DATA
    assert cache.fetch(DIGEST, len(DATA), download) == DATA
    assert download.calls == 2


def test_the_folder_that_a_setting_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, second = cache_folder("auto", "s3://a/x"), cache_folder("auto", "s3://b/x")
    assert first != second
    assert str(first).startswith(f"{tmp_path}/mlorq/")
    assert cache_folder("/kept", "s3://a/x") == "/kept"
    assert cache_folder("file:///kept", "s3://a/x") == "/kept"
    with pytest.raises(StoreError, match="is not a local folder"):
        cache_folder("s3://b/cache", "s3://a/x")
    assert cache_folder(None, "s3://a/x") is None
