"""Model families as records: one from outside, and what each of ours says of its inputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import mlorq
from flows.cli import main
from flows.runners.container_setup import binds_of
from flows.template import template
from mlorq.artifacts.store import json_bytes
from mlorq.config.run import RunConfig
from mlorq.config.sections import model_section
from mlorq.data import load_dataset
from mlorq.data.base import classes_of
from mlorq.errors import CheckpointError, ConfigError, DataError
from mlorq.models import FAMILIES, FloatModel, ModelFamily, from_module, load_model, rebuild
from mlorq.models.batches import batch_samples
from mlorq.models.family import Example
from mlorq.registry import Settings
from tests import detectors, zoo
from tests.nets import TokenNet


class Chain(nn.Sequential):
    """Layers of one width."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__(*(nn.Linear(width, width) for _ in range(layers)))


class ChainSettings(Settings):
    """A chain of layers."""

    layers: int = Field(2, ge=1, description="how many layers there are")
    weights: str | None = Field(None, description="file of the weights")

    def check(self) -> None:
        """Raise ValueError for a chain that is too long."""
        if self.layers > 8:
            raise ValueError("layers: a chain has at most 8")


class Chains(ModelFamily[ChainSettings]):
    """The toy family."""

    name = "chain"
    settings = ChainSettings
    rebuilds = True

    def load(self, settings: ChainSettings, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        torch.manual_seed(0)
        module = Chain(settings.layers, 4).to(getattr(torch, dtype))
        return FloatModel(module, self.name, self.describe(module) or {}, dtype=getattr(torch, dtype))

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        return Chain(architecture["layers"], architecture["width"])

    def describe(self, module: nn.Module) -> dict[str, Any] | None:
        if not isinstance(module, Chain):
            return None
        return {"family": self.name, "layers": len(module), "width": module[0].in_features}

    def classes(self, model: FloatModel) -> int:
        return int(model.module[-1].out_features)

    def display_name(self, settings: ChainSettings) -> str:
        return f"chain{settings.layers}"

    def example(self) -> Example:
        source = {"source": "custom", "factory": "chains:batches"}
        return Example({"layers": 3}, {"calibration": source, "evaluation": source}, "LAYERS", "layers")

    def _made_input(self, architecture: Mapping[str, Any], samples: int) -> Tensor:
        return torch.ones(samples, architecture["width"])

    def locations(self, settings: ChainSettings) -> list[str]:
        return [settings.weights] if settings.weights else []


def chain_config(**model: Any) -> RunConfig:
    source = {"source": "custom", "factory": "chains:batches"}
    data = {"calibration": source, "evaluation": source}
    return RunConfig.from_mapping({"model": {"family": "chain", **model}, "data": data})


def test_a_family_from_outside_is_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match="'chain'"):
        chain_config()
    with FAMILIES.added(Chains()):
        config = chain_config(layers=3)
        assert config.model.own == ChainSettings(layers=3)
        assert config.model.display_name == "chain3"
        assert RunConfig.from_mapping(config.model_dump(exclude={"folder"})).model == config.model
        for values, words in (
            ({"layers": 0}, "model.layers"),
            ({"layers": 9}, "model: layers: a chain has at most 8"),
            ({"layerz": 2}, "did you mean 'layers'"),
            ({"rotation": 1}, "does not support rotation"),
        ):
            with pytest.raises(ConfigError, match=words):
                chain_config(**values)
    assert "layers" not in model_section().model_fields


def test_a_family_from_outside_is_in_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    with FAMILIES.added(Chains()):
        assert main(["init", str(path), "--model", "chain:5"]) == 0
        config = RunConfig.from_yaml(path)
        assert (config.model.family, config.model.own) == ("chain", ChainSettings(layers=5))
        assert "# weights: null" in path.read_text()
        assert main(["init", "--help"]) == 0
        assert "chain:LAYERS" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match="the family is one of"):
        template("chain")


def test_a_family_from_outside_loads_describes_and_rebuilds(tmp_path: Path) -> None:
    x = torch.randn(8, 16)
    with FAMILIES.added(Chains()):
        model = load_model(chain_config(layers=3, dtype="bfloat16").model)
        assert (model.family, model.rebuilds, classes_of(model)) == ("chain", True, 4)
        assert model.dtype == torch.bfloat16
        # An instance in memory is described as one of the family, and its checkpoint loads by itself.
        given = from_module(Chain(2, 16))
        assert given.architecture == {"family": "chain", "layers": 2, "width": 16}
        search = {"hessian_probes": 4, "hessian_min_probes": 2, "factor_bits": []}
        result = mlorq.compress(given.module, [x], budget="6bit", rounding="nearest", search=search, device="cpu")
        result.save(str(tmp_path / "out"))
        loaded = mlorq.load(str(tmp_path / "out"))
        with torch.no_grad():
            assert torch.equal(loaded(x), result.model(x))
        # Other families' modules are not its own.
        assert from_module(TokenNet()).family == "custom"
    with pytest.raises(CheckpointError, match="'chain' is not installed"):
        mlorq.load(str(tmp_path / "out"))


def test_data_of_other_kinds_of_inputs_is_refused(tmp_path: Path) -> None:
    with FAMILIES.added(Chains()):
        config = chain_config()
        model = load_model(config.model)
        for source, wanted in (
            ({"source": "image_folder", "root": "."}, "family timm, or family transformers with task image-class"),
            ({"source": "table", "path": "t.tsv", "text": [0]}, "family transformers with task text-classification"),
            ({"source": "coco", "root": ".", "annotations": "a.json"}, "or family detection"),
        ):
            data = {"calibration": source, "evaluation": source}
            asked = RunConfig.from_mapping({"model": {"family": "chain"}, "data": data})
            with pytest.raises(DataError, match=wanted):
                load_dataset(asked.data.calibration, "calibration", model, asked.model, str(tmp_path), 0)


def test_files_of_a_family_from_outside_are_mounted(tmp_path: Path) -> None:
    weights = tmp_path / "elsewhere" / "w.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"w")
    with FAMILIES.added(Chains()):
        config = chain_config(weights=str(weights)).model_copy(
            update={"store": str(tmp_path / "store"), "folder": str(tmp_path / "here")}
        )
        assert str(weights) in [bind.target for bind in binds_of(config, None, {})]


def test_models_that_cannot_rebuild_themselves_ask_for_an_instance(tmp_path: Path) -> None:
    model = from_module(TokenNet())
    assert not model.rebuilds
    with pytest.raises(CheckpointError, match="pass model=instance"):
        rebuild(model.architecture)


# -- inputs -----------------------------------------------------------------------------------------------------


def text_model(kind: str, folder: Path) -> FloatModel:
    zoo.save_text_model(folder, kind)
    task = "text-classification" if kind.endswith("classifier") else "sentence-similarity"
    return load_model(model_section()(family="transformers", name=str(folder), task=task))


def detector_model(task: str, folder: Path) -> FloatModel:
    detectors.save_transformers_detector(folder, task)
    return load_model(model_section()(family="transformers", name=str(folder), task=task))


def mask_rcnn_model(_: str, folder: Path) -> FloatModel:
    import safetensors.torch

    safetensors.torch.save_file(detectors.mask_rcnn().state_dict(), folder / "w.safetensors")
    values = {"name": detectors.NAME, "arguments": detectors.ARGUMENTS, "checkpoint": str(folder / "w.safetensors")}
    return load_model(model_section()(family="detection", **values))


def vit_model(_: str, folder: Path) -> FloatModel:
    return from_module(zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS))


@pytest.mark.parametrize(
    ("make", "which", "kind"),
    [
        (vit_model, "", "image"),
        (text_model, "bert", "text"),
        (text_model, "mpnet", "text"),
        (text_model, "bert-classifier", "text"),
        (text_model, "distilbert-classifier", "text"),
        (text_model, "roberta-classifier", "text"),
        (detector_model, "object-detection", "image"),
        (detector_model, "instance-segmentation", "image"),
        (mask_rcnn_model, "", "image"),
    ],
)
def test_example_inputs_are_what_the_model_takes(make: Any, which: str, kind: str, tmp_path: Path) -> None:
    model = make(which, tmp_path)
    family = FAMILIES[model.family]
    batch = family.example_input(model.architecture, samples=2)
    assert batch_samples(batch) == 2
    with torch.no_grad():
        outputs = model.outputs(model.module, batch)
    assert outputs.shape[0] == 2
    assert outputs.isfinite().all()
    described = family.preprocess(model.architecture)
    assert described is not None
    assert described["kind"] == kind
    assert json_bytes(described)
    if isinstance(batch, Mapping):
        assert sorted(described["inputs"]) == sorted(batch)
    one = family.example_input(model.architecture, batch, samples=1)
    assert batch_samples(one) == 1


def test_example_inputs_of_code_of_ones_own_are_taken_from_a_batch() -> None:
    architecture = from_module(TokenNet()).architecture
    family = FAMILIES[architecture["family"]]
    assert family.example_input(architecture) is None
    assert family.preprocess(architecture) is None
    batch = torch.randn(4, 3)
    assert torch.equal(family.example_input(architecture, batch, samples=2), batch[:2])


def test_padding_does_not_occur_in_example_texts(tmp_path: Path) -> None:
    model = text_model("bert", tmp_path)
    tokens = FAMILIES[model.family].example_input(model.architecture, samples=200)["input_ids"]
    config = model.architecture["config"]
    assert not (tokens == config["pad_token_id"]).any()
    assert int(tokens.max()) == config["vocab_size"] - 1


# -- the package ------------------------------------------------------------------------------------------------


def test_families_are_known_without_torch() -> None:
    code = (
        "import sys, mlorq.config.run as run, flows.cli, flows.template; from mlorq.models import FAMILIES;"
        "run.run_config(); flows.template.template(); [family.example() for family in FAMILIES];"
        "print(sorted({'torch', 'timm', 'transformers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
