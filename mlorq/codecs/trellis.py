"""Trellis codes: k bits per weight that decode to one of 4096 values (docs/TRELLIS.md; QTIP, arXiv 2406.11235).

Column j of the matrix is one bit stream, k bits per weight, over the rows in a fixed order (``stream``). The value of a
weight is ``table_k[s]``, s the last 12 bits of the stream up to and including its own k bits; the stream of a block of
rows is cyclic (tail-biting). Rows have scales, and the columns may be rotated (``mlorq.codecs.rotation``):

    Ŵ = diag(scale) V Qᵀ,   scale_i = base · 2^(-c_i / 24).

``mlorq.fitting.trellis`` finds the codes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlorq.codecs.base import Codec, StoredMatrix, TensorSpec, Trainable
from mlorq.memory import block_width

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mlorq.codecs.graph import Graph

STATE_BITS = 12
MOST_BITS = 6
FEWEST_ROWS = STATE_BITS  # a shorter cycle of one bit per weight would not fill a state
BLOCK_ROWS = 96  # approximate length of a cycle
STEPS_PER_OCTAVE = 24  # of the scales
# Mean squared errors of codes of 1 to 6 bits on Gaussian weights of variance 1, in cycles of BLOCK_ROWS.
GAUSSIAN_ERRORS = (0.2779, 0.0719, 0.01857, 0.00481, 0.001253, 0.000338)
ZERO_SCALE = 255  # scale code of a row of zeros
PARTS = ("codes", "scale", "base", "rotation")


class Stream(NamedTuple):
    """The order in which the rows of a column are coded.

    Attributes:
        order: ``(rows,)``, the row at each place of the stream.
        place: ``(rows,)``, the place of each row.
        before: ``(rows,)``, the place whose bits come before those of each place; cyclic within a block.
        bounds: first place of every block, and the number of rows.
    """

    order: np.ndarray
    place: np.ndarray
    before: np.ndarray
    bounds: tuple[int, ...]


@cache
def stream(rows: int) -> Stream:
    """The stream of a matrix with this many rows: pseudo-random, in blocks of about ``BLOCK_ROWS``.

    Rows of different importance become neighbours, so that the encoder can trade their errors against each other.
    """
    import torch

    from mlorq.codecs.rotation import mixed_bits

    order = np.argsort(mixed_bits(torch.arange(rows)).numpy().view(np.uint64), kind="stable")
    count = max(1, round(rows / BLOCK_ROWS))
    bounds = tuple(index * rows // count for index in range(count + 1))
    before = np.arange(rows) - 1
    before[list(bounds[:-1])] = np.array(bounds[1:]) - 1
    return Stream(order, np.argsort(order, kind="stable"), before, bounds)


@cache
def tables() -> np.ndarray:
    """The values of all states, ``(MOST_BITS, 4096)`` float32: entry ``[k - 1, s]`` for codes of k bits.

    They are trained for independent Gaussian weights of variance 1 (``scripts/train_trellis_tables.py``).
    """
    with files("mlorq.codecs").joinpath("trellis_tables.npy").open("rb") as file:
        found: np.ndarray = np.load(file).astype(np.float32)
    return found


@cache
def scale_values() -> np.ndarray:
    """``2^(-c / STEPS_PER_OCTAVE)`` of every scale code c, ``(256,)`` float32; 0 for ``ZERO_SCALE``."""
    steps, octaves = np.arange(256) % STEPS_PER_OCTAVE, np.arange(256) // STEPS_PER_OCTAVE
    found = np.ldexp(np.exp2(-steps / STEPS_PER_OCTAVE).astype(np.float32), -octaves)
    found[ZERO_SCALE] = 0
    return found


def nearest_scale_codes(scales: np.ndarray, base: float) -> np.ndarray:
    """Codes of the nearest scales that can be stored, uint8; ``ZERO_SCALE`` for 0.

    Args:
        scales: float64, not negative.
        base: the scale of code 0.
    """
    with np.errstate(divide="ignore"):
        exact = STEPS_PER_OCTAVE * (math.log2(base) - np.log2(scales))
    lower = np.clip(np.floor(exact), 0, ZERO_SCALE - 1).astype(int)
    upper = np.minimum(lower + 1, ZERO_SCALE - 1)
    values = scale_values().astype(np.float64) * base
    nearer = np.abs(values[upper] - scales) < np.abs(values[lower] - scales)
    found: np.ndarray = np.where(scales > 0, np.where(nearer, upper, lower), ZERO_SCALE).astype(np.uint8)
    return found


@dataclass(frozen=True)
class TrellisMatrix(StoredMatrix):
    """A matrix as trellis codes.

    Attributes:
        codes: ``(columns, rows)`` uint8, the k bits of each weight, in the order of the stream.
        scale: ``(rows,)`` uint8 scale codes, in the order of the rows.
        base: ``(1,)`` float32, the scale of code 0.
        rotation: ``(1,)`` int32, how the columns are rotated (``mlorq.codecs.rotation.stored_seed``).
        bits: k.
    """

    codes: Tensor
    scale: Tensor
    base: Tensor
    rotation: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[1], self.codes.shape[0])

    @property
    def codec(self) -> TrellisCodec:
        return TrellisCodec(self.bits)

    def tensors(self) -> dict[str, Tensor]:
        return {part: getattr(self, part) for part in PARTS}

    def unit(self) -> Tensor:
        """``V Qᵀ``: the values without scales, ``(rows, columns)`` float32."""
        from mlorq.codecs.trellis_decoding import unit

        return unit(self.codes, self.rotation, self.bits)

    def scales(self) -> Tensor:
        """The scales of the rows, ``(rows,)`` float32."""
        from mlorq.codecs.trellis_decoding import scales

        return scales(self.scale, self.base)

    def dequantize(self) -> Tensor:
        return self.unit() * self.scales().unsqueeze(1)

    def trainable(self, device: torch.device | str) -> Trainable:
        from mlorq.codecs.trellis_training import TrainableTrellis

        return TrainableTrellis(self, device)

    def with_scales(self, scales: Tensor) -> TrellisMatrix:
        """The same codes with the nearest scales that can be stored, under the same base.

        Args:
            scales: ``(rows,)``, not negative.
        """
        import torch

        codes = nearest_scale_codes(scales.detach().double().cpu().numpy(), float(self.base))
        return replace(self, scale=torch.from_numpy(codes).to(self.scale.device))

    def store(self) -> TrellisMatrix:
        """The matrix itself, on the CPU."""
        return self.to("cpu")

    def to(self, device: torch.device | str) -> TrellisMatrix:
        return TrellisMatrix(**{name: part.to(device) for name, part in self.tensors().items()}, bits=self.bits)


@dataclass(frozen=True)
class TrellisCodec(Codec):
    """The bits of a column, packed without gaps to whole bytes; a byte per row; a base scale and a seed.

    Attributes:
        bits: k, 1 to 6.

    Raises:
        ValueError: ``bits`` is not 1 to 6.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= MOST_BITS:
            raise ValueError(f"trellis codes have 1 to {MOST_BITS} bits, not {self.bits}")

    def layout(self, rows: int, columns: int) -> dict[str, TensorSpec]:
        return {
            "codes": TensorSpec((columns, (rows * self.bits + 7) // 8), "uint8"),
            "scale": TensorSpec((rows,), "uint8"),
            "base": TensorSpec((1,), "float32"),
            "rotation": TensorSpec((1,), "int32"),
        }

    def size(self, rows: int, columns: int) -> int:
        """``columns · ceil(rows k / 8) + rows + 8`` bytes."""
        return columns * ((rows * self.bits + 7) // 8) + rows + 8

    def unpaid(self, rows: int, columns: int) -> int:
        return columns + rows + 9  # a byte of padding per column and one of rounding, the scales, base and seed

    def in_blocks(self, columns: int) -> bool:
        """Whether their rotation is (``mlorq.codecs.rotation``)."""
        return block_width(columns) < columns

    def pack(self, matrix: StoredMatrix) -> dict[str, Tensor]:
        from mlorq.codecs.packing import pack_rows

        assert isinstance(matrix, TrellisMatrix)
        return matrix.tensors() | {"codes": pack_rows(matrix.codes, self.bits)}

    def unpack(self, tensors: Mapping[str, Tensor], columns: int) -> TrellisMatrix:
        from mlorq.codecs.packing import unpack_rows

        rows = len(tensors["scale"])
        return self.from_tensors({**tensors, "codes": unpack_rows(tensors["codes"], rows, self.bits)})

    def from_tensors(self, tensors: Mapping[str, Tensor]) -> TrellisMatrix:
        return TrellisMatrix(**{part: tensors[part] for part in PARTS}, bits=self.bits)

    def graph_values(self, graph: Graph, tensors: Mapping[str, Tensor], columns: int) -> str:
        from mlorq.codecs.trellis_graph import values

        return values(graph, tensors, columns, self.bits)
