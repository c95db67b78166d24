"""The quantizer of transformers that loads and saves compressed models: ``quant_method: mlorq``.

``config.json`` is the model's own, with a ``quantization_config`` that describes every compressed layer as the
checkpoint does. Before transformers loads the weights, the model is a skeleton on the meta device: its layers are
replaced by empty ``CompressedModule`` instances. The tensors are then loaded by name, and ``save_pretrained`` writes
them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mlorq.activations.plan import ActivationPlan, quantizers_of
from mlorq.checkpoint.entry import LayerEntry, dtype_of
from mlorq.huggingface.placement import Rename, compressed_modules, install_entry, renamed_entry, renamed_plan, renaming
from mlorq.models.arrangement import Arrangement
from mlorq.models.computed_weights import merge_computed_weights
from mlorq.models.direct_weights import arrange
from mlorq.models.library_layers import simplify_library_layers
from mlorq.models.transposed import transpose_conv1d

METHOD = "mlorq"
FORMAT_VERSION = 1
# Of layers in blocks of columns, or with ReLU in the place of GELU, which readers of version 1 miss.
LATER_VERSION = 2


def _version_of(layers: Sequence[Mapping[str, Any]], activations: Mapping[str, Any] | None) -> int:
    """The version that says what a model needs; malformed ones are refused later (``MlorqConfig.entries``)."""
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
        later = (activations or {}).get("mlps") or any(LayerEntry.from_json(row).in_blocks for row in layers)
        return LATER_VERSION if later else FORMAT_VERSION
    return FORMAT_VERSION


class MlorqConfig(QuantizationConfigMixin):
    """The object ``quantization_config`` of ``config.json``.

    Attributes:
        layers: the compressed layers, as ``LayerEntry.to_json`` gives them, with their names in the model.
        dtype: dtype of the saved model. If the model is loaded in another one, all layers compute in that.
        dtypes: ``{tensor: dtype}`` of the floating tensors whose dtypes differ from ``dtype``.
        attention: implementation of attention that the outputs were measured with, used unless the user asks for
            another; None: the default of transformers.
        absent: modules that the constructor builds but the model does not have, such as an unused pooler.
        activations: quantized activations (``ActivationPlan.to_json``), or None.
        arranged: weights that the model's classes read directly (``Arrangement.to_json``), or None.
        merged: tensors that the model's classes compute (``weight_norm``), and that are stored by their values.
        format_version: version of this object; default: the one that the layers need.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Any]] = (),
        dtype: str = "float32",
        dtypes: Mapping[str, str] | None = None,
        attention: str | None = None,
        absent: Sequence[str] = (),
        activations: Mapping[str, Any] | None = None,
        arranged: Mapping[str, Any] | None = None,
        merged: Sequence[str] = (),
        format_version: int | None = None,
        quant_method: str = METHOD,
    ) -> None:
        needed = _version_of(layers, activations)
        if format_version not in (None, FORMAT_VERSION, needed):
            raise ValueError(
                f"quantization_config has format version {format_version!r}; "
                f"this version of mlorq reads {FORMAT_VERSION}"
            )
        self.quant_method = quant_method  # type: ignore[assignment] # registered methods are strings
        self.format_version = needed if format_version is None else format_version
        self.layers = [dict(layer) for layer in layers]
        self.dtype = dtype
        self.dtypes = dict(dtypes or {})
        self.attention = attention
        self.absent = list(absent)
        self.activations = dict(activations) if activations else None
        self.arranged = dict(arranged) if arranged else None
        self.merged = list(merged)

    def entries(self) -> list[LayerEntry]:
        """The compressed layers; ValueError if one is malformed."""
        try:
            return [LayerEntry.from_json(layer) for layer in self.layers]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"quantization_config: a layer is malformed: {error!r}") from error


class MlorqQuantizer(HfQuantizer):
    """Replaces the layers of a model before its weights are loaded; saves compressed models."""

    requires_calibration = True  # models are compressed by mlorq.compress, not while they are loaded
    quantization_config: MlorqConfig

    def __init__(self, quantization_config: MlorqConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._stored_names: set[str] = set()

    def update_attn_implementation(self, config: Any) -> Any:
        """Use the stored implementation of attention if none is requested."""
        if self.quantization_config.attention is not None and config._attn_implementation is None:
            config._attn_implementation = self.quantization_config.attention
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        """Make the skeleton that of the compressed model.

        The names in ``quantization_config`` become those in this model: a classifier's layers have a prefix that the
        encoder's own class lacks. Layers that the model does not have, such as the classifier itself, are dropped.

        Raises:
            ValueError: the configuration is malformed, or no layer is in the model.
            ModelError: a layer has another class or shape.
        """
        transpose_conv1d(model, values=False)
        config = self.quantization_config
        if config.arranged:
            arranged = Arrangement.from_json(config.arranged).renamed(renaming(model))
            arrange(model, arranged, values=False)
            config.arranged = arranged.to_json()
        config.merged = _renamed_merged(config.merged, renaming(model))
        merge_computed_weights(model, config.merged)
        rename = renaming(model)
        config.absent = [name for name in map(rename, config.absent) if name is not None]
        for name in config.absent:
            *parents, attribute = name.split(".")
            setattr(model.get_submodule(".".join(parents)), attribute, None)
        found = (renamed_entry(entry, rename) for entry in config.entries())
        entries = [entry for entry in found if entry is not None]
        if not entries:
            raise ValueError(f"quantization_config: {type(model).__name__} has none of the compressed layers")
        simplify_library_layers(model, {path for entry in entries for path in (entry.layer, *entry.aliases)})
        saved_dtype = model.dtype == dtype_of(config.dtype)
        for entry in entries:
            install_entry(model, entry, own_dtype=saved_dtype)
        _untie(model, {f"{path}.weight" for entry in entries for path in (entry.layer, *entry.aliases)})
        if config.activations:
            plan = renamed_plan(ActivationPlan.from_json(config.activations), rename)
            plan.install(model)
            config.activations = plan.to_json()
        config.layers = [entry.to_json() for entry in entries]
        named = ((rename(tensor), dtype) for tensor, dtype in config.dtypes.items())
        config.dtypes = {tensor: dtype for tensor, dtype in named if tensor is not None}
        if saved_dtype:
            _set_dtypes(model, config.dtypes)
        self._stored_names = {
            name for entry in entries for path in (entry.layer, *entry.aliases) for name in entry.tensor_names(path)
        }
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Read experts that are layers by their names in the model: a file of theirs has not one tensor per expert."""
        if (self.quantization_config.arranged or {}).get("stacks"):
            return [one for one in weight_conversions if type(one).__name__ == "PrefixChange"]  # not in every version
        updated: list[Any] = super().update_weight_conversions(weight_conversions, model)  # type: ignore[no-untyped-call]
        return updated

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales keep their dtypes: rules such as ``_keep_in_fp32_modules`` do not apply to them."""
        names = getattr(converter, "target_patterns", None) or [""]
        if names[0] in self._stored_names:
            return None
        wanted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return wanted

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Share the tensors of layers with one weight; restore the dtypes of buffers that are not stored."""
        for entry in self.quantization_config.entries():
            stored = model.get_submodule(entry.layer).stored_tensors()
            for path in entry.aliases:
                model.get_submodule(path)._buffers.update(stored)
        if model.dtype == dtype_of(self.quantization_config.dtype):
            _set_dtypes(model, self.quantization_config.dtypes)
        for module in compressed_modules(model):
            module.drop_cache()  # the model's initialisation may have read, and overwritten, a dequantized matrix
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The state of a model, with shared tensors of compressed layers and quantizers under each of their names.

        safetensors does not store shared memory, and transformers knows only the sharing that a model class declares.
        """
        state: dict[str, Tensor] = model.state_dict()
        owners = [*compressed_modules(model), *quantizers_of(model)]
        owned = {tensor.data_ptr() for owner in owners for tensor in owner.buffers(recurse=False) if tensor.numel()}
        seen: set[int] = set()
        for name, tensor in state.items():
            place = tensor.data_ptr()
            if place in owned:
                state[name] = tensor.clone() if place in seen else tensor
                seen.add(place)
        return state, {}

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what ``from_pretrained`` read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes are not trained here; ``mlorq`` trains scales, biases and norms before it exports."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` traces the dequantization."""
        return True


def _renamed_merged(names: Sequence[str], rename: Rename) -> list[str]:
    """Names of computed tensors, which are not among a model's own, by those of their layers."""
    pairs = [name.rpartition(".") for name in names]
    found = [(rename(path), name) for path, _, name in pairs]
    return [f"{path}.{name}" for path, name in found if path is not None]


def _untie(model: Any, weights: set[str]) -> None:
    """Forget that weights which are no parameters any more are tied, such as that of a language model's head."""
    tied = model.all_tied_weights_keys
    model.all_tied_weights_keys = {
        target: source for target, source in tied.items() if target not in weights and source not in weights
    }


def _set_dtypes(model: Any, dtypes: Mapping[str, str]) -> None:
    """Cast parameters and buffers, given by name, in place."""
    for name, dtype in dtypes.items():
        tensor = model.get_parameter_or_buffer(name)
        tensor.data = tensor.data.to(dtype_of(dtype))


# Importing this module registers it: ``registration`` imports it, once transformers has its table of quantizers.
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(MlorqConfig)
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(MlorqQuantizer)
