"""The smallest variant of each of timm's modules, with random weights, and an input that it takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import timm
import torch
from torch import Tensor, nn

COMPARED = 4  # variants whose parameters are counted
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)  # sides of the image that are tried
CLASSES = 10
LARGE = 30_000_000  # parameters; above it a model is built with fewer layers, where its arguments allow that
FEWER: tuple[dict[str, Any], ...] = ({"depth": 2, "embed_dim": 64, "num_heads": 2}, {"depth": 2}, {"depths": (1,) * 4})
# Words in the names of variants, small ones first. timm names the size of a variant in no other way.
SMALL = ("test_", "atto", "femto", "pico", "nano", "xxtiny", "tiny", "mini", "_xxs", "_xs", "_s0", "lite0", "small")


def variants(module: str) -> list[str]:
    """The variants of one of ``timm.list_modules()``, those with the names of small ones first."""

    def size(name: str) -> tuple[int, list[int], str]:
        rank = next((index for index, word in enumerate(SMALL) if word in name), len(SMALL))
        return rank, [int(number) for number in re.findall(r"\d+", name)], name

    return sorted(timm.list_models(module=module), key=size)


def smallest(module: str) -> str:
    """The variant with the fewest parameters among the first few of ``variants``.

    Raises:
        ValueError: the module has no variants.
    """
    names = variants(module)
    if not names:
        raise ValueError(f"{module} has no variants")
    return min(names[:COMPARED], key=lambda name: _parameters(name))


def _shrunk(name: str) -> dict[str, Any]:
    if _parameters(name) > LARGE:
        for arguments in FEWER:
            with suppress(Exception):  # constructors refuse arguments that they do not have in many ways
                if _parameters(name, arguments) <= LARGE:
                    return arguments
    return {}


def _parameters(name: str, arguments: Mapping[str, Any] | None = None) -> int:
    try:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=CLASSES, **arguments or {})
    except Exception:  # a model may compute with its tensors while it is built
        model = timm.create_model(name, num_classes=CLASSES, **arguments or {})
    return sum(value.numel() for value in model.parameters())


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A variant with random weights in eval mode, and two images of the smallest size that it takes.

    Raises:
        Exception: that of the attempt at the model's own size, if it takes none.
    """
    shrunk = _shrunk(name)
    own = int(timm.get_pretrained_cfg(name).input_size[-1])
    failed: Exception = ValueError(f"{name} has no size")
    for size in [*(size for size in SIZES if size < own), own]:
        arguments: list[dict[str, Any]] = [shrunk | {"img_size": size}, shrunk]
        for given in arguments:
            torch.manual_seed(seed)
            try:
                model = timm.create_model(name, num_classes=CLASSES, **given).eval()
                images = torch.randn(2, int(model.pretrained_cfg["input_size"][0]), size, size)
                with torch.no_grad():
                    model(images)
            except Exception as error:  # models say in many ways that an image is too small
                failed = error
            else:
                return model, images
    raise failed
