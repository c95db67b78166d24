"""Content-addressed artifacts over fsspec.

An artifact is a folder ``<store>/<step>/<key>/`` of plain files whose ``manifest.json`` is written last: no
manifest, no artifact. Two writers of one key are harmless, because both write the same bytes. Local files appear
under a temporary name first; an object store's upload is atomic by itself.

    >>> store = Store("memory://doc")
    >>> ref = store.write("demo", "0" * 32, {"a.txt": b"hello"})
    >>> store.read_bytes(ref, "a.txt")
    b'hello'
"""

from __future__ import annotations

import datetime
import io
import json
import os
import posixpath
import uuid
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

from mlorq.errors import StoreError
from mlorq.hashing import digest_bytes

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
    """Artifacts at any fsspec URL (``file://``, ``s3://``, ``gs://``, ``memory://`` …)."""

    def __init__(self, url: str, **storage_options: Any) -> None:
        """Open a store; nothing is created or contacted before the first read or write.

        Raises:
            StoreError: the URL's protocol is unknown or its driver is not installed.
        """
        self.url = url.rstrip("/")
        try:
            self.fs, root = url_to_fs(self.url, **storage_options)
        except (ValueError, ImportError) as error:
            raise StoreError(f"store {url!r}: {error}") from error
        self.root = root.rstrip("/")
        self.is_local = isinstance(self.fs, fsspec.get_filesystem_class("file"))

    # -- names ------------------------------------------------------------------------------------------------

    def path(self, ref: ArtifactRef, *names: str) -> str:
        """Path of an artifact, or of a file in it, inside the store's file system."""
        return posixpath.join(self.root, ref.step, ref.key, *names)

    def uri(self, ref: ArtifactRef, *names: str) -> str:
        """Full URI of an artifact or of a file in it."""
        return self.fs.unstrip_protocol(self.path(ref, *names))

    # -- existence --------------------------------------------------------------------------------------------

    def exists(self, ref: ArtifactRef) -> bool:
        """Whether a complete artifact is there: its manifest, and every file that the manifest lists, at its size.

        Raises:
            StoreError: the artifact is there but damaged, or the store cannot be reached.
        """
        manifest = self.manifest(ref, missing_ok=True)
        if manifest is None:
            return False
        for name in manifest["files"]:
            self._check_size(ref, name, manifest)
        return True

    def manifest(self, ref: ArtifactRef, missing_ok: bool = False) -> dict[str, Any] | None:
        """The artifact's manifest, or None where there is none and ``missing_ok``.

        Raises:
            StoreError: it is missing (unless ``missing_ok``), unreadable or of another format version.
        """
        path = self.path(ref, MANIFEST)
        try:
            text = self.fs.cat_file(path)
        except (FileNotFoundError, NotADirectoryError):
            if missing_ok:
                return None
            raise StoreError(f"artifact {self.uri(ref)} is not in the store") from None
        except OSError as error:
            raise StoreError(f"cannot read {self.uri(ref, MANIFEST)}: {error}") from error
        try:
            manifest = json.loads(text)
            if manifest["format"] != MANIFEST_FORMAT or not isinstance(manifest["files"], dict):
                raise ValueError(f"unknown manifest format {manifest['format']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(ref, MANIFEST, str(error)) from error
        return manifest

    def refs(self, step: str) -> Iterator[ArtifactRef]:
        """Every complete artifact of a step, by key."""
        folder = posixpath.join(self.root, step)
        try:
            entries = self.fs.ls(folder, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in sorted(entries):
            ref = ArtifactRef(step, posixpath.basename(entry.rstrip("/")))
            if self.fs.exists(self.path(ref, MANIFEST)):
                yield ref

    # -- writing ----------------------------------------------------------------------------------------------

    def check_writable(self) -> None:
        """Write and remove a small file, so that a store that cannot be written is found before any work.

        Raises:
            StoreError: the probe could not be written.
        """
        name = posixpath.join(self.root, f".probe-{uuid.uuid4().hex}")
        try:
            self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(name, b"")
            self.fs.rm_file(name)
        except Exception as error:
            raise StoreError(f"store {self.url} cannot be written: {error}") from error

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
        listed = {name: {"bytes": len(data), "digest": digest_bytes(data)} for name, data in files.items()}
        manifest = {
            "format": MANIFEST_FORMAT,
            "step": step,
            "key": key,
            "files": listed,
            "details": dict(details or {}),
            "seconds": seconds,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        try:
            for name, data in files.items():
                self._put(self.path(ref, name), data)
            self._put(self.path(ref, MANIFEST), json.dumps(manifest, indent=1).encode())
        except OSError as error:
            raise StoreError(f"cannot write artifact {self.uri(ref)}: {error}") from error
        return ref

    def _put(self, path: str, data: bytes) -> None:
        self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
        put_file(self.fs, path, data)

    # -- reading ----------------------------------------------------------------------------------------------

    def read_bytes(self, ref: ArtifactRef, name: str, *, verify: bool = False) -> bytes:
        """One file of an artifact. Its size is always checked, its digest where ``verify``.

        Raises:
            StoreError: the artifact or the file is missing or damaged.
        """
        manifest = self.manifest(ref)
        assert manifest is not None
        if name not in manifest["files"]:
            raise StoreError(f"artifact {self.uri(ref)} has no file {name!r}")
        try:
            data = self.fs.cat_file(self.path(ref, name))
        except FileNotFoundError as error:
            raise self._damaged(ref, name, "the file is missing") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.uri(ref, name)}: {error}") from error
        listed = manifest["files"][name]
        if len(data) != listed["bytes"]:
            raise self._damaged(ref, name, f"{len(data)} bytes instead of {listed['bytes']}")
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

    def _check_size(self, ref: ArtifactRef, name: str, manifest: dict[str, Any]) -> None:
        try:
            size = self.fs.size(self.path(ref, name))
        except FileNotFoundError as error:
            raise self._damaged(ref, name, "the file is missing") from error
        except OSError as error:
            raise StoreError(f"cannot read {self.uri(ref, name)}: {error}") from error
        if size != manifest["files"][name]["bytes"]:
            raise self._damaged(ref, name, f"{size} bytes instead of {manifest['files'][name]['bytes']}")

    def _damaged(self, ref: ArtifactRef, name: str, reason: str) -> StoreError:
        return StoreError(
            f"artifact {self.uri(ref)} is damaged: {name}: {reason}; delete that folder to have it computed again"
        )


def put_file(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    """Write a file that is there whole or not at all: an upload is atomic by itself, a local file is moved in place.

    Raises:
        OSError: it cannot be written.
    """
    if not isinstance(fs, fsspec.get_filesystem_class("file")):
        fs.pipe_file(path, data)
        return
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


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
