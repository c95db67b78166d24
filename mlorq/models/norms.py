"""Affine parameters of normalisation layers: which of a model's parameters they are, and how they are set.

Layers are recognised by the names of their classes and base classes (``LayerNorm``, ``LlamaRMSNorm``,
``BatchNormAct2d``, ``LayerScale``), because every library defines norms of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORM_CLASS = re.compile(r"(norm|layerscale)(act)?\d*d?$", re.IGNORECASE)


@dataclass(frozen=True)
class NormParameter:
    """A scale or shift of a normalisation layer, or the scale of a LayerScale.

    Attributes:
        name: its first name in the model.
        owners: the modules that hold it, each with its key there; several if it is shared.
        unit: size of the layer's scales, ``√mean(γ²)``, positive: the unit of step sizes.
    """

    name: str
    owners: tuple[tuple[nn.Module, str], ...]
    unit: float

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter in the model."""
        module, key = self.owners[0]
        found = module._parameters[key]
        assert found is not None
        return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer or a LayerScale, with parameters of one axis only."""
    named = any(NORM_CLASS.search(cls.__name__) for cls in type(module).__mro__)
    own = [value for value in module._parameters.values() if value is not None]
    return named and bool(own) and all(value.dim() == 1 and value.is_floating_point() for value in own)


def norm_parameters(module: nn.Module, within: str = "") -> list[NormParameter]:
    """The parameters of a model's normalisation layers, each once, in the model's order.

    A parameter that another kind of module also holds is left out.

    Args:
        module: the model.
        within: name of a submodule; parameters that are also held outside it are left out. Default: the whole model.
    """
    prefix = f"{within}." if within else ""
    names: dict[int, str] = {}
    owners: dict[int, dict[tuple[int, str], tuple[nn.Module, str]]] = {}
    refused: set[int] = set()
    for path, child in module.named_modules(remove_duplicate=False):
        for key, value in child._parameters.items():
            if value is None:
                continue
            names.setdefault(id(value), f"{path}.{key}" if path else key)
            owners.setdefault(id(value), {})[id(child), key] = (child, key)
            if not is_norm(child) or not f"{path}.".startswith(prefix):
                refused.add(id(value))
    return [
        NormParameter(names[one], tuple(places.values()), _unit(next(iter(places.values()))[0]))
        for one, places in owners.items()
        if one not in refused
    ]


def _unit(norm: nn.Module) -> float:
    scales = [value for key, value in norm._parameters.items() if value is not None and key != "bias"]
    size = float(scales[0].detach().double().square().mean().sqrt()) if scales else 0.0
    return size if 0 < size < float("inf") else 1.0


@torch.no_grad()
def set_parameters(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set parameters or buffers of a model by name, in place; modules that share one see the new value.

    Raises:
        AttributeError: the model lacks one.
    """
    for name, value in values.items():
        owner, _, key = name.rpartition(".")
        child = module.get_submodule(owner)
        (module.get_buffer if key in child._buffers else module.get_parameter)(name).copy_(value)
