"""What the container of a step is given of this machine: folders, variables, and which of those are secrets.

Everything is at the path that it has outside, so that a configuration means the same inside; what a step only reads is
mounted read-only. Nothing here talks to an engine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from huggingface_hub import constants

from flows.runners.child import child_environment
from mlorq.artifacts.locations import absolute_folder, is_remote
from mlorq.config.run import RunConfig
from mlorq.data.source import SOURCES
from mlorq.errors import ConfigError, StoreError
from mlorq.models.family import FAMILIES

HOME = "/tmp"  # inside: any user can write there
FSSPEC_FOLDER = "/run/fsspec"

# By how a variable's name begins. Object stores read places and credentials from these,
STORES = ("AWS_", "FSSPEC_", "S3_", "GOOGLE_", "GCSFS_", "AZURE_STORAGE_", "HF_")
# and these choose the code that computes: with other ones, the same key would not mean the same bytes.
NUMERICS = ("OMP_", "MKL_", "OPENBLAS_", "ATEN_", "DNNL_", "ONEDNN_")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|KEY|CREDENTIAL|CONNECTION_STRING|SAS|PROXY", re.IGNORECASE)
SECRET_LENGTH = 6  # shorter values are as good as guessed, and in every other line
HIDDEN = "***"

# Where the clients of object stores keep credentials below the home folder.
CREDENTIALS = {"s3": ".aws", "s3a": ".aws", "gs": ".config/gcloud", "gcs": ".config/gcloud", "az": ".azure"}


@dataclass(frozen=True)
class Bind:
    """A file or folder of this machine, and where it is inside."""

    source: str
    target: str
    read_only: bool = True


@dataclass
class _Binds:
    """Collects mounts; a target is mounted once, and what is inside of a mounted folder needs no mount."""

    binds: dict[str, Bind] = field(default_factory=dict)

    def need(self, path: str) -> None:
        """Have a file or folder inside, at its own path, to read. What is not there is for the step to report."""
        if not os.path.exists(path):
            return
        real = os.path.realpath(path)
        shown = self._is_inside(path)
        if real != path and shown:
            path = real  # a link in a mounted folder: what it points to
            shown = self._is_inside(path)
        if not shown:
            self.binds[path] = Bind(real, path)

    def write(self, folder: str) -> None:
        """Have a folder inside, at its own path, to write; it is created."""
        os.makedirs(folder, exist_ok=True)
        real = os.path.realpath(folder)
        target = real if real != folder and self._is_inside(folder) else folder
        self.binds[target] = Bind(real, target, read_only=False)

    def _is_inside(self, path: str) -> bool:
        return any(path == target or path.startswith(target.rstrip("/") + "/") for target in self.binds)


def folder_of(config: RunConfig) -> str:
    """Where relative paths of the configuration start: a path or a URL."""
    return absolute_folder(config.folder)


def binds_of(config: RunConfig, cache: str | None, environment: Mapping[str, str]) -> list[Bind]:
    """The mounts of a run's containers. Folders that are written are created.

    Args:
        config: the run's.
        cache: folder that keeps what was read from the store; None where there is none.
        environment: of this process.

    Raises:
        ConfigError: a folder cannot be mounted.
        StoreError: the store's folder cannot be created.
    """
    found = _Binds()
    if not is_remote(config.folder):
        found.need(folder_of(config))
    store = local_path(config.resolve(config.store))
    try:
        for folder in (store, cache, _hub_folder(config)):
            if folder is not None:
                found.write(folder)
    except OSError as error:
        raise StoreError(f"cannot create the folder {folder}: {error.strerror}") from error
    for location in _locations(config):
        path = local_path(location)
        if path is not None:
            found.need(path)
    home = os.path.expanduser("~")
    for name, value in handed_on(config, environment).items():
        if name != "FSSPEC_CONFIG_DIR" and os.path.isabs(value):  # such as AWS_CA_BUNDLE
            found.need(value)
    for location in (config.store, *_locations(config)):
        kept = CREDENTIALS.get(location.partition("://")[0].rpartition("::")[2])
        if kept is not None and os.path.isdir(os.path.join(home, kept)):
            target = os.path.join(HOME, kept)
            found.binds[target] = Bind(os.path.join(home, kept), target)
    fsspec = _fsspec_folder(environment)
    if fsspec is not None:
        found.binds[FSSPEC_FOLDER] = Bind(fsspec, FSSPEC_FOLDER)
    for volume in config.engine.docker.volumes:  # the user's own word is the last
        source, target, mode = [*volume.split(":"), ""][:3]
        found.binds[target.rstrip("/") or "/"] = Bind(source, target, read_only=mode == "ro")
    if "/" in found.binds:
        raise ConfigError(
            f"engine.steps: docker cannot mount {found.binds['/'].source!r} as the root of a container: "
            "move configuration, store and data into folders"
        )
    return list(found.binds.values())


def environment_of(config: RunConfig, device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a run's containers.

    Args:
        config: the run's.
        device: of the runner, as this process sees it.
        environment: of this process.
    """
    values = handed_on(config, environment)
    values |= {"HOME": HOME, "USER": "mlorq", "LOGNAME": "mlorq"}  # any number may be the user: it has no name
    if _fsspec_folder(environment) is not None:
        values["FSSPEC_CONFIG_DIR"] = FSSPEC_FOLDER
    hub = _hub_folder(config)
    if hub is not None:
        values["HF_HOME"] = hub
    if config.engine.threads is not None:
        values["OMP_NUM_THREADS"] = str(config.engine.threads)
    if device == "cpu":
        # Images made from NVIDIA's ask for all GPUs where the engine gives them to every container.
        values |= {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    return values


def handed_on(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process that its containers get too."""
    named = {*config.engine.docker.environment, *PROXIES, *(name.lower() for name in PROXIES)}
    return {
        name: value for name, value in environment.items() if name.startswith((*STORES, *NUMERICS)) or name in named
    }


def secrets_of(config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """Values handed on that must be in no log line and in no error; longer ones first."""
    asked = config.engine.docker.environment
    values = [
        value
        for name, value in handed_on(config, environment).items()
        if (SECRET_NAMES.search(name) or name in asked) and not os.path.exists(value)
    ]
    # Lines are looked at one by one.
    parts = {part.strip() for value in values for part in value.splitlines() if len(part.strip()) >= SECRET_LENGTH}
    return sorted(parts, key=len, reverse=True)


def hide(text: str, secrets: list[str]) -> str:
    """A text without secrets."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def gpu_of(device: str) -> str:
    """What the engine calls a device: its number, or what ``CUDA_VISIBLE_DEVICES`` calls it."""
    return child_environment(device, None)["CUDA_VISIBLE_DEVICES"].strip()


def local_path(location: str) -> str | None:
    """The path of an absolute location on this machine; None for a remote one."""
    scheme, separator, rest = location.partition("://")
    if not separator:
        return location if os.path.isabs(location) else None
    return os.path.normpath(rest) if scheme in ("file", "local") else None


def _locations(config: RunConfig) -> list[str]:
    """All paths and URIs that a configuration names, but the store; absolute."""
    model = config.model
    named: list[str | None] = [*FAMILIES[model.family].locations(model.own)]
    for source in (config.data.calibration, config.data.evaluation):
        named += SOURCES[source.source].locations(source.own)
    return [config.resolve(location) for location in named if location]


def _hub_folder(config: RunConfig) -> str | None:
    """The hub's folder on this machine where the model comes from the hub: it is fetched once, not by every step."""
    model = config.model
    needed = FAMILIES[model.family].uses_hub(model.own, config.folder)
    sources = (config.data.calibration, config.data.evaluation)
    needed = needed or any(SOURCES[source.source].from_hub(source.own) for source in sources)
    return os.path.abspath(constants.HF_HOME) if needed else None


def _fsspec_folder(environment: Mapping[str, str]) -> str | None:
    """The folder of fsspec's own configuration, where there is one."""
    folder = environment.get("FSSPEC_CONFIG_DIR") or os.path.expanduser("~/.config/fsspec")
    return os.path.abspath(folder) if os.path.isdir(folder) else None
