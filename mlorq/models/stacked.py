"""Matrices in one parameter of three axes, of which other code multiplies with one at a time: ``p[i]``.

Experts of mixture-of-experts models are stored so: ``F.linear(x, self.gate_up_proj[i])``, ``x @ self.down_proj[i]``. In
place of the parameter stands a module with a linear layer for each matrix, whose item is the weight of that layer as
other code reads it (``mlorq.models.direct``). All else sees the dense parameter.

transformers may replace the loop over experts by one product of all of them, which needs the dense parameter. The loop
is its implementation ``eager``, the same function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.direct import ParameterLike, ParameterLinear, WeightView

AXES = 3  # of a parameter with several matrices
EAGER = "eager"
_SWITCH = "_experts_implementation"  # of a configuration of transformers


class ParameterStack(ParameterLike, nn.Module):
    """Linear layers ``0``, ``1``, … in the place of a parameter ``(matrices, out_features, in_features)``.

    Attributes:
        transposed: whether the parameter is ``(matrices, in_features, out_features)``.
    """

    transposed: bool

    @classmethod
    def of(cls, value: nn.Parameter, transposed: bool, *, values: bool = True) -> ParameterStack:
        """The layers of a parameter.

        Args:
            value: the parameter.
            transposed: whether its matrices are ``(in_features, out_features)``.
            values: whether the weights have the parameter's values, or arbitrary ones, to be filled.
        """
        stack = cls()
        stack.transposed = transposed
        for index, matrix in enumerate(value.detach()):
            # Copies: slices of one tensor in memory would be saved, and found, as one.
            own = matrix if transposed else matrix.clone() if values else torch.empty_like(matrix)
            parameter = nn.Parameter(own, requires_grad=value.requires_grad)
            stack.add_module(str(index), ParameterLinear.of(parameter, transposed, values=values))
        return stack

    @property
    def view(self) -> Any:
        """The stack itself: products with it take the dense values."""
        return self

    @property
    def dense(self) -> Tensor:
        """The values, of the parameter's shape."""
        return torch.stack([weight.dense for weight in self])

    @property
    def shape(self) -> torch.Size:
        """The parameter's shape."""
        return torch.Size((len(self), *self[0].dense.shape))

    @property
    def dtype(self) -> torch.dtype:
        """That of the matrices."""
        dtype: torch.dtype = self[0].dense.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        """That of the matrices."""
        device: torch.device = self[0].dense.device
        return device

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.dense, name)

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[WeightView]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """One matrix, as a ``WeightView``, of an integer; other indices give values.

        Raises:
            ModelError: a graph is recorded from an example, whose choice of matrices would be that of all inputs.
        """
        if not is_item(index):
            return self.dense[index]
        if isinstance(index, Tensor) and torch.jit.is_tracing():
            raise ModelError("the inputs choose the experts: a graph recorded from an example would not")
        number = int(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index {number} is out of range for {len(self)} matrices")
        layer = self._modules[str(number % len(self))]
        assert isinstance(layer, ParameterLike)
        return layer.view

    def unbind(self, dim: int = 0) -> tuple[Any, ...]:
        """All matrices, along the first axis; along another one values."""
        return tuple(self) if dim in (0, -AXES) else self.dense.unbind(dim)


def is_item(index: Any) -> bool:
    """Whether an index is one integer, also as a tensor without axes: it takes one axis away."""
    if isinstance(index, Tensor):
        return index.dim() == 0 and not index.is_floating_point() and index.dtype is not torch.bool
    return isinstance(index, int) and not isinstance(index, bool)


def loop_over_experts(module: nn.Module) -> dict[int, tuple[Any, str]]:
    """Let the experts of transformers multiply with one matrix at a time, in place.

    Args:
        module: the model, or a part of it.

    Returns:
        What was changed, for ``restore``: configurations and their setting.
    """
    changed: dict[int, tuple[Any, str]] = {}
    for child in module.modules():
        config = getattr(child, "config", None)
        stacked = any(isinstance(part, ParameterStack) for part in child._modules.values())
        stacked = stacked or any(value is not None and value.dim() == AXES for value in child._parameters.values())
        before = getattr(config, _SWITCH, None)
        if stacked and isinstance(before, str) and before != EAGER:
            changed[id(config)] = (config, before)
            setattr(config, _SWITCH, EAGER)
    return changed


def restore(changed: Mapping[int, tuple[Any, str]]) -> None:
    """Undo ``loop_over_experts``."""
    for config, before in changed.values():
        setattr(config, _SWITCH, before)
