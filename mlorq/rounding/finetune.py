"""Tuning of the whole compressed model against the float one, after its layers and blocks (METHOD 7).

Layers are rounded and blocks reconstructed front to back: an early one cannot know what later ones make of its error.
Here the codes, scales, factors and biases of all layers are trained together, straight through the rounding, to give
the float model's output and the outputs of its blocks, since there are few samples and their outputs alone tell little
about others. No labels are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.activations.plan import ActivationPlan
from mlorq.calibration.collect import counting
from mlorq.calibration.token_importance import Importance
from mlorq.forms.embedding_tables import set_tables
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.base import FloatModel, move_batch
from mlorq.models.layers import Layer
from mlorq.rounding.base import Progress
from mlorq.rounding.block import TuningSettings
from mlorq.rounding.paired_forward import token_weights
from mlorq.rounding.reconstruction import first_tensor, weighted_square
from mlorq.rounding.trainable import Rates, TrainableLayer, Trained, train


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
) -> Trained:
    """Train all compressed layers of a model together.

    Args:
        model: the float model, left as it is.
        blocks: names of its blocks.
        layers: all compressed layers, as they are rounded.
        batches: calibration samples, a batch a step; every fifth is held out.
        settings: steps and rates.
        seed: of the order of batches.
        device: where to run.
        progress: called with (steps done, steps).
        importance: weights of the tokens of the blocks' outputs, a mapping a batch; None: all weigh the same.
        activations: quantized in the compressed model; None: in none.
        tables: quantized embedding tables, which the compressed model has and which are not trained.

    Returns:
        The layers; those given where the loss on held-out batches did not fall.
    """
    module = deepcopy(model.module)
    if activations is not None:
        activations.install(module)
    set_tables(module, tables or {})
    trainable = []
    for layer, compressed in layers:
        bias = module.get_submodule(layer.name).bias
        if compressed.bias is not None and isinstance(bias, Tensor):
            bias.detach().copy_(compressed.bias)
        trainable.append(TrainableLayer(module, layer, compressed))
    weights: Sequence[Importance] = importance or [{}] * len(batches)
    moved = [(move_batch(batch, device, model.dtype), own) for batch, own in zip(batches, weights, strict=True)]
    objective = _Objective(model, module, blocks)
    rates = Rates(settings.tuning_rate, settings.scale_rate, settings.bias_rate)
    return train(trainable, moved, objective, objective.of_all, rates, settings.tuning, seed, progress)


class _Objective:
    """NMSE of the output, and the mean relative error of the blocks' outputs, of one batch."""

    def __init__(self, model: FloatModel, module: nn.Module, blocks: Sequence[str]) -> None:
        self.model = model
        self.module = module
        self.blocks = list(blocks)

    def of_all(self, samples: Sequence[tuple[Any, Importance]]) -> float:
        """Mean loss of many batches."""
        return sum(float(self(one)) for one in samples) / len(samples)

    def __call__(self, samples: tuple[Any, Importance]) -> Tensor:
        batch, importance = samples
        with torch.no_grad(), _outputs_of(self.model.module, self.blocks) as wanted:
            reference = self.model.outputs(self.model.module, batch)
        with _outputs_of(self.module, self.blocks) as found:
            output = self.model.outputs(self.module, batch)
        loss = _relative(output - reference, reference, None)
        mask = self.model.token_mask(batch)
        errors = []
        for name, target in wanted.items():
            weights = token_weights(target, counting(mask, target), importance.get(name))
            errors.append(_relative(found[name] - target, target, weights))
        return loss + sum(errors, torch.zeros_like(loss)) / max(1, len(errors))


def _relative(error: Tensor, wanted: Tensor, weights: Tensor | None) -> Tensor:
    power = weighted_square(wanted, weights).sum().clamp(min=torch.finfo(torch.float32).tiny)
    return weighted_square(error, weights).sum() / power


@contextmanager
def _outputs_of(module: nn.Module, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the blocks return in one forward pass, float32; of each its last call."""
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
