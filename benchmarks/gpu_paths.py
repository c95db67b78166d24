"""What is done for GPUs alone, against the same computation launched kernel by kernel, as ratios in one run.

    python benchmarks/gpu_paths.py

One layer of 384 × 1536 with random weights: times do not depend on their values. Compiling is not timed. Trellis codes
are compared with those of the loops on the CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlorq.fitting import gptq as rounding
from mlorq.fitting import trellis, viterbi
from mlorq.fitting.gptq import RowHessian
from mlorq.fitting.hessian_fit import HessianFit
from mlorq.fitting.scale_search import search_quantizer
from mlorq.fitting.settings import FitSettings
from mlorq.fitting.trellis import TrellisFit
from mlorq.forms.base import Candidate
from mlorq.rounding import adaptive_rounding
from mlorq.rounding.base import RoundingTask
from mlorq.rounding.lra import Lra, LraSettings
from mlorq.rounding.paired_forward import InputMoments

ROWS, COLUMNS = 384, 1536
ITERATIONS = 1000


def seconds(function: Callable[[], object], repeats: int = 3) -> float:
    """Best of a few calls, after one that is not timed."""
    function()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def with_and_without(owner: Any, name: str, other: Any, function: Callable[[], object]) -> tuple[float, float]:
    """Seconds as it is, and with ``other`` in the place of one of a module's functions."""
    fast = seconds(function)
    own = getattr(owner, name)
    setattr(owner, name, other)
    try:
        return fast, seconds(function, 1)
    finally:
        setattr(owner, name, own)


def by_column(_: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """Functions that launch some kernels a column."""
    return rounding.gptq_block, rounding.descend_block


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda:0")
    device = parser.parse_args().device
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5).to(device)
    tokens = torch.randn(4 * COLUMNS, COLUMNS, generator=generator).to(device).double()
    second = tokens.T @ tokens / len(tokens)
    hessian, quantizer = RowHessian(second), search_quantizer(weight, 3, (0.99, 1.0))
    _ = hessian.shares
    nearest = quantizer.quantize(weight)
    moments = InputMoments(second, torch.zeros_like(second), torch.zeros_like(second), len(tokens))
    fit = HessianFit(weight, torch.ones_like(weight), FitSettings())
    codes = TrellisFit(second, torch.eye(ROWS, dtype=torch.float64, device=device), 0)
    settings = LraSettings(iterations=ITERATIONS)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}\n")
    print("| computation | fast, s | kernel by kernel, s | ratio |\n|---|---|---|---|")

    def learn(candidate: Candidate) -> Callable[[], object]:
        task = RoundingTask("layer", candidate, fit, fit.output_metric, moments)
        return lambda: Lra().round(task, settings)

    for name, owner, part, other, function in (
        (
            "trellis codes of 1, 2 and 3 bits",
            trellis,
            "tensor_functions",
            lambda device, bits: viterbi.tensor_functions(torch.device("cpu"), bits),
            lambda: codes.codes_of_widths(weight, [1, 2, 3]),
        ),
        ("GPTQ", rounding, "_block_functions", by_column, lambda: rounding.gptq(weight, hessian, quantizer)),
        (
            "one sweep of coordinate descent",
            rounding,
            "_block_functions",
            by_column,
            lambda: rounding.descend(weight, hessian, quantizer, nearest),
        ),
        (
            f"{ITERATIONS} LRA iterations, Q",
            adaptive_rounding,
            "has_kernels",
            lambda device: False,
            learn(Candidate("Q", bits=3)),
        ),
        (
            f"{ITERATIONS} LRA iterations, rank 96",
            adaptive_rounding,
            "has_kernels",
            lambda device: False,
            learn(Candidate("LR", rank=96, bits_a=4, bits_b=4)),
        ),
    ):
        fast, slow = with_and_without(owner, part, other, function)
        print(f"| {name} | {fast:.4f} | {slow:.4f} | {slow / fast:.1f} |", flush=True)


if __name__ == "__main__":
    main()
