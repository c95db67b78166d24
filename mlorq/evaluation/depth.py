"""Errors through the depth of a network: each layer's output in the compressed model against the float model's.

Both models run on the same batches. Of every layer's output a few rows per batch are compared, so that memory does not
grow with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlorq.models.base import FloatModel, join_outputs
from mlorq.models.prefetch import feed

ROWS = 64  # of a layer's output per batch


class Compared(NamedTuple):
    """Two models on the same batches.

    Attributes:
        outputs: of the compressed model, ``(samples, outputs)`` float32 on the CPU.
        reference: of the float model, same shape.
        layers: NMSE of the layers' outputs, by name; without layers that are not called once per forward pass in both
            models, such as weights that another module reads.
    """

    outputs: Tensor
    reference: Tensor
    layers: dict[str, float]


def compare_outputs(
    model: FloatModel,
    module: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Compared:
    """The outputs of a compressed and the float model, and the NMSE of their layers' outputs.

    Args:
        model: the float model.
        module: the compressed model, on ``device``.
        batches: inputs of the model.
        names: of the layers.
        device: of both.
        progress: called with (batches done, batches).
    """
    outputs, reference = [], []
    error: dict[str, float] = dict.fromkeys(names, 0.0)
    power: dict[str, float] = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for index, batch in enumerate(feed(batches, device, model.dtype)):
            with _rows(model.module, names) as wanted:
                reference.append(model.outputs(model.module, batch).cpu())
            with _rows(module, names) as found:
                outputs.append(model.outputs(module, batch).cpu())
            for name in list(error):
                ours, theirs = found.get(name, []), wanted.get(name, [])
                if len(ours) != 1 or len(theirs) != 1 or ours[0].shape != theirs[0].shape:
                    del error[name]
                    continue
                error[name] += float((ours[0].double() - theirs[0].double()).square().sum())
                power[name] += float(theirs[0].double().square().sum())
            if progress is not None:
                progress(index + 1, len(batches))
    layers = {name: value / power[name] for name, value in error.items() if power[name] > 0}
    return Compared(join_outputs(outputs), join_outputs(reference), layers)


@contextmanager
def _rows(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Rows of the outputs of layers, ``(rows, features)`` each, one tensor per call inside the ``with`` block."""
    kept: dict[str, list[Tensor]] = {}
    known = dict(module.named_modules())

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 1:
                rows = output.detach().reshape(-1, output.shape[-1])
                every = max(1, rows.shape[0] // ROWS)
                kept.setdefault(name, []).append(rows[::every][:ROWS].float().cpu())

        return keep

    handles = [known[name].register_forward_hook(hook(name)) for name in names if name in known]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
