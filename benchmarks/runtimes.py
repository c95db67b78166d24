"""Size, memory, load time and latency of a checkpoint of a text encoder in every runtime, beside its float graph.

    python benchmarks/runtimes.py CHECKPOINT [--folder /tmp/runtimes]

Exports the checkpoint (``exact``, ``fast``) and the model with dense weights in float32, then measures each in its own
process on one thread: bytes of the file, resident memory above imports after a first call, its peak during the load,
seconds of the load, and CPU milliseconds of calls with 1 × 12 and 32 × 32 tokens (lower third of 15 calls).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = ((1, 12), (32, 32))  # samples, tokens
CALLS = 15


def status(key: str) -> float:
    """A size in ``/proc/self/status``, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1e3


def measure(location: str, runtime: str) -> dict[str, Any]:
    """The figures of one runtime, in this process."""
    import onnxruntime as onnxruntime  # imports are not counted
    import torch
    import transformers.models.bert.modeling_bert as imported

    import mlorq
    import mlorq.export_targets.onnx_graph.session
    import mlorq.runtimes

    del imported
    torch.set_num_threads(1)
    batches = []
    for samples, tokens in SHAPES:
        ids = torch.randint(1000, 20000, (samples, tokens), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        batches.append(batch)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, begin = status("VmRSS"), time.perf_counter()
    model = mlorq.load(location, runtime=runtime)
    found: dict[str, Any] = {"load_seconds": round(time.perf_counter() - begin, 2)}
    found["peak_mb"] = round(status("VmHWM") - before)
    with torch.inference_mode():
        model(**batches[0])
        found["memory_mb"] = round(status("VmRSS") - before)
        for (samples, _), batch in zip(SHAPES, batches, strict=True):
            times = []
            for _ in range(CALLS):
                begin = time.process_time()
                model(**batch)
                times.append(time.process_time() - begin)
            found[f"ms_{samples}"] = round(1e3 * sorted(times)[CALLS // 3], 2)
    return found


def write(checkpoint: str, folder: Path) -> dict[str, Path]:
    """The exported files, and the graph of the model with dense weights."""
    import mlorq
    from mlorq.checkpoint.io import inspect
    from mlorq.export_targets.onnx import OnnxSettings, graph_bytes
    from mlorq.export_targets.onnx_graph.float_graph import float_twin

    files = {name: folder / f"{name}.onnx" for name in ("float", "exact", "fast")}
    twin, _ = float_twin(mlorq.load(checkpoint))
    files["float"].write_bytes(graph_bytes(twin, inspect(checkpoint)["architecture"], OnnxSettings()))
    for name in ("exact", "fast"):
        mlorq.export(checkpoint, files[name], precision=name)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/runtimes"))
    parser.add_argument("--runtime", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.runtime:
        print(json.dumps(measure(arguments.checkpoint, arguments.runtime)))
        return
    from mlorq.checkpoint.io import inspect
    from mlorq.export_targets.onnx_graph.session import read_metadata

    arguments.folder.mkdir(parents=True, exist_ok=True)
    runs = {"torch": (arguments.checkpoint, "torch", inspect(arguments.checkpoint)["file_bytes"], {})}
    for name, file in write(arguments.checkpoint, arguments.folder).items():
        about = read_metadata(str(file))
        runs[name] = (str(file), "onnxruntime", about["bytes"], {"nmse_added": about["nmse_added"]})
    for name, (location, runtime, size, further) in runs.items():
        child = subprocess.run(
            [sys.executable, __file__, location, "--runtime", runtime], check=True, capture_output=True, text=True
        )
        print(json.dumps({"model": name, "bytes": size, **further, **json.loads(child.stdout.splitlines()[-1])}))


if __name__ == "__main__":
    main()
