"""Compare two checkouts: the same runs must give the same allocations and byte-identical ``model.safetensors``.

    python scripts/same_results.py --before ../old --after . --data --work /tmp/same

Every case is one ``mlorq compress`` with either checkout's code and a store of its own, on one thread. Results are kept
in the work folder by commit, so that a second call runs what is missing. Cases on real weights need ``--data``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAPER = {"rounding.iterations": 20, "search.samples": 16, "search.hessian_samples": 8, "search.hessian_probes": 8}
SMALL = {"rounding.iterations": 10, "rounding.tuning": 6, "search.hessian_samples": 16}
QUICK = {"rounding.iterations": 30, "search.samples": 16, "search.hessian_samples": 8, "search.hessian_probes": 8}
A4 = {"activations": {"bits": 4, "samples": 16}}
WIDTHS = {"activations": {"bits": 4, "choices": [4, 6, 8], "compute": "4x5", "samples": 16}}


@dataclass(frozen=True)
class Case:
    """One run: a configuration of the examples, and what is set beside it."""

    name: str
    config: str
    values: dict[str, Any] = field(default_factory=dict)


def _cases() -> list[Case]:
    found = []

    def add(model: str, config: str, **runs: dict[str, Any]) -> None:
        found.extend(Case(f"{model}-{name}", config, values) for name, values in runs.items())

    best, quick, paper = {"preset": "best", **SMALL}, {"preset": "quick", **QUICK}, {"preset": "paper", **PAPER}
    uniform = {
        "preset": "quick",
        **QUICK,
        "search.bits": [3],
        "search.forms": ["Q"],
        "search.sensitivity": "local",
        "budget": "4bit",
    }
    add(
        "digits",
        "examples/digits/digits.yaml",
        best=best,
        quick=quick,
        paper=paper,
        sqnr=quick | {"search.objective": "sqnr", "search.solver": "cbc"},
        paper_bytes=quick | {"search.accounting": "paper", "rounding.method": "closed_form"},
        nearest=quick | {"rounding.method": "nearest"},
        gptq=quick | {"rounding.method": "gptq", "budget": "12.5%"},
        erq=quick | {"rounding.method": "erq"},
        erq_lra=quick | {"rounding.start": "erq"},
        lra_from_closed_form=best | {"rounding.method": "lra", "rounding.start": "closed_form"},
        brecq=uniform | {"rounding.method": "brecq"},
        qdrop=uniform | {"rounding.method": "qdrop", **A4},
        closed_form_hessian=quick
        | {"search.sensitivity": "closed_form", "search.forms": ["Q", "LR", "QLR"], "budget": "2bit"},
        output_loss=best | {"rounding.loss": "output", "rounding.drop": 0.5, **A4},
        a4=best | A4,
        a4_repq=best | {"activations": {"bits": 4, "method": "repq", "samples": 16}},
        a4_uniform=quick | {"activations": {"bits": 4, "method": "uniform", "samples": 16, "mixed": True}},
        widths=best | WIDTHS,
        kl=quick | {"search.cost": "kl"},
    )
    calibration = {"data.calibration.samples": 48}
    add(
        "minilm",
        "examples/minilm.yaml",
        best=best | calibration,
        quick=quick | calibration,
        paper=paper | calibration,
        a8_embeddings=best | calibration | {"activations": {"bits": 8, "samples": 16}, "embeddings": {"bits": 8}},
        widths=best | calibration | WIDTHS,
    )
    calibration |= {"data.evaluation.samples": 64}
    add(
        "vit_tiny",
        "benchmarks/real/vit_tiny.yaml",
        best=best | calibration | {"search.samples": 16},
        quick=quick | calibration,
        paper=paper | calibration,
        a4_rotated=best | calibration | A4 | {"model.rotation": 1, "search.samples": 16},
        widths=best | calibration | WIDTHS | {"search.samples": 16},
    )
    return found


def _commit(checkout: Path) -> str:
    git = ["git", "-C", str(checkout)]
    name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True).stdout
    diff = subprocess.run([*git, "diff", "HEAD"], capture_output=True, check=True).stdout
    return name.strip() + (f"-{hashlib.sha256(diff).hexdigest()[:8]}" if changed else "")


def _run(case: Case, checkout: Path, work: Path, timeout: float) -> dict[str, Any]:
    """The allocation and the checkpoint's digest of a case, from the work folder where it has them."""
    kept = work / _commit(checkout) / f"{case.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    kept.parent.mkdir(parents=True, exist_ok=True)
    model = case.name.partition("-")[0]
    values = {"store": f"file://{kept.parent / f'store-{model}'}", "engine.threads": 1, **case.values}
    command = [sys.executable, "-m", "flows.cli", "compress", str(ROOT / case.config), "--json"]
    for key, value in values.items():
        command += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise SystemExit(f"{case.name} in {checkout}: {done.stderr[-2000:]}")
    result = json.loads(done.stdout)
    tensors = Path(result["checkpoint"].removeprefix("file://"), "model.safetensors")
    found = {
        "allocation": result["allocation"],
        "sha256": hashlib.sha256(tensors.read_bytes()).hexdigest(),
        "nmse": result["nmse"],
        "objective": result["solver"]["objective"],
        "solver_seconds": result["solver"]["seconds"],
        "seconds": round(time.perf_counter() - started, 1),
    }
    kept.write_text(json.dumps(found))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the checkout to compare with")
    parser.add_argument("--after", type=Path, help="the checkout that is compared; without, only the first is run")
    parser.add_argument("--work", type=Path, required=True, help="folder of stores and results")
    parser.add_argument("--only", action="append", help="cases whose name starts with this")
    parser.add_argument("--data", action="store_true", help="also the cases that need ../shared/data")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one run")
    arguments = parser.parse_args()
    checkouts = [one.resolve() for one in (arguments.before, arguments.after) if one is not None]
    differing = 0
    for case in _cases():
        if arguments.only and not any(case.name.startswith(name) for name in arguments.only):
            continue
        if case.name.startswith("vit_tiny") and not arguments.data:
            continue
        before, *after = [_run(case, checkout, arguments.work, arguments.timeout) for checkout in checkouts]
        if not after:
            print(
                f"{case.name:28} {before['sha256'][:12]} NMSE {before['nmse']:.6g} {before['seconds']:.0f} s",
                flush=True,
            )
            continue
        same = [before[name] == after[0][name] for name in ("allocation", "sha256")]
        differing += not all(same)
        words = [
            f"{name} {'same' if one else 'DIFFERENT'}" for name, one in zip(("allocation", "bytes"), same, strict=True)
        ]
        print(f"{case.name:28} {', '.join(words)}; NMSE {before['nmse']:.6g} / {after[0]['nmse']:.6g}", flush=True)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
