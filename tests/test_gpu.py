"""What is different on a GPU computes the same: kernels, recorded iterations, and the configuration that is chosen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import mlorq
from mlorq.codecs.affine import RowQuantizer
from mlorq.codecs.trellis import MOST_BITS
from mlorq.fitting import viterbi
from mlorq.fitting.covariance_fit import CovarianceFit, Metric
from mlorq.fitting.cuda import has_kernels
from mlorq.fitting.gptq import RowHessian, descend, gptq
from mlorq.fitting.scale_search import search_quantizer
from mlorq.fitting.trellis import TrellisFit
from mlorq.forms.base import Candidate
from mlorq.rounding import adaptive_rounding
from tests import zoo
from tests.codecs.test_trellis import random_matrix
from tests.fitting.test_covariance_fit import PERCENTILES, covariance, row_errors, weights
from tests.fitting.test_viterbi_kernels import after, arguments
from tests.layers import dense, round_layer
from tests.rounding.test_rounding import correlated_tokens, fitted, moments_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

SMALL: dict[str, Any] = {"samples": 4, "points": 2, "hessian_samples": 4, "hessian_probes": 8}


def on_gpu(quantizer: RowQuantizer) -> RowQuantizer:
    return RowQuantizer(quantizer.scale.cuda(), quantizer.zero_point.cuda(), quantizer.bits)


@pytest.mark.parametrize(("rows", "columns"), [(5, 7), (33, 64), (100, 200), (384, 1100)])
def test_closed_form_rounding(rows: int, columns: int, seed: int) -> None:
    weight, hessian = weights(rows, columns, seed), covariance(columns, seed, 2 * columns + 400)
    quantizer = search_quantizer(weight, 3, PERCENTILES)
    here = gptq(weight, RowHessian(hessian), quantizer)
    there = gptq(weight.cuda(), RowHessian(hessian.cuda()), on_gpu(quantizer))
    # Sums in another order: a tie may fall the other way now and then, and moves what comes after.
    assert (here != there.cpu()).double().mean() < 0.02
    after = [descend(weight, RowHessian(hessian), quantizer, here, sweeps=2)]
    after.append(descend(weight.cuda(), RowHessian(hessian.cuda()), on_gpu(quantizer), here.cuda(), sweeps=2).cpu())
    assert (after[0] != after[1]).double().mean() < 0.02
    for first, second in ((here, there.cpu()), after):
        errors = [row_errors(weight, quantizer.dequantize(codes), hessian).sum() for codes in (first, second)]
        torch.testing.assert_close(errors[0], errors[1], rtol=5e-3, atol=0)


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate("Q", bits=3),
        Candidate("LR", rank=20, bits_a=4, bits_b=4),
        Candidate("QLR", bits=2, rank=9, bits_a=4, bits_b=4),
    ],
    ids=lambda candidate: candidate.candidate_id,
)
def test_closed_forms_of_candidates(candidate: Candidate, seed: int) -> None:
    weight, metric = weights(90, 120, seed), Metric(covariance(120, seed), covariance(90, seed + 1))
    there = Metric(metric.inputs.cuda(), metric.gradients.cuda())
    costs = [
        metric.cost(dense(CovarianceFit(weight.to(at.inputs.device), at, PERCENTILES), candidate).cpu() - weight)
        for at in (metric, there)
    ]
    assert costs[1] == pytest.approx(costs[0], rel=0.01)


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
@pytest.mark.parametrize(("rows", "columns"), [(12, 1), (96, 64), (143, 17)])
def test_trellis_codes_of_a_block(rows: int, columns: int, bits: int) -> None:
    if not has_kernels(torch.device("cuda:0")):
        pytest.skip("no Triton, or no C compiler for it")
    here, there = (viterbi.tensor_functions(torch.device(device), bits) for device in ("cpu", "cuda:0"))
    assert there.device.type == "cuda"
    given = arguments(bits, rows, columns)
    copied = [part.cuda() if isinstance(part, torch.Tensor) else part for part in given]
    for block, other in zip(here[:2], there[:2], strict=True):
        for expected, found in zip(after(block, given), after(other, copied), strict=True):
            assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("rotation", [None, 3])
def test_trellis_codes_of_a_layer(rotation: int | None, seed: int) -> None:
    weight, widths = weights(200, 96, seed).float(), [1, 2, 3, 4]
    # Without feedback, no sum depends on the device.
    inputs, gradients = torch.eye(96, dtype=torch.float64), torch.eye(200, dtype=torch.float64)
    here = TrellisFit(inputs, gradients, rotation).codes_of_widths(weight, widths)
    there = TrellisFit(inputs.cuda(), gradients.cuda(), rotation).codes_of_widths(weight.cuda(), widths)
    for first, second in zip(here, there, strict=True):
        assert second.codes.is_cuda
        assert all(torch.equal(first.tensors()[part], second.tensors()[part].cpu()) for part in first.tensors())
    # With feedback, a tie may fall the other way now and then, and moves what comes after.
    metric = Metric(covariance(96, seed), covariance(200, seed + 1))
    fits = [TrellisFit(metric.inputs.to(device), metric.gradients.to(device), rotation) for device in ("cpu", "cuda")]
    costs = [
        [metric.cost(codes.dequantize().cpu() - weight) for codes in fit.codes_of_widths(own, widths)]
        for fit, own in zip(fits, (weight, weight.cuda()), strict=True)
    ]
    assert costs[1] == pytest.approx(costs[0], rel=0.02)


@pytest.mark.parametrize("bits", range(1, MOST_BITS + 1))
@pytest.mark.parametrize("rotation", [-1, 5])
@pytest.mark.parametrize(("rows", "columns"), [(37, 24), (200, 192)])
def test_trellis_codes_decode_to_the_same_bits(rows: int, columns: int, rotation: int, bits: int) -> None:
    matrix = random_matrix(rows, columns, bits, rotation)
    assert torch.equal(matrix.to("cuda").dequantize().cpu(), matrix.dequantize())


def test_recorded_iterations_are_iterations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fitted(seed, device="cuda")
    given = moments_of(*correlated_tokens(400, 20, seed))
    moments = type(given)(given.compressed.cuda(), given.drift_cross.cuda(), given.drift.cuda(), 400)
    for candidate in (Candidate("Q", bits=3), Candidate("LR", rank=6, bits_a=4, bits_b=4)):
        found = []
        for kernels in (True, False):
            monkeypatch.setattr(adaptive_rounding, "has_kernels", lambda device, kernels=kernels: kernels)
            found.append(round_layer("lra", fit, candidate, moments, iterations=200))
        assert found[0].error_after < found[0].error_before
        assert found[0].error_after == pytest.approx(found[1].error_after, rel=1e-3)


def on_both(module: nn.Module, batches: list[Any], **options: Any) -> tuple[mlorq.CompressionResult, ...]:
    """The same compression on the CPU and on the GPU."""
    return tuple(mlorq.compress(copy.deepcopy(module), batches, device=device, **options) for device in ("cpu", "cuda"))


@pytest.mark.parametrize("preset", ["quick", "best"])
def test_the_same_configuration_is_chosen(preset: str, seed: int) -> None:
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    batches = [zoo.pixels(8, seed + index) for index in range(4)]
    # GPTQ alone: where later layers make up for earlier ones, a tie goes a long way.
    here, there = on_both(module, batches, budget="3.5bit", preset=preset, search=zoo.WHOLE_SEARCH, rounding="gptq")
    chosen = [result.allocation.column("candidate_id").to_pylist() for result in (here, there)]
    assert chosen[0] == chosen[1] or there.metrics["predicted_cost"] == pytest.approx(
        here.metrics["predicted_cost"], rel=1e-4
    )
    assert there.metrics["bytes"] <= there.metrics["budget_bytes"]
    assert there.metrics["nmse"] == pytest.approx(here.metrics["nmse"], rel=0.1)


@pytest.mark.parametrize(
    ("rounding", "activations"),
    [
        ("nearest", "uniform"),
        ("erq", "repq"),
        ("brecq", "repq"),
        ("qdrop", "repq"),
        ("lra", "repq"),
        ("block", "adalog"),
    ],
)
def test_quantized_activations(rounding: str, activations: str, seed: int) -> None:
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    batches = [zoo.pixels(8, seed + index) for index in range(4)]
    here, there = on_both(
        module,
        batches,
        budget="4bit",
        preset="quick",
        search=SMALL,
        rounding=rounding,
        rounding_iterations=10,
        activations={"bits": 6, "method": activations},
    )
    assert there.metrics["nmse"] == pytest.approx(here.metrics["nmse"], rel=0.5)
    with torch.no_grad():
        outputs = there.model(batches[0].cuda()).cpu()
    torch.testing.assert_close(outputs, here.model(batches[0]).detach(), rtol=0.5, atol=float(outputs.std()))


def test_embedding_tables(seed: int) -> None:
    module = zoo.text_model("bert-classifier", seed)
    generator = torch.Generator().manual_seed(seed)
    batches = [
        {
            "input_ids": torch.randint(5, 20, (4, 9), generator=generator),
            "attention_mask": torch.ones(4, 9, dtype=torch.long),
        }
        for _ in range(3)
    ]
    here, there = on_both(
        module, batches, budget="5bit", preset="quick", search=SMALL, rounding="gptq", embeddings={"bits": 4}
    )
    assert there.metrics["nmse"] == pytest.approx(here.metrics["nmse"], rel=0.3)
    assert there.metrics["embedding_bytes"] == here.metrics["embedding_bytes"]
