"""Bit operations of a layer's weights, by candidate."""

from __future__ import annotations

from mlorq.forms.base import Candidate
from mlorq.models.layers import Layer


def weight_load(layer: Layer, candidate: Candidate) -> float:
    """Bit operations of a layer per sample and bit of its input: multiply-accumulates times bits of the weights.

        load = tokens · (m n b + r (m b_A + n b_B)),   tokens = multiply-accumulates / (m n)

    The low-rank part multiplies by B and then by A, whose input counts as many bits as the layer's.
    """
    tokens = layer.macs / layer.params
    total = 0.0
    if candidate.bits:
        total += tokens * layer.params * candidate.bits
    if candidate.rank and candidate.bits_a and candidate.bits_b:
        rows = layer.out_features * candidate.bits_a + layer.in_features * candidate.bits_b
        total += tokens * candidate.rank * rows
    return total
