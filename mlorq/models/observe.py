"""One forward pass with hooks: which layers run, in which order, on which inputs; which weights are read directly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlorq.models.base import FloatModel
from mlorq.models.batches import Batch, batch_samples
from mlorq.models.output_tensors import weighed_outputs
from mlorq.models.unfolding import leading_size, positions, reading


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The input of a call of a layer, also of one with keywords: ``layer(input=x)``."""
    return args[0] if args else next(iter(kwargs.values()))


@dataclass
class LayerCalls:
    """The calls of a layer in one forward pass.

    Attributes:
        order: number of layers that ran before its first call.
        block: number of complete blocks before its first call.
        input_group: equal for layers that read the same tensor; negative if the layer is called more than once.
        positions: vectors that its matrix multiplies.
        rows: leading size of the input of each call.
    """

    order: int
    block: int
    input_group: int
    positions: int = 0
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Observed:
    """What one forward pass shows.

    Attributes:
        calls: by id of the layer.
        readers: ``{id of a parameter: name of the function}`` that read it outside the layers' own calls.
        outputs: f(x), ``(rows, outputs)``.
        weighed: names of the tensors that make up the outputs, if the model returns several.
    """

    calls: dict[int, LayerCalls]
    readers: dict[int, str]
    outputs: Tensor
    weighed: Sequence[str] = ()

    @property
    def rows(self) -> int:
        """Number of rows of the model's outputs."""
        return len(self.outputs)

    def reached(self, layer: nn.Module) -> bool:
        """Whether a layer's matrix multiplied a vector: a call without rows multiplies none."""
        return id(layer) in self.calls and self.calls[id(layer)].positions > 0

    def joined(self, other: Observed) -> Observed:
        """This pass, with the calls of layers that only another pass reached, in their place in the order."""
        ours, theirs = (
            sorted((key for key, call in one.calls.items() if call.positions), key=lambda key: one.calls[key].order)
            for one in (self, other)
        )
        groups = {other.calls[key].input_group: self.calls[key].input_group for key in ours if key in other.calls}
        last = max((call.input_group for call in self.calls.values()), default=-1)
        calls = {key: self.calls[key] for key in ours}
        after: dict[int | None, list[int]] = {}  # new layers, by the last known one that ran before them
        known: int | None = None
        for key in theirs:
            if key in calls:
                known = key
                continue
            group = other.calls[key].input_group
            if group not in groups:
                last += 1
                groups[group] = last if group >= 0 else group
            calls[key] = replace(other.calls[key], input_group=groups[group])
            after.setdefault(known, []).append(key)
        order = [*after.get(None, ()), *(one for key in ours for one in (key, *after.get(key, ())))]
        for place, key in enumerate(order):
            group = calls[key].input_group
            calls[key] = replace(calls[key], order=place, input_group=group if group >= 0 else -place - 1)
        return replace(self, calls=calls)


def observe(model: FloatModel, batch: Batch, layers: Sequence[nn.Module], blocks: Sequence[str]) -> Observed:
    """Observe one forward pass.

    Args:
        model: the float model.
        batch: a batch on its device.
        layers: the layers to observe.
        blocks: names of the model's blocks.
    """
    calls: dict[int, LayerCalls] = {}
    complete = 0
    inputs: list[Tensor] = []  # kept alive so that no address is reused during the pass
    groups: dict[tuple[Any, ...], int] = {}
    readers = _Readers(model.module)

    def on_block(*_: Any) -> None:
        nonlocal complete
        complete += 1

    def on_layer(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        readers.inside -= 1
        read = first_argument(args, kwargs)
        call = calls.get(id(child))
        if call is None:
            inputs.append(read)
            # The version distinguishes a tensor from itself after a change in place.
            # Convolutions that unfold one tensor differently have different inputs of their matrix products.
            identity: tuple[Any, ...] = (read.data_ptr(), read._version, complete, tuple(read.shape), reading(child))
            if not read.numel():  # an expert without tokens: such tensors have no address
                identity = (id(child),)
            call = calls[id(child)] = LayerCalls(len(calls), complete, groups.setdefault(identity, len(groups)))
        else:
            call.input_group = -call.order - 1  # called more than once: its own group
        call.positions += positions(child, read, output)
        call.rows.append(leading_size(child, read))

    def enter(*_: Any) -> None:
        readers.inside += 1

    layers = list({id(child): child for child in layers}.values())  # a layer with two names has its hooks once
    handles = [child.register_forward_pre_hook(enter) for child in layers]
    handles += [child.register_forward_hook(on_layer, with_kwargs=True) for child in layers]
    handles += [model.module.get_submodule(name).register_forward_hook(on_block) for name in blocks]
    try:
        with torch.no_grad(), readers:
            returned = model.returned(model.module, batch)
            outputs = model.joined(returned, batch)
    finally:
        for handle in handles:
            handle.remove()
    return Observed(calls, readers.found, outputs, weighed_outputs(returned, batch_samples(batch)))


class _Readers(TorchFunctionMode):
    """Records the functions that read parameters, also through views, while no observed layer runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inside = 0
        self.found: dict[int, str] = {}
        self._by_place = by_place(module)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self.inside == 0 and name != "__get__" and isinstance(result, (Tensor, tuple, list)):
            for value in tensors_in((args, kwargs or {})):
                known = self._by_place.get(place(value))
                if known is not None and not (isinstance(result, Tensor) and place(result) == place(value)):
                    self.found.setdefault(known, name)
        return result


def by_place(module: nn.Module) -> dict[tuple[Any, ...], int]:
    """Ids of a module's parameters, by the places of their values in memory."""
    return {place(value): id(value) for value in module.parameters() if value.numel()}


def place(value: Tensor) -> tuple[Any, ...]:
    """Where a tensor's values are in memory; equal for views of one tensor."""
    try:
        return value.device, value.untyped_storage().data_ptr() if value.layout == torch.strided else id(value)
    except (NotImplementedError, RuntimeError):  # inside torch.vmap, by which models make their masks
        return value.device, id(value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments, also inside mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


@contextmanager
def outputs_changed(modules: Sequence[nn.Module], change: Any) -> Iterator[None]:
    """Change the outputs of layers while this is active: ``change(output)`` takes the place of each."""
    handles = [child.register_forward_hook(lambda _, __, output: change(output)) for child in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
