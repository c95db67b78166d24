"""Token importance: squared gradient norms of the model's output at layer and block outputs (METHOD 7).

Errors of different tokens matter differently. A classifier that reads one token ignores the last block's outputs at all
others, and in most layers a few tokens carry most of the gradient. With ``w_t = E_v ‖∂(v · f)/∂y_t‖²`` (v as in the
label-free Hessian) an error e of a layer's outputs costs about ``Σ_t w_t ‖e_t‖²``; input covariances, closed forms and
block losses are averages under these weights. GuidedQuant (arXiv 2505.07004) weights groups of output channels
separately; here all channels of a token share a weight, so that layers with the same input still share its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.models.base import FloatModel
from mlorq.models.batches import batch_samples
from mlorq.models.layer_list import Layer
from mlorq.models.prefetch import feed
from mlorq.models.token_masks import TokenMask, mask_for, masks_of
from mlorq.models.unfolding import output_tokens

PASSES = 2  # backward passes per batch; weights are sums over many channels, so few probes suffice
FLOOR = 0.1  # least weight, relative to the mean: gradients are first-order, and errors are not small

Importance = Mapping[str, Tensor]  # one batch: {layer or block: weights}


def leaders(layers: Sequence[Layer]) -> dict[str, str]:
    """``{layer: the first layer that reads the same tensor}``; such layers share token weights and moments."""
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
    alone: Collection[str] = (),
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Tensor]]:
    """Importance of all calibration tokens: weights of at least ``FLOOR`` with mean one over the unmasked tokens.

    Args:
        model: the float model, on ``device``.
        layers: layers whose output gradients are used; sums over layers that read the same tensor get the name of the
            first.
        blocks: names of the blocks.
        batches: calibration batches.
        passes: backward passes per batch.
        power: exponent of the weights before normalisation; below one they differ less.
        seed: seed of the vectors v, which are drawn on the CPU: every device uses the same ones.
        alone: names of layers whose inputs are some of a sample's tokens, or none of them (``LayerList.alone``).
        device: device of the model.
        progress: called with (batches done, batches).

    Returns:
        One mapping per batch: ``(samples, tokens)`` for a layer, the shape of its output without the last axis for a
        block; float32 on the CPU. Layers and blocks without a gradient are left out, and layers without tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    leader = leaders(layers)
    found: list[dict[str, Tensor]] = []
    masks: list[TokenMask] = []
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
        masks.append(tuple(mask.cpu() for mask in masks_of(model.token_mask(moved))))
        if progress is not None:
            progress(index + 1, len(batches))
    return _normalised(found, masks, power, {leader[name] for name in alone if name in leader})


def _normalised(
    batches: Sequence[dict[str, Tensor]], masks: Sequence[TokenMask], power: float, alone: Collection[str]
) -> list[dict[str, Tensor]]:
    """Weights divided by their mean over the unmasked tokens, mixed with one; without a gradient they are dropped."""
    names = [name for name in batches[0] if name not in alone and all(name in batch for batch in batches)]
    names += dict.fromkeys(name for batch in batches for name in batch if name in alone)
    batches = [{name: batch[name].pow(power) for name in names if name in batch} for batch in batches]

    def mean(name: str) -> float:
        own = [
            (batch[name], mask_for(name, mask, alone))
            for batch, mask in zip(batches, masks, strict=True)
            if name in batch
        ]
        values = [_counted(weights, mask) for weights, mask in own]
        return float(torch.cat(values).double().mean())

    means = {name: mean(name) for name in names}
    useful = [name for name in names if means[name] > 0]
    return [
        {name: (1 - FLOOR) * batch[name] / means[name] + FLOOR for name in useful if name in batch} for batch in batches
    ]


def _counted(weights: Tensor, mask: TokenMask) -> Tensor:
    own = next((one for one in masks_of(mask) if one.shape == weights.shape), None)
    return weights.flatten() if own is None else weights[own]


class _Outputs:
    """Records the outputs of the first calls of layers and blocks in one forward pass, within one autograd graph."""

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
                    return None  # no compressed layer precedes it
                tensor = tensor.detach().requires_grad_(True)
            self.found[name] = tensor
            # Return a copy: an in-place activation must not overwrite the tensor that is differentiated.
            return tensor.clone() if isinstance(output, Tensor) else None

        return hook


def importance_tensors(batches: Sequence[Importance]) -> dict[str, Tensor]:
    """The content of an ``importance`` file: weights by ``name|batch``."""
    return {f"{name}|{index}": value for index, batch in enumerate(batches) for name, value in batch.items()}


def importance_of_tensors(tensors: Mapping[str, Tensor], batches: int) -> list[dict[str, Tensor]]:
    """The inverse of ``importance_tensors``."""
    found: list[dict[str, Tensor]] = [{} for _ in range(batches)]
    for key, value in tensors.items():
        name, _, index = key.rpartition("|")
        found[int(index)][name] = value
    return found
