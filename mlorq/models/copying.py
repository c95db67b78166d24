"""Deep copies of modules, also of those that ``copy.deepcopy`` refuses."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, TypeVar

from torch import Tensor, nn

from mlorq.errors import ModelError, one_line
from mlorq.models.offload import offloaded_copies

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def copy_module(module: AnyModule, replaced: Mapping[int, Any] | None = None) -> AnyModule:
    """A deep copy of a module.

    Tensors that a computation left in an attribute (the weight that a hook sets) are copied by value. Functions that
    were assigned to the module or are its hooks refer to the copy where they referred to parts of the original. Objects
    that cannot be copied (locks, open files, connections) are shared with the original. Copies of tensors in a file are
    in another file (``mlorq.models.offload``).

    Args:
        module: the module; it is not changed.
        replaced: ``{id of an object: what the copy has in its place}``.

    Raises:
        ModelError: the module cannot be copied.
    """
    memo: dict[int, Any] = dict(replaced or {})
    values = {id(value): value for value in (*module.parameters(), *module.buffers()) if id(value) not in memo}
    memo |= {key: like(values[key], copy) for key, copy in offloaded_copies(values.values()).items()}
    for value in _attributes(module):
        if isinstance(value, Tensor) and not value.is_leaf:
            memo.setdefault(id(value), value.detach().clone())
    try:
        return _rebound(module, deepcopy(module, dict(memo)))
    except Exception:  # a class may raise anything; the second attempt reports what remains
        inside: dict[int, Any] = {id(child): child for child in module.modules()}
        inside |= {id(value): value for value in (*module.parameters(), *module.buffers())}
        for child in module.modules():
            for value in vars(child).values():
                _share_uncopyable(value, inside | memo, memo, set())
    try:
        return _rebound(module, deepcopy(module, memo))
    except Exception as error:
        raise ModelError(f"the model cannot be copied: {type(error).__name__}: {one_line(error)}") from error


def like(value: Tensor, data: Tensor) -> Tensor:
    """A tensor with other data that is as another in the rest: a parameter or not, with the same attributes."""
    found = nn.Parameter(data, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else data
    found.__dict__.update(value.__dict__)
    return found


def _rebound(module: AnyModule, twin: AnyModule) -> AnyModule:
    """Let the functions in a copy refer to the copy: ``deepcopy`` leaves functions with what they enclose."""
    old, new = list(module.modules()), list(twin.modules())
    if len(old) != len(new):  # a class that makes copies of its own kind
        return twin
    twins = dict(zip(map(id, old), new, strict=True))
    for child in twin.modules():
        places: tuple[dict[Any, Any], ...] = (vars(child), child._forward_hooks, child._forward_pre_hooks)
        for functions in places:
            for name, value in list(functions.items()):
                if isinstance(value, types.FunctionType):
                    functions[name] = _translated(value, twins, {})
    return twin


def _translated(value: Any, twins: Mapping[int, nn.Module], done: dict[int, Any]) -> Any:
    """A value that a function encloses, for the copies of the modules that it refers to."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, types.MethodType):
        owner = _translated(value.__self__, twins, done)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if not isinstance(value, types.FunctionType) or id(value) in done:
        return done.get(id(value), value)
    done[id(value)] = value  # a function that encloses itself
    cells = [] if value.__closure__ is None else list(value.__closure__)
    inside = [*(_content(cell) for cell in cells), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    found = [_translated(item, twins, done) for item in inside]
    if all(new is old for new, old in zip(found, inside, strict=True)):
        return value
    defaults = len(value.__defaults__ or ())
    new = types.FunctionType(
        value.__code__,
        value.__globals__,
        value.__name__,
        tuple(found[len(cells) : len(cells) + defaults]) or None,
        tuple(
            cell if _content(cell) is item else types.CellType(item) for cell, item in zip(cells, found, strict=False)
        ),
    )
    new.__kwdefaults__ = dict(zip(value.__kwdefaults__ or {}, found[len(cells) + defaults :], strict=True)) or None
    new.__dict__.update(value.__dict__)
    return new


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


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
