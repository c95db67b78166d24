"""Conditions under which a model runs in this library, so that hooks see every layer.

- Fused attention of ``nn.TransformerEncoder`` reads the weights of its layers without calling them; it is switched off.
- Activation checkpointing would run parts of the model again in the backward pass, when our hooks are gone. It saves
  memory and changes no value; it is switched off.
- Models that keep tensors from one pass to the next (the state of a recurrence) would keep the graph of one step of
  training for the next; what a step leaves in a model is removed.
- Decoders of transformers hand a cache of keys and values to their blocks. A block that is run again, on stored
  arguments, would attend to what it has added before; no cache is asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as checkpointing
from torch import nn

_lock = threading.Lock()
_running = 0  # passes of all threads: these settings belong to the process
_settings = ExitStack()


@contextmanager
def plain_passes() -> Iterator[None]:
    """Run models without fused layers and without activation checkpointing, in all threads, until the last one ends."""
    global _running, _settings
    with _lock:
        _running += 1
        if _running == 1:
            _settings = ExitStack()
            _settings.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
            torch.backends.mha.set_fastpath_enabled(False)
            _settings.enter_context(_instead(checkpointing, "_checkpoint_without_reentrant_generator", _nothing))
            _settings.enter_context(_instead(checkpointing.CheckpointFunction, "apply", _called))
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if _running == 0:
                _settings.close()


@contextmanager
def without_cache(module: nn.Module) -> Iterator[None]:
    """Run a model of transformers without a cache of keys and values, which no single pass needs."""
    configurations = [getattr(child, "config", None) for child in module.modules()]
    caching = {id(one): one for one in configurations if getattr(one, "use_cache", None) is True}
    for one in caching.values():
        one.use_cache = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for one in caching.values():
            one.use_cache = True  # type: ignore[union-attr]


@contextmanager
def leaving_no_trace(module: nn.Module) -> Iterator[None]:
    """Restore attributes, buffers, and the contents of lists and dictionaries in attributes at the end."""
    before = [
        (places, dict(places), {name: value.copy() for name, value in places.items() if type(value) in (list, dict)})
        for places in map(vars, module.modules())
    ]
    try:
        yield
    finally:
        for places, values, contents in before:
            for name in [name for name in places if name not in values]:
                del places[name]
            places.update(values)
            for name, content in contents.items():
                value = values[name]
                if isinstance(value, list):
                    value[:] = content
                else:
                    value.clear()
                    value.update(content)


@contextmanager
def _instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute, if there is one of that name, and restore it at the end."""
    if not hasattr(owner, name):  # a version of torch that has it elsewhere
        yield
        return
    own, before = name in vars(owner), vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _nothing(*_: Any, **__: Any) -> Iterator[None]:
    """In place of what ``checkpoint`` does before and after its function."""
    yield


def _called(function: Callable[..., Any], _: bool, *args: Any) -> Any:
    """In place of ``CheckpointFunction.apply``."""
    return function(*args)
