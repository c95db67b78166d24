"""Maintenance of a store: list its artifacts, verify them, and remove those that are not needed.

A folder ``<step>/<key>/`` with a ``manifest.json`` is an artifact. Without a manifest it is a left-over of an
interrupted write, or a write in progress; only old ones are therefore removed. The bucket or folder of a store may
contain other files: those whose names do not follow the store's scheme are ignored and never removed.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mlorq.artifacts.leases import FOLDER as LEASES
from mlorq.artifacts.store import MANIFEST, NO_FILE, ArtifactRef, Store
from mlorq.artifacts.transfer import Entry, side_by_side
from mlorq.errors import StoreError, hide_secrets

LEFT_OVER_AGE = datetime.timedelta(days=1)  # longer than any write of one artifact
KEY = re.compile("[0-9a-f]{32}")
TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")  # temporary names of ``transfer.replace_file``
# Files outside artifacts: leases, and the files that show whether a store can be written.
STRAY = re.compile(
    rf"(?:{LEASES}/(?:runs|gc|[^/]+/[0-9a-f]{{32}})/[0-9a-f]{{32}}\.json|\.probe-[0-9a-f]{{32}})(?:\.[0-9a-f]{{32}}\.tmp)?"
)


@dataclass
class Folder:
    """A folder ``<step>/<key>/`` of a store: an artifact or a left-over.

    Attributes:
        ref: step and key.
        files: all files in the folder, by name.
    """

    ref: ArtifactRef
    files: dict[str, Entry] = field(default_factory=dict)

    @property
    def is_artifact(self) -> bool:
        """Whether the folder has a manifest."""
        return MANIFEST in self.files

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def modified(self) -> datetime.datetime | None:
        """Time at which the newest file was written; None if the store does not report times."""
        times = [file.modified for file in self.files.values() if file.modified is not None]
        return max(times, default=None)


def folders(store: Store) -> list[Folder]:
    """All folders of a store, from one listing, ordered by step and key.

    Raises:
        StoreError: the store cannot be reached.
    """
    found: dict[ArtifactRef, Folder] = {}
    for path, entry in _listing(store).items():
        step, _, rest = path.partition("/")
        key, _, name = rest.partition("/")
        if not name or not KEY.fullmatch(key):  # not a file of the store
            continue
        ref = ArtifactRef(step, key)
        found.setdefault(ref, Folder(ref)).files[name] = entry
    return [found[ref] for ref in sorted(found, key=lambda ref: (ref.step, ref.key))]


def _listing(store: Store) -> dict[str, Entry]:
    try:
        return store.files.listing(store.root)
    except OSError as error:
        raise StoreError(f"cannot list the store {hide_secrets(store.url)}: {error}") from error


@dataclass
class Findings:
    """Result of ``verify``.

    Attributes:
        artifacts: number of artifacts checked.
        bytes: number of bytes read.
        damaged: one message per damaged artifact.
        refs: the damaged artifacts, in the same order.
        left_over: folders without a manifest.
    """

    artifacts: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    refs: list[ArtifactRef] = field(default_factory=list)
    left_over: list[Folder] = field(default_factory=list)


def verify(store: Store, progress: Callable[[int, int], None] | None = None) -> Findings:
    """Read all artifacts of a store and compare their sizes and digests with the manifests.

    Args:
        store: a store opened without a cache, so that the files of the store itself are read.
        progress: called with (artifacts done, artifacts in total).

    Raises:
        StoreError: the store cannot be reached.
    """
    everything = folders(store)
    findings = Findings(left_over=[folder for folder in everything if not folder.is_artifact])
    artifacts = [folder for folder in everything if folder.is_artifact]
    for done, folder in enumerate(artifacts, 1):
        try:
            manifest = store.manifest(folder.ref)
            assert manifest is not None
            for name in manifest["files"]:
                findings.bytes += len(store.read_bytes(folder.ref, name))
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, NO_FILE):
                raise  # the store is unreachable; the artifact is not damaged
            if _is_gone(store, folder.ref):
                continue  # removed by another process since the listing
            findings.damaged.append(str(error))
            findings.refs.append(folder.ref)
        findings.artifacts += 1
        if progress is not None:
            progress(done, len(artifacts))
    return findings


def _is_gone(store: Store, ref: ArtifactRef) -> bool:
    try:
        return not store.files.exists(store.path(ref, MANIFEST))
    except OSError as error:
        raise StoreError(f"cannot read {store.uri(ref, MANIFEST)}: {error}") from error


def needed_by(store: Store, runs: Sequence[str]) -> set[ArtifactRef]:
    """The artifacts that runs depend on, with their summaries and pages, the indices of their searches, and the
    sweeps and comparisons of these runs only.

    Args:
        store: the store of the runs.
        runs: names of runs, as ``mlorq runs`` lists them.

    Raises:
        StoreError: a run is not in the store; the message names the runs that are.
    """
    known: dict[str, tuple[ArtifactRef, dict[str, dict[str, str]]]] = {}
    for ref in store.refs("summary"):
        run = store.read_json(ref, "run.json")
        known[run["run"]] = (ref, run["artifacts"])
    for name in runs:
        if name not in known:
            raise StoreError(
                f"no run {name!r} in the store {hide_secrets(store.url)}; known: {', '.join(sorted(known)) or 'none'}"
            )
    kept = {ref for name, (ref, _) in known.items() if name in runs}
    kept |= {ArtifactRef.from_json(made) for name in runs for made in known[name][1].values()}
    for ref in (*store.refs("report"), *store.refs("sweep"), *store.refs("compare")):
        if set((store.manifest(ref) or {}).get("details", {}).get("runs", ())) <= set(runs):
            kept.add(ref)
    for ref in store.refs("search"):
        named = (store.manifest(ref) or {}).get("details", {}).get("artifacts", ())
        if named and {ArtifactRef.from_json(value) for value in named} <= kept:
            kept.add(ref)
    return kept


def removable(
    everything: Iterable[Folder], kept: set[ArtifactRef], now: datetime.datetime | None = None
) -> list[Folder]:
    """The folders to remove: artifacts that are not kept, and left-overs that are at least a day old.

    A left-over is removed only if its step has artifacts, since otherwise its folder may not belong to the store.

    Args:
        everything: all folders, from ``folders``.
        kept: artifacts to keep.
        now: reference time for the age; default: the current time.
    """
    everything = list(everything)
    steps = {folder.ref.step for folder in everything if folder.is_artifact}

    def is_removable(folder: Folder) -> bool:
        if folder.is_artifact:
            return folder.ref not in kept
        return folder.ref.step in steps and _is_old(folder.modified, now)

    return [folder for folder in everything if is_removable(folder)]


def temporaries(everything: Iterable[Folder], now: datetime.datetime | None = None) -> list[Folder]:
    """Temporary files in artifacts that are at least a day old: left by writers that were killed.

    Args:
        everything: all folders, from ``folders``.
        now: reference time for the age; default: the current time.

    Returns:
        The folders of the artifacts, reduced to these files.
    """
    found = []
    for folder in everything:
        if folder.is_artifact:
            old = {
                name: entry
                for name, entry in folder.files.items()
                if TEMPORARY.fullmatch(name) and _is_old(entry.modified, now)
            }
            if old:
                found.append(Folder(folder.ref, old))
    return found


def strays(store: Store, now: datetime.datetime | None = None) -> dict[str, Entry]:
    """Files outside artifacts that processes have left behind that were killed, by path: leases, at least a day old.

    Raises:
        StoreError: the store cannot be reached.
    """
    found = _listing(store)
    return {path: entry for path, entry in found.items() if STRAY.fullmatch(path) and _is_old(entry.modified, now)}


def _is_old(modified: datetime.datetime | None, now: datetime.datetime | None) -> bool:
    return modified is not None and (now or datetime.datetime.now(datetime.UTC)) - modified >= LEFT_OVER_AGE


def remove_files(store: Store, gone: Sequence[Folder]) -> None:
    """Remove the listed files of folders.

    Args:
        store: the store of the folders.
        gone: the files, from ``temporaries``.

    Raises:
        StoreError: a file could not be removed.
    """
    try:
        for folder in gone:
            for name in folder.files:
                store.files.remove(store.path(folder.ref, name))
    except OSError as error:
        raise StoreError(f"cannot remove from the store {hide_secrets(store.url)}: {error}") from error


def remove(store: Store, gone: Sequence[Folder], progress: Callable[[int, int], None] | None = None) -> None:
    """Remove folders: all manifests first, so that an interruption leaves left-overs and no damaged artifact.

    Args:
        store: the store of the folders.
        gone: the folders, from ``removable``.
        progress: called with (folders removed, folders in total).

    Raises:
        StoreError: a folder could not be removed.
    """
    try:
        side_by_side([partial(store.forget, folder.ref) for folder in gone])
        for done, folder in enumerate(gone, 1):
            store.files.remove_folder(store.path(folder.ref))
            if progress is not None:
                progress(done, len(gone))
    except OSError as error:
        raise StoreError(f"cannot remove from the store {hide_secrets(store.url)}: {error}") from error
