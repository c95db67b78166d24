"""What a run that a deployment started may name: code, containers and locations that the owner of the worker allows.

Whoever may start a run of a deployment, or send an event that starts one, chooses its parameters. They are data: unless
the environment of the worker allows it, they name no code (``RULES``), and no location outside the folders and URLs in
``MLORQ_ROOTS`` (default: the working directory). Commands and Python functions are the user's own and are not limited.

``flows.run_form`` applies the rules to all parameters before anything is read, imported or loaded (docs/SECURITY.md).
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

from mlorq.artifacts.locations import is_remote, resolve_location, url_of_store
from mlorq.config.run import STORE, RunConfig, texts_of
from mlorq.config.tracking import FOLDER
from mlorq.data.source import SOURCES
from mlorq.errors import ConfigError
from mlorq.export_targets import TARGETS
from mlorq.models.family import FAMILIES
from mlorq.models.plain import fault, faults

ROOTS = "MLORQ_ROOTS"
ARGUMENTS = "MLORQ_ALLOWED_ARGUMENTS"
ANYWHERE = "*"  # in MLORQ_ROOTS
LONGEST_SHOWN = 200  # characters of a value in a message
# Parts of chained URLs that only read what is behind them. Others, as ``reference``, take addresses from its content.
WRAPPERS = frozenset(("zip", "tar", "simplecache", "filecache", "blockcache"))


@dataclass(frozen=True)
class Rule:
    """Values that need permission.

    Attributes:
        keys: pattern of the dotted keys that hold them.
        variable: of the environment, with the patterns of allowed values, separated by commas.
        allowed: values that need none.
        marked: start of the values that the rule is for.
    """

    keys: str
    variable: str
    allowed: tuple[str, ...] = ()
    marked: str = ""


RULES = (
    Rule("model.factory", "MLORQ_ALLOWED_FACTORIES"),
    Rule("data.*.factory", "MLORQ_ALLOWED_FACTORIES"),
    Rule("data.*.batches", "MLORQ_ALLOWED_FACTORIES"),
    Rule("data.*.metric", "MLORQ_ALLOWED_METRICS", marked="evaluate:"),  # a script of a folder or of the hub
    Rule("tracking.wandb.project", "MLORQ_ALLOWED_PROJECTS", ("mlorq",)),
    Rule("tracking.wandb.entity", "MLORQ_ALLOWED_PROJECTS"),
    Rule("engine.dask.cluster", "MLORQ_ALLOWED_CLUSTERS", ("distributed.LocalCluster",)),
    Rule("engine.dask.address", "MLORQ_ALLOWED_CLUSTERS"),
    Rule("engine.ray.address", "MLORQ_ALLOWED_CLUSTERS"),
    Rule("engine.docker.image", "MLORQ_ALLOWED_IMAGES", ("mlorq:latest",)),
    Rule("engine.docker.volumes.*", "MLORQ_ALLOWED_VOLUMES"),
    Rule("engine.docker.user", "MLORQ_ALLOWED_USERS"),
    Rule("engine.docker.network", "MLORQ_ALLOWED_NETWORKS"),
    Rule("engine.docker.environment.*", "MLORQ_ALLOWED_VARIABLES"),
)
# Keyword arguments, which need permission by their dotted key: of a cluster, since some of them import modules; of a
# model or a metric those that could fetch, import or unpickle something (``mlorq.models.plain``).
CLUSTER_ARGUMENTS = {
    "dask": frozenset(("n_workers", "threads_per_worker", "processes", "memory_limit")),
    "ray": frozenset(("num_cpus", "num_gpus", "object_store_memory")),
}
PLAIN_ARGUMENTS = ("model.arguments", "data.calibration.metric_arguments", "data.evaluation.metric_arguments")
UNSAFE_IF_FALSE = frozenset(("weights_only", "use_safetensors"))


def is_limited() -> bool:
    """Whether the present flow run was started by a deployment or a worker, and not by a user's command or script."""
    from prefect.context import FlowRunContext

    from flows.run import handed

    if handed() is not None:
        return False
    context = FlowRunContext.get()
    run = None if context is None else context.flow_run
    return "PREFECT__FLOW_RUN_ID" in os.environ or (run is not None and run.deployment_id is not None)


def check_place(key: str, location: str, environment: Mapping[str, str] | None = None) -> None:
    """Check that a location is below one of the worker's roots.

    Args:
        key: that names it, for the message.
        location: an absolute path or URL.
        environment: of the worker; default: of this process.

    Raises:
        ConfigError: it is not; links are resolved first.
    """
    if not is_below_roots(location, os.environ if environment is None else environment):
        raise ConfigError(
            f"{key}: {location[:LONGEST_SHOWN]} is outside the folders that runs of deployments may use on this "
            f"worker; its owner can allow it by {ROOTS} (docs/SECURITY.md)"
        )


def check_permitted(config: RunConfig, environment: Mapping[str, str] | None = None) -> None:
    """Check that a configuration names only what the owner of the worker allows.

    Args:
        config: of the run.
        environment: of the worker; default: of this process.

    Raises:
        ConfigError: it names something else; the message has the key, and the variable that would allow it.
    """
    environment = os.environ if environment is None else environment
    values = config.model_dump(mode="json")
    for key, text in texts_of(values, ""):
        check_text(key, text, environment)
    for key in arguments_to_allow(values):
        if not _matches(key, environment.get(ARGUMENTS, "")):
            raise _refused(key, "this argument", ARGUMENTS)
    for key, location in named_places(config, values):
        check_place(key, location, environment)


def check_text(key: str, text: str, environment: Mapping[str, str]) -> None:
    """Apply ``RULES`` to one value.

    Args:
        key: dotted key of the value.
        text: the value.
        environment: of the worker.

    Raises:
        ConfigError: the value is not allowed.
    """
    for rule in RULES:
        if fnmatchcase(key, rule.keys) and text.startswith(rule.marked) and text not in rule.allowed:
            given = _real_volume(text) if rule.keys.startswith("engine.docker.volumes") else text
            if not _matches(given, environment.get(rule.variable, "")):
                raise _refused(key, repr(text[:LONGEST_SHOWN]), rule.variable)


def arguments_to_allow(values: Mapping[str, Any]) -> Iterator[str]:
    """Dotted keys of the keyword arguments that need permission.

    Args:
        values: a configuration's.
    """
    for path in PLAIN_ARGUMENTS:
        found: Any = values
        for part in path.split("."):
            found = (found or {}).get(part)
        for name, value in (found or {}).items():
            if [*faults({name: value})] or (name in UNSAFE_IF_FALSE and value is not True):
                yield f"{path}.{name}"
    for cluster, harmless in CLUSTER_ARGUMENTS.items():
        for name, value in values["engine"][cluster]["arguments"].items():
            if name not in harmless or fault(name, value):
                yield f"engine.{cluster}.arguments.{name}"


def named_places(config: RunConfig, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The locations that a configuration names, absolute, with their keys.

    Args:
        config: the configuration.
        values: its values.
    """
    yield "store", config.resolve(config.store)
    if config.engine.cache not in (None, "auto"):
        yield "engine.cache", config.resolve(str(config.engine.cache))
    for key, text in texts_of({name: values[name] for name in ("model", "data", "export")}, ""):
        if key.endswith(".metric"):
            text = text.partition(":")[2]  # evaluate:FOLDER
        if _looks_like_a_place(text):
            yield key, config.resolve(text)
    for name in FAMILIES[config.model.family].locations(config.model.own):
        if not _is_name(name, config.resolve(name)):
            yield _key_of(name, "model", values["model"]), config.resolve(name)
    for role in ("calibration", "evaluation"):
        source = getattr(config.data, role)
        for location in SOURCES[source.source].locations(source.own):
            if location:
                yield _key_of(location, f"data.{role}", values["data"][role]), config.resolve(location)
    if config.tracking is not None and config.tracking.mlflow is not None:
        yield "tracking.mlflow.uri", config.resolve(config.tracking.mlflow.uri or FOLDER)
    for index, entry in enumerate(config.export):
        for name in TARGETS[entry.to].locations:
            location = getattr(entry, name)
            if location and not _is_name(location, config.resolve(location)):
                yield f"export.{index}.{name}", config.resolve(location)


def is_below_roots(location: str, environment: Mapping[str, str]) -> bool:
    """Whether a location is below one of the worker's roots, after links and ``..`` are resolved.

    Args:
        location: an absolute path or URL; of a chained URL, the last part counts.
        environment: of the worker.
    """
    roots = _listed(environment.get(ROOTS, "")) or [os.getcwd()]
    roots += (
        [url_of_store(environment[STORE])] if environment.get(STORE) else []
    )  # the owner of the worker has named it
    if ANYWHERE in roots:
        return True
    *before, target = location.split("::")
    if "\0" in location or any(part.partition("://")[0] not in WRAPPERS for part in before):
        return False
    place = _normal(target)
    return place is not None and any(_is_inside(place, _normal(resolve_location(root, ""))) for root in roots)


def _normal(location: str) -> str | None:
    """A path without links, or a URL without empty parts; None for a URL with ``..``."""
    scheme, separator, rest = location.partition("://")
    if not separator or scheme in ("file", "local"):
        return os.path.realpath(rest if separator else location)
    if scheme in ("http", "https"):
        rest = unquote(rest.partition("?")[0].partition("#")[0])
    if ".." in rest.replace("\\", "/").split("/"):
        return None
    return f"{scheme}://{posixpath.normpath(rest) if rest else ''}"


def _is_inside(place: str, root: str | None) -> bool:
    return root is not None and (place == root or place.startswith(root if root.endswith("/") else f"{root}/"))


def _is_name(text: str, place: str) -> bool:
    """Whether a text that can also be a folder is a name on a hub or inside a package: there is no such folder."""
    plain = not text.startswith((".", "/", "~")) and ".." not in text.split("/")
    return plain and not is_remote(place) and not os.path.lexists(place)


def _looks_like_a_place(text: str) -> bool:
    return "://" in text or text.startswith(("/", "~", "./", "../")) or "/../" in text or text.endswith("/..")


def _key_of(location: str, section: str, values: Mapping[str, Any]) -> str:
    """The key that names a location, which can be the start of a pattern of files."""
    named = (key for key, text in texts_of(values, section) if text == location or text.startswith(f"{location}/"))
    return next(named, section)


def _real_volume(volume: str) -> str:
    """A mount with the links of its folder resolved, so that no pattern is met by a way around."""
    host, separator, rest = volume.partition(":")
    return f"{os.path.realpath(host)}{separator}{rest}"


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _matches(text: str, patterns: str) -> bool:
    return any(fnmatchcase(text, pattern) for pattern in _listed(patterns))


def _refused(key: str, what: str, variable: str) -> ConfigError:
    return ConfigError(
        f"{key}: {what} is not allowed in runs of deployments on this worker; its owner can allow it by {variable} "
        "(docs/SECURITY.md)"
    )
