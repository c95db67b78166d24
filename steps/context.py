"""What a step works with: the configuration, the store, one device, and the model and data loaded at most once.

Each worker has its own: a step may change weights of the model for a moment, and two steps must not do that to one.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlorq.activations.plan import ActivationPlan
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.calibration.covariance import moments_of_tensors
from mlorq.calibration.token_importance import importance_of_tensors, leaders
from mlorq.checkpoint.format import CONFIG, TENSORS
from mlorq.config.run import RunConfig
from mlorq.costs.measured import spread_batches
from mlorq.data import load_dataset
from mlorq.data.base import Dataset
from mlorq.errors import ConfigError, DataError
from mlorq.fitting.base import LayerFit
from mlorq.fitting.covariance_fit import covariance_fit
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.fitting.settings import FitSettings
from mlorq.forms.base import Candidate, uniform_candidate
from mlorq.forms.embedding_tables import set_tables
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models import load_model
from mlorq.models.base import FloatModel, check_weights, fold_batches, split_batches
from mlorq.models.layers import Layer, LayerList, layers_from_table, weight_matrix
from mlorq.rounding.paired_forward import PairedForward


class Workbench:
    """Everything a step needs on one device.

    Args:
        config: the run's configuration.
        store: where artifacts are.
        device: ``cpu``, ``cuda:0`` …
        model, calibration, evaluation: given by the Python API instead of being loaded from the configuration.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        device: str = "cpu",
        *,
        model: FloatModel | None = None,
        calibration: Dataset | None = None,
        evaluation: Dataset | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.device = device
        self._given = (model, calibration, evaluation)
        self._lists: dict[str, LayerList] = {}
        self._importance: dict[str, list[dict[str, Tensor]] | None] = {}
        self._paired: tuple[str | None, str, PairedForward] | None = None
        self._activations: ArtifactRef | None = None
        self.plan: ActivationPlan | None = None
        self._tables: tuple[str, dict[str, CompressedLayer]] | None = None

    def on_device(self, device: str) -> Workbench:
        """A workbench for another worker: its own copy of the model, the same data."""
        model = None if self._given[0] is None else deepcopy(self._given[0])
        other = Workbench(
            self.config,
            self.store,
            device,
            model=model,
            calibration=self._given[1],
            evaluation=self._given[2],
        )
        if self._activations is not None:
            other.use_activations(self._activations)
        return other

    def use_threads(self) -> None:
        """Give the calling thread the run's fixed number of CPU threads, where one is configured."""
        threads = self.config.engine.threads
        if threads is not None and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    # -- inputs -----------------------------------------------------------------------------------------------

    @cached_property
    def float_model(self) -> FloatModel:
        """The float model as it was given, checked to be finite, on this device."""
        model = self._given[0] or load_model(self.config.model, self.config.folder)
        check_weights(model.module)
        model.module.to(self.device)
        return model

    @cached_property
    def model(self) -> FloatModel:
        """The float model that is compressed: with its LayerNorms folded where activations are quantized."""
        if self.plan is None or self._activations is None:
            return self.float_model
        module = deepcopy(self.float_model.module)
        self.plan.fold(module)
        key = digest_json([self.float_model.key, self._activations.key])
        return replace(self.float_model, module=module, key=key)

    def use_activations(self, ref: ArtifactRef) -> None:
        """Work with quantized activations from now on: ``ref`` is the run's ``activations`` artifact."""
        if self._activations == ref:
            return
        self.plan = read_plan(self.store, ref)
        self._activations, self._paired = ref, None
        self.__dict__.pop("model", None)

    @property
    def model_inputs(self) -> dict[str, ArtifactRef | str]:
        """What a step that works with ``model`` depends on."""
        found: dict[str, ArtifactRef | str] = {"model": self.model.key}
        return found if self._activations is None else found | {"activations": self._activations}

    @cached_property
    def calibration(self) -> Dataset:
        """The calibration data."""
        data = self._given[1] or load_dataset(
            self.config.data.calibration,
            "calibration",
            self.float_model,
            self.config.model,
            self.config.folder,
            self.config.seed,
        )
        if not data.batches:
            raise DataError("the calibration data is empty")
        if self.config.search.cost == "task":  # no other cost looks at the labels
            data.check_labels(self.model)
        return data

    @cached_property
    def evaluation(self) -> Dataset:
        """The evaluation data."""
        return self._given[2] or load_dataset(
            self.config.data.evaluation,
            "evaluation",
            self.float_model,
            self.config.model,
            self.config.folder,
            self.config.seed,
        )

    def batches(self, samples: int) -> list[Any]:
        """Calibration batches with about ``samples`` samples, spread evenly."""
        return spread_batches(self.calibration.batches, samples)

    def measuring(self, samples: int, *, held_out: bool) -> tuple[list[Any], list[Tensor] | None]:
        """About ``samples`` calibration samples to measure costs on, spread evenly, and their labels if there are any.

        Args:
            samples: how many.
            held_out: take them from the second fold, to which nothing was fitted.
        """

        def chosen(parts: Sequence[Any]) -> list[Any]:
            return spread_batches((fold_batches(parts, 1) if held_out else []) or parts, samples)

        data = self.calibration
        return chosen(data.batches), None if data.labels is None else chosen(data.labels)

    # -- artifacts --------------------------------------------------------------------------------------------

    def layer_list(self, ref: ArtifactRef) -> LayerList:
        """The layers that a ``layers`` artifact lists."""
        if ref.key not in self._lists:
            extra = self.store.read_json(ref, "model.json")
            layers = layers_from_table(self.store.read_table(ref, "layers.parquet"))
            skipped = [(name, reason) for name, reason in extra["skipped"]]
            self._lists[ref.key] = LayerList(layers, extra["blocks"], skipped)
        return self._lists[ref.key]

    def fits(self, layer: Layer, capture: ArtifactRef, settings: FitSettings) -> tuple[LayerFit, HessianFit]:
        """The fit of a layer's candidates in the metric of the settings, and the one under the label-free Hessian."""
        weight = weight_matrix(self.model.module.get_submodule(layer.name))
        tensors = self.store.read_tensors(capture, moments_file(layer.name))
        plain = HessianFit(weight, tensors["hessian"].to(self.device), settings)
        if settings.metric == "moments" and "inputs" in tensors:
            return covariance_fit(weight, moments_of_tensors(tensors, self.device), settings), plain
        return plain, plain

    def importance(self, capture: ArtifactRef) -> list[dict[str, Tensor]] | None:
        """Weights of the calibration data's tokens, a mapping a batch; None where the capture has none."""
        if capture.key not in self._importance:
            found = None
            if IMPORTANCE in (self.store.manifest(capture) or {"files": {}})["files"]:
                tensors = self.store.read_tensors(capture, IMPORTANCE)
                found = importance_of_tensors(tensors, len(self.calibration.batches))
            self._importance = {capture.key: found if found and all(found) else None}
        return self._importance[capture.key]

    def bias(self, layer: Layer) -> Tensor | None:
        """The bias that a layer may change: its own, where no other module has the weight."""
        bias = self.model.module.get_submodule(layer.name).bias
        return bias.detach().float() if isinstance(bias, Tensor) and not layer.aliases else None

    def rounded(self, ref: ArtifactRef) -> tuple[list[CompressedLayer], ArtifactRef | None]:
        """The layers that a step which rounds wrote, and the artifact before it, if its inputs depended on any."""
        blockwise = ref.step in ("reconstruct", "tune")
        info = self.store.read_json(ref, "block.json" if blockwise else "layer.json")
        layers = []
        for row in info["layers"] if blockwise else [info]:
            tensors = self.store.read_tensors(ref, f"{row['layer']}.safetensors" if blockwise else "codes.safetensors")
            layers.append(CompressedLayer.from_tensors(row["layer"], Candidate(**row["candidate"]), tensors))
        return layers, ArtifactRef.from_json(info["previous"]) if info["previous"] else None

    def all_rounded(
        self, last: ArtifactRef | None, wanted: Collection[str] | None = None
    ) -> dict[str, CompressedLayer]:
        """The layers of a chain of artifacts by name, each as the last of them left it; all, or the wanted ones."""
        found: dict[str, CompressedLayer] = {}
        while last is not None and not (wanted is not None and found.keys() >= set(wanted)):
            layers, last = self.rounded(last)
            for layer in layers:
                found.setdefault(layer.layer, layer)
        return found

    def _rounded_since(self, key: str | None, last: ArtifactRef | None) -> dict[str, CompressedLayer] | None:
        """The layers that a chain's artifacts after ``key`` wrote, by name; None where it does not come by it."""
        found: dict[str, CompressedLayer] = {}
        while last is not None and last.key != key:
            layers, last = self.rounded(last)
            for layer in layers:
                found.setdefault(layer.layer, layer)
        return found if (None if last is None else last.key) == key else None

    def tables(self, ref: ArtifactRef | None) -> dict[str, CompressedLayer]:
        """The quantized embedding tables of an ``embeddings`` artifact; none without one."""
        if ref is None:
            return {}
        if self._tables is None or self._tables[0] != ref.key:
            found = {}
            for row in self.store.read_json(ref, "embeddings.json")["tables"]:
                tensors = self.store.read_tensors(ref, f"{row['table']}.safetensors")
                candidate = uniform_candidate(row["bits"])
                found[row["table"]] = CompressedLayer.from_tensors(row["table"], candidate, tensors)
            self._tables = (ref.key, found)
        return self._tables[1]

    # -- sequential rounding ----------------------------------------------------------------------------------

    def rounding_batches(
        self, capture: ArtifactRef, samples: int, batch_size: int | None
    ) -> tuple[list[Any], list[dict[str, Tensor]] | None]:
        """Calibration batches that rounding sees, and the weights of their tokens where there are any.

        Args:
            capture: the ``capture`` artifact.
            samples: most samples used.
            batch_size: samples in a batch; None: as the data comes.
        """
        weights = self.importance(capture)
        found = [self.batches(samples), None if weights is None else spread_batches(weights, samples)]
        if batch_size is not None:
            found = [None if part is None else split_batches(part, batch_size) for part in found]
        return found[0] or [], found[1]

    def paired(
        self,
        layers: LayerList,
        capture: ArtifactRef,
        previous: ArtifactRef | None,
        samples: int,
        batch_size: int | None = None,
        tables: ArtifactRef | None = None,
    ) -> PairedForward:
        """Float and compressed model with all layers up to ``previous`` rounded.

        The last one is kept: a run that goes on layer by layer advances it, one that resumes in the middle (or in
        another process) builds it from the chain of rounded artifacts.

        Args:
            layers: of the model.
            capture: the ``capture`` artifact.
            previous: the last artifact of the chain; None at its start.
            samples: most calibration samples used.
            batch_size: samples in a batch; None: as the data comes.
            tables: the ``embeddings`` artifact, where tables are quantized: the compressed model has theirs.
        """
        kept = self._paired
        if kept is not None and kept[1] == self._pair_state(samples, batch_size):
            later = self._rounded_since(kept[0], previous)
            if later is not None:
                for name, compressed in later.items():
                    kept[2].set(layers[name], compressed)
                return kept[2]
        batches, importance = self.rounding_batches(capture, samples, batch_size)
        paired = PairedForward(
            self.model,
            layers.blocks,
            batches,
            self.device,
            importance=importance,
            leaders=leaders(layers.layers),
            activations=self.plan,
        )
        set_tables(paired.compressed, self.tables(tables))
        for compressed in self.all_rounded(previous).values():
            paired.set(layers[compressed.layer], compressed)
        return paired

    def keep_paired(
        self, paired: PairedForward, last: ArtifactRef, samples: int, batch_size: int | None = None
    ) -> None:
        """Remember a pair in which every layer up to ``last`` is rounded."""
        self._paired = (last.key, self._pair_state(samples, batch_size), paired)

    def _pair_state(self, samples: int, batch_size: int | None) -> str:
        return f"{self.calibration.key}:{samples}:{batch_size}"


def open_store(config: RunConfig) -> Store:
    """The run's store, with its cache where it is remote; nothing is contacted yet.

    Raises:
        StoreError: its URL is of no known kind.
    """
    cache = config.engine.cache
    return Store(config.resolve(config.store), cache=cache if cache in (None, "auto") else config.resolve(cache))


@contextlib.contextmanager
def reachable_checkpoint(store: Store, ref: ArtifactRef) -> Iterator[str]:
    """Where a checkpoint can be loaded from; that of a remote store is read through it, with its cache and patience.

    Args:
        store: that holds it.
        ref: of the ``compressed`` artifact.
    """
    if not store.is_remote:
        yield store.uri(ref)
        return
    with tempfile.TemporaryDirectory(prefix="mlorq-checkpoint-") as folder:
        for name in (TENSORS, CONFIG):
            Path(folder, name).write_bytes(store.read_bytes(ref, name))
        yield folder


def read_plan(store: Store, ref: ArtifactRef) -> ActivationPlan:
    """The plan that an ``activations`` or ``joint`` artifact holds."""
    return ActivationPlan.from_json(store.read_json(ref, PLAN), store.read_tensors(ref, PLAN_TENSORS))


IMPORTANCE = "importance.safetensors"
PLAN, PLAN_TENSORS = "activations.json", "activations.safetensors"


def moments_file(layer: str) -> str:
    """File of a layer's moments in a ``capture`` artifact."""
    return f"moments/{layer}.safetensors"


def local_devices(config: RunConfig) -> list[str]:
    """The devices that the flow's own machine gives to steps; a cluster's workers have theirs.

    Raises:
        ConfigError: a device asked for is not there.
    """
    return ["cpu"] if config.engine.runner == "dask" else devices(config)


def devices(config: RunConfig) -> list[str]:
    """The devices of this machine that a run may use; what a cluster's workers have is for them to say.

    Raises:
        ConfigError: a device asked for is not there.
    """
    wanted = config.engine.devices
    present = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if wanted == "auto":
        return present or ["cpu"]
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if names == ["cuda"]:
        names = present or ["cuda"]
    for name in names:
        if name != "cpu" and name not in present:
            raise ConfigError(f"engine.devices: {name!r} is not there; present: {', '.join([*present, 'cpu'])}")
    return names
