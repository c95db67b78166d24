"""What a step is: a name, a version, a pure function from artifacts to the files of one artifact.

A step's key is the hash of all that can change its result: its name, its version, the parameters it reads and the keys
of its inputs. It looks its key up in the store itself, so a hit needs no database and holds in any process. Paths,
devices, thread counts and log levels are in no key.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef
from mlorq.errors import ConfigError

if TYPE_CHECKING:
    from mlorq.models.layers import Layer
    from steps.context import Workbench

Progress = Callable[[int, int], None]


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
        params: the parameters the step reads, JSON values.
        inputs: key of everything it reads, by role: artifacts as ``ArtifactRef``, the model and data sets as
            plain keys.
        layer: the layer it is about, for people; a step that depends on it has it in ``params`` too.
        needs: for whoever places it; not in its key, and not in its message.
    """

    step: str
    version: int
    params: dict[str, Any]
    inputs: dict[str, ArtifactRef | str] = field(default_factory=dict)
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
                "inputs": {
                    role: value.key if isinstance(value, ArtifactRef) else value for role, value in self.inputs.items()
                },
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

    def artifact(self, role: str) -> ArtifactRef:
        """An input that is an artifact."""
        value = self.inputs[role]
        assert isinstance(value, ArtifactRef), f"input {role} is no artifact"
        return value

    def optional_artifact(self, role: str) -> ArtifactRef | None:
        """An input that is an artifact, where the step has it."""
        return self.artifact(role) if role in self.inputs else None

    def to_json(self) -> dict[str, Any]:
        """JSON form, read back by ``from_json``."""
        return {
            "step": self.step,
            "version": self.version,
            "params": self.params,
            "inputs": {
                role: value.to_json() if isinstance(value, ArtifactRef) else value
                for role, value in self.inputs.items()
            },
            "layer": self.layer,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> StepSpec:
        """The inverse of ``to_json``."""
        inputs = {
            role: ArtifactRef.from_json(item) if isinstance(item, dict) else item
            for role, item in value["inputs"].items()
        }
        return cls(value["step"], value["version"], value["params"], inputs, value["layer"])


@dataclass(frozen=True)
class Step:
    """A registered step.

    Attributes:
        name: also the first folder of its artifacts.
        version: see ``StepSpec``.
        run: ``run(spec, bench, progress)`` gives the artifact's files, ``{name: bytes}``.
    """

    name: str
    version: int
    run: Callable[[StepSpec, Workbench, Progress], dict[str, bytes]]

    def spec(
        self,
        params: dict[str, Any],
        inputs: dict[str, ArtifactRef | str],
        layer: Layer | None = None,
        *,
        device: bool = True,
    ) -> StepSpec:
        """A step to run, with this step's name and version.

        Args:
            params: that it reads.
            inputs: that it reads.
            layer: that it is about.
            device: whether it computes on the run's device.
        """
        needs = Needs(device) if layer is None else Needs.of_layer(layer)
        return StepSpec(self.name, self.version, params, inputs, None if layer is None else layer.name, needs)


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


def find(spec: StepSpec, bench: Workbench) -> Outcome | None:
    """The step's artifact where the store has it."""
    if not bench.store.exists(spec.ref):
        return None
    manifest = bench.store.manifest(spec.ref) or {}
    return Outcome(spec.ref, True, float(manifest.get("seconds") or 0.0))


def execute(spec: StepSpec, bench: Workbench, progress: Progress | None = None) -> Outcome:
    """Run a step unless its artifact is there, and write the artifact.

    Raises:
        MlorqError: the input is at fault; nothing is written then.
    """
    from steps import REGISTRY

    found = find(spec, bench)
    if found is not None:
        return found
    step = REGISTRY[spec.step]
    if step.version != spec.version:
        raise ConfigError(
            f"step {spec.step} is of version {step.version} here, version {spec.version} was asked for: "
            "the process or image that runs the step holds another version of mlorq than the flow"
        )
    bench.use_threads()
    activations = spec.inputs.get("activations")
    if isinstance(activations, ArtifactRef):
        bench.use_activations(activations)
    started = time.perf_counter()
    files = step.run(spec, bench, progress or (lambda done, total: None))
    # Whole milliseconds from the start: sums of what was just computed and of what a manifest says then agree.
    seconds = round(time.perf_counter() - started, 3)
    details = {"layer": spec.layer, "params": spec.params, "inputs": spec.to_json()["inputs"]}
    ref = bench.store.write(spec.step, spec.key, files, details=details, seconds=seconds)
    return Outcome(ref, False, seconds)
