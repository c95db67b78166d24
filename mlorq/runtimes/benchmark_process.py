"""One cold process of ``mlorq benchmark``: loads a model, calls it, and prints as JSON what that took.

    python -m mlorq.runtimes.benchmark_process TASK.json

Memory is counted above the imports: the process first imports what the model needs and reads its resident memory then.
The peak is the largest resident memory after that (on Linux; elsewhere that of the whole process).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
Call = Callable[[Arrays], np.ndarray]

LEAST_CALLS = 3  # timed calls of a batch


def main(task_file: str) -> None:
    """Carry out a task (``mlorq.runtimes.benchmark.Task``) and print the measurement."""
    task = json.loads(Path(task_file).read_text())
    open_model = OPENERS[task["engine"]](task)
    _release()
    before = _resident()
    _forget_peak()
    started = time.perf_counter()
    call = open_model()
    loaded = time.perf_counter()
    batches = [dict(np.load(path)) for path in task["batches"]]
    outputs = call(batches[0])
    called = time.perf_counter()
    _release()
    resident, peak = _resident() - before, _peak() - before
    np.save(task["output"], outputs)
    latency = [_seconds_of_calls(call, batch, task["seconds"]) for batch in batches]
    times = {"load": loaded - started, "first_call": called - loaded, "latency": latency}
    print(json.dumps({"resident": resident, "peak": peak, **times}))


def _torch(task: Mapping[str, Any]) -> Callable[[], Call]:
    """A checkpoint in torch, or the float model of its architecture with random weights."""
    import torch

    from mlorq.checkpoint.io import inspect
    from mlorq.models import rebuild
    from mlorq.runtimes import load

    torch.set_num_threads(task["threads"])
    architecture = inspect(task["location"])["architecture"]
    with torch.device("meta"):
        rebuild(architecture)  # imports the model's library

    def open_model() -> Call:
        if task["options"] is None:
            module = rebuild(architecture).eval()
        else:
            module = load(task["location"], runtime="torch", **task["options"])

        def call(arrays: Arrays) -> np.ndarray:
            tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
            with torch.inference_mode():
                output = module(**tensors) if task["named"] else module(*tensors.values())
            while not isinstance(output, torch.Tensor):  # the first one in what the model returns
                output = next(iter(output.values() if isinstance(output, Mapping) else output))
            found: np.ndarray = output.numpy()
            return found

        return call

    return open_model


def _onnxruntime(task: Mapping[str, Any]) -> Callable[[], Call]:
    """An exported graph in onnxruntime alone, without torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task["threads"], 1
    for key, value in task["options"].items():
        options.add_session_config_entry(key, value)

    def open_model() -> Call:
        session = onnxruntime.InferenceSession(task["location"], options, providers=["CPUExecutionProvider"])
        taken = [one.name for one in session.get_inputs()]

        def call(arrays: Arrays) -> np.ndarray:
            found: np.ndarray = session.run(None, _inputs(arrays, taken, task["named"]))[0]
            return found

        return call

    return open_model


def _openvino(task: Mapping[str, Any]) -> Callable[[], Call]:
    """An exported graph in OpenVINO alone, without torch."""
    import openvino

    from mlorq.runtimes.openvino import open_file

    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": task["threads"]})  # loads the plugin

    def open_model() -> Call:
        compiled = open_file(core, task["location"], task["options"]["precision"], task["threads"])
        taken = [port.any_name for port in compiled.inputs]

        def call(arrays: Arrays) -> np.ndarray:
            given = _inputs(arrays, taken, task["named"])
            found: np.ndarray = compiled(given)[0]
            return found

        return call

    return open_model


OPENERS: dict[str, Callable[[Mapping[str, Any]], Callable[[], Call]]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _inputs(arrays: Arrays, taken: Sequence[str], named: bool) -> dict[str, np.ndarray]:
    """The inputs that a graph takes: by their names, or, if the model takes them by position, in order."""
    if named:
        return {key: value for key, value in arrays.items() if key in taken}
    return dict(zip(taken, arrays.values(), strict=True))


def _seconds_of_calls(call: Call, batch: Arrays, seconds: float) -> list[float]:
    """Seconds of each call, for so many seconds and ``LEAST_CALLS`` at least; a first one is not counted."""
    call(batch)
    found: list[float] = []
    while len(found) < LEAST_CALLS or sum(found) < seconds:
        started = time.perf_counter()
        call(batch)
        found.append(time.perf_counter() - started)
    return found


def _resident() -> int:
    """Resident memory in bytes."""
    return _status("VmRSS") or _peak()


def _peak() -> int:
    """Largest resident memory in bytes since ``_forget_peak``."""
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    """A number of bytes in /proc/self/status; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _release() -> None:
    """Return freed memory to the system, where the C library can: a service would do so once its model is loaded."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


if __name__ == "__main__":
    main(sys.argv[1])
