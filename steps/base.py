"""What a step is: a name, a version, and a pure function from parameters and inputs to the files of one artifact.

A step declares two frozen records: its parameters, which are plain values, and its inputs, which are handles
(``steps.handles``). Its key is the hash of its name, its version, its parameters and the keys of its inputs, and its
function reaches nothing else. It looks its key up in the store itself, so a hit needs no database and holds in any
process. Paths, devices, thread counts and log levels are in no key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pydantic import TypeAdapter

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.errors import ConfigError
from steps.handles import Handle, Inputs, ModelRef, handle_from_json, handle_to_json, inputs_of, key_of, roles_of

if TYPE_CHECKING:
    from mlorq.models.layers import Layer
    from steps.context import Context, Worker

Progress = Callable[[int, int], None]
Params = TypeVar("Params")


@dataclass(frozen=True)
class NoParams:
    """Of a step whose result depends on its inputs alone."""


@dataclass(frozen=True)
class Needs:
    """What a step needs of the machine that runs it; nothing of this is part of a key.

    Attributes:
        device: whether it computes on the run's device, a GPU where there is one.
        memory_bytes: that its own work takes at most on top of model and data, estimated; 0 where it is small.
    """

    device: bool = True
    memory_bytes: int = 0

    @classmethod
    def of_layer(cls, layer: Layer) -> Needs:
        """For the search or the rounding of one layer: float64 copies of W and its factors, and moments in two folds.

        Doubled, for PyTorch's temporaries and the allocator's gaps.
        """
        return cls(True, 2 * 8 * (8 * layer.params + 9 * (layer.in_features * layer.groups) ** 2))


@dataclass(frozen=True)
class StepSpec:
    """One step to run, as plain values that fit in a message.

    Attributes:
        step: registered name.
        version: of the step's code; a change of results is a change of version.
        params: the step's parameters as JSON values.
        inputs: handles of everything it reads, by role.
        layer: the layer it is about, for people; a step that depends on it has it in ``params`` too.
        needs: for whoever places it; not in its key, and not in its message.
    """

    step: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, Handle] = field(default_factory=dict)
    layer: str | None = None
    needs: Needs = Needs()

    @property
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
        """The artifact that the step makes."""
        return ArtifactRef(self.step, self.key)

    @property
    def label(self) -> str:
        """``step`` or ``step layer``, for logs and task names."""
        return self.step if self.layer is None else f"{self.step} {self.layer}"

    @property
    def artifacts(self) -> list[ArtifactRef]:
        """The artifacts that it reads, that of its model's activations among them."""
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
        run: ``run(params, inputs, context, progress)`` gives the artifact's files, ``{name: bytes}``.
    """

    name: str
    version: int
    params: type[Params]
    inputs: type[Inputs]
    run: Callable[[Params, Inputs, Context, Progress], dict[str, bytes]]

    def spec(
        self,
        params: Params,
        inputs: Inputs,
        layer: Layer | None = None,
        *,
        label: str | None = None,
        needs: Needs | None = None,
    ) -> StepSpec:
        """A step to run, with this step's name and version.

        Args:
            params: that it reads.
            inputs: that it reads.
            layer: that it is about; it decides what the step needs.
            label: what it is about, for people, where that is no layer.
            needs: instead of the run's device, and of the memory that its layer takes.
        """
        values: dict[str, Any] = self._adapter.dump_python(params, mode="json")
        if needs is None:
            needs = Needs() if layer is None else Needs.of_layer(layer)
        about = label if layer is None else layer.name
        return StepSpec(self.name, self.version, values, roles_of(inputs), about, needs)

    def read(self, spec: StepSpec) -> tuple[Params, Inputs]:
        """The records of a step to run: the inverse of ``spec``.

        Raises:
            StoreError: its inputs are not those of this step.
            ValidationError: its parameters are not.
        """
        return self._adapter.validate_python(spec.params), inputs_of(self.inputs, spec.inputs)

    def ref(self, params: Params, inputs: Inputs) -> ArtifactRef:
        """The artifact that the step makes of these parameters and inputs."""
        return self.spec(params, inputs).ref

    @cached_property
    def _adapter(self) -> TypeAdapter[Params]:
        return TypeAdapter(self.params)


@dataclass(frozen=True)
class Outcome:
    """What running a step came to.

    Attributes:
        ref: the artifact.
        reused: True where the artifact was there already.
        seconds: spent computing it, now or when it was made.
    """

    ref: ArtifactRef
    reused: bool
    seconds: float


def find(spec: StepSpec, store: Store) -> Outcome | None:
    """The step's artifact if the store has it."""
    if not store.exists(spec.ref):
        return None
    manifest = store.manifest(spec.ref) or {}
    return Outcome(spec.ref, True, float(manifest.get("seconds") or 0.0))


def execute(spec: StepSpec, worker: Worker, progress: Progress | None = None) -> Outcome:
    """Run a step unless its artifact is there, and write the artifact.

    Args:
        spec: the step.
        worker: where it runs.
        progress: called with (done, total).

    Raises:
        MlorqError: the input is at fault; nothing is written then.
    """
    from steps import REGISTRY

    found = find(spec, worker.store)
    if found is not None:
        return found
    step = REGISTRY[spec.step]
    if step.version != spec.version:
        raise ConfigError(
            f"step {spec.step} is of version {step.version} here, version {spec.version} was asked for: "
            "the process or image that runs the step holds another version of mlorq than the flow"
        )
    params, inputs = step.read(spec)
    worker.context.use_threads()
    started = time.perf_counter()
    files = step.run(params, inputs, worker.context, progress or (lambda done, total: None))
    # Whole milliseconds from the start: sums of what was just computed and of what a manifest says then agree.
    seconds = round(time.perf_counter() - started, 3)
    details = {"layer": spec.layer, "params": spec.params, "inputs": spec.to_json()["inputs"]}
    ref = worker.store.write(spec.step, spec.key, files, details=details, seconds=seconds)
    return Outcome(ref, False, seconds)
