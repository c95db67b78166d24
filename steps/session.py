"""A run on this machine: its configuration, its store, and the handles of its model and data.

The pipeline and the functions that make step specifications (``steps.*.spec``) read a session; the steps' ``run``
functions have no access to it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mlorq.artifacts.fingerprints import opened_files
from mlorq.artifacts.leases import running
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig, SourceConfig
from mlorq.data import load_dataset
from mlorq.data.source import Role
from steps.artifacts import ArtifactReader
from steps.context import Context, Sources, Worker
from steps.handles import DataRef, ModelRef
from steps.made_from import made_from

if TYPE_CHECKING:
    from mlorq.data.base import Dataset
    from mlorq.models.base import FloatModel
    from steps.allocations import Search


@dataclass(frozen=True)
class Known:
    """What specifications need to know of a model and its data that are not loaded.

    Attributes:
        model: key of the float model.
        calibration: key of the calibration data.
        labels: digest of the labels that the cost reads (``steps.measuring``); None if it reads none.
    """

    model: str
    calibration: str
    labels: str | None = None


class Session:
    """A run on this machine: its configuration, and its first worker, whose model and data it shares.

    Args:
        config: the run's configuration.
        store: the artifact store.
        device: of the first worker: ``cpu``, ``cuda:0`` …
        model, calibration, evaluation: in-memory objects to use instead of those that the configuration names.
        known: keys of model and calibration data, to make specifications without loading either.

    Attributes:
        config, store, device, known: the arguments.
        artifacts: reads the store.
        worker: the first worker. Model and data are loaded on first use.
        made_from: fingerprints of what model and calibration data were made from (``steps.made_from``); None before
            both are loaded, and if they cannot have any.
        search: the finished search whose index was loaded (``steps.search_index``); None before, and if there is none.
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
        known: Known | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self.device = device
        self.artifacts = ArtifactReader(store)
        self.known = known
        self.made_from: dict[str, Any] | None = None
        self.search: Search | None = None
        self._in_memory = model is not None or calibration is not None
        self._opened: set[str] = set()
        self._model = model
        self._sources = Sources(
            lambda: model or self._load_model(),
            lambda loaded: calibration or self._load(config.data.calibration, "calibration", loaded),
            lambda loaded: evaluation or self._load(config.data.evaluation, "evaluation", loaded),
            device,
        )
        self.worker = Worker(store, self._context(self._sources, self.artifacts))

    def worker_on(self, device: str) -> Worker:
        """Another worker, with its own copy of the model and the same data."""
        model = self._model
        if model is not None:
            from mlorq.models.copying import copy_module

            model = replace(model, module=copy_module(model.module))
        sources = Sources(
            lambda: model or self._load_model(),
            lambda _: self._sources.calibration,
            lambda _: self._sources.evaluation,
            device,
        )
        return Worker(self.store, self._context(sources, ArtifactReader(self.store)))

    def _context(self, sources: Sources, artifacts: ArtifactReader) -> Context:
        engine = self.config.engine
        return Context(sources, artifacts, engine.threads, engine.memory_bytes)

    def _load_model(self) -> FloatModel:
        from mlorq.models import load_model
        from mlorq.models.offload import offloading

        limit = self.config.engine.weights_bytes if self.device == "cpu" else None  # others have their own memory
        with opened_files() as found, offloading(limit):
            model = load_model(self.config.model, self.config.folder)
        self._opened |= found
        return model

    def _load(self, source: SourceConfig, role: Role, model: FloatModel) -> Dataset:
        config = self.config
        if role == "calibration":
            with opened_files() as found:
                data = load_dataset(source, role, model, config.model, config.folder, config.seed)
            if not self._in_memory:
                # Now, not when the search is finished: a file that changes in the meantime is another model's.
                self.made_from = made_from(config, self.store, self._opened | found)
            return data
        return load_dataset(source, role, model, config.model, config.folder, config.seed)

    def in_use(self) -> AbstractContextManager[None]:
        """Marks the store for the duration of a ``with`` block: ``gc`` removes nothing. A run may be inside another."""
        return running(self.store.leases, f"a run of {self.config.model.display_name}")

    # -- model and data ---------------------------------------------------------------------------------------

    @property
    def model(self) -> FloatModel:
        """The float model as given, on the first worker's device.

        Raises:
            ModelError: it cannot be loaded, or weights are not finite.
        """
        return self._sources.model

    @cached_property
    def calibration(self) -> Dataset:
        """The calibration data.

        Raises:
            DataError: it cannot be loaded or is empty, or the cost needs labels and they do not fit the model.
        """
        data = self._sources.calibration
        if self.config.search.cost == "task":  # the only cost that reads labels
            data.check_labels(self.model)
        return data

    @property
    def evaluation(self) -> Dataset:
        """The evaluation data.

        Raises:
            DataError: it cannot be loaded.
        """
        return self._sources.evaluation

    # -- handles ----------------------------------------------------------------------------------------------

    @property
    def model_ref(self) -> ModelRef:
        """The float model as given."""
        return ModelRef(self.model.key if self.known is None else self.known.model)

    @property
    def calibration_ref(self) -> DataRef:
        """The calibration data."""
        return DataRef(self.calibration.key if self.known is None else self.known.calibration)

    @property
    def evaluation_ref(self) -> DataRef:
        """The evaluation data."""
        return DataRef(self.evaluation.key)


def open_store(config: RunConfig) -> Store:
    """The run's store, with a cache if it is remote; no connection is made yet.

    Raises:
        StoreError: the URL's protocol is unknown.
    """
    cache = config.engine.cache
    return Store(config.resolve(config.store), cache=cache if cache in (None, "auto") else config.resolve(cache))


def open_worker(config: RunConfig, device: str) -> Worker:
    """A worker that loads model and data itself, for a separate process.

    Raises:
        StoreError: the protocol of the store's URL is unknown.
    """
    return Session(config, open_store(config), device).worker
