"""The digits ViT on which the published code was measured: NMSE of the logits, and CPU-seconds of every stage.

    .venv/bin/python benchmarks/vit_digits.py PATH/TO/vit_digits

``--sensitivity measured`` measures and interpolates costs as published. ``--check LAYER`` also measures every candidate
on a layer's front and compares the costs of both with these.

Same images, same `paper` accounting, same 500 test images as the published figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from real.vit_digits_model import build, calibration_batches, evaluate, test_batches
from scipy.stats import spearmanr

from mlorq.allocation.choices import SearchSpace
from mlorq.allocation.program import Program, solve
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.codecs.base import Storage
from mlorq.config.run import PRESETS
from mlorq.costs.first_order import first_order_sensitivity
from mlorq.costs.float_passes import FloatPasses
from mlorq.costs.local import candidate_table
from mlorq.costs.measured import LayerProbe, dense_of, measured_sensitivity, spread_batches
from mlorq.evaluation.outputs import model_outputs, output_nmse
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import FORMS, Candidate, Shape
from mlorq.models.base import FloatModel
from mlorq.models.layers import find_layers, weight_matrix
from mlorq.rounding import METHODS, RoundingTask
from mlorq.rounding.paired_forward import PairedForward

# Published code on the same model and images: NMSE before and after 500 LRA iterations a layer.
PUBLISHED = {3.0: ("1.2e-3", "6e-5"), 2.5: ("2.2e-3", "2.3e-4")}
PUBLISHED_SECONDS = {"hessian": 6, "candidates": 499, "sensitivity": 217, "lra": 190}
PUBLISHED_SEARCH = 770  # all but LRA
SENSITIVITIES = {"first_order": first_order_sensitivity, "measured": measured_sensitivity}


def check(probe: LayerProbe, fit: HessianFit, table: pa.Table, name: str) -> None:
    """Measure every candidate on a layer's front, and print how far the costs of either kind are from that."""
    rows = {row["candidate_id"]: row for row in table.to_pylist()}
    for kind, function in SENSITIVITIES.items():
        costs = function(probe, fit, table)
        ids = costs["candidate_id"].to_pylist()
        full = np.array([probe.cost(dense_of(fit, rows[one])) for one in ids])
        measured = costs["how"].to_pylist().count("measured")
        kinds = {kind: ("global_cost", measured)} | ({f"{kind}, uncorrected": (kind, 0)} if kind != "measured" else {})
        for label, (column, count) in kinds.items():
            values = costs[column].to_numpy()
            factors = np.exp(np.abs(np.log(values / full)))
            figures = " | ".join(f"{value:.2f}" for value in (*np.quantile(factors, (0.5, 0.9)), factors.max()))
            order = spearmanr(values, full).statistic
            print(f"| {name} | {len(ids)} | {label} | {count} | {order:.4f} | {figures} |", flush=True)


def main() -> None:
    """Run the search once and print NMSE by budget, and CPU-seconds by stage, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=64, help="calibration images for measured costs")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sensitivity", choices=SENSITIVITIES, default="first_order")
    parser.add_argument("--check", metavar="LAYER", action="append", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = function()
        spent[name] = spent.get(name, 0.0) + time.process_time() - started
        return result

    module = build(arguments.folder)
    model = FloatModel(module, "custom", {}, blocks=[f"blocks.{index}" for index in range(6)], key="digits")
    calibration, evaluation = calibration_batches(), test_batches()
    reference = model_outputs(model, module, evaluation)
    print(f"float accuracy {evaluate(module)['accuracy']:.4f}\n")

    found = find_layers(model, calibration[0])
    hessian = timed("hessian", lambda: label_free_hessian(model, found.layers, calibration[:1]))
    settings = FitSettings(zero_point="int16", percentiles=PRESETS["paper"]["search"]["percentiles"])
    storage = Storage("paper", settings.zero_point)
    forms = {form.name: form.settings() for form in FORMS if form.by_default}
    fits = {
        layer.name: HessianFit(weight_matrix(module.get_submodule(layer.name)), hessian[layer.name], settings)
        for layer in found.layers
    }

    def candidates() -> dict[str, pa.Table]:
        return {name: candidate_table(fit, Shape(*fit.weight.shape), forms, storage) for name, fit in fits.items()}

    tables = timed("candidates", candidates)

    measuring = spread_batches(calibration, arguments.samples)

    def sensitivity() -> dict[str, Any]:
        costs = {}
        passes = FloatPasses(model, found.blocks, measuring)
        for layer in found.layers:
            with LayerProbe(model, layer, found.blocks, measuring, passes=passes) as probe:
                costs[layer.name] = SENSITIVITIES[arguments.sensitivity](probe, fits[layer.name], tables[layer.name])
        return costs

    if arguments.check:
        print("| layer | candidates | costs | measured | rank correlation | median factor | 9 of 10 | largest |")
        print("|---|---|---|---|---|---|---|---|")
    for name in arguments.check:
        with LayerProbe(model, found[name], found.blocks, measuring) as probe:
            check(probe, fits[name], tables[name], name)

    costs = timed("sensitivity", sensitivity)
    space = SearchSpace.from_tables((layer.name, tables[layer.name], costs[layer.name]) for layer in found.layers)
    print("| budget | nearest, NMSE | published | LRA, NMSE | published | accuracy | low-rank layers |")
    print("|---|---|---|---|---|---|---|")
    for bits in (3.0, 2.5):
        program = Program(space.choices, int(bits * found.params / 8))
        picked = timed("ilp", lambda program=program: solve(program)).picked
        chosen = [Candidate.of_row(row) for row in space.table(picked).to_pylist()]
        nmse, accuracy = {}, 0.0
        for name in ("nearest", "lra"):
            method = METHODS[name]
            paired = PairedForward(model, found.blocks, calibration)

            def round_all(paired=paired, chosen=chosen, method=method) -> None:
                given = {"iterations": arguments.iterations} if method.needs_inputs else {}
                for layer, candidate in zip(found.layers, chosen, strict=True):
                    fit = fits[layer.name]
                    moments = paired.moments(layer) if method.needs_inputs else None
                    task = RoundingTask(layer.name, candidate, fit, fit.output_metric, moments)
                    paired.set(layer, method.round(task, method.layer_settings(**given)).layer)

            timed(f"{name} {bits} bit", round_all)
            outputs = model_outputs(model, paired.compressed, evaluation)
            nmse[name] = output_nmse(outputs, reference)
            accuracy = evaluate(paired.compressed)["accuracy"]
        before, after = PUBLISHED[bits]
        low_rank = sum(FORMS[candidate.form].has_product for candidate in chosen)
        print(
            f"| {bits} bit | {nmse['nearest']:.2e} | {before} | {nmse['lra']:.2e} | {after} | {accuracy:.3f} | "
            f"{low_rank} of {len(chosen)} |",
            flush=True,
        )
    print("\n| stage | CPU-seconds | published code |\n|---|---|---|")
    for name, value in spent.items():
        print(f"| {name} | {value:.1f} | {PUBLISHED_SECONDS.get('lra' if name.startswith('lra') else name, '')} |")
    stages = ("hessian", "candidates", "sensitivity", "ilp")
    search = sum(value for name, value in spent.items() if name in stages)
    print(f"\nsearch in all: {search:.1f} CPU-seconds, {PUBLISHED_SEARCH} by the published code")


if __name__ == "__main__":
    main()
