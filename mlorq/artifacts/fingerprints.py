"""Fingerprints of what a model and its data are made from, which are cheap to compare without loading either.

A fingerprint that is unchanged stands for unchanged content: that of a small file is its digest, that of a large file
its size and time of change, that of a folder the sizes and times of its files, and that of the installed packages the
names and versions of their distributions. Code outside installed packages counts by its files. Not seen are the
network, environment variables other than ``PLACES``, and files that native code opens, unless a configuration names
them or they are beside the code that opens them.
"""

from __future__ import annotations

import os
import platform
import site
import sys
import sysconfig
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from mlorq.artifacts.hashing import digest_bytes, digest_json

SMALL = 1 << 16  # bytes; smaller files are read
MOST_FILES = 200_000  # of a folder; its fingerprint would take longer than loading it is worth
PLACES = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HUGGINGFACE_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME")
NATIVE = (".safetensors", ".parquet", ".arrow", ".feather", ".h5", ".hdf5", ".onnx")  # read by native code


def fingerprint(path: str, skip: str | None = None) -> str | None:
    """Fingerprint of a file or folder; ``missing`` if there is none.

    Args:
        path: absolute path.
        skip: a folder that is left out where it is inside ``path``: the artifact store, which changes with every run.

    Returns:
        None if a folder has too many files, or a file cannot be read.
    """
    try:
        if os.path.isdir(path):
            return _folder(path, skip)
        return _file(path, SMALL)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except OSError:
        return None


def _file(path: str, small: int) -> str:
    found = os.stat(path)
    if found.st_size > small:
        return f"{found.st_size} {found.st_mtime_ns}"
    with open(path, "rb") as file:
        return digest_bytes(file.read())


def _folder(path: str, skip: str | None) -> str | None:
    """Names, sizes and times of all files; nothing is read, since a folder of data can have many."""
    found = []
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and os.path.join(folder, name) != skip)
        for name in sorted(names):
            file = os.path.join(folder, name)
            try:
                found.append([os.path.relpath(file, path), _file(file, -1)])
            except FileNotFoundError:  # a link to nothing
                found.append([os.path.relpath(file, path), "missing"])
            if len(found) > MOST_FILES:
                return None
    return digest_json(found)


def fingerprints(paths: Iterable[str], skip: str | None = None) -> dict[str, str] | None:
    """Fingerprints by path; None if one has none. ``skip`` as in ``fingerprint``."""
    found = {path: fingerprint(path, skip) for path in sorted(set(paths))}
    known = {path: value for path, value in found.items() if value is not None}
    return known if len(known) == len(found) else None


def unchanged(known: Mapping[str, str], skip: str | None = None) -> bool:
    """Whether all fingerprints are still the same. ``skip`` as in ``fingerprint``."""
    return all(fingerprint(path, skip) == value for path, value in known.items())


def paths_in(value: Any, folder: str) -> Iterator[str]:
    """The absolute paths that a text inside ``value`` may name: from ``folder`` and from the working directory.

    A text that names no file yet is included: a file that appears later is a change.
    """
    if isinstance(value, str):
        if value and "\0" not in value and len(value) < 1024:
            path, here = os.path.expanduser(value), os.getcwd()
            yield from (os.path.normpath(os.path.join(base, path)) for base in (folder or here, here))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from paths_in(inner, folder)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from paths_in(inner, folder)


# -- software -----------------------------------------------------------------------------------------------------


@cache
def _installed_folders() -> tuple[str, ...]:
    """The folders of installed packages and of the standard library."""
    named = [sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")]
    found = [*named, *site.getsitepackages(), site.getusersitepackages()]
    return tuple(sorted({os.path.realpath(folder) for folder in found if folder}))


def software() -> dict[str, Any]:
    """Interpreter, platform, places of caches, and the names and versions of all installed distributions."""
    distributions = []
    for folder in _installed_folders():
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        distributions += [name for name in names if name.endswith((".dist-info", ".egg-info"))]
    return {
        "python": sys.version,
        "platform": [platform.system(), platform.machine()],
        "places": {name: os.environ.get(name) for name in PLACES},
        "distributions": digest_json(sorted(distributions)),
    }


def code_of(packages: Iterable[str]) -> dict[str, str]:
    """A digest of the source files of each package, by its name; no package is imported that is not already."""
    found = {}
    for package in packages:
        (root,) = list(sys.modules[package].__path__)[:1]
        files = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            paths = [os.path.join(folder, name) for name in sorted(names) if name.endswith(".py")]
            files += [[os.path.relpath(path, root), _file(path, 1 << 30)] for path in paths]
        found[package] = digest_json(files)
    return found


def user_code(known: Iterable[str]) -> list[str] | None:
    """Files of the imported modules that are outside installed packages, and files of weights or data beside them.

    Args:
        known: packages that ``code_of`` covers.

    Returns:
        None if a module's file was changed after it was imported: what was made by it is not made from the file.
    """
    known, found, watch = set(known), set(), _watch()
    for name, module in sys.modules.copy().items():
        # Not `getattr`: a lazy module searches all that it could import for a name that it lacks.
        file = getattr(module, "__dict__", {}).get("__file__")
        if name.partition(".")[0] in known or not isinstance(file, str) or _is_installed(file):
            continue
        if os.path.isfile(file):
            if os.stat(file).st_mtime_ns > watch.executed.get(file, watch.since):
                return None
            found.add(os.path.abspath(file))
    for folder in {os.path.dirname(file) for file in found}:
        found |= {entry.path for entry in os.scandir(folder) if entry.name.endswith(NATIVE) and entry.is_file()}
    return sorted(found)


@cache
def _is_installed(path: str) -> bool:
    real = os.path.realpath(path)
    return any(real.startswith(folder + os.sep) for folder in _installed_folders())


# -- opened files -------------------------------------------------------------------------------------------------


class _Watch(threading.local):
    """What the interpreter's hook records.

    Attributes:
        found: the set that the calling thread's opened files are added to; None: they are not recorded.
        executed: last time in nanoseconds at which a module's file was executed, in any thread.
        since: time at which recording began.
    """

    found: set[str] | None = None

    def __init__(self, executed: dict[str, int], since: int) -> None:
        self.executed = executed
        self.since = since


@cache
def _watch() -> _Watch:
    """The interpreter's one hook, installed at the first use: hooks cannot be removed."""
    watch = _Watch({}, time.time_ns())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "exec" and getattr(arguments[0], "co_name", "") == "<module>":
            watch.executed[arguments[0].co_filename] = time.time_ns()
        if event != "open" or watch.found is None:
            return
        path, mode, flags = arguments
        reads = mode is None or not set("wax+") & set(mode)
        if isinstance(path, (str, bytes)) and reads and not (flags or 0) & (os.O_WRONLY | os.O_RDWR):
            watch.found.add(os.path.abspath(os.fsdecode(path)))

    sys.addaudithook(hook)
    return watch


@contextmanager
def opened_files() -> Iterator[set[str]]:
    """The files that this thread's Python code opens for reading in a ``with`` block, without those of packages.

    Absolute paths. Compiled code and files of the system are left out, and files that are gone at the end as well.
    """
    watch, found, seen = _watch(), set[str](), set[str]()
    outer, watch.found = watch.found, seen
    try:
        yield found
    finally:
        watch.found = outer
        if outer is not None:
            outer |= seen
        system = ("/proc/", "/sys/", "/dev/", "/etc/")
        found |= {
            path
            for path in seen
            if not path.startswith(system)
            and f"{os.sep}__pycache__{os.sep}" not in path
            and not _is_installed(path)
            and os.path.isfile(path)
        }
