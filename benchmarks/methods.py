"""``mlorq compare`` without Prefect: all methods side by side, several at a time.

    .venv/bin/python benchmarks/methods.py benchmarks/real/vit_tiny.yaml --budget 3bit --activations 4 --jobs 2

The rows are those of the command (``flows.comparison``), on the same store. ``--jobs`` of them are computed at a time,
each in a process of its own, methods that share a search one after another. ``--workers`` shares the layers of a row's
search out among processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from table import Place, arguments_of_a_run, keep, run

from flows.comparison import Planned, activation_width, plan, row
from flows.comparison_methods import chosen, known_methods
from flows.render import forms_column
from mlorq.artifacts.store import Store
from mlorq.config.budget import Budget, parse_budgets
from mlorq.config.run import RunConfig, read_values
from steps.session import Session

COLUMNS = ("weights", "activations", "method", "metric", "float", "output NMSE", "bytes", forms_column(), "seconds")


def line(found: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    width = "float" if found["activations"] is None else f"{found['activations']} bit"
    return (
        f"| {found['budget']} | {width} | {found['title']} | {found['metric']:.4f} | {found['metric_float']:.4f} "
        f"| {found['nmse']:.4f} | {found['bytes']:,} | {found[forms_column()]} | {found['seconds']:.0f} |"
    )


def row_of(planned: Planned, place: Place) -> dict[str, Any]:
    """A method's row, computed here."""
    return row(planned, run(planned.config, planned.budget, place))


def row_apart(planned: Planned, place: Place) -> dict[str, Any]:
    """The same, computed in a process of its own."""
    config = planned.config
    told = [
        planned.method.name,
        planned.budget.to_json(),
        planned.asked_bytes,
        config.model_dump(mode="json"),
        config.folder,
        asdict(place),
    ]
    command = [sys.executable, __file__, "-", "--row", json.dumps(told)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def print_row(told: Sequence[Any]) -> None:
    """What the other process does."""
    method, budget, asked_bytes, values, folder, place = told
    config = RunConfig.from_mapping(values, folder)
    planned = Planned(known_methods()[method], config, Budget.from_json(budget), asked_bytes)
    print(json.dumps(row_of(planned, Place(**place))))


def main() -> None:
    """Print a row a run, as Markdown, in the order in which they are done."""
    parser = arguments_of_a_run()
    parser.add_argument("--budget", action="append", default=[], help="as in 3bit, 12.5%% or 25MB")
    parser.add_argument("--activations", action="append", type=int, default=[], help="their code width")
    parser.add_argument("--methods", default=",".join(known_methods()))
    parser.add_argument("--jobs", type=int, default=1, help="rows computed at a time")
    parser.add_argument("--row", help="a row's description, in JSON")
    arguments = parser.parse_args()
    if arguments.row:
        print_row(json.loads(arguments.row))
        return
    place = Place(arguments.device, arguments.workers)
    values = read_values(arguments.config, dict(item.split("=", 1) for item in arguments.set))
    config = RunConfig.from_mapping(values, str(Path(arguments.config).resolve().parent))
    session = Session(config, Store(config.resolve(config.store)), place.device)
    groups: dict[str, list[Planned]] = {}
    for width in arguments.activations or [None]:
        wanted = activation_width(values, width)
        budgets = parse_budgets(arguments.budget or config.budget)
        for planned in plan(session, values, budgets, chosen(arguments.methods.split(",")), wanted):
            # What rounding does is no part of a search.
            search = planned.config.search.model_dump(mode="json")
            searched = json.dumps([search, planned.method.activations, wanted], sort_keys=True)
            groups.setdefault(searched, []).append(planned)

    def compute(rows: list[Planned]) -> None:
        for planned in rows:
            found = row_of(planned, place) if arguments.jobs == 1 else row_apart(planned, place)
            keep(arguments.json, f"{planned.method.name}, {planned.budget}", found)
            sys.stdout.write(line(found) + "\n")  # in one piece: other threads print too
            sys.stdout.flush()

    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    with ThreadPoolExecutor(arguments.jobs) as threads:
        list(threads.map(compute, groups.values()))


if __name__ == "__main__":
    main()
