"""``Conv1D`` of transformers (GPT-2 and its relatives): a linear layer whose weight is stored transposed.

The library works with ``y = W x + b``. A ``Conv1D`` is therefore replaced by a linear layer with the transposed weight,
in a float model as well as in a module that a checkpoint is loaded into. Checkpoints hold the weight of the linear
layer, and name such layers, so that a state dict for the original class can be made from them.
"""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn


class TransposedLinear(nn.Linear):
    """A linear layer in the place of a ``Conv1D``.

    Attributes:
        nx, nf: numbers of inputs and outputs, under their names in ``Conv1D``.
    """

    transposed = True
    nx: int
    nf: int

    @classmethod
    def of(cls, layer: nn.Module, weight: nn.Parameter) -> TransposedLinear:
        """The layer with the bias of a ``Conv1D``, and with a weight ``(out_features, in_features)``."""
        rows, columns = weight.shape
        new = cls(columns, rows, bias=False, device="meta")
        new.weight = weight
        new.register_parameter("bias", layer._parameters.get("bias"))
        new.nf, new.nx = rows, columns
        return new.train(layer.training)


def transpose_conv1d(module: nn.Module, *, values: bool = True, only: Collection[str] | None = None) -> None:
    """Replace every ``Conv1D`` of a module by a ``TransposedLinear``, in place.

    A layer with hooks or a forward of its own stays as it is.

    Args:
        module: the model.
        values: whether the new weights have the values of the old ones, or arbitrary ones, to be filled.
        only: names of the layers to replace; None: all.
    """
    kind = _conv1d()
    if kind is None:
        return
    weights: dict[int, nn.Parameter] = {}
    made: dict[int, TransposedLinear] = {}
    for path, parent in list(module.named_modules()):
        for name, child in list(parent._modules.items()):
            if child is None or type(child) is not kind or _has_own_code(child):
                continue
            if only is not None and f"{path}.{name}".lstrip(".") not in only:
                continue
            old: Any = child.weight
            if id(old) not in weights:
                blank = torch.empty(old.shape[1], old.shape[0], dtype=old.dtype, device=old.device)
                data = old.detach().T.contiguous() if values else blank
                weights[id(old)] = nn.Parameter(data, requires_grad=old.requires_grad)
            made[id(child)] = made.get(id(child)) or TransposedLinear.of(child, weights[id(old)])
            setattr(parent, name, made[id(child)])


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer, float or compressed, is in the place of a ``Conv1D``."""
    return bool(getattr(layer, "transposed", False))


def transposed_layers(module: nn.Module) -> list[str]:
    """Names of the layers, float or compressed, in the place of a ``Conv1D``."""
    return [name for name, child in module.named_modules(remove_duplicate=False) if is_transposed(child)]


def transposed_back(state: dict[str, Tensor], layers: list[str]) -> dict[str, Tensor]:
    """A state dict with the weights of some layers transposed."""
    names = {f"{layer}.weight" for layer in layers}
    return {name: value.T.contiguous() if name in names else value for name, value in state.items()}


def _conv1d() -> type[nn.Module] | None:
    """The class, if transformers is imported: without it no module can have one."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return None if utils is None else getattr(utils, "Conv1D", None)


def _has_own_code(layer: nn.Module) -> bool:
    return "forward" in vars(layer) or bool(layer._forward_hooks or layer._forward_pre_hooks)
