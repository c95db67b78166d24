"""Trial of the replacement: with compressed layers that hold float values, a model must have its own outputs.

This finds what no rule foresees: a model that asks for a layer's class, reads an attribute that a compressed layer
lacks, or keeps a second reference to the layer. Such layers stay float.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.errors import one_line
from mlorq.forms.base import uniform_candidate
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import compressed_class, install
from mlorq.models.base import FloatModel
from mlorq.models.batches import move_batch
from mlorq.models.copying import copy_module
from mlorq.models.layer_list import Layer
from mlorq.models.layers import matrix_of

CLOSE = 1e-3  # largest difference of the outputs, relative to their norm; in float32 there is none
BITS = 2  # of the stand-ins' codes, which are not used


def changed_by_replacement(
    model: FloatModel, layers: Sequence[Layer], batch: Any, device: torch.device | str = "cpu"
) -> dict[str, str]:
    """Reasons why layers must stay float, by name: their replacement alone changes the outputs of a batch.

    One more forward pass if there are none, else about ``log2(layers)`` for each. A model with random outputs cannot be
    tried; a warning says so.

    Args:
        model: the float model, on ``device``; it is not changed.
        layers: layers to replace.
        batch: one batch of calibration data.
        device: device that the batch is moved to.
    """
    moved = move_batch(batch, device, model.dtype)
    with torch.no_grad():
        wanted = model.outputs(model.module, moved)
        # Without numbers there is nothing to compare; the next pass over the layers names where they are lost.
        if bool(wanted.isnan().any()) or _fault(model, layers, moved, wanted) is None:
            return {}
        if not _is_close(model.outputs(model.module, moved), wanted):
            warnings.warn(
                "the model has other outputs in every pass over the same batch: measured costs and the output NMSE "
                "include these differences",
                stacklevel=2,
            )
            return {}
        return _search(model, layers, moved, wanted)


def _search(model: FloatModel, layers: Sequence[Layer], batch: Any, wanted: Tensor) -> dict[str, str]:
    """The layers with a fault, by halving."""
    fault = _fault(model, layers, batch, wanted)
    if fault is None:
        return {}
    if len(layers) == 1:
        return {layers[0].name: fault}
    half = len(layers) // 2
    return _search(model, layers[:half], batch, wanted) | _search(model, layers[half:], batch, wanted)


def _fault(model: FloatModel, layers: Sequence[Layer], batch: Any, wanted: Tensor) -> str | None:
    """What goes wrong with these layers replaced; None if the outputs are the same."""
    tensors = [*model.module.parameters(), *model.module.buffers()]
    module = copy_module(model.module, {id(value): value for value in tensors})  # shares all tensors
    try:
        for layer in layers:
            install(module, layer.name, (layer.name, *layer.aliases), _stand_in)
        found = model.outputs(module, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's code may raise anything
        return f"the model cannot run with its replacement: {type(error).__name__}: {one_line(error)}"
    return None if _is_close(found, wanted) else "its replacement changes the model's outputs"


def _stand_in(layer: nn.Module, path: str) -> CompressedModule:
    """The compressed layer in the place of a float one, with the float weight as its dequantized matrix."""
    candidate = uniform_candidate(BITS)
    new = compressed_class(layer, path).placeholder(layer, path, candidate, "codes")
    (name,) = new.form.names
    new.use_values({name: matrix_of(layer)})
    return new


def _is_close(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    different = found != wanted
    return bool((found - wanted)[different].norm() <= CLOSE * wanted[torch.isfinite(wanted)].norm())
