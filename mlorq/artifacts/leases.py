"""Leases: which processes use a store, and which of them computes a step.

A lease is a small file below ``<store>/leases/`` that its holder renews while it works and removes at the end. Nobody
waits for a holder that has died: on the machine of the holder its process is looked up, elsewhere a lease counts for
``EXPIRY_SECONDS`` after its last renewal. Ages are differences of times that the store itself reports, so that clocks
of machines do not matter; nor does a jump of the store's: a lease that stays as it is while it is watched expires, too.

Leases save work and keep ``gc`` away from what a run needs. Results do not depend on them: two writers of one artifact
write the same bytes. Where a lease cannot be written, as in a store that is read only, work goes on without.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import os
import platform
import posixpath
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mlorq.errors import StoreError

if TYPE_CHECKING:
    from mlorq.artifacts.transfer import Files

FOLDER = "leases"
RENEWAL_SECONDS = 10.0
EXPIRY_SECONDS = 60.0
MOST_BYTES = 2**16  # of a lease
PAUSE_SECONDS = 0.5  # between two looks at what another process holds

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease.

    Attributes:
        name: the lease's file name.
        modified: time of its last renewal, as the store reports it; None if it reports none.
        created: time at which it began, by the holder's clock.
        place: machine and process namespace, within which ``process`` means something.
        process: number and start of the process.
        what: what it does, for messages.
    """

    name: str
    modified: datetime.datetime | None
    created: float
    place: str
    process: tuple[int, str]
    what: str

    def __str__(self) -> str:
        return f"{self.what} (process {self.process[0]} on {self.place.partition(' ')[0]})"


class Leases:
    """The leases of one store, as this process sees and holds them.

    Args:
        files: the store's files.
        root: the store's path.
        checked: returns a path, or raises ``StoreError`` if a link on its way leads out of the store.
    """

    # Names of the leases that this process holds, in any store. Its others could not be removed: the store was down.
    _of_process: ClassVar[set[str]] = set()

    def __init__(self, files: Files, root: str, checked: Callable[[str], str] = str) -> None:
        self._files, self._root, self._checked = files, posixpath.join(root, FOLDER), checked
        self._held: dict[str, bytes] = {}  # contents by path
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._seen: dict[str, tuple[datetime.datetime | None, float]] = {}  # last renewals of others, and since when
        self._renewal: threading.Thread | None = None
        self._end = threading.Event()

    @contextlib.contextmanager
    def hold(self, kind: str, what: str) -> Iterator[str | None]:
        """Hold a lease for the duration of a ``with`` block.

        Args:
            kind: the lease's folder: ``runs``, ``gc``, or a step and a key.
            what: what the holder does, for messages.

        Returns:
            The lease's file name; None if it cannot be written.

        Raises:
            StoreError: a link leads out of the store.
        """
        name = f"{uuid.uuid4().hex}.json"
        path = posixpath.join(self._root, kind, name)
        described = {"created": time.time(), "place": _place(), "process": _process(os.getpid()), "what": what}
        data = json.dumps(described).encode()
        self._of_process.add(name)  # before it is written: who sees it must not take it for a dead one's
        try:
            if not self._write(path, data):
                yield None
                return
            self._keep(path, data)
            try:
                yield name
            finally:
                self._drop(path)
        finally:
            self._of_process.discard(name)

    def holders(self, kind: str, own: str | None = None) -> list[Holder]:
        """The live holders of leases of a kind, oldest first. Leases of the dead are removed.

        Args:
            kind: the leases' folder.
            own: this process's lease among them: its age, by the store's clock, tells that of the others.

        Raises:
            StoreError: a link leads out of the store.
        """
        folder = self._checked(posixpath.join(self._root, kind))
        try:
            found = self._files.listing(folder)
            named = [(name, entry.modified) for name, entry in found.items() if "/" not in name]
            read = [self._holder(posixpath.join(folder, name), modified) for name, modified in named]
        except OSError:  # without leases work goes on
            return []
        known = [holder for holder in read if holder is not None]
        now = next((holder.modified for holder in known if holder.name == own), None)
        now = now or datetime.datetime.now(datetime.UTC)
        alive = [holder for holder in known if holder.name == own or self._is_alive(holder, now)]
        for holder in known:
            # Everyone who comes later would read it, too. Without ``own`` ages are by this machine's clock.
            if holder not in alive and (own is not None or holder.place == _place()):
                self._remove(posixpath.join(folder, holder.name))
        return sorted(alive, key=lambda holder: (holder.modified or now, holder.created, holder.name))

    def _is_alive(self, holder: Holder, now: datetime.datetime) -> bool:
        number, started = holder.process
        here = holder.place == _place()
        if here and _process(number)[1] != started:
            return False
        if here and number == os.getpid():
            return holder.name in self._of_process
        renewed, since = self._seen.get(holder.name, (None, 0.0))
        if holder.name not in self._seen or renewed != holder.modified:
            since = time.monotonic()
            self._seen[holder.name] = (holder.modified, since)
        # A process of this machine may have slept with it, and renews as soon as it is awake.
        age = 0.0 if here or holder.modified is None else (now - holder.modified).total_seconds()
        return max(age, time.monotonic() - since) < EXPIRY_SECONDS

    def _holder(self, path: str, modified: datetime.datetime | None) -> Holder | None:
        """The holder that a file describes; None if the file has gone, or is another's."""
        try:
            text = self._held.get(path) or self._files.read_at_most(self._checked(path), MOST_BYTES)
            read = json.loads(text[:MOST_BYTES])
            number, started = read["process"]
            place, what = str(read["place"]), str(read["what"])
            name = posixpath.basename(path)
            return Holder(name, modified, float(read["created"]), place, (int(number), str(started)), what)
        except (FileNotFoundError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def discard(self, path: str) -> None:
        """Remove a file that an ended process has left behind, and the folders that are empty without it.

        Args:
            path: relative to the store.
        """
        self._remove(posixpath.join(posixpath.dirname(self._root), path))

    # -- files ------------------------------------------------------------------------------------------------

    def _write(self, path: str, data: bytes) -> bool:
        """Write a lease; False if the store cannot be written."""
        for _ in range(10):
            try:
                self._files.write(self._checked(path), data)
                return True
            except FileNotFoundError:  # another process has just removed the empty folder
                continue
            except OSError:
                return False
        return False

    def _remove(self, path: str) -> None:
        """Remove a lease, and the folders that are empty without it: a run that computes nothing leaves nothing."""
        with contextlib.suppress(OSError, StoreError):
            self._files.remove(self._checked(path))
            folder = posixpath.dirname(path)
            while self._files.is_local and len(folder) >= len(posixpath.dirname(self._root)):
                os.rmdir(folder)
                folder = posixpath.dirname(folder)

    # -- renewal ----------------------------------------------------------------------------------------------

    def _keep(self, path: str, data: bytes) -> None:
        with self._lock:
            self._held[path] = data
            if self._renewal is None:
                self._end = threading.Event()
                self._renewal = threading.Thread(
                    target=self._renew, args=(self._end,), name="mlorq-leases", daemon=True
                )
                self._renewal.start()

    def _drop(self, path: str) -> None:
        with self._lock:
            self._held.pop(path, None)
            ended = None if self._held else self._renewal
            if ended is not None:
                self._end.set()
                self._renewal = None
        if ended is not None:
            ended.join()
        with self._writing:  # it may be being renewed
            self._remove(path)

    def _renew(self, end: threading.Event) -> None:
        while not end.wait(RENEWAL_SECONDS):
            with self._lock:
                held = dict(self._held)
            for path, data in held.items():
                with contextlib.suppress(OSError, StoreError), self._writing:
                    if path in self._held:
                        self._files.write(self._checked(path), data)


@contextlib.contextmanager
def running(leases: Leases, what: str) -> Iterator[None]:
    """Mark a run for the duration of a ``with`` block: ``gc`` leaves the store alone. Waits for a ``gc`` at work.

    Args:
        leases: of the store.
        what: names the run, for messages.
    """
    with leases.hold("runs", what) as own:
        told = False
        while own is not None and (at_work := leases.holders("gc")):
            if not told:
                log.warning("waiting for %s", at_work[0])
                told = True
            time.sleep(PAUSE_SECONDS)
        yield


def once(leases: Leases, kind: str, what: str, find: Callable[[], T | None], make: Callable[[], T]) -> T:
    """What ``find`` returns, or else ``make``, unless another process is making it: then it is waited for.

    Who has written its lease and then sees no other one makes it. Two cannot both do so: the one that wrote later sees
    the other's. Of several that see each other, the first by name keeps its lease and waits until it is alone, and the
    others take theirs back. Times do not decide: that of a file is not when others could see it.

    Args:
        leases: of the store.
        kind: names what is made: a step and a key.
        what: the same, for messages.
        find: returns what is made, None if it is missing.
        make: makes it.
    """
    told = False
    while True:
        if not leases.holders(kind):
            with leases.hold(kind, what) as own:
                if own is None or _gets_alone(leases, kind, own):
                    found = find()  # it may have been finished between the caller's look and the lease
                    return make() if found is None else found
        elif not told:
            log.info("%s is being computed by another process: waiting for it", what)
            told = True
        time.sleep(PAUSE_SECONDS)
        found = find()
        if found is not None:
            return found


def _gets_alone(leases: Leases, kind: str, own: str) -> bool:
    """Wait until no other process has a lease; False if one has that comes before this process's own by name."""
    pause = PAUSE_SECONDS / 16  # others take their leases back at once; but one may be at work already
    while others := {holder.name for holder in leases.holders(kind, own)} - {own}:
        if min(others) < own:
            return False
        time.sleep(pause)
        pause = min(2 * pause, PAUSE_SECONDS)
    return True


@functools.cache
def _place() -> str:
    """The machine, since its last start, and the process namespace: two containers number their processes alike."""
    parts = [platform.node() or "unknown"]
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            parts.append(file.read().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process(number: int) -> tuple[int, str]:
    """Number and start of a process; the start is empty if there is no such process."""
    try:
        with open(f"/proc/{number}/stat") as file:
            return number, file.read().rpartition(")")[2].split()[19]  # starttime, in ticks since the machine's start
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return number, ""
    except (OSError, IndexError):
        pass
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return number, ""
    except OSError:  # another user's, or a system without signals
        pass
    return number, "unknown"
