"""Target ``compressed-tensors``: transformers' own dequantization gives the checkpoint's numbers."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import mlorq
from mlorq.errors import CheckpointError
from mlorq.forms.modules import CompressedLinear
from tests import zoo
from tests.export_targets.models import CASES, first_output, outputs, texts
from tests.long import few


def uniform(folder: Path, bits: list[int], model: nn.Module | None = None, **options: Any) -> Path:
    """A checkpoint with codes of the given widths in all layers but the classifier, which stays float."""
    search = {**zoo.QUICK, "forms": ["Q"], "bits": bits, **options.pop("search", {})}
    result = mlorq.compress(
        zoo.text_model("bert-classifier") if model is None else model,
        [texts()],
        **{"budget": "14bit", **options},
        preset="quick",
        search=search,
        rounding="nearest",
        exclude=["classifier"],
        forward=first_output,
        device="cpu",
    )
    result.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The checkpoint with codes of one width, which is made once."""
    return functools.cache(lambda bits: uniform(tmp_path_factory.mktemp("uniform") / "checkpoint", [bits]))


@pytest.mark.parametrize("bits", few([2, 3, 4, 6, 8], 3))
def test_transformers_dequantizes_the_checkpoint_s_weights(bits, checkpoint_of, tmp_path):
    pytest.importorskip("compressed_tensors")
    checkpoint = checkpoint_of(bits)
    mlorq.export(checkpoint, tmp_path / "out", to="compressed-tensors")
    reference, batch = mlorq.load(checkpoint), texts()
    safetensors.torch.save_file(batch, tmp_path / "batch.safetensors")
    code = f"""
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
model, report = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "out")!r}, output_loading_info=True)
assert not any(report.values()), report
logits = model(**load_file({str(tmp_path / "batch.safetensors")!r})).logits.detach()
save_file(dict(model.state_dict()) | {{"logits": logits}}, {str(tmp_path / "found.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found = safetensors.torch.load_file(tmp_path / "found.safetensors")
    layers = {name: module for name, module in reference.named_modules() if isinstance(module, CompressedLinear)}
    assert len(layers) == 13
    for name, layer in layers.items():
        assert torch.equal(found[f"{name}.weight"], layer.weight), name
        assert torch.equal(found[f"{name}.bias"], layer.bias), name
    assert torch.equal(found["logits"], outputs(reference, batch)["logits"])


def test_rows_are_filled_up_to_words_and_the_file_says_so(checkpoint_of, tmp_path):
    mlorq.export(checkpoint_of(3), tmp_path / "out", to="compressed-tensors")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense"  # 48 inputs, 32 outputs
    assert tensors[f"{name}.weight_packed"].shape == (32, 5)  # ⌈48 · 3 / 32⌉
    assert tensors[f"{name}.weight_zero_point"].shape == (3, 1)
    assert tensors[f"{name}.weight_shape"].tolist() == [32, 48]
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["classifier"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "With compressed-tensors installed" in card
    assert "import mlorq" not in card


def test_models_that_the_format_cannot_hold_are_refused(tmp_path):
    mixed = uniform(tmp_path / "mixed", [2, 4, 8], budget="4.5bit")
    with pytest.raises(CheckpointError, match=r"layers have [248] and [248]"):
        mlorq.export(mixed, tmp_path / "out", to="compressed-tensors")
    wide = uniform(tmp_path / "wide", [4], search={"zero_point": "int16"})
    with pytest.raises(CheckpointError, match="zero-points outside its codes"):
        mlorq.export(wide, tmp_path / "out", to="compressed-tensors")
    low_rank = uniform(tmp_path / "low-rank", [8], search={"forms": ["Q", "LR"]}, budget="5bit")
    with pytest.raises(CheckpointError, match="has the form LR"):
        mlorq.export(low_rank, tmp_path / "out", to="compressed-tensors")
    activations = CASES["quantized activations, repq"].compressed(tmp_path / "activations")
    with pytest.raises(CheckpointError, match="activations are quantized"):
        mlorq.export(activations, tmp_path / "out", to="compressed-tensors")
    tables = uniform(tmp_path / "tables", [4], embeddings={"bits": 4, "smallest": 100})
    with pytest.raises(CheckpointError, match="is of kind embedding"):
        mlorq.export(tables, tmp_path / "out", to="compressed-tensors")
    assert not (tmp_path / "out").exists()
