"""Torch, its devices, and whether the kernels give the right codes: ``python -m flows.doctor.torch_report``.

In a process of its own, which can be stopped if a driver does not answer. It prints one JSON list of rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from importlib import import_module

from flows.doctor.row import Row
from mlorq.numbers import byte_size

SECONDS = 90.0  # Triton compiles its kernels the first time
BITS = 3  # of the codes that are compared; kernels of each bit-width are compiled on their own


def torch_rows() -> list[Row]:
    """The rows of another process, started and awaited."""
    command = [sys.executable, "-m", "flows.doctor.torch_report"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return [Row("torch", "problem", f"no answer within {SECONDS:.0f} s", "look at the GPU's driver (nvidia-smi)")]
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return [Row("torch", "problem", last[0], "install torch for this machine (https://pytorch.org)")]
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def report() -> list[Row]:
    """Rows of torch, of each device, and of the kernels."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    rows = [Row("torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")]
    rows += [Row("device cpu", "ok", torch.backends.cpu.get_cpu_capability()), compiled_row()]
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        free, total = torch.cuda.mem_get_info(device)
        about = f"{torch.cuda.get_device_name(device)}, {byte_size(free)} of {byte_size(total)} free"
        rows += [Row(f"device {device}", "ok", about), triton_row(device)]
    if not devices:
        rows.append(Row("device cuda", "missing", "torch finds no CUDA device", "runs use the CPU"))
    return rows


def compiled_row() -> Row:
    """The compiled loops: those of trellis codes are compared with NumPy's."""
    from mlorq.fitting.viterbi import compiled_is_right

    name, slow = "kernels of the CPU", "trellis codes take some forty times longer"
    try:
        for loops in ("_viterbi", "_columns"):
            import_module(f"mlorq.fitting.{loops}")
    except ImportError:
        return Row(name, "missing", f"not compiled: {slow}", "install a C compiler, and then mlorq again")
    if compiled_is_right(BITS):
        return Row(name, "ok", "compiled loops give the codes of NumPy")
    return Row(name, "problem", "compiled loops give other codes than NumPy", "install mlorq again from its source")


def triton_row(device: object) -> Row:
    """The Triton kernels of a device, compared with the CPU."""
    import torch

    from mlorq.fitting.cuda import has_kernels
    from mlorq.fitting.viterbi import tensor_functions

    assert isinstance(device, torch.device)
    name = f"kernels of {device}"
    if not has_kernels(device):
        return Row(name, "missing", "no Triton for this device: the CPU codes trellises", "install triton and gcc")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        right = tensor_functions(device, BITS).device == device
    if right:
        return Row(name, "ok", "Triton kernels give the codes of the CPU")
    return Row(name, "problem", str(said[-1].message), "report it with the versions of torch and triton")


if __name__ == "__main__":
    print(json.dumps([row.to_json() for row in report()]))
