"""The contents of a checkpoint for display (``mlorq inspect``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from flows.render import facts, grid, kinds
from mlorq.forms.base import Candidate
from mlorq.numbers import byte_count

POWERS = (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3))
NOT_RECORDED = "the checkpoint does not record the positions per sample: every layer counts with one"


def amount(count: int | None) -> str:
    """A number with three digits: ``58.1M``."""
    if count is None:
        return ""
    unit, value = next(((unit, value) for unit, value in POWERS if count >= 0.9995 * value), ("", 1))
    return f"{count / value:.3g}{unit}"


def print_checkpoint(info: Mapping[str, Any], out: Console) -> None:
    """Print the result of ``mlorq.checkpoint.io.inspect``."""
    cells = [
        (
            row["layer"],
            row["kind"],
            " x ".join(str(length) for length in row["shape"]),
            Candidate.of_row(row).candidate_id,
            f"{row['nominal_bits']:.2f}",
            f"{row['effective_bits']:.2f}",
            f"{row['bytes']:,}",
            amount(row.get("stored_macs")),
            amount(row.get("bit_operations")),
        )
        for row in info["layers"]
    ]
    right = ("bits", "stored", "bytes", "MACs", "bit ops")
    out.print(grid(("layer", "kind", "shape", "form", *right), cells, right=right))
    out.print(
        f"\nbits per weight of the codes, and as stored; MACs and bit operations per {info['totals']['per']}\n",
        markup=False,
    )
    sizes, budget, totals = info["sizes"], info["budget"], info["totals"]
    layers = totals["layers"]
    pairs = [
        ("architecture", ", ".join(f"{key} {value}" for key, value in _short(info["architecture"]).items())),
        ("budget", f"{budget['asked']} = {byte_count(budget['budget_bytes'])} ({budget['accounting']})"),
        ("compressed layers", f"{byte_count(sizes['bytes'])}, {_bits(layers)}, {layers['nominal_bits']:.2f} of codes"),
        ("float32 size of these", byte_count(sizes["float_bytes"])),
        *([("embedding tables", byte_count(sizes["embedding_bytes"]))] if "embedding_bytes" in sizes else []),
        ("rest of the model", byte_count(sizes["rest_bytes"]) + kinds(info["rest"])),
        ("all tensors", _bits(totals)),
        *([("activations", _sites(info["activations"]))] if info.get("activations") else []),
        ("headers", byte_count(sizes["overhead_bytes"])),
        ("on disk", byte_count(info["file_bytes"])),
        *_preparation(info.get("preparation") or {}),
        *_compute(totals),
    ]
    pairs += [(f"hash of {name}", str(value)) for name, value in info["hashes"].items() if value]
    out.print(facts(pairs))


def _bits(totals: Mapping[str, Any]) -> str:
    return f"{totals['effective_bits']:.2f} bits per weight of {totals['weights']:,}"


def _preparation(files: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names of the tokenizer's files, with their bytes, which are not part of the other sizes."""
    total = sum(file["bytes"] for file in files.values())
    return [("preparation", f"{byte_count(total)}: {', '.join(sorted(files))}")] if files else []


def _compute(totals: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Totals of MACs and bit operations, against those of the float layers."""
    if not totals["float_macs"]:
        return []
    macs = f"{amount(totals['stored_macs'])} per {totals['per']}, float {amount(totals['float_macs'])}"
    if totals["product_macs"]:
        macs += f"; products of activations {amount(totals['product_macs'])}"
    operations, before = totals["bit_operations"], totals["float_bit_operations"]
    share = f"{amount(operations)} per {totals['per']}, {operations / before:.2%} of float's {amount(before)}"
    pairs = [("MACs", macs), ("bit operations", share)]
    return pairs if totals["per"] == "sample" else [*pairs, ("note", NOT_RECORDED)]


def _sites(activations: Mapping[str, Any]) -> str:
    kinds = Counter(f"{site['quantizer']['bits']} bit {site['quantizer']['kind']}" for site in activations["sites"])
    return ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))


def _short(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in architecture.items()
        if isinstance(value, (str, int, float)) and len(str(value)) <= 60
    }
