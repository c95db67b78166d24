"""Loops of many small GPU kernels: availability of Triton, and steps replayed as CUDA graphs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache

import torch

OLDEST_GPU = (7, 0)  # least compute capability that Triton supports
WARM_UP = 3  # calls before recording: libraries and optimisers initialise in the first ones


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton can compile kernels for a device; its launcher needs a C compiler."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or torch.cuda.get_device_capability(device) < OLDEST_GPU:
        return False
    # Triton caches compiled kernels in the home folder, which is often read-only in containers.
    if "TRITON_CACHE_DIR" not in os.environ and not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-")
    return True


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """A function equivalent to ``step`` that replays it as a CUDA graph after ``WARM_UP`` calls.

    Args:
        step: runs on the current CUDA device, always on the same tensors, and never synchronises. Inputs that change
            between calls are tensors that the caller fills.
    """
    calls = 0
    graph: torch.cuda.CUDAGraph | None = None

    def call() -> None:
        nonlocal calls, graph
        calls += 1
        if calls <= WARM_UP:
            step()
            return
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
        graph.replay()

    return call
