"""Detection of a model's chain of blocks by hooks on one forward pass.

A chain is a sequence of children of one container. Each is called exactly once, and its first argument is the tensor
that the previous one returned. Names and classes are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SHORTEST_CHAIN = 2


def detect_blocks(module: nn.Module, run: Callable[[], Any]) -> list[str]:
    """Names of the blocks of the chain with the most parameters; empty if there is no chain.

    Args:
        module: the model.
        run: runs one forward pass of the model.
    """
    containers = {
        name: [f"{name}.{child}" if name else child for child, _ in container.named_children()]
        for name, container in module.named_modules()
        if isinstance(container, (nn.ModuleList, nn.Sequential, nn.ModuleDict))
    }
    watched = {child for children in containers.values() for child in children}
    calls: dict[str, list[tuple[int, Any, Any]]] = {name: [] for name in watched}
    order = 0

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal order
            first = args[0] if args else next(iter(kwargs.values()), None)
            # Kept alive until the end of the pass, so that an address is not reused by another tensor.
            calls[name].append((order, first, output))
            order += 1

        return record

    handles = [
        module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in sorted(watched)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()

    best: list[str] = []
    for children in containers.values():
        chain = _longest_chain([name for name in children if len(calls[name]) == 1], calls)
        if len(chain) >= SHORTEST_CHAIN and _params(module, chain) > _params(module, best):
            best = chain
    return best


def _longest_chain(names: list[str], calls: Mapping[str, list[tuple[int, Any, Any]]]) -> list[str]:
    """The longest sequence of children in which each reads the output of the previous one."""
    ordered = sorted(names, key=lambda name: calls[name][0][0])
    best: list[str] = []
    current: list[str] = []
    for name in ordered:
        if current and not _is_same(calls[current[-1]][0][2], calls[name][0][1]):
            current = []
        current.append(name)
        if len(current) > len(best):
            best = list(current)
    return best


def _is_same(output: Any, first: Any) -> bool:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not isinstance(first, Tensor):
        return False
    if output is first or not output.numel():  # tensors without values have no address: experts without tokens
        return output is first
    return output.data_ptr() == first.data_ptr() and output.shape == first.shape


def _params(module: nn.Module, names: list[str]) -> int:
    return sum(value.numel() for name in names for value in module.get_submodule(name).parameters())
