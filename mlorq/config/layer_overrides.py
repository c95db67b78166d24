"""Settings of single layers: what ``search.layers`` says of them, laid over what ``search`` says of all.

A pattern names layers as ``include`` and ``exclude`` do. Of the patterns that match a layer the more specific one, with
more letters that are no wildcard, decides each key that it sets; a full name is the most specific of all. The order in
which they are written does not count, since mappings lose it on their way through databases. Two patterns that are
equally specific may not set the same key of one layer differently.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from typing import Any

from mlorq.config.run import SearchConfig
from mlorq.errors import ConfigError
from mlorq.models.layers import Layer, LayerList

_WILDCARD = re.compile(r"\[[^\]]+\]|[*?]")


def layer_search(search: SearchConfig, layer: Layer) -> SearchConfig:
    """The settings of one layer.

    Args:
        search: of the run.
        layer: one of the model's.

    Raises:
        ConfigError: two equally specific patterns disagree about a key of the layer.
    """
    by_key: dict[str, list[tuple[int, str, Any]]] = {}
    for pattern, override in search.layers.items():
        if _matches(pattern, (layer.name, *layer.aliases)):
            for key, value in override.model_dump(exclude_none=True).items():
                by_key.setdefault(key, []).append((_letters(pattern), pattern, value))
    decided = {}
    for key, said in by_key.items():
        most = max(letters for letters, _, _ in said)
        (_, first, value), *others = [one for one in said if one[0] == most]
        for _, pattern, other in others:
            if other != value:
                raise ConfigError(
                    f"search.layers: {first!r} and {pattern!r} both set {key} of layer {layer.name!r} and are equally "
                    "specific: name the layer in full"
                )
        decided[key] = value
    return search.model_copy(update=decided) if decided else search


def check_overrides(search: SearchConfig, found: LayerList) -> None:
    """Refuse patterns that change nothing, and those that contradict each other.

    Raises:
        ConfigError: a pattern matches no compressible layer, or two of them disagree; it names both.
    """
    names = [(layer.name, *layer.aliases) for layer in found.layers]
    for pattern in search.layers:
        if any(_matches(pattern, own) for own in names):
            continue
        left_alone = [(name, reason) for name, reason in found.skipped if _matches(pattern, (name,))]
        if left_alone:
            name, reason = left_alone[0]
            hint = f": layer {name!r} is left alone ({reason})"
        else:
            near = difflib.get_close_matches(pattern, [own[0] for own in names], n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"search.layers: pattern {pattern!r} matches no layer that is compressed{hint}")
    for layer in found.layers:
        layer_search(search, layer)


def search_json(search: SearchConfig) -> dict[str, Any]:
    """The section as JSON for a key: without ``layers`` where there are none, as before there could be any."""
    values = search.model_dump(mode="json")
    if not values["layers"]:
        del values["layers"]
    return values


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)


def _letters(pattern: str) -> int:
    return len(_WILDCARD.sub("", pattern))
