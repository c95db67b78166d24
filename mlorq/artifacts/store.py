"""Content-addressed artifacts over fsspec.

An artifact is a folder ``<store>/<step>/<key>/`` of plain files whose ``manifest.json`` is written last: without a
manifest there is no artifact. Two writers of one key are harmless, because both write the same bytes. Local files are
written under a temporary name and renamed; uploads to object stores are atomic. Files read from a remote store can be
cached locally (``mlorq.artifacts.cache``); whether an artifact exists is always checked in the store itself.

    >>> store = Store("memory://doc")
    >>> ref = store.write("demo", "0" * 32, {"a.txt": b"hello"})
    >>> store.read_bytes(ref, "a.txt")
    b'hello'
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from mlorq.artifacts.cache import Cache, cache_folder
from mlorq.artifacts.hashing import digest_bytes
from mlorq.artifacts.leases import Leases
from mlorq.artifacts.transfer import Files, Traffic
from mlorq.artifacts.transfer import put_file as put_file  # re-exported for files outside artifacts
from mlorq.errors import StoreError, hide_secrets, one_line
from mlorq.numbers import byte_count
from mlorq.parquet import read_parquet

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 2  # format 1 has no digest of the manifest itself; it is read, too
MOST_MANIFEST_BYTES = 2**26  # some 400,000 files
MOST_FILE_BYTES = 2**40
LEASE_PATIENCE_SECONDS = 2.0
WAITING_BYTES = 2**26  # of files that are written together to a store that is not local
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)  # damage of an artifact, not faults of a network


@dataclass(frozen=True)
class ArtifactRef:
    """A reference to an artifact: its step and its key. Tasks pass references instead of data."""

    step: str
    key: str

    def to_json(self) -> dict[str, str]:
        return {"step": self.step, "key": self.key}

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> ArtifactRef:
        return cls(step=value["step"], key=value["key"])


class Store:
    """Artifacts at any fsspec URL (``file://``, ``s3://``, ``gs://``, ``memory://`` …).

    Attributes:
        url: URL of the store.
        fs: fsspec file system.
        root: path of the store in the file system.
        files: transfers whole files.
        leases: who uses the store at present.
        is_local: whether the store is a local folder.
        is_remote: whether the store is on a network, that is, neither a local folder nor in memory.
        traffic: counts of the transfers of this object.
    """

    def __init__(self, url: str, *, cache: str | None = None, **storage_options: Any) -> None:
        """Open a store; nothing is created or contacted before the first read or write.

        Args:
            url: URL of the store.
            cache: cache folder for files read or written, ``auto`` for one in the user's cache, None for no cache. Used
                only for a remote store.
            storage_options: options of the fsspec driver; prefer fsspec's configuration, which other processes read
                too.

        Raises:
            StoreError: the protocol of the URL is unknown or its driver is not installed.
        """
        self.url = url.rstrip("/")
        try:
            if re.match(r"s3a?://", self.url):
                # The driver's cache of listings hides files that other processes write.
                storage_options.setdefault("use_listings_cache", False)
            self.fs, root = url_to_fs(self.url, **storage_options)
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {hide_secrets(url)!r}: {error}") from error
        self.root = root.rstrip("/")
        self.files = Files(self.fs)
        self.is_local = self.files.is_local
        # Transfers of artifacts alone are counted. Work goes on without leases, so that a store that is down is not
        # waited for here.
        self.leases = Leases(Files(self.fs, patience=LEASE_PATIENCE_SECONDS), self.root, self._without_links)
        self.is_remote = not self.is_local and not isinstance(self.fs, fsspec.get_filesystem_class("memory"))
        folder = cache_folder(cache, self.url) if self.is_remote else None
        self.cache = None if folder is None else Cache(folder, self.traffic.cached)
        # Only for a remote store: an artifact never changes, so its manifest is read once.
        self._manifests: dict[ArtifactRef, dict[str, Any]] = {}

    @property
    def traffic(self) -> Traffic:
        """Counts of the transfers of this object."""
        return self.files.traffic

    # -- names ------------------------------------------------------------------------------------------------

    def path(self, ref: ArtifactRef, *names: str) -> str:
        """Path of an artifact, or of a file in it, in the file system of the store.

        Raises:
            StoreError: a name leads out of the folder that it belongs to.
        """
        for name in (ref.step, ref.key):
            if "/" in name:
                raise StoreError(f"{name!r} is not the name of a step or the key of an artifact")
        for name in (ref.step, ref.key, *names):
            check_inside(name)
        return self._without_links(posixpath.join(self.root, ref.step, ref.key, *names))

    def _without_links(self, path: str) -> str:
        """The path itself, if no link on its way leads out of a local store.

        Raises:
            StoreError: a link leads out of the store.
        """
        if self.is_local:
            root = os.path.realpath(self.root)
            if not os.path.realpath(path).startswith(root.rstrip("/") + "/"):
                raise StoreError(f"{path} leads out of the store {self.root} by a link: remove the link")
        return path

    def uri(self, ref: ArtifactRef, *names: str) -> str:
        """URI of an artifact, or of a file in it, without secrets: it is shown and stored."""
        return hide_secrets(str(self.fs.unstrip_protocol(self.path(ref, *names))))

    # -- existence --------------------------------------------------------------------------------------------

    def exists(self, ref: ArtifactRef) -> bool:
        """Whether a complete artifact exists: its manifest, and every listed file with the listed size.

        If the store is not local, this reads the manifest, unless it is known, and makes one listing.

        Raises:
            StoreError: the artifact is damaged, or the store cannot be reached.
        """
        manifest = self.manifest(ref, missing_ok=True)
        if manifest is None:
            return False
        if self.is_local:
            for name in manifest["files"]:
                try:
                    size = self.files.size(self.path(ref, name))
                except NO_FILE as error:
                    raise self._damaged(ref, name, "the file is missing") from error
                except OSError as error:
                    raise StoreError(f"cannot read {self.uri(ref, name)}: {error}") from error
                self._check_size(ref, name, size, manifest)
            return True
        try:
            found = self.files.listing(self.path(ref))
        except OSError as error:
            raise StoreError(f"cannot list {self.uri(ref)}: {error}") from error
        if MANIFEST not in found:  # removed after the manifest was read
            self._manifests.pop(ref, None)
            return False
        try:
            for name in manifest["files"]:
                if name not in found:
                    raise self._damaged(ref, name, "the file is missing")
                self._check_size(ref, name, found[name].bytes, manifest)
        except StoreError:
            if not self._is_outdated(ref, manifest):
                raise
            return self.exists(ref)
        return True

    def manifest(self, ref: ArtifactRef, missing_ok: bool = False) -> dict[str, Any] | None:
        """The manifest of an artifact; None if it is missing and ``missing_ok``.

        The manifest of a remote artifact is read once and remembered, even if the artifact is removed later; use
        ``exists`` to check that.

        Raises:
            StoreError: the manifest is missing (unless ``missing_ok``), unreadable or of another format version.
        """
        known = self._manifests.get(ref)
        if known is not None:
            return known
        try:
            text = self.files.read_at_most(self.path(ref, MANIFEST), MOST_MANIFEST_BYTES, manifest=True)
        except (FileNotFoundError, NotADirectoryError):
            if missing_ok:
                return None
            raise StoreError(f"artifact {self.uri(ref)} is not in the store") from None
        except IsADirectoryError as error:
            raise self._damaged(ref, MANIFEST, "it is a folder") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.uri(ref, MANIFEST)}: {error}") from error
        try:
            manifest = _checked_manifest(text, ref)
        except RecursionError:
            raise self._damaged(ref, MANIFEST, "it is nested too deeply") from None
        except (ValueError, KeyError, TypeError, AttributeError, StoreError) as error:
            raise self._damaged(ref, MANIFEST, one_line(error)) from error
        if self.is_remote:
            self._manifests[ref] = manifest
        return manifest

    def refs(self, step: str) -> Iterator[ArtifactRef]:
        """All artifacts of a step (folders with a manifest), ordered by key.

        Raises:
            StoreError: the store cannot be reached.
        """
        check_inside(step)
        folder = self._without_links(posixpath.join(self.root, step))
        try:
            if self.is_local:
                keys = self.files.children(folder)
                found = [key for key in keys if self.files.exists(posixpath.join(folder, key, MANIFEST))]
            else:
                names = sorted(self.files.listing(folder))
                found = [name.removesuffix(f"/{MANIFEST}") for name in names if name.endswith(f"/{MANIFEST}")]
        except OSError as error:
            raise StoreError(f"cannot list {self.fs.unstrip_protocol(folder)}: {error}") from error
        yield from (ArtifactRef(step, key) for key in found if "/" not in key)

    def _is_outdated(self, ref: ArtifactRef, manifest: dict[str, Any]) -> bool:
        """Whether a remembered manifest differs from the one in the store; the remembered one is dropped."""
        if self._manifests.pop(ref, None) is None:
            return False
        now = self.manifest(ref, missing_ok=True)
        return now is None or now["files"] != manifest["files"]

    # -- writing ----------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Write and remove an empty file, to detect a read-only store before any computation.

        Raises:
            StoreError: the file cannot be written.
        """
        try:
            self.files.probe(self.root)
        except OSError as error:
            raise StoreError(f"store {hide_secrets(self.url)} cannot be written: {error}") from error

    def write(
        self,
        step: str,
        key: str,
        files: Mapping[str, bytes],
        *,
        details: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> ArtifactRef:
        """Write an artifact: its files, then its manifest.

        Args:
            step: the step that made the artifact.
            key: its key.
            files: contents by file name.
            details: information for users (layer, model, parameters), kept in the manifest; not part of any digest.
            seconds: computing time, likewise.

        Raises:
            StoreError: the store cannot be written.
        """
        writer = self.writer(step, key)
        for name, data in files.items():
            writer.add(name, data)
        return writer.finish(details=details, seconds=seconds)

    def writer(self, step: str, key: str) -> ArtifactWriter:
        """Writes an artifact file by file, so that one that is larger than the memory can be written.

        Args:
            step: the step that makes the artifact.
            key: its key.
        """
        return ArtifactWriter(self, ArtifactRef(step, key))

    def forget(self, ref: ArtifactRef) -> None:
        """Remove the manifest of an artifact, so that its folder is no longer an artifact; other files stay.

        Raises:
            OSError: the manifest cannot be removed.
        """
        self.files.remove(self.path(ref, MANIFEST))
        self._manifests.pop(ref, None)

    def _put(self, path: str, data: bytes, *, manifest: bool = False) -> None:
        self.files.write(path, data, manifest=manifest)

    # -- reading ----------------------------------------------------------------------------------------------

    def read_bytes(self, ref: ArtifactRef, name: str) -> bytes:
        """The content of one file of an artifact, after a check of its size and digest.

        Raises:
            StoreError: the artifact or the file is missing or damaged, or the store cannot be reached.
        """
        manifest = self.manifest(ref)
        assert manifest is not None
        try:
            return self._read(ref, name, manifest)
        except StoreError as error:
            unreachable = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, NO_FILE)
            if unreachable or not self._is_outdated(ref, manifest):
                raise
        return self.read_bytes(ref, name)

    def _read(self, ref: ArtifactRef, name: str, manifest: dict[str, Any]) -> bytes:
        if name not in manifest["files"]:
            raise StoreError(f"artifact {self.uri(ref)} has no file {name!r}")
        if self.cache is None:
            return self._download(ref, name, manifest)
        listed = manifest["files"][name]
        download = functools.partial(self._download, ref, name, manifest)
        return self.cache.fetch(listed["digest"], listed["bytes"], download)

    def _download(self, ref: ArtifactRef, name: str, manifest: dict[str, Any]) -> bytes:
        listed = manifest["files"][name]
        try:
            path = self.path(ref, name)
            if self.is_local:  # before memory is taken
                self._check_size(ref, name, self.files.size(path), manifest)
            data = self.files.read(path, listed["bytes"])
        except NO_FILE as error:
            raise self._damaged(ref, name, "the file is missing") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.uri(ref, name)}: {error}") from error
        self._check_size(ref, name, len(data), manifest)
        if digest_bytes(data) != listed["digest"]:
            raise self._damaged(ref, name, "its digest differs from the manifest's")
        return data

    def read_table(self, ref: ArtifactRef, name: str) -> pa.Table:
        """One Parquet file of an artifact as an Arrow table.

        Raises:
            StoreError: the artifact or the file is missing or damaged, or the store cannot be reached.
        """
        data = self.read_bytes(ref, name)
        try:
            return read_parquet(data)
        except (pa.ArrowException, OSError, ValueError) as error:
            # Not its cause: some damage is an OSError of Parquet, which would be taken for a fault of the network.
            raise self._damaged(ref, name, one_line(error)) from None

    def read_tensors(self, ref: ArtifactRef, name: str) -> dict[str, Tensor]:
        """The tensors of one safetensors file of an artifact, by name.

        Raises:
            StoreError: the artifact or the file is missing or damaged, or the store cannot be reached.
        """
        import safetensors.torch

        try:
            return safetensors.torch.load(self.read_bytes(ref, name))
        except safetensors.SafetensorError as error:
            raise self._damaged(ref, name, str(error)) from error

    def read_arrays(self, ref: ArtifactRef, name: str) -> dict[str, np.ndarray]:
        """``read_tensors`` as NumPy arrays, without torch; for tensors of dtypes that NumPy has.

        Raises:
            StoreError: see ``read_tensors``.
        """
        import safetensors.numpy

        try:
            return safetensors.numpy.load(self.read_bytes(ref, name))
        except safetensors.SafetensorError as error:
            raise self._damaged(ref, name, str(error)) from error

    def read_json(self, ref: ArtifactRef, name: str) -> Any:
        """The value of one JSON file of an artifact.

        Raises:
            StoreError: the artifact or the file is missing or damaged, or the store cannot be reached.
        """
        try:
            return json.loads(self.read_bytes(ref, name))
        except RecursionError:
            raise self._damaged(ref, name, "it is nested too deeply") from None
        except ValueError as error:
            raise self._damaged(ref, name, str(error)) from error

    def _check_size(self, ref: ArtifactRef, name: str, size: int, manifest: dict[str, Any]) -> None:
        wanted = manifest["files"][name]["bytes"]
        if size > wanted and not self.is_local:
            raise self._damaged(ref, name, f"more than {byte_count(wanted)}")
        if size != wanted:
            raise self._damaged(ref, name, f"{byte_count(size)} instead of {byte_count(wanted)}")

    def _damaged(self, ref: ArtifactRef, name: str, reason: str) -> StoreError:
        return StoreError(
            f"artifact {self.uri(ref)} is damaged: {name}: {reason}; delete its folder, and it is computed again "
            "(mlorq store verify --repair does)"
        )


class ArtifactWriter:
    """Writes the files of one artifact as they come, and its manifest last. Without ``finish`` there is no artifact.

    Local files are written at once. Small files for other stores wait for each other, since these are written several
    at a time; at most ``WAITING_BYTES`` do.

    Args:
        store: the store.
        ref: of the artifact.
    """

    def __init__(self, store: Store, ref: ArtifactRef) -> None:
        self._store = store
        self._ref = ref
        self._listed: dict[str, dict[str, Any]] = {}
        self._waiting: dict[str, bytes] = {}

    def add(self, name: str, data: bytes) -> None:
        """Write one file.

        Args:
            name: its name in the artifact.
            data: its content.

        Raises:
            StoreError: the store cannot be written, or the artifact has a file of that name.
        """
        if name in self._listed:
            raise StoreError(f"artifact {self._store.uri(self._ref)} has two files {name!r}")
        self._listed[name] = {"bytes": len(data), "digest": digest_bytes(data)}
        with self._faults():
            if self._store.is_local:
                self._store._put(self._store.path(self._ref, name), data)
                return
        self._waiting[name] = data
        if sum(map(len, self._waiting.values())) >= WAITING_BYTES:
            self._write_waiting()

    def finish(self, *, details: Mapping[str, Any] | None = None, seconds: float | None = None) -> ArtifactRef:
        """Write the manifest; the arguments are those of ``Store.write``.

        Raises:
            StoreError: the store cannot be written.
        """
        store, ref = self._store, self._ref
        described = {
            "format": MANIFEST_FORMAT,
            "step": ref.step,
            "key": ref.key,
            "files": self._listed,
            "details": dict(details or {}),
            "seconds": seconds,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        manifest: dict[str, Any] = json.loads(json.dumps(described))
        text = json.dumps(manifest | {"digest": _digest_of(manifest)}, indent=1).encode()
        self._write_waiting()
        with self._faults():
            store._put(store.path(ref, MANIFEST), text, manifest=True)
        if store.is_remote:
            store._manifests[ref] = manifest
        return ref

    def _write_waiting(self) -> None:
        store = self._store
        with self._faults():
            store.files.write_all({store.path(self._ref, name): data for name, data in self._waiting.items()})
        if store.cache is not None:
            for name, data in self._waiting.items():
                store.cache.keep(self._listed[name]["digest"], data)
        self._waiting.clear()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot write artifact {self._store.uri(self._ref)}: {error}") from error


def _checked_manifest(text: bytes, ref: ArtifactRef) -> dict[str, Any]:
    """The manifest of an artifact from its text.

    Raises:
        StoreError: a file is not inside the artifact.
        ValueError, KeyError, TypeError, AttributeError: it is damaged, too large, or that of another artifact.
    """
    if len(text) > MOST_MANIFEST_BYTES:
        raise ValueError(f"it has more than {byte_count(MOST_MANIFEST_BYTES)}")
    manifest: dict[str, Any] = json.loads(text)
    version = manifest["format"]
    if version not in (1, MANIFEST_FORMAT) or not isinstance(manifest["files"], dict):
        raise ValueError(f"unknown manifest format {version!r}")
    if (manifest["step"], manifest["key"]) != (ref.step, ref.key):
        raise ValueError(f"it is that of artifact {manifest['step']}/{manifest['key']}")
    for name, listed in manifest["files"].items():
        check_inside(name)
        size = listed["bytes"]
        if type(size) is not int or not 0 <= size <= MOST_FILE_BYTES:
            raise ValueError(f"the size of {name} is not a number of bytes")
        if not re.fullmatch("[0-9a-f]{32}", listed["digest"]):
            raise ValueError(f"the digest of {name} is missing")
    seconds = manifest["seconds"]
    if not isinstance(manifest["details"], dict) or not isinstance(manifest["created"], str):
        raise ValueError("details must be a mapping, and created a date")
    if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds < float("inf")):
        raise ValueError(f"seconds {seconds!r} is not a time")
    # All that a manifest says counts: a file that it no longer lists would be taken for one that was never written.
    own = manifest.pop("digest", None)
    if own != (_digest_of(manifest) if version == MANIFEST_FORMAT else None):
        raise ValueError("its digest differs from its content")
    return manifest


def _digest_of(manifest: Mapping[str, Any]) -> str:
    return digest_bytes(json.dumps(manifest, sort_keys=True).encode())


def check_inside(name: str) -> None:
    """Check that a name of a step, key or file stays inside its folder.

    Raises:
        StoreError: it is empty or absolute, or has a part ``.`` or ``..``.
    """
    if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise StoreError(f"{name!r} is not a name inside an artifact")


# -- the three file formats of artifacts (never pickle) ------------------------------------------------------------


def table_bytes(table: pa.Table) -> bytes:
    """An Arrow table as Parquet bytes; equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_statistics=True)
    return buffer.getvalue()


def tensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Named tensors as safetensors bytes."""
    import safetensors.torch

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata=dict(metadata) if metadata else None)


def arrays_bytes(arrays: Mapping[str, Any]) -> bytes:
    """Named arrays as safetensors bytes: those of ``tensors_bytes`` for tensors of equal values."""
    import numpy as np
    import safetensors.numpy

    # Not np.ascontiguousarray, which makes an axis for a scalar.
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def json_bytes(value: Any) -> bytes:
    """A JSON value as indented UTF-8 text; keys keep their order."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
