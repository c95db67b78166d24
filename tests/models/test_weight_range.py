"""Weights that scales cannot hold stay float, with the reason; a weight's magnitude does not change the outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlorq
from mlorq.errors import ModelError
from mlorq.forms.embedding_tables import find_tables
from mlorq.models import from_module
from mlorq.models.layers import find_layers
from mlorq.models.weight_range import LEAST, small_rows, why_float


def net(factor: float) -> nn.Sequential:
    """Three layers; the weights of the second are small or large, and the third makes up for it."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        module[2].weight.mul_(factor)
        module[2].bias.mul_(factor)
        module[4].weight.div_(factor)
    return module


def test_ordinary_weights_are_no_matter():
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert why_float(weight) is None
    assert why_float(weight * 1e-4) is None
    assert why_float(torch.zeros(8, 5)) is None
    assert why_float(weight.to("meta")) is None
    assert why_float(torch.empty(0, 5)) is None
    assert small_rows(weight * 1e-4) == small_rows(torch.zeros(8, 5)) == 0


def test_rows_that_are_too_small_or_too_large_are_counted():
    weight = torch.ones(8, 3, 2, 2)
    weight[:1] = 0.9 * LEAST
    assert why_float(weight) is None
    assert small_rows(weight) == 1
    weight[1] = -0.9 * LEAST
    assert "2 of 8 rows" in why_float(weight)
    weight[5, 0, 1, 1] = -7e16
    assert "7e+16" in why_float(weight)
    weight[5, 0, 1, 1] = float("nan")
    assert "nan" in why_float(weight)


def test_a_few_small_rows_are_mentioned():
    module = net(1.0)
    module[2].weight.data[3] *= 1e-19
    with pytest.warns(UserWarning, match="1 in 2"):
        found = find_layers(from_module(module), torch.randn(4, 8))
    assert [layer.name for layer in found.layers] == ["0", "2", "4"]


def test_a_model_without_a_suitable_weight_is_refused_with_the_reason():
    module = nn.Sequential(nn.Linear(4, 4))
    module[0].weight.data *= 1e-22
    with pytest.raises(ModelError, match="4 of 4 rows"):
        find_layers(from_module(module), torch.randn(4, 4))


def test_tables_of_tiny_values_stay_float():
    module = nn.Sequential(nn.Embedding(10, 4), nn.Embedding(10, 4))
    module[1].weight.data *= 1e-9
    found = find_tables(module, 1)
    assert found.tables == ["0"]
    assert found.skipped[0][0] == "1"
    assert "10 of 10 rows" in found.skipped[0][1]


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_the_factor_of_a_layer_does_not_matter(factor, tmp_path):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(16, 8, generator=generator) for _ in range(2)]
    search = {"forms": ["Q"], "bits": [6], "sensitivity": "closed_form", "hessian_samples": 8}
    errors, bytes_ = {}, {}
    for one in (1.0, factor):
        module = net(one)
        result = mlorq.compress(
            module, batches, budget="100%", preset="quick", rounding="gptq", search=search, device="cpu"
        )
        wanted, found = (each(torch.cat(batches)).detach() for each in (module, result.model))
        errors[one] = float((found - wanted).square().sum() / wanted.square().sum())
        bytes_[one] = sum(tensor.nbytes for tensor in result.model[2].stored_tensors().values())
        result.save(tmp_path / str(one))
        again = mlorq.load(tmp_path / str(one), device="cpu", model=net(one))
        assert torch.allclose(again(torch.cat(batches)), found, rtol=1e-4, atol=1e-5 * float(found.abs().max()))
    assert errors[factor] <= 1.2 * errors[1.0] + 1e-6, errors
    assert bytes_[factor] == bytes_[1.0] + 2 * 16  # float32 scales of 16 rows
