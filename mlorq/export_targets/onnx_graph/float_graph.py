"""The graph of the float architecture, with the dense weights of a compressed model.

PyTorch's exporter that traces with ``torch.export`` is tried first, the older one that traces calls second.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from mlorq.activations.products import ProductQuantizers, attach_input
from mlorq.errors import ModelError, one_line
from mlorq.export_targets.onnx_graph.activations import QuantizeDequantize, registered, replaced, translations
from mlorq.export_targets.onnx_graph.calls import Flat
from mlorq.export_targets.onnx_graph.norms import split_batch_norms
from mlorq.export_targets.onnx_graph.positions import resize_in_graph
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.convolutions import CompressedConvolution, CompressedTransposed
from mlorq.forms.modules import CompressedDirect, CompressedEmbedding, CompressedLinear, swap_module
from mlorq.models.copying import copy_module
from mlorq.models.direct import weight_of

OPSET = 21  # the first with 4-bit integers
GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
OLD_OPSET = 18  # of the older exporter; its graph is converted


def float_twin(module: nn.Module, *, quantized: bool = True) -> tuple[nn.Module, dict[str, CompressedModule]]:
    """A float32 copy of a model with float layers in place of compressed ones, and the compressed ones by name.

    Quantizers of activations are replaced by modules that exporters write as operators, batch normalisations by ones
    that exporters do not merge with layers.

    Args:
        module: the model.
        quantized: whether its activations stay quantized.
    """
    twin = copy_module(module).float()
    for child in twin.modules():
        config: Any = getattr(child, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # decoders would also return a cache, which is not a tensor
    found: dict[str, CompressedModule] = {}
    for path, child in list(twin.named_modules()):
        if isinstance(child, CompressedModule):
            found[path] = child
            layer = float_layer(child)
            for other in [name for name, one in twin.named_modules(remove_duplicate=False) if one is child]:
                swap_module(twin, other, child, layer)
            quantizer: Any = getattr(child, "input_quantizer", None)
            if quantizer is not None and quantized:
                quantizer = replaced(quantizer)
                # What has code of its own may not use the layer's bias.
                if isinstance(quantizer, QuantizeDequantize) and type(layer) is nn.Linear:
                    quantizer.move_shift(layer)
                attach_input(layer, quantizer)
        elif isinstance(child, ProductQuantizers) and not quantized:
            child.operands.clear()
        elif isinstance(child, ProductQuantizers):
            for name, quantizer in child.operands.items():
                child.operands[name] = replaced(quantizer)
    if found:
        split_batch_norms(twin)
    resize_in_graph(twin)
    return twin.eval().requires_grad_(False), found


def float_layer(layer: CompressedModule) -> nn.Module:
    """A float32 layer with the dense weight and the bias of a compressed one."""
    has_bias = layer.bias is not None
    made: nn.Module
    if isinstance(layer, CompressedLinear):
        made = nn.Linear(layer.in_features, layer.out_features, has_bias, device="meta")
    elif isinstance(layer, CompressedConvolution):
        geometry: dict[str, Any] = {name: getattr(layer, name) for name in GEOMETRY}
        if isinstance(layer, CompressedTransposed):
            geometry["output_padding"] = layer.output_padding
        made = layer.float_class(**geometry, bias=has_bias, device="meta")
    else:
        assert isinstance(layer, CompressedEmbedding), layer
        made = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    made.weight = nn.Parameter(weight_of(layer).detach().float().clone(), requires_grad=False)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().float().clone(), requires_grad=False)
    if isinstance(layer, CompressedDirect):  # other code multiplies with its weight
        made.__class__ = layer.float_class
        made.transposed = layer.transposed  # type: ignore[assignment]
    layer.drop_cache()
    return made


def float_graph(
    module: Flat, inputs: Mapping[str, Tensor], outputs: Sequence[str], axes: Mapping[str, Mapping[int, str]]
) -> onnx.ModelProto:
    """The graph of a module.

    Args:
        module: the module, which takes ``inputs`` by position.
        inputs: example inputs by name.
        outputs: names of the outputs.
        axes: names of the dynamic axes of the inputs: ``{"x": {0: "batch"}}``.

    Raises:
        ModelError: no exporter can trace the module; the message has the reason.
    """
    problems = []
    for export in (_traced, _recorded):
        try:
            with quiet(), torch.no_grad(), registered():
                found = export(module, inputs, outputs, axes)
            return found
        except Exception as error:
            problems.append(one_line(error)[:300])
    raise ModelError(f"the model cannot be exported: {problems[0]}; the exporter without torch.export: {problems[1]}")


def _traced(
    module: Flat, inputs: Mapping[str, Tensor], outputs: Sequence[str], axes: Mapping[str, Mapping[int, str]]
) -> onnx.ModelProto:
    dynamic = tuple({axis: torch.export.Dim.DYNAMIC for axis in axes.get(name, {})} for name in inputs)
    program: Any = torch.onnx.export(
        module,
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes={"values": dynamic},
        input_names=list(inputs),
        output_names=list(outputs),
        custom_translation_table=translations(),
        verbose=False,
    )
    found: onnx.ModelProto = program.model_proto
    return found


def _recorded(
    module: Flat, inputs: Mapping[str, Tensor], outputs: Sequence[str], axes: Mapping[str, Mapping[int, str]]
) -> onnx.ModelProto:
    from onnx import version_converter

    file: Any = io.BytesIO()
    torch.onnx.export(
        module,
        tuple(inputs.values()),
        file,
        dynamo=False,
        opset_version=OLD_OPSET,
        input_names=list(inputs),
        output_names=list(outputs),
        dynamic_axes={name: dict(own) for name, own in axes.items()},
    )
    return version_converter.convert_version(onnx.load_from_string(file.getvalue()), OPSET)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporters' warnings and output for the duration of a ``with`` block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
