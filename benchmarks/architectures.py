"""Every architecture of timm and transformers once: how much of it is compressed, and why not the rest.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/architectures.py timm --json timm.jsonl
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/architectures.py transformers --depth layers --json transformers.jsonl
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/architectures.py transformers --depth trained --json trained.jsonl
    .venv/bin/python benchmarks/architectures.py timm --only resnet

The smallest variant of each of ``timm.list_modules()``, and a tiny model of each class behind ``AutoModel``, with
random weights and a batch of two. ``--depth whole``: ``mlorq.compress`` with the cheapest settings, then the
checkpoint is loaded again. ``--depth layers``: only the first step, which decides what is compressed (a tenth of the
time). ``--depth trained``: as ``whole``, with the forms and the training of preset ``best`` for a few steps, beside the
same candidates in closed form: a model whose training makes it much worse is marked. Seconds are of CPU time.

Each model runs in a child process, which is stopped at a limit of time or memory. One row each; the last lines count.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

import mlorq
from mlorq.errors import MlorqError
from mlorq.forms.trial import changed_by_replacement
from mlorq.models import from_module
from mlorq.models.copying import copy_module
from mlorq.models.layers import check_any, find_layers

CHEAPEST: dict[str, Any] = {
    "budget": "4bit",
    "preset": "quick",
    "rounding": "nearest",
    "device": "cpu",
    "search": {
        "forms": ["Q"],
        "bits": [2, 4, 8],
        "percentiles": [1.0],
        "samples": 2,
        "points": 2,
        "hessian_samples": 2,
        "hessian_probes": 2,
        "hessian_min_probes": 1,
        "sensitivity": "closed_form",
    },
}
FORMS = {"forms": ["Q", "LR", "TCQ"], "bits": [4, 8], "factor_bits": [4], "trellis_bits": [3], "metric": "moments"}
CHEAP_BEST: dict[str, Any] = {
    "budget": "4bit",
    "preset": "best",
    "device": "cpu",
    "search": CHEAPEST["search"] | FORMS,
}
TRAINING = {"iterations": 2, "tuning": 2, "samples": 2}
WORSE = 1.5  # ratio of the NMSE after training to that of closed forms: two steps change it by little
NOISE = 1e-9  # NMSE below which models are equal
TRELLIS = 200_000  # parameters of a model up to which layers may take trellis codes, whose fits take longest
STORE = "trained"  # of the two runs of a model, in memory
WEIGHTS = (nn.Linear, nn.modules.conv._ConvNd)
DIRECT = "its weight is read directly"
UNUSED = "never reached by a forward pass"
GOAL = 0.9  # share of the weights of linear layers and convolutions
Build = Callable[[str], tuple[str, nn.Module, Any]]


def timm_names() -> list[str]:
    """Modules of timm."""
    import timm

    return list(timm.list_modules())


def timm_build(name: str) -> tuple[str, nn.Module, Any]:
    """Name of the smallest variant, the model, a batch."""
    from benchmarks import tiny_timm

    variant = tiny_timm.smallest(name)
    return (variant, *tiny_timm.build(variant))


def transformers_names() -> list[str]:
    """Model types of ``AutoModel``."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


def transformers_build(name: str) -> tuple[str, nn.Module, Any]:
    """Name of the class, the model, a batch."""
    from benchmarks import tiny_transformers

    model, batch = tiny_transformers.build(name)
    return type(model).__name__, model, batch


LISTS: dict[str, tuple[Callable[[], list[str]], Build]] = {
    "timm": (timm_names, timm_build),
    "transformers": (transformers_names, transformers_build),
}


def measure(kind: str, name: str, depth: str = "whole") -> dict[str, Any]:
    """The row of one architecture.

    Args:
        kind: ``timm`` or ``transformers``.
        name: of the architecture.
        depth: a key of ``RUNS``.

    Returns:
        ``status``: ``ok``, ``refused`` (an error in one line), ``traceback``, ``not built``; ``share`` of the weights
        of linear layers, convolutions and experts that are compressed; ``share_run``: of those that the pass reaches;
        ``left``: weights that stay float, by reason.
    """
    started = time.process_time()
    row: dict[str, Any] = {"name": name, "depth": depth}
    try:
        row["model"], module, batch = LISTS[kind][1](name)
    except Exception as error:  # what a library's model raises
        return row | {"status": "not built", "error": _line(error)}
    row |= {"parameters": sum(value.numel() for value in module.parameters())}
    try:
        row |= RUNS[depth](module, batch)
        row["status"] = "ok"
    except MlorqError as error:
        row |= {"status": "refused", "error": _line(error)}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        row |= {"status": "traceback", "error": f"{_line(error)} ({Path(place.filename).name}:{place.lineno})"}
        if "MLORQ_TRACEBACKS" in os.environ:
            traceback.print_exc()
    row["seconds"] = round(time.process_time() - started, 1)
    row["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return row


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _layers(module: nn.Module, batch: Any) -> dict[str, Any]:
    """What the first step decides."""
    model = from_module(copy_module(module))
    found = find_layers(model, batch)
    changed = changed_by_replacement(model, found.layers, batch)
    if changed:
        found = found.without(changed, lambda layer: layer.params * model.dtype.itemsize)
        check_any(found.layers, found.skipped)
    names = [layer.name for layer in found.layers]
    return shares(model.module, names, [(one.name, one.reason) for one in [*found.skipped, *found.others]])


def _whole(module: nn.Module, batch: Any) -> dict[str, Any]:
    """Everything, and the outputs of the loaded checkpoint."""
    return _reloaded(module, batch, mlorq.compress(module, [batch], **CHEAPEST))


def _trained(module: nn.Module, batch: Any) -> dict[str, Any]:
    """As ``_whole``, with training; ``closed``: NMSE of the same search without it; ``trained``: number of blocks."""
    store = MemoryFileSystem()
    settings = CHEAP_BEST | {"store": f"memory://{STORE}"}
    if sum(value.numel() for value in module.parameters()) > TRELLIS:
        settings["search"] = settings["search"] | {"forms": ["Q"]}
    try:
        with patch("steps.summary.front_picture", return_value=b""):  # takes longer than all the rest
            closed = mlorq.compress(module, [batch], rounding="closed_form", **settings)
            result = mlorq.compress(module, [batch], rounding=TRAINING, **settings)
        trained = len(store.ls(f"/{STORE}/reconstruct")) if store.exists(f"/{STORE}/reconstruct") else 0
    finally:
        with suppress(FileNotFoundError):  # an error before the first artifact
            store.rm(f"/{STORE}", recursive=True)
    row = {"closed": closed.metrics["nmse"], "trained": trained, **_reloaded(module, batch, result)}
    return row | {"worse": not row["nmse"] <= WORSE * row["closed"] + NOISE}


RUNS: dict[str, Callable[[nn.Module, Any], dict[str, Any]]] = {"whole": _whole, "layers": _layers, "trained": _trained}


def _reloaded(module: nn.Module, batch: Any, result: mlorq.CompressionResult) -> dict[str, Any]:
    """What was compressed, and whether the checkpoint has the outputs of the result's model."""
    model = from_module(copy_module(module))
    names = result.allocation["layer"].to_pylist()
    row = shares(model.module, names, [(one.name, one.reason) for one in result.left_float])
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        loaded = from_module(mlorq.load(folder, model=copy_module(module)))
    with torch.no_grad():
        ours, theirs = model.outputs(result.model, batch), model.outputs(loaded.module, batch)
    row |= {"nmse": result.metrics["nmse"], "equal": torch.equal(ours, theirs)}
    return row if row["equal"] else row | {"difference": float((ours - theirs).abs().max())}


def shares(module: nn.Module, compressed: Iterable[str], left: Iterable[tuple[str, str]]) -> dict[str, Any]:
    sizes = {}
    first: dict[int, str] = {}  # names of the layers that share a weight may come in another order elsewhere
    owners = {}
    for path, child in module.named_modules(remove_duplicate=False):
        weight = child._parameters.get("weight") if isinstance(child, WEIGHTS) else None
        if weight is not None:
            owners[path] = first.setdefault(id(weight), path)
            sizes[owners[path]] = weight.numel()
        elif "expert" in f"{path}.{type(child).__name__}".lower():  # all experts' matrices in one parameter
            stacks = {f"{path}.{key}": value for key, value in child._parameters.items() if value is not None}
            for name, value in stacks.items():
                if value.dim() == 3 and first.setdefault(id(value), name) == name:
                    sizes |= dict.fromkeys((f"{name}.{index}" for index in range(len(value))), value[0].numel())
    names = {owners.get(name, name) for name in compressed}
    done = sum(sizes.get(name, 0) for name in names)
    reasons = {owners.get(name, name): reason for name, reason in left}
    by_reason: Counter[str] = Counter()
    for path, size in sizes.items():
        if path not in names:
            names_of_it = (path, f"{path}.weight", path.rpartition(".")[0])  # the last: a parameter of all experts
            reason = next((reasons[name] for name in names_of_it if name in reasons), "not listed")
            by_reason[_reason(reason)] += size
    total = sum(sizes.values())
    others: Counter[str] = Counter()
    for name, reason in reasons.items():
        if not {name, name.removesuffix(".weight"), f"{name}.0"} & set(sizes) and "embedding table" not in reason:
            others[_reason(reason)] += 1
    return {
        "layers": len(names),
        "weights": total,
        "share": round(done / max(total, 1), 4),
        "share_run": round(done / max(total - by_reason[UNUSED], 1), 4),
        "left": dict(by_reason),
        "others": dict(others),
    }


def _reason(reason: str) -> str:
    """A reason without the numbers and names of a single layer."""
    if "read directly" in reason:
        return DIRECT
    if reason.startswith("its inputs have"):
        return "rows that belong to no sample"
    return reason.partition(", read by")[0][:120]


def run_all(
    kind: str, names: list[str], depth: str, timeout: float, memory: float, jobs: int = 2
) -> Iterable[dict[str, Any]]:
    """The rows of several architectures, each in a child process, as they are finished.

    Args:
        kind: ``timm`` or ``transformers``.
        names: of the architectures.
        depth: a key of ``RUNS``.
        timeout: seconds of CPU time for each.
        memory: resident GB for each.
        jobs: number of processes at a time.
    """
    waiting, running = list(names), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            file = tempfile.TemporaryFile("w+")  # noqa: SIM115
            child = os.fork()
            if child == 0:
                resource.setrlimit(resource.RLIMIT_CPU, (int(timeout), int(timeout) + 5))
                _child(kind, name, depth, file)
            running[child] = name, file
        for child, (name, file) in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            limit = None
            if not ended and _resident(child) > memory * 1e9:
                limit = {"status": "limit", "error": f"more than {memory} GB"}
            if limit:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            if ended or limit:
                del running[child]
                file.seek(0)
                text = file.read()
                row = json.loads(text) if text and not limit else limit
                yield {"name": name} | (row or _ended(status, timeout))
                file.close()
        time.sleep(0.05)


def _import_all(kind: str, depth: str) -> None:
    """Import what every child needs: before the first of them is made, once for all."""
    _, module, batch = LISTS[kind][1]({"timm": "resnet", "transformers": "bert"}[kind])
    model = from_module(module)
    with torch.no_grad(), suppress(MlorqError):
        model.outputs(model.module, batch)
    if depth != "layers":
        torch.manual_seed(0)
        RUNS[depth](nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)), torch.randn(2, 16))


def _child(kind: str, name: str, depth: str, file: Any) -> None:
    try:
        warnings.simplefilter("ignore")
        json.dump(measure(kind, name, depth), file)
        file.flush()
    finally:
        os._exit(0)


def _ended(status: int, timeout: float) -> dict[str, Any]:
    """The row of a process that ended before it had written one."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return {"status": "limit", "error": f"longer than {timeout:.0f} s"}
    return {"status": "traceback", "error": f"the process ended with status {status}"}


def _resident(child: int) -> int:
    try:
        return int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    if row["status"] != "ok":
        return f"{row['name']:28} {row['status']:10} {row['error']}"
    equal = {True: "equal", False: f"differs by {row.get('difference')}", None: ""}[row.get("equal")]
    left = "; ".join(f"{reason}: {size}" for reason, size in sorted(row["left"].items(), key=lambda item: -item[1]))
    share = f"{row['share']:.3f} {row['share_run']:.3f}"
    if "closed" in row:
        worse = ", worse" if row["worse"] else ""
        equal += f", NMSE {row['closed']:.2g} to {row['nmse']:.2g} by training {row['trained']} blocks{worse};"
    return (
        f"{row['name']:28} {share} {row['layers']:4} {row['weights']:10} {row['seconds']:6} s {row['peak_mb']:6} MB "
        f"{equal} {left}"
    )


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """Counts over all rows."""
    states = Counter(row["status"] for row in rows)
    built = [row for row in rows if row["status"] != "not built"]
    good = [row for row in built if row["status"] == "ok"]
    share, run = ([row for row in good if row[key] >= GOAL] for key in ("share", "share_run"))
    reasons: Counter[str] = Counter(reason for row in good for reason in row["left"])
    lines = [f"{len(rows)} architectures: " + ", ".join(f"{count} {state}" for state, count in states.most_common())]
    lines.append(
        f"of {len(built)} built: {len(share)} have {GOAL:.0%} of their linear and convolution weights compressed, "
        f"{len(run)} of those that run"
    )
    return lines + [f"  {count:4} {reason}" for reason, count in reasons.most_common()]


def main() -> None:
    """Print the rows, and write them as JSON lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("list", choices=list(LISTS))
    parser.add_argument("--only", action="append", help="name of an architecture; can be repeated")
    parser.add_argument("--every", type=int, default=1, help="only each n-th of the list")
    parser.add_argument("--depth", choices=list(RUNS), default="whole")
    parser.add_argument("--json", type=Path, help="file to which rows are appended; names in it are not run again")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of CPU time per architecture")
    parser.add_argument("--memory", type=float, default=6, help="resident GB per architecture")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names = arguments.only or LISTS[arguments.list][0]()[:: arguments.every]
    rows: list[dict[str, Any]] = []
    if arguments.json and arguments.json.exists():
        rows = [json.loads(text) for text in arguments.json.read_text().splitlines()]
    known = {row["name"] for row in rows}
    todo = [name for name in names if name not in known]
    if len(todo) > 1:
        _import_all(arguments.list, arguments.depth)
    for row in run_all(
        arguments.list, todo, arguments.depth, arguments.timeout, arguments.memory, min(arguments.jobs, 2)
    ):
        rows.append(row)
        print(line(row), flush=True)
        if arguments.json:
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print("\n".join(summary(rows)))
    sys.exit(0)


if __name__ == "__main__":
    main()
