"""Steps: a name, a version, and a pure function from parameters and inputs to the files of one artifact.

A step declares two frozen records: its parameters, which are plain values, and its inputs, which are handles
(``steps.handles``). Its key is the hash of its name, its version, its parameters and the keys of its inputs, and its
function reads nothing else. Before it runs, its key is looked up in the store, so a cache hit needs no database and is
valid in any process. Keys do not depend on paths, devices, thread counts or log levels.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import TypeAdapter

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.leases import once
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.errors import ConfigError, no_secrets
from mlorq.memory import block_width, return_freed
from steps.handles import Handle, Inputs, ModelRef, handle_from_json, handle_to_json, inputs_of, key_of, roles_of

if TYPE_CHECKING:
    from mlorq.models.layer_list import Layer
    from steps.context import Context, Worker

Progress = Callable[[int, int], None]
ArtifactFiles = Mapping[str, bytes] | Iterable[tuple[str, bytes]]
Params = TypeVar("Params")


@dataclass(frozen=True)
class NoParams:
    """Parameters of a step whose result depends on its inputs alone."""


@dataclass(frozen=True)
class Needs:
    """Resources that a step needs; they are not part of its key.

    Attributes:
        device: whether it computes on the run's device (a GPU if there is one).
        memory_bytes: estimated upper bound of its memory in addition to model and data; 0 if small.
    """

    device: bool = True
    memory_bytes: int = 0

    @classmethod
    def of_layer(cls, layer: Layer) -> Needs:
        """Needs of the search or the rounding of one layer: float64 copies of W and its factors, moments in two folds.

        Doubled to allow for PyTorch's temporaries and memory fragmentation.
        """
        inputs = layer.in_features * layer.groups
        return cls(True, 2 * 8 * (8 * layer.params + 9 * inputs * block_width(inputs)))


@dataclass(frozen=True)
class StepSpec:
    """One step to run, as plain values that fit in a message.

    Attributes:
        step: registered name.
        version: of the step's code; it increases when results change.
        params: the step's parameters as JSON values.
        inputs: handles of everything it reads, by role.
        layer: the layer (or block) that it handles, for display; a step that depends on it has it in ``params`` too.
        needs: resources, for the scheduler; neither in the key nor in the message.
    """

    step: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, Handle] = field(default_factory=dict)
    layer: str | None = None
    needs: Needs = Needs()

    @cached_property
    def key(self) -> str:
        """Hash of the step's name, version, parameters and input keys."""
        return digest_json(
            {
                "step": self.step,
                "version": self.version,
                "params": self.params,
                "inputs": {role: key_of(handle) for role, handle in self.inputs.items()},
            }
        )

    @property
    def ref(self) -> ArtifactRef:
        """Reference of the step's artifact."""
        return ArtifactRef(self.step, self.key)

    @property
    def label(self) -> str:
        """``step`` or ``step layer``, for logs and task names."""
        return self.step if self.layer is None else f"{self.step} {self.layer}"

    @property
    def artifacts(self) -> list[ArtifactRef]:
        """The artifacts that it reads, including the ``activations`` artifact of its model."""
        found = [handle.activations if isinstance(handle, ModelRef) else handle for handle in self.inputs.values()]
        return [handle for handle in found if isinstance(handle, ArtifactRef)]

    def to_json(self) -> dict[str, Any]:
        """JSON form, read back by ``from_json``."""
        return {
            "step": self.step,
            "version": self.version,
            "params": self.params,
            "inputs": {role: handle_to_json(handle) for role, handle in self.inputs.items()},
            "layer": self.layer,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepSpec:
        """The inverse of ``to_json``."""
        inputs = {role: handle_from_json(item) for role, item in value["inputs"].items()}
        return cls(value["step"], value["version"], value["params"], inputs, value["layer"])


@dataclass(frozen=True)
class Step(Generic[Params, Inputs]):
    """A registered step.

    Attributes:
        name: also the first folder of its artifacts.
        version: see ``StepSpec``.
        params: class of its parameters: a frozen dataclass or pydantic model of plain values.
        inputs: class of its inputs: a frozen dataclass of handles.
        run: ``run(params, inputs, context, progress)`` gives the artifact's files: ``{name: bytes}``, or pairs of name
            and bytes, of which each is written before the next is computed.
    """

    name: str
    version: int
    params: type[Params]
    inputs: type[Inputs]
    run: Callable[[Params, Inputs, Context, Progress], ArtifactFiles]

    def spec(
        self,
        params: Params,
        inputs: Inputs,
        layer: Layer | None = None,
        *,
        label: str | None = None,
        needs: Needs | None = None,
    ) -> StepSpec:
        """The specification of one run of this step.

        Args:
            params: the parameters.
            inputs: the input handles.
            layer: the layer that it handles, if any; determines the default of ``needs``.
            label: display name of its subject, if that is not a layer.
            needs: resources; default: the run's device, and the memory that ``layer`` takes.
        """
        values: dict[str, Any] = self._adapter.dump_python(params, mode="json")
        if needs is None:
            needs = Needs() if layer is None else Needs.of_layer(layer)
        about = label if layer is None else layer.name
        return StepSpec(self.name, self.version, values, roles_of(inputs), about, needs)

    def read(self, spec: StepSpec) -> tuple[Params, Inputs]:
        """Parameters and inputs of a specification: the inverse of ``spec``.

        Raises:
            StoreError: the inputs are not those of this step.
            ValidationError: the parameters are not those of this step.
        """
        return self._adapter.validate_python(spec.params), inputs_of(self.inputs, spec.inputs)

    def ref(self, params: Params, inputs: Inputs) -> ArtifactRef:
        """Reference of the artifact for these parameters and inputs."""
        return self.spec(params, inputs).ref

    @cached_property
    def _adapter(self) -> TypeAdapter[Params]:
        return TypeAdapter(self.params)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a step.

    Attributes:
        ref: the artifact.
        reused: whether the artifact was already in the store.
        seconds: time spent computing it, in this run or in the earlier one.
    """

    ref: ArtifactRef
    reused: bool
    seconds: float


def seconds_by_step(outcomes: Iterable[Outcome]) -> dict[str, float]:
    """Seconds that steps took, now or when they were computed, summed by step name."""
    seconds: dict[str, float] = defaultdict(float)
    for outcome in outcomes:
        seconds[outcome.ref.step] += outcome.seconds
    return {step: round(value, 3) for step, value in seconds.items()}


def find(spec: StepSpec, store: Store) -> Outcome | None:
    """The step's outcome if its artifact is in the store, else None."""
    if not store.exists(spec.ref):
        return None
    manifest = store.manifest(spec.ref) or {}
    return Outcome(spec.ref, True, float(manifest.get("seconds") or 0.0))


@no_secrets()
def execute(spec: StepSpec, worker: Worker, progress: Progress | None = None) -> Outcome:
    """Run a step and write its artifact, unless the store has it.

    Args:
        spec: the step.
        worker: the store, and the context in which the step runs.
        progress: called with (done, total).

    Raises:
        MlorqError: the input is wrong; there is no artifact.
    """
    from steps import REGISTRY

    found = find(spec, worker.store)
    if found is not None:
        return found
    step = REGISTRY[spec.step]
    if step.version != spec.version:
        raise ConfigError(
            f"step {spec.step} has version {step.version} here, but version {spec.version} was requested: install the "
            "flow's version of mlorq in the process or image that runs the step"
        )

    def compute() -> Outcome:
        params, inputs = step.read(spec)
        worker.context.use_threads()
        started = time.perf_counter()
        files = step.run(params, inputs, worker.context, progress or (lambda done, total: None))
        writer, writing = worker.store.writer(spec.step, spec.key), 0.0
        for name, data in files.items() if isinstance(files, Mapping) else files:
            begun = time.perf_counter()
            writer.add(name, data)
            writing += time.perf_counter() - begun
        # Rounded before it is used: the outcome and the manifest then have the same number.
        seconds = round(time.perf_counter() - started - writing, 3)
        if spec.layer is None:  # a step of the whole model, whose large tensors are gone
            return_freed()
        details = {"layer": spec.layer, "params": spec.params, "inputs": spec.to_json()["inputs"]}
        ref = writer.finish(details=details, seconds=seconds)
        return Outcome(ref, False, seconds)

    kind, store = f"{spec.step}/{spec.key}", worker.store
    return once(store.leases, kind, spec.label, lambda: find(spec, store), compute)
