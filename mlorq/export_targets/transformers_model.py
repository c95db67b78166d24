"""A checkpoint's model as an instance of a class of transformers, with the quantizer that saves it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.checkpoint.entry import LayerEntry, dtype_name
from mlorq.checkpoint.io import inspect, load
from mlorq.errors import CheckpointError, one_line
from mlorq.export_targets.timm_wrapper import wrap
from mlorq.huggingface.quantizer import MlorqConfig, MlorqQuantizer
from mlorq.models.computed_weights import merge_computed_weights, merged_tensors
from mlorq.models.direct_weights import arrangement_of
from mlorq.models.sentence import SentenceEncoder


def pretrained_model(checkpoint: str) -> tuple[Any, dict[str, Any]]:
    """The model of a checkpoint, ready for ``save_pretrained``, and the result of ``inspect``.

    Args:
        checkpoint: folder or fsspec URL of a compressed model.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or its model is not of transformers or timm.
    """
    from transformers import PreTrainedModel

    info = inspect(checkpoint)
    module, prefix = load(checkpoint), ""
    architecture = info["architecture"]
    if architecture.get("family") == "timm":
        module, prefix = wrap(module, architecture, checkpoint), "timm_model."
    if isinstance(module, SentenceEncoder):
        raise CheckpointError(
            f"checkpoint {checkpoint}: the encoder has dense layers after its pooling, which a model of transformers "
            "cannot hold: load it with mlorq.load"
        )
    if not isinstance(module, PreTrainedModel):
        raise CheckpointError(
            f"checkpoint {checkpoint} has a model of family {architecture.get('family')!r} "
            f"({type(module).__name__}); the target transformers takes models of transformers and timm"
        )
    config = MlorqConfig(
        layers=[_prefixed(row, prefix) for row in info["layers"]],
        dtype=dtype_name(module.dtype),
        attention=architecture.get("attention"),
        activations=_prefixed_plan(info.get("activations"), prefix),
        arranged=arrangement_of(module).to_json() or None,
    )
    _complete(module, config, checkpoint)
    model: Any = module
    if (config.arranged or {}).get("stacks"):
        model._weight_conversions = []  # names as in the model: ``MlorqQuantizer.update_weight_conversions``
    model.config.quantization_config = config
    model.hf_quantizer = MlorqQuantizer(config)
    return model, info


def _prefixed(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    entry = LayerEntry.from_json(row).to_json()
    names = {"layer": prefix + entry["layer"], "aliases": [prefix + name for name in entry["aliases"]]}
    return {**entry, **names, "shape": list(entry["shape"])}


def _prefixed_plan(plan: Mapping[str, Any] | None, prefix: str) -> dict[str, Any] | None:
    if not plan:
        return None
    sites = [
        {**site, "name": prefix + site["name"], "layers": [prefix + name for name in site["layers"]]}
        for site in plan["sites"]
    ]
    found = {**plan, "sites": sites}
    if mlps := plan.get("mlps"):
        names = [(mlp["activation"], mlp["layers"]) for mlp in mlps]
        found["mlps"] = [
            {"activation": f"{prefix}{activation}", "layers": [f"{prefix}{layer}" for layer in layers]}
            for activation, layers in names
        ]
    return found


def _complete(module: Any, config: MlorqConfig, checkpoint: str) -> None:
    """Add to a configuration where the model differs from a new instance of its class, on which weights are loaded.

    Raises:
        CheckpointError: the names or shapes of the tensors would differ.
    """
    try:
        blank = _skeleton(module)
        config.merged = merged_tensors(module, blank)
        merge_computed_weights(blank, config.merged)
        modules = {name for name, _ in module.named_modules(remove_duplicate=False)}
        surplus = [name for name, _ in blank.named_modules(remove_duplicate=False) if name not in modules]
        config.absent = [name for name in surplus if name.rpartition(".")[0] in modules]
        # The quantizer changes the configuration that it gets.
        MlorqQuantizer(deepcopy(config)).preprocess_model(blank)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {checkpoint} does not fit its class: {one_line(error)}") from error
    ours, theirs = module.state_dict(), blank.state_dict()
    wrong = sorted(name for name in {*ours, *theirs} if _shape(ours.get(name)) != _shape(theirs.get(name)))
    if wrong:
        raise CheckpointError(
            f"checkpoint {checkpoint}: tensor {wrong[0]!r} would differ in a new {type(module).__name__}: "
            "load the checkpoint with mlorq.load"
        )
    config.dtypes = {
        name: dtype_name(tensor.dtype)
        for name, tensor in _tensors(module).items()
        if tensor.is_floating_point() and tensor.dtype != _tensors(blank)[name].dtype
    }


def _skeleton(module: Any) -> Any:
    """A new instance of the model's class on the meta device, in its dtype."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return type(module)._from_config(deepcopy(module.config), dtype=module.dtype).eval()


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that are not stored."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
