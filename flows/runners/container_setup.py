"""The folders and environment variables of this machine that a step's container gets, and which of them are secret.

Everything is mounted at its path on the host, so that a configuration is valid in the container as well; folders that a
step only reads are mounted read-only. Nothing here connects to an engine.
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
from mlorq.data.package_metrics import metric_location
from mlorq.data.source import SOURCES
from mlorq.errors import ConfigError, StoreError
from mlorq.export_targets import TARGETS
from mlorq.models.family import FAMILIES

HOME = "/tmp"  # in the container: any user can write there
FSSPEC_FOLDER = "/run/fsspec"

# Prefixes of variable names. Object stores read endpoints and credentials from these;
STORES = ("AWS_", "FSSPEC_", "S3_", "GOOGLE_", "GCSFS_", "AZURE_STORAGE_", "HF_")
# these select numeric code paths: with different values, the same key would not give the same bytes.
NUMERICS = ("OMP_", "MKL_", "OPENBLAS_", "ATEN_", "DNNL_", "ONEDNN_")
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

SECRET_NAMES = re.compile(r"SECRET|TOKEN|PASSWORD|KEY|CREDENTIAL|CONNECTION_STRING|SAS|PROXY", re.IGNORECASE)
SECRET_LENGTH = 6  # shorter values are easily guessed and occur in many lines
HIDDEN = "***"

# Folders below the home folder in which clients of object stores keep credentials.
CREDENTIALS = {"s3": ".aws", "s3a": ".aws", "gs": ".config/gcloud", "gcs": ".config/gcloud", "az": ".azure"}


@dataclass(frozen=True)
class Bind:
    """A mount: a file or folder of this machine, and its path in the container."""

    source: str
    target: str
    read_only: bool = True


@dataclass
class _Binds:
    """Collects mounts; each target is mounted once, and the contents of mounted folders need no mount."""

    binds: dict[str, Bind] = field(default_factory=dict)

    def need(self, path: str) -> None:
        """Mount a file or folder at its own path, read-only. Missing ones are left to the step to report."""
        if not os.path.exists(path):
            return
        real = os.path.realpath(path)
        shown = self._is_inside(path)
        if real != path and shown:
            path = real  # a link in a mounted folder: mount its target
            shown = self._is_inside(path)
        if not shown:
            self.binds[path] = Bind(real, path)

    def write(self, folder: str) -> None:
        """Mount a folder at its own path, writable; it is created if needed."""
        os.makedirs(folder, exist_ok=True)
        real = os.path.realpath(folder)
        target = real if real != folder and self._is_inside(folder) else folder
        self.binds[target] = Bind(real, target, read_only=False)

    def _is_inside(self, path: str) -> bool:
        return any(path == target or path.startswith(target.rstrip("/") + "/") for target in self.binds)


def folder_of(config: RunConfig) -> str:
    """Base of relative paths in the configuration: a path or a URL."""
    return absolute_folder(config.folder)


def binds_of(config: RunConfig, cache: str | None, environment: Mapping[str, str]) -> list[Bind]:
    """The mounts of a run's containers. Writable folders are created.

    Args:
        config: of the run.
        cache: folder that caches the store; None if there is none.
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
    for name, value in forwarded_variables(config, environment).items():
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
    for volume in config.engine.docker.volumes:  # the user's mounts take precedence
        source, target, mode = [*volume.split(":"), ""][:3]
        found.binds[target.rstrip("/") or "/"] = Bind(source, target, read_only=mode == "ro")
    if "/" in found.binds:
        raise ConfigError(
            f"engine.steps: docker cannot mount {found.binds['/'].source!r} as the root of a container: "
            "move configuration, store and data into subfolders"
        )
    return list(found.binds.values())


def environment_of(config: RunConfig, device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of a run's containers.

    Args:
        config: of the run.
        device: of the runner, numbered as in this process.
        environment: of this process.
    """
    values = forwarded_variables(config, environment)
    values |= {"HOME": HOME, "USER": "mlorq", "LOGNAME": "mlorq"}  # the user id may have no name in the image
    if _fsspec_folder(environment) is not None:
        values["FSSPEC_CONFIG_DIR"] = FSSPEC_FOLDER
    hub = _hub_folder(config)
    if hub is not None:
        values["HF_HOME"] = hub
    if config.engine.threads is not None:
        values["OMP_NUM_THREADS"] = str(config.engine.threads)
    if device == "cpu":
        # Images based on NVIDIA's request all GPUs if the NVIDIA runtime is the engine's default.
        values |= {"CUDA_VISIBLE_DEVICES": "", "NVIDIA_VISIBLE_DEVICES": "void"}
    return values


def forwarded_variables(config: RunConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of this process that its containers get as well."""
    named = {*config.engine.docker.environment, *PROXIES, *(name.lower() for name in PROXIES)}
    return {
        name: value for name, value in environment.items() if name.startswith((*STORES, *NUMERICS)) or name in named
    }


def secrets_of(config: RunConfig, environment: Mapping[str, str]) -> list[str]:
    """Forwarded values that must not appear in log lines or errors, longest first."""
    asked = config.engine.docker.environment
    values = [
        value
        for name, value in forwarded_variables(config, environment).items()
        if (SECRET_NAMES.search(name) or name in asked) and not os.path.exists(value)
    ]
    # Output is searched line by line.
    parts = {part.strip() for value in values for part in value.splitlines() if len(part.strip()) >= SECRET_LENGTH}
    return sorted(parts, key=len, reverse=True)


def hide(text: str, secrets: list[str]) -> str:
    """A text with its secrets replaced."""
    for secret in secrets:
        text = text.replace(secret, HIDDEN)
    return text


def gpu_of(device: str) -> str:
    """The engine's name of a device: its index, or its entry in ``CUDA_VISIBLE_DEVICES``."""
    return child_environment(device, None)["CUDA_VISIBLE_DEVICES"].strip()


def local_path(location: str) -> str | None:
    """The path of an absolute location on this machine; None for a remote one."""
    scheme, separator, rest = location.partition("://")
    if not separator:
        return location if os.path.isabs(location) else None
    return os.path.normpath(rest) if scheme in ("file", "local") else None


def _locations(config: RunConfig) -> list[str]:
    """All paths and URIs that a configuration names, except the store; absolute."""
    model = config.model
    named: list[str | None] = [*FAMILIES[model.family].locations(model.own)]
    for source in (config.data.calibration, config.data.evaluation):
        named += SOURCES[source.source].locations(source.own)
        named.append(metric_location(getattr(source.own, "metric", None)))
    for entry in config.export:
        named += [getattr(entry, name) for name in TARGETS[entry.to].locations]
    return [config.resolve(location) for location in named if location]


def _hub_folder(config: RunConfig) -> str | None:
    """The hub's cache folder if the model or data come from the hub, so that they are downloaded once; else None."""
    model = config.model
    needed = FAMILIES[model.family].uses_hub(model.own, config.folder)
    sources = (config.data.calibration, config.data.evaluation)
    needed = needed or any(SOURCES[source.source].from_hub(source.own) for source in sources)
    return os.path.abspath(constants.HF_HOME) if needed else None


def _fsspec_folder(environment: Mapping[str, str]) -> str | None:
    """The folder of fsspec's configuration; None if it does not exist."""
    folder = environment.get("FSSPEC_CONFIG_DIR") or os.path.expanduser("~/.config/fsspec")
    return os.path.abspath(folder) if os.path.isdir(folder) else None
