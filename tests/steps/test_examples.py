"""Configurations of examples and benchmarks are valid, what they name is there, and the digits example runs as is."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml

import mlorq
from flows.cli import main
from mlorq.config.run import RunConfig
from tests import zoo

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
YOURS = {"mask_rcnn_swin_tiny.pth"}  # files that a user has to bring
FOLDERS = {"IMAGENET", "COCO", "ADE20K"}  # and folders, which examples/README.md explains
FAMILIES = sorted((EXAMPLES / "families").glob("*.yaml"))  # hub names, and data that a user has to bring
CONFIGURATIONS = [*sorted(EXAMPLES.rglob("*.yaml")), *sorted((ROOT / "benchmarks" / "real").glob("*.yaml"))]


def test_there_are_examples():
    assert {
        "demo.yaml",
        "minilm.yaml",
        "sst2.yaml",
        "vit_tiny.yaml",
        "digits.yaml",
        "mask_rcnn_swin_tiny.yaml",
        "minilm_sst2.yaml",
    } <= {path.name for path in CONFIGURATIONS}


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configurations_are_valid_and_lossless(path):
    config = RunConfig.from_yaml(path)
    assert config.folder == str(path.parent)
    assert config.budgets, "they are well-formed"

    assert RunConfig.from_mapping(yaml.safe_load(config.to_yaml()), config.folder) == config


@pytest.mark.parametrize("path", [path for path in CONFIGURATIONS if path not in FAMILIES], ids=lambda path: path.stem)
def test_files_that_configurations_name_are_there(path):
    config = RunConfig.from_yaml(path)
    sources = [config.data.calibration, config.data.evaluation]
    of_source = ("path", "root", "labels", "annotations")
    named = [getattr(source, name) for source in sources for name in of_source if getattr(source, name)]
    named += [config.model.checkpoint] if config.model.checkpoint else []
    for location in named:
        if "shared/data" in location:  # lies beside the repository, and not everywhere
            assert path.parent.name == "real", "examples name no file that others do not have"
            continue
        if location.split("/")[0] in FOLDERS:
            continue
        if location in YOURS:
            assert "your own file" in path.read_text().replace("\n# ", " ")
            continue
        assert Path(config.resolve(location)).exists(), location
    factories = [config.model.factory, *(name for source in sources for name in (source.factory, source.batches))]
    for module, _, function in (factory.partition(":") for factory in factories if factory):
        assert f"def {function}(" in (path.parent / f"{module}.py").read_text()


def test_folders_that_users_bring_are_named_in_capitals_and_explained(tmp_path, capsys):
    named = set()
    for path in sorted(EXAMPLES.rglob("*.yaml")):
        values = yaml.safe_load(path.read_text())
        places = [str(source.get("root", "")).split("/") for source in values["data"].values()]
        named |= {place[0] for place in places if len(place) > 1}
    assert named == FOLDERS
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`{folder}`" in readme for folder in FOLDERS)
    assert {f"families/{path.name}" for path in FAMILIES} <= set(re.findall(r"\]\((families/\S+)\)", readme))

    # Without the folder, a run ends in one line that names it.
    run = tmp_path / "run.yaml"
    values = yaml.safe_load((EXAMPLES / "vit_tiny.yaml").read_text())
    weights = timm.create_model(values["model"]["name"]).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    values["model"] |= {"pretrained": False, "checkpoint": "weights.safetensors"}
    run.write_text(yaml.safe_dump(values))
    assert main(["compress", str(run), "--dry-run"]) == 2
    assert "IMAGENET/train" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def digits(monkeypatch):
    """The example's module, imported afresh and forgotten again."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    specification = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits" / "digits.py")
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "digits", module)
    specification.loader.exec_module(module)
    return module


def test_digits_split_into_training_and_test_images(digits):
    x, y, test_x, test_y = digits.images()
    assert (len(x), len(y), len(test_x), len(test_y)) == (1297, 1297, 500, 500)
    assert x.shape[1:] == (1, 8, 8)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.bincount(test_y).min() >= 45, "every digit in its share"
    batches = digits.calibration_batches()
    assert [len(batch) for batch in batches] == [32] * 8
    assert torch.equal(torch.cat(batches), x[:256]), "no test image"


def test_digits_is_trained_and_compressed_with_little_loss(digits, tmp_path):
    config = RunConfig.from_yaml(EXAMPLES / "digits" / "digits.yaml")
    search = {"samples": 16, "points": 2, "hessian_samples": 8, "factor_bits": [4], "percentiles": [0.97, 0.999, 1.0]}
    values = {
        "model": config.model.model_dump(),
        "data": config.data.model_dump(),
        "budget": "4bit",
        "search": search,
        "store": f"file://{tmp_path}/store",
    }
    built: list[torch.nn.Module] = []
    train = digits.build
    digits.build = lambda **arguments: built.append(train(**arguments)) or built[-1]
    result = zoo.run(EXAMPLES / "digits", values)
    (module,) = built
    metric = result["metric"]
    assert metric["name"] == "accuracy"
    assert metric["float"] > 0.85
    assert metric["compressed"] > metric["float"] - 0.1
    assert metric["float"] == digits.evaluate(module)["accuracy"], "the model given is left as it was"
    assert result["bytes"] <= result["budget_bytes"]
    assert 0 < result["nmse"] < 0.2
    loaded = mlorq.load(result["checkpoint"], model=module)
    assert digits.evaluate(loaded)["accuracy"] == metric["compressed"]


def test_the_file_in_the_readme_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (code,) = [block for block in blocks if "mlorq.compress(model, list(" in block]
    assert len([line for line in code.splitlines() if line]) <= 20
    monkeypatch.chdir(tmp_path)
    found: dict = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), found)
    metrics = found["result"].metrics
    assert metrics["bytes"] <= metrics["budget_bytes"]
    assert metrics["compressed"]["accuracy"] > metrics["float"]["accuracy"] - 0.05
    assert metrics["float"]["accuracy"] > 0.75
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert capsys.readouterr().out.startswith("{'accuracy'")
