"""The scripts that compress every kind of model and put methods side by side, on tiny ones; base sizes are long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.models import COLUMNS, MODELS, SIZES, Recipe, build, line, measure, write_data, write_model
from tests import detectors, zoo

ROOT = Path(__file__).parents[2]


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


@pytest.mark.long
def test_a_tiny_detector_goes_all_the_way(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    arguments = detectors.ARGUMENTS | {"num_classes": 81}
    found = measure(Recipe("tiny", "detection", detectors.NAME, arguments), tmp_path, samples=2)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
    assert found["layers"] > 20


@pytest.mark.long
def test_methods_side_by_side_without_prefect(tmp_path: Path) -> None:
    recipe = Recipe("tiny", "timm", zoo.VIT, zoo.VIT_ARGUMENTS | {"depth": 1})
    module = build(recipe)
    values = {"model": write_model(recipe, module, tmp_path), "data": write_data(recipe, tmp_path, 8, 7)}
    values |= {"search": zoo.QUICK, "engine": {"devices": "cpu", "threads": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "benchmarks/methods.py", str(tmp_path / "run.yaml"), "--methods", "nearest,gptq,mlorq"]
    command += ["--budget", "4bit", "--activations", "8", "--json", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["nearest", "gptq", "mlorq"]
    assert rows[0]["bytes"] == rows[1]["bytes"] >= rows[2]["bytes"]
    assert all(0 < row["nmse"] < 1 and row["activations"] == 8 for row in rows)
    assert [line.split(" | ")[2] for line in done.stdout.splitlines()[2:]] == [row["title"] for row in rows]


def test_recipes_are_of_known_sizes() -> None:
    assert {recipe.size for recipe in MODELS.values()} == set(SIZES)


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", [name for name, recipe in MODELS.items() if recipe.size == "base"])
def test_models_of_base_size(name: str, tmp_path: Path) -> None:
    found = measure(MODELS[name], tmp_path)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
