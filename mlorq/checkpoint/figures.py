"""Bits per weight, multiply-accumulates and bit operations of a checkpoint (``mlorq inspect``).

    effective bits    8 · bytes / weights: codes with their scales, zero-points and padding
    nominal bits      bits of the codes alone / weights
    MACs              positions · entries of the stored matrices
    bit operations    positions · Σ entries · bits of the codes · bits of the layer's input

A position is one product of a layer's weight with a vector: a token, or a place of a convolution's output. The factors
of a low-rank form are matrices of their own, ``r (m + n)`` MACs per position instead of ``m n``; trellis codes are
multiplied like any other codes of k bits, without the work of decoding. The input of the left factor counts with the
bits of the layer's input (METHOD 8, ``choices``). Activations that are not quantized have 32 bits, and so do all
numbers of the float model.

A checkpoint records the MACs of its float layers per sample, as the first batch of the calibration data gives them
(padding is part of a text). Where it does not, every layer counts with one position. Embedding tables are read, not
multiplied, and layers that stay float are not recorded; products of two activations are if they are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from mlorq.checkpoint.entry import EMBEDDING, LayerEntry
from mlorq.forms.base import FORMS, Shape

if TYPE_CHECKING:
    from mlorq.activations.plan import ActivationPlan

FLOAT_BITS = 32
SAMPLE, POSITION = "sample", "position"


def count_unit(entries: Sequence[LayerEntry]) -> str:
    """What MACs and bit operations are counted per: ``sample``, or ``position`` if a layer's MACs are not known."""
    return SAMPLE if all(entry.macs is not None for entry in entries if entry.kind != EMBEDDING) else POSITION


def layer_figures(entry: LayerEntry, plan: ActivationPlan | None, per: str) -> dict[str, Any]:
    """The figures of one layer or embedding table, as JSON values.

    Args:
        entry: the layer.
        plan: quantized activations of the checkpoint.
        per: result of ``count_unit``.

    Returns:
        ``weights``, ``effective_bits`` and ``nominal_bits`` per weight; for layers also ``activation_bits`` of the
        input, ``float_macs`` of the dense weight, ``stored_macs`` and ``bit_operations``. All counts are per sample or
        position.
    """
    matrices = entry.matrices().values()
    entries = sum(rows * columns for rows, columns, _ in matrices)
    bits = sum(rows * columns * codec.bits for rows, columns, codec in matrices)
    found = {
        "weights": entry.weights,
        "effective_bits": 8 * entry.bytes / entry.weights,
        "nominal_bits": bits / entry.weights,
    }
    if entry.kind == EMBEDDING:
        return found
    macs = entry.macs if per == SAMPLE and entry.macs is not None else entry.weights
    sites = plan.sites if plan is not None else ()
    read = next((int(site.quantizer["bits"]) for site in sites if entry.layer in site.layers), FLOAT_BITS)
    form, shape = FORMS[entry.candidate.form], Shape(*entry.matrix_shape)
    return found | {
        "activation_bits": read,
        "float_macs": macs,
        "stored_macs": macs * entries // entry.weights,
        "bit_operations": round(read * form.bit_operations(entry.candidate, shape, macs / entry.weights)),
    }


def total_figures(
    rows: Sequence[Mapping[str, Any]], rest: Mapping[str, int], plan: ActivationPlan | None, per: str
) -> dict[str, Any]:
    """The figures of a checkpoint, as JSON values.

    Args:
        rows: rows of ``mlorq.json``, each with its ``layer_figures``.
        rest: ``weights`` and ``bytes`` of all other tensors.
        plan: quantized activations of the checkpoint.
        per: result of ``count_unit``.

    Returns:
        ``per``; ``weights`` of the whole model, and ``effective_bits`` per weight, of all tensors; ``layers``: the same
        of the compressed layers alone, with ``nominal_bits``; ``float_macs`` and ``stored_macs`` of these layers;
        ``product_macs`` of products of quantized activations (0 if counts are not per sample); ``bit_operations`` and
        ``float_bit_operations`` of both.
    """
    layers = [row for row in rows if row["kind"] != EMBEDDING]
    own = sum(row["weights"] for row in layers)
    weights = rest["weights"] + sum(row["weights"] for row in rows)
    stored = rest["bytes"] + sum(row["bytes"] for row in rows)
    product_macs, product_operations = _products(plan) if plan is not None and per == SAMPLE else (0, 0)
    macs = sum(row["float_macs"] for row in layers)
    return {
        "per": per,
        "weights": weights,
        "effective_bits": 8 * stored / max(1, weights),
        "layers": {
            "weights": own,
            "effective_bits": 8 * sum(row["bytes"] for row in layers) / max(1, own),
            "nominal_bits": sum(row["nominal_bits"] * row["weights"] for row in layers) / max(1, own),
        },
        "float_macs": macs,
        "stored_macs": sum(row["stored_macs"] for row in layers),
        "product_macs": product_macs,
        "bit_operations": sum(row["bit_operations"] for row in layers) + product_operations,
        "float_bit_operations": FLOAT_BITS**2 * (macs + product_macs),
    }


def _products(plan: ActivationPlan) -> tuple[int, int]:
    """MACs and bit operations per sample of products of two activations; an operand that stays float has 32 bits."""
    macs = operations = 0
    for sites in plan.groups().values():
        own = sum(site.macs for site in sites)
        macs += own
        widths = [int(site.quantizer["bits"]) for site in sites]
        operations += own * prod([*widths, FLOAT_BITS][:2])
    return macs, operations
