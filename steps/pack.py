"""Step ``pack``: the compressed checkpoint, a self-contained folder for ``mlorq.load``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mlorq.activations.plan import ActivationPlan
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef
from mlorq.checkpoint.float_sizes import rest_by_kind
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.size_bound import float_rest, rest_upper_bound
from mlorq.codecs.base import Accounting
from mlorq.config.layer_overrides import search_json
from mlorq.forms.embedding_tables import find_tables, replace_tables
from mlorq.forms.modules import replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models.base import FloatModel
from mlorq.models.copying import copy_module
from mlorq.models.layer_list import Layer
from mlorq.models.norms import set_parameters
from steps import embeddings
from steps.base import Needs, Progress, Step, StepSpec
from steps.context import Context
from steps.handles import DataRef, ModelRef
from steps.session import Session


@dataclass(frozen=True)
class Params:
    """Metadata of the checkpoint: how bytes are counted, and the digest of the configuration."""

    accounting: Accounting
    configuration: str


@dataclass(frozen=True)
class Inputs:
    """The model, the last artifact of each layer, and the artifacts that the checkpoint's metadata names."""

    model: ModelRef
    calibration: DataRef
    layers: ArtifactRef
    allocation: ArtifactRef
    rounded: tuple[ArtifactRef, ...]
    embeddings: ArtifactRef | None = None


def spec(
    session: Session,
    model: ModelRef,
    layers: ArtifactRef,
    allocation: ArtifactRef,
    rounded: Sequence[ArtifactRef],
) -> StepSpec:
    """Depends on the last artifact of each layer and, for its metadata, on the allocation."""
    config = session.config
    configuration = {
        "preset": config.preset,
        "search": search_json(config.search),
        "rounding": config.rounding.model_dump(mode="json"),
        "seed": config.seed,
        **({} if config.activations is None else {"activations": config.activations.model_dump(mode="json")}),
    }
    if config.embeddings is not None:
        configuration["embeddings"] = config.embeddings.model_dump(mode="json")
    inputs = Inputs(model, session.calibration_ref, layers, allocation, tuple(rounded), embeddings.artifact(session))
    return STEP.spec(Params(config.search.accounting, digest_json(configuration)), inputs, needs=Needs(device=False))


def describe(model: FloatModel, plan: ActivationPlan | None) -> dict[str, Any]:
    """The part of a checkpoint's metadata that does not depend on the budget."""
    found = {"architecture": model.architecture, "dtype": str(model.dtype).removeprefix("torch.")}
    return found if plan is None else found | {"activations": plan.without_folds().to_json()}


def tables(session: Session) -> dict[str, int]:
    """Bit-widths of the embedding tables that are quantized, by name."""
    settings = session.config.embeddings
    if settings is None:
        return {}
    return dict.fromkeys(find_tables(session.model.module, settings.smallest).tables, settings.bits)


def _with_quantizers(session: Session, ref: ModelRef) -> nn.Module:
    """The float model with its activation quantizers, if it has any."""
    module, plan = session.worker.context.model(ref).module, session.artifacts.plan(ref.activations)
    if plan is not None:
        module = copy_module(module)
        plan.install(module)
    return module


def rest_kinds(session: Session, layers: Sequence[Layer], model: ModelRef | None = None) -> dict[str, int]:
    """Bytes of the float rest of a checkpoint, by kind; ``model`` as in ``rest_bytes_bound``."""
    aliases = {layer.name: layer.aliases for layer in layers}
    return rest_by_kind(float_rest(_with_quantizers(session, model or session.model_ref), aliases, tables(session)))


def rest_bytes_bound(session: Session, layers: Sequence[Layer], model: ModelRef | None = None) -> int:
    """Upper bound in bytes of the rest of a checkpoint: everything but the compressible layers' weights.

    Args:
        session: of the run.
        layers: the compressible layers.
        model: the model with its activation plan, if that is known; default: the model as given.
    """
    ref = model or session.model_ref
    aliases = {layer.name: layer.aliases for layer in layers}
    description = describe(session.worker.context.model(ref), session.artifacts.plan(ref.activations))
    return rest_upper_bound(
        _with_quantizers(session, ref),
        aliases,
        description,
        accounting=session.config.search.accounting,
        tables=tables(session),
    )


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    artifacts, model, plan = context.artifacts, context.model(inputs.model), context.plan(inputs.model)
    layers = artifacts.layers(inputs.layers)
    by_artifact: dict[str, tuple[ArtifactRef, set[str]]] = {}
    for layer, ref in zip(layers.layers, inputs.rounded, strict=True):
        by_artifact.setdefault(ref.key, (ref, set()))[1].add(layer.name)
    read: dict[str, CompressedLayer] = {}
    rest: dict[str, Tensor] = {}
    for ref, names in by_artifact.values():
        found = artifacts.rounded(ref)
        read |= {item.layer: item for item in found.layers if item.layer in names}
        rest |= found.rest
        progress(len(read), len(layers.layers))
    compressed = {layer.name: read[layer.name] for layer in layers.layers}
    module = copy_module(model.module).to("cpu")
    set_parameters(module, rest)
    replace_layers(module, compressed, {layer.name: list(layer.aliases) for layer in layers.layers})
    replace_tables(module, artifacts.tables(inputs.embeddings))
    if plan is not None:
        plan.install(module)
    allocation = artifacts.json(inputs.allocation, "allocation.json")
    description = {
        **describe(model, plan),
        "budget": {
            "asked": allocation["budget"],
            "budget_bytes": allocation["budget_bytes"],
            "accounting": params.accounting,
        },
        "hashes": {
            "model": inputs.model.key,
            "calibration": inputs.calibration.key,
            "configuration": params.configuration,
        },
    }
    return checkpoint_files(module, description)


STEP = Step("compressed", 4, Params, Inputs, run)
