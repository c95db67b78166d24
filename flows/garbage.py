"""Removal of the artifacts that no kept run needs: ``mlorq store gc`` and the flow ``retention``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from flows.verbosity import say
from mlorq.artifacts.gc import folders, needed_by, removable, remove, remove_files, strays, temporaries
from mlorq.artifacts.store import Store
from mlorq.errors import StoreError


def collect(
    store: Store, keep: Callable[[], Sequence[str]], command: str, *, dry_run: bool = False
) -> tuple[list[str], dict[str, int]]:
    """Remove everything that the kept runs do not need.

    Args:
        store: a store, opened without a cache.
        keep: gives the names of the runs to keep; called while no run can begin or end.
        command: for messages.
        dry_run: count only.

    Returns:
        The kept runs, and ``{"artifacts", "bytes", "left_over"}`` of what is removed.

    Raises:
        StoreError: a run uses the store, a kept run is not in it, or it cannot be written.
    """
    if not dry_run:
        store.check_writable()
    with contextlib.nullcontext() if dry_run else alone(store, command):
        # Listed before the needed artifacts are determined: artifacts written in the meantime are not removed.
        everything = folders(store)
        kept = list(keep())
        gone = removable(everything, needed_by(store, kept))
        refs = {folder.ref for folder in gone}
        in_kept = [folder for folder in temporaries(everything) if folder.ref not in refs]
        outside = strays(store)
        if not dry_run:
            remove(store, gone, progress("removed"))
            remove_files(store, in_kept)
            for path in outside:
                store.leases.discard(path)
    freed = sum(folder.bytes for folder in (*gone, *in_kept)) + sum(entry.bytes for entry in outside.values())
    row = {"artifacts": sum(folder.is_artifact for folder in gone), "bytes": freed}
    row["left_over"] = len(gone) - row["artifacts"] + sum(len(folder.files) for folder in in_kept) + len(outside)
    return kept, row


@contextlib.contextmanager
def alone(store: Store, command: str) -> Iterator[None]:
    """Keep runs from starting for the duration of a ``with`` block.

    Raises:
        StoreError: a run uses the store.
    """
    with store.leases.hold("gc", f"mlorq {command}") as own:
        if runs := store.leases.holders("runs", own):
            raise StoreError(
                f"{command}: {' and '.join(map(str, runs))} may need any artifact: try again when it has ended"
            )
        yield


def progress(verb: str) -> Callable[[int, int], None]:
    """Reports progress on standard error, about every 5 %."""

    def report(done: int, total: int) -> None:
        if done == total or done % max(1, total // 20) == 0:
            say(f"{verb} {done}/{total}")

    return report
