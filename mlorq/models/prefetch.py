"""Batches on their way to a device: the next one is made ready while the model works on the current one.

A helper thread asks for the batch, which is where images are decoded, casts it to the model's dtype and, for a CUDA
device, puts it into page-locked memory. The caller's thread then only starts the copy, which does not wait for the work
that is queued on the device before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mlorq.models.base import Batch


def feed(
    batches: Sequence[Batch], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Iterator[Batch]:
    """The batches in their order, each on the device.

    Args:
        batches: on the CPU.
        device: where to.
        dtype: of floating tensors; None: as they are.
    """
    target = torch.device(device)
    on_cuda = target.type == "cuda"

    def prepared(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        return tensor.pin_memory() if on_cuda and tensor.device.type == "cpu" else tensor

    def ready(index: int) -> Batch:
        # Page-locked memory belongs to a device's context: without this a thread would open one on the first device.
        with torch.cuda.device(target) if on_cuda else nullcontext():
            return _each_tensor(batches[index], prepared)

    with ThreadPoolExecutor(1, thread_name_prefix="mlorq-feed") as pool:
        coming = pool.submit(ready, 0) if len(batches) else None
        for index in range(len(batches)):
            assert coming is not None
            batch = coming.result()
            coming = pool.submit(ready, index + 1) if index + 1 < len(batches) else None
            yield _each_tensor(batch, lambda tensor: tensor.to(target, non_blocking=on_cuda))


def _each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: _each_tensor(value, change) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        changed: Any = [_each_tensor(value, change) for value in batch]
        return type(batch)(changed)
    return batch
