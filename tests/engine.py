"""A Docker engine and the product's image for tests that run containers, on machines that reach no image registry.

Import the fixtures where they are used:

    from tests.engine import docker_engine, mlorq_image  # noqa: F401

By hand, to have the image of the sources as they are now:

    python -m tests.engine [TAG]
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

docker = pytest.importorskip("docker")

ROOT = Path(__file__).parents[1]
BASE, IMAGE = "local/python:host", "mlorq:test"
DIGEST = "mlorq.sources"  # label of an image: digest of all it was built from
# Fixed where it is free: the address of the wheels is part of what the engine compares with the layers it has.
PORT = 38917


@pytest.fixture(scope="session")
def docker_engine() -> Any:
    """A client of a Docker engine that answers; one is started where we may."""
    try:
        return connect_or_start()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def mlorq_image(docker_engine: Any) -> str:
    """Tag of the product's image, built from the sources as they are unless it is there already."""
    return build(docker_engine)


def connect_or_start() -> Any:
    """A client.

    Raises:
        RuntimeError: no engine answers and none can be started; the reason.
    """
    with contextlib.suppress(docker.errors.DockerException):
        return _client()
    if os.environ.get("DOCKER_HOST"):
        raise RuntimeError("the Docker engine of DOCKER_HOST does not answer")
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        raise RuntimeError("no Docker engine answers, and only root on Linux can start one")
    if not (shutil.which("dockerd") or shutil.which("apt-get")):
        raise RuntimeError("no Docker engine answers; dockerd is not installed, and there is no apt to install it")
    script = ROOT / "scripts" / "docker_engine.sh"
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["the Docker engine could not be started"])[-1])
    return _client()


def _client() -> Any:
    client = docker.from_env()
    client.ping()
    return client


# -- the image ----------------------------------------------------------------------------------------------------


def build(client: Any, tag: str = IMAGE) -> str:
    """Build base and product image unless an image of the same sources has the tag; gives the tag.

    Raises:
        RuntimeError: the build failed; the end of what it said.
    """
    digest = digest_of_sources()
    old = None
    with contextlib.suppress(docker.errors.ImageNotFound):
        old = client.images.get(tag)
        if old.labels.get(DIGEST) == digest:
            return tag
    _build_base(client)
    with served_wheels() as arguments:
        said: list[str] = []
        for event in client.api.build(
            path=str(ROOT),
            dockerfile="docker/Dockerfile",
            tag=tag,
            buildargs={"BASE": BASE, **arguments},
            labels={DIGEST: digest},
            network_mode="host",  # test engines have no bridge
            pull=False,
            rm=True,
            decode=True,
        ):
            said.append(event.get("stream", "") or event.get("error", ""))
            if "error" in event:
                raise RuntimeError(f"{tag} was not built:\n{''.join(said)[-3000:]}")
    if old is not None and old.id != client.images.get(tag).id:
        with contextlib.suppress(docker.errors.APIError):  # a container may use it
            client.images.remove(old.id)  # and the layers that were its alone
    return tag


def _build_base(client: Any) -> None:
    with contextlib.suppress(docker.errors.ImageNotFound):
        if client.images.get(BASE).labels.get(DIGEST) == digest_of_base():
            return
        client.images.remove(BASE)  # what was built on it stays
    command = [sys.executable, str(ROOT / "scripts" / "base_image.py"), BASE, "--label", f"{DIGEST}={digest_of_base()}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{BASE} was not made:\n{done.stderr[-3000:]}")


def digest_of_sources() -> str:
    """Of all that the image is built from."""
    sources = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "NOTICE.md", ".dockerignore")
    files = [ROOT / "docker" / "Dockerfile", *(ROOT / name for name in sources)]
    for package in ("mlorq", "steps", "flows"):
        files += [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return _digest(files, digest_of_base())


def digest_of_base() -> str:
    """Of all that the base image is built from."""
    return _digest([ROOT / "scripts" / "base_image.py"], sys.version)


def _digest(files: list[Path], more: str) -> str:
    digest = hashlib.blake2b(more.encode(), digest_size=16)
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT)}\0{hashlib.blake2b(path.read_bytes()).hexdigest()}\0".encode())
    return digest.hexdigest()


# -- wheels of this machine ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def served_wheels() -> Iterator[dict[str, str]]:
    """Build arguments with which pip in the image finds the CPU build of torch.

    Where pip of this machine takes torch from a local folder (``find-links``), that folder is served to the build over
    HTTP, with this environment's torchvision. Elsewhere there are no arguments: the Dockerfile names an index.
    """
    wheels = [path for folder in _folders_of_wheels() for path in folder.glob("*.whl")]
    if torch.version.cuda is not None or not any(path.name.startswith("torch-") for path in wheels):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="mlorq-wheels-") as folder:
        for path in wheels:
            os.symlink(path, os.path.join(folder, path.name))
        _pack_torchvision(Path(folder))
        # Built here: images with a compiler come from a registry, which may not be reachable.
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, str(ROOT)]
        subprocess.run(command, check=True)
        (own,) = Path(folder).glob("mlorq-*.whl")
        source = f"mlorq=={own.name.split('-')[1]}"
        with _served(folder) as address:
            yield {"PIP_FIND_LINKS": address, "TORCH_INDEX": "", "BUILDER": BASE, "SOURCE": source}


def _folders_of_wheels() -> list[Path]:
    """Local folders that pip looks for wheels in."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    places = {place for line in re.findall(r"\.find-links='(.*)'", said) for place in line.split()}
    paths = [Path(place.removeprefix("file://")) for place in sorted(places)]
    return [path for path in paths if path.is_dir()]


def _pack_torchvision(folder: Path) -> None:
    """Make a wheel of this environment's torchvision, which works beside a CPU build of torch (scripts/setup.sh).

    Its version gets the local label ``+cpu``: pip prefers it to the same version of an index, as it does with torch.
    """
    installed = importlib.metadata.distribution("torchvision")
    version = installed.version.partition("+")[0] + "+cpu"
    info = f"torchvision-{version}.dist-info"
    place = Path(str(installed.locate_file("")))
    tag = re.search(r"^Tag: (\S+)$", installed.read_text("WHEEL") or "", re.MULTILINE)
    assert tag is not None
    record = ""
    with zipfile.ZipFile(
        folder / f"torchvision-{version}-{tag[1]}.whl", "w", zipfile.ZIP_DEFLATED, compresslevel=1
    ) as z:
        for path in sorted([*place.glob("torchvision/**/*"), *place.glob("torchvision.libs/*")]):
            if path.is_file() and path.suffix != ".pyc":
                name, data = str(path.relative_to(place)), path.read_bytes()
                z.writestr(name, data)
                record += _record(name, data)
        metadata = re.sub(r"(?m)^Version: .*$", f"Version: {version}", installed.read_text("METADATA") or "", count=1)
        for name, text in (("METADATA", metadata), ("WHEEL", installed.read_text("WHEEL") or "")):
            z.writestr(f"{info}/{name}", text)
            record += _record(f"{info}/{name}", text.encode())
        z.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")


def _record(name: str, data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


@contextlib.contextmanager
def _served(folder: str) -> Iterator[str]:
    """A folder over HTTP, for programs on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_: object) -> None:
            pass

    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
    except OSError:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    began = time.perf_counter()
    made = build(connect_or_start(), sys.argv[1] if len(sys.argv) > 1 else IMAGE)
    print(f"{made}: {time.perf_counter() - began:.0f} s")
