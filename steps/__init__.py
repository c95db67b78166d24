"""The steps of a run, one file per step: parameters, inputs, output. ``python -m steps NAME --spec URI`` runs one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steps.base import Step

# The module of each step. Most import torch: they are imported when a step is looked up, so that a process that solves
# integer programs alone starts without it.
_MODULES = {
    "layers": "layers",
    "activations": "activations",
    "embeddings": "embeddings",
    "capture": "capture",
    "candidates": "candidates",
    "sensitivity": "sensitivity",
    "allocate": "allocate",
    "joint": "joint",
    "round": "rounding",
    "reconstruct": "reconstruct",
    "tune": "tune",
    "width_costs": "width_costs",
    "table_costs": "table_costs",
    "compressed": "pack",
    "baseline": "baseline",
    "evaluate": "evaluate",
    "calibration": "calibration",
    "export": "export",
    "summary": "summary",
}


class StepRegistry(MutableMapping[str, "Step[Any, Any]"]):
    """Steps by name, each imported at its first lookup.

    Args:
        modules: the module of each step in this package, by the step's name.
    """

    def __init__(self, modules: dict[str, str]) -> None:
        self._modules = dict(modules)
        self._steps: dict[str, Step[Any, Any]] = {}

    def __getitem__(self, name: str) -> Step[Any, Any]:
        if name not in self._steps:
            self._steps[name] = importlib.import_module(f"steps.{self._modules[name]}").STEP
        return self._steps[name]

    def __setitem__(self, name: str, step: Step[Any, Any]) -> None:
        self._modules.setdefault(name, name)
        self._steps[name] = step

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        self._steps.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._modules))

    def __len__(self) -> int:
        return len(self._modules)


REGISTRY = StepRegistry(_MODULES)
