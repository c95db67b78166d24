"""The devices of this machine that a run may use."""

from __future__ import annotations

import torch

from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError


def local_devices(config: RunConfig) -> list[str]:
    """The devices of the flow's machine; with a Dask cluster, whose workers have their own, only the CPU.

    Raises:
        ConfigError: a configured device does not exist.
    """
    return ["cpu"] if config.engine.runner != "threads" else devices(config)


def devices(config: RunConfig) -> list[str]:
    """The devices of this machine that ``engine.devices`` selects.

    Raises:
        ConfigError: a configured device does not exist.
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
            raise ConfigError(f"engine.devices: {name!r} does not exist; available: {', '.join([*present, 'cpu'])}")
    return names
