"""Uniform rows of one configuration: nearest rounding, GPTQ, closed form with error feedback, block reconstruction.

    .venv/bin/python benchmarks/methods.py examples/minilm.yaml --bits 3

All rows hold ``Q(bits)`` in every layer, so they have the same bytes; they share capture and store.
"""

from __future__ import annotations

import argparse

from mlorq.config import RunConfig
from mlorq.store import Store
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.workbench import Workbench

METHODS = ("nearest", "gptq", "closed_form", "block")


def main() -> None:
    """Print a row a method, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="of reconstruction, a block")
    arguments = parser.parse_args()
    print("| method | bytes | metric | float | output NMSE | seconds of rounding |\n|---|---|---|---|---|---|")
    for method in METHODS:
        changes = {
            "preset": "best",
            "search": {
                "bits": [arguments.bits],
                "forms": ["Q"],
                "samples": 2,
            },  # one candidate: its cost decides nothing
            "rounding": {"method": method, "iterations": arguments.steps},
        }
        config = RunConfig.from_yaml(arguments.config, changes)
        bench = Workbench(config, Store(config.resolve(config.store)))
        (result,) = run_pipeline(bench, InProcess(bench), [f"{arguments.bits + 1}bit"])
        found = result_json(bench, result)
        seconds = found["seconds"]["round"] + found["seconds"].get("reconstruct", 0.0)
        metric = found["metric"]
        print(
            f"| {method} | {found['bytes']:,} | {metric['compressed']:.4f} | {metric['float']:.4f} "
            f"| {found['nmse']:.4f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
