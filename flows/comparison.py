"""The runs of ``mlorq compare`` and the rows of its table (``flows.comparison_methods`` has the methods).

Every method is a separate run on the same store, so artifacts that two of them share are computed once. Uniform methods
give every layer the same bit-width; mixed methods search within the bytes of the uniform ones. A budget of whole bits
is the bit-width of the uniform methods' codes; scales and zero-points are added to it, so all methods have more bytes
than the budget alone would allow (``asked_bytes`` and
``budget_bytes`` of a row). Any other budget is an upper bound:
uniform methods have the largest bit-width within it. The user's settings of ``search`` and ``rounding`` (samples,
iterations, step sizes) apply to all methods, except those that define the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.comparison_methods import Method
from flows.render import forms_column
from flows.run import known_layers
from mlorq.config.budget import Budget
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, ConfigError
from mlorq.forms import FORMS, Shape, uniform_candidate, uniform_form
from mlorq.models.layer_list import Layer
from mlorq.numbers import byte_count
from steps.pipeline import compressible_budget
from steps.session import Session

WIDTHS = range(2, 9)


def uniform_bytes(layers: Sequence[Layer], bits: int, config: RunConfig) -> int:
    """Bytes of all layers at a uniform bit-width."""
    form, storage = uniform_form(), config.search.storage
    candidate = uniform_candidate(bits)
    return sum(
        form.size(candidate, Shape(layer.out_features, layer.in_features, layer.groups), storage) for layer in layers
    )


def width_for(budget: Budget, limit: int, layers: Sequence[Layer], config: RunConfig) -> int:
    """The bit-width of uniform methods: that of the budget if it is an integer, else the largest that fits.

    Args:
        budget: the budget.
        limit: bytes that it allows for the compressible layers.
        layers: the compressible layers.
        config: defines how bytes are counted.

    Raises:
        BudgetError: no bit-width fits.
    """
    if budget.whole_bits is not None and budget.whole_bits in WIDTHS:
        return budget.whole_bits
    fitting = [bits for bits in WIDTHS if uniform_bytes(layers, bits, config) <= limit]
    if not fitting:
        raise BudgetError(
            f"budget {budget.text} is too small: uniform methods need at least {WIDTHS[0]} bits per weight"
        )
    return fitting[-1]


def configured(method: Method, values: Mapping[str, Any], folder: str, bits: int, activations: int | None) -> RunConfig:
    """The configuration of a method's run.

    Args:
        method: the method.
        values: the explicit values of the user's configuration, without defaults of a preset.
        folder: base of its relative paths.
        bits: bit-width of uniform methods.
        activations: bit-width of activations; None: they stay float.
    """
    own: dict[str, Any] = dict(method.search)
    if method.uniform:
        own |= {"bits": [bits], "forms": [uniform_form().name], "layers": {}, "sensitivity": "local"}
    given = values.get("activations") or {}
    changed: dict[str, Any] = {
        "preset": method.preset,
        "search": {**(values.get("search") or {}), **own},
        "rounding": {**(values.get("rounding") or {}), **method.rounding},
        "export": [],  # of a comparison nothing is deployed
        "activations": None if activations is None else {**given, **method.activations, "bits": activations},
    }
    return RunConfig.from_mapping({**values, **changed}, folder)


@dataclass(frozen=True)
class Planned:
    """One method's run.

    Attributes:
        method: the method.
        config: its complete configuration.
        budget: of the run, labelled as the user wrote it; all methods of a label have exactly the same bytes.
        asked_bytes: bytes for the compressible layers that the user's budget alone would allow.
    """

    method: Method
    config: RunConfig
    budget: Budget
    asked_bytes: int


def plan(
    base: Session, values: Mapping[str, Any], budgets: Sequence[Budget], methods: Sequence[Method], width: int | None
) -> list[Planned]:
    """All runs in order of budgets, checked before any of them starts.

    Args:
        base: with model and data loaded.
        values: the explicit values of the user's configuration, without defaults of a preset.
        budgets: the budgets.
        methods: the methods.
        width: bit-width of activations; None: they stay float.

    Raises:
        ConfigError: a value is not valid for a method.
        BudgetError: no uniform bit-width fits a budget.
    """
    config = base.config
    layers = known_layers(base).layers
    found = []
    for budget in budgets:
        if budget.memory is not None:
            raise BudgetError(f"budget {budget}: methods are compared at equal bytes: leave out memory")
        limit = compressible_budget(base, layers, budget)
        bits = width_for(budget, limit, layers, config)
        equal = Budget.of_layers(uniform_bytes(layers, bits, config), budget.text)
        found += [
            Planned(method, configured(method, values, config.folder, bits, width), equal, limit) for method in methods
        ]
    return found


def activation_width(values: Mapping[str, Any], activations: int | None) -> int | None:
    """The bit-width of activations: the argument, or else that of the configuration; None: they stay float.

    Raises:
        ConfigError: the argument is not from 2 to 8.
    """
    if activations is None:
        section = values.get("activations")
        return None if not section else int(section.get("bits", 4))
    if isinstance(activations, bool) or not 2 <= activations <= 8:
        raise ConfigError(f"activations: {activations!r}: the bit-width must be from 2 to 8")
    return int(activations)


def row(planned: Planned, result: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    method, config = planned.method, planned.config
    metric = result["metric"] or {}
    forms = [layer["form"] for layer in result["allocation"]]
    return {
        "model": result["model"],
        "budget": str(planned.budget),
        "method": method.name,
        "title": method.title,
        "weights": "uniform" if method.uniform else "mixed",
        "activations": None if config.activations is None else config.activations.bits,
        "metric_name": metric.get("name"),
        "metric": metric.get("compressed"),
        "metric_float": metric.get("float"),
        "nmse": result["nmse"],
        "bytes": result["bytes"],
        "budget_bytes": result["budget_bytes"],
        "asked_bytes": planned.asked_bytes,
        "bits_per_weight": round(32 * result["budget_bytes"] / result["float_bytes"], 3),
        "file_bytes": result["file_bytes"],
        forms_column(): " / ".join(str(forms.count(form.name)) for form in FORMS),
        "seconds": round(sum((*result["seconds"].values(), *result["seconds_reused"].values())), 1),
        "run": result["run"],
        "checkpoint": result["checkpoint"],
    }


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences for display: the bytes of all methods at a budget, if these differ from what the budget alone gives."""
    found = []
    for one in rows:
        given, asked = one["budget_bytes"], one["asked_bytes"]
        if given > asked:
            why = f"codes of that bit-width with scales and zero-points; the codes alone take {byte_count(asked)}"
        else:
            why = f"the largest uniform bit-width within {byte_count(asked)}"
        if given != asked:
            found.append(f"{one['budget']}: all methods have {byte_count(given)} for the compressible layers, {why}")
    return list(dict.fromkeys(found))
