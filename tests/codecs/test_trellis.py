"""Trellis codes: the decoder against its definition, bytes, the order of rows, scales, and the rotation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlorq import memory
from mlorq.codecs.rotation import mixed_bits, rotate, rotate_back, rotate_both, rotated_back, signs, stored_seed
from mlorq.codecs.trellis import (
    STATE_BITS,
    ZERO_SCALE,
    TrellisCodec,
    TrellisMatrix,
    nearest_scale_codes,
    scale_values,
    stream,
    tables,
)


def random_matrix(rows: int, columns: int, bits: int, rotation: int = -1, seed: int = 0) -> TrellisMatrix:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (columns, rows), generator=generator).to(torch.uint8)
    scale = torch.randint(256, (rows,), generator=generator).to(torch.uint8)
    base, seed_tensor = torch.tensor([0.37]), torch.tensor([rotation], dtype=torch.int32)
    return TrellisMatrix(codes, scale, base, seed_tensor, bits)


def decoded_bit_by_bit(packed: dict[str, Tensor], rows: int, columns: int, bits: int) -> np.ndarray:
    """``diag(scale) V`` from the packed bytes, by the words of docs/TRELLIS.md, one bit after another."""
    order, _, _, bounds = stream(rows)
    found = np.zeros((rows, columns))
    scales = packed["scale"].numpy()
    for column in range(columns):
        data = packed["codes"][column].tolist()
        stored = [(data[i // 8] >> (i % 8)) & 1 for i in range(rows * bits)]
        for start, stop in itertools.pairwise(bounds):
            cycle: list[int] = []  # the most significant bit of each weight first
            for place in range(start, stop):
                own = stored[place * bits : (place + 1) * bits]
                cycle += own[::-1]
            for index in range(stop - start):
                end = (index + 1) * bits
                last = [cycle[(end - STATE_BITS + i) % len(cycle)] for i in range(STATE_BITS)]
                state = int("".join(map(str, last)), 2)
                row = order[start + index]
                found[row, column] = tables()[bits - 1, state]
    values = np.array([0.0 if code == ZERO_SCALE else 2.0 ** (-int(code) / 24) for code in scales])
    return found * (values * float(packed["base"]))[:, None]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("rows", [12, 37, 200])
def test_decoder_follows_the_definition(rows: int, bits: int) -> None:
    matrix = random_matrix(rows, 3, bits, seed=rows + bits)
    expected = decoded_bit_by_bit(TrellisCodec(bits).pack(matrix), rows, 3, bits)
    np.testing.assert_allclose(matrix.dequantize().numpy(), expected, rtol=2e-7)


@pytest.mark.parametrize("bits", [1, 3, 6])
@pytest.mark.parametrize(("rows", "columns"), [(12, 5), (100, 192), (97, 31)])
def test_packing_and_bytes(rows: int, columns: int, bits: int) -> None:
    matrix, codec = random_matrix(rows, columns, bits, rotation=3), TrellisCodec(bits)
    packed = codec.pack(matrix)
    assert {
        name: (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in packed.items()
    } == {name: (spec.shape, spec.dtype) for name, spec in codec.layout(rows, columns).items()}
    size = sum(tensor.nbytes for tensor in packed.values())
    assert size == codec.size(rows, columns) == columns * math.ceil(rows * bits / 8) + rows + 8
    assert codec.unpaid(rows, columns) >= size - rows * columns * bits // 8
    back = codec.unpack(packed, columns)
    assert back.shape == (rows, columns)
    assert torch.equal(back.dequantize(), matrix.dequantize())
    again = codec.from_tensors(matrix.tensors())
    assert torch.equal(again.dequantize(), matrix.dequantize())


def test_codes_that_do_not_fit_are_refused() -> None:
    matrix = random_matrix(20, 4, 3)
    with pytest.raises(ValueError, match="does not fit 2 bits"):
        TrellisCodec(2).pack(matrix)
    with pytest.raises(ValueError, match="1 to 6 bits, not 7"):
        TrellisCodec(7)


@pytest.mark.parametrize("rows", [1, 12, 95, 150, 768, 1000])
def test_order_and_cycles(rows: int) -> None:
    order, place, before, bounds = stream(rows)
    assert sorted(order) == list(range(rows))
    assert [order[at] for at in place] == list(range(rows))
    assert bounds[0] == 0
    assert bounds[-1] == rows
    for start, stop in itertools.pairwise(bounds):
        at, seen = start, []
        for _ in range(stop - start):
            at = before[at]
            seen.append(int(at))
        assert sorted(seen) == list(range(start, stop))  # one cycle
    if rows > 200:  # rows far apart become neighbours
        assert np.abs(np.diff(order)).mean() == pytest.approx(rows / 3, rel=0.15)


def test_constants_of_the_format() -> None:
    """Published values: a change of any would make stored models decode to other weights."""
    assert mixed_bits(torch.arange(3)).numpy().view(np.uint64).tolist() == SPLITMIX64
    assert signs(4, 0).tolist() == signs(4, torch.tensor([0], dtype=torch.int32)).tolist() == SIGNS_OF_4
    assert signs(64, 7).tolist() != signs(64, 8).tolist()
    assert stream(12).order.tolist() == STREAM_OF_12
    assert tables().shape == (6, 4096)
    assert tables().astype(np.float16).astype(np.float32).tolist() == tables().tolist()
    assert scale_values()[[0, 24, 12, ZERO_SCALE]].tolist() == [1.0, 0.5, np.float32(2**-0.5), 0.0]


SIGNS_OF_4 = [-1, 1, 1, -1]
SPLITMIX64 = [16294208416658607535, 7960286522194355700, 487617019471545679]  # as published for state 0
STREAM_OF_12 = [2, 4, 6, 8, 5, 10, 1, 11, 7, 0, 9, 3]


def test_nearest_scales() -> None:
    base = 0.7
    scales = np.exp(np.random.default_rng(0).uniform(-9, 1, 2000)) * base
    codes = nearest_scale_codes(scales, base)
    errors = np.abs(scale_values()[:ZERO_SCALE].astype(float) * base - scales[:, None])
    chosen = np.abs(scale_values()[codes].astype(float) * base - scales)
    np.testing.assert_allclose(chosen, errors.min(1))
    assert nearest_scale_codes(np.array([0.0]), base) == [ZERO_SCALE]


@pytest.mark.parametrize("size", [1, 2, 3, 12, 64, 147, 192, 384])
def test_rotation_is_orthogonal_and_undone(size: int) -> None:
    identity = torch.eye(size, dtype=torch.float64)
    q = rotate(identity, seed=5)
    assert torch.allclose(q @ q.T, identity, atol=1e-12)
    assert torch.allclose(rotate_back(q, seed=5), identity, atol=1e-12)
    values = torch.randn(7, size, dtype=torch.float64)
    assert torch.allclose(rotate(values, 5), values @ q, atol=1e-12)
    symmetric = values.T @ values
    assert torch.allclose(rotate_both(symmetric, 5), q.T @ symmetric @ q, atol=1e-10)
    if size > 1:
        assert not torch.equal(q, rotate(identity, seed=6))


@pytest.mark.parametrize(("size", "width"), [(60, 20), (48, 16), (35, 7), (9, 1)])
def test_rotation_of_blocks(size: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block has the transform of its width; the stored number says so."""
    monkeypatch.setattr(memory, "ONE_BLOCK", size - 1)
    monkeypatch.setattr(memory, "LARGEST_BLOCK", width)
    values = torch.randn(7, size, dtype=torch.float64)
    found, sign = rotate(values, 5, width), signs(size, 5)
    for start in range(0, size, width):
        part = slice(start, start + width)
        plain = rotate(values[:, part] * sign[part] * signs(width, 5), 5)  # without the signs of the first block
        torch.testing.assert_close(found[:, part], plain)
    torch.testing.assert_close(rotate_back(found, 5, width), values)
    q = rotate(torch.eye(size, dtype=torch.float64), 5, width)
    stacked = torch.stack([one.T @ one for one in values.split(width, dim=1)])
    torch.testing.assert_close(torch.block_diag(*rotate_both(stacked, 5)), q.T @ torch.block_diag(*stacked) @ q)
    for seed, own in ((None, size), (5, size), (5, width), (0, width)):
        stored = torch.tensor([stored_seed(seed, size, own)], dtype=torch.int32)
        rotated = values if seed is None else rotate(values, seed, own)
        torch.testing.assert_close(rotated_back(rotated, stored), values)


def test_blocks_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="12544 columns are rotated in blocks of 3136, not 6272"):
        stored_seed(0, 12544, 6272)


def test_rotation_spreads_single_columns() -> None:
    for size in (64, 192, 147):
        q = rotate(torch.eye(size, dtype=torch.float64), seed=0)
        assert q.abs().max() <= 1.01 * math.sqrt(2 / size)


def test_rows_of_zeros_stay_zero() -> None:
    matrix = random_matrix(24, 8, 2, rotation=1)
    scale = matrix.scale.clone()
    scale[3] = ZERO_SCALE
    zeroed = TrellisMatrix(matrix.codes, scale, matrix.base, matrix.rotation, 2)
    assert torch.equal(zeroed.dequantize()[3], torch.zeros(8))


def test_trained_scales_are_stored_ones() -> None:
    matrix = random_matrix(40, 16, 3, rotation=0)
    trainable = matrix.trainable("cpu")
    assert torch.equal(trainable.values().detach(), matrix.dequantize())
    trainable.values().sum().backward()
    assert trainable.growth is not None
    assert trainable.growth.grad is not None
    assert trainable.growth.grad.abs().sum() > 0
    with torch.no_grad():
        trainable.growth += torch.randn(40) * 0.1
    trained = trainable.result()
    assert torch.equal(trained.codes, matrix.codes)
    assert not torch.equal(trained.scale, matrix.scale)
    assert torch.equal(trainable.values().detach(), trained.dequantize())
