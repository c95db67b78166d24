"""The compressible layers of a model in execution order, found by hooks on one forward pass.

A compressible layer is ``y = W x + b``: ``nn.Linear``, or ``nn.Conv2d`` on its unfolded input
(``in_features = in_channels / groups · kh · kw``). Grouped convolutions are quantize-only. Order, multiply-accumulates
and shared inputs are observed during the pass, so they are correct for any module.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.base import FloatModel, batch_samples, move_batch
from mlorq.models.blocks import detect_blocks
from mlorq.models.layer_list import Layer, LayerList
from mlorq.models.left_float import why_float


def weight_matrix(module: nn.Module) -> Tensor:
    """A copy of the weight W of a layer, ``(out_features, in_features)`` float32."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().reshape(weight.shape[0], -1).to(torch.float32, copy=True)


def weight_identity(layer: nn.Module) -> int:
    """Equal for layers that share their weight, and only for these."""
    # A weight that is computed is a new tensor at each access, whose address is soon reused: the layer identifies it.
    weight = layer._parameters.get("weight")
    return id(layer if weight is None else weight)


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The input of a call of a layer, also of one with keywords: ``layer(input=x)``."""
    return args[0] if args else next(iter(kwargs.values()))


def input_tokens(module: nn.Module, inputs: Tensor, samples: int) -> Tensor:
    """Inputs of a layer's matrix product, grouped by sample: ``(samples, tokens, in_features)``.

    The input of a convolution is unfolded (if it is grouped, to ``groups · in_features``). If the leading axis has
    several rows per sample (windows, regions), these become tokens of the sample.

    Args:
        module: the layer; if its family set ``samples_axis = 1``, tokens are its first axis.
        inputs: the tensor that the layer is called with.
        samples: number of samples in it.

    Raises:
        ModelError: the leading size is not a multiple of the number of samples.
    """
    if isinstance(module, nn.Conv2d):
        inputs = _pad(module, inputs)
        padding = 0 if module.padding_mode != "zeros" or isinstance(module.padding, str) else module.padding
        columns = F.unfold(inputs, module.kernel_size, module.dilation, padding, module.stride)
        inputs = columns.transpose(1, 2)
    return _by_sample(inputs, samples, getattr(module, "samples_axis", 0))


def output_tokens(module: nn.Module, outputs: Tensor, samples: int) -> Tensor:
    """Output of a layer, or its gradient, grouped as by ``input_tokens``: ``(samples, tokens, out_features)``."""
    if isinstance(module, nn.Conv2d):
        outputs = outputs.flatten(2).transpose(1, 2)
    return _by_sample(outputs, samples, getattr(module, "samples_axis", 0))


def _pad(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        return inputs
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)


def _by_sample(values: Tensor, samples: int, axis: int = 0) -> Tensor:
    if axis:
        values = values.transpose(0, axis)
    if values.shape[0] % samples:
        raise ModelError(
            f"a layer has {values.shape[0]} leading rows, not a multiple of {samples} samples: put samples on the "
            "first axis"
        )
    return values.reshape(samples, -1, values.shape[-1])


def find_layers(
    model: FloatModel,
    batch: Any,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> LayerList:
    """The compressible layers of a model, found by one forward pass.

    Args:
        model: the float model, on ``device``.
        batch: one batch of calibration data.
        include: glob patterns of the names of layers to compress.
        exclude: glob patterns of the names of layers not to compress; wins over ``include``.
        device: device that the batch is moved to.

    Raises:
        ModelError: no compressible layer runs, or the patterns exclude all.
    """
    module = model.module
    named = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    kinds = (nn.Linear, nn.Conv2d)
    targets = {name: child for name, child in named.items() if isinstance(child, kinds)}
    moved = move_batch(batch, device, model.dtype)
    blocks = model.blocks or detect_blocks(module, lambda: model.outputs(module, moved))
    calls = _observe(model, moved, {id(child): child for child in targets.values()}, blocks)

    layers: list[Layer] = []
    skipped: list[tuple[str, str]] = []
    by_weight: dict[int, list[str]] = {}
    for name, child in targets.items():
        by_weight.setdefault(weight_identity(child), []).append(name)
    for names in by_weight.values():
        # A shared weight is named after the module that runs first; modules that never run come last.
        names.sort(key=lambda name: calls.get(id(targets[name]), {"order": len(targets)})["order"])
        seen = [calls[id(targets[name])] for name in names if id(targets[name]) in calls]
        reason = _reason_to_skip(names, targets[names[0]], bool(seen), include, exclude)
        if reason:
            skipped.extend((name, reason) for name in names)
            continue
        first = min(seen, key=lambda call: call["order"])
        child = targets[names[0]]
        rows, columns = child.weight.shape[0], child.weight[0].numel()
        layers.append(
            Layer(
                name=names[0],
                kind="conv2d" if isinstance(child, nn.Conv2d) else "linear",
                out_features=rows,
                in_features=columns,
                groups=getattr(child, "groups", 1),
                macs=sum(call["outputs"] for call in seen) * columns // batch_samples(batch),
                order=first["order"],
                block=first["block"],
                input_group=first["input_group"],
                aliases=tuple(names[1:]),
            )
        )
    if not layers:
        raise ModelError(
            "the model has no compressible layers"
            + (f" with include={list(include)} exclude={list(exclude)}" if targets else "")
        )
    layers.sort(key=lambda layer: layer.order)
    return LayerList(layers, blocks, skipped)


def _reason_to_skip(
    names: list[str], child: nn.Module, reached: bool, include: Sequence[str], exclude: Sequence[str]
) -> str | None:
    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)

    reason = why_float(child)
    if reason is not None:
        return reason
    if not reached:
        return "never reached by a forward pass"
    if not matches(include) or matches(exclude):
        return "excluded by the configuration"
    return None


UNFOLDING = ("kernel_size", "stride", "padding", "dilation", "padding_mode")


def _observe(
    model: FloatModel, batch: Any, targets: dict[int, nn.Module], blocks: list[str]
) -> dict[int, dict[str, int]]:
    """Order, completed blocks, output entries and input group of the calls in one forward pass, by id of the layer."""
    calls: dict[int, dict[str, int]] = {}
    complete = 0
    inputs: list[Tensor] = []  # kept alive so that no address is reused during the pass
    groups: dict[tuple[Any, ...], int] = {}

    def on_block(*_: Any) -> None:
        nonlocal complete
        complete += 1

    def on_layer(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        call = calls.get(id(child))
        if call is not None:
            call["outputs"] += output.numel()
            call["input_group"] = -call["order"] - 1  # called more than once: its own group
            return
        read = first_argument(args, kwargs)
        inputs.append(read)
        # The version distinguishes a tensor from itself after a change in place.
        # Convolutions that unfold one tensor differently have different inputs of their matrix products.
        unfolding = tuple(str(getattr(child, name, None)) for name in UNFOLDING)
        identity = (read.data_ptr(), read._version, complete, tuple(read.shape), unfolding)
        calls[id(child)] = {
            "order": len(calls),
            "block": complete,
            "outputs": output.numel(),
            "input_group": groups.setdefault(identity, len(groups)),
        }

    handles = [child.register_forward_hook(on_layer, with_kwargs=True) for child in targets.values()]
    handles += [model.module.get_submodule(name).register_forward_hook(on_block) for name in blocks]
    try:
        with torch.no_grad():
            model.outputs(model.module, batch)
    finally:
        for handle in handles:
            handle.remove()
    return calls
