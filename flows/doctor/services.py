"""The Prefect server, the Docker engine and the Dask cluster: whether they answer."""

from __future__ import annotations

import importlib.util
import os
import socket
from base64 import b64encode
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows.doctor.row import Row
from mlorq.errors import hide_secrets, one_line
from mlorq.extras import install_command

if TYPE_CHECKING:
    import httpx

SECONDS = 4.0  # for each connection
PREFECT, DOCKER, DASK = "Prefect server", "Docker engine", "Dask"


def prefect_rows() -> list[Row]:
    """The server at ``PREFECT_API_URL``: its version, and whether it wants and accepts credentials."""
    import httpx
    import prefect
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if url is None:
        detail = f"PREFECT_API_URL is not set: commands start a server of their own (Prefect {prefect.__version__})"
        return [Row(PREFECT, "ok", detail)]
    url, shown = url.rstrip("/"), hide_secrets(url)
    try:
        with httpx.Client(timeout=SECONDS) as client:
            answer = client.get(f"{url}/admin/version")
            authenticates = answer.status_code in (401, 403)
            if authenticates:
                key, pair = PREFECT_API_KEY.value(), PREFECT_API_AUTH_STRING.value() or ""
                client.headers["Authorization"] = (
                    f"Bearer {key}" if key else f"Basic {b64encode(pair.encode()).decode()}"
                )
                answer = client.get(f"{url}/admin/version")
            version = _version(answer)
            if answer.status_code == 404:  # Prefect Cloud has no such page
                answer = client.get(f"{url}/health")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        detail = f"{shown} does not answer: {one_line(error) or type(error).__name__}"
        return [Row(PREFECT, "problem", detail, "start it, or unset PREFECT_API_URL to run without one")]
    if answer.status_code in (401, 403):
        advice = "set PREFECT_API_AUTH_STRING (or PREFECT_API_KEY) to its credentials"
        return [Row(PREFECT, "problem", f"{shown} refuses the credentials", advice)]
    if answer.status_code != 200 or _version(answer) is None:
        detail = f"{shown} answers otherwise than a Prefect server (status {answer.status_code})"
        return [Row(PREFECT, "problem", detail, "PREFECT_API_URL is the address of its API: http://HOST:4200/api")]
    how = "with authentication" if authenticates else "without authentication"
    detail = f"{shown}: version {version or 'unknown'}, {how} (this client: {prefect.__version__})"
    if version and version.split(".")[0] != prefect.__version__.split(".")[0]:
        return [Row(PREFECT, "problem", detail, "use the same version of Prefect on both sides")]
    return [Row(PREFECT, "ok", detail)]


def _version(answer: httpx.Response) -> str | None:
    """The JSON value of an answer as text; None if it is none, such as a page of the user interface."""
    try:
        return str(answer.json()) if answer.status_code == 200 else None
    except ValueError:
        return None


def docker_rows(image: str | None) -> list[Row]:
    """The Docker engine of this machine, and an image.

    Args:
        image: that a configuration names; None: none does.
    """
    if not _installed("docker"):
        return [Row(DOCKER, "missing", "the package docker is not installed", install_command("docker"))]
    import docker
    from docker.errors import DockerException, NotFound
    from requests.exceptions import RequestException

    where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    try:
        client = docker.from_env(timeout=SECONDS)
        version = client.version()["Version"]
    except (DockerException, RequestException) as error:
        detail = f"no engine answers at {where}: {one_line(error)[:120]}"
        return [Row(DOCKER, "missing", detail, "start it, or set DOCKER_HOST")]
    if image is not None:
        try:
            client.images.get(image)
        except NotFound:
            advice = f"docker build -f docker/Dockerfile -t {image} ., or docker pull {image}"
            return [Row(DOCKER, "problem", f"version {version}, without the image {image}", advice)]
        version = f"{version}, with the image {image}"
    return [Row(DOCKER, "ok", f"version {version}")]


def dask_rows(address: str | None) -> list[Row]:
    """Dask, and the scheduler of a running cluster.

    Args:
        address: that a configuration names; None: none does.
    """
    if not (_installed("distributed") and _installed("prefect_dask")):
        return [Row(DASK, "missing", "not installed", install_command("dask"))]
    if address is None:
        return [Row(DASK, "ok", "installed; runs start a cluster of their own")]
    try:
        parts = urlsplit(address)
        socket.create_connection((parts.hostname or "", parts.port or 8786), timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        detail = f"no scheduler answers at {address}: {one_line(error)}"
        return [Row(DASK, "problem", detail, "start dask scheduler, or correct engine.dask.address")]
    return [Row(DASK, "ok", f"a scheduler answers at {address}")]


def _installed(package: str) -> bool:
    """Whether it can be imported; a folder of the same name in the working directory does not count."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
