"""Each fast path against the straightforward computation it replaces, as ratios in one run.

    .venv/bin/python benchmarks/fast_paths.py

One layer of 768 × 3072 (a ViT-B feed-forward layer) with random weights: times do not depend on their values. Where the
straightforward way would take hours, an evenly spread part of it is timed and scaled up; the table says so.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import timm
import torch
from torch import nn

from mlorq.calibration.covariance import shrink
from mlorq.calibration.label_free_hessian import add_squared_gradients
from mlorq.fitting import gptq as rounding_of_rows
from mlorq.fitting.gptq import RowHessian, descend, gptq
from mlorq.fitting.hessian_fit import HessianFit, gram_costs
from mlorq.fitting.scale_search import range_quantizer
from mlorq.fitting.settings import FitSettings
from mlorq.fitting.weighted_svd import weighted_svd
from mlorq.forms.base import Candidate
from mlorq.forms.lr import LR, LRSettings
from mlorq.forms.q import QSettings
from mlorq.models.base import FloatModel
from mlorq.models.partial_forward import Segments
from mlorq.rounding.base import RoundingTask
from mlorq.rounding.lra import Lra, LraSettings
from mlorq.rounding.paired_forward import InputMoments

ROWS, COLUMNS = 768, 3072


def seconds(function: Callable[[], object], repeats: int = 1) -> float:
    """Best of a few calls."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def all_rank_costs(fit: HessianFit, every: int) -> tuple[float, float, str]:
    """Local costs of all ranks and nine bit pairs: Gram matrices, or one product a rank and pair."""
    bits = LRSettings().factor_bits
    a = {b: fit.left_quantizer(b).round_trip(fit.factors.a.float()) for b in bits}
    b = {w: fit.right_quantizer(w).round_trip(fit.factors.b.float()) for w in bits}
    fast = seconds(lambda: gram_costs(fit.weight, fit.row_weights, a, b), 2)
    ranks = range(every, min(ROWS, COLUMNS) + 1, every)
    h = fit.row_weights.unsqueeze(1)
    w, left, right = fit.weight.double(), a[4].double(), b[4].double()

    def products() -> None:
        for rank in ranks:
            _ = float((h * (w - left[:, :rank] @ right[:rank]).square()).mean())

    return fast, seconds(products) * every * len(bits) ** 2, f"every {every}th rank of one pair timed"


def scale_search(fit: HessianFit) -> tuple[float, float, str]:
    """Ranges of W for five bit-widths: all rows at once, or a loop over rows."""
    weight, hessian, percentiles, widths = fit.weight, fit.hessian, fit.percentiles, QSettings().bits

    def fast() -> None:
        fresh = fit.of(weight)
        for bits in widths:
            fresh.weight_quantizer(bits)

    def slow() -> None:
        for row, importance in zip(weight[:96], hessian[:96], strict=True):
            for bits in widths:
                for p in percentiles:
                    low, high = torch.quantile(row, torch.tensor([1 - p, p]))
                    quantizer = range_quantizer(low.reshape(1), high.reshape(1), bits, "codes")
                    _ = float((importance * (quantizer.round_trip(row.unsqueeze(0)) - row).square()).sum())

    return seconds(fast, 2), seconds(slow) * ROWS / 96, "96 of 768 rows timed"


def factorisation(fit: HessianFit) -> tuple[float, float, str]:
    """The weighted SVD: eigenvectors of the smaller Gram matrix, or a full SVD; both float64."""
    d = fit.hessian.double().sum(1).sqrt().unsqueeze(1)
    fast = seconds(lambda: weighted_svd(fit.weight, fit.hessian), 2)
    return fast, seconds(lambda: torch.linalg.svd(d * fit.weight.double(), full_matrices=False), 2), ""


def hessian_probe(samples: int = 32, tokens: int = 197) -> tuple[float, float, str]:
    """One probe of the layer's Hessian: batched in chunks, or one backward pass a sample."""
    x, delta = torch.randn(samples, tokens, COLUMNS), torch.randn(samples, tokens, ROWS)
    total = torch.zeros(ROWS, COLUMNS)
    layer = nn.Linear(COLUMNS, ROWS, bias=False)

    def slow() -> None:
        for index in range(samples):
            layer.zero_grad()
            (layer(x[index]) * delta[index]).sum().backward()
            total.add_(layer.weight.grad.square())

    return seconds(lambda: add_squared_gradients(total, x, delta), 2), seconds(slow, 2), ""


def lra_iterations(fit: HessianFit, tokens: int = 32 * 197, iterations: int = 50) -> tuple[float, float, str]:
    """Fifty LRA iterations of a rank-192 layer: second moments, or batches of 32 images through autograd."""
    candidate = Candidate("LR", bits_a=4, bits_b=4, rank=192)
    x = torch.randn(tokens, COLUMNS)
    moments = InputMoments((x.T @ x).double() / tokens, torch.zeros(COLUMNS, COLUMNS).double(),
                           torch.zeros(COLUMNS, COLUMNS).double(), tokens)  # fmt: skip
    task = RoundingTask("layer", candidate, fit, fit.output_metric, moments)
    settings = LraSettings(iterations=iterations)
    parts = LR().fit(fit, candidate)
    fast = seconds(lambda: Lra().round(task, settings))
    target = x @ fit.weight.T

    def slow() -> None:
        alphas = {name: torch.zeros_like(part.values, requires_grad=True) for name, part in parts.items()}
        optimiser = torch.optim.RAdam(list(alphas.values()), lr=0.3)
        for _ in range(iterations):
            factors, regulariser = [], torch.zeros(())
            for name, (_, quantizer, values) in parts.items():
                h = (alphas[name].sigmoid() * 1.2 - 0.1).clamp(0, 1)
                codes = (values / quantizer.scale.unsqueeze(1)).floor() + h + quantizer.zero_point.unsqueeze(1)
                factors.append(quantizer.dequantize(codes.clamp(0, 2**quantizer.bits - 1)))
                regulariser = regulariser + (1 - (2 * h - 1).abs().pow(20)).mean()
            loss = ((x @ factors[1].T) @ factors[0].T - target).square().mean() + 0.3 * regulariser
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()

    return fast, seconds(slow), "fast: scale search and exact checks of the error included"


def suffix_forward(samples: int = 8) -> tuple[float, float, str]:
    """ViT-Tiny's output for one changed layer in each of its 12 blocks: from that block on, or in full."""
    module = timm.create_model("vit_tiny_patch16_224").eval()
    blocks = [f"blocks.{index}" for index in range(12)]
    segments = Segments(FloatModel(module, "timm", {}, blocks=blocks, key="x"), module, blocks)
    batch = torch.randn(samples, 3, 224, 224)
    carries = [None]
    for index in range(1, 12):
        carries.append(segments.advance(batch, index - 1, carries[-1], index))
    fast = seconds(lambda: [segments.outputs(batch, start, carry) for start, carry in enumerate(carries)], 2)
    return fast, 12 * seconds(lambda: segments.outputs(batch), 3), ""


def columns_of(fit: HessianFit, sweep: bool) -> tuple[float, float, str]:
    """GPTQ, or a sweep of coordinate descent, of 3-bit codes: columns in compiled loops, or an operation each."""
    columns = fit.weight.shape[1]
    x = torch.randn(2 * columns, columns)
    hessian, quantizer = RowHessian(shrink(x.T @ x / len(x), len(x))), fit.weight_quantizer(3)
    codes = gptq(fit.weight, hessian, quantizer)

    def run() -> None:
        if sweep:
            descend(fit.weight, hessian, quantizer, codes)
        else:
            gptq(fit.weight, hessian, quantizer)

    fast = seconds(run, 3)
    with patch.object(rounding_of_rows, "_compiled", lambda: None):
        return fast, seconds(run, 3), "factors of Σ not included"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=32, help="ranks timed of the straightforward rank costs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5
    hessian = torch.rand(ROWS, COLUMNS, generator=generator) ** 4
    fit = HessianFit(weight, hessian, FitSettings())
    small = HessianFit(weight[:384, :384].contiguous(), hessian[:384, :384].contiguous(), FitSettings())
    print(f"torch {torch.__version__}, numpy {np.__version__}, {arguments.threads} threads\n")
    print("| computation | fast, s | straightforward, s | ratio | note |")
    print("|---|---|---|---|---|")
    for name, result in (
        ("local costs of 767 ranks × 9 bit pairs", all_rank_costs(fit, arguments.every)),
        ("scale search of W, 5 bit-widths", scale_search(fit)),
        ("weighted SVD", factorisation(fit)),
        ("one Hessian probe, 32 samples", hessian_probe()),
        ("50 LRA iterations, rank 192", lra_iterations(fit)),
        ("GPTQ, 3 bits", columns_of(fit, sweep=False)),
        ("a sweep of coordinate descent", columns_of(fit, sweep=True)),
        ("GPTQ, 3 bits, 384 × 384", columns_of(small, sweep=False)),
        ("a sweep of coordinate descent, 384 × 384", columns_of(small, sweep=True)),
        ("outputs for a change in each block of ViT-Tiny", suffix_forward()),
    ):
        fast, slow, note = result
        print(f"| {name} | {fast:.4f} | {slow:.3f} | {slow / fast:.1f} | {note} |", flush=True)


if __name__ == "__main__":
    main()
