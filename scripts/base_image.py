"""Make a small Python base image from the interpreter that runs this script, without a registry.

    python scripts/base_image.py [TAG] [--label NAME=VALUE]        default: local/python:host

The image has the interpreter with its standard library and pip, the shared libraries that these and manylinux wheels
need, certificates, and busybox for a shell and the usual commands. It replaces the official ``python:…-slim`` image of
``docker/Dockerfile`` in the tests. Requires Linux with glibc, a Docker engine, the package ``docker`` and a static
busybox (Debian: busybox-static).
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PREFIX = sys.base_prefix
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = f"{PREFIX}/lib/python{VERSION}"

# Large, and not needed to run programs.
LEFT_OUT = {"__pycache__", "test", "tests", "idlelib", "tkinter", "lib2to3", "turtledemo", "ensurepip", "site-packages"}
# Libraries that manylinux wheels expect (PEP 599), and those that the resolver loads.
WHEELS_EXPECT = "dl gcc_s m nss_dns nss_files pthread resolv rt stdc++ util z"
SYSTEM_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/nsswitch.conf",
    "/etc/services",
    "/usr/share/zoneinfo/UTC",
)
FOLDERS = "usr usr/bin usr/lib usr/lib64 usr/sbin etc root home proc sys dev run opt var"
USERS = {"etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n"}
ENVIRONMENT = {
    "PATH": f"{PREFIX}/bin:/usr/local/bin:/usr/bin",
    "LANG": "C.UTF-8",
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
    "PIP_CERT": "/etc/ssl/certs/ca-certificates.crt",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a Python base image from this machine's interpreter.")
    parser.add_argument("tag", nargs="?", default="local/python:host")
    parser.add_argument("--label", action="append", default=[], metavar="NAME=VALUE", help="label of the image")
    arguments = parser.parse_args()
    started = time.perf_counter()
    size = make(arguments.tag, arguments.label)
    print(f"{arguments.tag}: {size / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s")


def make(tag: str, labels: Sequence[str] = ()) -> int:
    """Make the image; returns its size in bytes."""
    import docker

    client = docker.from_env()
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        write_root(file.name)
        changes = [*(f"ENV {name}={value}" for name, value in ENVIRONMENT.items()), 'CMD ["python3"]']
        changes += [f"LABEL {label}" for label in labels]
        name, _, version = tag.partition(":")
        client.api.import_image_from_file(file.name, repository=name, tag=version or "latest", changes=changes)
    return int(client.images.get(tag).attrs["Size"])


def write_root(path: str) -> None:
    """Write the image's root as a tar file. Links are followed: the image has their targets."""
    busybox = next((name for name in ("/bin/busybox", "/usr/bin/busybox") if os.path.exists(name)), None)
    if busybox is None:
        sys.exit("base image: busybox is not installed (Debian: apt-get install busybox-static)")
    with tarfile.open(path, "w", dereference=True) as tar:
        for folder in FOLDERS.split():
            _add_entry(tar, folder, tarfile.DIRTYPE)
        _add_entry(tar, "tmp", tarfile.DIRTYPE, mode=0o1777)
        for name in ("bin", "lib", "lib64", "sbin"):
            _add_entry(tar, name, tarfile.SYMTYPE, f"usr/{name}")
        for name, text in USERS.items():
            with tempfile.NamedTemporaryFile("w") as file:
                file.write(text)
                file.flush()
                os.chmod(file.name, 0o644)
                tar.add(file.name, name)
        for name, source in sorted({_inside(file): file for file in _files()}.items()):
            tar.add(source, name, recursive=False)
        tar.add(busybox, "usr/bin/busybox")
        commands = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        for name in commands:
            if name != "busybox":
                _add_entry(tar, f"usr/bin/{name}", tarfile.SYMTYPE, "busybox")
        for name in ("python", "python3"):
            _add_entry(tar, f"{PREFIX}/bin/{name}".lstrip("/"), tarfile.SYMTYPE, f"python{VERSION}")


def _files() -> set[str]:
    """Every file of this machine that the image gets, except busybox."""
    files = set(_walk(LIBRARY, LEFT_OUT))
    for package in glob.glob(f"{LIBRARY}/site-packages/pip*"):
        files.update(_walk(package, {"__pycache__"}))
    files.update([f"{PREFIX}/bin/python{VERSION}", *glob.glob(f"{PREFIX}/lib/libpython*.so*")])
    files.update(file for file in SYSTEM_FILES if os.path.exists(file))
    programs = [file for file in files if ".so" in Path(file).name or file == f"{PREFIX}/bin/python{VERSION}"]
    libraries = _needed_by(programs)
    folders = {os.path.dirname(name) for name in libraries}
    for name in WHEELS_EXPECT.split():
        libraries.update(file for folder in folders for file in glob.glob(f"{folder}/lib{name}.so.[0-9]*"))
    return files | libraries


def _walk(top: str, left_out: set[str]) -> Iterator[str]:
    for folder, folders, files in os.walk(top):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith("config-")]
        yield from (os.path.join(folder, name) for name in files)


def _needed_by(programs: list[str]) -> set[str]:
    """The shared libraries that programs and libraries load, and the dynamic loader."""
    said = subprocess.run(["ldd", *programs], capture_output=True, text=True).stdout
    return set(re.findall(r"=> (/\S+)", said)) | set(re.findall(r"^\t(/lib\S+)", said, re.MULTILINE))


def _inside(path: str) -> str:
    """Path in the image of a file of this machine: ``/lib``, ``/bin`` and similar are links into ``/usr`` there."""
    return re.sub(r"^/(lib64|lib|bin|sbin)/", r"/usr/\1/", path).lstrip("/")


def _add_entry(tar: tarfile.TarFile, name: str, kind: bytes, target: str = "", mode: int = 0o755) -> None:
    """Add a folder or a link."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.mode = kind, target, mode
    tar.addfile(entry)


if __name__ == "__main__":
    main()
