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
from mlorq.forms.base import Candidate
from mlorq.forms.memory import candidate_bytes
from mlorq.models.layers import Layer
from steps.pipeline import compressible_budget
from steps.session import Session

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
    """

    name: str
    title: str
    uniform: bool
    preset: str
    rounding: Mapping[str, Any]
    search: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, Any] = field(default_factory=lambda: {"method": "repq"})


def _uniform(name: str, title: str, activations: str = "repq") -> Method:
    return Method(name, title, True, "quick", {"method": name}, activations={"method": activations})


ALL = [
    _uniform("nearest", "nearest rounding", "uniform"),
    _uniform("gptq", "GPTQ (2210.17323)"),
    Method("repq", "RepQ-ViT (2212.08254)", True, "quick", {"method": "nearest"}),
    _uniform("erq", "ERQ (2407.06794)"),
    _uniform("brecq", "BRECQ (2102.05426)"),
    _uniform("qdrop", "QDrop (2203.05740)"),
    Method("mlorq", "MLoRQ + RepQ (2507.09616)", False, "quick", {"method": "nearest"}),
    Method("mlorq+erq", "MLoRQ + ERQ", False, "quick", {"method": "erq"}),
    Method("mlorq+lra", "MLoRQ + RepQ + LRA", False, "quick", {"method": "lra"}),
    Method("mlorq+erq+lra", "MLoRQ + ERQ + LRA", False, "quick", {"method": "lra", "start": "erq"}),
    Method(
        "best",
        "this software's best preset",
        False,
        "best",
        {"method": "block"},
        activations={"method": "adalog"},
    ),
]
METHODS = {method.name: method for method in ALL}
DEFAULT = ("nearest", "gptq", "repq", "erq", "brecq", "mlorq", "best")


def chosen(names: Sequence[str] | None) -> list[Method]:
    """Methods by name, each once.

    Raises:
        ConfigError: a name is unknown.
    """
    found = []
    for name in dict.fromkeys(names or DEFAULT):
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
            raise ConfigError(
                f"methods: unknown method {name!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(METHODS)}")
            )
        found.append(METHODS[name])
    return found


def uniform_bytes(layers: Sequence[Layer], bits: int, config: RunConfig) -> int:
    """Bytes of all layers at one bit-width."""
    search = config.search
    return sum(
        candidate_bytes(
            Candidate("Q", bits=bits), layer.out_features, layer.in_features, search.accounting, search.zero_point
        )
        for layer in layers
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
        own |= {"bits": [bits], "forms": ["Q"], "layers": {}, "sensitivity": "local", "rounds": 0}
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
    base: Session, values: Mapping[str, Any], budgets: Sequence[str], methods: Sequence[Method], width: int | None
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
        "Q / LR / QLR": " / ".join(str(forms.count(form)) for form in ("Q", "LR", "QLR")),
        "seconds": round(sum(result["seconds"].values()), 1),
        "run": result["run"],
        "checkpoint": result["checkpoint"],
    }
