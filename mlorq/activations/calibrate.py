"""From samples to an ``ActivationPlan`` (METHOD 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mlorq.activations.folding import Fold, find_folds, has_bias
from mlorq.activations.plan import ActivationPlan, Site
from mlorq.activations.quantizers import (
    LOG_SQRT2,
    LOG_STEPS,
    ActivationQuantizer,
    UniformQuantizer,
    fit_channels,
    fit_log,
    fit_uniform,
)
from mlorq.activations.survey import GELU_LEAST, Observed, survey
from mlorq.calibration.token_importance import PASSES, token_importance
from mlorq.models.base import FloatModel, move_batch
from mlorq.models.layers import Layer

WIDEST = 8
WEIGHING = 1 + PASSES  # what it costs to weigh the tokens of a batch, in passes


@dataclass(frozen=True)
class ActivationSettings:
    """The fields mean what they mean in ``ActivationsConfig``."""

    bits: int = 4
    method: Literal["uniform", "repq", "adalog"] = "repq"
    products: bool = True
    first_bits: int = 8
    mixed: bool = False
    percentiles: tuple[float, ...] = (0.999, 0.9999, 0.99999, 1.0)
    choices: tuple[int, ...] = ()
    seed: int = 0


def calibrate(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    settings: ActivationSettings,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ActivationPlan:
    """Find where activations are, and quantizers for them.

    ``uniform``: one range a tensor. ``repq``: LayerNorms are folded where only layers read them; other tensors that
    differ by channel, which a LayerNorm and a residual share, keep a range a channel at the layers' inputs; attention's
    probabilities get log-√2. ``adalog``: as ``repq``, with searched logarithms for probabilities and GELU outputs, and
    ranges that suit tokens the more, the more the output hangs on them.

    Args:
        model: the float model, on ``device``; it is left as it is.
        layers: its compressible layers.
        batches: samples to look at.
        settings: bit-width and kinds of quantizers.
        device: where to run.
        progress: called with (batches done, batches).

    Raises:
        ModelError: an activation is not finite.
    """
    total = len(batches) * (1 + WEIGHING if settings.method == "adalog" else 1)

    before = total - len(batches)

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, total)

    importance = None
    if settings.method == "adalog":
        importance = token_importance(
            model,
            layers,
            [],
            batches,
            seed=settings.seed,
            device=device,
            progress=lambda done, _: advance(WEIGHING * done),
        )
    observed = survey(
        model,
        layers,
        batches,
        products=settings.products,
        importance=importance,
        seed=settings.seed,
        device=device,
        progress=lambda done, _: advance(before + done),
    )
    pixels = {layer.name for layer in layers if layer.kind == "conv2d" and layer.order == 0}
    bits = _bit_widths(observed, pixels, settings)
    folds: dict[str, Fold] = {}
    if settings.method != "uniform":
        moved = [move_batch(batch, device, model.dtype) for batch in batches]
        folds = {layer: fold for fold in find_folds(model, layers, moved, settings.seed) for layer in fold.layers}
    normed = set(folds) | (_uneven(observed, folds) if settings.method != "uniform" else set())
    at: Callable[..., ActivationQuantizer]
    sites: list[Site] = []
    used: list[Fold] = []
    tensors: dict[str, Tensor] = {}
    for one in observed:
        fold = folds.get(one.name)
        if fold is not None and set(one.layers) == set(fold.layers):
            quantizer, scale, shift = _folded(model, fold, one.values, bits[one.name], settings)
            used.append(fold)
            tensors |= {f"fold.{fold.norm}.scale": scale, f"fold.{fold.norm}.shift": shift}
            folded = one.values / scale.to(one.values.device) - shift.to(one.values.device)
            at = partial(fit_uniform, folded, percentiles=settings.percentiles)
        else:
            at = partial(_quantizer, one, settings=settings, by_channel=one.name in normed)
            quantizer = at(bits=bits[one.name])
        tensors |= {f"site.{one.name}.{name}": value.cpu() for name, value in quantizer.named_buffers()}
        variants = {}
        for width in settings.choices if one.name not in pixels else ():
            if width != bits[one.name]:
                other = at(bits=width)
                variants[str(width)] = other.describe()
                tensors |= {f"site.{one.name}@{width}.{name}": value.cpu() for name, value in other.named_buffers()}
        sites.append(Site(one.name, one.layers, one.size, quantizer.describe(), variants, one.macs))
    return ActivationPlan(sites, used, tensors)


def _uneven(observed: Sequence[Observed], folds: dict[str, Fold]) -> set[str]:
    """Linear layers' inputs whose channels differ so much that one range for all wastes a bit and more."""
    found = set()
    for one in observed:
        if one.layers and one.name not in folds and one.values.dim() == 2 and not one.is_gelu_output:
            span = one.values.amax(0) - one.values.amin(0)
            if float(span.max()) > 4 * float(span.median()) > 0:
                found.add(one.name)
    return found


def _folded(
    model: FloatModel, fold: Fold, tokens: Tensor, bits: int, settings: ActivationSettings
) -> tuple[ActivationQuantizer, Tensor, Tensor]:
    """The quantizer of the folded tensor, r and b."""
    channels = fit_channels(tokens, bits, settings.percentiles)
    level, zero = channels.scale.mean(), channels.zero.mean()
    scale = channels.scale / level
    if has_bias(model.module, fold):
        shift = (zero - channels.zero) * level
        return UniformQuantizer(bits, level, zero), scale.cpu(), shift.cpu()
    # Without a bias to take it up there is no shift, and the range is found anew.
    return fit_uniform(tokens / scale, bits, settings.percentiles), scale.cpu(), torch.zeros_like(scale).cpu()


def _quantizer(one: Observed, bits: int, settings: ActivationSettings, *, by_channel: bool) -> ActivationQuantizer:
    if one.sums_to_one and settings.method != "uniform":
        return fit_log(one.values, bits, LOG_SQRT2 if settings.method == "repq" else LOG_STEPS)
    if one.is_gelu_output and settings.method == "adalog":
        uniform = fit_uniform(one.values, bits, settings.percentiles)
        log = fit_log(one.values, bits, LOG_STEPS, -GELU_LEAST)
        errors = [float((q.rounded(one.values)[1] - one.values).double().square().sum()) for q in (uniform, log)]
        return log if errors[1] < errors[0] else uniform
    if by_channel:
        return fit_channels(one.values, bits, settings.percentiles)
    return fit_uniform(one.values, bits, settings.percentiles)


def _bit_widths(observed: Sequence[Observed], pixels: set[str], settings: ActivationSettings) -> dict[str, int]:
    """Bits by tensor: the same for all, or the largest with ``size · b ≤ max(size) · bits``; more for pixels."""
    largest = max(one.size for one in observed)
    found = {}
    for one in observed:
        bits = settings.bits
        if settings.mixed:
            bits = min(WIDEST, max(settings.bits, largest * settings.bits // max(1, one.size)))
        found[one.name] = max(bits, settings.first_bits) if one.name in pixels else bits
    return found
