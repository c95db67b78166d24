"""Step ``pack``: the compressed checkpoint, a folder that ``mlorq.load`` needs no other file for."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from torch import nn

from mlorq.artifacts.hashing import digest_json
from mlorq.artifacts.store import ArtifactRef
from mlorq.checkpoint.float_sizes import rest_by_kind
from mlorq.checkpoint.format import checkpoint_files, float_rest, rest_upper_bound
from mlorq.config.layer_overrides import search_json
from mlorq.forms.embedding_tables import find_tables, replace_tables
from mlorq.forms.modules import replace_layers
from mlorq.models.layers import Layer
from steps import embeddings
from steps.base import Progress, Step, StepSpec
from steps.context import Workbench


def spec(bench: Workbench, layers: ArtifactRef, allocation: ArtifactRef, rounded: Sequence[ArtifactRef]) -> StepSpec:
    """Depends on the artifacts that changed each layer last and, for what it says of itself, the allocation."""
    search = bench.config.search
    activations = bench.config.activations
    configuration = {
        "preset": bench.config.preset,
        "search": search_json(search),
        "rounding": bench.config.rounding.model_dump(mode="json"),
        "seed": bench.config.seed,
        **({} if activations is None else {"activations": activations.model_dump(mode="json")}),
    }
    if bench.config.embeddings is not None:
        configuration["embeddings"] = bench.config.embeddings.model_dump(mode="json")
    inputs: dict[str, ArtifactRef | str] = {
        **bench.model_inputs,
        "calibration": bench.calibration.key,
        "layers": layers,
        "allocation": allocation,
        **embeddings.inputs(bench),
    }
    inputs |= {f"round/{index}": ref for index, ref in enumerate(rounded)}
    return STEP.spec(
        {"accounting": search.accounting, "configuration": digest_json(configuration)}, inputs, device=False
    )


def describe(bench: Workbench) -> dict[str, Any]:
    """What a checkpoint of this model says of itself, as far as it is known before a budget is."""
    model = bench.model
    found = {"architecture": model.architecture, "dtype": str(model.dtype).removeprefix("torch.")}
    return found if bench.plan is None else found | {"activations": bench.plan.without_folds().to_json()}


def tables(bench: Workbench) -> dict[str, int]:
    """Bits of the embedding tables that are quantized, by name."""
    settings = bench.config.embeddings
    if settings is None:
        return {}
    return dict.fromkeys(find_tables(bench.model.module, settings.smallest).tables, settings.bits)


def _with_quantizers(bench: Workbench) -> nn.Module:
    """The float model with its activation quantizers, where it has any."""
    module = bench.model.module
    if bench.plan is not None:
        module = deepcopy(module)
        bench.plan.install(module)
    return module


def rest_kinds(bench: Workbench, layers: Sequence[Layer]) -> dict[str, int]:
    """What of a checkpoint stays float, in bytes by kind."""
    aliases = {layer.name: layer.aliases for layer in layers}
    return rest_by_kind(float_rest(_with_quantizers(bench), aliases, tables(bench)))


def rest_bytes_bound(bench: Workbench, layers: Sequence[Layer]) -> int:
    """Most bytes of a checkpoint that are not the compressible layers' weights."""
    aliases = {layer.name: layer.aliases for layer in layers}
    module = _with_quantizers(bench)
    accounting = bench.config.search.accounting
    return rest_upper_bound(module, aliases, describe(bench), accounting=accounting, tables=tables(bench))


def run(spec: StepSpec, bench: Workbench, progress: Progress) -> dict[str, bytes]:
    layers = bench.layer_list(spec.artifact("layers"))
    compressed = {}
    for index, layer in enumerate(layers.layers):
        found, _ = bench.rounded(spec.artifact(f"round/{index}"))
        compressed[layer.name] = next(item for item in found if item.layer == layer.name)
        progress(index + 1, len(layers.layers))
    module = deepcopy(bench.model.module).to("cpu")
    replace_layers(module, compressed, {layer.name: list(layer.aliases) for layer in layers.layers})
    replace_tables(module, bench.tables(spec.optional_artifact("embeddings")))
    if bench.plan is not None:
        bench.plan.install(module)
    allocation = bench.store.read_json(spec.artifact("allocation"), "allocation.json")
    description = {
        **describe(bench),
        "budget": {
            "asked": allocation["budget"],
            "budget_bytes": allocation["budget_bytes"],
            "accounting": spec.params["accounting"],
        },
        "hashes": {
            "model": bench.float_model.key,
            "calibration": spec.inputs["calibration"],
            "configuration": spec.params["configuration"],
        },
    }
    return checkpoint_files(module, description)


STEP = Step("compressed", 2, run)
