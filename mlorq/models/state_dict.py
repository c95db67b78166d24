"""Reading of state dicts from weight files, and strict loading into a module."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlorq.errors import ModelError, hide_secrets, one_line

# Keys under which training scripts store the weights; of the trained weights and their average, the former are read.
NESTED = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "module", "weights")
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_state_dict_ema", "ema")
COUNTER = "n_averaged"  # beside the tensors in torch's AveragedModel
MARKS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile, at any depth


def load_weights(module: nn.Module, uri: str) -> None:
    """Load a safetensors or PyTorch state dict into a module, strictly.

    Args:
        module: the module to fill.
        uri: fsspec URI of the file.

    Raises:
        ModelError: the file is missing or damaged, or a tensor is missing, unexpected or of another shape.
    """
    fill_weights(module, without_prefix(read_state_dict(uri), module.state_dict()), uri)


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


def without_prefix(state: Mapping[str, Tensor], wanted: Collection[str]) -> Mapping[str, Tensor]:
    """The tensors without a first part that all their names have in common, if the wanted names do not have it.

    Lightning stores a model under the attribute that holds it, for example as ``model.``.
    """
    while state and not any(name in wanted for name in state):
        prefix = next(iter(state)).partition(".")[0] + "."
        if not all(name.startswith(prefix) for name in state):
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def read_state_dict(uri: str) -> dict[str, Tensor]:
    """The tensors of a file at an fsspec URI, by name, without wrappers of training (``NESTED``, ``MARKS``).

    Nothing but tensors and plain values is unpickled.

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
    except (OSError, ValueError, ImportError, EOFError, safetensors.SafetensorError) as error:
        raise ModelError(f"checkpoint {uri} cannot be read: {one_line(error)}") from error
    except Exception as error:  # torch refuses a pickle with its own exception type
        raise ModelError(f"checkpoint {uri} {_reason(error)}") from error
    content = _unwrapped(content, uri)
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        known = f"; it has {', '.join(map(str, content))}"[:200] if isinstance(content, Mapping) and content else ""
        raise ModelError(f"checkpoint {uri} does not contain a state dict of tensors{known}")
    found: dict[str, Tensor] = {}
    for name, tensor in content.items():
        short = _unmarked(str(name))
        if short in found:
            raise ModelError(f"checkpoint {uri} has two tensors {short!r}, with and without {' or '.join(MARKS)}")
        found[short] = tensor
    return found


def _unwrapped(content: Any, uri: str) -> Any:
    """The mapping of tensors inside the mappings of training scripts."""
    while isinstance(content, Mapping):
        trained, averaged = (
            [key for key in keys if isinstance(content.get(key), Mapping) and content[key]]
            for keys in (NESTED, AVERAGED)
        )
        if not trained and not averaged:
            break
        used = (trained or averaged)[0]
        if others := [key for key in (*trained, *averaged) if key != used]:
            unread = ", ".join(map(repr, others))
            warnings.warn(
                f"checkpoint {hide_secrets(uri)}: weights under {used!r} are read, not those under {unread}",
                stacklevel=4,
            )
        content = content[used]
    if isinstance(content, Mapping) and len(content) > 1:
        content = {name: value for name, value in content.items() if name != COUNTER}
    return content


def _unmarked(name: str) -> str:
    while name.startswith(MARKS):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")


def _reason(error: Exception) -> str:
    """Why torch refuses a file, without its advice to unpickle whatever is in it."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    refused = re.search(r"GLOBAL (\S+)", text) or re.search(r"(?:but got|unrecognized function) (<.+?>)", text)
    if refused is not None:
        return (
            f"has an object of {refused[1]}, which is not unpickled: store the tensors alone, as "
            "torch.save(model.state_dict(), …) does"
        )
    if "TorchScript" in text:
        return "is a TorchScript archive: store the state dict of its module"
    cause = text.rpartition("WeightsUnpickler error:")[2]
    for advice in ("In PyTorch 2.6", "Check the documentation", "Please ", "Re-running"):
        cause = cause.partition(advice)[0]
    return f"cannot be read: {' '.join(cause.split())[:300] or type(error).__name__}"
