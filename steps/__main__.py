"""``python -m steps NAME --spec URI``: run one step in this process, from a JSON file at any fsspec URI.

The file holds ``{"config": …, "folder": …, "device": …, "spec": …}``: the run's configuration, the folder its relative
paths start from, the device to use, and the step (``StepSpec.to_json``). The artifact's step and key are printed.
"""

from __future__ import annotations

import argparse
import json
import sys

import fsspec

from mlorq.config import RunConfig
from mlorq.errors import MlorqError, StoreError
from mlorq.store import Store
from steps import REGISTRY
from steps.base import StepSpec, execute
from steps.workbench import Workbench


def main(argv: list[str] | None = None) -> int:
    """Run one step; 0 when its artifact is there, 2 when the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m steps", description="Run one step of a compression run.")
    parser.add_argument("name", choices=sorted(REGISTRY), help="the step")
    parser.add_argument("--spec", required=True, help="fsspec URI of the step's JSON description")
    arguments = parser.parse_args(argv)
    try:
        try:
            with fsspec.open(arguments.spec, "r") as file:
                message = json.load(file)
            spec = StepSpec.from_json(message["spec"])
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(f"step description {arguments.spec}: {error!r}") from error
        if spec.step != arguments.name:
            raise StoreError(f"step description {arguments.spec} is for step {spec.step!r}, not {arguments.name!r}")
        config = RunConfig.from_mapping(message["config"], message["folder"])
        if config.store.startswith("memory://"):
            raise StoreError(f"store {config.store} lives in one process; a step of its own needs another kind")
        store = Store(config.resolve(config.store))
        outcome = execute(spec, Workbench(config, store, message["device"]))
    except MlorqError as error:
        print(f"mlorq: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({**outcome.ref.to_json(), "reused": outcome.reused, "seconds": outcome.seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
