"""Do two machines choose the same configuration? Compares rows of one name in two files that ``--json`` wrote.

    python benchmarks/table.py benchmarks/real/vit_tiny.yaml --budget 3bit --only best --json cpu.jsonl
    python benchmarks/table.py benchmarks/real/vit_tiny.yaml --budget 3bit --only best --json gpu.jsonl --device cuda:0
    python benchmarks/same_choice.py cpu.jsonl gpu.jsonl

Stores of their own, or the second one finds what the first has computed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def rows(path: Path) -> dict[str, dict[str, Any]]:
    """Results by name."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return {one["row"]: one for one in found}


def main() -> None:
    """Print a row a row of both files, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    arguments = parser.parse_args()
    first, second = rows(arguments.first), rows(arguments.second)
    print("| row | layers with the same choice | objective, first | second | relative difference | NMSE | |")
    print("|---|---|---|---|---|---|---|")
    for name in [name for name in first if name in second]:
        one, other = first[name], second[name]
        chosen = [{layer["layer"]: layer["candidate_id"] for layer in result["allocation"]} for result in (one, other)]
        same = sum(chosen[0][layer] == chosen[1][layer] for layer in chosen[0])
        costs = [result["predicted_cost"] for result in (one, other)]
        off = abs(costs[1] - costs[0]) / max(abs(costs[0]), 1e-300)
        print(
            f"| {name} | {same} of {len(chosen[0])} | {costs[0]:.6g} | {costs[1]:.6g} | {off:.1e} "
            f"| {one['nmse']:.4f} | {other['nmse']:.4f} |"
        )


if __name__ == "__main__":
    main()
