"""Completions of values: export targets, families, methods, and keys of the configuration with their choices.

Registries are imported when a shell asks for one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, get_args, get_origin

import click


def targets(ctx: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """Names of export targets."""
    from mlorq.export_targets import TARGETS

    return _beginning(typed, TARGETS.names())


def runtimes(ctx: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """Names of runtimes."""
    from mlorq.runtimes import RUNTIMES

    return _beginning(typed, RUNTIMES.names())


def families(ctx: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """Names of model families."""
    from mlorq.models.family import FAMILIES

    return _beginning(typed, FAMILIES.names())


def methods(ctx: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """Names of methods, after those that are typed already: ``gptq,er`` becomes ``gptq,erq``."""
    from flows.comparison_methods import known_methods

    before, comma, last = typed.rpartition(",")
    known = [name for name in known_methods() if name not in before.split(",")]
    return [before + comma + name for name in _beginning(last, known)]


def target_options(ctx: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """Options of the export target that the line names, else of all."""
    from mlorq.export_targets import TARGETS

    chosen = [target for target in TARGETS if ctx.params.get("to") in (None, target.name)]
    return _beginning(typed, sorted({f"{name}=" for target in chosen for name in target.settings.model_fields}))


def setting_values(ctx: click.Context, option: click.Parameter, typed: str) -> list[str]:
    """Keys of the configuration, and after ``=`` the choices of a key."""
    from mlorq.config.run import run_config

    keys = dict(_keys(run_config(), ""))
    key, equals, value = typed.partition("=")
    if equals:
        return [f"{key}={name}" for name in _beginning(value, keys.get(key, []))]
    return _beginning(typed, [f"{name}=" for name in keys])


def _keys(section: Any, before: str) -> Iterator[tuple[str, list[str]]]:
    """Dotted keys of a section, with their choices."""
    from flows.template import choices_of

    for name, field in section.model_fields.items():
        kinds = (field.annotation, *(get_args(field.annotation) if get_origin(field.annotation) is UnionType else ()))
        inner = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
        if inner is not None:
            yield from _keys(inner, f"{before}{name}.")
        elif not field.exclude:
            yield before + name, [str(choice) for choice in choices_of(field.annotation)]


def _beginning(typed: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(typed)]
