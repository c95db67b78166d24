"""Settings of single layers: the values of ``search.layers`` override those of ``search``.

Patterns match layer names as in ``include`` and ``exclude``. If several patterns that match a layer set the same key,
the most specific one wins: the one with the most characters outside wildcards, so a full name wins over all patterns.
The order of the patterns has no effect, because databases do not keep the order of mappings. Two equally specific
patterns must not set the same key of a layer to different values.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

from mlorq.config.run import SearchConfig
from mlorq.errors import ConfigError
from mlorq.models.layer_list import Layer, LayerList

_WILDCARD = re.compile(r"\[[^\]]+\]|[*?]")


def layer_search(search: SearchConfig, layer: Layer) -> SearchConfig:
    """The ``search`` settings of one layer.

    Args:
        search: the ``search`` section of the run.
        layer: a layer of the model.

    Raises:
        ConfigError: two equally specific patterns set a key of the layer differently.
    """
    by_key: dict[str, list[tuple[int, str, Any]]] = {}
    for pattern, override in search.layers.items():
        if _matches(pattern, (layer.name, *layer.aliases)):
            for key, value in override.model_dump(exclude_none=True).items():
                by_key.setdefault(key, []).append((_specificity(pattern), pattern, value))
    decided = {}
    for key, settings in by_key.items():
        highest = max(specificity for specificity, _, _ in settings)
        (_, first, value), *others = [setting for setting in settings if setting[0] == highest]
        for _, pattern, other in others:
            if other != value:
                raise ConfigError(
                    f"search.layers: the patterns {first!r} and {pattern!r} set {key} of layer {layer.name!r} to "
                    "different values and are equally specific: name the layer in full"
                )
        decided[key] = value
    return search.model_copy(update=decided) if decided else search


def check_overrides(search: SearchConfig, found: LayerList) -> None:
    """Check that every pattern matches a compressible layer and that no two patterns conflict.

    Raises:
        ConfigError: a pattern matches no compressible layer, or two patterns conflict; the message names them.
    """
    names = [(layer.name, *layer.aliases) for layer in found.layers]
    for pattern in search.layers:
        if any(_matches(pattern, own) for own in names):
            continue
        left_alone = [one for one in found.skipped if _matches(pattern, (one.name,))]
        if left_alone:
            hint = f": layer {left_alone[0].name!r} is not compressed ({left_alone[0].reason})"
        else:
            near = difflib.get_close_matches(pattern, [own[0] for own in names], n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"search.layers: pattern {pattern!r} matches no layer that is compressed{hint}")
    for layer in found.layers:
        layer_search(search, layer)


def search_json(search: SearchConfig) -> dict[str, Any]:
    """The section as JSON, for cache keys; an empty ``layers`` is omitted, which keeps keys of older versions valid."""
    values = search.model_dump(mode="json")
    if not values["layers"]:
        del values["layers"]
    return values


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _specificity(pattern: str) -> int:
    """Number of characters outside wildcards."""
    return len(_WILDCARD.sub("", pattern))
