"""The report page: its numbers, its charts, and how a browser shows it on a desk, on a phone and on paper."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mlorq.evaluation.charts import (
    Fronts,
    curve_charts,
    depth_chart,
    fronts_chart,
    is_uniform,
    prediction_chart,
    trade_off,
    trade_off_chart,
)
from mlorq.evaluation.page import Made, Searched, Stage, render_report, render_sweep, render_table
from mlorq.evaluation.report import Measured, size_accuracy_picture
from mlorq.numbers import byte_count, byte_size, cell, duration, number
from scripts.browser import browser, find_browser

BITS = (2, 3, 4, 6, 8)
WEIGHTS = 147_456


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (3.7136482e-5, "3.7e-5"), (0.0, "0"), (1e-3, "0.00100"), (0.082415, "0.0824"), (12.0, "12.0"),
        (10.666, "10.7"), (1234.5, "1,234"), (999_999.0, "999,999"), (2.5e6, "2.5e6"), (1e9, "1e9"),
        (-4.2e-9, "-4.2e-9"), (float("nan"), "–"), (None, "–"), (float("inf"), "∞"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_sizes_and_times() -> None:
    assert [byte_size(n) for n in (None, 7, 1500, 4_022_694, 12_345_678_901)] == [
        "–", "7 B", "1.50 kB", "4.02 MB", "12.3 GB",
    ]  # fmt: skip
    assert [byte_count(n) for n in (None, 999, 6_368_377)] == ["–", "999 B", "6,368,377 B (6.37 MB)"]
    times = {0.004: "0 s", 0.4216: "0.42 s", 12.3: "12 s", 125: "2 min 5 s", 3840: "1 h 4 min"}
    assert {seconds: duration(seconds) for seconds in times} == times
    assert [cell(v) for v in (None, 1234, 0.8114159, True, "a")] == ["", "1,234", "0.8114", "yes", "a"]


# -- charts ---------------------------------------------------------------------------------------------------------


def tables(costs: list[float], sizes: list[int]) -> tuple[pa.Table, pa.Table]:
    """A layer's candidate and sensitivity tables: one candidate per cost."""
    names = [f"Q{bits}" for bits in BITS[: len(costs)]]
    bits, rank = list(BITS[: len(costs)]), pa.array([None] * len(costs), pa.int64())
    return (
        pa.table({"candidate_id": names, "bits": bits, "rank": rank, "bytes": sizes}),
        pa.table({"candidate_id": names, "global_cost": costs}),
    )


def test_trade_off_is_the_hull_of_all_allocations() -> None:
    """Against all combinations of the candidates: no allocation is below the curve, and its points are allocations."""
    random = np.random.default_rng(0)
    fronts = {
        f"layer{index}": tables(list(random.uniform(0, 1, 4)), [int(n) for n in random.integers(10, 90, 4)])
        for index in range(4)
    }
    trade = trade_off(fronts)
    choices = [
        list(zip(own["bytes"].to_pylist(), costs["global_cost"].to_pylist(), strict=True))
        for own, costs in fronts.values()
    ]
    every = {(sum(s for s, _ in one), round(sum(c for _, c in one), 9)) for one in itertools.product(*choices)}
    assert {(int(s), round(float(c), 9)) for s, c in zip(trade.bytes, trade.cost, strict=True)} <= every
    for size, cost in every:
        if size >= trade.bytes[0]:
            assert cost >= np.interp(size, trade.bytes, trade.cost) - 1e-9
    assert len(trade.bytes) > 3
    names = [name for name, *_ in trade.uniform]
    assert sorted(names) == ["Q2", "Q3", "Q4", "Q6"]
    assert next(size for name, size, _ in trade.uniform if name == "Q3") == sum(own[1][0] for own in choices)


def network(layers: int) -> tuple[list[dict[str, Any]], Fronts, dict[str, int], dict[str, float]]:
    """An allocation of a network with long names, its fronts, numbers of weights and errors through its depth."""
    random = np.random.default_rng(1)
    rows, fronts, params, depth = [], {}, {}, {}
    for index in range(layers):
        name = f"encoder.layer.{index}.attention.output.dense"
        costs = [float(value) for value in random.uniform(0.5, 2) * 0.03 * 10.0 ** -np.array(BITS)]
        sizes = [WEIGHTS * bits // 8 + 1536 for bits in BITS]
        fronts[name], params[name], depth[name] = tables(costs, sizes), WEIGHTS, 0.004 + 0.002 * index
        choice = int(random.integers(0, len(BITS)))
        row = {"layer": name, "candidate_id": f"Q{BITS[choice]}", "form": "Q", "bytes": sizes[choice]}
        rows.append(row | {"global_cost": costs[choice]})
    return rows, fronts, params, depth


def result(budget: str, rows: list[dict[str, Any]], nmse: float, metric: float | None = 0.81) -> dict[str, Any]:
    """A result as far as pages look at it."""
    size = sum(row["bytes"] for row in rows)
    named = None if metric is None else {"name": "spearman", "float": 0.8203, "compressed": metric}
    return {
        "run": f"all-MiniLM-L6-v2-{budget}-1a2b3c4d", "model": "all-MiniLM-L6-v2", "budget": budget,
        "budget_bytes": size + 100, "bytes": size, "rest_bytes": 47_800_000, "file_bytes": size + 47_900_000,
        "float_bytes": 4 * WEIGHTS * len(rows), "predicted_cost": 1.3 * nmse, "nmse": nmse, "nmse_data": "evaluation",
        "metric": named, "allocation": rows,
        "metrics": {"float": {"spearman": 0.82, "pearson": 0.83}, "compressed": {"spearman": 0.81, "pearson": 0.8}},
        "calibration": {"warnings": ["too few calibration samples: use more samples"]},
        "left_float": [{"name": "embeddings.word_embeddings", "reason": "an embedding table", "bytes": 46_881_792}],
        "exports": [{"to": "onnx", "bytes": 12_345_678}],
    }  # fmt: skip


def uniform(rows: list[dict[str, Any]], bits: int) -> list[dict[str, Any]]:
    """The allocation with the same candidate in all layers."""
    return [row | {"candidate_id": f"Q{bits}", "bytes": WEIGHTS * bits // 8} for row in rows]


def test_charts_are_equal_for_equal_runs_and_share_no_identifiers() -> None:
    rows, fronts, params, depth = network(6)
    runs = [result("3bit", rows, 0.02), result("2bit", rows, 0.1), result("4bit", uniform(rows, 4), 0.004)]

    def all_charts() -> list[str]:
        return [
            fronts_chart(rows, fronts, params),
            trade_off_chart(trade_off(fronts), (1000, 0.01), 10**6),
            depth_chart(rows, depth),
            prediction_chart(runs, None),
            *curve_charts(runs, runs[0]["run"], least=0.8),
        ]

    charts = all_charts()
    assert charts == all_charts()
    assert all(chart.startswith("<svg viewBox=") and chart.endswith("</svg>") for chart in charts)
    names = [set(re.findall(r' id="([^"]+)"', chart)) for chart in charts]
    for one, other in itertools.combinations(names, 2):
        assert not one & other
    assert "asked: 0.8000" in charts[4]
    assert [is_uniform(run) for run in runs] == [False, False, True]


def test_nothing_is_drawn_where_there_is_nothing_to_show() -> None:
    rows, fronts, params, _ = network(2)
    still = [row | {"global_cost": 0.0} for row in rows]
    none = {name: (own, pa.table({**dict(zip(cost.column_names, cost.columns, strict=True)), "global_cost": [0.0] * 5}))
            for name, (own, cost) in fronts.items()}  # fmt: skip
    assert fronts_chart(still, none, params) == ""
    assert trade_off_chart(trade_off(none), (10, 0.0), 100) == ""
    assert depth_chart(still, {}) == ""
    assert prediction_chart([result("3bit", rows, 0.02)], None) == ""
    exact = result("8bit", rows, 0.0, None)
    assert len(curve_charts([exact])) == 1  # no metric, and no logarithm of zero


# -- in a browser ---------------------------------------------------------------------------------------------------

# What is wrong with the page that is shown: overflow, images that did not load, texts outside their box, small ones.
FAULTS = """(() => {
  const found = [], root = document.documentElement;
  if (root.scrollWidth > root.clientWidth) found.push(`page ${root.scrollWidth} wide in ${root.clientWidth}`);
  for (const image of document.images) if (!(image.complete && image.naturalWidth)) found.push(`image ${image.alt}`);
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), range = document.createRange();
  while (texts.nextNode()) {
    const text = texts.currentNode, parent = text.parentElement;
    if (!text.data.trim() || parent.closest('style, details:not([open]) > :not(summary)')) continue;
    const drawing = parent.closest('svg'), box = drawing ?? parent.closest('td, th, dt, dd, pre, p, h1, h2, div, body');
    const frame = box.getBoundingClientRect();
    range.selectNodeContents(text);
    for (const own of range.getClientRects()) {
      const wide = own.left < frame.left - 1 || own.right > frame.right + 1 || own.right > root.clientWidth + 1;
      const high = own.top < frame.top - 1 || own.bottom > frame.bottom + 1;
      if (wide || (drawing && high)) found.push(`cut: ${text.data.trim()}`);
      if (text.data.trim().length < 9 && range.getClientRects().length > 1) found.push(`split: ${text.data.trim()}`);
      const upright = drawing && own.width < own.height;
      if (!PRINT && own.height < 9 && !upright) found.push(`small: ${text.data.trim()} ${own.height}`);
    }
  }
  return found;
})()"""


def test_a_browser_shows_pages_whole_at_two_widths_and_on_paper(tmp_path: Path) -> None:
    if find_browser() is None:
        pytest.skip("no Chromium is installed")
    rows, fronts, params, depth = network(24)
    runs = [result("3bit", rows, 0.02), result("4bit", uniform(rows, 4), 0.004, 0.8), result("2bit", rows, 0.2, 0.7)]
    runs = [run | {"run": f"{run['run']}{index}"} for index, run in enumerate(runs)]
    made = Made(
        [Stage("capture", 1, 0, 12.5), Stage("candidates", 24, 24, 340.0), Stage("round", 24, None, 3800.0)],
        "2026-01-31 12:00", ["Computing took 2 min 49 s in all."], "mlorq compress run.yaml --budget 3bit",
        "model: {family: transformers}\n" * 5, "/home/somebody/a/long/folder/of/models/and/other/things",
        {"mlorq": "0.1.0", "torch": "2.13.0"},
    )  # fmt: skip
    columns = ("runtime", "bytes, MB", "memory, MB", "load, s", "batch 32: ms, ratio to float (spread)")
    benchmark = Measured(size_accuracy_picture(runs, "net"), [dict.fromkeys(columns, "42.1, 2.10x (1.89-2.73)")], "ms")
    pages = {
        "report": render_report(
            runs[0], searched=Searched(fronts, params, depth), runs=runs, made=made, measured=benchmark
        ),
        "bare": render_report(runs[0] | {"metric": None}, picture=benchmark.picture),
        "sweep": render_sweep("net", [{"run": one["run"], "bytes": 10**9, "spearman": 3e-5} for one in runs], runs),
        "compare": render_table("net", [dict.fromkeys(columns, 3.7e-5) | {"name": "closed form with feedback"}] * 3),
    }  # fmt: skip
    with browser() as page:
        for name, content in pages.items():
            (tmp_path / f"{name}.html").write_bytes(content)
            page.call("Page.navigate", url=f"file://{tmp_path}/{name}.html")
            page.wait_for(f"location.href.endsWith('{name}.html') && document.readyState === 'complete'", name)
            for width, mobile, media in ((390, True, ""), (1280, False, ""), (703, False, "print")):
                page.resize(width, mobile=mobile, media=media)
                script = FAULTS.replace("PRINT", "true" if media else "false")
                assert page.evaluate(script) == [], (name, width)
        # The check finds faults: a table that is too wide, and a label outside its chart.
        long = "<p style=white-space:nowrap>" + "x" * 999
        page.evaluate(f"document.body.insertAdjacentHTML('beforeend', '{long}')")
        assert any(fault.startswith("page ") for fault in page.evaluate(script))
        assert any(fault.startswith("cut: xxx") for fault in page.evaluate(script))
