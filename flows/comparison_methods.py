"""The methods of ``mlorq compare``: the settings that each changes in a configuration.

``mlorq compare --help`` and completion import this module, so it must not import torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlorq.errors import ConfigError
from mlorq.rounding import METHODS


@dataclass(frozen=True)
class Method:
    """One method, a row of the table per budget.

    Attributes:
        name: as on the command line.
        title: for display.
        uniform: whether every layer gets the same bit-width.
        preset: the preset whose defaults it has.
        rounding, search: the settings that define the method.
        activations: how activations are quantized, if a bit-width for them is given.
        shown: whether it is compared by default.
    """

    name: str
    title: str
    uniform: bool
    preset: str
    rounding: Mapping[str, Any]
    search: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] = field(default_factory=lambda: {"method": "repq"})
    shown: bool = True


def uniform_methods() -> dict[str, Method]:
    """Every rounding method at a uniform bit-width, by name."""
    return {
        method.name: Method(
            method.name,
            method.title,
            True,
            "quick",
            {"method": method.name},
            activations=method.compared_activations,
            shown=method.compared,
        )
        for method in METHODS
    }


OWN: Mapping[str, Any] = {"method": "normalized"}
FAST_BY_TOKEN, BEST_BY_TOKEN = (f"preset {name}, ranges by token" for name in ("fast", "best"))
BY_TOKEN: Mapping[str, Any] = {**OWN, "ranges": "token"}

# Methods other than a rounding method at a uniform bit-width.
COMBINATIONS = {
    method.name: method
    for method in (
        Method("repq", "RepQ-ViT (2212.08254)", True, "quick", {"method": "nearest"}),
        Method("mlorq", "MLoRQ + RepQ (2507.09616)", False, "quick", {"method": "nearest"}),
        Method("mlorq+erq", "MLoRQ + ERQ", False, "quick", {"method": "erq"}, shown=False),
        Method("mlorq+lra", "MLoRQ + RepQ + LRA", False, "quick", {"method": "lra"}, shown=False),
        Method("mlorq+erq+lra", "MLoRQ + ERQ + LRA", False, "quick", {"method": "lra", "start": "erq"}, shown=False),
        Method("integer", "preset integer", False, "integer", {"method": "block"}, activations=OWN, shown=False),
        Method("fast", "preset fast", False, "fast", {"method": "closed_form"}, activations=OWN),
        Method("best", "preset best", False, "best", {"method": "block"}, activations=OWN),
        *(
            Method(
                f"{name}+token",
                f"preset {name}, ranges by token",
                False,
                name,
                method,
                activations=BY_TOKEN,
                shown=False,
            )
            for name, method in (("fast", {"method": "closed_form"}), ("best", {"method": "block"}))
        ),
    )
}


def known_methods() -> dict[str, Method]:
    """All methods by name."""
    return uniform_methods() | COMBINATIONS


def chosen(names: Sequence[str] | None) -> list[Method]:
    """Methods by name, without duplicates; None: those shown by default.

    Raises:
        ConfigError: a name is unknown.
    """
    known = known_methods()
    found = []
    for name in dict.fromkeys(names or [method.name for method in known.values() if method.shown]):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise ConfigError(
                f"methods: unknown method {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
            )
        found.append(known[name])
    return found
