"""Estimates of the steps' run time and memory, from one timed forward pass and one timed matrix product.

The numbers of passes and products follow the steps' code, the few constants below were fitted to measured runs on CPUs
(`minilm`, `vit_tiny`, 2 cores), and early stopping is assumed not to happen.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.calibration.token_importance import PASSES
from mlorq.config.compose import part
from mlorq.config.layer_overrides import layer_search
from mlorq.config.sections import SearchConfig
from mlorq.costs.first_order import VECTORS
from mlorq.costs.measured import spread_batches
from mlorq.data.base import Dataset
from mlorq.export_targets import TARGETS
from mlorq.forms.base import FORMS, Form, Shape
from mlorq.memory import block_width, usable_bytes
from mlorq.models.batches import batch_samples, move_batch
from mlorq.models.layer_list import Layer, LayerList
from mlorq.registry import Settings
from mlorq.rounding import METHODS
from mlorq.rounding.base import TrainingSettings
from steps.base import Needs
from steps.capture import Sums
from steps.session import Session

ELEMENT = 25.0  # cost of one element-wise pass per entry, in multiply-adds
MEASURED = 0.7  # measured fraction of the points: the fronts of some bit pairs have fewer
FIRST_ORDER = 2.0  # candidates measured per form with first-order costs
BACKWARD = 3.5  # cost of a backward pass with squared weight gradients, in forward passes
FIXED = {"layers": 0.2, "candidates": 0.02, "sensitivity": 0.02, "allocate": 0.5, "round": 0.02, "compressed": 0.3}
SUMMARY_SECONDS = 2.0  # drawing the report
CHECKED = 64  # samples of each kind that step calibration runs


@dataclass(frozen=True)
class Speed:
    """Measured speed of this machine.

    Attributes:
        forward: seconds per sample of the float model.
        product: seconds per multiply-add of a large matrix product.
        outputs: entries of f(x) per sample.
    """

    forward: float
    product: float
    outputs: int


def measure_speed(session: Session) -> Speed:
    """Time a forward pass of a calibration batch and a matrix product, both after a warm-up."""
    session.worker.context.use_threads()
    model = session.model
    batch = move_batch(spread_batches(session.calibration.batches, 1)[0], session.device, model.dtype)
    square = torch.randn(768, 768, device=session.device)
    with torch.no_grad():
        outputs = model.outputs(model.module, batch)
        forward = _fastest(lambda: model.outputs(model.module, batch).cpu())
        product = _fastest(lambda: (square @ square)[0, 0].item())
    return Speed(forward / batch_samples(batch), product / square.shape[0] ** 3, outputs.shape[1])


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of up to 5 calls; no further calls after 0.5 s."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 0.5:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


class Estimate:
    """Seconds of each kind of step.

    Args:
        session: configuration and data.
        layers: the compressible layers.
        speed: of this machine.
    """

    def __init__(self, session: Session, layers: LayerList, speed: Speed) -> None:
        self.session = session
        self.layers = layers
        self.speed = speed
        self.search = session.config.search

    def seconds(self, step: str, layer: Layer | None = None) -> float:
        """Seconds of one step (of one layer)."""
        fixed = FIXED.get(step, 0.0)
        if layer is not None:
            return fixed + {"candidates": self._candidates, "sensitivity": self._sensitivity, "round": self._round}[
                step
            ](layer)
        if step == "capture":
            return self._capture()
        if step == "activations" and self.session.config.activations is not None:
            # Weighing tokens takes a forward and two backward passes.
            activations = self.session.config.activations
            passes = 8 if ACTIVATION_METHODS[activations.method].weighs_tokens else 4
            return passes * self.speed.forward * activations.samples
        if step in ("baseline", "evaluate"):
            return self.speed.forward * self._evaluated() * (1.5 if step == "evaluate" else 1.0)
        if step == "calibration":
            return self.speed.forward * 5 * CHECKED
        if step == "round":
            return self._reconstruct()
        if step == "tune":
            rounding = self.session.config.rounding
            tuning = METHODS[rounding.method].tuning
            steps = tuning.steps(rounding) if tuning is not None else 0
            return self.speed.forward * (BACKWARD + 1) * steps * part(rounding, TrainingSettings).batch_size
        return SUMMARY_SECONDS if step == "summary" else fixed

    def export_seconds(self, target: str) -> float:
        """Seconds of one export."""
        fixed, per_weight = TARGETS[target].seconds
        return fixed + per_weight * self.layers.params

    def _reconstruct(self) -> float:
        """Seconds of one block's reconstruction: its fraction of a forward and backward pass per step."""
        rounding = self.session.config.rounding
        blocks = METHODS[rounding.method].blocks
        passes = blocks.passes(rounding, len(self.layers.blocks)) if blocks is not None else 0.0
        training = part(rounding, TrainingSettings)
        samples = min(training.samples, self.session.calibration.samples)
        return self.speed.forward * (BACKWARD * passes * training.batch_size + 2 * samples)

    def _evaluated(self) -> int:
        data = self.session.evaluation
        # A user's evaluation function may use data of unknown size.
        return data.samples if data.batches else self.session.calibration.samples

    def _capture(self) -> float:
        calibration = self.session.calibration
        samples = min(self.search.hessian_samples, calibration.samples)
        exact = self.search.hessian_mode == "exact" or (
            self.search.hessian_mode == "auto" and self.speed.outputs <= self.search.hessian_probes
        )
        passes = self.speed.outputs if exact else self.search.hessian_probes
        weighing = self.search.metric == "moments" and self.search.token_weights
        every = calibration.samples * (1 + (1 + BACKWARD * PASSES if weighing else 0))
        return self.speed.forward * (every + samples * (1 + BACKWARD * passes))

    def _forms(self, layer: Layer) -> tuple[SearchConfig, Shape, list[tuple[Form[Any], Settings]]]:
        """The search settings of a layer, its shape, and its permitted forms with their settings."""
        search, shape = layer_search(self.search, layer), Shape(layer.out_features, layer.in_features, layer.groups)
        found = [(FORMS[name], settings) for name, settings in search.form_settings.items()]
        return search, shape, [(form, settings) for form, settings in found if form.serves(shape)]

    def _factorisation(self, layer: Layer) -> float:
        """Seconds of fitting a layer's candidates: factors, and the quantizers of all matrices."""
        search, shape, forms = self._forms(layer)
        percentiles = len(search.percentiles)
        works = [form.fitting_work(shape, settings, percentiles) for form, settings in forms]
        # Forms with factors share them.
        products, entries = max(work for work, _ in works), sum(entries for _, entries in works)
        return self.speed.product * (products + ELEMENT * entries * percentiles)

    def _candidates(self, layer: Layer) -> float:
        _, shape, forms = self._forms(layer)
        works = [form.costing_work(shape, settings) for form, settings in forms]
        grams, sums = sum(work for work, _ in works), sum(work for _, work in works)
        return self._factorisation(layer) + self.speed.product * (grams + ELEMENT * sums)

    def _sensitivity(self, layer: Layer) -> float:
        _, _, forms = self._forms(layer)
        points = MEASURED * sum(form.measurements(settings, self.search.points) for form, settings in forms)
        samples = min(self.search.samples, self.session.calibration.samples)
        if self.search.sensitivity == "closed_form":
            points = 1
        elif self.search.sensitivity == "local":
            return 0.0
        elif self.search.sensitivity == "first_order" and self.search.cost == "nmse":
            # A pass of gradients to the layer alone takes as long as a forward pass.
            points = FIRST_ORDER * len(forms) + min(self.speed.outputs, -(-VECTORS // samples))
        blocks = len(self.layers.blocks)
        rest = 1.0 if not blocks else max(0.1, 1 - layer.block / blocks)
        return self._factorisation(layer) + self.speed.forward * samples * (2 + points * rest)

    def _round(self, layer: Layer) -> float:
        rounding = self.session.config.rounding
        method = METHODS[rounding.method]
        inputs = layer.in_features * layer.groups
        work = method.layer_work(layer.params, block_width(layer.in_features), rounding)
        seconds = self._factorisation(layer) + self.speed.product * work
        if not method.needs_inputs:
            return seconds
        samples = min(part(rounding, TrainingSettings).samples, self.session.calibration.samples)
        forwards = 2 * samples / max(1, len(self.layers.blocks))
        tokens = samples * layer.macs / layer.params
        moments = 3 * tokens * inputs * block_width(layer.in_features)
        return seconds + self.speed.product * moments + self.speed.forward * forwards


def memory_bytes(session: Session, layers: LayerList) -> int:
    """Peak memory of the run on its device, in bytes: the current memory plus that of the largest step.

    Raises:
        ConfigError: ``engine.memory`` is too small for the sums of one layer.
    """
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    model = sum(tensor.nbytes for tensor in session.model.module.state_dict().values())
    if session.device != "cpu":
        base = model
    first = spread_batches(session.calibration.batches, 1)[0]
    activations = (
        4
        * batch_samples(first)
        * sum(
            layer.macs // layer.params * (layer.out_features + layer.in_features * layer.groups)
            for layer in layers.layers
        )
    )
    bound = session.config.engine.memory_bytes
    sums = Sums.within(
        usable_bytes(session.device) if bound is None else bound,
        layers.layers,
        session.config.search.metric == "moments",
    )
    if bound is not None:
        sums.check(bound)
    searching = max(Needs.of_layer(layer).memory_bytes for layer in layers.layers)
    limit = session.config.engine.weights_bytes
    held = model if limit is None or session.device != "cpu" else min(model, limit)
    paired = held + _kept_between_blocks(session.calibration, layers.layers)
    # Twice, to allow for PyTorch's temporaries and memory fragmentation.
    return int(base + max(2 * 2 * activations + sums.bytes, searching + 2 * paired))


def _kept_between_blocks(data: Dataset, layers: Sequence[Layer]) -> int:
    """Bytes of the outputs of one block for all calibration samples, in the float and in the compressed model."""
    return 2 * 4 * data.samples * max(layer.macs // layer.params * layer.out_features for layer in layers)
