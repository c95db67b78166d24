"""``mlorq init``: a commented configuration, generated from the configuration's classes so that it stays up to date.

Keys that a preset sets are commented out, with the preset's value: an explicit value would override the preset.
"""

from __future__ import annotations

import json
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mlorq.config.run import DEFAULT_PRESET, PRESETS, EmbeddingsConfig, EngineConfig, RunConfig
from mlorq.config.sections import activations_section, model_section, rounding_section, search_section, source_section
from mlorq.config.target import target_section
from mlorq.errors import ConfigError
from mlorq.models.family import FAMILIES

COMMENT_COLUMN = 44


def template(model: str | None = None) -> str:
    """A configuration file with every key, its meaning and its default.

    Args:
        model: ``FAMILY`` or ``FAMILY:NAME``, as in ``timm:deit_small_patch16_224``; default: the first family.

    Raises:
        ConfigError: the family is unknown.
    """
    known = FAMILIES.names()
    family, _, name = (known[0] if model is None else model).partition(":")
    if family not in known:
        raise ConfigError(f"--model {model!r}: the family is one of {', '.join(known)}, as in {known[0]}:NAME")
    example = FAMILIES[family].example()
    # The active keys of the file; all others are commented out with their defaults.
    model_values = {"family": family, **example.model} | ({example.name_key: name} if name else {})
    data = example.data
    preset = PRESETS[DEFAULT_PRESET]
    lines = [
        "# A run of mlorq. Relative paths start from this file's folder. `mlorq compress FILE --dry-run` shows what",
        "# a run would do; `mlorq compress FILE` runs it. Keys that are commented out have the value shown.",
        "",
        *_section("model", model_section(), model_values),
        "",
        "data:",
        *_section(
            "calibration", source_section(), data["calibration"], indent=2, title="Data of the search and the rounding."
        ),
        *_section("evaluation", source_section(), data["evaluation"], indent=2, title="Data of the metric."),
        "",
    ]
    lines += [_line(RunConfig, name, _default(RunConfig, name)) for name in ("budget", "preset")]
    lines += [
        "",
        *_section("search", search_section(), {}, defaults=preset["search"]),
        "",
        *_section("rounding", rounding_section(), {}, defaults=preset["rounding"]),
        "",
    ]
    optional: dict[str, type[BaseModel]] = {
        "embeddings": EmbeddingsConfig,
        "activations": activations_section(),
        "target": target_section(),
    }
    for name, section in optional.items():
        lines.append(_line(RunConfig, name, None))
        # Not as single keys to uncomment: the section as a whole is null.
        lines += [f"#   {_line(section, key, value)}" for key, value in _all_defaults(section).items()]
    lines += [
        _line(RunConfig, name, _default(RunConfig, name)) for name in ("export", "goal", "tracking", "store", "seed")
    ]
    lines += ["", *_section("engine", EngineConfig, _all_defaults(EngineConfig))]
    return "\n".join(lines) + "\n"


def _section(
    name: str,
    section: type[BaseModel],
    live: dict[str, Any],
    *,
    defaults: dict[str, Any] | None = None,
    indent: int = 0,
    title: str | None = None,
) -> list[str]:
    """A section: active keys, then the others, commented out."""
    space = " " * indent
    title = title or (section.__doc__ or "").strip().splitlines()[0]
    lines = [f"{space}# {title}", f"{space}{name}:"]
    shown = _all_defaults(section) | (defaults or {})
    for key in section.model_fields:
        if key in live:
            lines.append(_line(section, key, live[key], indent=indent + 2))
    for key in section.model_fields:
        if key not in live:
            lines.append(_line(section, key, shown.get(key), indent=indent + 2, live=False))
    return lines


def _line(section: type[BaseModel], key: str, value: Any, *, indent: int = 0, live: bool = True) -> str:
    field = section.model_fields[key]
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    # JSON is YAML, on one line.
    text = value if isinstance(value, str) and _is_plain(value) else json.dumps(value, ensure_ascii=False)
    start = f"{' ' * indent}{'' if live else '# '}{key}: {text}"
    about = _about(field)
    return f"{start:<{COMMENT_COLUMN}} # {about}" if about else start


def _about(field: FieldInfo) -> str:
    """A field's description, with its permitted values if they are enumerated."""
    choices = choices_of(field.annotation)
    about = field.description or ""
    missing = [str(choice) for choice in choices if str(choice) not in about]
    return f"{about} ({' | '.join(str(choice) for choice in choices)})" if missing and len(choices) > 1 else about


def choices_of(annotation: Any) -> list[Any]:
    """The permitted values of a type, if they are enumerated."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for part in get_args(annotation) for choice in choices_of(part)]


def _is_plain(text: str) -> bool:
    """Whether YAML reads the text back as the same string without quotes."""
    import yaml

    try:
        return bool(yaml.safe_load(f"a: {text}") == {"a": text}) and " #" not in text
    except yaml.YAMLError:
        return False


def _default(section: type[BaseModel], key: str) -> Any:
    return section.model_fields[key].get_default(call_default_factory=True)


def _all_defaults(section: type[BaseModel]) -> dict[str, Any]:
    return {key: None if field.is_required() else _default(section, key) for key, field in section.model_fields.items()}
