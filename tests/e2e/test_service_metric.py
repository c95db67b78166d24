"""examples/service/metric.py: without torch and mlorq, the metric that mlorq measures of the checkpoint."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mlorq
from mlorq.config.sections import model_section, source_section
from mlorq.data import load_dataset
from mlorq.evaluation.outputs import model_outputs
from mlorq.models import load_model
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.nets import TokenNet, float_model

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

SERVICE = Path(__file__).parents[2] / "examples" / "service"
ALONE = """
import runpy, sys
for name in ("torch", "torchvision", "timm", "transformers", "scipy", "mlorq", "steps", "flows", "onnx"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
del sys.argv[0]
runpy.run_path(sys.argv[0] + "/metric.py", run_name="__main__")
"""


def alone(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script in a process that cannot import torch, mlorq and others."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(SERVICE), *map(str, arguments), "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, env={**environment, "PYTHONDONTWRITEBYTECODE": "1"})


def test_pairs_of_texts(tmp_path: Path) -> None:
    from mlorq.models.transformers_modules import describe

    float_module = zoo.save_text_model(tmp_path / "float", "bert")
    architecture = describe(float_module)
    assert architecture is not None
    folder = folder_of(tmp_path / "out", compressed(float_module), {**architecture, "task": "sentence-similarity"})
    (file, *_) = mlorq.export(folder, tmp_path / "model.onnx", tokenizer=str(tmp_path / "float"))
    generator = np.random.default_rng(0)
    pairs = [(*pair, generator.integers(0, 6) / 2) for pair in combinations(zoo.SENTENCES, 2)]
    with (tmp_path / "pairs.csv").open("w", newline="") as table:
        csv.writer(table).writerows(pairs)

    model: Any = model_section()(family="transformers", name=str(tmp_path / "float"), task="sentence-similarity")
    source = source_section()(source="table", path="pairs.csv", text=[0, 1], label=2, batch_size=5)
    data = load_dataset(source, "evaluation", float_model(TokenNet()), model, str(tmp_path), 0)
    assert data.metric is not None
    expected = data.metric(model_outputs(load_model(model), mlorq.load(folder), data.batches))["spearman"]
    done = alone(file, "--pairs", tmp_path / "pairs.csv")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"spearman": pytest.approx(expected, abs=1e-3), "samples": len(pairs)}

    done = alone(file, "--pairs", tmp_path / "pairs.csv", "--columns", 0, 1, 5)
    assert done.returncode == 1
    assert "columns [0, 1, 5] are not two texts and a score" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "give --pairs" in alone(file).stderr


@pytest.mark.long
def test_images(tmp_path: Path) -> None:
    architecture = {"family": "timm", "name": zoo.VIT, "arguments": zoo.VIT_ARGUMENTS}
    folder = folder_of(tmp_path / "out", compressed(zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS)), architecture)
    (file,) = mlorq.export(folder, tmp_path / "model.onnx")
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    rows = ["file\tlabel\tsplit"]
    for index in range(12):
        pixels = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 50), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{index}.png")
        rows.append(f"{index}.png\t{index % 3}\t{'test' if index < 9 else 'other'}")
    (tmp_path / "labels.tsv").write_text("\n".join(rows) + "\n")

    model: Any = model_section()(family="timm", name=zoo.VIT, arguments=zoo.VIT_ARGUMENTS, checkpoint="unused")
    options = {"root": "images", "labels": "labels.tsv", "split": "test"}
    source = source_section()(source="image_folder", **options)
    data = load_dataset(source, "evaluation", float_model(TokenNet()), model, str(tmp_path), 0)
    with torch.no_grad():
        outputs = torch.cat([mlorq.load(folder)(batch) for batch in data.batches])
    classes = outputs.argmax(1)
    # Every second label is what the model says.
    table = [f"{index}.png\t{int(one) if index % 2 else (int(one) + 1) % 7}\ttest" for index, one in enumerate(classes)]
    (tmp_path / "labels.tsv").write_text("\n".join([rows[0], *table, *rows[10:]]) + "\n")
    data = load_dataset(source, "evaluation", float_model(TokenNet()), model, str(tmp_path), 0)
    assert data.metric is not None
    expected = data.metric(outputs)["accuracy"]
    assert expected == pytest.approx(4 / 9)

    done = alone(file, "--images", tmp_path / "images", "--labels", tmp_path / "labels.tsv", "--split", "test")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"accuracy": pytest.approx(expected), "samples": 9}
    done = alone(file, "--images", tmp_path, "--labels", tmp_path / "labels.tsv")
    assert done.returncode == 1
    assert "0.png" in done.stderr
    assert "give --images and --labels" in alone(file, "--images", tmp_path).stderr
