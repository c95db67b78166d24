"""Configuration sections composed from a registry: its names are the choices, its settings are the keys.

A section such as ``rounding`` is flat for the user: ``{method: lra, iterations: 500}``. In the code every method has
its own settings class. ``composed`` returns the flat section: a subclass of the fixed part with the keys of all
registered implementations. ``Choice.own`` extracts the settings of the chosen implementation from a flat section.
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
    """A section that selects one implementation of a registry by name.

    Attributes:
        chooser: the key that holds the name: ``method``.
        registry: the registry of the implementations.
    """

    chooser: ClassVar[str]
    registry: ClassVar[Registry[Any]]

    @property
    def own(self) -> Settings:
        """The settings of the chosen implementation, with the values of this section."""
        settings: type[Settings] = self.registry[getattr(self, self.chooser)].settings
        return part(self, settings)

    @model_validator(mode="after")
    def _check_own(self) -> Choice:
        self.own.check()
        self.check()
        return self


def part(section: BaseModel, settings: type[Own]) -> Own:
    """The settings of one implementation, with the values that a flat section gives them."""
    given = {key: getattr(section, key) for key in settings.model_fields if key in type(section).model_fields}
    return settings.model_validate(given)


def composed(
    base: type[Section],
    items: Iterable[Named],
    replaced: Mapping[str, Any] | None = None,
    about: Mapping[str, str] | None = None,
) -> type[Section]:
    """The flat section of several implementations: a subclass of ``base`` with their keys.

    Args:
        base: the fixed part.
        items: the implementations; their keys follow those of ``base``.
        replaced: new types of keys of ``base``, such as the choices of a name.
        about: new descriptions of replaced keys; default: those of ``base``.

    Raises:
        ValueError: two implementations, or an implementation and the fixed part, define a key differently.
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
    """``{key: (field, description)}`` of several implementations, without the keys of ``base``.

    If only some of the implementations read a key, its description starts with their names.

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


def require_known(section: Choice, chosen: type[Settings], named: str) -> None:
    """Refuse options of a flat section that are set and that the chosen implementation does not have.

    Raises:
        ValueError: one is set; the message lists those that it has.
    """
    known = chosen.model_fields
    for name, info in type(section).model_fields.items():
        if name not in known and name != section.chooser and getattr(section, name) != info.get_default():
            listed = ", ".join(sorted(known)) or "none"
            raise ValueError(f"{named} has no option {name!r}; known: {listed}")


def choices(registry: Registry[Any]) -> Any:
    """The type of a key that holds the name of an implementation: a ``Literal`` of all names."""
    return Literal[tuple(registry.names())]


def limited(info: FieldInfo) -> Any:
    """A field's type with its constraints (``ge``, ``le``, …)."""
    return Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation


def default_of(info: FieldInfo) -> Any:
    """A field's default; a default factory is called."""
    return info.get_default(call_default_factory=True)


def _described(info: FieldInfo, about: str | None) -> Any:
    """A new field with the default of another and the description ``about``; None: leave it to the annotation."""
    description: dict[str, Any] = {} if about is None else {"description": about}
    if info.default_factory is not None:
        factory: Callable[[], Any] = info.default_factory  # type: ignore[assignment]
        return Field(default_factory=factory, **description)
    return Field(info.default, **description)


def _require_same(key: str, info: FieldInfo, other: FieldInfo, name: str, owner: str) -> None:
    ours, theirs = ((one.annotation, one.metadata, default_of(one)) for one in (info, other))
    if repr(ours) != repr(theirs):
        raise ValueError(f"{name}: {owner} defines the key {key!r} differently: use its definition or another key")
