"""Weights that a model reads without calling their layer: they are found on a batch, and the model is rearranged.

- A linear layer whose weight is read (``F.linear(x, self.qkv.weight, bias)``) becomes a ``DirectLinear``.
- A parameter that is a matrix of a larger module becomes a ``ParameterLinear`` of its name.
- A parameter of several matrices, of which one at a time is read (experts), becomes a ``ParameterStack``.
- ``nn.MultiheadAttention`` becomes a ``ProjectedAttention``.

Each is then a layer like any other. Whatever does not have the model's outputs afterwards stays as it was. Checkpoints
name what was rearranged, so that a float model can be prepared for them without a batch, and state dicts of the
original classes can be made from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mlorq.errors import CheckpointError
from mlorq.models.arrangement import Arrangement
from mlorq.models.attention import OLD_BIAS, OLD_WEIGHTS, PROJECTIONS, ProjectedAttention, split
from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch, move_batch
from mlorq.models.copying import copy_module
from mlorq.models.direct import DirectLinear, DirectlyRead, ParameterLike, ParameterLinear
from mlorq.models.samples_axis import input_shapes, mark_samples_axis
from mlorq.models.stacked import AXES, ParameterStack, loop_over_experts, restore
from mlorq.models.transposed import is_transposed
from mlorq.models.weight_uses import WeightUses

CLOSE = {torch.float32: 1e-5}  # largest difference of the outputs, relative to their norm
CLOSE_HALF = 1e-2


def arrangement_of(module: nn.Module) -> Arrangement:
    """What is rearranged in a module, float or compressed."""
    named = dict(module.named_modules(remove_duplicate=False))
    inside = {f"{name}.out_proj" for name, one in named.items() if isinstance(one, ProjectedAttention)}
    stacks = {name: one for name, one in named.items() if isinstance(one, ParameterStack)}
    stacked = {f"{name}.{index}" for name, one in stacks.items() for index in range(len(one))}
    direct = {name: one for name, one in named.items() if name not in inside | stacked}
    parameters = tuple(name for name, one in direct.items() if isinstance(one, ParameterLike) and name not in stacks)
    return Arrangement(
        tuple(name for name, one in direct.items() if isinstance(one, DirectlyRead) and name not in parameters),
        parameters,
        tuple(name for name in (*parameters, *stacks) if is_transposed(named[name])),
        tuple(name for name, one in named.items() if isinstance(one, ProjectedAttention)),
        tuple(stacks),
    )


def arrange(module: nn.Module, wanted: Arrangement, *, values: bool = True) -> None:
    """Rearrange a float module, in place; parts that are rearranged already stay as they are.

    Args:
        module: the module.
        wanted: what to rearrange.
        values: whether new parameters have the values of the old ones, or arbitrary ones, to be filled.

    Raises:
        CheckpointError: the module has no such part.
    """
    for name in wanted.layers:
        layer = _part(module, name)
        if not isinstance(layer, DirectLinear):
            if not isinstance(layer, nn.Linear):
                raise CheckpointError(f"layer {name!r} is a {type(layer).__name__} in the model, not an nn.Linear")
            layer.__class__ = DirectLinear
    for name in (*wanted.parameters, *wanted.stacks):
        path, _, key = name.rpartition(".")
        parent = _part(module, path)
        if isinstance(parent._modules.get(key), ParameterLike):
            continue
        axes, kind = (AXES, "stack of matrices") if name in wanted.stacks else (2, "matrix")
        value = parent._parameters.get(key)
        if value is None or value.dim() != axes:
            raise CheckpointError(f"the model has no {kind} {name!r}")
        make = ParameterStack.of if name in wanted.stacks else ParameterLinear.of
        made: nn.Module = make(value, name in wanted.transposed, values=values)
        del parent._parameters[key]
        parent.add_module(key, made.train(parent.training))
    if wanted.stacks:
        loop_over_experts(module)
    for name in wanted.attention:
        attention = _part(module, name)
        if not isinstance(attention, nn.MultiheadAttention):
            raise CheckpointError(f"module {name!r} is a {type(attention).__name__}, not an nn.MultiheadAttention")
        if not isinstance(attention, ProjectedAttention):
            split(attention, values=values)


def original_state(state: Mapping[str, Tensor], arranged: Arrangement) -> dict[str, Tensor]:
    """The state dict of the original classes, from that of a rearranged float model.

    Weights of transposed parameters have been transposed back (``mlorq.models.transposed.transposed_back``).
    """
    found = dict(state)
    for name in arranged.parameters:
        if f"{name}.weight" in found:
            found[name] = found.pop(f"{name}.weight")
    for name in arranged.stacks:
        parts = [found.pop(f"{name}.{index}.weight") for index in range(_matrices(found, name))]
        if parts:
            found[name] = torch.stack(parts)
    for name in arranged.attention:
        prefix = f"{name}." if name else ""
        weights = [found.pop(f"{prefix}{one}.weight") for one in PROJECTIONS]
        biases = [found.pop(f"{prefix}{one}.bias", None) for one in PROJECTIONS]
        if all(weight.shape == (weight.shape[0],) * 2 for weight in weights):
            found[prefix + OLD_WEIGHTS[0]] = torch.cat(weights)
        else:
            found |= {prefix + old: weight for old, weight in zip(OLD_WEIGHTS[1:], weights, strict=True)}
        present = [bias for bias in biases if bias is not None]
        if present:
            found[prefix + OLD_BIAS] = torch.cat(present)
    return found


def _matrices(state: Mapping[str, Tensor], stack: str) -> int:
    """Number of matrices of a stack in a state dict."""
    count = 0
    while f"{stack}.{count}.weight" in state:
        count += 1
    return count


def arrange_direct_weights(model: FloatModel, batch: Batch, device: torch.device | str = "cpu") -> None:
    """Rearrange a float model, in place, so that weights which it reads directly belong to layers that it calls.

    Also marks layers whose inputs have samples on their second axis (``samples_axis``). One forward pass if there is
    neither. A model that cannot run on the batch stays as it is. Experts of transformers are then a loop
    (``stacked.loop_over_experts``), if their weights become layers.

    Args:
        model: the float model, on ``device``; a model that was rearranged before is not looked at again.
        batch: one batch of calibration data.
        device: device that the batch is moved to.
    """
    if model.arranged:
        return
    model.arranged = True
    moved = move_batch(batch, device, model.dtype)
    looped = loop_over_experts(model.module)
    try:
        with torch.no_grad():
            uses = WeightUses(model.module)
            try:
                with uses, input_shapes(model.module) as shapes:
                    wanted = model.outputs(model.module, moved)
            finally:
                uses.close()
            found = uses.arrangement()
            kept = _kept(model, found.items(), moved, wanted) if found else []
            arrange(model.module, Arrangement.of_items(kept))
            if any(item.stacks for item in kept):
                looped = {}
            if kept:  # layers that did not run before
                with input_shapes(model.module) as shapes:
                    model.outputs(model.module, moved)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the user's forward may raise anything: reported where layers are searched
        return
    finally:
        restore(looped)
    mark_samples_axis(model, moved, shapes)


def _kept(model: FloatModel, items: Sequence[Arrangement], batch: Batch, wanted: Tensor) -> list[Arrangement]:
    """The items after which the model has its own outputs, by halving."""
    if _holds(model, items, batch, wanted):
        return list(items)
    if len(items) == 1:
        return []
    half = len(items) // 2
    return _kept(model, items[:half], batch, wanted) + _kept(model, items[half:], batch, wanted)


def _holds(model: FloatModel, items: Sequence[Arrangement], batch: Batch, wanted: Tensor) -> bool:
    tensors = [*model.module.parameters(), *model.module.buffers()]
    try:
        module = copy_module(model.module, {id(value): value for value in tensors})  # shares all tensors
        arrange(module, Arrangement.of_items(items))
        found = model.outputs(module, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # code that asks for a tensor, or for a class
        return False
    close = CLOSE.get(model.dtype, CLOSE_HALF)
    return found.shape == wanted.shape and bool((found - wanted).norm() <= close * wanted.norm())


def _part(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"the model has no module {name!r}") from error
