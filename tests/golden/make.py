"""Write a small checkpoint and the store of its run with the version of mlorq that is on the path.

    python make.py FOLDER [--gelu]

The model's weights come from a formula, not from random numbers, so that every version of torch makes the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import mlorq

WIDTH = 8


def net(gelu: bool = False) -> nn.Module:
    """Two linear layers with fixed weights."""
    between = nn.GELU() if gelu else nn.ReLU()
    model = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), between, nn.Linear(2 * WIDTH, 3))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_(torch.sin(steps * 1.7 + number).reshape(parameter.shape) / 2)
    return model


def batches(count: int = 2, start: float = 0.0) -> list[Tensor]:
    """Batches of 8 fixed inputs."""
    steps = torch.arange(8 * WIDTH, dtype=torch.float64).reshape(8, WIDTH)
    return [torch.cos(steps * 0.9 + start + number).float() for number in range(count)]


def main(folder: Path, gelu: bool) -> None:
    """Write ``checkpoint/``, ``store/`` and the outputs of the compressed model.

    Args:
        folder: to write to.
        gelu: a model with GELU, which becomes ReLU (``activations.method: rectified``): format 3.
    """
    torch.set_num_threads(1)
    options: dict[str, Any] = {"preset": "quick", "rounding": "nearest", "search": {"points": 2}}
    if gelu:
        options["activations"] = {"method": "rectified", "bits": 8, "mlp_iterations": 20}
    store = f"file://{(folder / 'store').resolve()}"
    result = mlorq.compress(net(gelu), batches(), budget="8bit", store=store, **options)
    result.save(folder / "checkpoint")
    with torch.no_grad():
        outputs = result.model(batches(1, start=0.5)[0])
    safetensors.torch.save_file({"outputs": outputs.contiguous()}, folder / "outputs.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gelu", action="store_true")
    given = parser.parse_args()
    main(given.folder, given.gelu)
