"""Which parameters belong to normalisation layers, and how they are set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mlorq.models.norms import norm_parameters, set_parameters
from tests import zoo


class TinyRMSNorm(nn.Module):
    """As language models define their own: no class of torch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class LayerNormFp32(nn.LayerNorm):
    """Known by its base class."""


class NormHead(nn.Linear):
    """Not a norm in spite of its name."""


def named(module: nn.Module, within: str = "") -> list[str]:
    return [parameter.name for parameter in norm_parameters(module, within)]


def test_norms_of_every_kind_are_found_and_nothing_else() -> None:
    net = nn.Sequential()
    net.add_module("linear", nn.Linear(4, 4))
    net.add_module("layer", nn.LayerNorm(4))
    net.add_module("derived", LayerNormFp32(4))
    net.add_module("no_bias", nn.LayerNorm(4, bias=False))
    net.add_module("no_affine", nn.LayerNorm(4, elementwise_affine=False))
    net.add_module("two_axes", nn.LayerNorm((2, 4)))
    net.add_module("rms", TinyRMSNorm(4))
    net.add_module("group", nn.GroupNorm(2, 4))
    net.add_module("batch", nn.BatchNorm2d(4))
    net.add_module("fixed_batch", nn.BatchNorm2d(4, affine=False))
    net.add_module("head", NormHead(4, 4))
    assert named(net) == [
        *("layer.weight", "layer.bias", "derived.weight", "derived.bias", "no_bias.weight", "rms.weight"),
        *("group.weight", "group.bias", "batch.weight", "batch.bias"),
    ]
    assert named(nn.LayerNorm(4)) == ["weight", "bias"]


def test_layer_scales_of_timm_are_found() -> None:
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS | {"init_values": 0.1})
    assert named(module, "blocks.1") == [
        f"blocks.1.{name}"
        for name in ("norm1.weight", "norm1.bias", "ls1.gamma", "norm2.weight", "norm2.bias", "ls2.gamma")
    ]
    assert set(named(module)) - set(named(module, "blocks.0")) - set(named(module, "blocks.1")) == {
        "norm.weight",
        "norm.bias",
    }


def test_the_names_of_a_block_are_no_prefixes_of_others() -> None:
    net = nn.ModuleDict({"1": nn.ModuleDict({"norm": nn.LayerNorm(2)}), "10": nn.ModuleDict({"norm": nn.LayerNorm(2)})})
    assert named(net, "1") == ["1.norm.weight", "1.norm.bias"]


def test_shared_parameters_appear_once_and_belong_to_no_block_alone() -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"a": nn.LayerNorm(3), "b": nn.LayerNorm(3)}) for _ in range(2))
    blocks[1]["a"].weight = blocks[0]["a"].weight  # a parameter of two blocks
    blocks[0]["b"].weight = blocks[0]["a"].bias  # a parameter of two modules of one block
    blocks[1]["b"] = blocks[0]["b"]  # a module of two blocks
    assert named(blocks) == ["0.a.weight", "0.a.bias", "0.b.bias", "1.a.bias"]
    assert named(blocks, "0") == []
    assert named(blocks, "1") == ["1.a.bias"]
    set_parameters(blocks, {"0.a.weight": torch.tensor([1.0, 2.0, 3.0])})
    assert blocks[1]["a"].weight.tolist() == [1.0, 2.0, 3.0]
    assert blocks[1]["a"].weight is blocks[0]["a"].weight


def test_a_parameter_shared_with_a_layer_is_left_out() -> None:
    net = nn.ModuleDict({"norm": nn.LayerNorm(3), "linear": nn.Linear(3, 3)})
    net["linear"].bias = net["norm"].bias
    assert named(net) == ["norm.weight"]


@pytest.mark.parametrize(
    ("weight", "unit"), [([3.0, -3.0], 3.0), ([1.0, 7.0], 5.0), ([0.0, 0.0], 1.0), ([float("nan")] * 2, 1.0)]
)
def test_the_unit_of_steps_is_the_size_of_the_scales(weight: list[float], unit: float) -> None:
    norm = nn.LayerNorm(2)
    set_parameters(norm, {"weight": torch.tensor(weight), "bias": torch.tensor([100.0, 100.0])})
    assert [parameter.unit for parameter in norm_parameters(norm)] == [unit, unit]
