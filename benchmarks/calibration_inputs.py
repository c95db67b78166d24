"""Inputs of layers on calibration data of several sizes and kinds, against those on evaluation data: no compression.

    .venv/bin/python benchmarks/calibration_inputs.py examples/minilm.yaml --samples 4 --samples 256
    .venv/bin/python benchmarks/calibration_inputs.py examples/minilm.yaml \\
        --calibration '{source: synthetic, samples: 256, batch_size: 16}'

Error ratios of ``mlorq/calibration/coverage.py``, tokens weighted alike: least, median and largest over the layers.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

import torch

from mlorq.calibration.collect import capture
from mlorq.calibration.covariance import OuterProducts
from mlorq.calibration.coverage import damped_factor
from mlorq.config.run import RunConfig
from mlorq.costs.measured import spread_batches
from steps import layers
from steps.base import execute
from steps.session import Session, open_store

EVALUATED = 64


def inputs(session: Session, batches: Any) -> dict[str, OuterProducts]:
    """Outer products of the inputs of all layers."""
    ref = execute(layers.spec(session), session.worker).ref
    return capture(session.model, session.artifacts.layers(ref).layers, batches, moments=True).inputs


def shown(values: list[float]) -> str:
    """Least, median and largest."""
    return f"{min(values):.2f} {median(values):.2f} {max(values):.2f}"


def main() -> None:
    """Print a row a calibration set, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--samples", action="append", type=int, default=[], help="of the configured calibration data")
    parser.add_argument("--calibration", action="append", default=[], help="another data.calibration section")
    parser.add_argument("--every", type=int, default=1, help="look at every so many layers with inputs of their own")
    arguments = parser.parse_args()
    common = {"store": "memory://calibration-inputs"}
    rows = {f"{count} samples": common | {"data.calibration.samples": count} for count in arguments.samples}
    rows |= {text: common | {"data.calibration": text} for text in arguments.calibration}
    print("| calibration | between folds | evaluation over held-out |\n|---|---|---|", flush=True)
    for name, overrides in rows.items():
        config = RunConfig.from_yaml(arguments.config, overrides)
        session = Session(config, open_store(config))
        found = inputs(session, session.calibration.batches)
        other = inputs(session, spread_batches(session.evaluation.batches, EVALUATED))
        folds, evaluation = [], []
        for layer in list(dict.fromkeys(found))[:: arguments.every]:
            own, held = found[layer].means()
            factor = damped_factor(own)
            assert factor is not None
            inverse = torch.cholesky_inverse(factor)
            fitted, held_out, evaluated = (
                float((inverse * part).sum() / part.trace()) for part in (own, held, other[layer].means().mean(0))
            )
            folds.append(held_out / fitted)
            evaluation.append(evaluated / held_out)
        print(f"| {name} | {shown(folds)} | {shown(evaluation)} |", flush=True)


if __name__ == "__main__":
    main()
