"""A tiny model of each kind of layer: compressed, stored, loaded, and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import mlorq
from mlorq.checkpoint.io import inspect
from mlorq.forms.base import Candidate
from mlorq.forms.modules import replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.models import from_module
from mlorq.models.kinds import BY_NAME, KINDS, known_kind
from mlorq.models.layers import find_layers
from tests.compressed import affine, folder_of
from tests.layers import matrices_of
from tests.long import few
from tests.zoo import QUICK

LAYERS: dict[str, Any] = {
    "conv1d": lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1),
    "conv1d same": lambda: nn.Conv1d(4, 8, 4, padding="same", dilation=2, padding_mode="circular"),
    "conv1d groups": lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 4, padding=2, groups=2), dim=2),
    "conv2d": lambda: nn.Conv2d(4, 8, 3, padding=1),
    "conv3d": lambda: nn.Conv3d(4, 8, (2, 3, 3), stride=(2, 3, 3)),
    "conv3d general": lambda: nn.Conv3d(4, 8, (2, 3, 2), (1, 2, 1), (1, 0, 1), (2, 1, 1), groups=2),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(4, 8, 4, stride=2, padding=1),
    "conv_transpose1d more": lambda: nn.ConvTranspose1d(4, 8, 3, stride=3, output_padding=1, dilation=2),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(4, 8, 2, stride=2),
    "conv_transpose2d more": lambda: nn.ConvTranspose2d(4, 8, (3, 2), (2, 1), (1, 0), (1, 0), dilation=(1, 2)),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(4, 8, (1, 2, 2), stride=(1, 2, 2)),
}


def kind_of(name: str) -> str:
    return name.partition(" ")[0]


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = LAYERS[name](), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x)).flatten(2).mean(2))


def inputs(name: str, samples: int = 16) -> Tensor:
    axes = BY_NAME[kind_of(name)].axes
    return torch.randn(samples, 4, *(8, 6, 6)[:axes], generator=torch.Generator().manual_seed(1))


def compress(name: str, **options: Any) -> Any:
    given = {"budget": "8bit", "preset": "quick", "rounding": "nearest", "search": QUICK, "device": "cpu"}
    return mlorq.compress(Net(name).eval(), [inputs(name)], **(given | options))


def test_every_kind_of_convolution_is_here():
    assert {kind_of(name) for name in LAYERS} == {kind.name for kind in KINDS if kind.axes}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_layers_of_the_kind_are_found(name: str) -> None:
    module, x = Net(name).eval(), inputs(name)
    with torch.no_grad():
        outputs = module.layer(x)
    found = find_layers(from_module(module), x)["layer"]
    kind, weight = BY_NAME[kind_of(name)], module.layer.weight
    assert found.kind == kind.name
    assert (found.out_features, found.in_features) == kind.matrix_shape(weight.shape)
    used = x if kind.is_transposed else outputs  # whose positions are multiplied, each by all weights of its channel
    assert found.macs == used[0].numel() * weight[0].numel()
    assert found.groups == getattr(module.layer, "groups", 1)


@pytest.mark.parametrize("name", few(sorted(LAYERS), "conv1d groups", "conv3d", "conv_transpose2d more"))
def test_a_checkpoint_of_the_kind_loads_and_has_its_dense_state(name: str, tmp_path: Path) -> None:
    x, result = inputs(name), compress(name)
    assert not result.left_float
    assert set(result.allocation["layer"].to_pylist()) == {"layer", "head"}
    wanted, found = Net(name).eval()(x).detach(), result.model(x)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
    folder = str(tmp_path / "model")
    result.save(folder)
    assert {row["layer"]: row["kind"] for row in inspect(folder)["layers"]}["layer"] == kind_of(name)
    weights: Any
    for weights in ("dense", "packed"):
        assert torch.equal(mlorq.load(folder, model=Net(name), weights=weights)(x), found)

    mlorq.export(folder, str(tmp_path / "dense.safetensors"), "dense")
    plain = from_module(Net(name).eval()).module  # weights that a layer computes are plain tensors
    plain.load_state_dict(load_file(tmp_path / "dense.safetensors"))
    assert torch.allclose(plain(x), found, atol=1e-6)


@pytest.mark.parametrize("name", few(sorted(LAYERS), "conv_transpose1d more"))
def test_a_graph_of_the_kind_has_the_models_outputs(name: str, tmp_path: Path) -> None:
    """With random codes of a form with factors, where the layer can take it."""
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    module, x = from_module(Net(name).eval()).module, inputs(name)
    grouped = getattr(module.layer, "groups", 1) != 1
    candidate = Candidate("Q", bits=4) if grouped else Candidate("QLR", 3, 4, 4, 2)
    replace_layers(module, {"layer": random_compressed(module.layer, candidate, 1)})
    folder = folder_of(tmp_path / "out", module, {"family": "custom"})
    (file,) = mlorq.export(folder, tmp_path / "model.onnx", model=Net(name).eval(), example=x[:3])
    found, wanted = mlorq.load(file, runtime="onnxruntime")(x[:5]), module(x[:5])
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def random_compressed(layer: nn.Module, candidate: Candidate, seed: int) -> CompressedLayer:
    rows, columns = known_kind(layer).matrix_shape(layer.weight.shape)
    sizes = matrices_of(candidate, rows, columns)
    return CompressedLayer(
        "layer", candidate, {name: affine(*size, seed + index) for index, (name, size) in enumerate(sizes.items())}
    )


SMALL: dict[str, Any] = {"samples": 8, "hessian_samples": 8}


TRAINED = [
    ("conv1d", "block"),
    ("conv_transpose2d more", "block"),
    ("conv3d", "closed_form"),
    ("conv_transpose1d", "brecq"),
    ("conv_transpose1d more", "gptq"),
]


@pytest.mark.parametrize("case", few(TRAINED, ("conv_transpose2d more", "block")))
def test_training_and_quantized_activations_of_the_kind(case: tuple[str, str]) -> None:
    name, method = case
    x, preset = inputs(name, 24), "best" if method in ("block", "closed_form") else "quick"
    result = mlorq.compress(
        Net(name).eval(),
        [x[:8], x[8:]],
        budget="8bit",
        preset=preset,
        rounding=method,
        rounding_iterations=10 if method in ("block", "brecq") else None,
        search={**SMALL, "forms": ["Q"]},
        activations={"bits": 8},
        device="cpu",
    )
    wanted = Net(name).eval()(x).detach()
    assert (result.model(x) - wanted).norm() < 0.05 * wanted.norm()
