"""Repair of a store: damaged artifacts are removed with all that was derived from them, so that a run makes them again.

Reading checks digests, so an artifact is normally not made from damaged files. What is derived is removed nevertheless:
the damage may be older than the manifest, as when a disk or a memory module failed during the write.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mlorq.artifacts.gc import Folder, folders
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.errors import StoreError


def derived_from(store: Store, damaged: Iterable[ArtifactRef]) -> list[Folder]:
    """The folders of damaged artifacts and of all that was made from them, directly or not.

    Manifests name the artifacts that a step read; sweeps name runs.

    Args:
        store: the store.
        damaged: artifacts, whose manifests may be unreadable.

    Raises:
        StoreError: the store cannot be reached.
    """
    everything = {folder.ref: folder for folder in folders(store) if folder.is_artifact}
    gone = set(damaged) & set(everything)
    details = {ref: _details(store, ref) for ref in everything if ref not in gone}
    users: dict[ArtifactRef, set[ArtifactRef]] = {}
    for ref, values in details.items():
        for made in named_in(values):
            users.setdefault(made, set()).add(ref)
    waiting = list(gone)
    while waiting:
        found = users.get(waiting.pop(), set()) - gone
        gone |= found
        waiting += found
    # The name of a run ends with the first digits of its summary's key.
    ends = tuple(f"-{ref.key[:8]}" for ref in gone if ref.step == "summary")
    for ref, values in details.items():
        if ref.step == "sweep" and any(str(run).endswith(ends) for run in values.get("runs", ())):
            gone.add(ref)
    return [everything[ref] for ref in sorted(gone, key=lambda ref: (ref.step, ref.key))]


def named_in(value: Any) -> Iterator[ArtifactRef]:
    """All references to artifacts in a JSON value."""
    if isinstance(value, Mapping):
        if value.keys() == {"step", "key"} and all(isinstance(part, str) for part in value.values()):
            yield ArtifactRef.from_json(value)
        for part in value.values():
            yield from named_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from named_in(part)


def _details(store: Store, ref: ArtifactRef) -> dict[str, Any]:
    manifest = store.manifest(ref, missing_ok=True)
    found = (manifest or {}).get("details", {})
    if not isinstance(found, dict):
        raise StoreError(f"artifact {store.uri(ref)}: the details in its manifest must be a mapping")
    return found
