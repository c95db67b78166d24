"""The digits ViT on which the published code was measured, for a configuration of the family ``custom``.

32 × 32 RGB, patch 8, width 192, depth 6; the split and the calibration images (the first 256 of the training images)
are those of the published figures. ``VIT_DIGITS`` names the folder of its weights where they lie elsewhere.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "vit_digits"
CALIBRATION, TEST = 256, 500


def build(folder: str | os.PathLike[str] | None = None) -> nn.Module:
    """The trained model."""
    place = Path(folder or os.environ.get("VIT_DIGITS") or FOLDER)
    module = VisionTransformer(**json.loads((place / "config.json").read_text()))
    module.load_state_dict(load_file(place / "model.safetensors"))
    return module.eval()


@cache
def split() -> tuple[np.ndarray, np.ndarray]:
    """Indices of training and test images."""
    target = load_digits().target
    train, test = train_test_split(np.arange(len(target)), test_size=TEST, stratify=target, random_state=0)
    return train, test


def images(rows: np.ndarray) -> Tensor:
    """Digits as ``(samples, 3, 32, 32)`` in [-1, 1]."""
    pixels = load_digits().images
    pictures = [
        Image.fromarray((pixels[row] / 16 * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        for row in rows
    ]
    stacked = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def calibration_batches() -> list[Tensor]:
    """Batches of 32 images."""
    return list(images(split()[0][:CALIBRATION]).split(32))


@cache
def _test() -> tuple[list[Tensor], Tensor]:
    return list(images(split()[1]).split(100)), torch.tensor(load_digits().target[split()[1]])


def test_batches() -> list[Tensor]:
    """Batches of 100 of the 500 test images."""
    return _test()[0]


def evaluate(model: nn.Module) -> dict[str, float]:
    """Accuracy on the 500 test images."""
    batches, labels = _test()
    device = next(iter(model.state_dict().values())).device
    with torch.no_grad():
        found = torch.cat([model(batch.to(device)).argmax(1).cpu() for batch in batches])
    return {"accuracy": float((found == labels).float().mean())}
