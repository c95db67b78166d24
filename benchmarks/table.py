"""One model, several budgets, every way of getting there: metric, output NMSE, exact bytes, seconds and peak memory.

    .venv/bin/python benchmarks/table.py examples/vit_tiny.yaml --budget 3bit --budget 2.5bit

Rows of a budget of whole bits: nearest rounding and GPTQ with that many bits in every layer; the published method
without and with learned rounding (``preset: quick``, whose search it is, with ``--lra`` iterations a layer); the best
preset without and with reconstruction. Mixed rows get exactly the bytes of the uniform rows, at 2.5 bit the mean of
those of 2 and 3 bit. The published search with all of its samples and probes is a row that has to be named:
``--only "paper preset, nearest"``.

All rows are runs on one store, so that a second call computes nothing; ``--only`` names rows. Seconds are those that
the steps of a row took when they were computed, added up. On a CPU a row is computed in a process of its own, for the
sake of its peak memory; on a GPU peak memory is the GPU's, of the process that rounded. ``--device cuda:0 --workers 6``
shares layers out among six processes on that GPU. ``--json`` keeps all results, a line each (``same_choice.py``).
"""

from __future__ import annotations

import argparse
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
from steps.base import Outcome
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
    "Q / LR / QLR",
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
    return found | {"peak": peak / 1e9 if computed else None}


def row_of(path: str, budget: Budget, overrides: dict[str, Any], place: Place = Place()) -> dict[str, Any]:
    """``run`` with some keys of a configuration set."""
    if place.device != "cpu":
        return run(RunConfig.from_yaml(path, overrides), budget, place)
    command = [sys.executable, __file__, path, "--row", json.dumps([budget.to_json(), overrides, asdict(place)])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def methods(lra: list[int], common: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Overrides of the mixed rows, of those that take long too."""
    paper = common | {"preset": "quick"}
    best = common | {"preset": "best"}
    rows = {"MLoRQ, nearest": paper | {"rounding.method": "nearest"}}
    for count in lra:
        rows[f"MLoRQ + LRA, {count}"] = paper | {"rounding.method": "lra", "rounding.iterations": count}
    rows["best without reconstruction"] = best | {"rounding.method": "closed_form"}
    rows["best without tuning"] = best | {"rounding.tuning": 0}
    rows["best"] = best
    # All of the preset, whatever the configuration says of its search.
    rows[PUBLISHED] = (
        common
        | {"preset": "paper", "rounding.method": "nearest"}
        | {f"search.{key}": value for key, value in PRESETS["paper"]["search"].items()}
    )
    return rows


def uniform(bits: int, method: str, common: dict[str, Any]) -> tuple[Budget, dict[str, Any]]:
    """Budget and overrides of a uniform row: one candidate a layer, whose cost decides nothing."""
    return parse_budget(f"{bits + 1}bit"), common | {
        "preset": "quick" if method == "nearest" else "best",
        "search.bits": [bits],
        "search.forms": ["Q"],
        "search.sensitivity": "local",
        "rounding.method": method,
    }


def keep(path: Path | None, name: str, result: dict[str, Any]) -> None:
    """Add a row's whole result to a file, where one is given."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"row": name} | result) + "\n")


def line(budget: str, name: str, result: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    metric = result["metric"]
    seconds = [sum(result["seconds"].get(step, 0.0) for step in steps) for steps in (SEARCH, ROUNDING)]
    forms = Counter(row["form"] for row in result["allocation"])
    peak = "" if result["peak"] is None else f"{result['peak']:.1f}"
    shares = " / ".join(str(forms[form]) for form in ("Q", "LR", "QLR"))
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
        budget, overrides, place = json.loads(arguments.row)
        config = RunConfig.from_yaml(arguments.config, overrides)
        print(json.dumps(run(config, Budget.from_json(budget), Place(**place))))
        return
    place = Place(arguments.device, arguments.workers)
    common = dict(item.split("=", 1) for item in arguments.set)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for asked in parse_budgets(arguments.budget):
        budget, below = asked.text, int(asked.value)
        whole = [below] if asked.whole_bits is not None else [below, below + 1]
        sizes = []
        for bits in whole:
            for method in ("nearest", "gptq") if len(whole) == 1 else ("nearest",):
                result = row_of(arguments.config, *uniform(bits, method, common), place)
                if len(whole) == 1:
                    print(line(budget, f"{method}, uniform", result), flush=True)
                    keep(arguments.json, f"{budget}: {method}, uniform", result)
            sizes.append(result["bytes"])
        exact = Budget.of_layers(sum(sizes) // len(sizes), budget)
        for name, overrides in methods(arguments.lra or [500], common).items():
            if name in arguments.only or (not arguments.only and name != PUBLISHED):
                result = row_of(arguments.config, exact, overrides, place)
                print(line(budget, name, result), flush=True)
                keep(arguments.json, f"{budget}: {name}", result)


if __name__ == "__main__":
    main()
