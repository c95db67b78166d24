"""How time and memory grow: exponents of each stage against width, depth, samples, ranks and parameters.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/growth.py                      # some 10 minutes
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/growth.py --only parameters --longest 3600 \
        --set search.forms=[Q] --set rounding.method=nearest --set engine.weights=200MB --stored bfloat16
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/growth.py --width 512 --runner dask --workers 2 --workers 1

Decoders (Llama) and encoders (BERT) of transformers' real classes with random weights and random tokens, so nothing
here says anything of accuracy. Each size runs in a process of its own on an empty store, and has as a row its CPU
seconds and its peak memory in excess of what the process held before its first step, stage by stage. An exponent is the
slope of a straight line through the logarithms: 1 is linear. Sizes of a series are run from small to large, until one
has taken ``--longest`` seconds.

With ``--runner`` the steps are those of the Prefect flow, in Dask workers or child processes with the store between
them. Memory is then that of the largest worker, as a whole. After a first run on so many workers, every further
``--workers`` runs the stages ``candidates`` and ``round`` anew, on workers that have loaded nothing yet.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.processes import Meter, reset_peak, resident
from flows.compress import compress_flow
from flows.run import Handed, handing, prepare
from flows.server import PrefectSession
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.data.base import Dataset
from mlorq.memory import return_freed
from steps.base import Outcome, StepSpec
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session

STAGES = ("load", "capture", "candidates", "round")
TOKENS = 64
BATCH = 8
VOCABULARY = 1024
UNITS = {"wall": "s", "seconds": "CPU s", "gigabytes": "GB"}
DATA = """
import torch

def batches():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint({vocabulary}, ({samples}, {tokens}), generator=generator)
    return [{{"input_ids": part, "attention_mask": torch.ones_like(part)}} for part in tokens.split({batch})]

def evaluate(model):
    return {{"mean": model(**batches()[0]).logits.mean().item()}}
"""


@dataclass(frozen=True)
class Size:
    """A model and its calibration data.

    Attributes:
        kind: ``decoder`` or ``encoder``.
        width: of the hidden states; inner layers are four times as wide.
        depth: number of blocks.
        samples: of ``TOKENS`` tokens.
        ranks: of a square layer's candidates, which are affine and low-rank then; 0: the forms of the configuration.
    """

    kind: str
    width: int = 128
    depth: int = 2
    samples: int = 32
    ranks: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """Changes of the configuration."""
        return {"search.forms": ["Q", "LR"], "search.rank_multiple": self.width // self.ranks} if self.ranks else {}


SERIES: dict[str, list[Size]] = {
    "width": [Size("decoder", width=width) for width in (128, 256, 512)],
    "depth": [Size("decoder", depth=depth) for depth in (2, 4, 8, 16)],
    "samples": [Size("decoder", samples=samples) for samples in (32, 64, 128, 256)],
    "ranks": [Size("decoder", width=256, ranks=ranks) for ranks in (4, 8, 16, 32, 64)],
    "parameters": [
        Size("decoder", width, depth) for width, depth in ((128, 4), (256, 8), (512, 8), (1024, 12), (2048, 16))
    ],
    "parameters, encoder": [Size("encoder", width, depth) for width, depth in ((128, 4), (256, 8), (512, 8))],
}
KEYS = {name: name.split(",")[0] for name in SERIES}


def build(size: Size) -> nn.Module:
    """The model, with random weights."""
    import transformers

    torch.manual_seed(0)
    common = dict(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.depth,
        num_attention_heads=size.width // 64,
        max_position_embeddings=TOKENS,
    )
    if size.kind == "decoder":
        config = transformers.LlamaConfig(**common, num_key_value_heads=size.width // 64, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    return transformers.BertForSequenceClassification(transformers.BertConfig(**common, num_labels=4))


class Measured(InProcess):
    """Runs steps and measures them.

    Attributes:
        seconds: CPU seconds by stage.
        peaks: highest resident bytes by stage.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}

    def run(self, spec: StepSpec) -> Outcome:
        reset_peak()
        started = time.process_time()
        outcome = super().run(spec)
        self.seconds[spec.step] = self.seconds.get(spec.step, 0.0) + time.process_time() - started
        self.peaks[spec.step] = max(self.peaks.get(spec.step, 0), resident("VmHWM"))
        return outcome


def measure(size: Size, settings: Sequence[str], stored: str) -> dict[str, Any]:
    """The figures of one size, in this process.

    Args:
        size: of model and data.
        settings: changes of the configuration, ``KEY=VALUE``.
        stored: dtype of the weights in the model's files.
    """
    with tempfile.TemporaryDirectory(prefix="mlorq-growth-") as folder:
        parameters, path = project(size, stored, folder)
        config = RunConfig.from_yaml(path, size.settings | changes_of(settings))
        before = resident("VmRSS")
        none = Dataset([], 0, digest_json("none"))
        session = Session(config, Store(config.store), evaluation=none)
        executor = Measured(session)
        reset_peak()
        started = time.process_time()
        session.model  # noqa: B018 (loads it)
        executor.seconds["load"], executor.peaks["load"] = time.process_time() - started, resident("VmHWM")
        run_pipeline(session, executor, config.budgets)
    return {
        "parameters": parameters,
        "seconds": executor.seconds,
        "gigabytes": {stage: (peak - before) / 1e9 for stage, peak in executor.peaks.items()},
    }


def project(size: Size, stored: str, folder: str) -> tuple[int, Path]:
    """Write a model, its data and a configuration; returns the number of parameters, and the configuration's path.

    Args:
        size: of model and data.
        stored: dtype of the weights in the model's files.
        folder: for all of them.
    """
    module = build(size).to(getattr(torch, stored))
    parameters = sum(value.numel() for value in module.parameters())
    module.save_pretrained(folder)
    del module
    return_freed()
    data = DATA.format(samples=size.samples, tokens=TOKENS, batch=BATCH, vocabulary=VOCABULARY)
    Path(folder, "growth_data.py").write_text(data)
    values = {
        "model": {
            "family": "transformers",
            "name": folder,
            "task": "text-generation" if size.kind == "decoder" else "text-classification",
        },
        "data": {
            "calibration": {"source": "custom", "factory": "growth_data:batches"},
            "evaluation": {"source": "custom", "factory": "growth_data:evaluate"},
        },
        "preset": "fast",
        "engine": {"devices": "cpu", "threads": 1},
        "store": f"file://{folder}/store",
    }
    path = Path(folder, "growth.yaml")
    path.write_text(json.dumps(values))  # YAML as well
    return parameters, path


def changes_of(settings: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as changes of the configuration."""
    return {key: yaml.safe_load(text) for key, text in (setting.split("=", 1) for setting in settings)}


# -- through the flow, on several workers -----------------------------------------------------------------------------


def engine(runner: str, workers: int, memory: str) -> dict[str, Any]:
    """Changes of the configuration for so many workers.

    Args:
        runner: ``dask`` or ``subprocess``.
        workers: their number.
        memory: of a worker; Dask ends one that takes more. Child processes have no bound.
    """
    if runner == "subprocess":
        return {"engine.steps": "subprocess", "engine.devices": ["cpu"] * workers}
    arguments = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": memory, "host": "127.0.0.1"}
    return {"engine.runner": "dask", "engine.dask": {"arguments": arguments}}


def measure_workers(
    size: Size, settings: Sequence[str], stored: str, runner: str, workers: Sequence[int], memory: str
) -> Iterator[dict[str, Any]]:
    """The figures of one size through the Prefect flow, a run for each number of workers.

    The first run is on an empty store; the others find there all but the stages ``candidates`` and ``round``.

    Args:
        size, settings, stored: as for ``measure``.
        runner, memory: as for ``engine``.
        workers: of each run.
    """
    with tempfile.TemporaryDirectory(prefix="mlorq-growth-") as folder, PrefectSession() as prefect:
        with ProcessPoolExecutor(1, get_context("spawn")) as aside:  # so that nothing of it counts
            parameters, path = aside.submit(project, size, stored, folder).result()
        for number in workers:
            for stage in ("candidates", "round"):
                shutil.rmtree(Path(folder, "store", stage), ignore_errors=True)
            changes = size.settings | changes_of(settings) | engine(runner, number, memory)
            config = RunConfig.from_yaml(path, changes)
            meter = Meter()
            meter.phase("load", 0)
            session = prepare(config, config.budgets)
            meter.close()
            meter.phases["load"].peak = meter.phases["load"].flow_peak  # workers load in their first step
            prefect.ready()
            given = Handed(session, config.budgets, meter, "growth", prefect.expect, threading.Event())
            with handing(given):
                compress_flow(config.model_dump(mode="json"), config.folder, [one.text for one in config.budgets])
            phases = meter.phases
            yield {
                "parameters": parameters,
                "runner": runner,
                "workers": number,
                "wall": {name: use.wall for name, use in phases.items()},
                "seconds": {name: use.cpu for name, use in phases.items()},
                "gigabytes": {name: use.peak / 1e9 for name, use in phases.items()},
                "flow_gigabytes": {name: use.flow_peak / 1e9 for name, use in phases.items()},
                "work": meter.work,
            }


def measured(arguments: argparse.Namespace, series: Sequence[Size]) -> Iterator[dict[str, Any]]:
    """The figures of sizes, each in a process of its own, until one has taken too long."""
    for size in series:
        row = json.dumps(asdict(size))
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        with tempfile.TemporaryDirectory(prefix="mlorq-growth-prefect-") as home:
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PREFECT_HOME": home}
            started = time.monotonic()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
                assert process.stdout is not None
                for text in process.stdout:
                    if text.startswith("{"):
                        yield asdict(size) | json.loads(text)
        if process.returncode:
            print(f"| {size} | failed with status {process.returncode} |", flush=True)
            return
        if time.monotonic() - started > arguments.longest:
            return


def print_row(arguments: argparse.Namespace) -> None:
    """Measure one size in this process, and print its figures as JSON, a line a run."""
    size = Size(**json.loads(arguments.row))
    if arguments.runner is None:
        small = Size(size.kind, width=64, depth=1, samples=BATCH, ranks=min(2, size.ranks))
        measure(small, arguments.set, arguments.stored)  # loads all code
        print(json.dumps(measure(size, arguments.set, arguments.stored)))
        return
    workers = arguments.workers or [1]
    for found in measure_workers(size, arguments.set, arguments.stored, arguments.runner, workers, arguments.limit):
        print(json.dumps(found), flush=True)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms.

    Raises:
        ValueError: fewer than two sizes, or a value that is not positive.
    """
    if len(sizes) < 2:
        raise ValueError("an exponent needs two sizes")
    x, y = ([math.log(value) for value in values] for values in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def line(name: str, found: dict[str, Any], columns: Sequence[str] = ("seconds", "gigabytes")) -> str:
    """A row of the table, as Markdown."""
    figures = [f"{found[key].get(stage, 0.0):.2f}" for key in columns for stage in STAGES]
    sizes = [f"{found[key] or ''}" for key in ("width", "depth", "samples", "ranks")]
    sizes.append(f"{found['parameters'] / 1e6:.1f}")
    return f"| {' | '.join([name, *sizes, *figures])} |"


def main() -> int:
    """Print a row a size and a row of exponents a series, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", choices=list(SERIES), default=[], help="these series")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as for mlorq compress")
    parser.add_argument("--stored", default="float32", help="dtype of the model's files")
    parser.add_argument("--json", help="append the figures of all stages to this file, a line a size")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of a size after which none larger is run")
    parser.add_argument("--width", action="append", type=int, help="sizes of these widths alone")
    parser.add_argument("--samples", type=int, help="of all sizes")
    parser.add_argument("--runner", choices=["dask", "subprocess"], help="run steps in workers, through the flow")
    parser.add_argument("--workers", action="append", type=int, help="their number, of each run; default: 1")
    parser.add_argument("--limit", default="auto", help="memory of a Dask worker, for example 12GB")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print_row(arguments)
        return 0
    keys = ("seconds", "gigabytes") if arguments.runner is None else ("wall", "seconds", "gigabytes")
    heads = [f"{stage}, {UNITS[key]}" for key in keys for stage in STAGES]
    columns = ["series", "width", "depth", "samples", "ranks", "parameters, M", *heads]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name in arguments.only or SERIES:
        rows = []
        sizes = [size for size in SERIES[name] if not arguments.width or size.width in arguments.width]
        sizes = [replace(size, samples=arguments.samples or size.samples) for size in sizes]
        for found in measured(arguments, sizes):
            if arguments.json:
                with open(arguments.json, "a") as file:
                    file.write(json.dumps(found) + "\n")
            number = found.get("workers")
            shown = name if number is None else f"{name}, {number} × {found['runner']}"
            print(line(shown, found, keys), flush=True)
            if number in (None, (arguments.workers or [1])[0]) and found["seconds"].get("capture"):
                rows.append(found)
        if len(rows) > 1:
            values = [row[KEYS[name]] for row in rows]
            slopes = [
                f"{exponent(values, [max(row[key][stage], 1e-3) for row in rows]):.2f}"
                for key in keys
                for stage in STAGES
            ]
            print(f"| **exponent, {name}** | | | | | | {' | '.join(slopes)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
