"""ViT-Tiny on ImageNet images: uniform nearest rounding, MLoRQ, and MLoRQ with LRA, at the same exact bytes.

    .venv/bin/python benchmarks/vit_tiny.py examples/vit_tiny.yaml --budget 3bit --budget 4bit
    .venv/bin/python benchmarks/vit_tiny.py examples/vit_tiny.yaml --budget 3bit --best

With ``--best`` the rows are those of second moments and closed forms instead, uniform and mixed.

Every row is a run on one store: they share the search, and a second call computes nothing. The uniform rows hold
``Q(b)`` in every layer; the mixed rows beside them get exactly their bytes.
"""

from __future__ import annotations

import argparse
from typing import Any

from mlorq.config import RunConfig
from mlorq.store import Store
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.workbench import Workbench


def run(path: str, budget: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """One run, with some keys of the configuration set."""
    config = RunConfig.from_yaml(path, overrides)
    bench = Workbench(config, Store(config.resolve(config.store)))
    executor = InProcess(bench, lambda label, done, total: print(f"  {label} {done}/{total}", flush=True))
    (result,) = run_pipeline(bench, executor, [budget])
    return result_json(bench, result)


def best_rows(path: str, bits: int, exact: str, common: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Uniform and mixed runs in the metric of second moments, 150 steps a block."""
    best = common | {"preset": "best", "rounding.iterations": 150}
    uniform = best | {"search.bits": [bits], "search.forms": ["Q"], "search.samples": 2}
    found = {}
    for method in ("gptq", "closed_form", "block"):
        found[f"{method}, uniform"] = run(path, f"{bits + 1}bit", uniform | {"rounding.method": method})
    found["best without reconstruction"] = run(path, exact, best | {"rounding.method": "closed_form"})
    found["best"] = run(path, exact, best)
    return found


def report(budget: str, rows: dict[str, dict[str, Any]], lines: list[str]) -> None:
    """Add the rows of a budget to the lines of the table."""
    for name, result in rows.items():
        metric = result["metric"]
        lines.append(
            f"| {budget} | {name} | {result['bytes']:,} | {metric['compressed']:.4f} | {metric['float']:.4f} "
            f"| {result['nmse']:.4f} |"
        )


def main() -> None:
    """Print a row a run, as Markdown, and the seconds of every stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--budget", action="append", required=True, help="whole bits, as in 3bit")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--best", action="store_true")
    arguments = parser.parse_args()
    common = dict(item.split("=", 1) for item in arguments.set)
    lines, seconds = [], {}
    for budget in arguments.budget:
        bits = int(budget.removesuffix("bit"))
        uniform = {
            "search.bits": [bits],
            "search.factor_bits": [],
            "search.samples": 2,  # one candidate a layer: its cost decides nothing
            "rounding.method": "nearest",
        }
        # A little more than the bits themselves: scales and zero-points come on top.
        rows = {"nearest, uniform": run(arguments.config, f"{bits + 1}bit", common | uniform)}
        size = rows["nearest, uniform"]["bytes"]
        params = rows["nearest, uniform"]["float_bytes"] // 4
        exact = f"{(8 * size + 1) / params:.12f}bit"  # rounded down to whole bytes again
        if arguments.best:
            rows = best_rows(arguments.config, bits, exact, common)
            report(budget, rows, lines)
            seconds[budget] = rows["best"]["seconds"]
            continue
        rows["MLoRQ"] = run(arguments.config, exact, common | {"rounding.method": "nearest"})
        rows["MLoRQ + LRA"] = run(arguments.config, exact, common | {"rounding.method": "lra"})
        report(budget, rows, lines)
        seconds[budget] = rows["MLoRQ + LRA"]["seconds"]
    print("| budget | method | bytes | top-1 | float top-1 | output NMSE |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    for budget, stages in seconds.items():
        print(f"\nseconds at {budget}: " + ", ".join(f"{name} {value}" for name, value in stages.items()))


if __name__ == "__main__":
    main()
