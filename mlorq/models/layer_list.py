"""The records of a model's compressible layers, and their table; ``layers`` finds them in a module."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import pyarrow as pa

from mlorq.artifacts.schemas import LAYERS

LINEAR = "linear"  # kind of linear layers; others are in ``kinds``


@dataclass(frozen=True)
class Layer:
    """One compressible layer.

    Attributes:
        name: name of the module; if several share the weight, of the one that runs first.
        kind: name of its kind (``mlorq.models.kinds``).
        out_features: number of rows of W.
        in_features: number of columns of W (of a convolution, ``in_channels / groups`` times the size of a kernel).
        groups: convolution groups; low-rank forms require 1.
        macs: multiply-accumulates per sample.
        order: position in the forward pass.
        block: number of the model's blocks that are complete before the layer's first call; a forward pass in which
            only this layer is changed can start at that block.
        input_group: layers with the same number read the same tensor.
        aliases: names of the other modules with the same weight.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    groups: int
    macs: int
    order: int
    block: int
    input_group: int
    aliases: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """Number of entries of W."""
        return self.out_features * self.in_features


EXCLUDED = "excluded by the configuration"
UNUSED = "never reached by a forward pass"
OTHER = ("a parameter of ", "an embedding table")


class LeftFloat(NamedTuple):
    """A part of the model that stays float.

    Attributes:
        name: of a linear layer, convolution or embedding table; of the parameter, for weights of other modules.
        reason: why it stays float.
        bytes: of its weights; counted once if several layers share them.
    """

    name: str
    reason: str
    bytes: int = 0

    @property
    def is_foreseen(self) -> bool:
        """Whether the caller or the kind of the weight decides this: patterns, layers that never run, other modules."""
        return self.reason in (EXCLUDED, UNUSED) or self.reason.startswith(OTHER)


def still_float(rows: Iterable[LeftFloat], tables: Collection[str], reasons: Mapping[str, str]) -> list[LeftFloat]:
    """The weights that stay float beside quantized embedding tables; the other tables with their own reasons.

    Args:
        rows: the weights that stay float if no table is quantized.
        tables: names of the quantized tables.
        reasons: by name, why the other tables stay float.
    """
    _, table = OTHER
    own = {name: f"{table}: {reason}" for name, reason in reasons.items()}
    return [row._replace(reason=own.get(row.name, row.reason)) for row in rows if row.name not in tables]


@dataclass(frozen=True)
class LayerList:
    """The compressible layers of a model.

    Attributes:
        layers: the layers in execution order.
        blocks: names of the modules in the chain of blocks; empty if the model has none.
        skipped: linear layers and convolutions that are not compressed.
        others: weights of other modules: embedding tables, and parameters of at least two axes.
        alone: names of the layers whose inputs belong to samples only in batches of one sample (experts); statistics
            are then taken one sample at a time.
    """

    layers: list[Layer]
    blocks: list[str]
    skipped: list[LeftFloat]
    others: list[LeftFloat] = field(default_factory=list)
    alone: tuple[str, ...] = ()

    @property
    def params(self) -> int:
        """Number of weights of all compressible layers."""
        return sum(layer.params for layer in self.layers)

    def without(self, reasons: Mapping[str, str], bytes_of: Callable[[Layer], int]) -> LayerList:
        """The list with some layers left float.

        Args:
            reasons: by name of the layer.
            bytes_of: bytes of a layer's weight.
        """
        skipped = list(self.skipped)
        for layer in self.layers:
            if layer.name in reasons:
                skipped.append(LeftFloat(layer.name, reasons[layer.name], bytes_of(layer)))
                skipped += [LeftFloat(name, reasons[layer.name]) for name in layer.aliases]
        alone = tuple(name for name in self.alone if name not in reasons)
        layers = [one for one in self.layers if one.name not in reasons]
        return replace(self, layers=layers, skipped=skipped, alone=alone)

    def batches(self, batches: Sequence[Any]) -> Sequence[Any]:
        """The batches in which the inputs of all layers belong to samples: these, or their samples one by one."""
        if not self.alone:
            return batches
        from mlorq.models.batches import split_batches  # imports torch

        return split_batches(batches, 1)

    def __getitem__(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)


def layers_table(layers: Iterable[Layer]) -> pa.Table:
    """Layers as a table with the ``LAYERS`` schema."""
    rows = []
    for layer in layers:
        row: dict[str, Any] = asdict(layer)
        row["layer"] = row.pop("name")
        row["params"] = layer.params
        row["aliases"] = list(layer.aliases)
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=LAYERS)


def layers_from_table(table: pa.Table) -> list[Layer]:
    """The inverse of ``layers_table``."""
    layers = []
    for row in table.to_pylist():
        row["name"] = row.pop("layer")
        row["aliases"] = tuple(row["aliases"])
        del row["params"]
        layers.append(Layer(**row))
    return layers
