"""What second moments in blocks cost: held-out errors, time and memory beside those of one matrix and of its diagonal.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/blocks.py vit_tiny/model.safetensors imagenet_700

The layer has the shape of a detector's first box layer: regions of 7 × 7 positions of the feature maps of real images
(trained ViT-Tiny, 192 channels behind block 9 and the rest behind block 5), flattened channel by channel. Its weight
regresses the classifier's input and logits on them. Codes, a low-rank candidate and trellis codes are fitted under Σ of
the calibration images; their errors ``tr(G ΔW Σ' ΔWᵀ)``, over that of a weight of zeros, are those on the evaluation
images, with all correlations. ``--layer blocks.6.mlp.fc2`` takes a layer of ViT-Tiny instead, with its own inputs and
weight: inner features have no order in which neighbours are alike. Each kind of Σ is run in a process of its own, for
the sake of its peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from mlorq import memory
from mlorq.calibration.blocks import products
from mlorq.calibration.covariance import shrink
from mlorq.fitting.covariance_fit import CovarianceFit, Metric

SIDE, GRIDS = 7, (1, 2, 3)  # positions of a region, regions of an image per side
PLACES = ("blocks.8", "blocks.4")
PERCENTILES = (0.92, 0.96, 0.99, 0.995, 1.0)
WIDTHS, RANK = (2, 3, 4), 32


def images(folder: Path, split: str) -> Iterator[Tensor]:
    """The images of a split, in batches of 20."""
    rows = [line.split("\t") for line in (folder / "labels.tsv").read_text().splitlines()]
    names = [row[0] for row in rows if row[-1] == split]
    for start in range(0, len(names), 20):
        opened = [Image.open(folder / "images" / name).convert("RGB") for name in names[start : start + 20]]
        pixels = np.stack([np.asarray(image.crop((12, 12, 236, 236)), np.float32) for image in opened])
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def vit(weights: str) -> nn.Module:
    """ViT-Tiny with trained weights."""
    model = timm.create_model("vit_tiny_patch16_224")
    model.load_state_dict(load_file(weights))
    found: nn.Module = model.eval()
    return found


@torch.no_grad()
def regions(weights: str, folder: Path, split: str, channels: int) -> tuple[Tensor, Tensor]:
    """The layer's inputs ``(regions, channels · 49)``, and targets of every region's image."""
    model: Any = vit(weights)
    seen: dict[str, Tensor] = {}
    for place in PLACES:
        model.get_submodule(place).register_forward_hook(lambda _, __, out, place=place: seen.update({place: out}))
    found, targets = [], []
    for batch in images(folder, split):
        tokens = model.forward_features(batch)
        maps = [functional.layer_norm(seen[place][:, 1:], (192,)) for place in PLACES]
        whole = torch.cat(maps, -1)[..., :channels].mT.unflatten(-1, (14, 14))
        own = torch.cat([tokens[:, 0], model.forward_head(tokens)], 1)
        for grid in GRIDS:
            step = (14 - max(SIDE, 14 // grid)) // max(1, grid - 1)
            for row in range(grid):
                for column in range(grid):
                    size = max(SIDE, 14 // grid)
                    part = whole[..., row * step : row * step + size, column * step : column * step + size]
                    found.append(functional.adaptive_avg_pool2d(part, SIDE).flatten(1))
                    targets.append(own)
    return torch.cat(found), torch.cat(targets)


@torch.no_grad()
def layer_inputs(weights: str, folder: Path, name: str) -> dict[str, Tensor]:
    """Weight and inputs of a linear layer of ViT-Tiny, 10 tokens of an image each, and G of correlated outputs."""
    model = vit(weights)
    module = model.get_submodule(name)
    found: dict[str, list[Tensor]] = {"calibration": [], "evaluation": []}
    for split, parts in found.items():
        hook = module.register_forward_pre_hook(
            lambda _, args, parts=parts: parts.append(args[0][:, ::20].flatten(0, 1).clone())
        )
        for batch in images(folder, split):
            model(batch)
        hook.remove()
    own = {split: torch.cat(parts) for split, parts in found.items()}
    return own | {"weight": module.weight.detach().clone(), "gradients": output_moment(len(module.weight))}


def layer(inputs: Tensor, targets: Tensor, rows: int) -> dict[str, Tensor]:
    """A trained weight ``(rows, columns)`` by ridge regression, and G of correlated outputs."""
    x, y = inputs.double(), targets[:, :rows].double()
    y = (y - y.mean(0)) / y.std(0)
    gram = x @ x.T
    gram += 0.1 * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.linalg.solve(gram, y).T @ x
    return {"weight": weight.float(), "gradients": output_moment(rows)}


def output_moment(rows: int) -> Tensor:
    """G of outputs of different weight, ``(rows, rows)``."""
    gradients = torch.randn(4 * rows, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients *= torch.logspace(0, -1, rows, dtype=torch.float64)
    return shrink(gradients.T @ gradients / len(gradients), len(gradients)).float()


def measure(file: Path, width: int) -> dict[str, object]:
    """Errors, seconds and memory of candidates under Σ in blocks of a width."""
    data = load_file(file)
    memory.ONE_BLOCK = memory.LARGEST_BLOCK = width  # of the rotation of trellis codes, too
    weight, g, held = data["weight"], data["gradients"].double(), data["evaluation"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def error(dense: Tensor) -> float:
        outputs, whole = ((held @ each.T).double() for each in (weight - dense, weight))
        return float(((outputs @ g) * outputs).sum() / ((whole @ g) * whole).sum())

    seconds: dict[str, float] = {}

    def timed(name: str, made: Callable[[], object]) -> object:
        started = time.process_time()
        found = made()
        seconds[name] = round(time.process_time() - started, 1)
        return found

    x = data["calibration"]
    sigma = timed("sums", lambda: products(x, x, width).double() / len(x))
    assert isinstance(sigma, Tensor)
    fit = CovarianceFit(weight, Metric(shrink(sigma, len(x)), g), PERCENTILES)
    del sigma
    timed("factor for codes", lambda: fit.metric.rows.shares)
    errors = {}
    for bits in WIDTHS:
        codes = timed(f"{bits} bit", lambda bits=bits: fit.codes(bits).dequantize())
        errors[f"{bits} bit"] = error(codes)
    fit.metric.__dict__.pop("rows")
    parts = timed(f"rank {RANK}", lambda: fit.product(RANK, 4, 4))
    errors[f"rank {RANK}"] = error(parts["a"].dequantize() @ parts["b"].dequantize())
    fit.metric.__dict__.pop("right")
    coded = timed("trellis", lambda: fit.trellis([2, 3]))
    for bits, matrix in zip((2, 3), coded, strict=True):
        errors[f"trellis {bits} bit"] = error(matrix.dequantize())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"errors": errors, "seconds": seconds, "peak": peak * 1024 / 1e9}


def _data(arguments: argparse.Namespace) -> dict[str, Tensor]:
    if arguments.layer:
        return layer_inputs(arguments.weights, arguments.folder, arguments.layer)
    splits = ("calibration", "evaluation")
    own = {name: regions(arguments.weights, arguments.folder, name, arguments.channels) for name in splits}
    tensors = {name: inputs for name, (inputs, _) in own.items()}
    return tensors | layer(*own["calibration"], arguments.rows)


def main() -> None:
    """Print a table, one row a width of blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", help="of ViT-Tiny")
    parser.add_argument("folder", type=Path, help="images, and labels.tsv with their splits")
    parser.add_argument("--layer", help="a linear layer of ViT-Tiny instead")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 0], help="numbers; 0: the diagonal")
    parser.add_argument("--data", type=Path, help="inputs and weight, kept in this file from one call to the next")
    parser.add_argument("--width", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.width:
        print(json.dumps(measure(arguments.data, arguments.width)))
        return
    with tempfile.TemporaryDirectory(prefix="mlorq-blocks-") as temporary:
        file = arguments.data or Path(temporary) / "layer.safetensors"
        if not file.exists():
            save_file(_data(arguments), file)
        columns = safe_open(file, "pt").get_slice("weight").get_shape()[1]
        for index, count in enumerate(arguments.blocks):
            width = columns // count if count else 1
            command = [sys.executable, __file__, arguments.weights, str(arguments.folder), "--data", str(file)]
            environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
            done = subprocess.run(
                [*command, "--width", str(width)], stdout=subprocess.PIPE, check=True, env=environment
            )
            found = json.loads(done.stdout)
            if not index:
                names = ("width", *found["errors"], *(f"{name}, CPU s" for name in found["seconds"]), "peak, GB")
                print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
            cells = [f"{value:.3g}" for value in found["errors"].values()] + [str(s) for s in found["seconds"].values()]
            print(f"| {width:,} | {' | '.join(cells)} | {found['peak']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
