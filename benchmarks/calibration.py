"""What calibration data is worth, and whether the step ``calibration`` tells good data from bad.

    .venv/bin/python benchmarks/calibration.py examples/digits/digits.yaml
    .venv/bin/python benchmarks/calibration.py examples/minilm.yaml --only "256 samples" --only synthetic

A row per calibration set: the configured one with 256, 64, 16 and 4 samples, ``synthetic`` (256 made inputs) and, for
images, ``shuffled`` (the configured samples with their pixels in a random order) and ``white`` (independent Gaussian
pixels). All rows are runs with preset ``fast`` on one store. ``few``, ``other`` and ``gap`` are the numbers that are
compared with the thresholds of ``mlorq/calibration/diagnosis.py``; ``s`` are the seconds of the step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from mlorq.config.run import RunConfig
from mlorq.data import from_batches
from mlorq.data.base import Dataset
from mlorq.data.noise import natural_images
from mlorq.models.batches import batch_samples, take_samples
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session, open_store

SAMPLES = 256
COLUMNS = ("calibration", "metric", "float", "NMSE", "NMSE, calibration", "few", "other", "gap", "warnings", "s")


def first(batches: Any, samples: int) -> list[Any]:
    """The first samples."""
    found = []
    for batch in batches:
        count = min(samples, batch_samples(batch))
        found += [take_samples(batch, slice(0, count))] if count else []
        samples -= count
    return found


def shuffled(batches: Any) -> list[Any]:
    """The same values in a random order within every image."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for batch in batches:
        rows = batch.flatten(1)
        order = torch.rand(rows.shape, generator=generator).argsort(1)
        found.append(rows.gather(1, order).reshape(batch.shape))
    return found


def white(batches: Any) -> list[Any]:
    """Gaussian pixels with the mean and the standard deviation of the data."""
    generator = torch.Generator().manual_seed(0)
    return [batch.mean() + batch.std() * torch.randn(batch.shape, generator=generator) for batch in batches]


def noise(batches: Any) -> list[Any]:
    """Images as source ``synthetic`` makes them, black and white at the extremes of the data."""
    values = torch.cat(list(batches))
    low, high = float(values.min()), float(values.max())
    made = natural_images(SAMPLES, tuple(values.shape[1:]), 0).float() / 255
    return list((low + (high - low) * made).split(len(batches[0])))


IMAGES: dict[str, Callable[[Any], list[Any]]] = {"shuffled": shuffled, "white": white}


def main() -> None:
    """Print a row a calibration set, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--only", action="append", default=[], help="rows: '256 samples', synthetic, white …")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of the configuration")
    arguments = parser.parse_args()
    common = {"preset": "fast", "rounding": {}} | dict(item.split("=", 1) for item in arguments.set)
    config = RunConfig.from_yaml(arguments.config, common)
    session = Session(config, open_store(config))
    data = session.calibration
    rows: dict[str, Dataset] = {f"{count} samples": from_batches(first(data.batches, count)) for count in (64, 16, 4)}
    rows = {f"{SAMPLES} samples": from_batches(first(data.batches, SAMPLES))} | rows
    if isinstance(data.batches[0], torch.Tensor):
        rows |= {name: from_batches(change(rows[f"{SAMPLES} samples"].batches)) for name, change in IMAGES.items()}
        rows["synthetic"] = from_batches(noise(rows[f"{SAMPLES} samples"].batches))
    else:
        made = {"source": "synthetic", "samples": SAMPLES, "batch_size": batch_samples(data.batches[0])}
        changed = RunConfig.from_yaml(arguments.config, common | {"data.calibration": made})
        rows["synthetic"] = Session(changed, open_store(changed), model=session.model).calibration
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in arguments.only or rows:
        own = Session(
            config, open_store(config), model=session.model, calibration=rows[name], evaluation=session.evaluation
        )
        (result,) = run_pipeline(own, InProcess(own), config.budgets)
        print(line(name, result_json(own, result)), flush=True)


def line(name: str, result: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    found, metric = result["calibration"], result["metric"]
    warned = [word for word in ("too few", "another kind", "output NMSE") if word in " ".join(found["warnings"])]
    values = [found["few_samples"], found["other_domain"], found["gap"]]
    numbers = ["" if value is None else f"{value:.2f}" for value in values]
    own = found["nmse"].get("calibration")
    cells = [
        name,
        f"{metric['compressed']:.4f}",
        f"{metric['float']:.4f}",
        f"{result['nmse']:.3g}",
        "" if own is None else f"{own:.3g}",
        *numbers,
        ", ".join(warned),
        f"{result['seconds']['calibration']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
