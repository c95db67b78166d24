"""Compressed convolutions of every kind against the float layer with the dequantized weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mlorq.errors import ModelError
from mlorq.forms.base import Candidate
from mlorq.forms.convolutions import CONVOLUTIONS
from mlorq.forms.modules import compressed_class
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.kinds import KINDS, known_kind
from mlorq.models.layers import set_matrix
from tests.compressed import affine
from tests.layers import matrices_of

FORMS = [Candidate("Q", bits=3), Candidate("LR", bits_a=6, bits_b=4, rank=3), Candidate("QLR", 3, 6, 4, 3)]
CASES: dict[str, Any] = {
    "conv1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=2, dilation=2),
    "conv1d same": lambda: nn.Conv1d(6, 8, 4, padding="same", padding_mode="reflect", bias=False),
    "conv3d": lambda: nn.Conv3d(6, 8, (2, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0)),
    "conv3d circular": lambda: nn.Conv3d(6, 8, 2, padding=(0, 1, 2), padding_mode="circular", dilation=(1, 1, 2)),
    "transposed 1d": lambda: nn.ConvTranspose1d(6, 4, 4, stride=3, padding=1, output_padding=2),
    "transposed 2d": lambda: nn.ConvTranspose2d(6, 4, (3, 2), stride=2, dilation=(1, 2), bias=False),
    "transposed 3d": lambda: nn.ConvTranspose3d(6, 4, 2, stride=(1, 2, 1), padding=1, output_padding=(0, 1, 0)),
}


def random_compressed(layer: nn.Module, candidate: Candidate, seed: int = 1) -> CompressedLayer:
    sizes = matrices_of(candidate, *known_kind(layer).matrix_shape(layer.weight.shape))
    parts = {name: affine(*size, seed + index) for index, (name, size) in enumerate(sizes.items())}
    return CompressedLayer("layer", candidate, parts)


def made(name: str) -> Any:
    torch.manual_seed(0)
    return CASES[name]().requires_grad_(False)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("candidate", FORMS, ids=lambda candidate: candidate.candidate_id)
@pytest.mark.parametrize("batched", [True, False])
def test_a_layer_has_the_outputs_of_its_weight(candidate: Candidate, name: str, batched: bool) -> None:
    layer = made(name)
    record = random_compressed(layer, candidate)
    module = compressed_class(layer, "layer").from_layer(layer, record)
    shape = (6, *(7, 6, 5)[: known_kind(layer).axes])
    x = torch.randn((2, *shape) if batched else shape, generator=torch.Generator().manual_seed(3))
    found = module(x)
    set_matrix(layer, record.dense())
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(module.weight, layer.weight)
    assert module.weight.is_contiguous()


def test_each_kind_has_a_class():
    assert {cls.kind: cls.float_class for cls in CONVOLUTIONS} == {kind.name: kind.layer for kind in KINDS if kind.axes}


@pytest.mark.parametrize("name", ["transposed 1d", "transposed 2d"])
def test_an_output_size_takes_the_place_of_the_output_padding(name: str) -> None:
    layer = made(name)
    record = random_compressed(layer, FORMS[2])
    module = compressed_class(layer, "layer").from_layer(layer, record)
    set_matrix(layer, record.dense())
    x = torch.randn(2, 6, *(5, 4)[: known_kind(layer).axes], generator=torch.Generator().manual_seed(4))
    least = [size - more for size, more in zip(layer(x).shape[2:], layer.output_padding, strict=True)]
    for more in (0, 1):
        wanted = [size + more for size in least]
        expected = layer(x, output_size=wanted)
        torch.testing.assert_close(module(x, output_size=wanted), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module(x, expected.shape), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="output padding"):
        module(x, [size + 9 for size in least])


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 8, 3, groups=2), nn.Conv3d(4, 8, 2, groups=4)], ids=["1d", "3d"])
def test_grouped_convolutions_take_one_matrix_only(layer: Any) -> None:
    layer = layer.requires_grad_(False)
    cls = compressed_class(layer, "layer")
    record = random_compressed(layer, FORMS[0])
    x = torch.randn(2, 4, *(5, 4, 3)[: known_kind(layer).axes])
    found = cls.from_layer(layer, record)(x)
    set_matrix(layer, record.dense())
    assert torch.equal(found, layer(x))
    with pytest.raises(ModelError, match=r"a convolution with [24] groups has no low-rank form"):
        cls.from_layer(layer, random_compressed(layer, FORMS[1]))


def test_grouped_transposed_convolutions_are_refused():
    layer = nn.ConvTranspose2d(4, 8, 3, groups=2)
    with pytest.raises(ModelError, match=r"'layer' cannot become a CompressedConvTranspose2d: .* with 2 groups"):
        compressed_class(layer, "layer").placeholder(layer, "layer", FORMS[0], "codes")


@pytest.mark.parametrize("name", ["conv1d", "transposed 2d"])
def test_layers_compile_and_print_their_geometry(name: str) -> None:
    layer = made(name)
    module = compressed_class(layer, "layer").from_layer(layer, random_compressed(layer, FORMS[1]))
    x = torch.randn(2, 6, *(7, 6)[: known_kind(layer).axes])
    exported = torch.export.export(module, (x,)).module()
    torch.testing.assert_close(exported(x), module(x))
    assert f"kernel_size={layer.kernel_size}, stride={layer.stride}" in repr(module)
