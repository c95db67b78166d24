"""Modules whose parameters have no values yet and take no memory, for a checkpoint's tensors to be put in their place.

A description in a checkpoint can ask for any size. ``shapes_only`` therefore builds a module on the meta device: its
sizes can be compared with the file before memory is taken. ``without_values`` then builds it again, with buffers, since
constructors compute values of buffers that no file holds, but without initialising parameters: the memory that
``torch.empty`` reserves is never touched, so it is neither resident nor takes time. On the meta device constructors
would compute buffers there, from the device of a parameter. Both act on the calling thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.overrides import TorchFunctionMode

from mlorq.errors import CheckpointError
from mlorq.models.copying import copy_module, like
from mlorq.numbers import byte_count

META = torch.device("meta")
SLACK_BYTES = 1 << 28  # of a tensor that is not stored: masks and tables of positions
SLACK_PARTS = 1000  # parameters that a constructor makes and replaces
MODULES = 20  # most modules per parameter: activations, dropouts and containers have none
MOST_READ = 1_000_000  # numbers of a tensor that a constructor makes a list of
_FILLS = {"uniform_", "normal_", "fill_", "zero_", "copy_", "erfinv_", "mul_", "add_", "clamp_"}
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


def without_values(build: Callable[[], nn.Module], limits: Limits) -> nn.Module:
    """The module that ``build`` makes, with arbitrary values of its parameters.

    Raises:
        CheckpointError: the module has too many parts; also what ``build`` raises.
    """
    with _counted(limits), _Unfilled():
        return build()


def shapes_copy(module: nn.Module) -> nn.Module:
    """A deep copy of a module with its parameters and buffers on the meta device; shared ones stay shared."""
    values = [*module.parameters(), *module.buffers()]
    return copy_module(module, {id(value): like(value, value.detach().to(META)) for value in values if _plain(value)})


def blank_copy(module: nn.Module, stated: Collection[Tensor]) -> nn.Module:
    """A deep copy of a module without the values of some parameters, on the CPU; shared ones stay shared.

    Args:
        module: the module; it is not changed.
        stated: tensors that will be filled. Buffers among them are copied all the same, and so are other parameters.
    """
    known = {id(value) for value in stated}
    blank = [value for value in module.parameters() if id(value) in known and _plain(value)]
    return copy_module(module, {id(value): like(value, torch.empty_like(value, device="cpu")) for value in blank})


def _plain(value: Tensor) -> bool:
    return type(value) in (nn.Parameter, Tensor)


@contextmanager
def _counted(limits: Limits) -> Iterator[None]:
    """Count the parameters and modules that this thread's constructors register."""
    thread, parameters, modules = threading.get_ident(), 0, 0

    def on_parameter(_: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal parameters
        if threading.get_ident() == thread:
            parameters += 1
            if parameters > limits.parameters:
                raise CheckpointError(f"the architecture has more parameters than the file ({limits.parameters})")

    def on_module(_: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal modules
        if threading.get_ident() == thread:
            modules += 1
            if modules > MODULES * limits.parameters:
                raise CheckpointError("the architecture has more modules than the file")

    hooks = [
        registration.register_module_parameter_registration_hook(on_parameter),
        registration.register_module_module_registration_hook(on_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Unfilled(TorchFunctionMode):
    """Skips the initialisation of parameters, most of a constructor's time."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")  # functions of nn.init name their argument
        if isinstance(target, nn.Parameter) and (
            getattr(func, "__name__", "") in _FILLS or getattr(func, "__module__", "") == nn.init.__name__
        ):
            return target
        return func(*args, **(kwargs or {}))


class _Measured(_Unfilled):
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
        found = super().__torch_function__(func, types, args, kwargs)
        if isinstance(found, Tensor) and found.numel() * found.element_size() > self.most_bytes:
            size = found.numel() * found.element_size()
            raise CheckpointError(
                f"the architecture asks for a tensor of {byte_count(size)}, far more than the file holds"
            )
        return found
