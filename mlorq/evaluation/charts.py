"""Charts of the report page, as SVG with text: sharp at any size, small, and without scripts.

matplotlib is a dependency already; plotly would add four megabytes of script to every page. Charts are made for a
column of a phone's width and stand side by side on wide screens, so that their labels can be read on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mlorq.costs.pareto import pareto_front
from mlorq.forms.base import FORMS
from mlorq.numbers import UNITS, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLAIN, MARKED, UNIFORM, FAINT = "#2f6fb0", "#d1662f", "#5d6b7a", "#c4c9cf"
SIZE = (4.4, 3.3)  # inches; text of 9 points is then 12 pixels high in a column of 320 pixels and more

Fronts = Mapping[str, tuple[pa.Table, pa.Table]]  # each layer's candidate and sensitivity tables


class Trade(NamedTuple):
    """Sizes and predicted costs of whole allocations.

    Attributes:
        bytes: ``(points,)`` of the compressible layers.
        cost: ``(points,)``, the sum of the layers' global costs.
        uniform: ``(candidate, bytes, cost)`` of allocations that give all layers the same candidate.
    """

    bytes: NDArray[np.float64]
    cost: NDArray[np.float64]
    uniform: list[tuple[str, int, float]]


def trade_off(fronts: Fronts) -> Trade:
    """The lower convex hull of predicted cost against size over all allocations, from the layers' hulls.

    From the smallest allocation on, the step of a layer's hull that saves most cost per byte is taken next; each point
    is an allocation that is optimal for its size.
    """
    start_bytes, start_cost = 0.0, 0.0
    steps: list[tuple[float, float]] = []
    common: dict[str, tuple[int, float]] | None = None
    for candidates, sensitivity in fronts.values():
        rows = {row["candidate_id"]: row for row in candidates.to_pylist()}
        costs = dict(zip(sensitivity["candidate_id"].to_pylist(), sensitivity["global_cost"].to_pylist(), strict=True))
        hull = _hull([(float(rows[name]["bytes"]), float(cost)) for name, cost in costs.items()])
        start_bytes, start_cost = start_bytes + hull[0][0], start_cost + hull[0][1]
        steps += [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]
        single = {
            name: (int(rows[name]["bytes"]), float(cost))
            for name, cost in costs.items()
            if rows[name].get("bits") is not None and rows[name].get("rank") is None
        }
        if common is None:
            common = single
        else:
            common = {
                name: (size + single[name][0], cost + single[name][1])
                for name, (size, cost) in common.items()
                if name in single
            }
    steps.sort(key=lambda step: step[1] / step[0])
    moved = np.array(steps, dtype=np.float64).reshape(-1, 2).cumsum(axis=0)
    uniform = sorted(((name, *values) for name, values in (common or {}).items()), key=lambda one: one[1])
    return Trade(
        np.concatenate([[start_bytes], start_bytes + moved[:, 0]]),
        np.concatenate([[start_cost], start_cost + moved[:, 1]]),
        uniform,
    )


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The decreasing part of the lower convex hull of ``(bytes, cost)``, smallest bytes first."""
    found: list[tuple[float, float]] = []
    for size, cost in sorted(points):
        if found and cost >= found[-1][1]:
            continue
        while len(found) > 1 and _above(found[-2], found[-1], (size, cost)):
            found.pop()
        if found and found[-1][0] == size:
            found.pop()
        found.append((size, cost))
    return found


def _above(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


# -- charts ---------------------------------------------------------------------------------------------------------


def fronts_chart(rows: Sequence[Mapping[str, Any]], fronts: Fronts, params: Mapping[str, int]) -> str:
    """The layers' Pareto fronts with the chosen candidates; empty if no layer affects the output."""
    figure, axis = _figure()
    drawn = False
    for row in rows:
        candidates, sensitivity = fronts[row["layer"]]
        size = dict(zip(candidates["candidate_id"].to_pylist(), candidates["bytes"].to_pylist(), strict=True))
        x = np.array([size[name] for name in sensitivity["candidate_id"].to_pylist()], dtype=np.int64)
        y = np.asarray(sensitivity["global_cost"].to_numpy(), dtype=np.float64)
        kept = pareto_front(y, x) & (y > 0)
        if not kept.any():  # a logarithmic axis cannot show a layer without effect on the output
            continue
        order = np.argsort(x[kept])
        bits = 8 * x[kept][order] / params[row["layer"]]
        axis.plot(bits, y[kept][order], color=FAINT, linewidth=0.7, zorder=1)
        drawn = True
    if not drawn:
        return ""
    for form in FORMS:
        chosen = [row for row in rows if row["form"] == form.name]
        if chosen:
            widths = [8 * row["bytes"] / params[row["layer"]] for row in chosen]
            cost = [row["global_cost"] or np.nan for row in chosen]
            axis.scatter(widths, cost, color=form.colour, s=16, label=f"{form.name} ({len(chosen)})", zorder=2)
    axis.set_xlabel("bits per weight, with scales")
    axis.set_ylabel("cost of the layer")
    _logarithmic(axis)
    _legend(axis)
    return _svg(figure, "Pareto fronts of all layers and the chosen candidates")


def trade_off_chart(trade: Trade, chosen: tuple[int, float], float_bytes: int) -> str:
    """Predicted cost of the whole model against its size, with the choice and uniform allocations; empty if it is zero.

    Args:
        trade: of the search.
        chosen: bytes and predicted cost of the run's allocation.
        float_bytes: of the same layers in float32.
    """
    kept = trade.cost > 0
    if not kept.any() or not chosen[1] > 0:
        return ""
    figure, axis = _figure()
    unit, scale = _unit(max(trade.bytes[kept].max(), chosen[0]))
    axis.plot(trade.bytes[kept] / scale, trade.cost[kept], color=PLAIN, linewidth=1.4, label="this search, any budget")
    uniform = [(name, size, cost) for name, size, cost in trade.uniform if cost > 0]
    if uniform:
        axis.scatter(
            [size / scale for _, size, _ in uniform],
            [cost for *_, cost in uniform],
            marker="s",
            s=18,
            color=UNIFORM,
            label="same form in all layers",
            zorder=2,
        )
    axis.scatter([chosen[0] / scale], [chosen[1]], color=MARKED, s=34, label="this run", zorder=3)
    axis.set_xlabel(f"{unit} of the compressible layers (float32: {number(float_bytes / scale)})")
    axis.set_ylabel("predicted cost")
    _logarithmic(axis)
    _annotate(axis, [(size / scale, cost, name) for name, size, cost in uniform])
    _legend(axis)
    return _svg(figure, "Predicted cost of the whole model against its size")


def depth_chart(rows: Sequence[Mapping[str, Any]], depth: Mapping[str, float]) -> str:
    """Relative error of every layer's output in the compressed model, and each layer's own predicted cost.

    Args:
        rows: the allocation, in execution order.
        depth: NMSE of the layers' outputs, by name; layers without a call of their own are missing.
    """
    from matplotlib.ticker import MaxNLocator

    measured = [(place, depth[row["layer"]]) for place, row in enumerate(rows, 1) if depth.get(row["layer"], 0) > 0]
    alone = [(place, row["global_cost"]) for place, row in enumerate(rows, 1) if (row["global_cost"] or 0) > 0]
    if not measured and not alone:
        return ""
    figure, axis = _figure()
    if measured:
        label = "output of the layer, all layers compressed"
        places, errors = zip(*measured, strict=True)
        axis.plot(places, errors, color=PLAIN, marker="o", markersize=3, linewidth=1, label=label)
    if alone:
        label = "model's output, only this layer compressed"
        places, costs = zip(*alone, strict=True)
        axis.scatter(places, costs, color=MARKED, s=10, label=label, zorder=2)
    axis.set_xlabel("layer, in the order of execution")
    axis.set_ylabel("relative error (NMSE)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    _logarithmic(axis)
    _legend(axis)
    return _svg(figure, "Error of the layers' outputs through the depth of the network")


def prediction_chart(results: Sequence[Mapping[str, Any]], highlight: str | None) -> str:
    """Predicted cost against the measured output NMSE of runs; empty with less than two that have both.

    Without uniform runs: methods without a search predict nothing.
    """
    searched = [result for result in results if not is_uniform(result)]
    found = [result for result in searched if result["predicted_cost"] > 0 and (result["nmse"] or 0) > 0]
    if len(found) < 2:
        return ""
    figure, axis = _figure()
    x = np.array([result["predicted_cost"] for result in found])
    y = np.array([result["nmse"] for result in found])
    span = [min(x.min(), y.min()), max(x.max(), y.max())]
    axis.plot(span, span, color=FAINT, linewidth=1, label="equal")
    axis.scatter(x, y, color=[MARKED if one["run"] == highlight else PLAIN for one in found], s=24, zorder=2)
    axis.set_xlabel("predicted cost")
    axis.set_ylabel("measured output NMSE")
    _logarithmic(axis, "both")
    _annotate(axis, [(a, b, one["budget"]) for a, b, one in zip(x, y, found, strict=True)])
    _legend(axis)
    return _svg(figure, "Predicted cost against the measured output NMSE")


def curve_charts(
    results: Sequence[Mapping[str, Any]], highlight: str | None = None, least: float | None = None
) -> list[str]:
    """Metric, if there is one, and output NMSE of runs against their size.

    Runs that give all layers the same form and bit-width are squares. A line joins the runs that are Pareto-optimal in
    output NMSE and size.

    Args:
        results: the runs' result objects, of one model and one evaluation set.
        highlight: ``run`` of the result to mark.
        least: value of the metric that is asked for, drawn as a line.
    """
    results = sorted(results, key=lambda result: (result["bytes"], result["nmse"]))
    metric = next((result["metric"] for result in results if result["metric"]), None)
    nmse = [_float(result["nmse"]) for result in results]
    panels: list[tuple[str, list[float]]] = [("output NMSE", nmse)]
    if metric is not None:
        panels.insert(0, (metric["name"], [_float((one["metric"] or {}).get("compressed")) for one in results]))
    unit, scale = _unit(results[-1]["bytes"])
    size = np.array([result["bytes"] for result in results])
    front = np.flatnonzero(pareto_front(np.nan_to_num(np.array(nmse), nan=np.inf), size))
    charts = []
    for name, values in panels:
        figure, axis = _figure()
        if values is nmse:
            axis.plot(size[front] / scale, [values[place] for place in front], color=FAINT, linewidth=1, zorder=1)
        for uniform, marker, label in ((False, "o", "mixed"), (True, "s", "uniform")):
            places = [i for i, one in enumerate(results) if is_uniform(one) == uniform]
            if places:
                colours = [MARKED if results[i]["run"] == highlight else UNIFORM if uniform else PLAIN for i in places]
                axis.scatter(
                    size[places] / scale, [values[i] for i in places], c=colours, marker=marker, s=22, label=label
                )
        if metric is not None and name == metric["name"]:
            if metric["float"] is not None:
                label = f"float32: {number(metric['float'], 4)}"
                axis.axhline(metric["float"], color="0.35", linestyle="--", linewidth=1, label=label)
            if least is not None:
                axis.axhline(least, color=MARKED, linestyle=":", linewidth=1.2, label=f"asked: {number(least, 4)}")
        elif all(value > 0 for value in values):
            _logarithmic(axis)
        _annotate(axis, [(s / scale, v, one["budget"]) for s, v, one in zip(size, values, results, strict=True)])
        axis.set_xlabel(f"{unit} of the compressible layers (float32: {number(results[0]['float_bytes'] / scale)})")
        axis.set_ylabel(name)
        _legend(axis)
        charts.append(_svg(figure, f"{name} against size"))
    return charts


def is_uniform(result: Mapping[str, Any]) -> bool:
    """Whether a run gives several layers one form and bit-width, as methods without a search do."""
    rows = result["allocation"]
    return len(rows) > 1 and len({row["candidate_id"] for row in rows}) == 1


# -- drawing --------------------------------------------------------------------------------------------------------


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE)
    axis = figure.add_subplot()
    axis.tick_params(labelsize=9)
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.margins(x=0.08, y=0.1)
    return figure, axis


def _logarithmic(axis: Axes, which: str = "y") -> None:
    """Logarithmic axes with plain labels; more than one per decade if there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in ("x", "y") if which == "both" else (which,):
        getattr(axis, f"set_{name}scale")("log")
        low, high = getattr(axis, f"get_{name}lim")()
        decades = np.log10(high / low) if low > 0 else 1.0
        subs = (1.0,) if decades > 2 else (1.0, 3.0) if decades > 1 else (1.0, 2.0, 3.0, 5.0)
        line = getattr(axis, f"{name}axis")
        line.set_major_locator(LogLocator(subs=subs, numticks=8))
        line.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
        line.set_minor_formatter(NullFormatter())


def _tick(value: float) -> str:
    text = number(value, 2)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def _annotate(axis: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Labels of points, once the axes are as they will be; one that would cover an earlier one is left out."""
    axis.autoscale_view()
    points_per_pixel = 72 / axis.figure.dpi
    taken: list[tuple[float, float, float]] = []  # left, bottom and width in points
    for x, y, text in points:
        if not np.isfinite(y):
            continue
        left, bottom = (float(value) * points_per_pixel for value in axis.transData.transform((x, y)))
        width = LETTER * len(text)
        if all(left > a + w or left + width < a or abs(bottom - b) > LINE for a, b, w in taken):
            taken.append((left, bottom, width))
            axis.annotate(text, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=8, color="0.25")


LETTER, LINE = 5.2, 10.0  # width and height of a label's letters in points


def _legend(axis: Axes) -> None:
    """The legend, above the chart, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        columns = 1 if max(map(len, labels)) > 22 else 2 if len(labels) > 1 else 1
        axis.legend(
            handles, labels, fontsize=8, frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0)
        )


def _svg(figure: Figure, title: str) -> str:
    """The figure as an ``svg`` element that takes the width of its place, with all labels inside its frame."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    # The salt makes identifiers differ between the charts of a page, and equal between equal charts.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.sans-serif": ["DejaVu Sans", "Verdana"]}
    with rc_context(settings):
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.12, metadata=metadata)
    text = buffer.getvalue().decode()
    # Without the names of groups, which are the same in all charts.
    text = re.sub(r'<g id="[\w.]+_\d+"', "<g", text[text.index("<svg") :])
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    return f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{title}">{rest}'.strip()


def _unit(largest: float) -> tuple[str, int]:
    return next(((unit, scale) for unit, scale in UNITS if largest >= scale), ("B", 1))


def _float(value: float | None) -> float:
    return float("nan") if value is None else float(value)
