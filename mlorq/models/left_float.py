"""What keeps a layer from being replaced by a compressed one.

A compressed layer computes ``y = W x + b`` from its own copy of W and b. It can stand for a layer that does the same
and nothing else. A layer is more than its class: hooks run with it, an instance can have a ``forward`` of its own, and
a weight may be computed at every access. The model must also call it, on rows that belong to samples, and the output's
gradient must reach it. Other layers stay float, and are named with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from mlorq.models.computed_weights import computed_tensors
from mlorq.models.direct import DirectLinear
from mlorq.models.kinds import CLASSES, Kind, kind_of, why_not_a_product
from mlorq.models.layer_list import OTHER, UNUSED, LeftFloat
from mlorq.models.observe import Observed
from mlorq.models.weight_range import why_float as out_of_range

NO_GRADIENT = (
    "it affects the model's output, but no gradient of the output reaches it (no_grad, detach, rounding): its errors "
    "cannot be weighed"
)
_METHODS = ("forward", "_conv_forward", "__call__")


def why_float(layer: nn.Module) -> str | None:
    """Reason why a linear layer or convolution cannot be replaced, apart from how the model uses it; or None."""
    kind = kind_of(layer)
    if kind is None:
        return f"it is a {type(layer).__name__}"
    code = DirectLinear if isinstance(layer, DirectLinear) else kind.layer
    return own_code(layer, code) or why_not_a_product(layer) or _own_tensors(layer, kind)


def own_code(layer: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a layer runs beside, or instead of, the code of ``kind``; None if nothing."""
    name = type(layer).__name__
    for method in _METHODS:
        if getattr(type(layer), method, None) is not getattr(kind, method, None):
            return f"{name} has a {method.strip('_')} of its own"
        if method in vars(layer):
            return f"its {method.strip('_')} was replaced on the instance"
    hooks = [*layer._forward_pre_hooks.values(), *layer._forward_hooks.values()]
    if hooks:
        return f"a hook runs with it: {_described(hooks[0])}"
    return None


def _own_tensors(layer: nn.Module, kind: Kind) -> str | None:
    computed = computed_tensors(layer)
    if computed or not isinstance(layer._parameters.get("weight"), Tensor):
        return f"its {computed[0] if computed else 'weight'} is computed on every access"
    if "bias" not in layer._parameters:
        return "its bias is computed on every access"
    for name in ("weight", "bias"):  # a property of the class comes before the parameter
        if hasattr(type(layer), name) and not isinstance(layer, DirectLinear):
            return f"its {name} is computed on every access"
    weight = layer._parameters["weight"]
    assert weight is not None
    if not weight.is_floating_point() or weight.is_sparse:
        return f"its weight is {'sparse' if weight.is_sparse else str(weight.dtype).removeprefix('torch.')}"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if weight.numel() == 0:
        return "its weight is empty"
    return out_of_range(kind.to_matrix(weight))


def _described(hook: object) -> str:
    named = getattr(hook, "__qualname__", None) or type(hook).__qualname__
    return str(named).rpartition("<locals>.")[2]


def why_not_used(seen: Observed, children: Sequence[nn.Module]) -> str | None:
    """Reason why layers with one weight cannot be replaced that a forward pass shows; or None.

    Args:
        seen: what the pass showed.
        children: the layers with that weight.
    """
    if any(seen.reached(child) for child in children):
        return None
    reader = next(
        (found for child in children if (found := seen.readers.get(id(child._parameters.get("weight"))))), None
    )
    return UNUSED if reader is None else f"never called: its weight is read directly, by {reader}"


def left_float(
    layers: Mapping[str, nn.Module], groups: Iterable[Sequence[str]], reasons: Mapping[str, str]
) -> list[LeftFloat]:
    """The records of layers that stay float.

    Args:
        layers: layers by name.
        groups: names of layers that share a weight.
        reasons: by name.
    """
    found = []
    for names in groups:
        size = sum(
            value.nbytes for key, value in layers[names[0]]._parameters.items() if value is not None and key != "bias"
        )
        for index, name in enumerate(names):
            reason = reasons.get(name) or reasons.get(names[0])
            if reason:
                found.append(LeftFloat(name, reason, 0 if index else size))
    return found


def other_weights(module: nn.Module, seen: Observed) -> list[LeftFloat]:
    """Parameters of at least two axes that belong neither to linear layers nor to convolutions."""
    found: list[LeftFloat] = []
    layers = [child for child in module.modules() if isinstance(child, CLASSES)]
    done = {id(value) for child in layers for value in child._parameters.values()}
    for path, child in module.named_modules():
        for key, value in child._parameters.items():
            if value is None or id(value) in done or sum(size > 1 for size in value.shape) < 2:
                continue
            done.add(id(value))
            name = path if isinstance(child, nn.Embedding) and key == "weight" else f"{path}.{key}".lstrip(".")
            reader = seen.readers.get(id(value))
            parameter, table = OTHER
            reason = f"{parameter}{type(child).__name__}" + (f", read by {reader}" if reader else "")
            if isinstance(child, nn.Embedding):
                reason = f"{table} (option embeddings quantizes tables)"
            found.append(LeftFloat(name, reason, value.nbytes))
    return found
