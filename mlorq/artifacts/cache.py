"""A folder of this machine that keeps what was read from a remote store, so that nothing is downloaded twice.

A file is named by the digest of its content, which the artifact's manifest says: an entry can never be out of date,
only damaged, and what is damaged is downloaded again. Deleting the folder, or anything in it, costs a download and no
more.
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
    """The folder that a setting means.

    Args:
        setting: ``auto`` for a folder a store in the user's cache, a folder, or None for no cache.
        url: of the store.

    Raises:
        StoreError: it is a URL, but not of a folder.
    """
    if setting is not None and "://" in setting and not setting.startswith("file://"):
        raise StoreError(f"cache {setting!r}: a folder of this machine is needed")
    if setting != "auto":
        return None if setting is None else setting.removeprefix("file://")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(home, "mlorq", digest_bytes(url.encode()))


class Cache:
    """Contents by their digest.

    A cache that cannot be written is no reason to fail: it says so once and is left aside.

    Args:
        folder: where they are; made with the first entry.
        hit: called with the size of every content that was here.
    """

    def __init__(self, folder: str, hit: Callable[[int], object] = lambda size: None) -> None:
        self.folder = folder
        self._hit = hit
        self._usable = True

    def path(self, digest: str) -> str:
        """Where a content is, or would be."""
        return os.path.join(self.folder, digest[:2], digest)

    def find(self, digest: str, size: int) -> bytes | None:
        """A content that is here unharmed."""
        try:
            with open(self.path(digest), "rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return None
                data = file.read()
        except OSError:
            return None
        return data if digest_bytes(data) == digest else None

    def fetch(self, digest: str, size: int, download: Callable[[], bytes]) -> bytes:
        """A content that is here, or else is downloaded and kept; one process downloads, others wait for it.

        Args:
            digest: of the content.
            size: likewise.
            download: gives the content, checked.
        """
        data = self.find(digest, size)
        if data is None:
            with self._locked(digest):
                data = self.find(digest, size)  # another may have downloaded it while we waited
                if data is None:
                    data = download()
                    self.keep(digest, data)
                    return data
        self._hit(size)
        return data

    def keep(self, digest: str, data: bytes) -> None:
        """Add a content, unless it is there."""
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
        """Hold an entry's lock, which the system takes back from a process that ends, however it ends."""
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
                    # Who held it before us has removed it: others may hold a new one by this name already.
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
            warnings.warn(f"the cache {self.folder} cannot be written: {error}; going on without it", stacklevel=2)
