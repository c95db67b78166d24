"""How time and memory grow: exponents of each stage against width, depth, samples, ranks and parameters.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/growth.py                      # some 10 minutes
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/growth.py --only parameters --longest 3600 \
        --set search.forms=[Q] --set rounding.method=nearest --set engine.weights=200MB --stored bfloat16

Decoders (Llama) and encoders (BERT) of transformers' real classes with random weights and random tokens, so nothing
here says anything of accuracy. Each size runs in a process of its own on an empty store, and has as a row its CPU
seconds and its peak memory in excess of what the process held before its first step, stage by stage. An exponent is the
slope of a straight line through the logarithms: 1 is linear. Sizes of a series are run from small to large, until one
has taken ``--longest`` seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.data import from_batches
from mlorq.data.base import Dataset
from mlorq.data.custom import IN_MEMORY as IN_MEMORY_DATA
from mlorq.memory import return_freed
from steps.base import Outcome, StepSpec
from steps.inprocess import InProcess
from steps.pipeline import run_pipeline
from steps.session import Session

STAGES = ("load", "capture", "candidates", "round")
TOKENS = 64
BATCH = 8
VOCABULARY = 1024


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


def reset_peak() -> None:
    """Let the peak of this process begin at what it holds at present."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(field: str) -> int:
    """Bytes of this process in memory: ``VmRSS``, at present; ``VmHWM``, at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[field].split()[0])


def measure(size: Size, settings: Sequence[str], stored: str) -> dict[str, Any]:
    """The figures of one size, in this process.

    Args:
        size: of model and data.
        settings: changes of the configuration, ``KEY=VALUE``.
        stored: dtype of the weights in the model's files.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (size.samples, TOKENS), generator=generator)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(BATCH)]
    none = Dataset([], 0, digest_json("none"))
    with tempfile.TemporaryDirectory(prefix="mlorq-growth-") as folder:
        module = build(size).to(getattr(torch, stored))
        parameters = sum(value.numel() for value in module.parameters())
        module.save_pretrained(folder)
        del module
        return_freed()
        values = {
            "model": {
                "family": "transformers",
                "name": folder,
                "task": "text-generation" if size.kind == "decoder" else "text-classification",
            },
            "data": {"calibration": IN_MEMORY_DATA, "evaluation": IN_MEMORY_DATA},
            "preset": "fast",
            "engine": {"devices": "cpu", "threads": 1},
            "store": f"file://{folder}/store",
        }
        path = Path(folder) / "growth.yaml"
        path.write_text(json.dumps(values))  # YAML as well
        changes = {key: yaml.safe_load(text) for key, text in (setting.split("=", 1) for setting in settings)}
        config = RunConfig.from_yaml(path, size.settings | changes)
        before = resident("VmRSS")
        session = Session(config, Store(config.store), calibration=from_batches(batches), evaluation=none)
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


def measured(series: Sequence[Size], settings: Sequence[str], stored: str, longest: float) -> Iterator[dict[str, Any]]:
    """The figures of sizes, each in a process of its own, until one has taken too long."""
    for size in series:
        command = [sys.executable, __file__, "--row", json.dumps([asdict(size), settings, stored])]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        if done.returncode:
            print(f"| {size} | failed with status {done.returncode} |", flush=True)
            return
        yield asdict(size) | json.loads(done.stdout.splitlines()[-1])
        if time.monotonic() - started > longest:
            return


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    figures = [f"{found[key][stage]:.2f}" for key in ("seconds", "gigabytes") for stage in STAGES]
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
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        values, settings, stored = json.loads(arguments.row)
        size = Size(**values)
        small = Size(size.kind, width=64, depth=1, samples=BATCH, ranks=min(2, size.ranks))
        measure(small, settings, stored)  # loads all code
        print(json.dumps(measure(size, settings, stored)))
        return 0
    heads = [f"{stage}, {unit}" for unit in ("CPU s", "GB") for stage in STAGES]
    columns = ["series", "width", "depth", "samples", "ranks", "parameters, M", *heads]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for name in arguments.only or SERIES:
        rows = []
        for found in measured(SERIES[name], arguments.set, arguments.stored, arguments.longest):
            rows.append(found)
            if arguments.json:
                with open(arguments.json, "a") as file:
                    file.write(json.dumps(found) + "\n")
            print(line(name, found), flush=True)
        if len(rows) > 1:
            sizes = [row[KEYS[name]] for row in rows]
            slopes = [
                f"{exponent(sizes, [max(row[key][stage], 1e-3) for row in rows]):.2f}"
                for key in ("seconds", "gigabytes")
                for stage in STAGES
            ]
            print(f"| **exponent, {name}** | | | | | | {' | '.join(slopes)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
