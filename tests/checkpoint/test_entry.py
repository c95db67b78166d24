"""Entries of layers in a checkpoint: shapes of matrices and weights by the kind of the layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlorq.checkpoint.description import version_of
from mlorq.checkpoint.entry import LayerEntry
from mlorq.forms.base import FORMS, Candidate, Shape
from mlorq.models.kinds import BY_NAME


def row(kind: str, shape: list[int]) -> dict[str, Any]:
    entry = LayerEntry("layer", kind, tuple(shape), Candidate("Q", bits=4), "codes", "float32", 1, ())
    return entry.to_json() | {"shape": shape}


@pytest.mark.parametrize(
    ("kind", "shape", "matrix"),
    [
        ("linear", [5, 7], (5, 7)),
        ("embedding", [5, 7], (5, 7)),
        ("conv1d", [8, 2, 3], (8, 6)),
        ("conv3d", [8, 2, 3, 1, 2], (8, 12)),
        ("conv_transpose1d", [8, 2, 3], (6, 8)),
        ("conv_transpose2d", [8, 2, 3, 2], (12, 8)),
    ],
)
def test_a_dense_weight_has_the_layout_of_its_kind(kind: str, shape: list[int], matrix: tuple[int, int]) -> None:
    entry = LayerEntry.from_json(row(kind, shape))
    assert entry.matrix_shape == matrix
    form = FORMS["Q"]
    ((name, (rows, columns, codec)),) = form.matrices(entry.candidate, Shape(*matrix)).items()
    assert (rows, columns) == matrix
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randint(0, 9, spec.shape, generator=generator).to(getattr(torch, spec.dtype))
        for key, spec in entry.layout().items()
    }
    own = {key.removeprefix(f"layer.{name}_"): value for key, value in tensors.items()}
    values = codec.unpack(own, columns).dequantize()
    dense = entry.dense(tensors)
    assert dense.shape == tuple(shape)
    assert torch.equal(BY_NAME[kind].to_matrix(dense), values)


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(ValueError, match="layer 'layer' has the unknown kind 'conv7d'"):
        LayerEntry.from_json(row("linear", [5, 7]) | {"kind": "conv7d"})


def test_only_wide_layers_in_blocks_need_the_later_version() -> None:
    def entry(form: str, columns: int) -> LayerEntry:
        return LayerEntry("layer", "linear", (16, columns), Candidate(form, bits=4), "codes", "float32", 1, ())

    assert version_of([], None) == 2
    assert version_of([entry("TCQ", 8192), entry("Q", 12544)], {"sites": []}) == 2
    assert version_of([entry("Q", 8), entry("TCQ", 12544)], None) == 3
    assert version_of([], {"mlps": [{}]}) == 3
