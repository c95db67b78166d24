"""What keeps a layer from being replaced by a compressed one.

A compressed layer computes ``y = W x + b`` from its own copy of W and b. It can stand for a layer that does the same
and nothing else. A layer is more than its class: hooks run with it, an instance can have a ``forward`` of its own, and
a weight may be computed at every access. Such layers stay float, and are named with the reason.
"""

from __future__ import annotations

from torch import Tensor, nn

from mlorq.models.computed_weights import computed_tensors

KINDS = (nn.Linear, nn.Conv2d)
_METHODS = ("forward", "_conv_forward", "__call__")


def why_float(layer: nn.Module) -> str | None:
    """Reason why a linear layer or convolution cannot be replaced, apart from how the model uses it; or None."""
    kind = next((kind for kind in KINDS if isinstance(layer, kind)), None)
    if kind is None:
        return f"it is a {type(layer).__name__}"
    return own_code(layer, kind) or _own_tensors(layer)


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


def _own_tensors(layer: nn.Module) -> str | None:
    computed = computed_tensors(layer)
    if computed or not isinstance(layer._parameters.get("weight"), Tensor):
        return f"its {computed[0] if computed else 'weight'} is computed on every access"
    if "bias" not in layer._parameters:
        return "its bias is computed on every access"
    weight = layer._parameters["weight"]
    assert weight is not None
    if not weight.is_floating_point() or weight.is_sparse:
        return f"its weight is {'sparse' if weight.is_sparse else str(weight.dtype).removeprefix('torch.')}"
    if type(weight.data) is not Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def _described(hook: object) -> str:
    named = getattr(hook, "__qualname__", None) or type(hook).__qualname__
    return str(named).rpartition("<locals>.")[2]
