"""What quantized activations cost by themselves: float weights, one way of quantizing after another.

    .venv/bin/python benchmarks/activations.py benchmarks/real/vit_tiny.yaml --bits 4 --samples 64

The NMSE of the output on so many evaluation samples, for every method; then, for the last one, with one kind of tensor
alone quantized.
"""

from __future__ import annotations

import argparse
import re
from copy import deepcopy

from mlorq.activations.calibrate import calibrate
from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.activations.plan import ActivationPlan
from mlorq.activations.quantizers import ActivationQuantizer
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.costs.measured import spread_batches
from mlorq.evaluation.outputs import model_outputs, output_nmse
from mlorq.models.layers import find_layers
from steps.session import Session


def main() -> None:
    """Print two tables, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=64, help="of the evaluation data")
    parser.add_argument("--methods", nargs="*", default=ACTIVATION_METHODS.names())
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the methods")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config = RunConfig.from_yaml(arguments.config, dict(item.split("=", 1) for item in arguments.set))
    session = Session(config, Store(config.resolve(config.store)))
    model, layers = session.model, find_layers(session.model, session.calibration.batches[0]).layers
    batches = spread_batches(session.evaluation.batches, arguments.samples)
    reference = model_outputs(model, model.module, batches)

    def cost(module: object) -> float:
        return output_nmse(model_outputs(model, module, batches), reference)  # type: ignore[arg-type]

    def quantized(method: str) -> tuple[ActivationPlan, object, dict[str, ActivationQuantizer]]:
        options = dict(item.split("=", 1) for item in arguments.option)
        settings = ACTIVATION_METHODS[method].settings(bits=arguments.bits, method=method, **options)
        plan = calibrate(model, layers, spread_batches(session.calibration.batches, 32), settings)
        module = deepcopy(model.module)
        plan.fold(module)
        return plan, module, plan.install(module)

    print("| method | output NMSE |\n|---|---|", flush=True)
    for method in arguments.methods:
        plan, module, installed = quantized(method)
        print(f"| {method} | {cost(module):.4f} |", flush=True)
    kinds: dict[str, list[ActivationQuantizer]] = {}
    for site in plan.sites:
        kinds.setdefault(re.sub(r"\d+", "*", site.name, count=1), []).append(installed[site.name])
    print(f"\n| {arguments.methods[-1]}, these alone | output NMSE |\n|---|---|", flush=True)
    for kind, own in kinds.items():
        for quantizer in installed.values():
            quantizer.enabled = quantizer in own
        print(f"| `{kind}` | {cost(module):.4f} |", flush=True)


if __name__ == "__main__":
    main()
