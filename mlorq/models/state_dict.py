"""Named tensors of weight files, and how they are put into a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError

NESTED = ("state_dict", "model", "model_ema")  # where training scripts put the weights


def load_weights(module: nn.Module, uri: str) -> None:
    """Load a safetensors or PyTorch state dict strictly.

    Raises:
        ModelError: the file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    fill_weights(module, read_state_dict(uri), uri)


def fill_weights(module: nn.Module, state: Mapping[str, Tensor], uri: str) -> None:
    """Put named tensors into a module, strictly; ``uri`` is what errors call them.

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
                f"the model wants {tuple(tensor.shape)}"
            )
    for name in state:
        if name not in wanted:
            raise ModelError(f"checkpoint {uri} has a tensor {name!r} that the model does not know")
    module.load_state_dict(state)


def read_state_dict(uri: str) -> dict[str, Tensor]:
    """Named tensors of a file at any fsspec URI; training wrappers (nesting, ``module.``) are taken off.

    Raises:
        ModelError: the file is missing, damaged, or holds no tensors.
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
        raise ModelError(f"checkpoint {uri} cannot be read: {_one_line(error)}") from error
    except Exception as error:  # torch reports a refused pickle by a type of its own
        raise ModelError(f"checkpoint {uri} is no plain state dict: {_one_line(error)}") from error
    for key in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(f"checkpoint {uri} holds no state dict of tensors")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
