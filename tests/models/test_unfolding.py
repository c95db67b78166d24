"""The matrix product that a layer stands for, against the library's own convolutions, on random geometries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.kinds import KINDS, Kind, known_kind, why_not_a_product
from mlorq.models.layers import matrix_of, set_matrix, weight_matrix
from mlorq.models.unfolding import input_tokens, leading_size, output_tokens, positions, reading, unfold

SEEDS = range(8)
CONVOLUTIONS = [kind for kind in KINDS if kind.axes and not kind.is_transposed]
TRANSPOSED = [kind for kind in KINDS if kind.is_transposed]


class Drawn:
    """Random geometries."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def numbers(self, count: int, low: int, high: int) -> tuple[int, ...]:
        return tuple(self.number(low, high) for _ in range(count))

    def one_of(self, *values: Any) -> Any:
        return values[self.number(0, len(values) - 1)]

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def convolution(self, kind: Kind) -> Any:
        mode = self.one_of("zeros", "zeros", "reflect", "replicate", "circular")
        padding: Any = self.one_of(self.numbers(kind.axes, 0, 2), "same", "valid")
        stride = (1,) * kind.axes if padding == "same" else self.numbers(kind.axes, 1, 3)
        groups, dilation = self.one_of(1, 2, 4), self.numbers(kind.axes, 1, 2)
        kernel = self.numbers(kind.axes, 1, 3)
        made: Any = kind.layer
        return made(4, 8, kernel, stride, padding, dilation, groups, self.one_of(True, False), mode)

    def transposed(self, kind: Kind) -> Any:
        stride, dilation = self.numbers(kind.axes, 1, 3), self.numbers(kind.axes, 1, 2)
        kernel, more = self.numbers(kind.axes, 1, 3), tuple(self.number(0, step - 1) for step in stride)
        padding = tuple(self.number(0, width * (size - 1) // 2) for width, size in zip(dilation, kernel, strict=True))
        made: Any = kind.layer
        return made(3, 4, kernel, stride, padding, more, 1, self.one_of(True, False), dilation)


def randomised(layer: Any, drawn: Drawn) -> Any:
    layer.double().requires_grad_(False)
    for value in layer.parameters():
        value.copy_(drawn.tensor(*value.shape))
    return layer


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kind", CONVOLUTIONS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_convolution_is_the_product_with_its_unfolded_input(kind: Kind, seed: int) -> None:
    drawn = Drawn(seed)
    layer = randomised(drawn.convolution(kind), drawn)
    inputs = drawn.tensor(3, 4, *drawn.numbers(kind.axes, 6, 9))
    outputs = layer(inputs)
    tokens, matrix = input_tokens(layer, inputs, 3), matrix_of(layer)
    assert matrix.shape == kind.matrix_shape(layer.weight.shape)
    columns, rows = matrix.shape[1], matrix.shape[0] // layer.groups
    parts = [
        tokens[..., group * columns : (group + 1) * columns] @ matrix[group * rows : (group + 1) * rows].T
        for group in range(layer.groups)
    ]
    wanted = torch.cat(parts, -1)
    wanted = wanted if layer.bias is None else wanted + layer.bias
    torch.testing.assert_close(output_tokens(layer, outputs, 3), wanted)
    assert positions(layer, inputs, outputs) == tokens.shape[0] * tokens.shape[1]


@pytest.mark.parametrize("kind", TRANSPOSED, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_transposed_convolution_folds_the_products_of_its_positions(kind: Kind, seed: int) -> None:
    drawn = Drawn(seed)
    layer = randomised(drawn.transposed(kind), drawn)
    assert why_not_a_product(layer) is None
    inputs = drawn.tensor(2, 3, *drawn.numbers(kind.axes, 2, 5))
    tokens, outputs = input_tokens(layer, inputs, 2), layer(inputs)
    products = (tokens @ matrix_of(layer).T).transpose(1, 2)
    if kind.axes == 3:  # which ``F.fold`` does not have: the adjoint of unfolding, by autograd
        blank = torch.zeros(2, 4, *outputs.shape[2:], dtype=torch.float64, requires_grad=True)
        windows = unfold(blank, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        (folded,) = torch.autograd.grad(windows, blank, products)
    else:  # one axis is a row of two
        ones, zeros = (1,) * (2 - kind.axes), (0,) * (2 - kind.axes)
        size, kernel = ones + tuple(outputs.shape[2:]), ones + layer.kernel_size
        dilation, padding, stride = ones + layer.dilation, zeros + layer.padding, ones + layer.stride
        folded = F.fold(products, size, kernel, dilation, padding, stride).view_as(outputs)
    bias = 0 if layer.bias is None else layer.bias.view(-1, *(1,) * kind.axes)
    torch.testing.assert_close(outputs, folded + bias)
    assert positions(layer, inputs, outputs) == tokens.shape[0] * tokens.shape[1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_weights_are_products_of_tokens(kind: Kind, seed: int) -> None:
    drawn = Drawn(100 + seed)
    if kind.axes:
        layer = randomised(drawn.transposed(kind) if kind.is_transposed else drawn.convolution(kind), drawn)
        channels = layer.in_channels
    else:
        layer, channels = randomised(nn.Linear(4, 5), drawn), 4
    shape = (3, channels, *drawn.numbers(kind.axes, 5, 8)) if kind.axes else (3, 6, channels)
    inputs = drawn.tensor(*shape)
    layer.weight.requires_grad_(True)
    outputs = layer(inputs)
    delta = drawn.tensor(*outputs.shape)
    (wanted,) = torch.autograd.grad(outputs, layer.weight, delta)
    x, products = input_tokens(layer, inputs, 3), output_tokens(layer, delta, 3)
    rows, columns = kind.matrix_shape(layer.weight.shape)
    groups = getattr(layer, "groups", 1)
    found = torch.cat(
        [
            torch.einsum(
                "btr,btc->rc",
                products[..., group * rows // groups : (group + 1) * rows // groups],
                x[..., group * columns : (group + 1) * columns],
            )
            for group in range(groups)
        ]
    )
    torch.testing.assert_close(kind.to_weight(found, layer.weight.shape), wanted)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_matrix_and_weight_are_inverse(kind: Kind) -> None:
    drawn = Drawn(7)
    layer = drawn.transposed(kind) if kind.is_transposed else drawn.convolution(kind) if kind.axes else nn.Linear(4, 5)
    assert known_kind(layer) is kind
    matrix = weight_matrix(layer)
    assert matrix.is_contiguous()
    assert torch.equal(kind.to_weight(matrix, layer.weight.shape), layer.weight)
    set_matrix(layer, matrix + 1)
    assert torch.equal(weight_matrix(layer), matrix + 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_windows_of_three_axes_are_those_of_slices(seed: int) -> None:
    drawn = Drawn(200 + seed)
    x = drawn.tensor(2, 3, *drawn.numbers(3, 5, 8))
    kernel, dilation = drawn.numbers(3, 1, 3), drawn.numbers(3, 1, 2)
    padding, stride = drawn.numbers(3, 0, 2), drawn.numbers(3, 1, 3)
    weight = drawn.tensor(5, 3, *kernel)
    wanted = F.conv3d(x, weight, None, stride, padding, dilation)
    found = weight.flatten(1) @ unfold(x, kernel, dilation, padding, stride)
    torch.testing.assert_close(found.unflatten(2, wanted.shape[2:]), wanted)


def test_an_input_without_an_axis_of_samples_is_one_sample():
    for layer in (nn.Conv1d(2, 3, 2), nn.ConvTranspose2d(2, 3, 2)):
        x = torch.randn(2, *(5,) * known_kind(layer).axes)
        assert leading_size(layer, x) == 1
        assert leading_size(layer, x[None].expand(4, *x.shape)) == 4
        assert torch.equal(input_tokens(layer, x, 1), input_tokens(layer, x[None], 1))
        assert torch.equal(output_tokens(layer, layer(x), 1), output_tokens(layer, layer(x[None]), 1))


def test_layers_that_multiply_the_same_vectors_are_recognised():
    assert reading(nn.Conv1d(2, 3, 3)) == reading(nn.Conv1d(2, 5, 3))
    assert reading(nn.Conv1d(2, 3, 3)) != reading(nn.Conv1d(2, 3, 3, dilation=2))
    assert reading(nn.ConvTranspose2d(2, 3, 3)) == reading(nn.ConvTranspose2d(2, 3, 2, 2))
    assert reading(nn.ConvTranspose2d(2, 3, 3)) != reading(nn.Conv2d(2, 3, 3))


def test_what_is_not_one_product_is_named():
    assert why_not_a_product(nn.Conv1d(4, 4, 3, groups=4)) is None
    reason = why_not_a_product(nn.ConvTranspose1d(4, 4, 3, groups=2))
    assert reason == "a parameter of ConvTranspose1d with 2 groups"
    reason = why_not_a_product(nn.ConvTranspose2d(4, 4, 3, stride=1, dilation=2, output_padding=1))
    assert reason == "a parameter of ConvTranspose2d with an output padding that is not smaller than its stride"
    with pytest.raises(TypeError, match="LSTM is not a compressible layer"):
        known_kind(nn.LSTM(2, 2))
    with pytest.raises(ModelError, match="its inputs have 3 rows, not a multiple of 2 samples"):
        input_tokens(nn.Conv1d(2, 3, 2), torch.randn(3, 2, 5), 2)
