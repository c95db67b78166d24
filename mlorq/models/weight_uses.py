"""How a forward pass uses the weights of a model outside its layers' own calls, and what can be rearranged for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlorq.models.arrangement import Arrangement
from mlorq.models.attention import OLD_BIAS, OLD_WEIGHTS
from mlorq.models.direct import PRODUCTS, SWAPPED, DirectLinear, linear_arguments
from mlorq.models.kinds import CLASSES
from mlorq.models.left_float import own_code, why_float
from mlorq.models.observe import by_place, place, tensors_in
from mlorq.models.stacked import AXES, is_item
from mlorq.models.transposed import is_transposed

LINEAR, PRODUCT, FLIPPED, ATTENTION = "F.linear", "x @ w", "x @ w.T", "attention"  # how a weight is read
_FLIPS = (torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
_UNBIND = (torch.unbind, Tensor.unbind)


class WeightUses(TorchFunctionMode):
    """Records how a forward pass uses the matrices of a module, while no linear layer or convolution runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.how: dict[int, set[str]] = {}
        self.biases: dict[int, set[int]] = {}
        self._inside = 0
        self._known = {id(value): value for value in module.parameters()}
        self._places = by_place(module)
        # Matrices made from parameters, which are kept alive, and these: transposed ones, and items of stacks.
        self._flipped: dict[int, tuple[Tensor, int]] = {}
        self._items: dict[int, tuple[Tensor, int]] = {}
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
            if (owner := self._matrix(weight)) is not None:
                self._note(owner, LINEAR)
                self.biases.setdefault(owner, set()).add(id(bias))
                expected |= {id(weight), id(bias)}
        elif func in PRODUCTS and len(args) == 2 and not kwargs:
            if (owner := self._matrix(args[1])) is not None:
                self._note(owner, PRODUCT)
                expected.add(id(args[1]))
            elif id(args[1]) in self._flipped:
                self._note(self._flipped[id(args[1])][1], FLIPPED)
                expected.add(id(args[1]))
        elif func is F.multi_head_attention_forward:
            for value in tensors_in((args, kwargs)):
                if id(value) in self._known:
                    self._note(id(value), ATTENTION)
                    expected.add(id(value))
        elif args and (owner := self._matrix(args[0])) is not None and _flips(func, args, kwargs):
            self._flipped[id(result)] = (result, owner)
            expected.add(id(args[0]))
        elif args and id(args[0]) in self._known and (found := _items(func, args, kwargs, result)):
            self._items |= {id(item): (item, id(args[0])) for item in found}
            expected.add(id(args[0]))
        self._note_others(func, args, kwargs, result, expected)
        return result

    def _matrix(self, value: Any) -> int | None:
        """The parameter that a value is, or one matrix of; None if it is neither."""
        if id(value) in self._items:
            return self._items[id(value)][1]
        return id(value) if id(value) in self._known and value.dim() < AXES else None

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
        stacks: list[str] = []
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
                if value is None or not value.is_floating_point() or owners[id(value)] != 1:
                    continue
                kind = {2: parameters, AXES: stacks}.get(value.dim())
                if kind is not None and how and (how <= {LINEAR, FLIPPED} or how == {PRODUCT}):
                    kind.append(f"{path}.{key}".lstrip("."))
                    transposed += kind[-1:] if how == {PRODUCT} else []
        return Arrangement(tuple(layers), tuple(parameters), tuple(transposed), tuple(attention), tuple(stacks))


def _items(func: Any, args: tuple[Any, ...], kwargs: Any, result: Any) -> tuple[Tensor, ...]:
    """The matrices of a parameter of three axes that a call takes out of it; empty if it does something else."""
    if args[0].dim() != AXES:
        return ()
    if func is Tensor.__getitem__ and is_item(args[1]):
        return (result,)
    along = (*args[1:], *kwargs.values()) or (0,)
    return tuple(result) if func in _UNBIND and along in ((0,), (-AXES,)) else ()


def _flips(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call transposes a matrix."""
    if kwargs or args[0].dim() != 2:
        return False
    if func in (torch.transpose, Tensor.transpose):
        return tuple(args[1:]) in SWAPPED
    return len(args) <= 2 and any(func == one for one in _FLIPS)
