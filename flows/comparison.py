"""The methods that ``mlorq compare`` puts side by side: what each sets in a configuration.

Every method is a run of its own on the same store, so that what two of them share is computed once. Uniform ones give
every layer the same bit-width; mixed ones search, within the bytes of the uniform ones. What a configuration says of
``search`` and ``rounding`` itself (samples, iterations, step sizes) holds for all of them, except for what makes the
method.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.run import known_layers
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, ConfigError
from mlorq.forms.base import FORMS, Shape, uniform_candidate, uniform_form
from mlorq.models.layers import Layer
from mlorq.rounding import METHODS
from steps.context import Workbench
from steps.pipeline import compressible_budget

WIDTHS = range(2, 9)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as the command line has it.
        title: for people.
        uniform: whether every layer gets the same bit-width.
        preset: its defaults.
        search, rounding: what makes the method.
        activations: how they are quantized, where a width is asked for.
        shown: whether it is among those that are compared where none are named.
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


# Combinations that are more than a rounding method at a uniform bit-width.
COMBINATIONS = {
    method.name: method
    for method in (
        Method("repq", "RepQ-ViT (2212.08254)", True, "quick", {"method": "nearest"}),
        Method("mlorq", "MLoRQ + RepQ (2507.09616)", False, "quick", {"method": "nearest"}),
        Method("mlorq+erq", "MLoRQ + ERQ", False, "quick", {"method": "erq"}, shown=False),
        Method("mlorq+lra", "MLoRQ + RepQ + LRA", False, "quick", {"method": "lra"}, shown=False),
        Method("mlorq+erq+lra", "MLoRQ + ERQ + LRA", False, "quick", {"method": "lra", "start": "erq"}, shown=False),
        Method(
            "best",
            "this software's best preset",
            False,
            "best",
            {"method": "block"},
            activations={"method": "adalog"},
        ),
    )
}


def known_methods() -> dict[str, Method]:
    """All methods by name."""
    return uniform_methods() | COMBINATIONS


def chosen(names: Sequence[str] | None) -> list[Method]:
    """Methods by name, each once.

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


def uniform_bytes(layers: Sequence[Layer], bits: int, config: RunConfig) -> int:
    """Bytes of all layers at one bit-width."""
    form, storage = uniform_form(), config.search.storage
    candidate = uniform_candidate(bits)
    return sum(
        form.size(candidate, Shape(layer.out_features, layer.in_features, layer.groups), storage) for layer in layers
    )


def width_for(budget: str, limit: int, layers: Sequence[Layer], config: RunConfig) -> int:
    """The bit-width of uniform methods: a budget's own where it is a whole one, else the largest that fits.

    Raises:
        BudgetError: none fits.
    """
    whole = re.fullmatch(r"\s*([2-8])\s*bits?\s*", budget)
    if whole:
        return int(whole[1])
    fitting = [bits for bits in WIDTHS if uniform_bytes(layers, bits, config) <= limit]
    if not fitting:
        raise BudgetError(f"budget {budget}: not even {WIDTHS[0]} bits for every layer fit in it")
    return fitting[-1]


def configured(method: Method, values: Mapping[str, Any], folder: str, bits: int, activations: int | None) -> RunConfig:
    """The configuration of a method's run.

    Args:
        method: which.
        values: what the user's configuration says, without any preset's defaults.
        folder: that its relative paths start from.
        bits: of uniform methods.
        activations: code width of activations; None: they stay float.
    """
    own: dict[str, Any] = dict(method.search)
    if method.uniform:
        own |= {"bits": [bits], "forms": [uniform_form().name], "layers": {}, "sensitivity": "local", "rounds": 0}
    given = values.get("activations") or {}
    changed = {
        "preset": method.preset,
        "search": {**(values.get("search") or {}), **own},
        "rounding": {**(values.get("rounding") or {}), **method.rounding},
        "activations": None if activations is None else {**given, **method.activations, "bits": activations},
    }
    return RunConfig.from_mapping({**values, **changed}, folder)


def budget_for(method: Method, budget: str, size: int, params: int) -> str:
    """The budget of a method's run, such that all take the same bytes.

    Args:
        method: which.
        budget: as asked for.
        size: bytes of the uniform methods.
        params: weights of all layers.
    """
    if method.uniform or re.fullmatch(r"\s*[2-8]\s*bits?\s*", budget):
        return f"{(8 * size + 1) / params:.12f}bit"  # rounded down to whole bytes again
    return budget


def plan(
    base: Workbench, values: Mapping[str, Any], budgets: Sequence[str], methods: Sequence[Method], width: int | None
) -> list[tuple[Method, RunConfig, str, str]]:
    """``(method, configuration, budget asked for, budget of the run)`` of every run, checked before any starts.

    Raises:
        ConfigError: a value does not fit a method.
        BudgetError: a budget is malformed, or no uniform width fits it.
    """
    config = base.config
    layers = known_layers(base).layers
    params = sum(layer.params for layer in layers)
    found = []
    for budget in budgets:
        limit = compressible_budget(base, layers, budget)
        bits = width_for(budget, limit, layers, config)
        size = uniform_bytes(layers, bits, config)
        for method in methods:
            own = configured(method, values, config.folder, bits, width)
            found.append((method, own, budget, budget_for(method, budget, size, params)))
    return found


def activation_width(values: Mapping[str, Any], activations: int | None) -> int | None:
    """The code width of activations: the one asked for, or the configuration's.

    Raises:
        ConfigError: no width from 2 to 8 is asked for.
    """
    if activations is None:
        section = values.get("activations")
        return None if not section else int(section.get("bits", 4))
    if isinstance(activations, bool) or not 2 <= activations <= 8:
        raise ConfigError(f"activations: {activations!r} is no code width from 2 to 8")
    return int(activations)


def forms_column() -> str:
    """Name of the column that counts the layers in each form."""
    return " / ".join(form.name for form in FORMS)


def row(method: Method, budget: str, config: RunConfig, result: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    metric = result["metric"] or {}
    forms = [layer["form"] for layer in result["allocation"]]
    return {
        "model": result["model"],
        "budget": budget,
        "method": method.name,
        "title": method.title,
        "weights": "uniform" if method.uniform else "mixed",
        "activations": None if config.activations is None else config.activations.bits,
        "metric_name": metric.get("name"),
        "metric": metric.get("compressed"),
        "metric_float": metric.get("float"),
        "nmse": result["nmse"],
        "bytes": result["bytes"],
        "file_bytes": result["file_bytes"],
        forms_column(): " / ".join(str(forms.count(form.name)) for form in FORMS),
        "seconds": round(sum(result["seconds"].values()), 1),
        "run": result["run"],
        "checkpoint": result["checkpoint"],
    }
