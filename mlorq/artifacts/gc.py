"""What a store holds, whether it is whole, and what of it can go: the store seen as one listing of files.

A folder ``<step>/<key>/`` with a ``manifest.json`` is an artifact. Without one it is a left-over: of a write that was
interrupted, or of one that is still going on, which is why only old ones are removed. A store may lie in a bucket or a
folder with other things in it: what is not named as the store names things is none of it, and is never touched.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from mlorq.artifacts.store import MANIFEST, ArtifactRef, Store
from mlorq.artifacts.transfer import Entry, hide_password, side_by_side
from mlorq.errors import StoreError

LEFT_OVER_AGE = datetime.timedelta(days=1)  # no write of one artifact takes that long
KEY = re.compile("[0-9a-f]{32}")
TEMPORARY = re.compile(r".+\.[0-9a-f]{32}\.tmp")  # as ``transfer.put_file`` names it


@dataclass
class Folder:
    """One folder of a store where an artifact is or was to be.

    Attributes:
        ref: step and key.
        files: every file in it.
    """

    ref: ArtifactRef
    files: dict[str, Entry] = field(default_factory=dict)

    @property
    def is_artifact(self) -> bool:
        """Whether it has a manifest."""
        return MANIFEST in self.files

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files.values())

    @property
    def modified(self) -> datetime.datetime | None:
        """When the newest file was written; None where the store does not say."""
        times = [file.modified for file in self.files.values() if file.modified is not None]
        return max(times, default=None)


def folders(store: Store) -> list[Folder]:
    """Everything in a store, from one listing, by step and key.

    Raises:
        StoreError: the store cannot be reached.
    """
    try:
        listing = store.files.listing(store.root)
    except OSError as error:
        raise StoreError(f"cannot list the store {hide_password(store.url)}: {error}") from error
    found: dict[ArtifactRef, Folder] = {}
    for path, entry in listing.items():
        step, _, rest = path.partition("/")
        key, _, name = rest.partition("/")
        if not name or not KEY.fullmatch(key):  # a file of somebody else's
            continue
        ref = ArtifactRef(step, key)
        found.setdefault(ref, Folder(ref)).files[name] = entry
    return [found[ref] for ref in sorted(found, key=lambda ref: (ref.step, ref.key))]


@dataclass
class Findings:
    """What ``verify`` found.

    Attributes:
        artifacts: looked at.
        bytes: read.
        damaged: one line for each artifact that is damaged.
        left_over: folders without a manifest.
    """

    artifacts: int = 0
    bytes: int = 0
    damaged: list[str] = field(default_factory=list)
    left_over: list[Folder] = field(default_factory=list)


def verify(store: Store, progress: Callable[[int, int], None] | None = None) -> Findings:
    """Read every artifact of a store and compare sizes and digests with the manifests.

    Args:
        store: without a cache, so that its own files are read.
        progress: called with (artifacts done, artifacts).

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
                findings.bytes += len(store.read_bytes(folder.ref, name, verify=True))
        except StoreError as error:
            if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                raise  # not damaged: out of reach
            findings.damaged.append(str(error))
        findings.artifacts += 1
        if progress is not None:
            progress(done, len(artifacts))
    return findings


def needed_by(store: Store, runs: Sequence[str]) -> set[ArtifactRef]:
    """The artifacts that runs stand on, with their summaries and the sweeps' curves of these runs alone.

    Args:
        store: with the runs.
        runs: names, as ``mlorq runs`` lists them.

    Raises:
        StoreError: there is no run of such a name; those there are, are named.
    """
    known: dict[str, tuple[ArtifactRef, dict[str, dict[str, str]]]] = {}
    for ref in store.refs("summary"):
        run = store.read_json(ref, "run.json")
        known[run["run"]] = (ref, run["artifacts"])
    for name in runs:
        if name not in known:
            raise StoreError(
                f"no run {name!r} in the store {hide_password(store.url)}; "
                f"there are: {', '.join(sorted(known)) or 'none'}"
            )
    kept = {ref for name, (ref, _) in known.items() if name in runs}
    kept |= {ArtifactRef.from_json(made) for name in runs for made in known[name][1].values()}
    for ref in store.refs("sweep"):
        if set((store.manifest(ref) or {}).get("details", {}).get("runs", ())) <= set(runs):
            kept.add(ref)
    return kept


def removable(
    everything: Iterable[Folder], kept: set[ArtifactRef], now: datetime.datetime | None = None
) -> list[Folder]:
    """What is not kept: artifacts, and left-overs of a day and older beside artifacts of the same step.

    Args:
        everything: what ``folders`` lists.
        kept: artifacts that stay.
        now: the time that left-overs' age is taken from.
    """
    everything = list(everything)
    steps = {folder.ref.step for folder in everything if folder.is_artifact}

    def goes(folder: Folder) -> bool:
        if folder.is_artifact:
            return folder.ref not in kept
        return folder.ref.step in steps and _is_old(folder.modified, now)

    return [folder for folder in everything if goes(folder)]


def temporaries(everything: Iterable[Folder], now: datetime.datetime | None = None) -> list[Folder]:
    """In artifacts, files of a day and older that a writer who was killed never moved in place.

    Args:
        everything: what ``folders`` lists.
        now: the time that their age is taken from.

    Returns:
        The artifacts' folders, with these files alone.
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


def _is_old(modified: datetime.datetime | None, now: datetime.datetime | None) -> bool:
    return modified is not None and (now or datetime.datetime.now(datetime.UTC)) - modified >= LEFT_OVER_AGE


def remove_files(store: Store, gone: Sequence[Folder]) -> None:
    """Remove files of folders, and nothing else there.

    Args:
        store: where they are.
        gone: as ``temporaries`` gives them.

    Raises:
        StoreError: one could not be removed.
    """
    try:
        for folder in gone:
            for name in folder.files:
                store.files.remove(store.path(folder.ref, name))
    except OSError as error:
        raise StoreError(f"cannot remove from the store {hide_password(store.url)}: {error}") from error


def remove(store: Store, gone: Sequence[Folder], progress: Callable[[int, int], None] | None = None) -> None:
    """Remove folders, all manifests first: interrupted, it leaves left-overs and no damaged artifact.

    Args:
        store: where they are.
        gone: as ``removable`` gives them.
        progress: called with (folders removed, folders).

    Raises:
        StoreError: one could not be removed.
    """
    try:
        side_by_side([partial(store.forget, folder.ref) for folder in gone])
        for done, folder in enumerate(gone, 1):
            store.files.remove_folder(store.path(folder.ref))
            if progress is not None:
                progress(done, len(gone))
    except OSError as error:
        raise StoreError(f"cannot remove from the store {hide_password(store.url)}: {error}") from error
