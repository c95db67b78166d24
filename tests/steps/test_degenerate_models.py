"""A model with dead and with badly scaled layers: no preset or method fails or is far behind nearest rounding."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.config.presets import PRESETS
from mlorq.rounding import METHODS
from tests import zoo
from tests.long import few

VIT = {**zoo.VIT_ARGUMENTS, "depth": 3}
SEARCH = {
    "samples": 8,
    "points": 2,
    "percentiles": [1.0],
    "hessian_samples": 8,
    "hessian_probes": 2,
    "hessian_min_probes": 2,
    "hessian_mode": "probes",
    "factor_bits": [4],
    "sensitivity": "closed_form",
}
NEAREST = {"search": SEARCH | {"forms": ["Q"]}, "rounding": {"method": "nearest"}}
ACTIVATIONS = {"bits": 6, "samples": 16}
# 15 rather than 20 steps: enough for steps of Adam to show, should they be too large for a layer.
FEW_STEPS = {"iterations": 15, "tuning": 5, "mlp_iterations": 15}

WEIGHTS = {name: {"preset": name} for name in PRESETS} | {
    name: {"search": {"forms": ["Q"]}, "rounding": {"method": name}} for name in METHODS.names()
}
TENSORS: dict[str, dict[str, Any]] = {name: {"method": name} for name in ACTIVATION_METHODS.names()} | {
    "token": {"ranges": "token"}
}


def model() -> nn.Module:
    """A ViT with zeros, rows and columns of other magnitudes, and a layer below all magnitudes."""
    module = zoo.timm_model(zoo.VIT, VIT, 0)
    first, second, third = module.blocks
    with torch.no_grad():
        first.mlp.fc1.weight.zero_()
        first.mlp.fc1.bias.zero_()  # the next layer reads zeros,
        first.mlp.fc2.weight *= 100  # whatever its size
        first.attn.proj.weight[0] *= 1e-5
        second.mlp.fc1.weight *= 1e-8
        second.mlp.fc1.bias *= 1e-8
        second.mlp.fc2.weight *= 1e8
        second.attn.qkv.weight[32:64] = 0  # the same keys for all tokens
        third.attn.proj.weight *= 1e-30
        third.mlp.fc1.weight[:, 1:] = 0
        third.mlp.fc2.weight[:] = third.mlp.fc2.weight[:1]
        module.norm.weight[3] = 1e-3
        module.head.weight[:, 3] *= 1e3
    return module


@functools.cache
def wanted() -> tuple[Tensor, Tensor]:
    """Samples and the float model's outputs."""
    x = zoo.pixels(32, 9)
    with torch.no_grad():
        return x, model()(x)


def error(**options: Any) -> float:
    """The output error of the compressed model relative to the outputs' variance; a warning names the layer."""
    x, outputs = wanted()
    with pytest.warns(UserWarning, match="blocks.2.attn.proj"):
        result = mlorq.compress(model(), [zoo.pixels(16, 1), zoo.pixels(16, 2)], budget="4bit", device="cpu", **options)
    with torch.no_grad():
        found = result.model(x)
    assert found.isfinite().all()
    return float((found - outputs).square().sum() / (outputs - outputs.mean(0)).square().sum())


@functools.cache
def nearest(quantized: bool) -> float:
    """The error of nearest rounding, with or without quantized activations."""
    return error(**NEAREST, **({"activations": {"method": "uniform", **ACTIVATIONS}} if quantized else {}))


def steps(options: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """Those of ``FEW_STEPS`` that a section has."""
    return options | {key: value for key, value in FEW_STEPS.items() if key in keys}


@pytest.mark.parametrize("name", few(WEIGHTS, "best", "fast", "fimaq"))
def test_weights(name: str) -> None:
    options = WEIGHTS[name]
    method = options.get("rounding", {}).get("method") or PRESETS[name]["rounding"]["method"]
    rounding = steps(options.get("rounding", {}), set(METHODS[method].settings.model_fields))
    found = error(**options | {"search": SEARCH | options.get("search", {}), "rounding": rounding})
    assert found <= 1.2 * nearest(False)


@pytest.mark.parametrize("name", few(TENSORS, "token", "rectified"))
def test_activations(name: str) -> None:
    settings = ACTIVATION_METHODS[TENSORS[name].get("method", "normalized")].settings
    activations = steps(TENSORS[name] | ACTIVATIONS, set(settings.model_fields))
    assert error(preset="fast", search=SEARCH, activations=activations) <= 1.2 * nearest(True)
