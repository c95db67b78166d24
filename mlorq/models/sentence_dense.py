"""Dense layers after the pooling of a sentence encoder: ``y = σ(W x + b)``, with or without a residual."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError, one_line
from mlorq.models.sentence_files import find_file, read_json

ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}
INPUT = "sentence_embedding"  # output of the pooling; the library's Dense can also apply to single tokens
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class DenseSettings:
    """Settings of one dense layer.

    Attributes:
        in_features: width of the input.
        out_features: width of the output.
        bias: whether the layer has a bias.
        activation: σ, a key of ``ACTIVATIONS``.
        residual: whether the input is added to the output; it is projected if the widths differ.
    """

    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False

    def described(self) -> dict[str, Any]:
        """The settings as JSON values, for an architecture."""
        return asdict(self)


class Dense(nn.Module):
    """A dense layer whose tensors have the same names as in files of sentence-transformers."""

    def __init__(self, settings: DenseSettings) -> None:
        super().__init__()
        self.linear = nn.Linear(settings.in_features, settings.out_features, bias=settings.bias)
        self.activation = ACTIVATIONS[settings.activation]()
        self.added = settings.residual
        if settings.residual and settings.in_features != settings.out_features:
            self.residual = nn.Linear(settings.in_features, settings.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``σ(W x + b)`` with the residual; ``(samples, in_features)`` to ``(samples, out_features)``."""
        found: Tensor = self.activation(self.linear(x))
        if not self.added:
            return found
        return found + (self.residual(x) if hasattr(self, "residual") else x)


def read_settings(location: str, folder: str, name: str) -> DenseSettings:
    """The settings of a dense layer from the ``config.json`` in its folder.

    Args:
        location: folder or hub name of the encoder.
        folder: folder of the layer in it.
        name: name of the model, for messages.

    Raises:
        ModelError: the file is missing or invalid, or a setting is not supported.
    """
    file = f"{folder}/config.json"
    found = read_json(location, file, name)
    if not isinstance(found, Mapping):
        raise ModelError(f"model {name!r}: {file} with the settings of its dense layer is missing")
    for key in ("module_input_name", "module_output_name"):
        if found.get(key) not in (None, INPUT):
            raise ModelError(f"model {name!r}: {file}: {key} {found[key]!r} is not supported; supported: {INPUT!r}")
    path = str(found.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise ModelError(
            f"model {name!r}: {file}: activation {path!r} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    width, out = (found.get(key) for key in ("in_features", "out_features"))
    if not (type(width) is int and type(out) is int and min(width, out) > 0):
        raise ModelError(f"model {name!r}: {file}: in_features and out_features must be positive integers")
    bias, residual = bool(found.get("bias", True)), bool(found.get("use_residual", False))
    return DenseSettings(width, out, bias, activation, residual)


def load_weights(dense: Dense, location: str, folder: str, name: str) -> None:
    """Load the weights of a layer from its folder.

    Args:
        dense: the layer to fill.
        location: folder or hub name of the encoder.
        folder: folder of the layer in it.
        name: name of the model, for messages.

    Raises:
        ModelError: the weights are missing or damaged, or a shape differs.
    """
    found = ((file, find_file(location, f"{folder}/{file}", name)) for file in WEIGHTS)
    file, path = next(((file, path) for file, path in found if path is not None), (None, None))
    if path is None:
        wanted = " nor ".join(f"{folder}/{file}" for file in WEIGHTS)
        raise ModelError(f"model {name!r}: the weights of its dense layer are missing: there is neither {wanted}")
    try:
        if file == WEIGHTS[0]:
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        dense.load_state_dict(state)
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"model {name!r}: cannot load its dense layer from {folder}/{file}: {one_line(error)}"
        ) from error
