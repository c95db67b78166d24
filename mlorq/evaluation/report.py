"""Pictures of results as PNG: the allocation with its costs, and sweeps (``page`` has the HTML pages)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from mlorq.costs.pareto import pareto_front
from mlorq.forms.base import FORMS
from mlorq.numbers import byte_count

PLAIN, MARKED = "#2f6fb0", "#d1662f"  # colours of ordinary and highlighted runs


class Measured(NamedTuple):
    """A benchmark of a checkpoint, for display: its picture as a PNG, its table, and what the numbers are."""

    picture: bytes
    rows: Sequence[Mapping[str, str]]
    legend: str


def front_picture(
    rows: Sequence[Mapping[str, Any]],
    fronts: Mapping[str, tuple[pa.Table, pa.Table]],
    params: Mapping[str, int],
    result: Mapping[str, Any],
) -> bytes:
    """A PNG of each layer's bits per weight, and of the global costs on all layers' fronts with the chosen candidates.

    Args:
        rows: the allocation, in execution order.
        fronts: each layer's candidate and sensitivity tables.
        params: each layer's number of weights.
        result: the run's result object; ``budget``, ``bytes`` and ``nmse`` go into the title.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, max(4.0, 0.17 * len(rows) + 1.5)))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    bits = [8 * row["bytes"] / params[row["layer"]] for row in rows]
    position = np.arange(len(rows))
    left.barh(position, bits, color=[FORMS[row["form"]].colour for row in rows])
    for index, row in enumerate(rows):
        left.text(bits[index], index, f" {row['candidate_id']}", va="center", fontsize=6.5)
    left.set_yticks(position, [row["layer"] for row in rows], fontsize=6.5)
    left.invert_yaxis()
    left.set_xlabel("bits per weight, with scales and zero-points")
    left.set_xlim(0, max(bits) * 1.2)
    left.set_title(
        f"{result['model']} at {result['budget']}: {byte_count(result['bytes'])}, output NMSE {result['nmse']:.4f}",
        y=1,  # a position that is given is not searched for, which would lay out all ticks once more
    )
    for row in rows:
        candidates, sensitivity = fronts[row["layer"]]
        size = dict(zip(candidates["candidate_id"].to_pylist(), candidates["bytes"].to_pylist(), strict=True))
        names = sensitivity["candidate_id"].to_pylist()
        x = np.array([8 * size[name] / params[row["layer"]] for name in names])
        y = sensitivity["global_cost"].to_numpy()
        if not (y > 0).any():  # a logarithmic axis cannot show a layer without effect on the output
            continue
        order = np.argsort(x)
        right.plot(x[order], np.minimum.accumulate(y[order]), color="0.8", linewidth=0.7, zorder=1)
    for form in FORMS:
        chosen = [index for index, row in enumerate(rows) if row["form"] == form.name]
        cost = [rows[index]["global_cost"] or np.nan for index in chosen]
        label = f"{form.name}, {form.label} ({len(chosen)})"
        right.scatter([bits[i] for i in chosen], cost, color=form.colour, s=22, label=label, zorder=2)
    if right.lines:  # empty if no layer affects the output
        _logarithmic(right)
    right.set_xlabel("bits per weight")
    right.set_ylabel("global cost: output NMSE with only this layer compressed")
    right.set_title("fronts of all layers (grey) and chosen candidates", y=1)
    right.legend()
    # Margins in inches from the longest name: measuring the text, as a layout engine does, would draw all of it twice.
    width, height = figure.get_size_inches()
    names, between = _NAME_INCHES * max(len(row["layer"]) for row in rows) + 0.2, 1.0
    axis = (width - names - between - 0.15) / 2
    figure.subplots_adjust(names / width, 0.55 / height, 1 - 0.15 / width, 1 - 0.35 / height, wspace=between / axis)
    buffer = io.BytesIO()
    # No metadata: equal results give equal bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


_NAME_INCHES = 0.058  # width of a letter of 6.5 points


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis y with plain labels such as 1e-05; formulas would take longer to set than all else to draw."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:.0e}")
    axis.yaxis.set_minor_formatter("")


def size_accuracy_picture(results: Sequence[Mapping[str, Any]], title: str, *, highlight: str | None = None) -> bytes:
    """A PNG of the task's metric, if there is one, and the output NMSE of several runs against their size.

    The float model's metric is a dashed line. Grey lines join the runs that are Pareto-optimal in NMSE and size.

    Args:
        results: the runs' result objects, of one model and one evaluation set.
        title: of the picture.
        highlight: ``run`` of the result to mark.
    """
    from matplotlib.figure import Figure

    results = sorted(results, key=lambda result: (result["bytes"], result["nmse"]))
    unit, scale = next(item for item in _UNITS if results[-1]["bytes"] >= item[1] or item[1] == 1)
    metric = next((result["metric"] for result in results if result["metric"]), None)
    nmse = [_number(result["nmse"]) for result in results]
    panels = {"output NMSE": nmse}
    if metric is not None:
        panels = {metric["name"]: [_number((result["metric"] or {}).get("compressed")) for result in results]} | panels
    figure = Figure(figsize=(6 if metric is None else 11.5, 4.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    front = np.flatnonzero(pareto_front(np.array(nmse), np.array([result["bytes"] for result in results])))
    size = [result["bytes"] / scale for result in results]
    colours = [MARKED if result["run"] == highlight else PLAIN for result in results]
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        axis.plot([size[i] for i in front], [values[i] for i in front], color="0.75", linewidth=1, zorder=1)
        axis.scatter(size, values, color=colours, s=28, zorder=2)
        for x, y, result in zip(size, values, results, strict=True):
            if np.isfinite(y):
                axis.annotate(result["budget"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set_xlabel(f"{unit} of the compressible layers (float32: {results[0]['float_bytes'] / scale:,.3g} {unit})")
        axis.set_ylabel(name)
        axis.margins(x=0.12, y=0.12)
    if metric is not None and metric["float"] is not None:
        label = f"float32 model: {metric['float']:.4g} at {results[0]['float_bytes'] / scale:,.3g} {unit}"
        axes[0, 0].axhline(metric["float"], color="0.35", linestyle="--", linewidth=1, label=label)
        axes[0, 0].legend(loc="best", fontsize=8)
    if all(value > 0 for value in nmse):
        _logarithmic(axes[0, -1])
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


_UNITS = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3), ("bytes", 1))


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


def small_picture(picture: bytes, width: int = 1000, colours: int = 48) -> bytes:
    """The picture as a PNG of at most ``width`` columns and ``colours`` colours, for embedding in pages."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    # This way of choosing colours keeps those of a few small dots.
    few = image.quantize(colours, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def data_url(picture: bytes) -> str:
    """A PNG as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
