"""``mlorq.json``: what a checkpoint says of itself, checked before anything is built or allocated from it.

Folders of format 1 have the same description in ``config.json``, without digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlorq.activations.plan import ActivationPlan
from mlorq.checkpoint import places, preparation
from mlorq.checkpoint.entry import LayerEntry, dtype_name, dtype_of
from mlorq.checkpoint.places import DESCRIPTION, OLD_DESCRIPTION, TENSORS, Location
from mlorq.checkpoint.tensor_file import FORMAT_VERSION, Header, digest
from mlorq.errors import CheckpointError, ConfigError, one_line
from mlorq.models.arrangement import Arrangement

VERSION_KEY = "format_version"
# Of descriptions with layers in blocks of columns, or with ReLU in the place of GELU, which readers of version 2 miss.
LATER_VERSION = 3
TRANSPOSED = "transposed"  # key in ``extra``: layers whose weight the original class stores transposed
COMPUTED = "computed_by_class"  # key in ``extra``: layers whose class computes their weight; the file has its value
ARRANGED = "arranged"  # key in ``extra``: weights that the original classes read directly
OBJECTS = ("architecture", "sizes", "aliases", "buffers")
OPTIONAL_OBJECTS = ("budget", "hashes", "extra", "preparation")


@dataclass(frozen=True)
class Description:
    """A checkpoint's description.

    Attributes:
        config: the object in the file.
        entries: its compressed layers.
        plan: its activation quantizers, or None.
        file: name of the file.
        digest: of the file's bytes; None in format 1.
        bytes: size of the file.
    """

    config: Mapping[str, Any]
    entries: tuple[LayerEntry, ...]
    plan: ActivationPlan | None
    file: str
    digest: str | None
    bytes: int

    @property
    def transposed(self) -> list[str]:
        """Names of the layers whose weight the original class stores transposed."""
        return list((self.config.get("extra") or {}).get(TRANSPOSED) or ())

    @property
    def computed(self) -> list[str]:
        """Names of the layers whose original class computes their weight, and whose value the file has."""
        return list((self.config.get("extra") or {}).get(COMPUTED) or ())

    @property
    def arranged(self) -> Arrangement:
        """Weights that the original classes hold otherwise, because they read them directly."""
        return Arrangement.from_json((self.config.get("extra") or {}).get(ARRANGED) or {})

    @property
    def version(self) -> int:
        """The format version."""
        return int(self.config[VERSION_KEY])

    def check_header(self, header: Header) -> None:
        """Compare the description with the header of the tensors: their digests, and every compressed layer's tensors.

        Raises:
            CheckpointError: the two files do not belong together, or a layer's tensors have other shapes or dtypes.
        """
        if self.digest is not None:
            if header.description is None:
                raise CheckpointError(f"{TENSORS} has no digests: it was not written with {self.file}")
            if header.description != self.digest:
                raise CheckpointError(f"{self.file} does not have the digest in {TENSORS}: one of them was changed")
            if header.layers != {entry.layer: entry.summary() for entry in self.entries}:
                raise CheckpointError(f"{self.file} and {TENSORS} have different layers")
        for entry in self.entries:
            for name, spec in entry.layout().items():
                stored = header.tensors.get(name)
                if stored is None:
                    raise CheckpointError(f"{TENSORS} lacks tensor {name!r}")
                if stored.shape != spec.shape:
                    raise CheckpointError(f"tensor {name!r} has shape {stored.shape}; its layer needs {spec.shape}")
                if dtype_name(stored.dtype) != spec.dtype:
                    raise CheckpointError(f"tensor {name!r} is {stored.dtype}; its layer needs {spec.dtype}")


def read_description(location: Location) -> Description:
    """The description of a checkpoint: ``mlorq.json``, or ``config.json`` of format 1 if there is none.

    Raises:
        CheckpointError: there is none, or it is damaged or of another version.
    """
    text, file = places.read(location, DESCRIPTION), DESCRIPTION
    if text is None:
        text, file = places.read(location, OLD_DESCRIPTION), OLD_DESCRIPTION
    if text is None:
        raise CheckpointError(places.missing(location, DESCRIPTION))
    try:
        config = _parsed(text)
        if file == OLD_DESCRIPTION and isinstance(config, dict) and config and VERSION_KEY not in config:
            raise CheckpointError(f"the folder has no {DESCRIPTION}, and its {file} is of other software")
        version = config[VERSION_KEY]
        known = FORMAT_VERSION if file == DESCRIPTION else 1
        if type(version) is int and version in (known, LATER_VERSION):
            found = _checked(config, file, text)
            # Version 2 may have wide layers of earlier versions, which are not in blocks.
            if version in (known, version_of(found.entries, config.get("activations"))):
                return found
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ConfigError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
        raise CheckpointError(f"{file} is damaged: {reason}") from error
    raise CheckpointError(f"{file} has format version {version!r:.60}; this version of mlorq reads {known} there")


def version_of(entries: Sequence[LayerEntry], activations: Mapping[str, Any] | None) -> int:
    """The format version that a description of these layers and activations (``ActivationPlan.to_json``) says."""
    later = any(entry.in_blocks for entry in entries) or bool((activations or {}).get("mlps"))
    return LATER_VERSION if later else FORMAT_VERSION


def is_old_description(text: bytes) -> bool:
    """Whether a ``config.json`` is the description of a checkpoint of format 1, and not of other software."""
    try:
        found = _parsed(text)
    except ValueError:
        return False
    return isinstance(found, dict) and VERSION_KEY in found


def _parsed(text: bytes) -> Any:
    """The value of a JSON text; ValueError if it is malformed or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _checked(config: Mapping[str, Any], file: str, text: bytes) -> Description:
    wrong = [key for key in OBJECTS if not isinstance(config[key], dict)]
    wrong += [key for key in OPTIONAL_OBJECTS if not isinstance(config.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be an object")
    if not isinstance(config["layers"], list):
        raise ValueError("layers must be a list")
    for key in (TRANSPOSED, COMPUTED):
        names = (config.get("extra") or {}).get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"extra.{key} must be a list of names")
    Arrangement.from_json((config.get("extra") or {}).get(ARRANGED) or {})
    for name, stored in config["aliases"].items():
        if not isinstance(stored, str):
            raise ValueError(f"the alias of {name!r} must be a name")
    for dtype in config["buffers"].values():
        dtype_of(dtype)
    preparation.check(config.get(preparation.KEY, {}))
    plan = None
    if config.get("activations"):
        plan = ActivationPlan.from_json(config["activations"])
        plan.check()
    entries = tuple(LayerEntry.from_json(row) for row in config["layers"])
    paths = [path for entry in entries for path in (entry.layer, *entry.aliases)]
    if len(paths) != len(set(paths)):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"layer {twice!r} is there twice")
    return Description(config, entries, plan, file, digest(text) if file == DESCRIPTION else None, len(text))
