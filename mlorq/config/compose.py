"""Sections of a configuration that are made from a registry: its names as choices, its settings as keys.

A section such as ``rounding`` is flat for its user: ``{method: lra, iterations: 500}``. In the code every method has
settings of its own. ``composed`` gives the flat section, a subclass of the fixed part with the keys of all registered
implementations; ``Choice.own`` goes back from a flat section to the settings of the one that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, Field, create_model, model_validator
from pydantic.fields import FieldInfo

from mlorq.registry import Named, Registry, Settings

Section = TypeVar("Section", bound=Settings)
Own = TypeVar("Own", bound=Settings)


class Choice(Settings):
    """A section that picks one implementation of a registry by name.

    Attributes:
        chooser: the key that names it: ``method``.
        registry: where it is looked up.
    """

    chooser: ClassVar[str]
    registry: ClassVar[Registry[Any]]

    @property
    def own(self) -> Settings:
        """The settings of the implementation that was chosen, with what the section says of them."""
        settings: type[Settings] = self.registry[getattr(self, self.chooser)].settings
        return part(self, settings)

    @model_validator(mode="after")
    def _check_own(self) -> Choice:
        self.own.check()
        self.check()
        return self


def part(section: BaseModel, settings: type[Own]) -> Own:
    """What a flat section says of the keys of one implementation."""
    given = {key: getattr(section, key) for key in settings.model_fields if key in type(section).model_fields}
    return settings.model_validate(given)


def composed(
    base: type[Section],
    items: Iterable[Named],
    replaced: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> type[Section]:
    """The flat section of some implementations.

    Args:
        base: its fixed part.
        items: the implementations whose keys it has, after its own.
        replaced: other types of fixed keys, such as the choices of a name.
        about: what the replaced keys mean, where that follows from the implementations too.

    Raises:
        ValueError: two implementations, or one and the fixed part, define a key differently.
    """
    fields: dict[str, Any] = {}
    for name, annotation in (replaced or {}).items():
        info = base.model_fields[name]
        limits = Annotated[(annotation, *info.metadata)] if info.metadata else annotation
        fields[name] = (limits, _described(info, (about or {}).get(name, info.description)))
    for name, (info, meaning) in keys_of(items, base).items():
        fields[name] = (limited(info), _described(info, meaning))
    made: type[Section] = create_model(base.__name__, __base__=base, __doc__=base.__doc__, **fields)
    return made


def keys_of(items: Iterable[Named], base: type[Settings] | None = None) -> dict[str, tuple[FieldInfo, str]]:
    """``{key: (field, what it means)}`` of some implementations; ``base`` has keys of its own.

    What a key means starts with the names of the implementations that read it, where not all of them do.

    Raises:
        ValueError: see ``composed``.
    """
    items = list(items)
    owners: dict[str, list[str]] = {}
    fields: dict[str, FieldInfo] = {}
    for item in items:
        for key, info in item.settings.model_fields.items():
            if base is not None and key in base.model_fields:
                _require_same(key, info, base.model_fields[key], item.name, base.__name__)
                continue
            if key in fields:
                _require_same(key, info, fields[key], item.name, owners[key][0])
            fields.setdefault(key, info)
            owners.setdefault(key, []).append(item.name)
    found = {}
    for key, info in fields.items():
        some = len(owners[key]) < len(items)
        found[key] = (info, f"{', '.join(owners[key])}: {info.description}" if some else info.description or "")
    return found


def choices(registry: Registry[Any]) -> Any:
    """The type of a key that names one implementation."""
    return Literal[tuple(registry.names())]


def limited(info: FieldInfo) -> Any:
    """A field's type with its limits (``ge`` and the like)."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def default_of(info: FieldInfo) -> Any:
    """A field's default, made anew where a factory makes it."""
    return info.get_default(call_default_factory=True)


def _described(info: FieldInfo, about: str | None) -> Any:
    """A new field with the default of another; without ``about`` its annotation may describe it."""
    description: dict[str, Any] = {} if about is None else {"description": about}
    if info.default_factory is not None:
        factory: Callable[[], Any] = info.default_factory  # type: ignore[assignment]
        return Field(default_factory=factory, **description)
    return Field(info.default, **description)


def _require_same(key: str, info: FieldInfo, other: FieldInfo, name: str, owner: str) -> None:
    ours, theirs = ((one.annotation, one.metadata, default_of(one)) for one in (info, other))
    if repr(ours) != repr(theirs):
        raise ValueError(f"{name}: the key {key!r} is defined otherwise by {owner}")
