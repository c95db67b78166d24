"""The scripts that compress every kind of model and put methods side by side, on tiny ones; larger sizes are long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import save_file

from benchmarks.models import COLUMNS, MODELS, SIZES, Recipe, build, forward_of, inputs, line, measure
from mlorq.models import from_module
from mlorq.models.batches import batch_samples
from tests import detectors, zoo

ROOT = Path(__file__).parents[2]
TINY = Recipe("tiny", "timm", zoo.VIT, zoo.VIT_ARGUMENTS | {"depth": 1})


def test_a_tiny_model_goes_all_the_way(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    found = measure(TINY, tmp_path)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
    assert found["file_bytes"] < found["float_bytes"]
    assert found["share"] == 1.0
    assert found["left"] == {}
    assert found["parameters"] == sum(value.numel() for value in build(TINY).parameters())
    assert 0 < found["nmse"] < 1
    assert 0 <= float(found["onnx"]) < 1e-4
    row = line("tiny", found)
    assert row.count("|") == len(COLUMNS) + 1
    assert "| yes | " in row


def test_what_stays_float_and_what_no_graph_holds_is_in_the_row() -> None:
    found = {"parameters": 9, "layers": 1, "share": 0.5, "left": {"never reached": 4}, "file_bytes": 1}
    found |= {"float_bytes": 2, "nmse": 0.1, "seconds": 1.0, "peak": 1.0, "equal": False, "onnx": "a reason"}
    assert line("one", found) == "| one | 9 | 1 | 50.0% | never reached: 4 | 1 | 2 | 0.1 | 1 | 1.0 | NO | a reason |"


@pytest.mark.long
def test_a_tiny_detector_goes_all_the_way(tmp_path: Path) -> None:
    recipe = Recipe("tiny", "detection", detectors.NAME, detectors.ARGUMENTS, samples=2)
    found = measure(recipe, tmp_path, onnx=False)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
    assert found["layers"] > 20


@pytest.mark.long
def test_methods_side_by_side_without_prefect(tmp_path: Path) -> None:
    lines = ["file\tlabel\tsplit"]
    for index in range(16):
        zoo.save_image(tmp_path / f"images/{index}.png", index)
        lines.append(f"{index}.png\t{index % 7}\t{'evaluation' if index % 2 else 'calibration'}")
    (tmp_path / "labels.tsv").write_text("\n".join(lines) + "\n")
    images = {"source": "image_folder", "root": "images", "labels": "labels.tsv", "batch_size": 8}
    save_file(build(TINY).state_dict(), tmp_path / "weights.safetensors")
    values = {
        "model": {"family": TINY.family, "name": TINY.name, "arguments": TINY.arguments}
        | {"checkpoint": "weights.safetensors"},
        "data": {split: images | {"split": split} for split in ("calibration", "evaluation")},
        "search": zoo.QUICK,
        "engine": {"devices": "cpu", "threads": 1},
    }
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
@pytest.mark.parametrize("name", [name for name, recipe in MODELS.items() if recipe.size != "large"])
def test_models_run_on_inputs_of_their_own(name: str) -> None:
    recipe = MODELS[name]
    module = build(recipe)
    calibration, evaluation = inputs(recipe, module)
    model = from_module(module, forward_of(recipe))
    assert batch_samples(evaluation) == recipe.samples
    assert model.outputs(model.module, calibration).shape[0] == recipe.samples


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", [name for name, recipe in MODELS.items() if recipe.size == "base"])
def test_models_of_base_size(name: str, tmp_path: Path) -> None:
    found = measure(MODELS[name], tmp_path)
    assert found["equal"]
    assert found["bytes"] <= found["budget_bytes"]
