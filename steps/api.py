"""``mlorq.compress``: the whole method on a module and batches in memory, in this process, without Prefect.

It runs the same steps as the flows, on an in-memory store unless one is named, so there is only one pipeline. It is the
entry point of the library; nothing else in ``mlorq`` imports ``steps``, so ``mlorq`` imports this module lazily.
"""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mlorq.config.run import DEFAULT_PRESET, RunConfig
from mlorq.errors import ConfigError
from mlorq.models.layer_list import LeftFloat
from mlorq.numbers import byte_count
from mlorq.scratch import scratch_folder
from steps.progress_line import watched_line

MOST_NAMED = 5  # layers that a warning names
ARTIFACTS = 6  # bytes of a search's artifacts, mostly moments, per byte of the float model

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CompressionResult:
    """What ``mlorq.compress`` returns.

    Attributes:
        model: the compressed ``nn.Module``, on the device asked for.
        allocation: Arrow table, one row per layer: layer, candidate_id, form, bits, bits_a, bits_b, rank, bytes,
            global_cost.
        metrics: ``nmse``, ``bytes`` and ``budget_bytes`` (compressible layers), ``float_bytes``, ``rest_bytes``,
            ``embedding_bytes``, ``file_bytes``, ``predicted_cost``, ``steps`` computed and reused, ``seconds`` of the
            computed ones by step, ``seconds_reused`` that the others had taken, ``wall_seconds``, ``solver``;
            ``calibration``: the calibration data against held-out data, with ``warnings``; with ``target``:
            ``memory``, its bytes there; with ``evaluate=``: ``float`` and ``compressed``, its results for the two
            models; if a metric is to be kept: ``smallest``, the bound and the budgets that were tried.
        left_float: layers and other weights that stay float: name, reason, bytes.
    """

    model: nn.Module
    allocation: pa.Table
    metrics: dict[str, Any]
    left_float: list[LeftFloat]
    _files: Mapping[str, bytes] = field(repr=False)

    def save(self, location: str) -> None:
        """Write the checkpoint, ``model.safetensors`` and ``mlorq.json``, to a folder or fsspec URL.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        from mlorq.checkpoint.io import save

        save(self._files, location)


def compress(
    model: nn.Module,
    batches: Sequence[Any],
    *,
    budget: str | Mapping[str, str] | None = None,
    max_drop: str | float | None = None,
    min_metric: float | None = None,
    max_metric: float | None = None,
    metric: str | None = None,
    target: str | Mapping[str, Any] | None = None,
    validation: Sequence[Any] | None = None,
    preset: str = DEFAULT_PRESET,
    accounting: str | None = None,
    rounding: str | Mapping[str, Any] | None = None,
    rounding_iterations: int | None = None,
    embeddings: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float] | float] | None = None,
    forward: Callable[[nn.Module, Any], Tensor] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    search: Mapping[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    memory: str | None = None,
    store: str | None = None,
    progress: bool | Progress | None = None,
) -> CompressionResult:
    """Compress a trained module to a memory budget (MLoRQ, arXiv 2507.09616).

    ``model`` itself is not changed.

    Args:
        model: any ``nn.Module`` of linear layers and convolutions, float32, float16 or bfloat16.
        batches: calibration data: a sequence of the module's inputs (tensor, tuple, or mapping of tensors).
        budget: ``"3bit"`` (average per weight) or ``"12.5%"`` (of float32) for the compressible layers; ``"25MB"`` or
            ``"25MiB"`` for the whole checkpoint; ``{"disk": "25MB", "memory": "40MB"}`` also for the weights as
            ``target`` holds them. Default: ``"3bit"``.
        max_drop, min_metric, max_metric: in place of a budget: the smallest model that keeps a number of ``evaluate``.
            ``max_drop="1%"``: at most one per cent worse than the float model, ``max_drop=0.01``: by this difference;
            ``min_metric``: at least this, ``max_metric``: at most. Several budgets are tried on one search; the
            result's ``metrics["smallest"]`` has them all.
        metric: name of the number; None: the first.
        target: the ``target`` section of a configuration, ``"onnxruntime"``: the runtime that the model is meant for.
        validation: held-out batches on which the output NMSE is measured; default: the calibration data.
        preset: ``best``, ``fast``, ``integer``, ``quick`` or ``paper``: defaults of the search and the rounding.
        accounting: ``exact`` (bytes on disk) or ``paper`` (weight bits alone).
        rounding: name of a rounding method (``mlorq.rounding.METHODS``), or keys of the ``rounding`` section of a
            configuration, ``{"iterations": 400, "tuning": 0}``; None: the preset's.
        rounding_iterations: per layer (``lra``) or per block (methods that reconstruct blocks).
        activations: the ``activations`` section of a configuration, ``{"bits": 4, "method": "repq"}``; None: they
            stay float.
        embeddings: ``{"bits": 8}`` or 4, to quantize embedding tables as well; None: they stay float.
        evaluate: called with the float and the compressed module; its numbers are reported.
        forward: ``forward(module, batch)`` gives the output tensor f(x), samples first; default: call the module.
        include, exclude: glob patterns of layer names.
        search: further settings of the ``search`` section of a configuration, by name.
        seed: for every random choice.
        device: ``auto``, ``cpu``, ``cuda:0`` …
        memory: for the sums over the calibration data, ``"8GB"``; less memory takes more passes, with the same result.
            Default: half of what is free.
        store: URL of an artifact store; a later call reuses the artifacts whose inputs are unchanged. Default: in
            memory or, for a large model, in a temporary folder (``TMPDIR``); discarded at the end.
        progress: by default a terminal and a notebook show the running step, and other processes nothing; True: those
            print a line per step on standard error; False: nothing; or ``callable(label, done, total)``, called after
            every step.

    Raises:
        ConfigError: an option is wrong.
        DataError: there are no batches, or they hold non-finite values.
        ModelError: no layer can be compressed, or weights or activations are not finite.
        BudgetError: the budget is malformed, or too small; the message names the smallest possible one.
    """
    from mlorq.artifacts.hashing import digest_json
    from mlorq.checkpoint.io import load
    from mlorq.data import from_batches
    from mlorq.data.base import Dataset
    from mlorq.data.custom import IN_MEMORY as IN_MEMORY_DATA
    from mlorq.models import from_module
    from mlorq.models.copying import copy_module
    from mlorq.models.custom import IN_MEMORY
    from steps.base import Outcome, seconds_by_step
    from steps.devices import devices
    from steps.inprocess import InProcess
    from steps.pipeline import result_json, run_pipeline
    from steps.session import Session, open_store
    from steps.smallest import Bisection, Keep

    keep = Keep.of({"max_drop": max_drop, "min_metric": min_metric, "max_metric": max_metric, "metric": metric})
    if keep is not None and budget is not None:
        raise ConfigError(f"{keep}: the budget is what is looked for: leave out budget")
    if keep is not None and evaluate is None:
        raise ConfigError(f"{keep}: give evaluate, whose number is to be kept")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected an nn.Module, got {type(model).__name__}")
    settings = dict(search or {})
    settings |= {"include": list(include), "exclude": list(exclude)}
    settings |= {} if accounting is None else {"accounting": accounting}
    chosen = dict(rounding) if isinstance(rounding, Mapping) else {} if rounding is None else {"method": rounding}
    chosen |= {} if rounding_iterations is None else {"iterations": rounding_iterations}
    in_memory = IN_MEMORY_DATA
    with contextlib.nullcontext(store) if store else _own_store(model) as url:
        config = RunConfig.from_mapping(
            {
                "model": IN_MEMORY,
                "data": {"calibration": in_memory, "evaluation": in_memory},
                "budget": "3bit" if budget is None else budget,
                "target": target,
                "preset": preset,
                "search": settings,
                "rounding": chosen,
                "embeddings": embeddings,
                "activations": activations,
                "engine": {"devices": device, "memory": memory},
                "seed": seed,
                "store": url,
            }
        )
        # A copy: the run puts it in eval mode, disables gradients and moves it to the device.
        # Made outside of inference mode, in which a caller may be: its tensors could not take part in a backward pass.
        with torch.inference_mode(False):
            float_model = from_module(copy_module(model), forward)
        calibration = from_batches(batches)
        held_out = (
            from_batches(validation, "evaluation") if validation is not None else Dataset([], 0, digest_json("none"))
        )
        wrapped = None
        if evaluate is not None:
            # User code cannot be hashed with all that it calls: it is measured again in every call.
            wrapped = _numbers(evaluate)
        evaluation = Dataset(
            held_out.batches,
            held_out.samples,
            digest_json([held_out.key, uuid.uuid4().hex if evaluate is not None else None]),
            evaluate=wrapped,
        )
        opened = open_store(config)
        session = Session(
            config, opened, devices(config)[0], model=float_model, calibration=calibration, evaluation=evaluation
        )
        outcomes: list[Outcome] = []
        # Where a line can be replaced, unless the caller has a function or wants nothing; else what he asked for.
        line = watched_line() if progress is None or progress is True else None
        executor = InProcess(session, None if line else _reporter(progress), outcomes.append, line)
        started = time.perf_counter()
        shown = contextlib.nullcontext() if line is None else contextlib.closing(line)
        with shown, session.in_use(), torch.inference_mode(False), torch.enable_grad():
            if keep is None:
                (result,) = run_pipeline(session, executor, config.budgets)
                summary = result_json(session, result)
            else:
                smallest = Bisection(keep)
                results = run_pipeline(session, executor, [], smallest)
                result = results[smallest.check_found()]
                summaries = [result_json(session, one) for one in results]
                summary = summaries[smallest.check_found()] | {"smallest": smallest.to_json(summaries)}
            assert result.checkpoint is not None
            files = session.artifacts.files(result.checkpoint)
            with session.artifacts.checkpoint(result.checkpoint) as location:
                compressed = load(location, model=float_model.module, device=session.device)
            allocation = opened.read_table(result.allocation, "allocation.parquet")
    first = {outcome.ref: outcome for outcome in reversed(outcomes)}.values()  # budgets share the steps of the search
    reused = sum(outcome.reused for outcome in first)
    names = (
        "nmse",
        "bytes",
        "budget_bytes",
        "float_bytes",
        "rest_bytes",
        "embedding_bytes",
        "file_bytes",
        "predicted_cost",
        "calibration",
    )
    metrics: dict[str, Any] = {name: summary[name] for name in names}
    metrics |= {
        "wall_seconds": time.perf_counter() - started,
        "steps": {"computed": len(first) - reused, "reused": reused},
        "seconds": seconds_by_step(outcome for outcome in first if not outcome.reused),
        "seconds_reused": seconds_by_step(outcome for outcome in first if outcome.reused),
        "solver": summary["solver"],
    }
    if evaluate is not None:
        metrics |= summary["metrics"]
    metrics |= {name: summary[name] for name in ("memory", "smallest") if name in summary}
    left_float = [LeftFloat(**row) for row in summary["left_float"]]
    _warn(left_float)
    for line in summary["calibration"]["warnings"]:
        warnings.warn(line, stacklevel=2)
    return CompressionResult(compressed, allocation, metrics, left_float, files)


@contextlib.contextmanager
def _own_store(model: nn.Module) -> Iterator[str]:
    """URL of a store that is discarded at the end: in memory, unless the artifacts would take much of it."""
    from fsspec import filesystem

    from mlorq.memory import usable_bytes

    values = (value for value in (*model.parameters(), *model.buffers()) if not is_lazy(value))
    if ARTIFACTS * sum(value.nbytes for value in values) > usable_bytes("cpu"):
        with scratch_folder() as folder:
            yield f"file://{folder}"
        return
    name = f"/mlorq-{uuid.uuid4().hex}"
    memory = filesystem("memory")
    try:
        yield f"memory:/{name}"
    finally:
        if memory.exists(name):
            memory.rm(name, recursive=True)


def _warn(left_float: Sequence[LeftFloat]) -> None:
    """Warn of layers that the caller might take for compressed."""
    unforeseen = [one for one in left_float if not one.is_foreseen]
    if unforeseen:
        shown = "; ".join(f"{one.name!r} ({byte_count(one.bytes)}): {one.reason}" for one in unforeseen[:MOST_NAMED])
        more = f"; and {len(unforeseen) - MOST_NAMED} more" if len(unforeseen) > MOST_NAMED else ""
        warnings.warn(f"layers stay float, see left_float of the result: {shown}{more}", stacklevel=3)


def _numbers(
    evaluate: Callable[[nn.Module], Mapping[str, float] | float],
) -> Callable[[nn.Module], dict[str, float]]:
    def measure(module: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            found = evaluate(module)
        if isinstance(found, Mapping):
            return {str(name): float(value) for name, value in found.items()}
        return {"metric": float(found)}

    return measure


def _reporter(progress: bool | Progress | None) -> Progress | None:
    """What is called after every step; None: nothing."""
    if progress is not True:
        return progress if callable(progress) else None

    def line(label: str, done: int, total: int) -> None:
        print(f"mlorq: {label} {done}/{total}", file=sys.stderr)

    return line
