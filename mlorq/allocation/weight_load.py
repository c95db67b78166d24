"""Bit operations of a layer by candidate (METHOD 8, ``choices``)."""

from __future__ import annotations

from mlorq.forms.base import FORMS, Candidate, Shape
from mlorq.models.layer_list import Layer


def weight_load(layer: Layer, candidate: Candidate) -> float:
    """Bit operations of a layer per sample and bit of its input (``Form.bit_operations``)."""
    shape = Shape(layer.out_features, layer.in_features, layer.groups)
    return FORMS[candidate.form].bit_operations(candidate, shape, layer.macs / layer.params)
