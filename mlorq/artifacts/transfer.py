"""Transfer of whole files on any file system: parallel, chunked, with retries, and with all errors as ``OSError``s.

fsspec gives all stores the same interface but not the same behaviour. For stores that are not local folders, this
module adds:

- parallel transfers, and large files in parts, with a bounded number of transfers at a time;
- retries of transient faults for a limited time, so that an outage of some seconds does not stop a run;
- conversion of driver exceptions to ``OSError``s whose type shows whether a retry makes sense (``can_pass``);
- listings that are always read from the store, never from a cache of the driver.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import inspect
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import fsspec

from mlorq.errors import MlorqError

CHUNK_BYTES = 8 * 2**20  # size of a part of a large file; S3 requires at least 5 MiB
PARALLEL = 8  # transfers at a time; botocore opens 10 connections
PATIENCE_SECONDS = 45.0  # time limit of retries for a store that has answered before
LONGEST_PAUSE = 5.0  # seconds between two retries

PERMANENT_ERRNO = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG}
# Error codes of S3 that are worth a retry although their status blames the request.
TRANSIENT_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "OperationAborted"}
TRANSIENT_STATUS = {408, 409, 425, 429}
# Parts of exception names, because the exceptions of the drivers have no common base class.
REFUSALS = ("Credential", "Token", "Profile", "Auth", "Login", "Validation", "Permission", "Forbidden", "Invalid")

T = TypeVar("T")


class RefusedError(PermissionError):
    """The store refuses the request permanently: no permission, invalid credentials, or no such bucket."""


def can_pass(fault: BaseException | None) -> bool:
    """Whether a fault is transient, like a network outage and unlike a missing file or a full disk."""
    permanent = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
    return isinstance(fault, OSError) and not isinstance(fault, permanent) and fault.errno not in PERMANENT_ERRNO


@contextlib.contextmanager
def os_errors() -> Iterator[None]:
    """Turn exceptions of drivers in a ``with`` block into ``OSError``s, unless they show a defect of code."""
    try:
        yield
    except MlorqError:
        raise
    except Exception as error:
        fault = as_os_error(error)
        if fault is None or fault is error:
            raise
        raise fault from error


def as_os_error(error: Exception) -> OSError | None:
    """An exception of a driver as an ``OSError``; None if it shows a defect of code instead of a fault.

    Exceptions are recognised by the names of their classes, so that no driver has to be imported.
    """
    if isinstance(error, OSError):
        return _s3_answer(error) or error
    if isinstance(error, ValueError):  # an invalid bucket name or path
        return RefusedError(_line(error))
    names = {kind.__name__ for kind in type(error).__mro__}
    third_party = type(error).__module__.partition(".")[0] not in sys.stdlib_module_names
    if not third_party and not names & {"EOFError", "HTTPException"}:  # asyncio and http.client: connection cut off
        return None
    if any("Timeout" in name for name in names):
        return TimeoutError(_line(error))
    if third_party and any(part in type(error).__name__ for part in REFUSALS):
        return RefusedError(_line(error))
    return _s3_answer(error) or ConnectionError(_line(error))


def _s3_answer(error: Exception) -> OSError | None:
    """The permanent refusal in an S3 response; None if there is no response or its fault may be transient."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, Mapping):
        return None
    code = str(response.get("Error", {}).get("Code"))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if code == "InvalidRange" or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket"):
        return None
    if code in TRANSIENT_CODES or status in TRANSIENT_STATUS or not 400 <= status < 500:
        return None
    return RefusedError(f"{code}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_past_the_end(error: OSError) -> bool:
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, Mapping) and response.get("Error", {}).get("Code") == "InvalidRange"


@dataclass
class Moved:
    """Numbers of transfers of one kind, and of their bytes."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0


class Traffic:
    """Thread-safe counts of the transfers between this process and a store.

    Attributes:
        files: transfers of files other than manifests; a file in several parts counts once.
        manifests: transfers of manifests.
        listings: number of listings of folders; their bytes are not counted.
        cached_bytes: bytes read from the local cache instead of the store.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.files, self.manifests = Moved(), Moved()
        self.listings = self.cached_bytes = 0

    def read(self, count: int, *, manifest: bool = False) -> None:
        """Count a read of ``count`` bytes from the store."""
        with self._lock:
            moved = self.manifests if manifest else self.files
            moved.reads += 1
            moved.read_bytes += count

    def written(self, count: int, *, manifest: bool = False) -> None:
        """Count a write of ``count`` bytes to the store."""
        with self._lock:
            moved = self.manifests if manifest else self.files
            moved.writes += 1
            moved.written_bytes += count

    def listed(self) -> None:
        """Count a listing of a folder."""
        with self._lock:
            self.listings += 1

    def cached(self, count: int) -> None:
        """Count ``count`` bytes read from the cache."""
        with self._lock:
            self.cached_bytes += count

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        with self._lock:
            return {
                "files": asdict(self.files),
                "manifests": asdict(self.manifests),
                "listings": self.listings,
                "cached_bytes": self.cached_bytes,
            }


@dataclass(frozen=True)
class Entry:
    """A file in a listing.

    Attributes:
        bytes: size of the file.
        modified: time at which it was written; None if the store does not report it.
    """

    bytes: int
    modified: datetime.datetime | None


class Files:
    """Reads, writes and lists the files of one store.

    Args:
        fs: the file system.
        patience: time limit in seconds for retries after a transient fault; default: ``PATIENCE_SECONDS``. Until the
            store has answered once there are no retries, since its address is probably wrong.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, patience: float | None = None) -> None:
        self.fs = fs
        self.patience = PATIENCE_SECONDS if patience is None else patience
        self.traffic = Traffic()
        self.is_local = isinstance(fs, fsspec.get_filesystem_class("file"))
        # Object stores need no folders, and creating one could create a bucket with a mistyped name.
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._makes_folders = not protocols & {"s3", "gs", "gcs", "abfs", "az", "memory"}
        takes = inspect.signature(getattr(fs, "_pipe_file", fs.pipe_file)).parameters
        self._part_options = {"chunksize": CHUNK_BYTES} if "chunksize" in takes else {}
        self._answered = self.is_local

    def ask(self, call: Callable[[], T]) -> T:
        """The result of a driver call, with retries of transient faults.

        Raises:
            OSError: a permanent fault, or a transient one that lasted; ``RefusedError`` if the store refuses.
        """
        end: float | None = None
        pause = 0.5
        while True:
            try:
                result = call()
            except Exception as error:
                fault = as_os_error(error)
                if fault is None:
                    raise
                end = time.monotonic() + self.patience if end is None else end
                if self.is_local or not can_pass(fault) or not self._answered or time.monotonic() + pause > end:
                    self._answered = self._answered or not can_pass(fault)
                    if fault is error:
                        raise
                    raise fault from error
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self._answered = True
                return result

    # -- reading ----------------------------------------------------------------------------------------------

    def read(self, path: str, size: int | None = None, *, manifest: bool = False) -> bytes:
        """The content of a whole file.

        If the size of the file differs from ``size``, so does the length of the result.

        Args:
            path: path of the file.
            size: expected size in bytes; it saves a request and allows reading a large file in parts.
            manifest: whether ``traffic`` counts the file as a manifest.

        Raises:
            FileNotFoundError: the file does not exist.
            OSError: as for ``ask``.
        """
        if self.is_local:
            data: bytes = self.ask(lambda: self.fs.cat_file(path))
        elif size is None or size < 2 * CHUNK_BYTES:
            # Reading one byte more than expected detects a file that is too long. With a range, drivers do not send
            # a separate request for the size.
            data = self._part(path, 0, 2**40 if size is None else size + 1)
        else:
            starts = range(0, size, CHUNK_BYTES)
            stops = [*starts[1:], size + 1]
            parts = [_call(self._part, path, start, stop) for start, stop in zip(starts, stops, strict=True)]
            data = b"".join(side_by_side(parts))
        self.traffic.read(len(data), manifest=manifest)
        return data

    def read_at_most(self, path: str, most: int, *, manifest: bool = False) -> bytes:
        """The content of a file, or its first ``most + 1`` bytes if it has more than ``most``.

        Args:
            path: path of the file.
            most: number of bytes.
            manifest: whether ``traffic`` counts the file as a manifest.

        Raises:
            FileNotFoundError: the file does not exist.
            OSError: as for ``ask``.
        """
        if self.is_local and self.size(path) <= most:  # a range would make it take the memory of the limit
            return self.read(path, manifest=manifest)
        data = self._part(path, 0, most + 1)
        self.traffic.read(len(data), manifest=manifest)
        return data

    def _part(self, path: str, start: int, stop: int) -> bytes:
        def get() -> bytes:
            try:
                return bytes(self.fs.cat_file(path, start=start, end=stop))
            except OSError as error:
                if _is_past_the_end(error):  # S3 has no empty ranges
                    return b""
                raise

        return self.ask(get)

    def size(self, path: str) -> int:
        """Size of a file in bytes."""
        return int(self.ask(lambda: self.fs.size(path)))

    def exists(self, path: str) -> bool:
        """Whether a file exists."""
        return bool(self.ask(lambda: self.fs.exists(path)))

    def children(self, folder: str) -> list[str]:
        """Sorted names of the entries of a folder; empty if the folder does not exist.

        Raises:
            OSError: as for ``ask``.
        """
        try:
            found = self.ask(lambda: self.fs.ls(folder, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def listing(self, folder: str) -> dict[str, Entry]:
        """All files below a folder, by path relative to it; empty if the folder does not exist.

        Raises:
            OSError: as for ``ask``.
        """
        folder = folder.rstrip("/")

        def find() -> dict[str, dict[str, Any]]:
            self.fs.invalidate_cache(folder)
            found: dict[str, dict[str, Any]] = self.fs.find(folder, detail=True)
            return found

        try:
            found = self.ask(find)
        except (FileNotFoundError, NotADirectoryError):
            found = {}
        self.traffic.listed()
        return {
            name[len(folder) + 1 :]: Entry(int(info["size"] or 0), _modified(info))
            for name, info in found.items()
            if name.startswith(f"{folder}/") and info["type"] == "file" and not name.endswith("/")
        }

    # -- writing ----------------------------------------------------------------------------------------------

    def write(self, path: str, data: bytes, *, manifest: bool = False) -> None:
        """Write a file atomically; a large one in parts, if the driver supports it.

        Raises:
            OSError: as for ``ask``.
        """

        def put() -> None:
            if self._makes_folders:
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            put_file(self.fs, path, data, **self._part_options)

        self.ask(put)
        self.traffic.written(len(data), manifest=manifest)

    def write_all(self, files: Mapping[str, bytes]) -> None:
        """Write several files: small ones in parallel; large ones one after another, the parts of each in parallel.

        Raises:
            OSError: a file could not be written; others may have been.
        """
        small = {path: data for path, data in files.items() if len(data) < 2 * CHUNK_BYTES}
        side_by_side([_call(self.write, path, data) for path, data in small.items()])
        for path, data in files.items():
            if path not in small:
                self.write(path, data)

    def remove(self, path: str) -> None:
        """Remove a file, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.ask(lambda: self.fs.rm_file(path))

    def remove_folder(self, path: str) -> None:
        """Remove a folder and its content, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.ask(lambda: self.fs.rm(path, recursive=True))

    def probe(self, folder: str) -> None:
        """Write and remove an empty file, to check that a folder is writable.

        Raises:
            OSError: the file cannot be written or removed.
        """
        name = f"{folder}/.probe-{uuid.uuid4().hex}"
        if self._makes_folders:
            self.ask(lambda: self.fs.makedirs(folder, exist_ok=True))
        self.ask(lambda: self.fs.pipe_file(name, b""))
        self.remove(name)


def put_file(fs: fsspec.AbstractFileSystem, path: str, data: bytes, **options: Any) -> None:
    """Write a file atomically: uploads are atomic already, a local file is written under another name and renamed.

    Args:
        fs: the file system.
        path: path of the file.
        data: its content.
        options: options of the driver's ``pipe_file``.

    Raises:
        OSError: the file cannot be written.
    """
    if not isinstance(fs, fsspec.get_filesystem_class("file")):
        fs.pipe_file(path, data, **options)
        return
    replace_file(path, data)


def replace_file(path: str, data: bytes) -> None:
    """Write a local file atomically: under a temporary name, then renamed when its bytes are on the disk.

    Without ``fsync`` a machine that loses power may keep the new name with none of the bytes.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def side_by_side(calls: Sequence[Callable[[], T]], limit: int = PARALLEL) -> list[T]:
    """The results of calls, in their order; the calls run in at most ``limit`` threads.

    Raises:
        Exception: the exception of the first call that fails, in their order; calls not yet started are cancelled.
    """
    if len(calls) < 2:
        return [call() for call in calls]
    with ThreadPoolExecutor(min(limit, len(calls))) as pool:
        futures = [pool.submit(call) for call in calls]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _call(function: Callable[..., T], *arguments: Any) -> Callable[[], T]:
    return lambda: function(*arguments)


def _modified(info: Mapping[str, Any]) -> datetime.datetime | None:
    """Time at which a file was written, under any of the names that drivers use; None if unknown."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = info.get(name)
        if isinstance(value, (int, float)):
            return datetime.datetime.fromtimestamp(value, datetime.UTC)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.datetime.fromisoformat(value)
        if isinstance(value, datetime.datetime):
            return value if value.tzinfo else value.replace(tzinfo=datetime.UTC)
    return None
