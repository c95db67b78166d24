"""Prefetching of batches to a device: the next batch is prepared while the model processes the current one.

A helper thread reads the batch (which decodes images), casts it to the dtype of the model and, for a CUDA device, pins
its memory. The caller's thread then only starts the copy, which is asynchronous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import torch
from torch import Tensor

from mlorq.models.batches import Batch, map_tensors


def feed(
    batches: Sequence[Batch], device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> Iterator[Batch]:
    """Iterate over batches in order, each copied to a device.

    Args:
        batches: batches on the CPU.
        device: target device.
        dtype: dtype of floating-point tensors; None: unchanged.
    """
    target = torch.device(device)
    on_cuda = target.type == "cuda"

    def prepared(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        return tensor.pin_memory() if on_cuda and tensor.device.type == "cpu" else tensor

    def ready(index: int) -> Batch:
        # Pinning needs a device context: without this, the thread would create one on the first device.
        with torch.cuda.device(target) if on_cuda else nullcontext():
            return map_tensors(batches[index], prepared)

    with ThreadPoolExecutor(1, thread_name_prefix="mlorq-feed") as pool:
        coming = pool.submit(ready, 0) if len(batches) else None
        for index in range(len(batches)):
            assert coming is not None
            batch = coming.result()
            coming = pool.submit(ready, index + 1) if index + 1 < len(batches) else None
            yield map_tensors(batch, lambda tensor: tensor.to(target, non_blocking=on_cuda))
