"""The tensors of a uniform model in the format ``pack-quantized`` of compressed-tensors.

A row of codes is one stream of bits, as in a checkpoint, in whole 32-bit words. Codes and zero-points are unsigned
there as here (the package subtracts ``2^(bits - 1)`` from both when it unpacks them). Zero-points are packed along the
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mlorq.checkpoint.description import TRANSPOSED
from mlorq.checkpoint.io import inspect
from mlorq.codecs.packing import pack_rows
from mlorq.errors import CheckpointError
from mlorq.forms.base import uniform_candidate
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import CompressedLinear
from mlorq.huggingface.placement import compressed_modules

WORD = 4  # bytes


def pack_quantized(model: Any, checkpoint: str) -> dict[str, Tensor]:
    """Give a model the configuration of the format, and return its state dict.

    Args:
        model: result of ``pretrained_model``.
        checkpoint: location of the checkpoint, for messages.

    Raises:
        CheckpointError: the format cannot hold the model.
    """
    layers = compressed_modules(model)
    reason = _why_not(model, layers, inspect(checkpoint))
    if reason:
        raise CheckpointError(
            f"checkpoint {checkpoint}: {reason}, which the format of compressed-tensors cannot hold: "
            "export to transformers instead"
        )
    bits = layers[0].candidate.bits
    state: dict[str, Tensor] = model.state_dict()
    float_layers = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, CompressedModule):
            for part in module.stored_tensors():
                del state[f"{name}.{part}"]
            state |= {f"{name}.{part}": tensor for part, tensor in packed(module).items()}
        elif isinstance(module, nn.Linear):
            float_layers.append(name)
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "channel", "dynamic": False}
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": float_layers,
        # The package's own modules do not load packed zero-points; its dequantization does.
        "dequantize": True,
    }
    model.hf_quantizer = None
    return state


def packed(layer: CompressedModule) -> dict[str, Tensor]:
    """The tensors of a linear layer of form ``Q``.

    Returns:
        ``weight_packed``: ``(rows, ⌈columns · bits / 32⌉)`` int32; ``weight_scale``: ``(rows, 1)`` float32;
        ``weight_zero_point``: ``(⌈rows · bits / 32⌉, 1)`` int32; ``weight_shape``: ``(2,)``.
    """
    bits, stored = layer.candidate.bits, layer.stored_tensors()
    assert bits is not None
    zero_points = layer.matrix("weight").tensors()["zero_point"]  # (rows,) uint8
    return {
        "weight_packed": _words(stored["weight_codes"]),
        "weight_scale": stored["weight_scale"].float()[:, None],
        "weight_zero_point": _words(pack_rows(zero_points[None], bits)).T.contiguous(),
        "weight_shape": torch.tensor(layer.weight_shape),
    }


def _words(rows: Tensor) -> Tensor:
    """Rows of bytes as 32-bit words, the last one filled up with zeros."""
    return pad(rows, (0, -rows.shape[1] % WORD)).contiguous().view(torch.int32)


def _why_not(model: Any, layers: Sequence[CompressedModule], info: Mapping[str, Any]) -> str | None:
    """What the format cannot hold, or None; ``info`` is the result of ``inspect``."""
    transposed = info["extra"].get(TRANSPOSED)
    if transposed:
        return f"layer {transposed[0]!r} is a Conv1D of transformers"
    config = model.hf_quantizer.quantization_config
    if config.arranged:
        name = next(iter(config.arranged.values()))[0]
        return f"the weight of {name!r} is read directly by the model's code"
    if config.activations:
        return "its activations are quantized"
    if config.dtypes:
        return f"tensor {min(config.dtypes)!r} is not {config.dtype}"
    widths = {layer.candidate.bits for layer in layers}
    for layer in layers:
        if not isinstance(layer, CompressedLinear):
            return f"layer {layer.layer_name!r} is of kind {layer.kind}"
        if layer.candidate.bits is None or layer.candidate != uniform_candidate(layer.candidate.bits):
            return f"layer {layer.layer_name!r} has the form {layer.candidate.candidate_id}"
        if layer.zero_point != "codes":
            return f"layer {layer.layer_name!r} has zero-points outside its codes, or float32 scales"
    if len(widths) > 1:
        return f"layers have {' and '.join(str(width) for width in sorted(widths, key=str))} bits"
    return None
