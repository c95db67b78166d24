"""One model, several budgets, every way of getting there: metric, output NMSE, exact bytes, seconds and peak memory.

    .venv/bin/python benchmarks/table.py benchmarks/real/vit_tiny.yaml --budget 3bit --budget 2.5bit

Rows of a budget of whole bits: nearest rounding, GPTQ and trellis codes with that many bits in every layer; published
search without and with learned rounding (``preset: quick``, whose search it is, with ``--lra`` iterations a layer); the
presets ``integer``, ``fast`` and ``best``. Mixed rows get the bytes of the uniform codes, at 2.5 bit the mean of those
of 2 and 3 bit; uniform trellis codes take fewer. The published search with all of its samples and probes is a row that
has to be named: ``--only "paper preset, nearest"``.

All rows are runs on one store, so that a second call computes nothing; ``--only`` names rows. Seconds are those that
the steps of a row took when they were computed, added up. On a CPU a row is computed in a process of its own, for the
sake of its peak memory; on a GPU peak memory is the GPU's, of the process that rounded. ``--device cuda:0 --workers 6``
shares layers out among six processes on that GPU. ``--json`` keeps all results, a line each (``same_choice.py``).
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flows.pool import Pool
from mlorq.artifacts.store import Store
from mlorq.config.budget import Budget, parse_budget, parse_budgets
from mlorq.config.run import PRESETS, RunConfig
from mlorq.forms import Shape, uniform_candidate, uniform_form
from mlorq.forms.base import smallest_size
from steps import layers
from steps.base import Outcome, execute
from steps.pipeline import result_json, run_pipeline
from steps.session import Session

SEARCH = ("capture", "candidates", "sensitivity", "allocate")
ROUNDING = ("round", "reconstruct", "tune")
PUBLISHED = "paper preset, nearest"
COLUMNS = (
    "budget",
    "method",
    "bytes",
    "metric",
    "float",
    "output NMSE",
    "search, s",
    "rounding, s",
    "peak, GB",
    "forms",
)


@dataclass(frozen=True)
class Place:
    """Where rows are computed.

    Attributes:
        device: ``cpu``, ``cuda:0`` …
        workers: processes that share the layers of a step.
    """

    device: str = "cpu"
    workers: int = 1


def run(config: RunConfig, budget: Budget, place: Place = Place()) -> dict[str, Any]:
    """One run."""
    if place.device != "cpu":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(place.device)
    session = Session(config, Store(config.resolve(config.store)), place.device)
    outcomes: list[Outcome] = []

    def progress(label: str, done: int, total: int) -> None:
        print(f"  {label} {done}/{total}", file=sys.stderr)

    with Pool(session, place.workers, progress, outcomes.append) as executor:
        (result,) = run_pipeline(session, executor, [budget])
    found = result_json(session, result)
    computed = any(outcome.ref.step in ROUNDING and not outcome.reused for outcome in outcomes)
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = host if place.device == "cpu" else torch.cuda.max_memory_allocated(place.device)
    # The result's seconds are those of all steps, whether they were reused or not.
    return found | {"seconds_reused": {}, "peak": peak / 1e9 if computed else None}


def row_of(
    path: str,
    budget: Budget,
    overrides: dict[str, Any],
    place: Place = Place(),
    constants: dict[str, float] | None = None,
) -> dict[str, Any]:
    """``run`` with some keys of a configuration set, and constants of modules by their whole names."""
    if place.device != "cpu" and not constants:
        return run(RunConfig.from_yaml(path, overrides), budget, place)
    row = json.dumps([budget.to_json(), overrides, asdict(place), constants or {}])
    command = [sys.executable, __file__, path, "--row", row]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def methods(lra: list[int], common: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Overrides of the mixed rows, of those that take long too."""
    paper = common | {"preset": "quick"}
    rows = {"MLoRQ, nearest": paper | {"rounding.method": "nearest"}}
    for count in lra:
        rows[f"MLoRQ + LRA, {count}"] = paper | {"rounding.method": "lra", "rounding.iterations": count}
    for preset in ("integer", "fast", "best"):
        rows[preset] = common | {"preset": preset}
    rows["best without tuning"] = common | {"preset": "best", "rounding.tuning": 0}
    # All of the preset, whatever the configuration says of its search.
    rows[PUBLISHED] = (
        common
        | {"preset": "paper", "rounding.method": "nearest"}
        | {f"search.{key}": value for key, value in PRESETS["paper"]["search"].items()}
    )
    return rows


def uniform(bits: int, common: dict[str, Any], path: str) -> dict[str, tuple[Budget, dict[str, Any]]]:
    """Budgets and overrides of the uniform rows: one candidate a layer that fits, whose cost decides nothing."""
    room = parse_budget(f"{bits + 1}bit")
    one = common | {"search.sensitivity": "local"}
    codes = one | {"search.bits": [bits], "search.forms": ["Q"]}
    # Layers with too few rows for a trellis have affine codes of the same bits.
    trellis = codes | {"preset": "fast", "search.trellis_bits": [bits], "search.forms": ["Q", "TCQ"]}
    settings = RunConfig.from_yaml(path, trellis).search
    smallest = sum(
        smallest_size(shape, settings.form_settings, settings.storage).bytes for shape in shapes_of(path, common)
    )
    return {
        "nearest, uniform": (room, codes | {"preset": "quick", "rounding.method": "nearest"}),
        "gptq, uniform": (room, codes | {"preset": "integer", "rounding.method": "gptq"}),
        "TCQ, uniform": (Budget.of_layers(smallest, f"{bits}bit"), trellis),
    }


def shapes_of(path: str, common: dict[str, Any]) -> list[Shape]:
    """Shapes of the layers to compress."""
    config = RunConfig.from_yaml(path, common)
    session = Session(config, Store(config.resolve(config.store)))
    ref = execute(layers.spec(session), session.worker).ref
    return [Shape(one.out_features, one.in_features, one.groups) for one in session.artifacts.layers(ref).layers]


def uniform_bytes(path: str, common: dict[str, Any], bits: int) -> int:
    """Bytes of all layers with codes of one bit-width."""
    storage = RunConfig.from_yaml(path, common).search.storage
    return sum(uniform_form().size(uniform_candidate(bits), shape, storage) for shape in shapes_of(path, common))


def keep(path: Path | None, name: str, result: dict[str, Any]) -> None:
    """Add a row's whole result to a file, where one is given."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"row": name} | result) + "\n")


def line(budget: str, name: str, result: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    metric = result["metric"]
    seconds = [sum(result["seconds"].get(step, 0.0) for step in steps) for steps in (SEARCH, ROUNDING)]
    # Trellis codes with their bits: most layers differ in these alone.
    forms = Counter(row["candidate_id"] if row["form"] == "TCQ" else row["form"] for row in result["allocation"])
    peak = "" if result["peak"] is None else f"{result['peak']:.1f}"
    shares = ", ".join(f"{count} {name}" for name, count in sorted(forms.items()))
    return (
        f"| {budget} | {name} | {result['bytes']:,} | {metric['compressed']:.4f} | {metric['float']:.4f} "
        f"| {result['nmse']:.4f} | {seconds[0]:.0f} | {seconds[1]:.0f} | {peak} | {shares} |"
    )


def arguments_of_a_run() -> argparse.ArgumentParser:
    """What the benchmarks of runs have in common."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes on the device")
    parser.add_argument("--json", type=Path, help="file for whole results, to which lines are added")
    return parser


def main() -> None:
    """Print a row a run, as Markdown."""
    parser = arguments_of_a_run()
    parser.add_argument("--budget", action="append", default=[], help="whole or half bits, as in 3bit")
    parser.add_argument("--lra", action="append", type=int, default=[], help="iterations a layer")
    parser.add_argument("--only", action="append", default=[], help="names of rows")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        budget, overrides, place, constants = json.loads(arguments.row)
        for name, value in constants.items():
            module, _, constant = name.rpartition(".")
            setattr(importlib.import_module(module), constant, value)
        config = RunConfig.from_yaml(arguments.config, overrides)
        print(json.dumps(run(config, Budget.from_json(budget), Place(**place))))
        return
    place = Place(arguments.device, arguments.workers)
    common = dict(item.split("=", 1) for item in arguments.set)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for asked in parse_budgets(arguments.budget):
        budget, below = asked.text, int(asked.value)
        whole = [below] if asked.whole_bits is not None else [below, below + 1]
        if asked.whole_bits is not None:
            for name, (room, overrides) in uniform(below, common, arguments.config).items():
                if name in arguments.only or not arguments.only:
                    result = row_of(arguments.config, room, overrides, place)
                    print(line(budget, name, result), flush=True)
                    keep(arguments.json, f"{budget}: {name}", result)
        sizes = [uniform_bytes(arguments.config, common, bits) for bits in whole]
        exact = Budget.of_layers(sum(sizes) // len(sizes), budget)
        for name, overrides in methods(arguments.lra or [500], common).items():
            if name in arguments.only or (not arguments.only and name != PUBLISHED):
                result = row_of(arguments.config, exact, overrides, place)
                print(line(budget, name, result), flush=True)
                keep(arguments.json, f"{budget}: {name}", result)


if __name__ == "__main__":
    main()
