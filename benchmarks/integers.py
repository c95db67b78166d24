"""Models with static activations in onnxruntime: as floats, with decoded weights, and by integer products.

    .venv/bin/python benchmarks/integers.py benchmarks/real/vit_tiny.yaml CHECKPOINT [CHECKPOINT ...]

Of each checkpoint the metrics of ``mlorq.load`` in torch, and of three graphs the same in onnxruntime: the float model,
the compressed model with the kernels of float activations, and with integer products (what ``mlorq export`` writes).
Beside them the graph's bytes, how many of the products that onnxruntime executes are integer ones, the NMSE of its
outputs against those of torch, and milliseconds per image on one thread. The graphs take turns.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import onnx
import onnxruntime
import torch

from mlorq.artifacts.store import Store
from mlorq.checkpoint.io import inspect, load
from mlorq.config.run import RunConfig
from mlorq.evaluation.outputs import model_outputs, output_nmse
from mlorq.export_targets.onnx_graph.build import build, metadata
from mlorq.export_targets.onnx_graph.session import options_here
from steps.baseline import measure, nmse_data
from steps.session import Session

INTEGER = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "DynamicQuantizeMatMul")
PRODUCTS = (*INTEGER, "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits")


class Graph:
    """A graph in onnxruntime on one thread.

    Args:
        model: the graph.
        folder: for the graph that onnxruntime makes of it.
    """

    def __init__(self, model: onnx.ModelProto, folder: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        for key, value in options_here(metadata(model)["session_options"]).items():
            options.add_session_config_entry(key, value)
        data = model.SerializeToString()
        self.bytes = len(data)
        self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        left = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
        self.products = sum(left[kind] for kind in PRODUCTS)
        self.integer = sum(left[kind] for kind in INTEGER)
        self._input = self.session.get_inputs()[0].name

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The first output."""
        return torch.from_numpy(self.session.run(None, {self._input: images.numpy()})[0])


def milliseconds(graphs: dict[str, Graph], images: torch.Tensor, turns: int) -> dict[str, float]:
    """Median milliseconds per image of a call, by graph."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(turns):
        for name, graph in graphs.items():
            started = time.perf_counter()
            graph(images)
            found[name].append(1e3 * (time.perf_counter() - started) / len(images))
    return {name: median(values) for name, values in found.items()}


def main() -> None:
    """Print a row a graph, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("checkpoints", nargs="+", help="folders or URLs")
    parser.add_argument("--turns", type=int, default=40, help="timed calls of a graph and a batch size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = RunConfig.from_yaml(arguments.config)
    session = Session(config, Store(config.resolve(config.store)), "cpu")
    batches = nmse_data(session).batches

    def metrics(outputs: torch.Tensor, module: Any) -> str:
        return ", ".join(f"{value:.4f}" for value in measure(session.evaluation, outputs, module).values())

    print(
        "| checkpoint | graph | bytes | integer products | metrics | NMSE against torch | batch 1, ms | batch 8, ms |"
    )
    print(f"|{'---|' * 8}")
    for place in arguments.checkpoints:
        module, architecture = load(place), inspect(place)["architecture"]
        wanted = model_outputs(session.model, module, batches)
        name = Path(place).name
        print(f"| {name} | torch | {inspect(place)['file_bytes']:,} | | {metrics(wanted, module)} | | | |", flush=True)
        models = {
            "float": build(session.model.module, architecture).model,
            "decoded": build(module, architecture, integers=False).model,
            "integers": build(module, architecture).model,
        }
        with tempfile.TemporaryDirectory() as folder:
            graphs = {kind: Graph(model, folder) for kind, model in models.items()}
        outputs = {kind: torch.cat([graph(batch) for batch in batches]) for kind, graph in graphs.items()}
        images = torch.cat(list(batches))[:8]
        times = [milliseconds(graphs, images[:count], arguments.turns) for count in (1, 8)]
        for kind, graph in graphs.items():
            shown = " | ".join(f"{one[kind]:.1f}, {one[kind] / one['float']:.2f} ×" for one in times)
            print(
                f"| {name} | {kind} | {graph.bytes:,} | {graph.integer} of {graph.products} "
                f"| {metrics(outputs[kind], module)} | {output_nmse(outputs[kind], wanted):.1e} | {shown} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
