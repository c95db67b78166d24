"""How well calibration data covers the inputs of layers: too few samples, or samples of another kind.

A quantizer that compensates errors leaves them where the calibration data has little energy: with error feedback
``ΔWᵀ ΔW`` is about proportional to ``S⁻¹``, ``S = Σ + λ I`` (METHOD 7). The expected error of such a layer on other
data, over that on the data it was fitted to, is therefore the *error ratio*

    r = [tr(S⁻¹ Σ') / tr Σ'] / [tr(S⁻¹ Σ) / tr Σ]

with Σ' of the other data: 1 if the data covers Σ', large if Σ' has energy in directions that Σ lacks. Between the two
folds of the calibration data it tells whether there are enough samples. For one sample x of the evaluation data the
numerator is ``‖L⁻¹ x‖² / ‖x‖²``, S = L Lᵀ, summed over its tokens: over the same of held-out calibration samples it
tells whether evaluation data is of another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.calibration.blocks import diagonal, identity, multiply, size, trace
from mlorq.calibration.covariance import FOLDS, LEAST_SQUARE, Moments
from mlorq.models.base import FloatModel
from mlorq.models.batches import batch_samples, take_samples
from mlorq.models.observe import first_argument
from mlorq.models.prefetch import feed
from mlorq.models.token_masks import TokenMask, counting
from mlorq.models.unfolding import input_tokens

DAMPING = 0.01  # λ relative to the mean of Σ's diagonal, as in GPTQ


@dataclass(frozen=True)
class Coverage:
    """One layer's inputs: those of the first fold of the calibration data against others.

    Attributes:
        layer: the layer, or the first of several that read the same tensor.
        width: length of its inputs.
        tokens: (effective) number of tokens of the first fold.
        rank: effective rank of their Σ, ``tr(S⁻¹ Σ)``.
        ratio: error ratio of the second fold to the first.
        evaluation: error ratio of the evaluation data to the second fold; None without evaluation inputs.
    """

    layer: str
    width: int
    tokens: int
    rank: float
    ratio: float
    evaluation: float | None = None


def damped_factor(inputs: Tensor) -> Tensor | None:
    """L of ``L Lᵀ = Σ + λ I``, λ = ``DAMPING`` × the mean of Σ's diagonal; None if Σ is zero up to ``LEAST_SQUARE``.

    Args:
        inputs: Σ, ``(n, n)`` float64, or its blocks.
    """
    level = float(diagonal(inputs).mean())
    if level <= LEAST_SQUARE:
        return None
    factor: Tensor = torch.linalg.cholesky(inputs + DAMPING * level * identity(inputs))
    return factor


def between_folds(layer: str, folds: Sequence[Moments], factor: Tensor) -> Coverage:
    """Coverage of the second fold by the first.

    Args:
        layer: the layer.
        folds: moments of the two folds.
        factor: ``damped_factor`` of the first.
    """
    inverse = torch.cholesky_inverse(factor)
    fitted, other = ((inverse * fold.inputs).sum() for fold in folds)
    rank, ratio = float(fitted), float(other / fitted)
    power, other_power = (trace(fold.inputs) for fold in folds)
    scale = float(power / other_power.clamp_min(torch.finfo(torch.float64).tiny))
    return Coverage(layer, size(factor), folds[0].tokens, rank, ratio * scale)


def held_out(batches: Sequence[Any], total: int, samples: int) -> Iterator[Any]:
    """About ``samples`` samples of the second fold of the calibration data, from batches spread evenly over it.

    Args:
        batches: the calibration data; ``OuterProducts.add`` puts every other sample into the second fold.
        total: number of samples in all batches.
        samples: number of samples wanted; all of the fold if it has fewer.
    """
    wanted = min(len(batches), max(1, round(FOLDS * samples * len(batches) / total)))
    chosen = {int((index + 0.5) * len(batches) / wanted) for index in range(wanted)}
    first = 0
    for index in range(len(batches)):
        batch = batches[index]
        count, start = batch_samples(batch), (1 - first) % FOLDS
        if index in chosen and start < count:
            yield take_samples(batch, slice(start, None, FOLDS))
        first += count


def mean_scores(
    model: FloatModel,
    factors: Mapping[str, Tensor],
    batches: Sequence[Any],
    *,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """``Σ ‖L⁻¹ x‖² / Σ ‖x‖²`` of each layer's unmasked inputs x.

    Args:
        model: the float model, on ``device``.
        factors: L of each layer, ``(n, n)`` or blocks.
        batches: inputs of the model.
        device: device of the model.
    """
    sums = {layer: [0.0, 0.0] for layer in factors}
    inverses = {  # triangular products, in the precision of the inputs
        layer: torch.linalg.solve_triangular(factor, identity(factor), upper=False).float().to(device)
        for layer, factor in factors.items()
    }
    for moved in feed(batches, device, model.dtype):
        count, mask = batch_samples(moved), model.token_mask(moved)

        def hook(layer: str, count: int, mask: TokenMask) -> Callable[..., None]:
            def record(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Tensor) -> None:
                tokens = input_tokens(child, first_argument(args, kwargs), count)
                covering = counting(mask, tokens)
                rows = tokens.flatten(0, 1) if covering is None else tokens[covering.to(tokens.device)]
                rows = rows.float()
                sums[layer][0] += float(multiply(rows, inverses[layer].mT).square().sum())
                sums[layer][1] += float(rows.square().sum())

            return record

        handles = [
            model.module.get_submodule(layer).register_forward_hook(hook(layer, count, mask), with_kwargs=True)
            for layer in factors
        ]
        try:
            with torch.no_grad():
                model.outputs(model.module, moved)
        finally:
            for handle in handles:
                handle.remove()
    return {layer: error / power if power > 0 else 0.0 for layer, (error, power) in sums.items()}
