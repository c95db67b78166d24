"""Example of a custom model: a small ViT, trained on scikit-learn's digits in seconds; see ``digits.yaml``.

The configuration names functions that build the model, return calibration batches, evaluate a model and, optionally,
return the batches on which outputs are compared. Any ``nn.Module`` can be compressed from the command line in this way.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

TEST_SIZE = 500


@cache
def images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images ``(samples, 1, 8, 8)`` in [-1, 1] with their labels."""
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=TEST_SIZE, stratify=digits.target, random_state=0)
    return pixels[train], labels[train], pixels[test], labels[test]


def build(epochs: int = 20, seed: int = 0, weights: str | None = None) -> nn.Module:
    """A ViT with three blocks, trained from a fixed seed; the same weights on every call on one machine.

    ``weights`` is a safetensors file: loaded if it exists, else written after training. Every process that runs steps
    builds the model; with this file, only the first one trains it.
    """
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=3, num_heads=4)
    if weights is not None and os.path.exists(weights):
        model.load_state_dict(load_file(weights))
        return model.eval()
    x, y, _, _ = images()
    steps = epochs * (len(x) // 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // 64 * 64].split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    if weights is not None:
        save_file(model.state_dict(), weights)
    return model.eval()


def calibration_batches() -> list[Tensor]:
    """256 training images in batches of 32."""
    return list(images()[0][:256].split(32))


def held_out_batches() -> list[Tensor]:
    """Batches of 100 of the test images."""
    return list(images()[2].split(100))


def evaluate(model: nn.Module) -> dict[str, float]:
    """Accuracy on the held-out images."""
    _, _, x, y = images()
    device = next(model.parameters()).device
    predicted = torch.cat([model(part.to(device)).argmax(1).cpu() for part in x.split(100)])
    return {"accuracy": float((predicted == y).float().mean())}
