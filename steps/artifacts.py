"""Reading artifacts from the store: by reference, as the records that steps and flows work with."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from mlorq.activations.plan import ActivationPlan
from mlorq.allocation.choices import SearchSpace
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.forms import Candidate, uniform_candidate
from mlorq.models.layer_list import LayerList, LeftFloat, layers_from_table
from mlorq.scratch import scratch_folder

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from mlorq.calibration.token_importance import Importance
    from mlorq.forms.stored_layer import CompressedLayer

CALIBRATION, DEPTH = "calibration.json", "depth.json"
IMPORTANCE = "importance.safetensors"
SHARED_INPUTS = "inputs.json"  # {layer: the layer whose file has the moments of its input}
PLAN, PLAN_TENSORS = "activations.json", "activations.safetensors"
REST = "rest/parameters.safetensors"  # in a folder, because the layers' files are named after layers


def moments_file(layer: str) -> str:
    """File of a layer's moments in a ``capture`` artifact."""
    return f"moments/{layer}.safetensors"


def inputs_file(layer: str) -> str:
    """File of the moments of a layer's input, and of all layers that read the same tensor."""
    return f"inputs/{layer}.safetensors"


class RoundedFiles(NamedTuple):
    """What one step of rounding wrote.

    Attributes:
        layers: the compressed layers.
        rest: trained float parameters of the rest of the model, by name.
        previous: the artifact before it in the chain; None for the first.
    """

    layers: list[CompressedLayer]
    rest: dict[str, Tensor]
    previous: ArtifactRef | None


@dataclass
class RoundedModel:
    """What a chain of rounding steps wrote: each layer and parameter from the last artifact that has it.

    Attributes:
        layers: compressed layers by name.
        rest: trained float parameters of the rest of the model, by name.
    """

    layers: dict[str, CompressedLayer] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)

    def add_earlier(self, files: RoundedFiles) -> None:
        """Add what an earlier artifact wrote and no later one replaced."""
        for layer in files.layers:
            self.layers.setdefault(layer.layer, layer)
        for name, value in files.rest.items():
            self.rest.setdefault(name, value)


class ArtifactReader:
    """Reads artifacts of one store and caches in memory the latest of those that several steps need.

    Args:
        store: the store that holds them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._layers: dict[str, LayerList] = {}
        self._importance: tuple[str, Sequence[Importance] | None] | None = None
        self._plan: tuple[ArtifactRef, ActivationPlan] | None = None
        self._tables: tuple[str, dict[str, CompressedLayer]] | None = None
        self._space: tuple[tuple[ArtifactRef, ...], SearchSpace] | None = None

    # -- files ------------------------------------------------------------------------------------------------

    def table(self, ref: ArtifactRef, name: str) -> pa.Table:
        """A Parquet file of an artifact."""
        return self._store.read_table(ref, name)

    def json(self, ref: ArtifactRef, name: str) -> Any:
        """A JSON file of an artifact."""
        return self._store.read_json(ref, name)

    def arrays(self, ref: ArtifactRef, name: str) -> dict[str, np.ndarray]:
        """A safetensors file of an artifact, as NumPy arrays."""
        return self._store.read_arrays(ref, name)

    def sizes(self, ref: ArtifactRef) -> dict[str, int]:
        """Bytes of an artifact's files by name."""
        manifest = self._store.manifest(ref) or {"files": {}}
        return {name: int(file["bytes"]) for name, file in manifest["files"].items()}

    def files(self, ref: ArtifactRef) -> dict[str, bytes]:
        """The contents of an artifact's files by name."""
        return {name: self._store.read_bytes(ref, name) for name in self.sizes(ref)}

    # -- records ----------------------------------------------------------------------------------------------

    def layers(self, ref: ArtifactRef) -> LayerList:
        """The layers that a ``layers`` artifact lists."""
        if ref.key not in self._layers:
            extra = self._store.read_json(ref, "model.json")
            layers = layers_from_table(self._store.read_table(ref, "layers.parquet"))
            skipped, others = ([LeftFloat(*one) for one in extra.get(key, ())] for key in ("skipped", "others"))
            self._layers[ref.key] = LayerList(layers, extra["blocks"], skipped, others, tuple(extra.get("alone", ())))
        return self._layers[ref.key]

    def moments(self, capture: ArtifactRef, layer: str) -> dict[str, Tensor]:
        """A layer's Hessian and, if the ``capture`` artifact has them, its moments; by name, on the CPU."""
        from mlorq.calibration.covariance import moments_tensors

        own = self._store.read_tensors(capture, moments_file(layer))
        if "gradient_tokens" not in own:  # no moments; or an artifact of version 4 or before, whose files have all
            return own
        shared = self._store.read_json(capture, SHARED_INPUTS)[layer]
        return moments_tensors(own, self._store.read_tensors(capture, inputs_file(shared)))

    def importance(self, capture: ArtifactRef, batches: int) -> Sequence[Importance] | None:
        """Weights of the calibration data's tokens, one mapping per batch; None if the capture has none.

        Args:
            capture: the ``capture`` artifact.
            batches: number of batches of the calibration data.
        """
        if self._importance is None or self._importance[0] != capture.key:
            from mlorq.calibration.token_importance import importance_of_tensors

            found = None
            if IMPORTANCE in self.sizes(capture):
                found = importance_of_tensors(self._store.read_tensors(capture, IMPORTANCE), batches)
            self._importance = (capture.key, found if found and all(found) else None)
        return self._importance[1]

    def plan(self, ref: ArtifactRef | None) -> ActivationPlan | None:
        """The plan that an ``activations`` or ``joint`` artifact holds; None if ``ref`` is None."""
        if ref is None:
            return None
        if self._plan is None or self._plan[0] != ref:
            self._plan = (ref, read_plan(self._store, ref))
        return self._plan[1]

    def tables(self, ref: ArtifactRef | None) -> dict[str, CompressedLayer]:
        """The quantized embedding tables of an ``embeddings`` artifact by name; empty if ``ref`` is None."""
        if ref is None:
            return {}
        if self._tables is None or self._tables[0] != ref.key:
            from mlorq.forms.stored_layer import CompressedLayer

            found = {}
            for row in self._store.read_json(ref, "embeddings.json")["tables"]:
                tensors = self._store.read_tensors(ref, f"{row['table']}.safetensors")
                candidate = uniform_candidate(row["bits"])
                found[row["table"]] = CompressedLayer.from_tensors(row["table"], candidate, tensors)
            self._tables = (ref.key, found)
        return self._tables[1]

    def search_space(
        self,
        layers: Sequence[str],
        candidates: Mapping[str, ArtifactRef],
        sensitivity: Mapping[str, ArtifactRef],
    ) -> SearchSpace:
        """The candidates of layers with their costs; the last search space is cached for the next budget.

        Args:
            layers: names, in execution order.
            candidates, sensitivity: the artifacts by layer.
        """
        refs = tuple(refs[name] for name in layers for refs in (candidates, sensitivity))
        if self._space is None or self._space[0] != refs:
            tables = (
                (
                    name,
                    self.table(candidates[name], "candidates.parquet"),
                    self.table(sensitivity[name], "sensitivity.parquet"),
                )
                for name in layers
            )
            self._space = (refs, SearchSpace.from_tables(tables))
        return self._space[1]

    # -- chains of rounded layers -----------------------------------------------------------------------------

    def rounded(self, ref: ArtifactRef) -> RoundedFiles:
        """What a rounding step wrote, and the artifact before it in the chain."""
        from mlorq.forms.stored_layer import CompressedLayer

        blockwise = ref.step in ("reconstruct", "tune")
        info = self._store.read_json(ref, "block.json" if blockwise else "layer.json")
        layers = []
        for row in info["layers"] if blockwise else [info]:
            name = f"{row['layer']}.safetensors" if blockwise else "codes.safetensors"
            tensors = self._store.read_tensors(ref, name)
            layers.append(CompressedLayer.from_tensors(row["layer"], Candidate(**row["candidate"]), tensors))
        rest = self._store.read_tensors(ref, REST) if blockwise and info["rest"] else {}
        return RoundedFiles(layers, rest, ArtifactRef.from_json(info["previous"]) if info["previous"] else None)

    def all_rounded(self, last: ArtifactRef | None, wanted: Collection[str] | None = None) -> RoundedModel:
        """The layers and trained parameters of a chain of artifacts.

        Args:
            last: the end of the chain.
            wanted: names of layers after which the search stops; None: the whole chain.
        """
        found = RoundedModel()
        while last is not None and not (wanted is not None and found.layers.keys() >= set(wanted)):
            files = self.rounded(last)
            found.add_earlier(files)
            last = files.previous
        return found

    def rounded_since(self, key: str | None, last: ArtifactRef | None) -> RoundedModel | None:
        """What a chain's artifacts after ``key`` wrote; None if ``key`` is not in the chain."""
        found = RoundedModel()
        while last is not None and last.key != key:
            files = self.rounded(last)
            found.add_earlier(files)
            last = files.previous
        return found if (None if last is None else last.key) == key else None

    # -- checkpoints ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def checkpoint(self, ref: ArtifactRef) -> Iterator[str]:
        """Location from which a ``compressed`` artifact can be loaded.

        An artifact of a remote store is copied to a temporary folder, through the store's cache and retries.
        """
        if not self._store.is_remote:
            yield self._store.uri(ref)
            return
        with self.copied(ref) as folder:
            yield folder

    @contextlib.contextmanager
    def copied(self, ref: ArtifactRef) -> Iterator[str]:
        """Temporary folder with the files of a ``compressed`` artifact, beside which no other artifacts are found."""
        with scratch_folder() as folder:
            for name, data in self.files(ref).items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            yield folder


def read_plan(store: Store, ref: ArtifactRef) -> ActivationPlan:
    """The plan that an ``activations`` or ``joint`` artifact holds."""
    return ActivationPlan.from_json(store.read_json(ref, PLAN), store.read_tensors(ref, PLAN_TENSORS))
