"""The context in which a step runs: one device, and the model, data and artifacts that its handles stand for.

Each worker has its own context, because a step may temporarily change weights of the model: two steps must not share a
model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.errors import ConfigError, DataError
from steps.artifacts import ArtifactReader
from steps.handles import DataRef, ModelRef

if TYPE_CHECKING:
    from torch import nn

    from mlorq.activations.plan import ActivationPlan
    from mlorq.costs.float_passes import FloatPasses
    from mlorq.data.base import Dataset
    from mlorq.models.base import FloatModel
    from mlorq.models.layer_list import LayerList
    from steps.paired_cache import PairedCache


class Sources:
    """Model and data of a run on one device, each loaded on first use and kept.

    Args:
        model: loads the float model.
        calibration, evaluation: load data for a model.
        device: the model's device: ``cpu``, ``cuda:0`` …
    """

    def __init__(
        self,
        model: Callable[[], FloatModel],
        calibration: Callable[[FloatModel], Dataset],
        evaluation: Callable[[FloatModel], Dataset],
        device: str,
    ) -> None:
        self.device = device
        self._load_model = model
        self._load_calibration = calibration
        self._load_evaluation = evaluation

    @cached_property
    def model(self) -> FloatModel:
        """The float model as given, on the device.

        Raises:
            ModelError: it cannot be loaded, or weights are not finite.
        """
        from mlorq.models.base import check_weights

        model = self._load_model()
        check_weights(model.module)
        model.module.to(self.device)
        return model

    @cached_property
    def prepared(self) -> FloatModel:
        """The float model, with layers in place of weights that it reads directly (``mlorq.models.direct_weights``).

        Raises:
            ModelError, DataError: the model or the calibration data cannot be loaded.
        """
        from mlorq.models.direct_weights import arrange_direct_weights

        arrange_direct_weights(self.model, self.calibration.batches[0], self.device)
        return self.model

    @cached_property
    def calibration(self) -> Dataset:
        """The calibration data.

        Raises:
            DataError: it cannot be loaded, or is empty.
        """
        data = self._arranged(self._load_calibration(self.model))
        if not data.batches:
            raise DataError("the calibration data is empty")
        return data

    @cached_property
    def evaluation(self) -> Dataset:
        """The evaluation data.

        Raises:
            DataError: it cannot be loaded.
        """
        return self._arranged(self._load_evaluation(self.model))

    def _arranged(self, data: Dataset) -> Dataset:
        """The data with marks in batches that can be misread; batches that are loaded as they are read have no need."""
        from mlorq.models.arrange import arranged
        from mlorq.models.batches import batch_samples

        if not isinstance(data.batches, list) or data.labels is not None:
            return data
        batches = arranged(self.model, data.batches, self.device)
        if batches is data.batches:
            return data
        return replace(data, batches=batches, samples=sum(map(batch_samples, batches)))


class Context:
    """Resolves a step's handles. It has no access to the configuration: a step reads its parameters alone.

    Args:
        sources: of model and data.
        artifacts: reads the store.
        threads: CPU threads per step; None: torch's default.
        memory: bytes that the sums of a step may take; None: a share of what is free. Results do not depend on it.

    Attributes:
        device: the device to compute on.
        artifacts: reads artifacts by reference.
        memory: the argument.
    """

    def __init__(
        self, sources: Sources, artifacts: ArtifactReader, threads: int | None = None, memory: int | None = None
    ) -> None:
        self.device = sources.device
        self.artifacts = artifacts
        self._sources = sources
        self.memory = memory
        self._threads = threads
        self._folded: tuple[ArtifactRef, FloatModel] | None = None
        self._passes: tuple[object, FloatPasses] | None = None
        self._layers: tuple[object, LayerList] | None = None

    @cached_property
    def paired(self) -> PairedCache:
        """Cache of the float and the partly rounded model between steps."""
        from steps.paired_cache import PairedCache

        return PairedCache(self)

    def passes(self, depends_on: object, made: Callable[[], FloatPasses]) -> FloatPasses:
        """The float model's passes on the samples of a measurement: those of the last step if it had the same.

        Args:
            depends_on: all that decides them.
            made: makes them.
        """
        if self._passes is None or self._passes[0] != depends_on:
            self._passes = None  # released before the next are made
            self._passes = (depends_on, made())
        return self._passes[1]

    def layers(self, depends_on: object, find: Callable[[], LayerList]) -> LayerList:
        """The model's layers: those that were found before, for a check of the run, if they are the same.

        Args:
            depends_on: all that decides them.
            find: finds them, which takes passes through the model.
        """
        if self._layers is None or self._layers[0] != depends_on:
            self._layers = (depends_on, find())
        return self._layers[1]

    def use_threads(self) -> None:
        """Give the calling thread the run's fixed number of CPU threads, if one is configured.

        Only torch computes on several threads, and the module of a step that uses torch has imported it by now.
        """
        torch = sys.modules.get("torch")
        if torch is not None and self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def model(self, ref: ModelRef) -> FloatModel:
        """The float model of a handle, on the device: as given, or with its LayerNorms folded.

        The last folded model is cached.

        Raises:
            ConfigError: this worker loads another model.
        """
        model = self._sources.prepared
        _require_same("float model", ref.key, model.key)
        if ref.activations is None:
            return model
        if self._folded is None or self._folded[0] != ref.activations:
            self._folded = None  # released before the next copy is made
            from mlorq.models.copying import copy_module

            module = copy_module(model.module)
            plan = self.plan(ref)
            assert plan is not None
            plan.fold(module)
            self._folded = (ref.activations, replace(model, module=module, key=ref.digest))
        return self._folded[1]

    def compressed(self, checkpoint: ArtifactRef, model: FloatModel) -> nn.Module:
        """The module of a checkpoint, on the device.

        Args:
            checkpoint: the ``compressed`` artifact.
            model: the float model that it was made of, whose weights may be in a file: then the module decodes each
                layer whenever it is called, and keeps no float weights in memory.
        """
        from mlorq.checkpoint.io import load
        from mlorq.forms.compressed_module import CompressedModule
        from mlorq.models.offload import is_offloaded

        # Loaded into a copy of the float model only if its architecture cannot be rebuilt by name.
        instance = None if model.rebuilds else model.module
        with self.artifacts.checkpoint(checkpoint) as location:
            module = load(location, model=instance, device=self.device)
        keeps = not any(map(is_offloaded, model.module.parameters()))
        for child in module.modules():
            if isinstance(child, CompressedModule):
                child.cache = keeps
        return module

    def plan(self, ref: ModelRef) -> ActivationPlan | None:
        """How the activations of a handle's model are quantized; None if they stay float."""
        return self.artifacts.plan(ref.activations)

    def calibration(self, ref: DataRef) -> Dataset:
        """The calibration data of a handle.

        Raises:
            ConfigError: this worker loads other data.
        """
        _require_same("calibration data", ref.key, self._sources.calibration.key)
        return self._sources.calibration

    def evaluation(self, ref: DataRef) -> Dataset:
        """The evaluation data of a handle.

        Raises:
            ConfigError: this worker loads other data.
        """
        _require_same("evaluation data", ref.key, self._sources.evaluation.key)
        return self._sources.evaluation


def _require_same(what: str, asked: str, found: str) -> None:
    if asked != found:
        raise ConfigError(
            f"the step asks for the {what} {asked[:12]}, but the configuration gives {found[:12]} in the process that "
            "runs it: use the same files and package versions in all processes that run steps"
        )


@dataclass(frozen=True)
class Worker:
    """A store and a context: all that is needed to run steps.

    Attributes:
        store: the store that artifacts are written to.
        context: resolves the steps' handles.
    """

    store: Store
    context: Context

    @property
    def device(self) -> str:
        """``cpu``, ``cuda:0`` …"""
        return self.context.device
