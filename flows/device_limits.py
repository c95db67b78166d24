"""How many steps run at once on a device of a machine, of all runs that one Prefect server records.

With ``engine.device_slots`` a run takes a slot of a global concurrency limit of Prefect, which is named after machine
and device, before it computes a step there. Prefect's pages show the limits; a run that dies gives its slot back when
its lease expires, after ``LEASE_SECONDS``.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from flows.server import embedded

if TYPE_CHECKING:
    Log = logging.Logger | logging.LoggerAdapter[logging.Logger]

LOGGER = logging.getLogger(__name__)
LEASE_SECONDS = 120.0
LOOK_SECONDS = 5.0  # between two looks at whether the waiting run has been interrupted
ANSWER_SECONDS = 30.0  # beyond LOOK_SECONDS: Prefect's queue of requests can lose one that ends as its time is up
# A slot is kept from step to step for so long: taking one costs 2 s on a server with SQLite that records a run.
KEEP_SECONDS = 20.0


def name_of_limit(device: str) -> str:
    """The name of a device's limit: two machines have different ones."""
    kind, _, index = device.partition(":")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if kind == "cuda" and visible:  # numbers of this process are places in that list
        device = f"cuda:{visible.split(',')[int(index or 0)].strip()}"
    return f"mlorq {platform.node() or 'unknown'} {device}"


class DeviceSlot:
    """A slot of one device, for one step at a time; closing it gives it back.

    Results do not depend on slots: if the server cannot be asked, steps run without one.

    Args:
        device: ``cpu``, ``cuda:0`` …
        slots: of the device; None: no limit.
        log: of the run, for warnings.
    """

    def __init__(self, device: str, slots: int | None, log: Log) -> None:
        self._device, self._slots, self._log = device, slots, log
        self._held: _Held | None = None
        self._since = 0.0

    @contextlib.contextmanager
    def held(self, check: Callable[[], None]) -> Iterator[None]:
        """Hold the slot for the duration of a ``with`` block; waits until there is one.

        Args:
            check: raises an exception if the waiting step should not start any more.
        """
        if self._held is None and self._slots is not None and _exists(name_of_limit(self._device), self._slots):
            self._take(check)
        try:
            yield
        finally:
            if time.monotonic() - self._since > KEEP_SECONDS:
                self.close()

    def _take(self, check: Callable[[], None]) -> None:
        told = False
        while True:
            held = _Held(name_of_limit(self._device))
            if held.error is None:
                self._held, self._since = held, time.monotonic()
                return
            if not isinstance(held.error, TimeoutError):
                self._log.warning("no slot of %s could be taken, it is used without: %r", self._device, held.error)
                return
            check()
            if not told:
                self._log.warning("waiting for %s, which other runs use (engine.device_slots)", self._device)
                told = True

    def close(self) -> None:
        """Give the slot back."""
        held, self._held = self._held, None
        if held is not None:
            held.give_back()


class _Held:
    """A slot in a thread of its own: Prefect wants it back from the thread that took it, and steps run in several.

    Attributes:
        error: why there is none; a ``TimeoutError`` if others hold all, or if there was no answer.
    """

    def __init__(self, name: str) -> None:
        self.error: BaseException | None = None
        self._tried, self._end = threading.Event(), threading.Event()
        run: Any = contextvars.copy_context().run  # Prefect's events name the run
        self._thread = threading.Thread(target=run, args=(self._hold, name), name=f"mlorq-slot {name}", daemon=True)
        self._thread.start()
        if not self._tried.wait(LOOK_SECONDS + ANSWER_SECONDS):
            self._end.set()  # a slot that it gets all the same goes back at once
            self.error = TimeoutError("no answer")

    def _hold(self, name: str) -> None:
        from prefect.concurrency.sync import concurrency

        try:
            with concurrency(
                name,
                timeout_seconds=LOOK_SECONDS,
                lease_duration=LEASE_SECONDS,
                strict=True,
                raise_on_lease_renewal_failure=False,
            ):
                self._tried.set()
                self._end.wait()
        except Exception as error:
            self.error = error
            if self._tried.is_set():
                LOGGER.debug("slot not given back, its lease will expire: %r", error)
        finally:
            self._tried.set()

    def give_back(self) -> None:
        self._end.set()
        self._thread.join()


@functools.cache
def _exists(name: str, slots: int) -> bool:
    """Create or change a limit on the server; False if there can be none."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectAlreadyExists

    if embedded():  # it ends with its command, and would keep the slots of commands that were killed
        LOGGER.warning("engine.device_slots needs a Prefect server that runs share (PREFECT_API_URL): not applied")
        return False
    try:
        with get_client(sync_client=True) as client:
            try:
                client.upsert_global_concurrency_limit_by_name(name, slots)
            except ObjectAlreadyExists:  # another run has created it meanwhile
                client.upsert_global_concurrency_limit_by_name(name, slots)
    except Exception as error:
        LOGGER.warning("limit %r could not be set, and is not applied: %r", name, error)
        return False
    return True
