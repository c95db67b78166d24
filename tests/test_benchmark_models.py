"""The script that compresses every kind of model, on tiny ones; on base sizes where asked for (long)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models import COLUMNS, MODELS, SIZES, Recipe, build, line, measure
from tests import detectors, zoo


def test_a_tiny_model_goes_all_the_way(tmp_path: Path) -> None:
    recipe = Recipe("tiny", "timm", zoo.VIT, zoo.VIT_ARGUMENTS | {"depth": 1})
    found = measure(recipe, tmp_path, samples=8, workers=2)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
    assert found["file_bytes"] < found["float_bytes"]
    assert found["parameters"] == sum(value.numel() for value in build(recipe).parameters())
    assert 0 < found["nmse"] < 1
    row = line("tiny", found)
    assert row.count("|") == len(COLUMNS) + 1
    assert row.endswith("| yes |")


def test_a_tiny_detector_goes_all_the_way(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    arguments = detectors.ARGUMENTS | {"num_classes": 81}
    found = measure(Recipe("tiny", "detection", detectors.NAME, arguments), tmp_path, samples=2)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
    assert found["layers"] > 20


def test_recipes_are_of_known_sizes() -> None:
    assert {recipe.size for recipe in MODELS.values()} == set(SIZES)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", [name for name, recipe in MODELS.items() if recipe.size == "base"])
def test_models_of_base_size(name: str, tmp_path: Path) -> None:
    found = measure(MODELS[name], tmp_path)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
