"""What single parts of the best preset are worth: one row with everything, and one row a part that is left out.

    .venv/bin/python benchmarks/ablation.py examples/minilm.yaml --budget 3bit
    .venv/bin/python benchmarks/ablation.py examples/minilm.yaml --budget 3bit --only best --samples 32 --samples 64

Every row has the bytes of the uniform row of that budget. ``--samples`` repeats the rows chosen with so many
calibration samples. All rows are runs on one store (``table.py``): what two of them share is
computed once.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from table import COLUMNS, Place, arguments_of_a_run, keep, line, row_of, uniform

from mlorq.config.budget import Budget, parse_budget
from mlorq.errors import MlorqError

# Overrides of the best preset, by what is left out or put in another's place (parts as numbered in docs/METHOD.md, 7).
PARTS: dict[str, dict[str, Any]] = {
    "best": {},
    "tokens alike": {"search.token_weights": False},
    "whole token weights": {"search.token_weights": True},
    "candidates in the Hessian's metric": {
        "search.metric": "hessian",
        "search.token_weights": False,
        "search.forms": ["Q", "LR"],
    },
    "codes alone": {"search.forms": ["Q"]},
    "no QLR": {"search.forms": ["Q", "LR"]},
    "costs measured": {"search.sensitivity": "measured"},
    "local costs as they are": {"search.sensitivity": "local"},
    "costs of closed forms alone": {"search.sensitivity": "closed_form"},
    "no error feedback": {"rounding.feedback": False},
    "no reconstruction": {"rounding.method": "closed_form"},
    "no reconstruction, no error feedback": {"rounding.method": "gptq"},
    "no tuning": {"rounding.tuning": 0},
    "blocks by the model's output": {"rounding.loss": "output"},
    "rotated residual stream": {"model.rotation": 1},
    "cost: kl": {"search.cost": "kl"},
    "LRA from the closed form, 500": {
        "rounding.method": "lra",
        "rounding.start": "closed_form",
        "rounding.iterations": 500,
    },
    "nearest rounding": {"rounding.method": "nearest"},
}
UNIFORM = {"uniform, GPTQ": "gptq", "uniform, closed form": "closed_form", "uniform, reconstructed": "block"}


def main() -> None:
    """Print a row a run, as Markdown."""
    parser = arguments_of_a_run()
    parser.add_argument("--budget", default="3bit", help="whole bits, as in 3bit")
    parser.add_argument("--only", action="append", default=[], help=f"rows: {', '.join([*UNIFORM, *PARTS])}")
    parser.add_argument("--skip", action="append", default=[], help="rows to leave out")
    parser.add_argument("--samples", action="append", type=int, default=[], help="calibration samples")
    arguments = parser.parse_args()
    common = {"preset": "best"} | dict(item.split("=", 1) for item in arguments.set)
    place = Place(arguments.device, arguments.workers)
    bits = parse_budget(arguments.budget).whole_bits
    if bits is None:
        parser.error("--budget: whole bits are needed, as in 3bit")
    chosen = [name for name in arguments.only or [*UNIFORM, *PARTS] if name not in arguments.skip]
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    smallest = row_of(arguments.config, *uniform(bits, "nearest", common), place)
    exact = Budget.of_layers(smallest["bytes"], arguments.budget)
    for samples in arguments.samples or [None]:
        sized = common if samples is None else common | {"data.calibration.samples": samples}
        suffix = "" if samples is None else f", {samples} samples"
        for name in chosen:
            if name in UNIFORM:
                budget, overrides = uniform(bits, UNIFORM[name], sized)
            else:
                budget, overrides = exact, sized | PARTS[name]
            try:
                result = row_of(arguments.config, budget, overrides, place)
            except (MlorqError, subprocess.CalledProcessError) as error:
                # Not every part is for every model: rotation needs LayerNorms before the layers.
                print(f"  {name}: {error}", file=sys.stderr)
                print(f"| {arguments.budget} | {name + suffix} | not possible |{' |' * (len(COLUMNS) - 3)}", flush=True)
                continue
            print(line(arguments.budget, name + suffix, result), flush=True)
            keep(arguments.json, name + suffix, result)


if __name__ == "__main__":
    main()
