"""Where an output NMSE comes from: outputs that are too small, or ones that point elsewhere.

    .venv/bin/python benchmarks/shrinkage.py benchmarks/real/vit_tiny.yaml CHECKPOINT [CHECKPOINT ...]

Of each checkpoint's outputs f̂ on the evaluation data: their NMSE; the least NMSE that a scalar times them has; their
norm by that of the float outputs f; and the correlation of f̂ and f about their means over samples, which no scale and
no offset changes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import mlorq
from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.evaluation.outputs import model_outputs, output_nmse
from steps.baseline import measure, nmse_data
from steps.session import Session


def main() -> None:
    """Print a row a checkpoint, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("checkpoints", nargs="+", help="folders or URLs, as the rows of methods.py --json name them")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    config = RunConfig.from_yaml(arguments.config)
    session = Session(config, Store(config.resolve(config.store)), arguments.device)
    batches = nmse_data(session).batches
    wanted = model_outputs(session.model, session.model.module, batches, device=session.device).double()
    print("| checkpoint | metrics | output NMSE | at the best scale | norm by float's | correlation |")
    print("|---|---|---|---|---|---|")
    for place in arguments.checkpoints:
        module = mlorq.load(place).to(session.device)
        found = model_outputs(session.model, module, batches, device=session.device).double()
        metrics = measure(session.evaluation, found.float(), module)
        scaled = found * ((found * wanted).sum() / found.square().sum())
        centred = torch.stack([(part - part.mean(0)).flatten() for part in (found, wanted)])
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        print(
            f"| {Path(place).name} | {shown} | {output_nmse(found, wanted):.4f} | {output_nmse(scaled, wanted):.4f} "
            f"| {found.norm() / wanted.norm():.3f} | {torch.corrcoef(centred)[0, 1]:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
