"""A whole run by stage, without Prefect: CPU-seconds, products of matrices, and their share of the stage's time.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/stages.py examples/minilm.yaml --set preset=fast

GFLOP are those of torch's matrix products, attention, convolutions and factorisations in the steps' own thread; loops
of trellis codes and what their threads multiply are not among them. "GEMM": the time that these operations would take
at the rate of a product of 1024 × 1024 matrices on this machine, float32 and float64 each, over the stage's
CPU-seconds: what a stage could be made of, if nothing else cost anything. Every run has a store of its own.
``PYTHONPATH`` may point to another state of the software.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from mlorq.config.run import RunConfig
from steps.base import Outcome, StepSpec, execute
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session, open_store

SIZE, TURNS = 1024, 5  # of the product that gives the rates

aten = torch.ops.aten


def _factorisation(times: float) -> Any:
    """Operations of a square matrix, ``times`` n³."""
    return lambda matrix, *_, **__: times * matrix.shape[-1] ** 3


# Operations of LAPACK (Golub and Van Loan, Matrix Computations, chapters 3, 4 and 8).
LAPACK = {
    aten.linalg_cholesky_ex: _factorisation(1 / 3),
    aten.cholesky_inverse: _factorisation(2 / 3),
    aten._linalg_eigh: _factorisation(9),
    aten.cholesky_solve: lambda right, factor, *_, **__: 2 * right.numel() * factor.shape[-1],
    aten.linalg_solve_triangular: lambda factor, right, *_, **__: right.numel() * factor.shape[-1],
}


class Counter(TorchDispatchMode):
    """Counts floating-point operations by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: dict[torch.dtype, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        dtype = next((one.dtype for one in args if isinstance(one, Tensor)), torch.float32)
        if packet in LAPACK:
            self.operations[dtype] += LAPACK[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.operations[dtype] += flop_registry[packet](*args, **(kwargs or {}), out_val=found)
        return found


class Counting(InProcess):
    """Runs steps in this thread and adds up what they take, by stage."""

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations: dict[str, dict[torch.dtype, float]] = {}

    def run(self, spec: StepSpec) -> Outcome:
        """One step, counted."""
        with Counter() as counter:
            started = time.process_time()
            outcome = execute(spec, self.session.worker)
            self.seconds[spec.step] += time.process_time() - started
        sums = self.operations.setdefault(spec.step, defaultdict(float))
        for dtype, count in counter.operations.items():
            sums[dtype] += count
        return outcome


def rate(dtype: torch.dtype) -> float:
    """Operations a CPU-second of a product of square matrices."""
    x = torch.randn(SIZE, SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(TURNS):
        started = time.process_time()
        x @ x
        best = min(best, time.process_time() - started)
    return 2 * SIZE**3 / best


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, as for mlorq compress")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = [*arguments.set, f"store=file://{folder}", "engine.devices=cpu"]
        config = RunConfig.from_yaml(arguments.config, dict(pair.split("=", 1) for pair in pairs))
        session = Session(config, open_store(config))
        counting = Counting(session)
        started = time.process_time()
        (result,) = run_pipeline(session, counting, config.budgets[:1])
        whole = time.process_time() - started
        found = result_json(session, result)
    rates = {dtype: rate(dtype) for dtype in (torch.float32, torch.float64)}
    print("| stage | CPU-seconds | GFLOP, float32 | GFLOP, float64 | GEMM |\n|---|---|---|---|---|")
    for step, seconds in counting.seconds.items():
        counts = counting.operations[step]
        single, double = (
            sum(value for key, value in counts.items() if (key == torch.float64) == wide) for wide in (0, 1)
        )
        ideal = single / rates[torch.float32] + double / rates[torch.float64]
        share = f"{ideal / seconds:.0%}" if seconds >= 0.5 else ""
        print(f"| {step} | {seconds:.1f} | {single / 1e9:.0f} | {double / 1e9:.0f} | {share} |")
    print(f"| all, loading included | {whole:.1f} | | | |\n")
    print(f"{rates[torch.float32] / 1e9:.0f} and {rates[torch.float64] / 1e9:.0f} GFLOP a second; ", end="")
    print(f"NMSE {found['nmse']:.4g}, {found['metric']}, {found['bytes']:,} bytes")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"seconds": counting.seconds, "all": whole, "nmse": found["nmse"]}, file)


if __name__ == "__main__":
    main()
