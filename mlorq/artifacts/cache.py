"""A local cache of the files of a remote store, so that no file is downloaded twice.

Each entry is named by the digest of its content, as listed in the artifact's manifest. An entry can therefore be
damaged but never outdated, and a damaged one is downloaded again. Deleting entries, or the whole folder, is safe.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Callable, Iterator

from mlorq.artifacts.hashing import digest_bytes
from mlorq.artifacts.transfer import replace_file
from mlorq.errors import StoreError


def cache_folder(setting: str | None, url: str) -> str | None:
    """The cache folder for a value of ``engine.cache``; None for no cache.

    Args:
        setting: ``auto`` for one folder per store in the user's cache, a path or ``file://`` URL, or None.
        url: URL of the store.

    Raises:
        StoreError: the setting is a URL of something other than a local folder.
    """
    if setting is not None and "://" in setting and not setting.startswith("file://"):
        raise StoreError(f"cache {setting!r} is not a local folder: give a path on this machine")
    if setting != "auto":
        return None if setting is None else setting.removeprefix("file://")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "mlorq", digest_bytes(url.encode()))


class Cache:
    """A folder of files, each named by the digest of its content.

    If the folder cannot be written, the cache warns once and stores nothing from then on.

    Args:
        folder: path of the folder; created with the first entry.
        hit: called with the size in bytes of every content that ``fetch`` finds.
    """

    def __init__(self, folder: str, hit: Callable[[int], object] = lambda size: None) -> None:
        self.folder = folder
        self._hit = hit
        self._usable = True

    def path(self, digest: str) -> str:
        """Path of the entry of a digest, whether it exists or not."""
        return os.path.join(self.folder, digest[:2], digest)

    def find(self, digest: str, size: int) -> bytes | None:
        """The content of an entry; None if it is missing or damaged."""
        try:
            with open(self.path(digest), "rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return None
                data = file.read()
        except OSError:
            return None
        return data if digest_bytes(data) == digest else None

    def fetch(self, digest: str, size: int, download: Callable[[], bytes]) -> bytes:
        """A content from the cache; if it is missing, download and store it.

        Of several processes that need the same content, one downloads it and the others wait.

        Args:
            digest: digest of the content.
            size: size of the content in bytes.
            download: returns the verified content.
        """
        data = self.find(digest, size)
        if data is None:
            with self._locked(digest):
                data = self.find(digest, size)  # another process may have stored it while this one waited
                if data is None:
                    data = download()
                    self.keep(digest, data)
                    return data
        self._hit(size)
        return data

    def keep(self, digest: str, data: bytes) -> None:
        """Store a content, unless the cache has it already."""
        if not self._usable or self.find(digest, len(data)) is not None:
            return
        path = self.path(digest)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            replace_file(path, data)
        except OSError as error:
            self._give_up(error)

    @contextlib.contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        """Hold the lock of an entry; the system releases it when the process ends, even if it is killed."""
        file = self._lock(digest) if self._usable else None
        try:
            yield
        finally:
            if file is not None:
                with contextlib.suppress(OSError):
                    os.unlink(f"{self.path(digest)}.lock")
                os.close(file)

    def _lock(self, digest: str) -> int | None:
        name = f"{self.path(digest)}.lock"
        try:
            os.makedirs(os.path.dirname(name), exist_ok=True)
            while True:
                file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    # The previous holder removed the file: another process may hold a new one of the same name.
                    with contextlib.suppress(FileNotFoundError):
                        if os.stat(name).st_ino == os.fstat(file).st_ino:
                            return file
                except BaseException:
                    os.close(file)
                    raise
                os.close(file)
        except OSError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: OSError) -> None:
        if self._usable:
            self._usable = False
            warnings.warn(f"cannot write the cache {self.folder}: {error}; continuing without a cache", stacklevel=2)
