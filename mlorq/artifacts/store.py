"""Content-addressed artifacts over fsspec.

An artifact is a folder ``<store>/<step>/<key>/`` of plain files whose ``manifest.json`` is written last: no
manifest, no artifact. Two writers of one key are harmless, because both write the same bytes. Local files appear
under a temporary name first; an object store's upload is atomic by itself. What is read from a remote store can be kept
in a folder of this machine (``mlorq.artifacts.cache``); whether an artifact exists is always the store's word.

    >>> store = Store("memory://doc")
    >>> ref = store.write("demo", "0" * 32, {"a.txt": b"hello"})
    >>> store.read_bytes(ref, "a.txt")
    b'hello'
"""

from __future__ import annotations

import datetime
import functools
import io
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import safetensors.torch
from fsspec.core import url_to_fs
from torch import Tensor

from mlorq.artifacts.cache import Cache, cache_folder
from mlorq.artifacts.hashing import digest_bytes
from mlorq.artifacts.transfer import Files, Traffic, hide_password
from mlorq.artifacts.transfer import put_file as put_file  # for those that write files which are no artifacts
from mlorq.errors import StoreError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1


@dataclass(frozen=True)
class ArtifactRef:
    """What tasks exchange instead of data: the step that made an artifact and the artifact's key."""

    step: str
    key: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> ArtifactRef:
        return cls(step=value["step"], key=value["key"])


class Store:
    """Artifacts at any fsspec URL (``file://``, ``s3://``, ``gs://``, ``memory://`` …).

    Attributes:
        url: as given.
        fs, root: the file system, and the store's path there.
        files: what transfers whole files.
        is_local: whether it is a folder of this machine.
        is_remote: whether reading it goes over a network: it is neither a folder nor in memory.
        traffic: what this object moved.
    """

    def __init__(self, url: str, *, cache: str | None = None, **storage_options: Any) -> None:
        """Open a store; nothing is created or contacted before the first read or write.

        Args:
            url: of the store.
            cache: folder that keeps what was read from it or written to it, ``auto`` for one in the user's cache, None
                for none. Only a remote store has one.
            storage_options: of the fsspec driver; better left to fsspec's configuration, which other processes see too.

        Raises:
            StoreError: the URL's protocol is unknown or its driver is not installed.
        """
        self.url = url.rstrip("/")
        try:
            if re.match(r"s3a?://", self.url):
                # Its memory of listings hides what others write, and serves us nothing.
                storage_options.setdefault("use_listings_cache", False)
            self.fs, root = url_to_fs(self.url, **storage_options)
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {hide_password(url)!r}: {error}") from error
        self.root = root.rstrip("/")
        self.files = Files(self.fs)
        self.is_local = self.files.is_local
        self.is_remote = not self.is_local and not isinstance(self.fs, fsspec.get_filesystem_class("memory"))
        folder = cache_folder(cache, self.url) if self.is_remote else None
        self.cache = None if folder is None else Cache(folder, self.traffic.cached)
        # Of a remote store: an artifact never changes, so its manifest is read once.
        self._manifests: dict[ArtifactRef, dict[str, Any]] = {}

    @property
    def traffic(self) -> Traffic:
        """What this object moved."""
        return self.files.traffic

    # -- names ------------------------------------------------------------------------------------------------

    def path(self, ref: ArtifactRef, *names: str) -> str:
        """Path of an artifact, or of a file in it, inside the store's file system."""
        return posixpath.join(self.root, ref.step, ref.key, *names)

    def uri(self, ref: ArtifactRef, *names: str) -> str:
        """Full URI of an artifact or of a file in it."""
        return str(self.fs.unstrip_protocol(self.path(ref, *names)))

    # -- existence --------------------------------------------------------------------------------------------

    def exists(self, ref: ArtifactRef) -> bool:
        """Whether a complete artifact is there: its manifest, and every file that the manifest lists, at its size.

        A store that is not local is asked for the manifest, unless it was read before, and for one listing.

        Raises:
            StoreError: the artifact is there but damaged, or the store cannot be reached.
        """
        manifest = self.manifest(ref, missing_ok=True)
        if manifest is None:
            return False
        if self.is_local:
            for name in manifest["files"]:
                try:
                    size = self.files.size(self.path(ref, name))
                except FileNotFoundError as error:
                    raise self._damaged(ref, name, "the file is missing") from error
                except OSError as error:
                    raise StoreError(f"cannot read {self.uri(ref, name)}: {error}") from error
                self._check_size(ref, name, size, manifest)
            return True
        try:
            found = self.files.listing(self.path(ref))
        except OSError as error:
            raise StoreError(f"cannot list {self.uri(ref)}: {error}") from error
        if MANIFEST not in found:  # it was removed since the manifest was read
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
        """The artifact's manifest, or None where there is none and ``missing_ok``.

        A remote store is asked once for it; whether the artifact is still there is what ``exists`` says.

        Raises:
            StoreError: it is missing (unless ``missing_ok``), unreadable or of another format version.
        """
        known = self._manifests.get(ref)
        if known is not None:
            return known
        try:
            text = self.files.read(self.path(ref, MANIFEST), manifest=True)
        except (FileNotFoundError, NotADirectoryError):
            if missing_ok:
                return None
            raise StoreError(f"artifact {self.uri(ref)} is not in the store") from None
        except OSError as error:
            raise StoreError(f"cannot read {self.uri(ref, MANIFEST)}: {error}") from error
        try:
            manifest: dict[str, Any] = json.loads(text)
            if manifest["format"] != MANIFEST_FORMAT or not isinstance(manifest["files"], dict):
                raise ValueError(f"unknown manifest format {manifest['format']!r}")
            for name, listed in manifest["files"].items():
                if not isinstance(listed["bytes"], int) or not re.fullmatch("[0-9a-f]{32}", listed["digest"]):
                    raise ValueError(f"no size and digest of {name}")
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(ref, MANIFEST, str(error)) from error
        if self.is_remote:
            self._manifests[ref] = manifest
        return manifest

    def refs(self, step: str) -> Iterator[ArtifactRef]:
        """Every complete artifact of a step, by key.

        Raises:
            StoreError: the store cannot be reached.
        """
        folder = posixpath.join(self.root, step)
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
        """Whether the artifact was written anew, differently, since its manifest was read; it is forgotten then."""
        if self._manifests.pop(ref, None) is None:
            return False
        now = self.manifest(ref, missing_ok=True)
        return now is None or now["files"] != manifest["files"]

    # -- writing ----------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Write and remove a small file, so that a store that cannot be written is found before any work.

        Raises:
            StoreError: the probe could not be written.
        """
        try:
            self.files.probe(self.root)
        except OSError as error:
            raise StoreError(f"store {hide_password(self.url)} cannot be written: {error}") from error

    def write(
        self,
        step: str,
        key: str,
        files: Mapping[str, bytes],
        *,
        details: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> ArtifactRef:
        """Write an artifact: its files, then the manifest that makes it one.

        ``details`` (layer, model, parameters) and ``seconds`` go into the manifest for people; they are no part of
        any digest.

        Raises:
            StoreError: the store cannot be written.
        """
        ref = ArtifactRef(step, key)
        listed: dict[str, dict[str, Any]] = {
            name: {"bytes": len(data), "digest": digest_bytes(data)} for name, data in files.items()
        }
        manifest = {
            "format": MANIFEST_FORMAT,
            "step": step,
            "key": key,
            "files": listed,
            "details": dict(details or {}),
            "seconds": seconds,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        text = json.dumps(manifest, indent=1).encode()
        try:
            if self.is_local:
                for name, data in files.items():
                    self._put(self.path(ref, name), data)
            else:
                self.files.write_all({self.path(ref, name): data for name, data in files.items()})
            self._put(self.path(ref, MANIFEST), text, manifest=True)
        except OSError as error:
            raise StoreError(f"cannot write artifact {self.uri(ref)}: {error}") from error
        if self.is_remote:
            self._manifests[ref] = json.loads(text)
        if self.cache is not None:
            for name, data in files.items():
                self.cache.keep(listed[name]["digest"], data)
        return ref

    def forget(self, ref: ArtifactRef) -> None:
        """Remove an artifact's manifest: from now on it is none, whatever files of it are left.

        Raises:
            OSError: it cannot be removed.
        """
        self.files.remove(self.path(ref, MANIFEST))
        self._manifests.pop(ref, None)

    def _put(self, path: str, data: bytes, *, manifest: bool = False) -> None:
        self.files.write(path, data, manifest=manifest)

    # -- reading ----------------------------------------------------------------------------------------------

    def read_bytes(self, ref: ArtifactRef, name: str, *, verify: bool = False) -> bytes:
        """One file of an artifact. Its size is always checked, its digest where ``verify``.

        Raises:
            StoreError: the artifact or the file is missing or damaged.
        """
        manifest = self.manifest(ref)
        assert manifest is not None
        try:
            return self._read(ref, name, manifest, verify)
        except StoreError as error:
            unreachable = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
            if unreachable or not self._is_outdated(ref, manifest):
                raise
        return self.read_bytes(ref, name, verify=verify)

    def _read(self, ref: ArtifactRef, name: str, manifest: dict[str, Any], verify: bool) -> bytes:
        if name not in manifest["files"]:
            raise StoreError(f"artifact {self.uri(ref)} has no file {name!r}")
        if self.cache is None:
            return self._download(ref, name, manifest, verify)
        listed = manifest["files"][name]
        download = functools.partial(self._download, ref, name, manifest, True)
        return self.cache.fetch(listed["digest"], listed["bytes"], download)

    def _download(self, ref: ArtifactRef, name: str, manifest: dict[str, Any], verify: bool) -> bytes:
        listed = manifest["files"][name]
        try:
            data = self.files.read(self.path(ref, name), listed["bytes"])
        except FileNotFoundError as error:
            raise self._damaged(ref, name, "the file is missing") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.uri(ref, name)}: {error}") from error
        self._check_size(ref, name, len(data), manifest)
        if verify and digest_bytes(data) != listed["digest"]:
            raise self._damaged(ref, name, "its digest differs from the manifest's")
        return data

    def read_table(self, ref: ArtifactRef, name: str) -> pa.Table:
        """One Parquet file of an artifact as an Arrow table."""
        try:
            return pq.read_table(io.BytesIO(self.read_bytes(ref, name)))
        except pa.ArrowInvalid as error:
            raise self._damaged(ref, name, str(error)) from error

    def read_tensors(self, ref: ArtifactRef, name: str) -> dict[str, Tensor]:
        """One safetensors file of an artifact."""
        try:
            return safetensors.torch.load(self.read_bytes(ref, name))
        except safetensors.SafetensorError as error:
            raise self._damaged(ref, name, str(error)) from error

    def read_json(self, ref: ArtifactRef, name: str) -> Any:
        """One JSON file of an artifact."""
        try:
            return json.loads(self.read_bytes(ref, name))
        except ValueError as error:
            raise self._damaged(ref, name, str(error)) from error

    def _check_size(self, ref: ArtifactRef, name: str, size: int, manifest: dict[str, Any]) -> None:
        wanted = manifest["files"][name]["bytes"]
        if size > wanted and not self.is_local:
            raise self._damaged(ref, name, f"more than {wanted} bytes")
        if size != wanted:
            raise self._damaged(ref, name, f"{size} bytes instead of {wanted}")

    def _damaged(self, ref: ArtifactRef, name: str, reason: str) -> StoreError:
        return StoreError(
            f"artifact {self.uri(ref)} is damaged: {name}: {reason}; delete that folder to have it computed again"
        )


# -- file contents: the three formats that a store holds (never pickle) --------------------------------------------


def table_bytes(table: pa.Table) -> bytes:
    """An Arrow table as Parquet bytes; the same table gives the same bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", write_statistics=True)
    return buffer.getvalue()


def tensors_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Named tensors as safetensors bytes."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata=dict(metadata) if metadata else None)


def json_bytes(value: Any) -> bytes:
    """A JSON value, indented, keys in the order given."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
