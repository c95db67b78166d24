"""Free memory of a device, and the share of it that sums may take."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

WIDEST = 16384  # outputs of a layer with a matrix of their products, 2.1 GB; a vocabulary has more
# Second moments of inputs are one matrix up to so many, 0.5 GB; of more inputs, equal blocks on its diagonal, of at
# most so many (benchmarks/README.md, "Blocks").
ONE_BLOCK, LARGEST_BLOCK = 8192, 4096
SHARE = 0.5  # of the free memory: model, data and activations take the rest


_FREE: ContextVar[int | None] = ContextVar("bytes that this process may still take", default=None)


@contextmanager
def at_most(free: int | None) -> Iterator[None]:
    """Within it, this process can take so many bytes more, whatever the machine has.

    Args:
        free: bytes; None: what the machine has.
    """
    before = _FREE.set(free)
    try:
        yield
    finally:
        _FREE.reset(before)


def block_width(inputs: int) -> int:
    """Width of the blocks of a layer's second moments of inputs: all inputs, or the largest divisor that is allowed.

    Args:
        inputs: their number.
    """
    if inputs <= ONE_BLOCK:
        return inputs
    return next(width for width in range(LARGEST_BLOCK, 0, -1) if inputs % width == 0)


def machine_memory() -> tuple[int, int]:
    """Bytes of memory in all, and those available to new programs; a container has those of its limit."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    if (table := Path("/proc/meminfo")).exists():  # counts caches that can be freed
        lines = dict(line.split(":", 1) for line in table.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no group of its own, or no limit ("max")
        return total, free
    return min(total, limit), min(free, max(0, limit - used))


def return_freed() -> None:
    """Give freed memory back to the system, where the C library keeps it for itself (glibc: blocks of up to 32 MB)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def usable_bytes(device: str) -> int:
    """Bytes that sums may take on a device at present: ``SHARE`` of what is free, or of this process's (``at_most``).

    Args:
        device: ``cpu``, ``cuda:0`` …
    """
    if device.startswith("cuda"):
        import torch

        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    free, own = machine_memory()[1], _FREE.get()
    return int(SHARE * (free if own is None else min(free, own)))
