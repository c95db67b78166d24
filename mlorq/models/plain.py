"""Checks of a checkpoint's architecture: data from a file, which must not name files, code or repositories."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from mlorq.errors import CheckpointError

# Entries about a model's origin, which builders ignore or must not follow.
ORIGIN = frozenset(("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "use_pretrained_backbone"))
# Numbers of parts, from which libraries make lists before any tensor.
COUNTS = re.compile(r".*(layers?|depths?|blocks|stages|labels)")
MOST_PARTS = 10_000
MOST_TEXT = 200  # characters of a name
# Entries that make a library fetch, import or unpickle something, or that place a model elsewhere; wherever they are.
REFUSED = re.compile(
    r"auto_map|trust_remote_code|code_revision|custom_pipelines|quantization_config"
    r"|(checkpoint|weights)_(path|file)|pretrained(_cfg.*|_model_args)?|cache_dir|backbone_kwargs|use_timm_backbone"
    r"|.*use_kernels|kernel_config|device|.*(attn|experts)_implementation(_internal)?"
)


def is_name(value: str) -> bool:
    """Whether a text can be a plain name: neither a path, an address, nor a reference to a repository (``--``)."""
    return len(value) <= MOST_TEXT and not re.search(r"[/\\:\x00-\x1f]|--", value)


def fault(key: str, value: Any) -> str | None:
    """Reason why an entry of an architecture is refused, or None; entries of mappings in it are not examined."""
    if REFUSED.fullmatch(key) and value not in (None, False):
        return f"{key!r} is refused: it could fetch, import or unpickle something"
    if isinstance(value, str) and not is_name(value):
        return f"{key} {value[:60]!r} is refused: only plain names are allowed"
    if isinstance(value, int) and value > MOST_PARTS and COUNTS.fullmatch(key):
        return f"{key} {value!r:.60} is refused: at most {MOST_PARTS} are allowed"
    if not isinstance(value, (str, int, float, bool, type(None), list, tuple, Mapping)):
        return f"{key!r} is a {type(value).__name__}"
    return None


def faults(entries: Mapping[str, Any], free: Collection[str] = ()) -> Iterator[str]:
    """Reasons to refuse entries of an architecture, also of those inside others.

    Args:
        entries: values by key.
        free: keys whose values can be any text.
    """
    for key, value in entries.items():
        if key in free:
            continue
        reason = fault(str(key), value)
        if reason:
            yield reason
        yield from _inside(str(key), value, free)


def _inside(key: str, value: Any, free: Collection[str]) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from faults(value, free)
    elif isinstance(value, (list, tuple)):
        for item in value:
            reason = fault(key, item)
            if reason:
                yield reason
            yield from _inside(key, item, free)


def without_faults(entries: Mapping[str, Any], free: Collection[str] = ()) -> dict[str, Any]:
    """The entries that ``faults`` does not refuse, also of mappings inside others."""
    found = {}
    for key, value in entries.items():
        if key not in free and isinstance(value, Mapping):
            found[key] = without_faults(value, free)
        elif key in free or not [*faults({key: value}, free)]:
            found[key] = value
    return found


def without_origin(value: Any) -> Any:
    """A JSON value without the entries in ``ORIGIN``, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_origin(item) for key, item in value.items() if key not in ORIGIN}
    return [without_origin(item) for item in value] if isinstance(value, (list, tuple)) else value


# JSON has no such numbers: stored as transformers stores them, ``{"__float__": "Infinity"}``.
FLOAT = "__float__"
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def encoded_float(value: float) -> float | dict[str, str]:
    """A number as a JSON value."""
    if math.isfinite(value):
        return value
    return {FLOAT: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}


def decoded_floats(value: Any) -> Any:
    """A JSON value with the numbers that JSON does not have, at any depth."""
    if isinstance(value, Mapping):
        if set(value) == {FLOAT} and value[FLOAT] in list(_NOT_FINITE):
            return _NOT_FINITE[value[FLOAT]]
        return {key: decoded_floats(item) for key, item in value.items()}
    return [decoded_floats(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_keys(architecture: Mapping[str, Any], required: Mapping[str, type], optional: Collection[str] = ()) -> None:
    """Check the keys of an architecture, and the types of those that are required.

    Args:
        architecture: the description.
        required: types of the keys that must be there.
        optional: keys that may be there.

    Raises:
        CheckpointError: a key is missing, unknown or of another type.
    """
    for key, kind in required.items():
        if key not in architecture:
            raise CheckpointError(f"architecture lacks {key!r}")
        if not isinstance(architecture[key], kind):
            raise CheckpointError(f"architecture.{key} must be a {kind.__name__}, not {architecture[key]!r:.60}")
    for key in architecture:
        if key not in required and key not in optional:
            raise CheckpointError(f"architecture has an unknown key {key!r}")
