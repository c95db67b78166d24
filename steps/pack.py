"""Step ``pack``: the compressed checkpoint, a self-contained folder for ``mlorq.load``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, nn

from mlorq.activations.plan import ActivationPlan
from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef
from mlorq.checkpoint import preparation
from mlorq.checkpoint.float_sizes import rest_by_kind
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.size_bound import float_rest, rest_upper_bound, table_bytes
from mlorq.codecs.base import FLOAT_BYTES, Accounting
from mlorq.config.layer_overrides import search_json
from mlorq.errors import ConfigError
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

LARGEST_TABLE_BITS = 8


@dataclass(frozen=True)
class Params:
    """Metadata of the checkpoint: how bytes are counted, and the digest of the configuration.

    ``preparation`` has the bytes and digests of the tokenizer's files, which the key of the model does not depend on.
    """

    accounting: Accounting
    configuration: str
    preparation: dict[str, dict[str, Any]] = field(default_factory=dict)


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
    tables: ArtifactRef | None,
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
    inputs = Inputs(model, session.calibration_ref, layers, allocation, tuple(rounded), tables)
    params = Params(
        config.search.accounting, digest_json(configuration), preparation.described(session.model.preparation())
    )
    return STEP.spec(params, inputs, needs=Needs(device=False))


def describe(model: FloatModel, plan: ActivationPlan | None) -> dict[str, Any]:
    """The part of a checkpoint's metadata that does not depend on the budget."""
    found = {
        "architecture": model.architecture,
        "dtype": str(model.dtype).removeprefix("torch."),
        preparation.KEY: preparation.described(model.preparation()),
    }
    return found if plan is None else found | {"activations": plan.without_folds().to_json()}


def tables(session: Session) -> dict[str, int]:
    """Bit-widths of the embedding tables that are quantized, by name; the largest where the budget decides."""
    settings = session.config.embeddings
    if settings is None:
        return {}
    bits = settings.bits if isinstance(settings.bits, int) else LARGEST_TABLE_BITS
    return dict.fromkeys(find_tables(session.model.module, settings.smallest).tables, bits)


def _counted_tables(session: Session, module: nn.Module) -> int:
    """Bytes of the tables whose bit-widths the budget decides, at the largest: they are no part of the rest."""
    if not embeddings.are_chosen(session):
        return 0
    return sum(table_bytes(module, name, bits) for name, bits in tables(session).items())


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


def rest_memory(session: Session, layers: Sequence[Layer], model: ModelRef | None = None) -> int | None:
    """Bytes of everything but the compressible layers in the memory of the run's target; None without one.

    Exported graphs compute in float32, and embedding tables stay packed. ``model`` as in ``rest_bytes``.
    """
    target = session.config.target
    if target is None:
        return None
    module, packed = _with_quantizers(session, model or session.model_ref), tables(session)
    rest = float_rest(module, {layer.name: layer.aliases for layer in layers}, packed)
    return (
        sum(FLOAT_BYTES * prod(size.shape) for size in rest.values())
        + sum(table_bytes(module, name, bits) for name, bits in packed.items())
        - _counted_tables(session, module)
    )


def rest_bytes_bound(session: Session, layers: Sequence[Layer], model: ModelRef | None = None) -> int:
    """Upper bound in bytes of the rest of a checkpoint: everything but the compressible layers' weights.

    Without embedding tables whose bit-widths the integer program chooses.

    Args:
        session: of the run.
        layers: the compressible layers.
        model: the model with its activation plan, if that is known; default: the model as given.
    """
    ref = model or session.model_ref
    aliases = {layer.name: layer.aliases for layer in layers}
    description = describe(session.worker.context.model(ref), session.artifacts.plan(ref.activations))
    module = _with_quantizers(session, ref)
    bound = rest_upper_bound(
        module, aliases, description, accounting=session.config.search.accounting, tables=tables(session)
    )
    return bound - _counted_tables(session, module)


def run(params: Params, inputs: Inputs, context: Context, progress: Progress) -> dict[str, bytes]:
    artifacts, model, plan = context.artifacts, context.model(inputs.model), context.plan(inputs.model)
    context.paired.release()  # rounding is finished, and this step copies the model, too
    prepared = model.preparation()
    if preparation.described(prepared) != params.preparation:
        raise ConfigError(
            "the process that packs the checkpoint finds other files of the model's tokenizer or image processor: "
            "use the same files in all processes that run steps"
        )
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
    module = _without_weights(model.module, layers.layers).to("cpu")
    replace_layers(module, compressed, {layer.name: list(layer.aliases) for layer in layers.layers})
    replace_tables(module, artifacts.tables(inputs.embeddings))
    if plan is not None:
        plan.install(module)
    set_parameters(module, rest)
    allocation = artifacts.json(inputs.allocation, "allocation.json")
    description = {
        **describe(model, plan),
        preparation.KEY: params.preparation,
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
    files = checkpoint_files(module, description, macs={layer.name: layer.macs for layer in layers.layers})
    return files | preparation.placed(prepared)


def _without_weights(module: nn.Module, layers: Sequence[Layer]) -> nn.Module:
    """A copy of a module for its layers to be replaced: on the CPU it shares their weights with the original."""
    weights = [module.get_submodule(layer.name)._parameters.get("weight") for layer in layers]
    return copy_module(module, {id(one): one for one in weights if one is not None and one.device.type == "cpu"})


STEP = Step("compressed", 5, Params, Inputs, run)
