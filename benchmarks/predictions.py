"""How well costs of candidates are predicted that were not measured.

    .venv/bin/python benchmarks/predictions.py examples/minilm.yaml --candidates 60

Of the candidates on the layers' fronts whose global cost came from a closed form, a seeded choice is measured as the
search measures others: the same samples, one layer changed. The search is taken from the configuration's store, and
computed where it is not there.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from scipy.stats import spearmanr

from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.costs.measured import LayerProbe, dense_of
from steps.candidates import fits_of
from steps.inprocess import InProcess
from steps.measuring import measuring
from steps.pipeline import run_search
from steps.session import Session


def main() -> None:
    """Print a table, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--candidates", type=int, default=60, help="how many to measure")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    config = RunConfig.from_yaml(arguments.config, dict(item.split("=", 1) for item in arguments.set))
    session = Session(config, Store(config.resolve(config.store)), arguments.device)
    executor = InProcess(session, lambda label, done, total: print(f"  {label} {done}/{total}", file=sys.stderr))
    search = run_search(session, executor)

    found = []
    for layer in search.layers:
        table = session.store.read_table(search.candidates[layer.name], "candidates.parquet").to_pylist()
        rows = {row["candidate_id"]: row for row in table}
        costs = session.store.read_table(search.sensitivity[layer.name], "sensitivity.parquet").to_pylist()
        found += [(layer, rows[row["candidate_id"]], row["global_cost"]) for row in costs if row["how"] != "measured"]
    generator = np.random.default_rng(arguments.seed)
    chosen = generator.choice(len(found), min(arguments.candidates, len(found)), replace=False)
    how, context = measuring(session, search.layers), session.worker.context
    batches, labels = how.of(session.calibration)
    blocks = session.artifacts.layers(search.layers_ref).blocks
    by_form: dict[str, list[tuple[float, float]]] = {}
    for index in sorted(chosen.tolist()):
        layer, row, predicted = found[index]
        fit = fits_of(context, search.model, search.capture, layer, config.search.fit).search
        with LayerProbe(
            context.model(search.model), layer, blocks, batches, session.device, cost=how.cost, labels=labels
        ) as probe:
            measured = probe.cost(dense_of(fit, row))
        by_form.setdefault(row["form"], []).append((predicted, measured))
        print(f"  {layer.name} {row['candidate_id']}: {predicted:.3e} {measured:.3e}", file=sys.stderr)
    print(f"{len(found)} of the candidates on the fronts were predicted; {len(chosen)} of them measured:\n")
    print("| form | candidates | rank correlation | median of measured / predicted | within 20 % | within 50 % |")
    print("|---|---|---|---|---|---|")
    for form, pairs in sorted(by_form.items()):
        predicted, measured = np.array(pairs).T
        ratio = measured / np.maximum(predicted, 1e-300)
        off = np.abs(np.log(np.maximum(ratio, 1e-300)))
        rank = spearmanr(predicted, measured).statistic if len(pairs) > 2 else float("nan")
        shares = " | ".join(f"{(off <= np.log(1 + share)).mean():.2f}" for share in (0.2, 0.5))
        print(f"| {form} | {len(pairs)} | {rank:.3f} | {np.median(ratio):.2f} | {shares} |")


if __name__ == "__main__":
    main()
