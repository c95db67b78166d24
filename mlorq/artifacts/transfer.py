"""Whole files on any file system: in parallel, in parts, patiently, with every driver's faults as ``OSError``s.

fsspec gives all stores one interface, but not one behaviour. What is added here, for stores that are not local folders:

- files are transferred side by side and large ones in parts, always a bounded number at a time;
- a fault that can pass is waited out for a while, so that a store that is down for seconds stops nobody;
- what drivers raise becomes an ``OSError`` whose type says whether another try makes sense (``can_pass``);
- listings are the store's word of this moment, never a driver's memory of an earlier one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import inspect
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import fsspec

CHUNK_BYTES = 8 * 2**20  # a part of a large file; S3 takes none below 5 MiB
PARALLEL = 8  # transfers at a time; botocore opens 10 connections
PATIENCE_SECONDS = 45.0  # that a store which has answered before may be down
LONGEST_PAUSE = 5.0

LASTING = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ENAMETOOLONG}
# S3's own words for what is worth another try although its status says that the request was at fault.
PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "SlowDown", "OperationAborted"}
PASSING_STATUS = {408, 409, 425, 429}
# Parts of the names of exceptions, for there is no base class that the drivers' have in common.
REFUSALS = ("Credential", "Token", "Profile", "Auth", "Login", "Validation", "Permission", "Forbidden", "Invalid")

T = TypeVar("T")


class RefusedError(PermissionError):
    """The store answers, and will answer the same again: no rights, no valid credentials, no such bucket."""


def can_pass(fault: BaseException | None) -> bool:
    """Whether a fault may be gone at the next try: a network that was down, but no missing file and no full disk."""
    lasting = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
    return isinstance(fault, OSError) and not isinstance(fault, lasting) and fault.errno not in LASTING


def as_os_error(error: Exception) -> OSError | None:
    """A driver's fault as an ``OSError``; None where it is none, but a defect of some code.

    Drivers are recognised by how they name things, so that none has to be imported.
    """
    if isinstance(error, OSError):
        return _s3_answer(error) or error
    if isinstance(error, ValueError):  # a bucket or path of a form that cannot be
        return RefusedError(_line(error))
    names = {kind.__name__ for kind in type(error).__mro__}
    own = type(error).__module__.partition(".")[0] not in sys.stdlib_module_names
    if not own and not names & {"EOFError", "HTTPException"}:  # of asyncio and http.client: cut off in the middle
        return None
    if any("Timeout" in name for name in names):
        return TimeoutError(_line(error))
    if own and any(part in type(error).__name__ for part in REFUSALS):
        return RefusedError(_line(error))
    return _s3_answer(error) or ConnectionError(_line(error))


def _s3_answer(error: Exception) -> OSError | None:
    """What an S3 server answered, where the driver's translation of it leaves open whether it will last."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    if not isinstance(response, Mapping):
        return None
    code = str(response.get("Error", {}).get("Code"))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    if code == "InvalidRange" or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket"):
        return None
    if code in PASSING_CODES or status in PASSING_STATUS or not 400 <= status < 500:
        return None
    return RefusedError(f"{code}: {_line(error)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _is_past_the_end(error: OSError) -> bool:
    response = getattr(error.__cause__, "response", None)
    return isinstance(response, Mapping) and response.get("Error", {}).get("Code") == "InvalidRange"


@dataclass
class Moved:
    """Transfers of one kind: how many, and their bytes."""

    reads: int = 0
    read_bytes: int = 0
    writes: int = 0
    written_bytes: int = 0


class Traffic:
    """What was moved between this process and a store, manifests apart from the rest; read it at any time.

    Attributes:
        files: of artifacts. A file in parts is one transfer.
        manifests: likewise.
        listings: of folders, whose bytes nobody sees.
        cached_bytes: that a local cache gave instead of the store.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.files, self.manifests = Moved(), Moved()
        self.listings = self.cached_bytes = 0

    def read(self, count: int, *, manifest: bool = False) -> None:
        """``count`` bytes came from the store."""
        with self._lock:
            moved = self.manifests if manifest else self.files
            moved.reads += 1
            moved.read_bytes += count

    def written(self, count: int, *, manifest: bool = False) -> None:
        """``count`` bytes went to the store."""
        with self._lock:
            moved = self.manifests if manifest else self.files
            moved.writes += 1
            moved.written_bytes += count

    def listed(self) -> None:
        """A folder was listed."""
        with self._lock:
            self.listings += 1

    def cached(self, count: int) -> None:
        """``count`` bytes did not have to come from the store."""
        with self._lock:
            self.cached_bytes += count

    def to_json(self) -> dict[str, Any]:
        """The record as plain values."""
        with self._lock:
            return {
                "files": asdict(self.files),
                "manifests": asdict(self.manifests),
                "listings": self.listings,
                "cached_bytes": self.cached_bytes,
            }


@dataclass(frozen=True)
class Entry:
    """A file as a listing shows it.

    Attributes:
        bytes: its size.
        modified: when it was written; None where the store does not say.
    """

    bytes: int
    modified: datetime.datetime | None


class Files:
    """Files of one store.

    Args:
        fs: the file system.
        patience: seconds that a fault which can pass is waited out, once the store has answered. A store that never
            did is reported at once: an address that is wrong stays wrong.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, patience: float = PATIENCE_SECONDS) -> None:
        self.fs = fs
        self.patience = patience
        self.traffic = Traffic()
        self.is_local = isinstance(fs, fsspec.get_filesystem_class("file"))
        # Folders are made by the files in them there; making one makes a bucket where the name is mistyped.
        protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
        self._makes_folders = not protocols & {"s3", "gs", "gcs", "abfs", "az", "memory"}
        takes = inspect.signature(getattr(fs, "_pipe_file", fs.pipe_file)).parameters
        self._part_options = {"chunksize": CHUNK_BYTES} if "chunksize" in takes else {}
        self._answered = self.is_local

    def ask(self, call: Callable[[], T]) -> T:
        """Call the driver.

        Raises:
            OSError: its fault, after waiting for one that can pass; ``RefusedError`` where the store says no.
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
        """A whole file; where ``size`` is what it should have, another length of the result says that it has not.

        Args:
            path: of the file.
            size: that is expected, which saves asking for it and lets a large file come in parts.
            manifest: which account of ``traffic`` it goes to.

        Raises:
            FileNotFoundError: there is none.
            OSError: as for ``ask``.
        """
        if self.is_local:
            data: bytes = self.ask(lambda: self.fs.cat_file(path))
        elif size is None or size < 2 * CHUNK_BYTES:
            # One byte more than expected shows a file that is too long. A range spares drivers the question for the
            # size, which is a request of its own.
            data = self._part(path, 0, 2**40 if size is None else size + 1)
        else:
            starts = range(0, size, CHUNK_BYTES)
            stops = [*starts[1:], size + 1]
            parts = [_call(self._part, path, start, stop) for start, stop in zip(starts, stops, strict=True)]
            data = b"".join(side_by_side(parts))
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
        """Size of a file of a local store."""
        return int(self.ask(lambda: self.fs.size(path)))

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        return bool(self.ask(lambda: self.fs.exists(path)))

    def children(self, folder: str) -> list[str]:
        """Names in a folder, sorted; none where there is no folder.

        Raises:
            OSError: as for ``ask``.
        """
        try:
            found = self.ask(lambda: self.fs.ls(folder, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def listing(self, folder: str) -> dict[str, Entry]:
        """Every file below a folder, by its path there; none where there is no folder.

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
        """Write a file, whole or not at all; a large one in parts where the driver can.

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
        """Write several files, small ones side by side, large ones one after another in parts side by side.

        Raises:
            OSError: of one that could not be written; others may be there.
        """
        small = {path: data for path, data in files.items() if len(data) < 2 * CHUNK_BYTES}
        side_by_side([_call(self.write, path, data) for path, data in small.items()])
        for path, data in files.items():
            if path not in small:
                self.write(path, data)

    def remove(self, path: str) -> None:
        """Remove a file that may be gone already."""
        with contextlib.suppress(FileNotFoundError):
            self.ask(lambda: self.fs.rm_file(path))

    def remove_folder(self, path: str) -> None:
        """Remove a folder, which may be gone already, with all in it."""
        with contextlib.suppress(FileNotFoundError):
            self.ask(lambda: self.fs.rm(path, recursive=True))

    def probe(self, folder: str) -> None:
        """Write and remove an empty file.

        Raises:
            OSError: that cannot be done.
        """
        name = f"{folder}/.probe-{uuid.uuid4().hex}"
        if self._makes_folders:
            self.ask(lambda: self.fs.makedirs(folder, exist_ok=True))
        self.ask(lambda: self.fs.pipe_file(name, b""))
        self.remove(name)


def put_file(fs: fsspec.AbstractFileSystem, path: str, data: bytes, **options: Any) -> None:
    """Write a file that is there whole or not at all: an upload is atomic by itself, a local file is moved in place.

    Args:
        fs: the file system.
        path: of the file.
        data: its content.
        options: of the driver's ``pipe_file``.

    Raises:
        OSError: it cannot be written.
    """
    if not isinstance(fs, fsspec.get_filesystem_class("file")):
        fs.pipe_file(path, data, **options)
        return
    replace_file(path, data)


def replace_file(path: str, data: bytes) -> None:
    """Write a local file under a temporary name and move it in place: readers see all of it or nothing.

    Raises:
        OSError: it cannot be written.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def hide_password(url: str) -> str:
    """A URL as it may be shown: a password in it is left out."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", url)


def side_by_side(calls: Sequence[Callable[[], T]], limit: int = PARALLEL) -> list[T]:
    """The results of calls that wait for a store, some at a time, in the order given.

    Raises:
        Exception: the first one's in that order; those that have not begun are left out then.
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
    """When a file was written, from what drivers call it."""
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
