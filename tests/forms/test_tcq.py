"""Trellis codes in models: linear layers, convolutions, small layers, checkpoints, other dtypes, compiled models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlorq
from mlorq.codecs.base import Storage
from mlorq.forms.base import FORMS, Candidate, Shape, enumerate_candidates
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.convolutions import CompressedConv2d
from mlorq.forms.modules import CompressedLinear
from mlorq.registry import Settings


class Net(nn.Module):
    """A convolution, a grouped one, two linear layers and a classifier with too few rows for a trellis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.LayerNorm(16)
        self.wide = nn.Linear(16, 150)
        self.narrow = nn.Linear(150, 24)
        self.head = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.conv(x))))
        x = self.norm(x.flatten(2).transpose(1, 2))
        found: Tensor = self.head(torch.relu(self.narrow(torch.relu(self.wide(x))))).mean(1)
        return found


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[mlorq.CompressionResult, list[Tensor], Path]:
    torch.manual_seed(0)
    batches = list(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))
    result = mlorq.compress(Net().eval(), batches, budget="3bit", preset="fast", device="cpu")
    folder = tmp_path_factory.mktemp("saved")
    result.save(str(folder))
    return result, batches, folder


def rows_of(result: mlorq.CompressionResult) -> list[dict[str, Any]]:
    return result.allocation.to_pylist()


def test_layers_take_the_forms_that_serve_them(compressed: tuple[mlorq.CompressionResult, list[Tensor], Path]) -> None:
    result, batches, _ = compressed
    forms = {row["layer"]: row["form"] for row in rows_of(result)}
    assert forms["head"] == "Q"
    assert {name for name, form in forms.items() if form == "TCQ"} == {"conv", "depthwise", "wide", "narrow"}
    modules = dict(result.model.named_modules())
    assert isinstance(modules["conv"], CompressedConv2d)
    assert isinstance(modules["wide"], CompressedLinear)
    for row in rows_of(result):
        module = modules[row["layer"]]
        assert isinstance(module, CompressedModule)
        assert module.stored_bytes == row["bytes"]
    with torch.no_grad():
        output = torch.cat([result.model(batch) for batch in batches])
    assert torch.isfinite(output).all()


def test_checkpoints_give_the_same_outputs(compressed: tuple[mlorq.CompressionResult, list[Tensor], Path]) -> None:
    result, batches, folder = compressed
    loaded = mlorq.load(str(folder), model=Net())
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]), result.model(batches[0]))
        again = loaded.to(torch.bfloat16)
        difference = again(batches[0].bfloat16()).float() - result.model(batches[0])
    assert float(difference.abs().max()) < 0.05


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_give_the_same_outputs(
    compressed: tuple[mlorq.CompressionResult, list[Tensor], Path],
) -> None:
    _, batches, folder = compressed
    loaded = mlorq.load(str(folder), model=Net())
    with torch.no_grad():
        expected = loaded(batches[0])
        found = torch.compile(loaded, backend="eager", fullgraph=True)(batches[0])
    torch.testing.assert_close(found, expected)


def test_affine_codes_are_candidates_only_where_trellis_codes_are_not() -> None:
    settings = {"Q": FORMS["Q"].settings(bits=[2, 3, 4, 8]), "TCQ": FORMS["TCQ"].settings(trellis_bits=[1, 2, 3])}

    def names(rows: int, forms: dict[str, Settings]) -> list[str]:
        return [one.candidate_id for one, _ in enumerate_candidates(Shape(rows, 40), forms, Storage())]

    assert names(64, settings) == ["Q4", "Q8", "TCQ1", "TCQ2", "TCQ3"]
    assert names(11, settings) == ["Q2", "Q3", "Q4", "Q8"]  # too few rows for a trellis
    assert names(64, {"Q": settings["Q"]}) == ["Q2", "Q3", "Q4", "Q8"]
    narrow = {**settings, "Q": FORMS["Q"].settings(bits=[2, 3])}
    assert names(64, narrow)[0] == "Q3"  # the largest stays: it bounds the other candidates


def test_bytes_by_the_formula() -> None:
    for rows, columns, bits in ((64, 40, 3), (13, 7, 1), (192, 768, 6)):
        size = FORMS["TCQ"].size(Candidate("TCQ", bits=bits), Shape(rows, columns), Storage())
        assert size == columns * -(-rows * bits // 8) + rows + 8
