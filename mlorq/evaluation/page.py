"""Pages of results: one self-contained HTML file each, to be read on a screen, on a phone or on paper.

Charts are SVG inside the page (``charts``). Nothing is loaded from elsewhere and no script runs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from mlorq.evaluation.charts import (
    Fronts,
    curve_charts,
    depth_chart,
    fronts_chart,
    prediction_chart,
    trade_off,
    trade_off_chart,
)
from mlorq.evaluation.report import Measured, data_url
from mlorq.forms.base import FORMS
from mlorq.numbers import byte_count, byte_size, cell, duration, number

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

MOST_LEFT_FLOAT = 10  # weights that stay float on a page


class Chart(NamedTuple):
    """A chart with its caption; the SVG is empty if there is nothing to draw."""

    svg: str
    caption: str


class Stage(NamedTuple):
    """The steps of one kind.

    Attributes:
        stage: name of the step.
        steps: number of artifacts.
        reused: how many of them were in the store before the run; None: unknown.
        seconds: time to compute those that were not reused; all of them, if it is unknown what was reused.
        before: time that the reused ones had taken.
    """

    stage: str
    steps: int
    reused: int | None
    seconds: float
    before: float = 0.0


@dataclass(frozen=True)
class Made:
    """How a run was made; what is not known is empty.

    Attributes:
        stages: times and reuse.
        created: date and time of the result.
        lines: sentences.
        command: command line that repeats the run.
        config: its configuration as YAML.
        folder: that relative paths in it start from.
        versions: of software and machine, by name.
    """

    stages: Sequence[Stage] = ()
    created: str = ""
    lines: Sequence[str] = ()
    command: str = ""
    config: str = ""
    folder: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Searched:
    """What the search found, for charts.

    Attributes:
        fronts: each layer's candidate and sensitivity tables.
        params: each layer's number of weights.
        depth: NMSE of the layers' outputs in the compressed model; empty if it was not measured.
    """

    fronts: Fronts
    params: Mapping[str, int]
    depth: Mapping[str, float] = field(default_factory=dict)


def render_report(
    result: Mapping[str, Any],
    *,
    searched: Searched | None = None,
    picture: bytes | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
    made: Made | None = None,
    measured: Measured | None = None,
) -> bytes:
    """The page of a run.

    Args:
        result: the run's result object.
        searched: what the search found; None if it is no longer in the store.
        picture: the allocation as a PNG, shown if ``searched`` is None.
        runs: result objects of the runs of the same model and evaluation data, this one included.
        made: how the run was made.
        measured: bytes, memory and time of its checkpoint in runtimes.
    """
    shown = [] if searched is None else _charts(result, searched)
    curves = []
    if len(runs) > 1:
        about = "Size and accuracy of the runs in the store, this one in orange. Squares: one form in all layers."
        curves = [Chart(svg, about) for svg in curve_charts(runs, result["run"])]
        curves.append(Chart(prediction_chart(runs, result["run"]), "What the search predicted and what was measured."))
    benchmark = None if measured is None else measured._asdict() | {"picture": data_url(measured.picture)}
    left = sorted(result.get("left_float") or (), key=lambda row: -row["bytes"])
    values = {
        "title": f"{result['model']} at {result['budget']}",
        "result": result,
        "headlines": _headlines(result),
        "warnings": (result.get("calibration") or {}).get("warnings", ()),
        "totals": _totals(result),
        "shown": shown,
        "picture": data_url(picture) if picture is not None and searched is None else "",
        "curves": curves,
        "runs": len(runs),
        "measured": benchmark,
        "forms": _forms(result),
        "layers": _layers(result, None if searched is None else searched.params),
        "left_float": left[:MOST_LEFT_FLOAT],
        "made": None if made is None else _shown(made),
    }
    return _render("report.html", values)


def render_sweep(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    lines: Sequence[str] = (),
    *,
    highlight: str | None = None,
    least: float | None = None,
) -> bytes:
    """The page of a sweep: the curves and a table with one row per budget.

    Args:
        title: of the page.
        rows: of the table.
        results: the runs' result objects.
        lines: sentences above the curves.
        highlight: ``run`` of the result to mark.
        least: value of the metric that was asked for.
    """
    shown = [Chart(svg, "Size and accuracy.") for svg in curve_charts(results, highlight, least)]
    shown.append(Chart(prediction_chart(results, highlight), "What the search predicted and what was measured."))
    return _render("table.html", {"title": title, "rows": rows, "shown": shown, "lines": lines})


def render_table(title: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A page with a table of rows that have the same columns."""
    return _render("table.html", {"title": title, "rows": rows, "shown": [], "lines": []})


# -- parts of a report ----------------------------------------------------------------------------------------------


def _charts(result: Mapping[str, Any], searched: Searched) -> list[Chart]:
    rows, params = result["allocation"], searched.params
    chosen = sum(row["bytes"] for row in rows), sum(row["global_cost"] or 0.0 for row in rows)
    size = 4 * sum(params.values())
    about = (
        "Each layer compressed alone: the cost of the model's output against bits per weight. Grey: the Pareto fronts "
        "of all layers; coloured: the choices."
    )
    depth = "Relative errors on calibration samples." if searched.depth else "Predicted by the search."
    return [
        Chart(
            trade_off_chart(trade_off(searched.fronts), chosen, size),
            "The sum of the layers' costs at any budget, as the search predicts it.",
        ),
        Chart(fronts_chart(rows, searched.fronts, params), about),
        Chart(depth_chart(rows, searched.depth), depth),
    ]


def _headlines(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    ratio = result["float_bytes"] / max(1, result["bytes"])
    found = [
        ("compressed layers", byte_size(result["bytes"]), f"{number(ratio)} times smaller than float32"),
        ("checkpoint on disk", byte_size(result["file_bytes"]), f"{result['file_bytes']:,} B"),
    ]
    metric = result["metric"]
    if metric is not None:
        found.append((metric["name"], number(metric["compressed"], 4), f"float {number(metric['float'], 4)}"))
    found.append(("output NMSE", number(result["nmse"]), f"on {result['nmse_data']} data"))
    predicted = result["predicted_cost"]
    against = f"measured {number(result['nmse'] / predicted, 2)} times that" if predicted and result["nmse"] else ""
    found.append(("predicted cost", number(predicted), against))
    return found


def _totals(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = [("budget", f"{result['budget']}: {byte_count(result['budget_bytes'])} for the compressible layers")]
    found.append(("compressible layers", f"{byte_count(result['bytes'])}; float32 {byte_count(result['float_bytes'])}"))
    if result.get("embedding_bytes"):
        found.append(("embedding tables", byte_count(result["embedding_bytes"])))
    found.append(("rest of the model", byte_count(result["rest_bytes"])))
    found += [(f"export to {one['to']}", byte_count(one["bytes"])) for one in result.get("exports") or ()]
    for name, value in (result.get("metrics") or {}).get("compressed", {}).items():
        if result["metric"] is None or name != result["metric"]["name"]:
            before = result["metrics"]["float"].get(name)
            found.append((name, f"{number(value, 4)}, float {number(before, 4)}"))
    return found


def _forms(result: Mapping[str, Any]) -> list[dict[str, str]]:
    count = Counter(row.get("form") for row in result["allocation"])
    return [
        {"colour": form.colour, "text": f"{form.name}, {form.label} ({count[form.name]})"}
        for form in FORMS
        if count[form.name]
    ]


def _layers(result: Mapping[str, Any], params: Mapping[str, int] | None) -> list[dict[str, Any]]:
    rows = result["allocation"]
    bits = {row["layer"]: 8 * row["bytes"] / params[row["layer"]] for row in rows} if params else {}
    most = max(bits.values(), default=1.0)
    return [
        {
            "layer": row["layer"],
            "choice": row["candidate_id"],
            "bits": number(bits[row["layer"]]) if bits else "",
            "share": round(100 * bits[row["layer"]] / most) if bits else 0,
            "colour": FORMS[row["form"]].colour if "form" in row else "",
            "bytes": row["bytes"],
            "cost": row["global_cost"],
        }
        for row in rows
    ]


def _shown(made: Made) -> dict[str, Any]:
    most = max((stage.seconds for stage in made.stages), default=0.0) or 1.0
    stages = [stage._asdict() | {"share": round(100 * stage.seconds / most)} for stage in made.stages]
    return {**vars(made), "stages": stages}


# -- templates ------------------------------------------------------------------------------------------------------


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("mlorq.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    found.filters |= {"breaks": _breaks, "number": number, "size": byte_size, "duration": duration, "cell": cell}
    return found


def _breaks(name: str) -> Markup:
    """A dotted name that may be broken after its dots and underscores."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._/])", r"\1<wbr>", str(escape(name))))


def _render(name: str, values: Mapping[str, Any]) -> bytes:
    return _templates().get_template(name).render(values).encode()
