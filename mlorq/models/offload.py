"""Weights in a file: for models that are larger than the memory.

A model that is loaded inside ``offloading(10**9)`` has its tensors in a temporary file that is mapped into memory: what
computes reads its part of it, and all is given back as soon as more than that many bytes are held. Nothing else
changes: a tensor in a file is a tensor, also for what writes to it. Copies of such a module
(``mlorq.models.copying``) are in files of their own. The files have no names, so nothing of them stays when the process
ends, in whatever way.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.memory import return_freed
from mlorq.numbers import byte_count

SMALLEST = 65536  # bytes of a tensor that is worth a place in a file
ALIGNMENT = 64  # bytes, as of torch's own memory
INTERVAL = 0.01  # seconds between two looks at the memory: a core reads some 20 MB of new pages in that time
PAGE_OUT = 21  # MADV_PAGEOUT of Linux, which the module mmap does not name
PAGE = mmap.PAGESIZE

_LIMIT: ContextVar[int | None] = ContextVar("bytes of weights in memory", default=None)


class _File(mmap.mmap):
    """A mapped file without a name. The tensors in it keep it alive.

    Attributes:
        start, stop: addresses.
        limit: bytes that may be in memory.
    """

    start: int
    stop: int
    limit: int


_LIVE: weakref.WeakSet[_File] = weakref.WeakSet()


@contextmanager
def offloading(limit: int | None) -> Iterator[None]:
    """Within it, ``offload`` moves the weights of models into a file.

    Args:
        limit: bytes of weights that may be in memory; None: weights stay in memory.

    Raises:
        ModelError: the system cannot do so.
    """
    if limit is not None and not Path("/proc/self/statm").exists():
        raise ModelError("engine.weights needs Linux: leave it out, and weights stay in memory")
    before = _LIMIT.set(limit)
    try:
        yield
    finally:
        _LIMIT.reset(before)


def is_offloading() -> bool:
    """Whether weights go to a file."""
    return _LIMIT.get() is not None


def offload(module: nn.Module) -> None:
    """Move the parameters and buffers of a module into a file, if weights go there (``offloading``).

    Small ones stay in memory, and so do those on other devices than the CPU.

    Raises:
        ModelError: there is no room for the file.
    """
    if (limit := _LIMIT.get()) is None:
        return
    values = [*module.parameters(), *module.buffers()]
    values = [value for value in values if _moves(value) and not is_offloaded(value)]
    moved: dict[int, Tensor] = {}
    tensors = _in_file({value.data_ptr(): value for value in values}.values(), limit)
    for value in values:
        address = value.data_ptr()
        if address not in moved:
            moved[address] = next(tensors)
        value.data = moved[address].view(value.shape)  # two parameters of one storage share it as before
    return_freed()


def offloaded_copies(values: Iterable[Tensor]) -> dict[int, Tensor]:
    """``{id of a tensor that is in a file: its copy, in another file}``."""
    values = [value for value in values if is_offloaded(value)]
    if not values:
        return {}
    limit = min(file.limit for file in list(_LIVE))
    return dict(zip(map(id, values), _in_file(values, limit), strict=True))


def is_offloaded(value: Tensor) -> bool:
    """Whether a tensor is in a file."""
    return value.device.type == "cpu" and any(file.start <= value.data_ptr() < file.stop for file in list(_LIVE))


def _moves(value: Tensor) -> bool:
    """Whether a tensor is large, on the CPU, and not a part of another."""
    if type(value.data) is not Tensor or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.is_contiguous() and value.nbytes >= SMALLEST and value.untyped_storage().nbytes() == value.nbytes


def _in_file(values: Iterable[Tensor], limit: int) -> Iterator[Tensor]:
    """Copies of tensors in a new file, each made when it is asked for."""
    values = list(values)
    if not values:
        return
    file = _new_file(sum(_aligned(value.nbytes) for value in values), limit)
    mapped = _mapped_files()
    at = 0
    for value in values:
        copy = torch.frombuffer(file, dtype=value.dtype, count=value.numel(), offset=at).view(value.shape)
        copy.copy_(value.detach())
        if any(start <= value.data_ptr() < stop for start, stop in mapped):
            _forget_pages(value)
        yield copy
        at += _aligned(value.nbytes)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _new_file(size: int, limit: int) -> _File:
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(prefix="mlorq-weights-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now instead of a signal later
            found = _File(file.fileno(), size)
    except OSError as error:
        raise ModelError(
            f"engine.weights: {byte_count(size)} of weights have no room in {folder} ({error.strerror}): set TMPDIR "
            "to a folder on a larger disk"
        ) from error
    found.start = torch.frombuffer(found, dtype=torch.uint8).data_ptr()
    found.stop, found.limit = found.start + size, limit
    _WATCH.add(found)
    return found


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses at which files of others are mapped: libraries, and weights that a library reads when they are used."""
    own = {file.start for file in list(_LIVE)}
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, stop = (int(address, 16) for address in fields[0].split("-"))
        if len(fields) == 6 and fields[5].startswith("/") and start not in own:
            found.append((start, stop))
    return found


def _forget_pages(value: Tensor) -> None:
    """Let the system take back the memory of a tensor that is mapped from a file; its values stay."""
    start = -(-value.data_ptr() // PAGE) * PAGE
    if (size := value.data_ptr() + value.nbytes - start) > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), PAGE_OUT)


class _Watch:
    """Gives the pages of all files back whenever more than the limit is in memory, as long as there are files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs = False

    def add(self, file: _File) -> None:
        with self._lock:
            _LIVE.add(file)
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._run, name="mlorq-weights", daemon=True).start()

    def _run(self) -> None:
        others = _mapped_bytes()  # of libraries, mostly
        while self._goes_on():
            files = list(_LIVE)
            if files and _mapped_bytes() - others > min(file.limit for file in files):
                for file in files:
                    file.madvise(mmap.MADV_DONTNEED)  # what was written to a shared mapping stays
                others = _mapped_bytes()
            del files
            time.sleep(INTERVAL)

    def _goes_on(self) -> bool:
        with self._lock:
            self._runs = bool(_LIVE)
            return self._runs


_WATCH = _Watch()


def _mapped_bytes() -> int:
    """Bytes of this process in memory that belong to files."""
    return PAGE * int(Path("/proc/self/statm").read_text().split()[2])
