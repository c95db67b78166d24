"""Calibration of activation quantizers: from samples to an ``ActivationPlan`` (METHOD 8)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlorq.activations.folding import find_folds, fit_fold
from mlorq.activations.method import ACTIVATION_METHODS, ActivationMethod
from mlorq.activations.plan import ActivationPlan, Fold, RectifiedMlp, Site
from mlorq.activations.quantizers import ActivationQuantizer, fit_uniform
from mlorq.activations.rectify import rectify
from mlorq.activations.settings import ActivationSettings, RectifyingSettings
from mlorq.activations.survey import Observed, survey
from mlorq.calibration.token_importance import PASSES, token_importance
from mlorq.models.base import FloatModel
from mlorq.models.batches import move_batch
from mlorq.models.copying import copy_module
from mlorq.models.layer_list import LINEAR, Layer

WIDEST = 8  # largest bit-width under ``mixed``
WEIGHING = 1 + PASSES  # progress steps of token importance per batch, about the cost in forward passes
UNEVEN = 4  # ratio of the largest to the median span of channels beyond which each channel gets its own range


def calibrate(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    settings: ActivationSettings,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> ActivationPlan:
    """Find the activations of a model, and fit their quantizers.

    Args:
        model: the float model, on ``device``; it is not changed.
        layers: its compressible layers.
        batches: calibration samples.
        settings: settings of the method (``ActivationsConfig.own``); ``samples`` and ``compute`` are ignored.
        seed: seed of the sampled activations, and of the random changes that test folds.
        device: device of the model.
        progress: called with (batches done, batches).

    Raises:
        ConfigError: the method is unknown.
        ModelError: an activation is not finite.
    """
    method = ACTIVATION_METHODS[settings.method]
    mlps: Sequence[RectifiedMlp] = ()
    tensors: dict[str, Tensor] = {}
    if method.rectifies:
        assert isinstance(settings, RectifyingSettings)
        mlps, tensors = rectify(model, layers, batches, settings, seed=seed, device=device, progress=progress)
        module = copy_module(model.module)
        ActivationPlan([], [], tensors, mlps).fold(module)
        model = replace(model, module=module)
    observed = _observed(model, layers, batches, method, settings, seed, device, progress)
    pixels = {layer.name for layer in layers if layer.kind != LINEAR and layer.order == 0}
    bits = _bit_widths(observed, pixels, settings)
    folds: dict[str, Fold] = {}
    if method.folds(settings):
        moved = [move_batch(batch, device, model.dtype) for batch in batches]
        folds = {layer: fold for fold in find_folds(model, layers, moved, seed) for layer in fold.layers}
    by_channel = set(folds) | _uneven(observed, folds) if method.per_channel else set()
    sites: list[Site] = []
    used: list[Fold] = []
    for one in observed:
        fold, at_width = folds.get(one.name), bits[one.name]
        fit: Callable[[int], ActivationQuantizer]
        quantizer: ActivationQuantizer
        if fold is not None and set(one.layers) == set(fold.layers):
            fitted = fit_fold(model.module, fold, one.values, at_width, settings.percentiles)
            used.append(fold)
            tensors |= {f"fold.{fold.norm}.scale": fitted.scale, f"fold.{fold.norm}.shift": fitted.shift}
            quantizer = fitted.quantizer
            fit = partial(fit_uniform, fitted.folded(one.values), percentiles=settings.percentiles)
        else:
            fit = partial(method.quantizer_for, one, settings=settings, by_channel=one.name in by_channel)
            quantizer = fit(at_width)
        tensors |= {f"site.{one.name}.{name}": value.cpu() for name, value in quantizer.named_buffers()}
        variants = {}
        for width in settings.choices if one.name not in pixels else ():
            if width != at_width:
                other = fit(width)
                variants[str(width)] = other.describe()
                tensors |= {f"site.{one.name}@{width}.{name}": value.cpu() for name, value in other.named_buffers()}
        sites.append(Site(one.name, one.layers, one.size, quantizer.describe(), variants, one.macs))
    return ActivationPlan(sites, used, tensors, tuple(mlps))


def _observed(
    model: FloatModel,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    method: ActivationMethod[Any],
    settings: ActivationSettings,
    seed: int,
    device: torch.device | str,
    progress: Callable[[int, int], None] | None,
) -> list[Observed]:
    """Observations of every tensor, on weighted tokens if the method asks for them."""
    total = len(batches) * (1 + WEIGHING if method.weighs_tokens else 1)
    before = total - len(batches)

    def advance(done: int) -> None:
        if progress is not None:
            progress(done, total)

    importance = None
    if method.weighs_tokens:
        importance = token_importance(
            model,
            layers,
            [],
            batches,
            seed=seed,
            device=device,
            progress=lambda done, _: advance(WEIGHING * done),
        )
    found = survey(
        model,
        layers,
        batches,
        products=settings.products,
        importance=importance,
        seed=seed,
        device=device,
        progress=lambda done, _: advance(before + done),
    )
    return [one for one in found if one.parts]  # no sample reached the others: their inputs stay float


def _uneven(observed: Sequence[Observed], folds: dict[str, Fold]) -> set[str]:
    """Inputs of linear layers whose widest channel spans more than ``UNEVEN`` times the median span."""
    found = set()
    for one in observed:
        if one.layers and one.name not in folds and one.values.dim() == 2 and not one.is_gelu_output:
            span = one.values.amax(0) - one.values.amin(0)
            if float(span.max()) > UNEVEN * float(span.median()) > 0:
                found.add(one.name)
    return found


def _bit_widths(observed: Sequence[Observed], pixels: set[str], settings: ActivationSettings) -> dict[str, int]:
    """Bits by tensor: equal, or (``mixed``) the largest b with ``size · b ≤ max(size) · bits``; pixels get more."""
    largest = max(one.size for one in observed)
    found = {}
    for one in observed:
        bits = settings.bits
        if settings.mixed:
            bits = min(WIDEST, max(settings.bits, largest * settings.bits // max(1, one.size)))
        found[one.name] = max(bits, settings.first_bits) if one.name in pixels else bits
    return found
