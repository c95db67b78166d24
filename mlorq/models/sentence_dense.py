"""Dense layers behind a sentence encoder's pooling: ``y = σ(W x + b)``, with or without a residual."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError
from mlorq.models.sentence_files import find_file, read_json

ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}
INPUT = "sentence_embedding"  # what the pooling wrote; the library's Dense can also act on single tokens
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class DenseSettings:
    """One dense layer, as its ``config.json`` describes it.

    Attributes:
        in_features: width of its input.
        out_features: width of its output.
        bias: whether it has one.
        activation: σ, one of ``ACTIVATIONS``.
        residual: whether the input is added to the output, projected where the widths differ.
    """

    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "Tanh"
    residual: bool = False

    def described(self) -> dict[str, Any]:
        """Of an architecture."""
        return asdict(self)


class Dense(nn.Module):
    """The layer; names of its tensors are those of the library's files."""

    def __init__(self, settings: DenseSettings) -> None:
        super().__init__()
        self.linear = nn.Linear(settings.in_features, settings.out_features, bias=settings.bias)
        self.activation = ACTIVATIONS[settings.activation]()
        self.added = settings.residual
        if settings.residual and settings.in_features != settings.out_features:
            self.residual = nn.Linear(settings.in_features, settings.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(samples, in_features)`` to ``(samples, out_features)``."""
        found: Tensor = self.activation(self.linear(x))
        if not self.added:
            return found
        return found + (self.residual(x) if hasattr(self, "residual") else x)


def read_settings(location: str, folder: str, name: str) -> DenseSettings:
    """What a dense layer's folder says of it.

    Raises:
        ModelError: it says nothing, or something that is not known here.
    """
    file = f"{folder}/config.json"
    found = read_json(location, file, name)
    if not isinstance(found, Mapping):
        raise ModelError(f"model {name!r} has no {file} with the settings of its dense layer")
    for key in ("module_input_name", "module_output_name"):
        if found.get(key) not in (None, INPUT):
            raise ModelError(f"model {name!r}: {file}: {key} {found[key]!r} is not supported; known is {INPUT!r}")
    path = str(found.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = path.rpartition(".")[2]
    if not path.startswith("torch.nn.") or activation not in ACTIVATIONS:
        raise ModelError(
            f"model {name!r}: {file}: activation {path!r} is not supported; known are {', '.join(ACTIVATIONS)}"
        )
    width, out = (found.get(key) for key in ("in_features", "out_features"))
    if not (type(width) is int and type(out) is int and min(width, out) > 0):
        raise ModelError(f"model {name!r}: {file}: in_features and out_features must be positive whole numbers")
    bias, residual = bool(found.get("bias", True)), bool(found.get("use_residual", False))
    return DenseSettings(width, out, bias, activation, residual)


def load_weights(dense: Dense, location: str, folder: str, name: str) -> None:
    """Fill a layer with the weights of its folder.

    Raises:
        ModelError: there are none, they are damaged, or they are of another shape.
    """
    found = ((file, find_file(location, f"{folder}/{file}", name)) for file in WEIGHTS)
    file, path = next(((file, path) for file, path in found if path is not None), (None, None))
    if path is None:
        raise ModelError(f"model {name!r} has neither {' nor '.join(f'{folder}/{file}' for file in WEIGHTS)}")
    try:
        if file == WEIGHTS[0]:
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        dense.load_state_dict(state)
    except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"model {name!r}: {folder}/{file} does not hold its dense layer: {reason}") from error
