"""Errors of the layers' outputs in a compressed model, against explicit products."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mlorq.evaluation.depth import ROWS, compare_outputs
from mlorq.evaluation.outputs import model_outputs, output_nmse
from mlorq.models import from_module


class Net(nn.Module):
    """One layer that runs once, one that runs twice, one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8)
        self.never = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.stem(x)).relu()).relu())


def nmse(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).double().square().sum() / wanted.double().square().sum())


def test_errors_are_those_of_the_layers_outputs(seed: int) -> None:
    torch.manual_seed(seed)
    float_net = Net().eval()
    rough = copy.deepcopy(float_net)
    for layer in (rough.stem, rough.head):
        layer.weight.data = (layer.weight.data * 8).round() / 8
    batches = [torch.randn(16, 6), torch.randn(4, 6)]
    model = from_module(float_net)
    seen: list[int] = []
    names = ["stem", "twice", "never", "head", "not there"]
    found = compare_outputs(model, rough, batches, names, progress=lambda done, total: seen.append(done))
    assert list(found.layers) == ["stem", "head"]
    x = torch.cat(batches)
    with torch.no_grad():
        assert abs(found.layers["stem"] - nmse(rough.stem(x), float_net.stem(x))) < 1e-7
        # The error of the last layer is that of the model: those before it are in its input.
        assert abs(found.layers["head"] - output_nmse(found.outputs, found.reference)) < 1e-7
    assert torch.equal(found.outputs, model_outputs(model, rough, batches))
    assert torch.equal(found.reference, model_outputs(model, float_net, batches))
    assert seen == [1, 2]
    assert not any(module._forward_hooks for net in (float_net, rough) for module in net.modules())


def test_few_rows_are_kept_of_long_inputs() -> None:
    """Outputs after the first rows that are compared do not matter."""
    net = nn.Sequential(nn.Linear(2, 2))
    other = copy.deepcopy(net)
    batch = torch.zeros(1, 3 * ROWS, 2)
    batch[0, 1] = 1e6  # a row between two that are compared
    net[0].bias.data.fill_(1.0)
    other[0].bias.data.fill_(1.5)
    other[0].weight.data.zero_()
    found = compare_outputs(from_module(net), other, [batch], ["0"])
    assert abs(found.layers["0"] - 0.25) < 1e-6
