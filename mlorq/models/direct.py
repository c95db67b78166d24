"""Linear layers whose weight other code multiplies with: ``F.linear(x, self.qkv.weight, bias)``, ``x @ self.w``.

The library observes and replaces layers that are called. In place of a weight that is read, other code therefore gets
an object of ``WeightView``, with which torch's products call the layer: ``F.linear(x, layer.weight, b)`` becomes
``layer(x, b)``, so that hooks run and compressed layers compute from their codes. All else sees the dense weight. A
parameter of a larger module becomes a layer of the parameter's name, which is such an object itself.

This uses ``__torch_function__`` on objects that are not tensors, which ``torch.export`` and ``torch.compile`` trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)  # ``x`` and a matrix
SWAPPED = ((0, 1), (1, 0), (-1, -2), (-2, -1), (0, -1), (-1, 0))  # axes that transpose a matrix
_OPERATORS = ("getitem", "len", "iter", "matmul", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "pow")
_CASTS = ("to", "type", "float", "half", "double", "bfloat16", "type_as", "contiguous")


class _TensorLike:
    """Passes everything that is not a product on to a tensor."""

    @property
    def view(self) -> WeightView:
        """The weight as other code reads it."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        return _routed(func, args, kwargs or {})


class WeightView(_TensorLike):
    """The weight of a layer, in place of the tensor.

    Args:
        layer: the layer; a call with a second argument adds that in place of its own bias.
        flipped: whether this is the transposed weight, ``(in_features, out_features)``.
    """

    def __init__(self, layer: Any, flipped: bool = False) -> None:
        self.layer = layer
        self.flipped = flipped

    @property
    def view(self) -> WeightView:
        return self

    @property
    def dense(self) -> Tensor:
        """The values."""
        weight: Tensor = self.layer.own_weight
        return weight.T if self.flipped else weight

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "layer":
            raise AttributeError(name)
        return getattr(self.dense, name)

    @property
    def T(self) -> WeightView:
        """The transposed weight."""
        return WeightView(self.layer, not self.flipped)

    mT = T

    def t(self) -> WeightView:
        """The transposed weight."""
        return self.T

    def transpose(self, first: int, second: int) -> WeightView | Tensor:
        """The transposed weight."""
        return self.T if (first, second) in SWAPPED else self.dense.transpose(first, second)


class DirectlyRead(_TensorLike):
    """A linear layer that passes a ``WeightView`` for its weight. Its weight itself is ``own_weight``.

    Attributes:
        own_weight: the weight, ``(out_features, in_features)``.
    """

    own_weight: Tensor

    @property
    def view(self) -> WeightView:
        return WeightView(self, bool(getattr(self, "transposed", False)))


class DirectLinear(DirectlyRead, nn.Linear):
    """``nn.Linear`` whose weight is read directly. ``forward`` may be given another bias than its own.

    Layers become instances by their ``__class__``, so that they keep their parameters, hooks and references.
    """

    @property
    def own_weight(self) -> Tensor:  # type: ignore[override]
        found = self._parameters.get("weight")
        assert isinstance(found, Tensor)
        return found

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The weight, for other code."""
        return WeightView(self)

    def forward(self, input: Tensor, *given: Tensor | None) -> Tensor:
        """``(…, in_features)`` to ``(…, out_features)``.

        Args:
            input: x.
            given: a bias in place of the layer's own; None: no bias.
        """
        return F.linear(input, self.own_weight, given[0] if given else self.bias)


class ParameterLike(_TensorLike):
    """A module in the place of a parameter. Methods that tensors and modules both have are those of the tensor."""

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)  # type: ignore[arg-type]
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.view, name)


class ParameterLinear(ParameterLike, DirectLinear):
    """A linear layer in the place of a parameter ``(out_features, in_features)``, or the transposed, of a module.

    Attributes:
        transposed: whether the parameter is ``(in_features, out_features)``.
    """

    transposed: bool

    @classmethod
    def of(cls, value: nn.Parameter, transposed: bool, *, values: bool = True) -> ParameterLinear:
        """The layer of a parameter.

        Args:
            value: the parameter.
            transposed: whether it is ``(in_features, out_features)``.
            values: whether the weight has the parameter's values, or arbitrary ones, to be filled.
        """
        weight = value
        if transposed:
            data = value.detach().T.contiguous() if values else torch.empty_like(value.detach().T)
            weight = nn.Parameter(data, requires_grad=value.requires_grad)
        rows, columns = weight.shape
        plain = nn.Linear(columns, rows, bias=False, device="meta")
        plain.weight = weight
        plain.__class__ = cls
        assert isinstance(plain, cls)
        plain.transposed = transposed
        return plain


def weight_of(layer: nn.Module) -> Tensor:
    """The weight tensor of a layer, also of one whose ``weight`` is a ``WeightView``."""
    weight = layer.own_weight if isinstance(layer, DirectlyRead) else layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _routed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of a torch function some of whose arguments stand for weights."""
    found = [value.view if isinstance(value, _TensorLike) else value for value in args]
    named = {name: value.view if isinstance(value, _TensorLike) else value for name, value in kwargs.items()}
    if func is F.linear:
        input, weight, bias = linear_arguments(found, named)
        if isinstance(weight, WeightView) and not weight.flipped and not _stand_in(input, bias):
            return weight.layer(input, bias)
    elif func in PRODUCTS and len(found) == 2 and not named:
        input, weight = found
        if isinstance(weight, WeightView) and weight.flipped and not _stand_in(input):
            return weight.layer(input, None)
    return func(*map(_dense, found), **{name: _dense(value) for name, value in named.items()})


def linear_arguments(args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Input, weight and bias of a call of ``F.linear``."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs)
    return given.get("input"), given.get("weight"), given.get("bias")


def _stand_in(*values: Any) -> bool:
    return any(isinstance(value, _TensorLike) for value in values)


def _dense(value: Any) -> Any:
    if isinstance(value, _TensorLike):
        return value.view.dense
    if isinstance(value, (tuple, list)):
        return type(value)(map(_dense, value)) if type(value) in (tuple, list) else value
    return value


def _operator(name: str) -> Any:
    def method(self: _TensorLike, *args: Any) -> Any:
        return getattr(self.view.dense, name)(*map(_dense, args))

    return method


def _cast(name: str) -> Any:
    def method(self: _TensorLike, *args: Any, **kwargs: Any) -> Any:
        """The tensor's method; a call that does not change the tensor leaves the stand-in."""
        weight = self.view.dense
        found = getattr(weight, name)(*args, **kwargs)
        return self.view if found is weight else found

    return method


for _kind in (WeightView, ParameterLike):
    for _name in _OPERATORS:
        setattr(_kind, f"__{_name}__", _operator(f"__{_name}__"))
    for _name in _CASTS:
        setattr(_kind, _name, _cast(_name))
