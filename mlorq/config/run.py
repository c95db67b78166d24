"""The configuration of a run: one YAML file, one frozen ``RunConfig``.

An unknown key is an error that names the nearest valid one; for a key or value of earlier versions, the error says what
to do instead. A preset sets the defaults of ``search`` and ``rounding``; explicit values win over it. The
round-trip through ``RunConfig.to_yaml`` and ``RunConfig.from_yaml`` is lossless.

``run_config`` composes the sections whose choices and keys come from registries (``mlorq.config.compose``): the class
of a loaded configuration is a subclass of ``RunConfig`` with the keys of all registered implementations.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self, get_args, get_origin

import fsspec
import yaml
from pydantic import BeforeValidator, Field, ValidationError, create_model, model_validator
from pydantic_core import ErrorDetails

from mlorq.artifacts.locations import folder_of_url, resolve_location, url_of_store
from mlorq.codecs.base import Residency
from mlorq.config.bounded import MOST_CHARACTERS, check_values, read_yaml
from mlorq.config.budget import Budget, budget_text, parse_budgets
from mlorq.config.goal import GoalConfig
from mlorq.config.presets import DEFAULT_PRESET, PRESETS, Preset
from mlorq.config.sections import (
    ActivationsConfig,
    Cost,
    DaskConfig,
    DataConfig,
    DockerConfig,
    EmbeddingsConfig,
    EngineConfig,
    ExportConfig,
    LayerConfig,
    ModelConfig,
    RayConfig,
    RoundingConfig,
    SearchConfig,
    Sensitivity,
    SourceConfig,
    activations_section,
    export_section,
    model_section,
    registries_version,
    rounding_section,
    search_section,
    source_section,
)
from mlorq.config.target import TargetConfig, target_section
from mlorq.config.tracking import TrackingConfig
from mlorq.errors import SECRET_KEY, BudgetError, ConfigError, hide_secrets
from mlorq.registry import Settings

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "ActivationsConfig",
    "Cost",
    "DaskConfig",
    "DataConfig",
    "DockerConfig",
    "EmbeddingsConfig",
    "EngineConfig",
    "ExportConfig",
    "GoalConfig",
    "LayerConfig",
    "ModelConfig",
    "Preset",
    "RayConfig",
    "RoundingConfig",
    "RunConfig",
    "SearchConfig",
    "Sensitivity",
    "SourceConfig",
    "TargetConfig",
    "TrackingConfig",
    "location_and_folder",
    "read_values",
    "texts_of",
]


DEFAULT_STORE = "file://./.mlorq"
STORE = "MLORQ_STORE"  # variable of the environment: the default store, for machines with folders that are read-only
REMOVED_KEYS = {
    "search.rounds": "removed; allocations are those of the integer program; delete the key",
    "search.tolerance": "removed; closed_form measures one candidate per layer; delete the key",
}
REMOVED_VALUES = {("search.sensitivity", "auto"): "auto was removed; use closed_form"}


def _budget_texts(value: Any) -> Any:
    try:
        return [budget_text(one) for one in value] if isinstance(value, list) else budget_text(value)
    except BudgetError as error:  # of a configuration, which names the key
        raise ValueError(str(error)) from None


class RunConfig(Settings):
    """The configuration of a run. Relative paths start from the folder of the configuration file."""

    model: ModelConfig
    data: DataConfig
    budget: Annotated[str | list[str], BeforeValidator(_budget_texts)] = Field(
        "3bit",
        description='"3bit", "12.5%", "25MB", "25MiB", or a list; with a target also {disk: 25MB, memory: 40MB}',
    )
    preset: Preset = Field(
        DEFAULT_PRESET,
        description="defaults of search and rounding: best; paper: the published method with its settings; quick: the "
        "published method with fewer samples, probes and iterations",
    )
    search: SearchConfig = Field(default_factory=SearchConfig)
    rounding: RoundingConfig = Field(default_factory=RoundingConfig)
    embeddings: EmbeddingsConfig | None = Field(
        None, description="quantized embedding tables, for example {bits: 8}; null: they stay float"
    )
    activations: ActivationsConfig | None = Field(
        None, description="quantized activations, for example {bits: 4, method: repq}; null: they stay float"
    )
    target: TargetConfig | None = Field(
        None,
        description="runtime that the model is meant for, for example onnxruntime: the search uses forms and widths "
        "that it computes with, and budgets may bound its memory; null: any",
    )
    export: list[ExportConfig] = Field(
        [],
        description="files to write from every checkpoint, for example [{to: onnx, precision: fast}], as mlorq export",
    )
    goal: GoalConfig | None = Field(
        None,
        description="metric that compressed models must keep, for example {max_drop: 1%}: results and messages say "
        "whether they do; null: none",
    )
    tracking: TrackingConfig | None = Field(
        None, description="experiment trackers that runs are logged to, for example {mlflow: {}}; null: none"
    )
    store: str = Field(
        DEFAULT_STORE,
        description="fsspec URL of the artifact store, or block:TYPE/NAME of Prefect; "
        f"the default is that of {STORE} if it is set",
    )
    engine: EngineConfig = Field(default_factory=EngineConfig)
    seed: int = Field(0, ge=0, description="seed of all random numbers")
    folder: str = Field("", exclude=True, description="folder that relative paths start from")

    @model_validator(mode="after")
    def _refuse_secrets(self) -> Self:
        """Configurations are parameters of flows, which servers store and show."""
        for key, text in (("folder", self.folder), *texts_of(self.model_dump(mode="json"), "")):
            named = bool(text) and SECRET_KEY.fullmatch(key.rpartition(".")[2]) is not None
            shown = "its value" if named else hide_secrets(text)
            if shown != text:
                raise ValueError(
                    f"{key}: {shown} holds a secret, and configurations are stored: leave it out, and give it to the "
                    "file system's driver by its environment variables or fsspec's configuration (docs/STORES.md)"
                )
        return self

    @property
    def budgets(self) -> list[Budget]:
        """The parsed budgets.

        Raises:
            BudgetError: a budget is malformed.
        """
        return parse_budgets(self.budget)

    @classmethod
    def from_mapping(cls, values: dict[str, Any], folder: str = "") -> RunConfig:
        """A validated configuration from plain values, completed with the preset's defaults.

        Args:
            values: the configuration as YAML would give it. Without a store, or with the default one, the environment
                variable ``MLORQ_STORE`` decides.
            folder: folder that relative paths start from.

        Raises:
            ConfigError: a key is unknown or a value is invalid; the message names the first problem.
        """
        if not isinstance(values, dict):
            raise ConfigError("a configuration must be a mapping of keys to values")
        check_values(values)
        if "folder" in values:
            raise ConfigError("unknown key 'folder': relative paths start from the folder of the file")
        values = dict(values)
        preset = values.get("preset", DEFAULT_PRESET)
        for section, defaults in PRESETS.get(preset if isinstance(preset, str) else "", {}).items():
            given = values.get(section)
            if given is None or isinstance(given, dict):
                values[section] = {**defaults, **(given or {})}
        if values.get("store", DEFAULT_STORE) == DEFAULT_STORE and os.environ.get(STORE):
            values["store"] = os.environ[STORE]
        if isinstance(values.get("store"), str):
            values["store"] = url_of_store(values["store"])
        known = run_config()
        try:
            return known.model_validate({**values, "folder": folder})
        except ValidationError as error:
            raise ConfigError(_explain(error, known)) from None

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: dict[str, Any] | None = None) -> RunConfig:
        """Read and validate a configuration file.

        Args:
            path: path or fsspec URL of the file; relative paths in the configuration start from its folder.
            overrides: ``{dotted key: value}``, as in ``{"search.samples": 32}``; these win over the file's values.

        Raises:
            ConfigError: the file is missing or is not YAML, or a key or value is invalid.
        """
        location, folder = location_and_folder(path)
        values = read_values(location, overrides)
        try:
            return cls.from_mapping(values, folder)
        except ConfigError as error:
            raise ConfigError(f"{hide_secrets(location)}: {error}") from None

    def to_yaml(self) -> str:
        """The configuration as YAML, from which ``from_yaml`` restores an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude={"folder"}), sort_keys=False)

    @property
    def residency(self) -> Residency | None:
        """How the runtime that the model is meant for holds the weights of linear layers; None without ``target``."""
        static = self.activations is not None and getattr(self.activations, "ranges", None) != "token"
        return None if self.target is None else self.target.residency(static=static)

    def resolve(self, location: str) -> str:
        """The absolute path or URI of a location in the configuration."""
        return resolve_location(location, self.folder)


def texts_of(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts in a value, with their dotted keys.

    Args:
        value: JSON values, such as those of a configuration.
        key: dotted key of the value itself; empty for a whole configuration.
    """
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from texts_of(item, f"{key}.{name}" if key else str(name))


def run_config() -> type[RunConfig]:
    """The subclass of ``RunConfig`` with the choices and keys of all registered implementations."""
    return _run_config(registries_version())


@cache
def _run_config(_: int) -> type[RunConfig]:
    sources: Any = {name: (source_section(), ...) for name in DataConfig.model_fields}
    data = create_model("DataConfig", __base__=DataConfig, __doc__=DataConfig.__doc__, **sources)
    sections: dict[str, Any] = {
        "model": (model_section(), ...),
        "data": (data, ...),
        "search": (search_section(), Field(default_factory=search_section())),
        "rounding": (rounding_section(), Field(default_factory=rounding_section())),
        "activations": (activations_section() | None, RunConfig.model_fields["activations"]),
        "target": (target_section() | None, RunConfig.model_fields["target"]),
        "export": (list[export_section()], RunConfig.model_fields["export"]),  # type: ignore[misc]
    }
    made: type[RunConfig] = create_model("RunConfig", __base__=RunConfig, __doc__=RunConfig.__doc__, **sections)
    return made


def location_and_folder(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Path or URL of a configuration file, and the folder that relative paths in it start from."""
    location = os.fspath(path)
    scheme, separator, rest = location.partition("://")
    if not separator or scheme in ("file", "local"):
        location = rest or location
        return location, str(Path(location).resolve().parent)
    return location, folder_of_url(location)


def read_values(location: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    """The values of a configuration file with overrides applied; without defaults, and not validated.

    Args:
        location: path or fsspec URL of the file.
        overrides: ``{dotted key: value}``.

    Raises:
        ConfigError: the file cannot be read, or an override sets a key below a value.
    """
    values = _read_mapping(location)
    for key, value in (overrides or {}).items():
        _set_dotted(values, key, value)
    return values


def _read_mapping(location: str) -> dict[str, Any]:
    """The content of a YAML file at a path or an fsspec URL."""
    shown = f"configuration {hide_secrets(location)}"
    try:
        with fsspec.open(location, "rt") if "://" in location else open(location, encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise ConfigError(f"{shown} does not exist") from None
    except Exception as error:  # file-system drivers raise exceptions of any type
        raise ConfigError(f"{shown} cannot be read: {error}") from None
    values = read_yaml(text, shown)
    if not isinstance(values, dict):
        raise ConfigError(f"{shown} is not a mapping of keys to values")
    return values


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        if values.get(part) is None:
            values[part] = {}
        values = values[part]
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(parents[: depth + 1])} is a value, not a section: cannot set {key}")
    values[last] = value


def _inside(section: Any, part: str) -> Any:
    """The type of a field of a section, or of the values if the section is a mapping; None if it is unknown."""
    if get_origin(section) is dict:
        return get_args(section)[1]
    found = section.model_fields[part].annotation if hasattr(section, "model_fields") else None
    if get_origin(found) is dict:
        return found
    return next((kind for kind in get_args(found) if hasattr(kind, "model_fields")), found)  # of ``Section | None``


def _known_keys(config: type[RunConfig], key: tuple[int | str, ...]) -> list[str]:
    """The keys of the section that ``key`` is in."""
    section: Any = config
    for part in key[:-1]:
        section = section if isinstance(part, int) else _inside(section, part)
    return [name for name in getattr(section, "model_fields", {}) if name != "folder"]


def _nearest(key: tuple[int | str, ...], known: Sequence[str]) -> str | None:
    """The known key of a section that an unknown one resembles most; None if it resembles none."""
    return next(iter(difflib.get_close_matches(str(key[-1]), known, n=1, cutoff=0.4)), None)


def _first(problems: Sequence[ErrorDetails], config: type[RunConfig]) -> ErrorDetails:
    """The problem to name: the first, or if that is a missing key, the unknown key that misspells it."""
    first = problems[0]
    if first["type"] == "missing":
        *section, missing = first["loc"]
        for one in problems:
            beside = one["type"] == "extra_forbidden" and [*one["loc"][:-1]] == section
            if beside and _nearest(one["loc"], _known_keys(config, one["loc"])) == missing:
                return one
    return first


def _explain(error: ValidationError, config: type[RunConfig]) -> str:
    """One problem of a failed validation, as one line that names the key."""
    problem = _first(error.errors(), config)
    where = ".".join(str(part) for part in problem["loc"])
    given = problem["input"]
    if problem["type"] == "extra_forbidden":
        if where in REMOVED_KEYS:
            return f"{where}: {REMOVED_KEYS[where]}"
        known = _known_keys(config, problem["loc"])
        near = _nearest(problem["loc"], known)
        return f"unknown key {where!r}" + (f"; did you mean {near!r}?" if near else f"; known: {', '.join(known)}")
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    if isinstance(given, str) and (where, given) in REMOVED_VALUES:
        return f"{where}: {REMOVED_VALUES[where, given]}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, (dict, list)) else f" (given: {given!r:.200})"
    return f"{where}: {message}{shown}" if where else message
