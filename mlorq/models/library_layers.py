"""Layers of libraries with a forward of their own that computes no more than its kind (``kinds``) does.

``timm.layers.Linear`` only casts while it is scripted; ``FalconLinear`` adds its bias in a call of its own;
``StdConv2d`` and ``ScaledStdConv2d`` standardise their weight first (arXiv 1903.10520, 2101.08692). Such a layer is run
on a few inputs. If each time it makes one product of this very input, with a weight that does not depend on it, and
returns the result, then it is given the forward of its kind and that weight. Layers of users stay as they are: a few
inputs do not prove what unknown code does.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlorq.models.computed_weights import computed_tensors
from mlorq.models.kinds import KINDS, Kind, kind_of

METHODS = ("forward", "_conv_forward")
LIBRARIES = ("timm", "torchvision", "transformers")
_SIZES = 4  # of images; a forward that pads its input does not do so at every size


def simplify_library_layers(module: nn.Module, only: Collection[str] | None = None) -> None:
    """Give layers of libraries the forward of their kind, and the weight that they compute, in place.

    Args:
        module: the model, in eval mode.
        only: names of the layers of a checkpoint, whose weights are still to be read, so that the layers cannot be run.
            None: all layers that compute no more than their kind.
    """
    made: dict[type[nn.Module], type[nn.Module]] = {}
    for path, layer in list(module.named_modules()):
        kind = kind_of(layer)
        if kind is None or not _has_library_code(layer, kind):
            continue
        if only is not None:
            if path in only:
                _simplify(layer, kind, made)
            continue
        weight = _used_weight(layer, kind)
        if weight is None:
            continue
        has_own = weight is layer.weight
        _simplify(layer, kind, made)
        if not has_own:
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.computed_by_class = True


def is_computed_by_class(layer: nn.Module) -> bool:
    """Whether the class of a layer, float or compressed, computes its weight, and the layer now holds the value."""
    return bool(getattr(layer, "computed_by_class", False))


def computed_by_class(module: nn.Module) -> list[str]:
    """Names of the layers, float or compressed, that hold a weight which their class computes."""
    return [name for name, child in module.named_modules(remove_duplicate=False) if is_computed_by_class(child)]


def _has_library_code(layer: nn.Module, kind: Kind) -> bool:
    cls: Any = type(layer)
    plain: Any = kind.layer
    if cls.__module__.partition(".")[0] not in LIBRARIES or "forward" in vars(layer) or cls.__call__ != plain.__call__:
        return False
    own = any(getattr(cls, name, None) is not getattr(plain, name, None) for name in METHODS)
    return own and not computed_tensors(layer) and "weight" in layer._parameters and "bias" in layer._parameters


def _simplify(layer: nn.Module, kind: Kind, made: dict[type[nn.Module], type[nn.Module]]) -> None:
    cls = type(layer)
    layer.__class__ = made[cls] = made.get(cls) or _plain(cls, kind)
    for name in [name for name in layer._parameters if name not in ("weight", "bias")]:
        del layer._parameters[name]  # such as the gain of a scaled weight: its effect is in the value


def _plain(cls: type[nn.Module], kind: Kind) -> type[nn.Module]:
    """The class with the forward of its kind; it keeps its name and its other methods."""
    own = {name: getattr(kind.layer, name) for name in METHODS if hasattr(kind.layer, name)}
    return cast("type[nn.Module]", type(cls.__name__, (cls,), own | {"__module__": cls.__module__}))


class _Products(TorchFunctionMode):
    """Records products: function, arguments by name, result."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, dict[str, Any], Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        names = next((kind.arguments for kind in KINDS if kind.function is func), None)
        if names is not None:
            self.found.append((func, dict(zip(names, args, strict=False)) | (kwargs or {}), result))
        elif func in _PRODUCTS and not kwargs and args[1].dim() == _MATRIX:
            self.found.append((F.linear, {"input": args[0], "weight": args[1].T}, result))
        return result


_MATRIX = 2  # axes
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def _used_weight(layer: nn.Module, kind: Kind) -> Tensor | None:
    """The weight that a layer multiplies its input by; None if it does anything else."""
    weight: Any = layer.weight
    used: Tensor | None = None
    generator = torch.Generator().manual_seed(0)
    for step in range(_SIZES):
        if kind.axes:
            geometry: Any = layer
            sides = [
                width * (size - 1) + 1 + step
                for width, size in zip(geometry.dilation, geometry.kernel_size, strict=True)
            ]
            shape = (1, geometry.in_channels, *sides)
        else:
            shape = (2 + step, weight.shape[1])
        given = torch.randn(shape, generator=generator).to(weight)
        products = _Products()
        try:
            with torch.no_grad(), products:
                result = layer.forward(given)
        except Exception:  # a layer may refuse such inputs
            return None
        if len(products.found) != 1:
            return None
        function, arguments, output = products.found[0]
        if function is not kind.function or arguments["input"] is not given:
            return None
        bias: Any = layer.bias
        whole = output is result and arguments.get("bias") is bias
        if not (whole or _adds(output, arguments.get("bias"), bias, result)) or not _as_set(layer, kind, arguments):
            return None
        if used is not None and not torch.equal(used, arguments["weight"]):
            return None
        used = arguments["weight"]
    if used is None or (used.data_ptr() == weight.data_ptr() and torch.equal(used, weight)):
        return None if used is None else weight
    return used.detach().clone()


def _adds(output: Any, used: Tensor | None, bias: Tensor | None, result: Any) -> bool:
    """Whether the result is the product and the bias, added after it."""
    return used is None and bias is not None and isinstance(result, Tensor) and torch.equal(result, output + bias)


def _as_set(layer: Any, kind: Kind, arguments: dict[str, Any]) -> bool:
    """Whether a convolution has the stride, padding, dilation and groups of its attributes."""
    if not kind.axes:
        return True
    if layer.padding_mode != "zeros":
        return False
    ones, zeros = (1,) * kind.axes, (0,) * kind.axes
    defaults = {"stride": ones, "padding": zeros, "output_padding": zeros, "dilation": ones, "groups": 1}
    given = {name: arguments.get(name, defaults[name]) for name in kind.arguments if name in defaults}
    return all(value == getattr(layer, name) for name, value in given.items())
