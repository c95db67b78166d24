"""What single parts of a preset are worth: one row with everything, and one row for each part that is left out.

    .venv/bin/python benchmarks/ablation.py examples/minilm.yaml --budget 3bit
    .venv/bin/python benchmarks/ablation.py examples/minilm.yaml --budget 3bit --preset fast --samples 32

Every row has the bytes of the uniform codes of that budget; uniform trellis codes take fewer. ``--samples`` repeats the
rows chosen with so many calibration samples. All rows are runs on one store (``table.py``): what two of them share is
computed once. Rows that change a constant of the code have a store of their own, since keys do not depend on constants.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from table import COLUMNS, Place, arguments_of_a_run, keep, line, row_of, uniform, uniform_bytes

from mlorq.config.budget import Budget, parse_budget
from mlorq.config.run import PRESETS, RunConfig
from mlorq.errors import MlorqError

# Overrides of the preset, by what is left out or put in another's place (docs/METHOD.md, 7 and 10).
PARTS: dict[str, dict[str, Any]] = {
    "everything": {},
    "no rotation": {"search.rotation": None},
    "no error feedback": {"rounding.feedback": False},
    "no tuning": {"rounding.tuning": 0},
    "no training": {"rounding.method": "closed_form"},
    "tokens alike": {"search.token_weights": False},
    "G of 32 samples, 8 probes": {
        "search.hessian_samples": 32,
        "search.hessian_probes": 8,
        "search.hessian_min_probes": 8,
    },
    "costs measured": {"search.sensitivity": "measured"},
    "local costs as they are": {"search.sensitivity": "local"},
    "no low rank": {"search.forms": ["Q", "TCQ"]},
    "affine codes alone": {"search.forms": ["Q"]},
    "affine codes and low rank": {"search.forms": ["Q", "LR", "QLR"], "search.factor_bits": [4, 6]},
    "rotated residual stream": {"model.rotation": 1},
}
# Constants of modules, by what their value leaves out.
CONSTANTS: dict[str, dict[str, float]] = {
    "no weights of G": {"mlorq.fitting.trellis.ROW_DAMPING": 1e9},
    "no feedback along columns": {"mlorq.fitting.gptq.DAMPING": 1e9},
}
UNIFORM = "one width in all layers"


def main() -> None:
    """Print a row a run, as Markdown."""
    parser = arguments_of_a_run()
    rows = [*PARTS, *CONSTANTS, UNIFORM]
    parser.add_argument("--budget", default="3bit", help="whole bits, as in 3bit")
    parser.add_argument("--preset", default="best", choices=list(PRESETS))
    parser.add_argument("--only", action="append", default=[], help=f"rows: {', '.join(rows)}")
    parser.add_argument("--skip", action="append", default=[], help="rows to leave out")
    parser.add_argument("--samples", action="append", type=int, default=[], help="calibration samples")
    arguments = parser.parse_args()
    common = {"preset": arguments.preset} | dict(item.split("=", 1) for item in arguments.set)
    place = Place(arguments.device, arguments.workers)
    bits = parse_budget(arguments.budget).whole_bits
    if bits is None:
        parser.error("--budget: whole bits are needed, as in 3bit")
    config = RunConfig.from_yaml(arguments.config, common)
    exact = Budget.of_layers(uniform_bytes(arguments.config, common, bits), arguments.budget)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for samples in arguments.samples or [None]:
        sized = common if samples is None else common | {"data.calibration.samples": samples}
        suffix = "" if samples is None else f", {samples} samples"
        for name in [name for name in arguments.only or rows if name not in arguments.skip]:
            budget, overrides, constants = exact, sized | PARTS.get(name, {}), CONSTANTS.get(name, {})
            if name == UNIFORM:
                budget, overrides = uniform(bits, sized, arguments.config)["TCQ, uniform"]
                overrides |= {"preset": arguments.preset}
            if constants:
                overrides |= {"store": f"{config.store.rstrip('/')}-{name.replace(' ', '-')}"}
            try:
                result = row_of(arguments.config, budget, overrides, place, constants)
            except (MlorqError, subprocess.CalledProcessError) as error:
                # Not every part is for every model: rotation needs LayerNorms before the layers.
                print(f"  {name}: {error}", file=sys.stderr)
                print(f"| {arguments.budget} | {name + suffix} | not possible |{' |' * (len(COLUMNS) - 3)}", flush=True)
                continue
            print(line(arguments.budget, name + suffix, result), flush=True)
            keep(arguments.json, name + suffix, result)


if __name__ == "__main__":
    main()
