"""The devices of this machine that a run may use."""

from __future__ import annotations

import torch

from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError


def local_devices(config: RunConfig) -> list[str]:
    """The devices that the flow's own machine gives to steps; a cluster's workers have theirs.

    Raises:
        ConfigError: a device asked for is not there.
    """
    return ["cpu"] if config.engine.runner == "dask" else devices(config)


def devices(config: RunConfig) -> list[str]:
    """The devices of this machine that a run may use; what a cluster's workers have is for them to say.

    Raises:
        ConfigError: a device asked for is not there.
    """
    wanted = config.engine.devices
    present = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if wanted == "auto":
        return present or ["cpu"]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if names == ["cuda"]:
        names = present or ["cuda"]
    for name in names:
        if name != "cpu" and name not in present:
            raise ConfigError(f"engine.devices: {name!r} is not there; present: {', '.join([*present, 'cpu'])}")
    return names
