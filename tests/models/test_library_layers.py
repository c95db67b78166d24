"""Layers of timm with a forward of their own: compressed if it computes no more than their kind, else left alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame, Linear, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear

import mlorq
from mlorq.errors import CheckpointError
from mlorq.models import from_module
from mlorq.models.left_float import why_float
from mlorq.models.library_layers import computed_by_class
from tests.zoo import QUICK

SIMPLE: dict[str, Any] = {
    "cast": lambda: Linear(6, 4),
    "bias after the product": lambda: FalconLinear(6, 4),
    "product alone": lambda: FalconLinear(4, 4, bias=False),
    "standardised": lambda: StdConv2d(3, 4, 3, stride=2, bias=True),
    "grouped": lambda: StdConv2d(4, 4, 3, groups=2),
    "scaled": lambda: ScaledStdConv2d(3, 4, 3, stride=2),
    "static padding": lambda: ScaledStdConv2dSame(3, 4, 3),
}
PADDED: dict[str, Any] = {
    "same": lambda: Conv2dSame(3, 4, 3, stride=2),
    "standardised, same": lambda: StdConv2dSame(3, 4, 3, stride=2),
    "scaled, same": lambda: ScaledStdConv2dSame(3, 4, 3, stride=2),
}


def inputs(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (5, layer.in_channels, 7, 8) if isinstance(layer, nn.Conv2d) else (5, layer.weight.shape[1])
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("kind", sorted(SIMPLE))
def test_a_layer_that_does_no_more_than_its_kind_is_compressed_by_value(kind: str) -> None:
    layer = SIMPLE[kind]().eval()
    model = from_module(nn.Sequential(copy.deepcopy(layer)))
    (found,) = model.module
    assert why_float(found) is None
    assert isinstance(found, type(layer))
    assert torch.allclose(found(inputs(layer)), layer(inputs(layer)), atol=1e-6)
    assert computed_by_class(model.module) == ([] if isinstance(layer, nn.Linear) else ["0"])


@pytest.mark.parametrize("kind", sorted(PADDED))
def test_a_layer_that_pads_by_the_size_of_its_input_stays_float(kind: str) -> None:
    layer = PADDED[kind]().eval()
    (found,) = from_module(nn.Sequential(copy.deepcopy(layer))).module
    assert "has a forward of its own" in str(why_float(found))
    assert torch.equal(found(inputs(layer)), layer(inputs(layer)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.body, self.head = StdConv2d(3, 8, 3), ScaledStdConv2d(8, 8, 3, gain_init=1.5), Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize("exclude", [(), ("stem",), ("head",)])
def test_a_checkpoint_with_computed_weights_loads_into_the_original_classes(exclude: Any, tmp_path: Path) -> None:
    x = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    wanted = Net().eval()(x)
    result = mlorq.compress(
        Net(), [x], budget="8bit", preset="quick", rounding="nearest", search=QUICK, device="cpu", exclude=exclude
    )
    assert {one.name for one in result.left_float if "own" in one.reason} == set()
    assert set(result.allocation["layer"].to_pylist()) == {"stem", "body", "head"} - set(exclude)
    assert (result.model(x) - wanted).norm() < 0.05 * wanted.norm()
    result.save(str(tmp_path))
    assert torch.equal(mlorq.load(str(tmp_path), model=Net())(x), result.model(x))
    with pytest.raises(CheckpointError, match="computes its weight from its parameters"):
        mlorq.export(str(tmp_path), str(tmp_path / "dense.safetensors"))
