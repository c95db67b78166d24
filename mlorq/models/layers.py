"""The compressible layers of a model in execution order, found by running it on one batch.

A compressible layer is ``y = W x + b``: ``nn.Linear``, a convolution on its unfolded input, or a transposed one whose
products are folded (``kinds``). Grouped convolutions are quantize-only. Order, multiply-accumulates and shared inputs
are observed during the pass, so they are correct for any module.
"""

from __future__ import annotations

import difflib
import fnmatch
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlorq.errors import ConfigError, MlorqError, ModelError, one_line
from mlorq.models.base import FloatModel
from mlorq.models.batches import batch_samples, describe_batch, move_batch
from mlorq.models.blocks import detect_blocks
from mlorq.models.direct import weight_of
from mlorq.models.direct_weights import arrange_direct_weights, arrangement_of
from mlorq.models.gradient_flow import without_gradient
from mlorq.models.kinds import CLASSES, known_kind
from mlorq.models.layer_list import EXCLUDED, Layer, LayerList, LeftFloat
from mlorq.models.left_float import NO_GRADIENT, left_float, other_weights, why_float, why_not_used
from mlorq.models.observe import LayerCalls, Observed, observe
from mlorq.models.sample_rows import choosing_tokens, rows_of_samples, seen_later
from mlorq.models.weight_range import small_rows

MOST_NAMED = 5  # layers that a message names with their reasons


def matrix_of(module: nn.Module) -> Tensor:
    """The weight W of a layer, ``(out_features, in_features)`` in its dtype; a view where possible."""
    return known_kind(module).to_matrix(weight_of(module).detach())


def weight_matrix(module: nn.Module) -> Tensor:
    """A copy of the weight W of a layer, ``(out_features, in_features)`` float32."""
    return matrix_of(module).to(torch.float32, copy=True).contiguous()


def set_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Copy W, ``(out_features, in_features)``, into the weight of a layer."""
    weight = weight_of(module)
    with torch.no_grad():
        weight.copy_(known_kind(module).to_weight(matrix, weight.shape))


def weight_identity(layer: nn.Module) -> int:
    """Equal for layers that share their weight, and only for these."""
    # A weight that is computed is a new tensor at each access, whose address is soon reused: the layer identifies it.
    weight = layer._parameters.get("weight")
    return id(layer if weight is None else weight)


def find_layers(
    model: FloatModel,
    batch: Any,
    *,
    more: Iterable[Any] = (),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> LayerList:
    """The compressible layers of a model, found by forward passes and a backward pass.

    A layer that cannot be compressed stays float and is listed with the reason; it does not refuse the model.

    Args:
        model: the float model, on ``device``; weights that it reads directly become layers
            (``mlorq.models.direct_weights``).
        batch: one batch of calibration data.
        more: further batches; they run only if the first reached some experts and not others.
        include: glob patterns of the names of layers to compress.
        exclude: glob patterns of the names of layers not to compress; wins over ``include``.
        device: device that the batch is moved to.

    Raises:
        ModelError: the model cannot be run on the batch, or no layer can be compressed.
        ConfigError: a pattern matches no layer.
    """
    arrange_direct_weights(model, batch, device)
    module = model.module
    moved = move_batch(batch, device, model.dtype)
    named = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    targets = {name: child for name, child in named.items() if isinstance(child, CLASSES)}
    for key, patterns in (("include", include), ("exclude", exclude)):
        _check_patterns(key, patterns, list(targets), named)
    try:
        blocks = model.blocks or detect_blocks(module, lambda: model.outputs(module, moved))
        seen = observe(model, moved, list(targets.values()), blocks)
        rows = rows_of_samples(model, moved, targets, seen)
        others = (move_batch(one, device, model.dtype) for one in more)
        first = seen
        seen, later = seen_later(model, others, targets, blocks, seen)
    except (MlorqError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the user's forward may raise anything
        raise ModelError(_cannot_run(batch, error)) from error
    samples = batch_samples(batch)
    if len(seen.weighed) > 1 or (seen.weighed and not seen.weighed[0].isdigit()):
        warnings.warn(
            f"the model returns no single tensor: errors are weighed in {_listed(seen.weighed)}"
            f"{', joined' if len(seen.weighed) > 1 else ''}; "
            "forward=callable(model, batch) -> Tensor chooses another output",
            stacklevel=2,
        )
    if seen.rows % samples:
        raise ModelError(
            f"the model returns {seen.rows} rows for {samples} samples: pass forward=callable(model, batch) -> Tensor "
            "with the samples on its first axis, or batches of one sample each"
        )
    groups: dict[int, list[str]] = {}
    for name, child in targets.items():
        groups.setdefault(weight_identity(child), []).append(name)
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for names in groups.values():
        # A shared weight is named after the module that runs first; modules that never run come last.
        names.sort(key=lambda name: _order(seen, targets[name], len(targets)))
        children = [targets[name] for name in names]
        calls = [seen.calls[id(child)] for child in children if id(child) in seen.calls]
        if not _matches(names, include) or _matches(names, exclude):
            reason: str | None = EXCLUDED
        else:
            reason = next((found for child in children if (found := why_float(child))), None)
            reason = (
                reason
                or why_not_used(seen, children)
                or next((rows.fixed[name] for name in names if name in rows.fixed), None)
            )
        if reason:
            reasons |= dict.fromkeys(names, reason)
        else:
            layers.append(_layer(names, children, calls, samples))
    layers.sort(key=lambda layer: layer.order)
    modules = {layer.name: [targets[name] for name in (layer.name, *layer.aliases)] for layer in layers}
    reasons |= dict.fromkeys(without_gradient(model, modules, moved) if modules else (), NO_GRADIENT)
    skipped = left_float(targets, groups.values(), reasons)
    layers = [layer for layer in layers if layer.name not in reasons]
    check_any(layers, skipped, include, exclude)
    small = [f"{count} in {layer.name}" for layer in layers if (count := small_rows(matrix_of(targets[layer.name])))]
    if small:
        warnings.warn(
            "rows of tiny weights may become zeros, because their errors are too small to be weighed: "
            f"{', '.join(small)}",
            stacklevel=2,
        )
    chosen = choosing_tokens(targets, rows.alone | later, arrangement_of(module).stacks, first)
    alone = tuple(layer.name for layer in layers if chosen & {layer.name, *layer.aliases})
    if alone and samples > 1:
        warnings.warn(
            f"statistics are taken one sample at a time: in batches of several samples, inputs of {len(alone)} layers "
            f"(tokens of an expert, or tokens without padding) belong to no sample: {_listed(alone)}",
            stacklevel=2,
        )
    return LayerList(layers, blocks, skipped, other_weights(module, seen), alone)


def check_any(
    layers: Sequence[Layer], skipped: Sequence[LeftFloat], include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> None:
    """Check that there is a layer to compress.

    Raises:
        ModelError: there is none; the message has the reasons.
    """
    if layers:
        return
    reasons = [f"{one.name!r}: {one.reason}" for one in skipped[:MOST_NAMED]]
    chosen = f" with include={list(include)} exclude={list(exclude)}" if skipped else ""
    listed = f" ({'; '.join(reasons)}{' …' if len(skipped) > MOST_NAMED else ''})" if reasons else ""
    raise ModelError(f"the model has no compressible layers{chosen}{listed}")


def _layer(names: Sequence[str], children: Sequence[nn.Module], calls: Sequence[LayerCalls], samples: int) -> Layer:
    first, child = min(calls, key=lambda call: call.order), children[0]
    kind = known_kind(child)
    rows, columns = kind.matrix_shape(weight_of(child).shape)
    return Layer(
        name=names[0],
        kind=kind.name,
        out_features=rows,
        in_features=columns,
        groups=getattr(child, "groups", 1),
        macs=sum(call.positions for call in calls) * rows * columns // samples,
        order=first.order,
        block=first.block,
        input_group=first.input_group,
        aliases=tuple(names[1:]),
    )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(repr, names[:MOST_NAMED])) + more


def _order(seen: Observed, child: nn.Module, last: int) -> int:
    return seen.calls[id(child)].order if id(child) in seen.calls else last


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_patterns(key: str, patterns: Sequence[str], names: Sequence[str], modules: Mapping[str, nn.Module]) -> None:
    """Refuse a pattern that matches no linear layer or convolution, unless there are none at all."""
    for pattern in patterns:
        if not names or _matches(names, [pattern]):
            continue
        inside = [name for name in names if name.startswith(f"{pattern}.")]
        near = difflib.get_close_matches(pattern, [*names, *modules], n=1, cutoff=0.4)
        hint = f"; for all layers inside it: {pattern + '.*'!r}" if inside else ""
        hint = hint or (f"; did you mean {near[0]!r}?" if near else "")
        raise ConfigError(
            f"search.{key}: pattern {pattern!r} matches no linear layer or convolution of the model{hint}"
        )


def _cannot_run(batch: Any, error: Exception) -> str:
    """Message for a model that fails on its first batch."""
    hint = ""
    if isinstance(error, TypeError) and isinstance(batch, (tuple, list)):
        hint = (
            "; the entries of a tuple or list are passed as one argument each: leave labels out, as in "
            "[inputs for inputs, labels in loader], or pass forward=callable(model, batch) -> Tensor"
        )
    if isinstance(error, TypeError) and isinstance(batch, Mapping):
        hint = (
            "; the entries of a mapping are passed as keyword arguments: leave out those that the model does not take, "
            "or pass forward=callable(model, batch) -> Tensor"
        )
    problem = f"{type(error).__name__}: {one_line(error)}"
    return f"the model cannot be run on the first calibration batch ({describe_batch(batch)}): {problem}{hint}"
