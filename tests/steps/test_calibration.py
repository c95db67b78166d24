"""Step ``calibration`` in whole runs: few samples and samples of another kind are reported, enough good ones not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import mlorq
from mlorq.artifacts.store import Store
from steps.artifacts import DEPTH

WIDTH = 24
FAST = {"hessian_samples": 64, "forms": ["Q"], "bits": [2, 3, 4]}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def inputs(samples: int, seed: int, *, spread: float = 0.1) -> torch.Tensor:
    """Rows with energy in all directions, of which the later ones have ``spread`` × that of the first."""
    made = torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(seed))
    return made * torch.linspace(1, spread, WIDTH)


def compress(calibration: torch.Tensor, evaluation: torch.Tensor) -> tuple[dict, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = mlorq.compress(
            net(),
            list(calibration.split(32)),
            validation=[evaluation],
            budget="3bit",
            preset="fast",
            search=FAST,
        )
    found = result.metrics["calibration"]
    assert [str(one.message) for one in caught if one.category is UserWarning] == found["warnings"]
    return found, found["warnings"]


def test_enough_samples_of_the_same_kind_are_not_reported():
    found, lines = compress(inputs(512, 1), inputs(256, 2))
    assert lines == []
    assert found["samples"] == 512
    assert {layer["layer"] for layer in found["layers"]} == {"0", "2"}
    assert 0.5 < found["other_domain"] < 1.5
    assert 0 < found["nmse"]["calibration"] < 1


def test_too_few_samples_are_reported():
    found, lines = compress(inputs(4, 1), inputs(256, 2))
    assert found["few_samples"] > 10
    assert "too few calibration samples" in lines[0]


def test_samples_of_another_kind_are_reported():
    found, lines = compress(inputs(512, 1, spread=0.001), inputs(256, 2, spread=-1))
    assert found["other_domain"] > 2
    assert any("another kind" in line for line in lines)


@pytest.mark.parametrize("preset", ["quick"])
def test_without_moments_only_outputs_are_compared(preset, tmp_path):
    result = mlorq.compress(
        net(),
        list(inputs(64, 1).split(32)),
        validation=[inputs(64, 2)],
        preset=preset,
        rounding="nearest",
        search={"samples": 16, "points": 2, "factor_bits": []},
        store=f"file://{tmp_path}",
    )
    found = result.metrics["calibration"]
    # The error of the last layer's output is that of the model, on the same samples.
    store = Store(f"file://{tmp_path}")
    depth = store.read_json(next(store.refs("calibration")), DEPTH)
    assert list(depth) == ["0", "2"]
    assert depth["2"] == pytest.approx(found["nmse"]["calibration"], rel=1e-5)
    assert 0 < depth["0"] < 1
    assert found["layers"] == []
    assert found["few_samples"] is None
    assert found["gap"] > 0
