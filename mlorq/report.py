"""Pictures and one page of a run's result: what was chosen for every layer, and what it costs."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

COLOURS = {"Q": "#2f6fb0", "LR": "#d1662f"}


def front_picture(
    rows: Sequence[Mapping[str, Any]],
    fronts: Mapping[str, tuple[pa.Table, pa.Table]],
    params: Mapping[str, int],
    result: Mapping[str, Any],
) -> bytes:
    """A PNG: bits a weight of every layer by form, and the global cost of all layers' fronts with the choice.

    Args:
        rows: of the allocation, in execution order.
        fronts: each layer's candidate and sensitivity tables.
        params: each layer's number of weights.
        result: the run's result object; ``budget``, ``bytes`` and ``nmse`` go into the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, max(4.0, 0.17 * len(rows) + 1.5)), width_ratios=(3, 2))
    bits = [8 * row["bytes"] / params[row["layer"]] for row in rows]
    position = np.arange(len(rows))
    left.barh(position, bits, color=[COLOURS[row["form"]] for row in rows])
    for index, row in enumerate(rows):
        left.text(bits[index], index, f" {row['candidate_id']}", va="center", fontsize=6.5)
    left.set_yticks(position, [row["layer"] for row in rows], fontsize=6.5)
    left.invert_yaxis()
    left.set_xlabel("bits a weight, scales and zero-points included")
    left.set_xlim(0, max(bits) * 1.2)
    left.set_title(
        f"{result['model']} at {result['budget']}: {result['bytes']:,} bytes, output NMSE {result['nmse']:.4f}"
    )
    for row in rows:
        candidates, sensitivity = fronts[row["layer"]]
        size = dict(zip(candidates["candidate_id"].to_pylist(), candidates["bytes"].to_pylist(), strict=True))
        names = sensitivity["candidate_id"].to_pylist()
        x = np.array([8 * size[name] / params[row["layer"]] for name in names])
        y = sensitivity["global_cost"].to_numpy()
        if not (y > 0).any():  # a layer that cannot affect the output has no place on a logarithmic axis
            continue
        order = np.argsort(x)
        right.plot(x[order], np.minimum.accumulate(y[order]), color="0.8", linewidth=0.7, zorder=1)
    for form, colour in COLOURS.items():
        chosen = [index for index, row in enumerate(rows) if row["form"] == form]
        cost = [rows[index]["global_cost"] or np.nan for index in chosen]
        right.scatter([bits[i] for i in chosen], cost, color=colour, s=22, label=f"{form} ({len(chosen)})", zorder=2)
    right.set_yscale("log")
    right.set_xlabel("bits a weight")
    right.set_ylabel("global cost: output NMSE with this layer alone compressed")
    right.set_title("fronts of all layers (grey) and what was chosen")
    right.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    # No metadata: equal results give equal bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def render_report(result: Mapping[str, Any], picture: bytes) -> bytes:
    """One HTML page with the totals, the picture and the allocation; it needs no other file."""
    metric = result["metric"]
    totals = {
        "budget": f"{result['budget']} ({result['budget_bytes']:,} bytes for the compressible layers)",
        "compressible layers": f"{result['bytes']:,} bytes, {result['float_bytes'] / result['bytes']:.2f} times "
        f"smaller than float32 ({result['float_bytes']:,} bytes)",
        "rest of the model": f"{result['rest_bytes']:,} bytes",
        "checkpoint on disk": f"{result['file_bytes']:,} bytes",
        "output NMSE": f"{result['nmse']:.6f} (on {result['nmse_data']} data)",
    }
    if metric is not None:
        totals[metric["name"]] = f"float {metric['float']:.4f}, compressed {metric['compressed']:.4f}"
    columns = ("layer", "candidate_id", "bytes", "global_cost")
    head = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row[name]))}</td>" for name in columns) + "</tr>"
        for row in result["allocation"]
    )
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in totals.items())
    image = base64.b64encode(picture).decode()
    page = (
        "<!doctype html><html lang='en'><meta charset='utf-8'>"
        f"<title>{html.escape(result['run'])}</title>"
        "<style>body{font:15px system-ui;margin:2em;max-width:75em}img{max-width:100%}"
        "td,th{padding:.1em .8em;text-align:left}dt{font-weight:600}</style>"
        f"<h1>{html.escape(result['run'])}</h1><dl>{listed}</dl>"
        f"<img alt='allocation and fronts' src='data:image/png;base64,{image}'>"
        f"<table><tr>{head}</tr>{body}</table></html>"
    )
    return page.encode()


def _cell(value: Any) -> str:
    return f"{value:.3e}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
