"""Deep copies of modules, also of those that ``copy.deepcopy`` refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

from mlorq.errors import ModelError, one_line

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def copy_module(module: AnyModule, replaced: Mapping[int, Any] | None = None) -> AnyModule:
    """A deep copy of a module.

    Tensors that a computation left in an attribute (the weight that a hook sets) are copied by value. Objects that
    cannot be copied (locks, open files, connections) are shared with the original.

    Args:
        module: the module; it is not changed.
        replaced: ``{id of an object: what the copy has in its place}``.

    Raises:
        ModelError: the module cannot be copied.
    """
    memo: dict[int, Any] = dict(replaced or {})
    for value in _attributes(module):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo.setdefault(id(value), value.detach().clone())
    try:
        return deepcopy(module, dict(memo))
    except Exception:  # a class may raise anything; the second attempt reports what remains
        inside: dict[int, Any] = {id(child): child for child in module.modules()}
        inside |= {id(value): value for value in (*module.parameters(), *module.buffers())}
        for child in module.modules():
            for value in vars(child).values():
                _share_uncopyable(value, inside | memo, memo, set())
    try:
        return deepcopy(module, memo)
    except Exception as error:
        raise ModelError(f"the model cannot be copied: {type(error).__name__}: {one_line(error)}") from error


def _attributes(module: nn.Module) -> Iterator[Any]:
    """The values of all attributes of a module and its submodules, also those inside dicts, lists and tuples."""
    for child in module.modules():
        for value in vars(child).values():
            yield value
            if isinstance(value, Mapping):
                yield from value.values()
            elif isinstance(value, (list, tuple)):
                yield from value


def _share_uncopyable(value: Any, known: Mapping[int, Any], shared: dict[int, Any], seen: set[int]) -> None:
    """Add to ``shared`` the parts of a value that cannot be copied; modules and tensors in ``known`` are left out."""
    if id(value) in known or id(value) in shared or id(value) in seen:
        return
    seen.add(id(value))
    if _copies(value, {**known, **shared}):
        return
    if isinstance(value, Mapping):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    else:
        parts = list(vars(value).values()) if hasattr(value, "__dict__") else []
    for part in parts:
        _share_uncopyable(part, known, shared, seen)
    if not _copies(value, {**known, **shared}):
        shared[id(value)] = value


def _copies(value: Any, memo: dict[int, Any]) -> bool:
    try:
        deepcopy(value, memo)
    except Exception:
        return False
    return True
