"""Layers that exporters merge, leave out or compute: their codes are in the graph, or are not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.export_targets.onnx_graph.norms import KINDS, ChannelAffine, split_batch_norms
from mlorq.models.copying import copy_module
from tests import zoo
from tests.compressed import compressed, folder_of


class Merged(nn.Module):
    """A convolution before a batch normalisation, a table of which all rows are read, and a head that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.positions = nn.Embedding(16, 8)
        self.unread = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("rows", torch.arange(16)[None])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.conv(x)).flatten(2).transpose(1, 2) + self.positions(self.rows)
        self.unread(tokens)
        found: Tensor = self.head(tokens.relu().mean(1))
        return found


def with_statistics(module: nn.Module, seed: int) -> nn.Module:
    """Batch normalisations with means and variances of their own."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, KINDS):
            child.running_mean.copy_(torch.randn(child.num_features, generator=generator))
            child.running_var.copy_(torch.rand(child.num_features, generator=generator) + 0.1)
    return module.eval()


def test_their_outputs_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    net = with_statistics(zoo.randomised(Merged(), 1), 2)
    folder_of(tmp_path, compressed(net), {"family": "custom"})
    pixels = zoo.pixels(3, 1, 8)
    with torch.no_grad():
        expected = mlorq.load(tmp_path, copy_module(net))(pixels)
    found = mlorq.load(tmp_path, net, runtime="onnxruntime", example=zoo.pixels(4, 2, 8), threads=1)(pixels)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 3, 2)])
def test_a_product_and_a_sum_are_the_normalisation(shape: tuple[int, ...], affine: bool, seed: int) -> None:
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    norm = with_statistics(zoo.randomised(nn.Sequential(kind(6, affine=affine)), seed), seed)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        torch.testing.assert_close(ChannelAffine(norm[0])(x), norm(x))
        expected = norm(x)
        split_batch_norms(norm)
        assert isinstance(norm[0], ChannelAffine)
        torch.testing.assert_close(norm(x), expected)


def test_normalisations_with_code_of_their_own_stay() -> None:
    class Other(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    net = nn.Sequential(Other(3), nn.BatchNorm2d(3, track_running_stats=False)).eval()
    split_batch_norms(net)
    assert [type(child) for child in net] == [Other, nn.BatchNorm2d]
