"""Temporary folders of which nothing stays: those of a killed process are removed by the next one that needs a folder.

Each is locked (``flock``) as long as it is in use. The kernel drops the lock when the process ends in any way, so that
an unlocked folder has no owner. Locks need neither process numbers nor times: they also hold between containers that
share a folder. They do not always hold between machines that share one, so names contain the kernel's boot, and only
folders of the same boot are removed.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlorq.errors import MlorqError

BOOT = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def scratch_folder() -> Iterator[str]:
    """A new folder in the folder for temporary files (``TMPDIR``), which only this user can read; removed at the end.

    Raises:
        MlorqError: no folder can be made.
    """
    try:
        parent, prefix = tempfile.gettempdir(), _prefix()
        _remove_left_over(parent, prefix)
        folder, lock = _make(parent, prefix)
    except OSError as error:
        raise MlorqError(f"no temporary folder can be made: {error}; set TMPDIR to a folder with free space") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _prefix() -> str:
    try:
        boot = BOOT.read_text()[:8]
    except OSError:  # not Linux
        boot = platform.node()
    return f"mlorq-scratch-{boot}-"


def _make(parent: str, prefix: str) -> tuple[str, int]:
    """A new folder and the descriptor that locks it."""
    while True:
        folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: no process can lock the folder to remove it
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.isdir(folder):  # else another process took it for left over before it was locked
                return folder, lock
            os.close(lock)


def _remove_left_over(parent: str, prefix: str) -> None:
    """Remove the folders of processes that are dead."""
    names = []
    with suppress(PermissionError):  # a folder that may be written to and not listed
        names = os.listdir(parent)
    for name in names:
        if not name.startswith(prefix):
            continue
        folder = os.path.join(parent, name)
        with suppress(OSError):  # in use, or just removed, or of another user
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_uid == os.geteuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
