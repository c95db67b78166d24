"""Which tokens matter: the output's squared gradients at what layers and blocks put out (METHOD 7).

Errors of different tokens do not weigh the same. A classifier that reads one token never sees what the last block makes
of the others, and a few tokens carry most of the gradient in most layers. With ``w_t = E_v ‖∂(v · f)/∂y_t‖²`` (v as in
the label-free Hessian) an error e of the outputs costs about ``Σ_t w_t ‖e_t‖²``: input covariances, closed forms and
block losses are averages under these weights (GuidedQuant, arXiv 2505.07004, weighs groups of output channels apart;
here all channels of a token share a weight, so that layers with one input still share its moments).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import FloatModel, batch_samples
from mlorq.models.layers import Layer, output_tokens
from mlorq.models.prefetch import feed

PASSES = 2  # a batch; weights are sums over many channels, which a few probes tell well
FLOOR = 0.1  # of the mean weight, for every token: gradients are first order, and errors are not small

Importance = Mapping[str, Tensor]  # one batch: {layer or block: weights}


def leaders(layers: Sequence[Layer]) -> dict[str, str]:
    """``{layer: the first layer that reads the same tensor}``: they share weights, as they share moments."""
    first: dict[int, str] = {}
    return {layer.name: first.setdefault(layer.input_group, layer.name) for layer in layers}


def token_importance(
    model: FloatModel,
    layers: Sequence[Layer],
    blocks: Sequence[str],
    batches: Sequence[Any],
    *,
    passes: int = PASSES,
    power: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Weights of all tokens of the calibration data, with mean one over those that count and at least ``FLOOR``.

    Args:
        model: the float model, on ``device``.
        layers: whose output gradients to look at; those that read one tensor are added up, under the first one's name.
        blocks: names of the blocks.
        batches: calibration batches.
        passes: backward passes a batch.
        power: that weights are taken to: below one they differ less.
        seed: of the vectors v; drawn on the CPU, so that every device sees the same ones.
        device: where the model is.
        progress: called with (batches done, batches).

    Returns:
        One mapping a batch: of a layer ``(samples, tokens)``, of a block the shape of its output without the last axis;
        float32 on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    leader = leaders(layers)
    found: list[dict[str, Tensor]] = []
    masks: list[Tensor | None] = []
    for index, moved in enumerate(feed(batches, device, model.dtype)):
        count = batch_samples(moved)
        with _Outputs(model.module, list(leader), blocks) as outputs, torch.enable_grad():
            result = model.outputs(model.module, moved)
        weights: dict[str, Tensor] = {}
        for _ in range(passes if result.requires_grad else 0):
            vector = torch.randn(result.shape, generator=generator).to(result.device)
            names = list(outputs)
            gradients = torch.autograd.grad(
                result, [outputs[name] for name in names], vector, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                if name in leader:
                    gradient = output_tokens(model.module.get_submodule(name), gradient, count)
                square = gradient.float().square().sum(-1)
                key = leader.get(name, name)
                weights[key] = weights[key] + square if key in weights else square
        found.append({name: value.cpu() for name, value in weights.items()})
        mask = model.token_mask(moved)
        masks.append(None if mask is None else mask.cpu())
        if progress is not None:
            progress(index + 1, len(batches))
    return _normalised(found, masks, power)


def _normalised(
    batches: Sequence[dict[str, Tensor]], masks: Sequence[Tensor | None], power: float
) -> list[dict[str, Tensor]]:
    """Weights by their mean over the tokens that count, mixed with one; what never has a gradient is left out."""
    names = [name for name in batches[0] if all(name in batch for batch in batches)]
    batches = [{name: batch[name].pow(power) for name in names} for batch in batches]

    def mean(name: str) -> float:
        values = [
            batch[name].flatten() if mask is None or mask.shape != batch[name].shape else batch[name][mask]
            for batch, mask in zip(batches, masks, strict=True)
        ]
        return float(torch.cat(values).double().mean())

    means = {name: mean(name) for name in names}
    useful = [name for name in names if means[name] > 0]
    return [{name: (1 - FLOOR) * batch[name] / means[name] + FLOOR for name in useful} for batch in batches]


class _Outputs:
    """What layers and blocks put out in one forward pass, with a graph between them; of each its first call."""

    def __init__(self, module: nn.Module, layers: Sequence[str], blocks: Sequence[str]) -> None:
        self.found: dict[str, Tensor] = {}
        self._names = {name: module.get_submodule(name) for name in (*layers, *blocks)}

    def __enter__(self) -> dict[str, Tensor]:
        self._handles = [child.register_forward_hook(self._hook(name)) for name, child in self._names.items()]
        return self.found

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            if name in self.found:
                return None
            tensor = output if isinstance(output, Tensor) else output[0]
            if not tensor.requires_grad:
                if not isinstance(output, Tensor):
                    return None  # nothing before it that is compressed
                tensor = tensor.detach().requires_grad_(True)
            self.found[name] = tensor
            # A copy goes on, so that an in-place activation cannot overwrite what is differentiated.
            return tensor.clone() if isinstance(output, Tensor) else None

        return hook


def importance_tensors(batches: Sequence[Importance]) -> dict[str, Tensor]:
    """The content of an ``importance`` file: ``name|batch`` and its weights."""
    return {f"{name}|{index}": value for index, batch in enumerate(batches) for name, value in batch.items()}


def importance_of_tensors(tensors: Mapping[str, Tensor], batches: int) -> list[dict[str, Tensor]]:
    """The inverse of ``importance_tensors``."""
    found: list[dict[str, Tensor]] = [{} for _ in range(batches)]
    for key, value in tensors.items():
        name, _, index = key.rpartition("|")
        found[int(index)][name] = value
    return found
