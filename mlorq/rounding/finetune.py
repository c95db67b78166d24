"""Tuning of the whole compressed model against the float model, after its layers and blocks (METHOD 7).

Rounding and block reconstruction proceed front to back and do not account for the effect of an error on later layers.
Tuning trains the codes, scales, factors and biases of all layers and the scales and shifts of all normalisation layers
together, with the straight-through estimator, to reproduce the float model's output and the outputs of its blocks. The
blocks' outputs are included because the outputs of few samples alone generalise poorly. Labels are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mlorq.activations.plan import ActivationPlan
from mlorq.calibration.token_importance import Importance
from mlorq.forms.embedding_tables import set_tables
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.base import FloatModel
from mlorq.models.batches import move_batch
from mlorq.models.copying import copy_module
from mlorq.models.layer_list import Layer
from mlorq.models.norms import norm_parameters, set_parameters
from mlorq.models.passes import leaving_no_trace
from mlorq.models.token_masks import counting
from mlorq.rounding.base import Progress
from mlorq.rounding.block import TuningSettings
from mlorq.rounding.block_losses import first_tensor
from mlorq.rounding.paired_forward import token_weights
from mlorq.rounding.reconstruction import weighted_square
from mlorq.rounding.trainable import Rates, TrainableLayer, TrainableNorm, Trained, train
from mlorq.rounding.trainable_range import trainable_ranges

KEPT_BYTES = 2**30  # of the float model's outputs that tuning keeps


def tune(
    model: FloatModel,
    blocks: Sequence[str],
    layers: Sequence[tuple[Layer, CompressedLayer]],
    batches: Sequence[Any],
    settings: TuningSettings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    importance: Sequence[Importance] | None = None,
    activations: ActivationPlan | None = None,
    tables: Mapping[str, CompressedLayer] | None = None,
    rest: Mapping[str, Tensor] | None = None,
) -> Trained:
    """Train all compressed layers and the normalisation layers of a model together.

    Args:
        model: the float model, which is not modified.
        blocks: names of its blocks.
        layers: all compressed layers.
        batches: calibration samples, one batch per step; every fifth batch is held out.
        settings: number of steps and step sizes.
        seed: of the order of batches.
        device: device of the computation.
        progress: called with (steps done, steps).
        importance: token weights of the blocks' outputs, one mapping per batch; None: equal weights.
        activations: activation quantizers of the compressed model; None: float activations.
        tables: quantized embedding tables of the compressed model, which are not trained.
        rest: float parameters that were trained before, by name; None: those of the float model.

    Returns:
        The trained layers and norms, or the given ones if the loss on held-out batches did not fall. ``Trained.rest``
        includes the given ``rest``.
    """
    module = copy_module(model.module)
    if activations is not None:
        activations.install(module)
    set_tables(module, tables or {})
    given = dict(rest or {})
    set_parameters(module, given)
    trainable = []
    for layer, compressed in layers:
        bias = module.get_submodule(layer.name).bias
        if compressed.bias is not None and isinstance(bias, Tensor):
            bias.detach().copy_(compressed.bias)
        trainable.append(TrainableLayer(module, layer, compressed))
    weights: Sequence[Importance] = importance or [{}] * len(batches)
    moved = [(move_batch(batch, device, model.dtype), own) for batch, own in zip(batches, weights, strict=True)]
    objective = _Objective(model, module, blocks)
    rates = Rates(
        settings.tuning_rate, settings.scale_rate, settings.bias_rate, settings.norm_rate, settings.range_rate
    )
    norms = [TrainableNorm(parameter) for parameter in norm_parameters(module)] if settings.norm_rate else []
    ranges = trainable_ranges(module) if settings.range_rate else []
    result = train(trainable, moved, objective, objective.of_all, rates, settings.tuning, seed, progress, norms, ranges)
    return replace(result, rest={**given, **result.rest})


class _Wanted(NamedTuple):
    """What the float model returns for one batch: f(x), and the outputs of its blocks by name."""

    output: Tensor
    blocks: dict[str, Tensor]


class _Objective:
    """NMSE of the output plus the mean relative squared error of the blocks' outputs, for one batch.

    What the float model returns for a batch is kept for its later steps, up to ``KEPT_BYTES`` in all. Batches have to
    outlive the objective, since they are known by their identity.
    """

    def __init__(self, model: FloatModel, module: nn.Module, blocks: Sequence[str]) -> None:
        self.model = model
        self.module = module
        self.blocks = list(blocks)
        self._kept: dict[int, _Wanted] = {}
        self._free = KEPT_BYTES

    def of_all(self, samples: Sequence[tuple[Any, Importance]]) -> float:
        """Mean loss of many batches."""
        return sum(float(self(one)) for one in samples) / len(samples)

    def __call__(self, samples: tuple[Any, Importance]) -> Tensor:
        batch, importance = samples
        reference, wanted = self._kept.get(id(samples)) or self._of_float_model(samples)
        with _outputs_of(self.module, self.blocks) as found, leaving_no_trace(self.module):
            output = self.model.outputs(self.module, batch)
        loss = _relative(output - reference, reference, None)
        mask = self.model.token_mask(batch)
        errors = []
        for name, target in wanted.items():
            weights = token_weights(target, counting(mask, target), importance.get(name))
            errors.append(_relative(found[name] - target, target, weights))
        return loss + sum(errors, torch.zeros_like(loss)) / max(1, len(errors))

    def _of_float_model(self, samples: tuple[Any, Importance]) -> _Wanted:
        with torch.no_grad(), _outputs_of(self.model.module, self.blocks) as wanted:
            found = _Wanted(self.model.outputs(self.model.module, samples[0]), wanted)
        size = sum(value.nbytes for value in (found.output, *found.blocks.values()))
        if size <= self._free:
            self._free -= size
            self._kept[id(samples)] = found
        return found


def _relative(error: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    power = weighted_square(wanted, weights).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return weighted_square(error, weights).sum() / power


@contextmanager
def _outputs_of(module: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the blocks in a forward pass, float32; the last call of each counts."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[name] = first_tensor(output).float()

        return hook

    handles = [module.get_submodule(name).register_forward_hook(keep(name)) for name in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
