"""Cache of the float and the partly rounded model, kept from one step of sequential rounding to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlorq.artifacts.store import ArtifactRef
from mlorq.calibration.token_importance import Importance, leaders
from mlorq.costs.measured import spread_batches
from mlorq.forms.embedding_tables import set_tables
from mlorq.models.batches import split_batches, unmarked
from mlorq.models.layer_list import LayerList
from mlorq.rounding.base import TrainingSettings
from mlorq.rounding.paired_forward import PairedForward
from steps.artifacts import RoundedModel
from steps.handles import DataRef, ModelRef

if TYPE_CHECKING:
    from steps.context import Context


@dataclass(frozen=True)
class PairedState:
    """Everything that a pair depends on, except its rounded layers.

    Attributes:
        model: the float model; its activations are quantized in the compressed copy.
        calibration: the data that runs through both models.
        layers: the ``layers`` artifact.
        capture: the ``capture`` artifact, which may have weights of the data's tokens.
        embeddings: the ``embeddings`` artifact; the compressed copy has its quantized tables. None: tables stay float.
        samples: maximum number of calibration samples.
        batch_size: samples per batch; None: the batches of the data.
    """

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    capture: ArtifactRef
    embeddings: ArtifactRef | None
    samples: int
    batch_size: int | None = None


@dataclass(frozen=True)
class TrainingInputs:
    """Inputs of a step that trains rounded layers: the model, the data, and the last artifact of the rounded layers."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    capture: ArtifactRef
    previous: ArtifactRef
    embeddings: ArtifactRef | None = None

    def state(self, training: TrainingSettings) -> PairedState:
        """What a pair depends on that is trained on these samples."""
        return PairedState(
            self.model,
            self.calibration,
            self.layers,
            self.capture,
            self.embeddings,
            training.samples,
            training.batch_size,
        )


class PairedCache:
    """The last pair of a worker, and the last artifact whose layers and norms are set in it.

    Args:
        context: of the worker.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._kept: tuple[PairedState, str | None, PairedForward] | None = None

    def get(self, state: PairedState, previous: ArtifactRef | None) -> PairedForward:
        """A pair in which all layers up to ``previous`` are rounded.

        A run that continues layer by layer advances the cached pair; a run that resumes midway, or in another process,
        rebuilds it from the chain of rounded artifacts.

        Args:
            state: everything else that the pair depends on.
            previous: the last artifact of the chain; None at its start.
        """
        artifacts = self._context.artifacts
        layers = artifacts.layers(state.layers)
        if self._kept is not None and self._kept[0] == state:
            _, last, paired = self._kept
            later = artifacts.rounded_since(last, previous)
            if later is not None:
                _set_all(paired, layers, later)
                return paired
        self._kept = None  # released before the next pair is built
        paired = self._build(state)
        _set_all(paired, layers, artifacts.all_rounded(previous))
        return paired

    def keep(self, paired: PairedForward, state: PairedState, last: ArtifactRef) -> None:
        """Cache a pair in which every layer up to ``last`` is rounded."""
        self._kept = (state, last.key, paired)

    def release(self) -> None:
        """Drop the cached pair: no step of this run continues it."""
        self._kept = None

    def _build(self, state: PairedState) -> PairedForward:
        context = self._context
        layers = context.artifacts.layers(state.layers)
        batches, importance = rounding_batches(context, state)
        plan = context.plan(state.model)
        paired = PairedForward(
            context.model(state.model),
            layers.blocks,
            batches,
            context.device,
            importance=importance,
            leaders=leaders(layers.layers),
            alone=layers.alone,
            activations=plan,
            teacher=context.model(ModelRef(state.model.key)) if plan is not None and plan.mlps else None,
        )
        set_tables(paired.compressed, context.artifacts.tables(state.embeddings))
        return paired


def _set_all(paired: PairedForward, layers: LayerList, rounded: RoundedModel) -> None:
    for name, compressed in rounded.layers.items():
        paired.set(layers[name], compressed)
    paired.set_rest(rounded.rest)


def rounding_batches(context: Context, state: PairedState) -> tuple[list[Any], Sequence[Importance] | None]:
    """Calibration batches for rounding, and the weights of their tokens if there are any.

    Args:
        context: of the worker.
        state: the data, the number of samples and the batch size.
    """
    batches = context.artifacts.layers(state.layers).batches(context.calibration(state.calibration).batches)
    weights = context.artifacts.importance(state.capture, len(batches))

    def chosen(parts: Sequence[Any]) -> list[Any]:
        spread = spread_batches(parts, state.samples)
        return spread if state.batch_size is None else split_batches(spread, state.batch_size)

    return chosen(batches), None if weights is None else [unmarked(part) for part in chosen(weights)]
