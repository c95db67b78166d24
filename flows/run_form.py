"""The form of a flow run in Prefect's UI, generated from the configuration's classes.

Only Prefect uses the form's schema: the UI renders it on the page that starts a run, and the server rejects values that
do not match it. Flows have ``validate_parameters=False`` and read plain values with ``read_config``, so wrong values
give the same one-line errors as on the command line.

The form differs from ``RunConfig`` in two ways. It has no ``folder``. And every value of ``search`` and ``rounding``
defaults to None: the page sends all values that it shows, and a sent value would override the preset's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.fields import FieldInfo

from flows.permissions import check_permitted, check_place, is_limited
from mlorq.artifacts.locations import absolute_folder, resolve_location
from mlorq.config.run import PRESETS, RunConfig, location_and_folder, read_values, run_config
from mlorq.errors import ConfigError, hide_secrets
from mlorq.rounding import METHODS

BY_PRESET = ("search", "rounding")
LEFT_OUT = ("folder",)  # a separate parameter of the flows


def _run_form() -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name, field in run_config().model_fields.items():
        if name in BY_PRESET:
            section = _section(field)
            assert section is not None
            about = f"{_summary(section)} None: the preset's values."
            fields[name] = (_preset_form(name, section) | None, Field(None, description=about))
        elif name not in LEFT_OUT:
            fields[name] = _field(field)
    return _make(RunConfig, "Configuration", fields)


def _form(section: type[BaseModel]) -> type[BaseModel]:
    """A section as a form."""
    return _make(section, _title(section), {name: _field(field) for name, field in section.model_fields.items()})


def _field(field: FieldInfo) -> tuple[Any, Any]:
    """A form field: type with limits, explicit default (the UI does not show those of factories), description."""
    section = _section(field)
    default = ... if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        default = default.model_dump(mode="json")
    about = field.description or (_summary(section) if section else None)
    return (_form(section) if section else _limited(field)), Field(default, description=about)


def _preset_form(name: str, section: type[BaseModel]) -> type[BaseModel]:
    """A section in which every value defaults to None; the descriptions have the values that None stands for."""
    fields: dict[str, Any] = {}
    for key, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        texts = {
            preset: _text(values.get(name, {}).get(key, default))
            for preset, values in PRESETS.items()
            if key in values.get(name, {}) or _reads(name, values.get(name, {}), key)
        }
        same = len(set(texts.values())) == 1
        said = _text(default) if same else "; ".join(f"{preset}: {text}" for preset, text in texts.items())
        about = f"{field.description} (None means {said})"
        fields[key] = (_limited(field) | None, Field(None, description=about))
    return _make(section, _title(section), fields)


def _reads(name: str, values: Mapping[str, Any], key: str) -> bool:
    """Whether a preset's rounding method reads a key; other sections read all of theirs."""
    method = str(values.get("method"))
    if name != "rounding" or method not in METHODS or key == "method":
        return True
    return key in METHODS[method].settings.model_fields


def _make(section: type[BaseModel], title: str, fields: dict[str, Any]) -> type[BaseModel]:
    # Not a subclass of the section: the run makes the section's checks, with messages that name the key. Prefect's
    # page shows the title.
    config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), title=title)
    made: type[BaseModel] = create_model(f"{title}Form", __config__=config, __doc__=_summary(section), **fields)
    return made


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _limited(field: FieldInfo) -> Any:
    """A field's type with its limits (``ge`` and the like)."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _title(section: type[BaseModel]) -> str:
    return section.__name__.removesuffix("Config")


def _summary(section: type[BaseModel]) -> str:
    return (section.__doc__ or "").strip().splitlines()[0]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_text(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


if TYPE_CHECKING:
    RunForm = dict[str, Any]  # values of a configuration, as the page sends them
else:
    RunForm = _run_form()
ConfigFile = Annotated[
    str,
    Field(title="File", description="a configuration file instead: path or fsspec URL on the machine of the run"),
]


def read_config(config: Any, folder: str = "") -> RunConfig:
    """The configuration in a flow's parameters.

    Args:
        config: plain values, or the path or fsspec URL of a configuration file.
        folder: path or URL; base of relative paths in plain values, and of a relative ``config`` path. Default: the
            working directory. Relative paths in a file start from the file's folder.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is wrong; the first problem is named. Or a
            deployment started the run, and it names something that the owner of the worker does not allow.
    """
    return _read(config, folder)[0]


def explicit_values(config: Any, folder: str = "") -> tuple[Any, str]:
    """The explicit values in a flow's parameters, without defaults of a preset, and the base folder of paths.

    Args:
        config, folder: as for ``read_config``.

    Raises:
        ConfigError: as for ``read_config``.
    """
    return _read(config, folder)[1:]


def _read(config: Any, folder: str) -> tuple[RunConfig, Any, str]:
    """The configuration, its explicit values, and its folder: the only place where flows take parameters."""
    limited = is_limited()
    if limited and folder:
        check_place("folder", absolute_folder(folder))
    folder = absolute_folder(folder) if folder else ""
    named = ""
    if isinstance(config, str):
        location = resolve_location(config, folder)
        if limited:
            check_place("config", location)
        location, folder = location_and_folder(location)
        config, named = read_values(location), f"{hide_secrets(location)}: "
    elif isinstance(config, BaseModel):
        config = config.model_dump(mode="json")
    if not named and isinstance(config, Mapping):
        config = {name: _without_none(value) if name in BY_PRESET else value for name, value in config.items()}
    try:
        found = RunConfig.from_mapping(config, folder)
        if limited:
            check_permitted(found)
    except ConfigError as error:
        raise ConfigError(f"{named}{error}") from None
    return found, config, folder


def _without_none(section: Any) -> Any:
    """A section as the form sends it, without the values that the preset decides."""
    if not isinstance(section, Mapping):
        return section
    return {key: value for key, value in section.items() if value is not None}
