"""A compressed model against the float one: bytes, memory and time, by runtime (``mlorq benchmark``).

Every model is loaded in a process of its own, so that nothing is warm and memory is its own. The models take turns, so
that a slow moment of the machine meets all of them: ratios are between processes of the same turn, and their median
over the turns is reported with the least and the largest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlorq.errors import ConfigError, MlorqError, one_line
from mlorq.scratch import scratch_folder

FLOAT = "float"  # name of the float model's variant
PROCESS = "mlorq.runtimes.benchmark_process"


@dataclass(frozen=True)
class Variant:
    """One way of running a model.

    Attributes:
        runtime: name of the runtime.
        name: what is measured: ``float``, or a way of running the compressed model.
        engine: how a process opens it (``mlorq.runtimes.benchmark_process``).
        location: the checkpoint, or an exported file.
        bytes: its size on disk.
        options: of the runtime; None: the float model of the checkpoint's architecture, with random weights.
        nmse_added: NMSE that the export reports; None if it reports none.
    """

    runtime: str
    name: str
    engine: str
    location: str
    bytes: int
    options: Mapping[str, Any] | None = field(default_factory=dict)
    nmse_added: float | None = None


def benchmark(
    checkpoint: str,
    runtimes: Sequence[str],
    *,
    batches: Sequence[int] = (1, 32),
    threads: int = 1,
    turns: int = 5,
    seconds: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint in several runtimes, each against the float model in the same runtime.

    Args:
        checkpoint: folder of the checkpoint.
        runtimes: names of runtimes.
        batches: numbers of samples in a batch.
        threads: threads of a runtime.
        turns: processes per model.
        seconds: time for the calls of one batch in one process.
        progress: called with (processes done, processes).

    Returns:
        ``checkpoint``, ``description`` (the digest of its ``mlorq.json``; None in format 1), ``threads``, ``turns``,
        and ``rows``: per variant its runtime, name, ``bytes`` on disk,
        ``resident`` and ``peak`` bytes of memory above imports (medians), ``load`` and ``first_call`` in seconds, by
        batch size ``latency`` (median of a call in seconds), ``ratio`` (of latencies to the float model's: median,
        least and largest), ``throughput`` (samples per second), ``difference`` (largest, of the first output to that of
        the first compressed model, relative to the largest output; None for float models) and ``nmse_added``.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or a runtime cannot hold it.
        ConfigError: a runtime is unknown, lacks a package, or the inputs of the model are not known.
        MlorqError: a process failed.
    """
    from mlorq.checkpoint.description import read_description
    from mlorq.runtimes import RUNTIMES

    for name in runtimes:
        RUNTIMES[name].check_packages()
    with scratch_folder() as folder:
        inputs = _write_inputs(checkpoint, batches, folder)
        variants = [one for name in runtimes for one in RUNTIMES[name].variants(checkpoint, folder)]
        common = inputs | {"threads": threads, "seconds": seconds}
        measured: list[list[dict[str, Any]]] = [[] for _ in variants]
        for turn in range(turns):
            for index, variant in enumerate(variants):
                measured[index].append(_measured(variant, common, f"{folder}/{index}.npy"))
                if progress is not None:
                    progress(turn * len(variants) + index + 1, turns * len(variants))
        outputs = [np.load(f"{folder}/{index}.npy") for index in range(len(variants))]
    first = next(index for index, variant in enumerate(variants) if variant.name != FLOAT)
    rows = []
    for index, variant in enumerate(variants):
        base = next(i for i, one in enumerate(variants) if (one.runtime, one.name) == (variant.runtime, FLOAT))
        row = _row(variant, measured[index], measured[base], batches)
        row["difference"] = None if variant.name == FLOAT else _difference(outputs[index], outputs[first])
        rows.append(row)
    # By the digest the result is recognised as that of the checkpoint, wherever this was copied to.
    about = {"checkpoint": checkpoint, "description": read_description(checkpoint).digest}
    return {**about, "threads": threads, "turns": turns, "rows": rows}


def table(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row of text per variant: MB, resident and peak MB, seconds to load, milliseconds by batch size with the
    ratio to the float model, and the differences of the outputs.

    Args:
        result: of ``benchmark``.
    """
    return [
        {
            "model": f"{row['runtime']} {row['name']}",
            "MB": f"{row['bytes'] / 1e6:.1f}",
            "memory, peak": f"{row['resident'] / 1e6:.0f} / {row['peak'] / 1e6:.0f}",
            "load, s": f"{row['load']:.2f}",
            **{
                f"{batch}: ms": f"{1e3 * seconds:.1f}, {_ratio_text(row['ratio'][batch])}"
                for batch, seconds in row["latency"].items()
            },
            "differs": "" if row["difference"] is None else f"{row['difference']:.0e}",
            "NMSE +": "" if row["nmse_added"] is None else f"{row['nmse_added']:.0e}",
        }
        for row in result["rows"]
    ]


def legend(result: Mapping[str, Any]) -> str:
    """What the numbers in ``table`` are."""
    return (
        f"medians of {result['turns']} cold processes each, {result['threads']} thread(s); memory is above imports; "
        "milliseconds are by batch size, with the ratio to the float model of the same runtime"
    )


def _ratio_text(ratio: Mapping[str, float]) -> str:
    """``0.42x``, or with a spread of more than a tenth ``0.42x (.35-.60)``."""
    if ratio["largest"] - ratio["least"] <= 0.1 * ratio["median"]:
        return f"{ratio['median']:.2f}x"
    return f"{ratio['median']:.2f}x ({ratio['least']:.2f}-{ratio['largest']:.2f})"


def read_result(location: str) -> dict[str, Any]:
    """A result that was written to a file (``mlorq benchmark --output``).

    Args:
        location: path or fsspec URL.

    Raises:
        ConfigError: the file cannot be read, or is something else.
    """
    import fsspec

    try:
        with fsspec.open(location, "rb") as file:
            found = json.load(file)
        if not table(found):
            raise ValueError("it has no rows")
        legend(found)
    except OSError as error:
        raise ConfigError(f"benchmark {location} cannot be read: {one_line(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"benchmark {location} is not the JSON of mlorq benchmark: {one_line(error)}") from error
    return dict(found)


def _write_inputs(checkpoint: str, batches: Sequence[int], folder: str) -> dict[str, Any]:
    """Random inputs of every batch size as files, and whether they are passed by name."""
    from mlorq.checkpoint.io import inspect
    from mlorq.models import FAMILIES

    architecture = inspect(checkpoint)["architecture"]
    family = FAMILIES[architecture["family"]]
    paths, named = [], False
    for samples in batches:
        batch = family.example_input(architecture, samples=samples)
        if batch is None:
            raise ConfigError("the inputs of the model are not known: benchmark models of a library, not user code")
        named = isinstance(batch, Mapping)
        if named:
            values = {name: value.numpy() for name, value in batch.items()}
        else:
            parts = batch if isinstance(batch, (tuple, list)) else (batch,)
            values = {f"input_{index}": part.numpy() for index, part in enumerate(parts)}
        paths.append(f"{folder}/batch-{samples}.npz")
        np.savez(paths[-1], **values)
    return {"batches": paths, "named": named}


def _measured(variant: Variant, common: Mapping[str, Any], output: str) -> dict[str, Any]:
    """The measurement of one process."""
    task = Path(output).with_suffix(".json")
    task.write_text(json.dumps({**asdict(variant), **common, "output": output}))
    environment = {**os.environ, "OMP_NUM_THREADS": str(common["threads"])}
    command = [sys.executable, "-m", PROCESS, str(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise MlorqError(f"benchmark of {variant.runtime}, {variant.name}: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(
    variant: Variant, own: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], batches: Sequence[int]
) -> dict[str, Any]:
    """The medians of a variant, and its ratios to the float model turn by turn."""
    latency, ratio = {}, {}
    for place, samples in enumerate(batches):
        times = [median(turn["latency"][place]) for turn in own]
        ratios = [mine / median(turn["latency"][place]) for mine, turn in zip(times, base, strict=True)]
        latency[str(samples)] = median(times)
        ratio[str(samples)] = {"median": median(ratios), "least": min(ratios), "largest": max(ratios)}
    return {
        "runtime": variant.runtime,
        "name": variant.name,
        "bytes": variant.bytes,
        **{key: median(turn[key] for turn in own) for key in ("resident", "peak", "load", "first_call")},
        "latency": latency,
        "ratio": ratio,
        "throughput": {samples: int(samples) / seconds for samples, seconds in latency.items()},
        "nmse_added": variant.nmse_added,
    }


def _difference(found: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    largest = max(float(np.abs(reference).max()), float(np.finfo(np.float64).tiny))
    return float(np.abs(found.astype(np.float64) - reference).max()) / largest


def picture(result: Mapping[str, Any]) -> bytes:
    """A PNG: bytes on disk and in memory, and latencies relative to the float model in the same runtime.

    Args:
        result: of ``benchmark``.
    """
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = result["rows"]
    places = np.arange(len(rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.5 * len(rows) + 1.8), sharey=True)
    sizes = {"on disk": "bytes", "resident": "resident", "peak": "peak"}
    for index, (label, key) in enumerate(sizes.items()):
        left.barh(places + 0.27 * (index - 1), [row[key] / 1e6 for row in rows], 0.25, label=label)
    left.set_yticks(places, [f"{row['runtime']}, {row['name']}" for row in rows])
    left.invert_yaxis()
    left.set_xlabel("MB (memory above imports)")
    left.legend(fontsize=8)
    batches = list(rows[0]["ratio"])
    for index, batch in enumerate(batches):
        ratios = [row["ratio"][batch] for row in rows]
        middle = np.array([ratio["median"] for ratio in ratios])
        reach = [middle - [ratio["least"] for ratio in ratios], [ratio["largest"] for ratio in ratios] - middle]
        offset = 0.8 / len(batches) * (index - (len(batches) - 1) / 2)
        right.barh(places + offset, middle, 0.7 / len(batches), xerr=reach, label=f"batch {batch}")
    right.axvline(1, color="0.4", linewidth=0.8)
    right.set_xscale("log")
    right.set_xlabel("latency over that of the float model in the same runtime")
    right.legend(fontsize=8)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
