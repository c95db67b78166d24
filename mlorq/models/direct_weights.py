"""Weights that a model reads without calling their layer: they are found on a batch, and the model is rearranged.

- A linear layer whose weight is read (``F.linear(x, self.qkv.weight, bias)``) becomes a ``DirectLinear``.
- A parameter that is a matrix of a larger module becomes a ``ParameterLinear`` of its name.
- ``nn.MultiheadAttention`` becomes a ``ProjectedAttention``.

Each is then a layer like any other. Whatever does not have the model's outputs afterwards stays as it was. Checkpoints
name what was rearranged, so that a float model can be prepared for them without a batch, and state dicts of the
original classes can be made from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlorq.errors import CheckpointError
from mlorq.models.attention import OLD_BIAS, OLD_WEIGHTS, PROJECTIONS, ProjectedAttention, split
from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch, move_batch
from mlorq.models.copying import copy_module
from mlorq.models.direct import (
    PRODUCTS,
    SWAPPED,
    DirectLinear,
    DirectlyRead,
    ParameterLike,
    ParameterLinear,
    linear_arguments,
)
from mlorq.models.kinds import CLASSES
from mlorq.models.left_float import own_code, why_float
from mlorq.models.observe import by_place, place, tensors_in
from mlorq.models.samples_axis import input_shapes, mark_samples_axis
from mlorq.models.transposed import is_transposed

CLOSE = {torch.float32: 1e-5}  # largest difference of the outputs, relative to their norm
CLOSE_HALF = 1e-2
LINEAR, PRODUCT, FLIPPED, ATTENTION = "F.linear", "x @ w", "x @ w.T", "attention"  # how a weight is read
_FLIPS = (torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Arrangement:
    """What is rearranged in a model, by names.

    Attributes:
        layers: linear layers whose weight is read directly.
        parameters: parameters that become linear layers.
        transposed: those of the parameters that are ``(in_features, out_features)``.
        attention: attention modules whose projections become layers.
    """

    layers: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.layers or self.parameters or self.attention)

    def items(self) -> list[Arrangement]:
        """Arrangements of one module or parameter each."""
        return [
            *(Arrangement(layers=(name,)) for name in self.layers),
            *(
                Arrangement(parameters=(name,), transposed=(name,) if name in self.transposed else ())
                for name in self.parameters
            ),
            *(Arrangement(attention=(name,)) for name in self.attention),
        ]

    @classmethod
    def of_items(cls, items: Iterable[Arrangement]) -> Arrangement:
        """The inverse of ``items``."""
        found = list(items)
        return cls(*(tuple(name for one in found for name in getattr(one, key)) for key in cls.__dataclass_fields__))

    def renamed(self, rename: Callable[[str], str | None]) -> Arrangement:
        """The arrangement with other names; parts without a new name are left out."""
        parts = ((new for name in getattr(self, key) if (new := rename(name))) for key in self.__dataclass_fields__)
        return Arrangement(*map(tuple, parts))

    def to_json(self) -> dict[str, list[str]]:
        """Lists of names, without empty ones."""
        return {key: list(names) for key, names in asdict(self).items() if names}

    @classmethod
    def from_json(cls, value: Any) -> Arrangement:
        """The inverse of ``to_json``; ValueError if the value is something else."""
        if not isinstance(value, Mapping) or not set(value) <= set(cls.__dataclass_fields__):
            raise ValueError("the arrangement of the model's weights has unknown keys")
        if not all(isinstance(names, list) and all(isinstance(one, str) for one in names) for names in value.values()):
            raise ValueError("the arrangement of the model's weights must be lists of names")
        return cls(**{key: tuple(names) for key, names in value.items()})


def arrangement_of(module: nn.Module) -> Arrangement:
    """What is rearranged in a module, float or compressed."""
    named = dict(module.named_modules(remove_duplicate=False))
    inside = {f"{name}.out_proj" for name, one in named.items() if isinstance(one, ProjectedAttention)}
    parameters = tuple(name for name, one in named.items() if isinstance(one, ParameterLike))
    return Arrangement(
        tuple(
            name
            for name, one in named.items()
            if isinstance(one, DirectlyRead) and name not in inside and name not in parameters
        ),
        parameters,
        tuple(name for name in parameters if is_transposed(named[name])),
        tuple(name for name, one in named.items() if isinstance(one, ProjectedAttention)),
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
    for name in wanted.parameters:
        path, _, key = name.rpartition(".")
        parent = _part(module, path)
        if isinstance(parent._modules.get(key), ParameterLinear):
            continue
        value = parent._parameters.get(key)
        if value is None or value.dim() != 2:
            raise CheckpointError(f"the model has no matrix {name!r}")
        layer = ParameterLinear.of(value, name in wanted.transposed, values=values)
        del parent._parameters[key]
        parent.add_module(key, layer.train(parent.training))
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


def arrange_direct_weights(model: FloatModel, batch: Batch, device: torch.device | str = "cpu") -> None:
    """Rearrange a float model, in place, so that weights which it reads directly belong to layers that it calls.

    Also marks layers whose inputs have samples on their second axis (``samples_axis``). One forward pass if there is
    neither. A model that cannot run on the batch stays as it is.

    Args:
        model: the float model, on ``device``; a model that was rearranged before is not looked at again.
        batch: one batch of calibration data.
        device: device that the batch is moved to.
    """
    if model.arranged:
        return
    model.arranged = True
    moved = move_batch(batch, device, model.dtype)
    try:
        with torch.no_grad():
            uses = _Uses(model.module)
            try:
                with uses, input_shapes(model.module) as shapes:
                    wanted = model.outputs(model.module, moved)
            finally:
                uses.close()
            found = uses.arrangement()
            kept = _kept(model, found.items(), moved, wanted) if found else []
            arrange(model.module, Arrangement.of_items(kept))
            if kept:  # layers that did not run before
                with input_shapes(model.module) as shapes:
                    model.outputs(model.module, moved)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the user's forward may raise anything: reported where layers are searched
        return
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


class _Uses(TorchFunctionMode):
    """Records how a forward pass uses the matrices of a module, while no linear layer or convolution runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.how: dict[int, set[str]] = {}
        self.biases: dict[int, set[int]] = {}
        self._inside = 0
        self._known = {id(value): value for value in module.parameters()}
        self._places = by_place(module)
        self._flipped: dict[int, tuple[Tensor, int]] = {}  # a transposed matrix, which is kept alive, and its parameter
        layers = [child for child in module.modules() if isinstance(child, CLASSES)]
        self._handles = [child.register_forward_pre_hook(self._enter) for child in layers]
        self._handles += [child.register_forward_hook(self._leave, always_call=True) for child in layers]

    def _enter(self, *_: Any) -> None:
        self._inside += 1

    def _leave(self, *_: Any) -> None:
        self._inside -= 1

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            return result
        expected: set[int] = set()  # ids of arguments whose use is understood
        if func is F.linear:
            _, weight, bias = linear_arguments(args, kwargs)
            if id(weight) in self._known:
                self._note(id(weight), LINEAR)
                self.biases.setdefault(id(weight), set()).add(id(bias))
                expected |= {id(weight), id(bias)}
        elif func in PRODUCTS and len(args) == 2 and not kwargs:
            if id(args[1]) in self._known:
                self._note(id(args[1]), PRODUCT)
                expected.add(id(args[1]))
            elif id(args[1]) in self._flipped:
                self._note(self._flipped[id(args[1])][1], FLIPPED)
                expected.add(id(args[1]))
        elif func is F.multi_head_attention_forward:
            for value in tensors_in((args, kwargs)):
                if id(value) in self._known:
                    self._note(id(value), ATTENTION)
                    expected.add(id(value))
        elif args and id(args[0]) in self._known and _flips(func, args, kwargs):
            self._flipped[id(result)] = (result, id(args[0]))
            expected.add(id(args[0]))
        self._note_others(func, args, kwargs, result, expected)
        return result

    def _note_others(self, func: Any, args: Any, kwargs: Any, result: Any, expected: set[int]) -> None:
        name = getattr(func, "__name__", "")
        if name == "__get__" or not isinstance(result, (Tensor, tuple, list)):
            return
        for value in tensors_in((args, kwargs)):
            if id(value) not in expected and result is not value:
                owner = self._places.get(place(value))
                if owner is not None:
                    self._note(owner, name)

    def _note(self, parameter: int, how: str) -> None:
        self.how.setdefault(parameter, set()).add(how)

    def arrangement(self) -> Arrangement:
        """What can be rearranged, from the uses that were seen."""
        owners: dict[int, int] = {}
        for child in self.module.modules():
            for value in child._parameters.values():
                owners[id(value)] = owners.get(id(value), 0) + 1
        layers: list[str] = []
        parameters: list[str] = []
        transposed: list[str] = []
        attention: list[str] = []
        for path, child in self.module.named_modules():
            if type(child) is nn.MultiheadAttention:
                values = [child._parameters.get(key) for key in (*OLD_WEIGHTS, OLD_BIAS)]
                values += [child.out_proj._parameters.get("weight")]
                present = [value for value in values if value is not None]
                if (
                    all(self.how.get(id(value)) == {ATTENTION} and owners[id(value)] == 1 for value in present)
                    and own_code(child, nn.MultiheadAttention) is None
                    and why_float(child.out_proj) is None
                ):
                    attention.append(path)
                continue
            if isinstance(child, nn.Linear) and path and not isinstance(child, DirectLinear):
                weight, bias = (child._parameters.get(key) for key in ("weight", "bias"))
                how = self.how.get(id(weight), set())
                own = bias is None or (how == {LINEAR} and self.biases[id(weight)] == {id(bias)})
                if how and how <= {LINEAR, FLIPPED} and own and not is_transposed(child) and why_float(child) is None:
                    layers.append(path)
                continue
            if isinstance(child, (*CLASSES, nn.Embedding)):
                continue
            for key, value in child._parameters.items():
                how = self.how.get(id(value), set())
                if value is None or value.dim() != 2 or not value.is_floating_point() or owners[id(value)] != 1:
                    continue
                if how and (how <= {LINEAR, FLIPPED} or how == {PRODUCT}):
                    parameters.append(f"{path}.{key}".lstrip("."))
                    transposed += parameters[-1:] if how == {PRODUCT} else []
        return Arrangement(tuple(layers), tuple(parameters), tuple(transposed), tuple(attention))


def _flips(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call transposes a matrix."""
    if kwargs or args[0].dim() != 2:
        return False
    if func in (torch.transpose, Tensor.transpose):
        return tuple(args[1:]) in SWAPPED
    return len(args) <= 2 and any(func == one for one in _FLIPS)


def _part(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"the model has no module {name!r}") from error
