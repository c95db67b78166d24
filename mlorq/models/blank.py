"""Modules whose parameters take no memory, for a checkpoint's tensors to be put in their place.

A description in a checkpoint can ask for any size. ``shapes_only`` therefore builds a module of which no tensor takes
memory: its sizes can be compared with the file first. ``without_parameters`` then builds it again with parameters on
the meta device, but with real buffers, since constructors compute values of buffers that no file holds. Both act on the
calling thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mlorq.errors import CheckpointError

META = torch.device("meta")
SLACK_BYTES = 1 << 28  # of a tensor that is not stored: masks and tables of positions
SLACK_PARTS = 1000  # parameters that a constructor makes and replaces
MODULES = 50  # most modules per parameter: activations, dropouts and containers have none
MOST_READ = 1_000_000  # numbers of a tensor that a constructor makes a list of
_READS = {"item": 0, "tolist": [], "__bool__": False, "__int__": 0, "__float__": 0.0, "__index__": 0}


@dataclass(frozen=True)
class Limits:
    """The most that a description may ask for.

    Attributes:
        parameters: number of parameters, counting each registration.
        tensor_bytes: size of one tensor, also of those that a constructor computes with.
    """

    parameters: int
    tensor_bytes: int

    @classmethod
    def of_file(cls, tensors: int, largest: int) -> Limits:
        """Limits for a model with as many stored tensors, the largest of so many bytes."""
        return cls(2 * tensors + SLACK_PARTS, max(2 * largest, SLACK_BYTES))


def shapes_only(build: Callable[[], nn.Module], limits: Limits) -> nn.Module:
    """The module that ``build`` makes, with all tensors on the meta device.

    Raises:
        CheckpointError: the module exceeds a limit; also what ``build`` raises.
    """
    with _counted(limits), META, _Measured(limits.tensor_bytes):
        return build()


def without_parameters(build: Callable[[], nn.Module], limits: Limits) -> nn.Module:
    """The module that ``build`` makes, with parameters on the meta device; shared parameters stay shared.

    Raises:
        CheckpointError: the module has too many parts; also what ``build`` raises.
    """
    moved = WeakIdKeyDictionary()

    def to_meta(parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter
        if parameter not in moved:
            moved[parameter] = meta_parameter(parameter)
        found: nn.Parameter = moved[parameter]
        return found

    with _counted(limits, to_meta):
        return build()


def blank_copy(module: nn.Module, kept: Collection[Tensor] = ()) -> nn.Module:
    """A deep copy of a module with its parameters on the meta device; buffers, and parameters in ``kept``, are copied.

    Args:
        module: the module; it is not changed.
        kept: parameters to copy with their values.
    """
    values = {id(value) for value in kept}
    memo = {id(p): meta_parameter(p) for p in module.parameters() if id(p) not in values and type(p) is nn.Parameter}
    return deepcopy(module, memo)


def meta_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter like another one without memory."""
    found = nn.Parameter(parameter.detach().to(META), requires_grad=parameter.requires_grad)
    found.__dict__.update(parameter.__dict__)
    return found


def put(target: Tensor, value: Tensor) -> None:
    """Give a tensor of a module the memory, dtype and device of ``value``, in place: all references to it see them."""
    if not target.is_meta:
        target.data = value
        return
    if isinstance(target, nn.Parameter):
        value = nn.Parameter(value, requires_grad=target.requires_grad and value.is_floating_point())
    value.__dict__.update(target.__dict__)
    torch.utils.swap_tensors(target, value)


@contextmanager
def _counted(limits: Limits, change: Callable[[nn.Parameter], nn.Parameter] | None = None) -> Iterator[None]:
    """Count the parameters and modules that this thread's constructors register, and change the parameters."""
    thread, parameters, modules = threading.get_ident(), 0, 0

    def on_parameter(_: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        nonlocal parameters
        if threading.get_ident() != thread:
            return None
        parameters += 1
        if parameters > limits.parameters:
            raise CheckpointError(f"the architecture has more parameters than the file can hold ({limits.parameters})")
        return change(parameter) if change else None

    def on_module(_: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > MODULES * limits.parameters:
                raise CheckpointError("the architecture has more modules than the file can hold")

    hooks = [
        registration.register_module_parameter_registration_hook(cast(Any, on_parameter)),  # may return a parameter
        registration.register_module_module_registration_hook(on_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Measured(TorchFunctionMode):
    """Refuses large tensors, and lets constructors read values that tensors on the meta device do not have."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self.most_bytes = most_bytes

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        read = getattr(func, "__name__", "")
        if read in _READS and args and isinstance(args[0], Tensor) and args[0].is_meta:
            # Depths and rates of dropout, for instance; the shapes of parameters do not depend on them.
            if read == "tolist" and args[0].numel() > MOST_READ:
                raise CheckpointError(f"the architecture asks for a list of {args[0].numel()} numbers")
            return [0.0] * args[0].numel() if read == "tolist" else _READS[read]
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.numel() * found.element_size() > self.most_bytes:
            size = found.numel() * found.element_size()
            raise CheckpointError(f"the architecture asks for a tensor of {size} bytes, far more than the file holds")
        return found
