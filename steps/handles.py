"""Handles: references to the model, data and artifacts that a step takes as inputs; its context resolves them.

A step declares its inputs as a frozen dataclass whose fields are handles (``ArtifactRef``, ``ModelRef``, ``DataRef``),
optional handles, mappings ``{name: handle}`` or tuples of handles. In a message and in a key they are a flat mapping
from roles: ``capture``, ``candidates/blocks.0.up`` of a mapping, ``rounded/3`` of a tuple; an input that is None or
empty has no role.
"""

from __future__ import annotations

import types
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef
from mlorq.errors import StoreError


@dataclass(frozen=True)
class ModelRef:
    """The float model that a step works with.

    Attributes:
        key: hash of the float model as given.
        activations: the ``activations`` or ``joint`` artifact whose plan quantizes its activations; its LayerNorms are
            folded accordingly. None: the model as given.
    """

    key: str
    activations: ArtifactRef | None = None

    @property
    def digest(self) -> str:
        """One key for the model and its activation plan."""
        return self.key if self.activations is None else digest_json([self.key, self.activations.key])


@dataclass(frozen=True)
class DataRef:
    """Calibration or evaluation data, identified by the hash of its samples."""

    key: str


Handle = ArtifactRef | ModelRef | DataRef
Inputs = TypeVar("Inputs")


def key_of(handle: Handle) -> str:
    """The contribution of a handle to the key of a step that reads it."""
    return handle.digest if isinstance(handle, ModelRef) else handle.key


def handle_to_json(handle: Handle) -> dict[str, Any]:
    """JSON form, read back by ``handle_from_json``."""
    if isinstance(handle, ArtifactRef):
        return dict(handle.to_json())
    if isinstance(handle, DataRef):
        return {"data": handle.key}
    activations = None if handle.activations is None else handle.activations.to_json()
    return {"model": handle.key, "activations": activations}


def handle_from_json(value: Mapping[str, Any]) -> Handle:
    """The inverse of ``handle_to_json``.

    Raises:
        KeyError: a part is missing.
    """
    if "data" in value:
        return DataRef(value["data"])
    if "model" in value:
        activations = value["activations"]
        return ModelRef(value["model"], None if activations is None else ArtifactRef.from_json(activations))
    return ArtifactRef.from_json(value)


# -- records of handles -----------------------------------------------------------------------------------------


def roles_of(inputs: Any) -> dict[str, Handle]:
    """The handles of an inputs record by role, in the order of its fields."""
    return dict(_walk(inputs))


def _walk(inputs: Any) -> Iterator[tuple[str, Handle]]:
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, Handle):
            yield field.name, value
        elif isinstance(value, Mapping):
            yield from ((f"{field.name}/{name}", handle) for name, handle in value.items())
        elif value is not None:
            yield from ((f"{field.name}/{index}", handle) for index, handle in enumerate(value))


def inputs_of(record: type[Inputs], roles: Mapping[str, Handle]) -> Inputs:
    """The inverse of ``roles_of``.

    Args:
        record: the step's class of inputs.
        roles: handles by role.

    Raises:
        StoreError: a role is missing or unknown, or its handle has the wrong type.
    """
    values: dict[str, Any] = {}
    for name, (many, kind, optional) in _shape(cast(Hashable, record)).items():
        prefix = f"{name}/"
        found = {role.removeprefix(prefix): handle for role, handle in roles.items() if role.startswith(prefix)}
        own = list(found.values()) if many else [roles[name]] if name in roles else []
        if not (own or many or optional):
            raise StoreError(f"{record.__module__}: input {name!r} is missing")
        for handle in own:
            if not isinstance(handle, kind):
                raise StoreError(
                    f"{record.__module__}: input {name!r} has type {type(handle).__name__}, not {kind.__name__}"
                )
        if many is tuple:
            values[name] = tuple(found[str(index)] for index in range(len(found)))
        elif many is Mapping:
            values[name] = found
        else:
            values[name] = own[0] if own else None
    unknown = [role for role in roles if role not in values and role.partition("/")[0] not in values]
    if unknown:
        raise StoreError(f"{record.__module__}: unknown input {unknown[0]!r}")
    return record(**values)


@cache
def _shape(record: Hashable) -> dict[str, tuple[type | None, type, bool]]:
    """``{field: (Mapping, tuple or None for a single handle, class of the handles, whether it may be None)}``."""
    found: dict[str, tuple[type | None, type, bool]] = {}
    for name, hint in get_type_hints(record).items():
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            (kind,) = (one for one in arguments if one is not type(None))
            found[name] = (None, kind, True)
        elif origin is tuple:
            found[name] = (tuple, arguments[0], False)
        elif origin is not None and issubclass(origin, Mapping):
            found[name] = (Mapping, arguments[1], False)
        else:
            found[name] = (None, hint, False)
    return found
