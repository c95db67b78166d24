"""Reading of state dicts from weight files, and strict loading into a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError, one_line

NESTED = ("state_dict", "model", "model_ema")  # keys under which training scripts store the weights


def load_weights(module: nn.Module, uri: str) -> None:
    """Load a safetensors or PyTorch state dict into a module, strictly.

    Args:
        module: the module to fill.
        uri: fsspec URI of the file.

    Raises:
        ModelError: the file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    fill_weights(module, read_state_dict(uri), uri)


def fill_weights(module: nn.Module, state: Mapping[str, Tensor], uri: str) -> None:
    """Copy named tensors into a module, strictly.

    Args:
        module: the module to fill.
        state: the tensors.
        uri: their source, for messages.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    for name, tensor in wanted.items():
        if name not in state:
            raise ModelError(f"checkpoint {uri} has no tensor {name!r}")
        if state[name].shape != tensor.shape:
            raise ModelError(
                f"checkpoint {uri}: tensor {name!r} has shape {tuple(state[name].shape)}, "
                f"but the model needs {tuple(tensor.shape)}"
            )
    for name in state:
        if name not in wanted:
            raise ModelError(f"checkpoint {uri} has an unexpected tensor {name!r}")
    module.load_state_dict(state)


def read_state_dict(uri: str) -> dict[str, Tensor]:
    """The tensors of a file at an fsspec URI, by name, without wrappers of training (nesting, prefix ``module.``).

    Raises:
        ModelError: the file is missing or damaged, or does not contain a state dict.
    """
    content: Any
    try:
        with fsspec.open(uri, "rb") as file:
            if uri.endswith(".safetensors"):
                content = safetensors.torch.load(file.read())
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ModelError(f"checkpoint {uri} does not exist") from None
    except (OSError, ValueError, ImportError, RuntimeError, EOFError, safetensors.SafetensorError) as error:
        raise ModelError(f"checkpoint {uri} cannot be read: {one_line(error)}") from error
    except Exception as error:  # torch refuses a pickle with its own exception type
        raise ModelError(f"checkpoint {uri} is not a plain state dict: {one_line(error)}") from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"checkpoint {uri} does not contain a state dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
