"""Image classifiers of timm: by name, with weights from the hub or from a checkpoint of one's own."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Mapping
from typing import Any

import fsspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mlorq.artifacts.locations import resolve_location
from mlorq.config.run import ModelConfig
from mlorq.errors import ModelError
from mlorq.models.base import FloatModel, same_construction

NESTED = ("state_dict", "model", "model_ema")  # where training scripts put the weights


def load(config: ModelConfig, folder: str = "") -> FloatModel:
    """Build a timm model and load its weights.

    Raises:
        ModelError: the name is unknown, or the weights are missing or do not fit.
    """
    assert config.name is not None
    module = _create(config.name, config.arguments, pretrained=config.pretrained and not config.checkpoint)
    if config.checkpoint:
        load_weights(module, resolve_location(config.checkpoint, folder))
    dtype = getattr(torch, config.dtype)
    architecture = {"family": "timm", "name": config.name, "arguments": dict(config.arguments)}
    return FloatModel(module.to(dtype), "timm", architecture, blocks=block_names(module), dtype=dtype)


def describe(module: nn.Module) -> dict[str, Any] | None:
    """The architecture of an instance, where ``timm.create_model`` gives another one just like it; else None."""
    known = getattr(module, "pretrained_cfg", None)
    name = known.get("architecture") if isinstance(known, Mapping) else None
    if not isinstance(name, str):
        return None
    # What a recent timm notes on the instance is only a proposal: the comparison below decides.
    noted = getattr(module, "_model_args", None)
    arguments = dict(noted) if isinstance(noted, Mapping) else {"num_classes": getattr(module, "num_classes", 1000)}
    architecture = {"family": "timm", "name": name, "arguments": arguments}
    try:
        architecture = json.loads(json.dumps(architecture))
        with torch.random.fork_rng(devices=[]):
            twin = rebuild(architecture)
    except (ModelError, TypeError, ValueError):
        return None
    return architecture if same_construction(module, twin) else None


def rebuild(architecture: Mapping[str, Any]) -> nn.Module:
    """The module of an architecture, without its weights."""
    return _create(architecture["name"], architecture["arguments"], pretrained=False)


def preprocessing(config: ModelConfig) -> dict[str, Any]:
    """timm's own preprocessing of a model: input size, interpolation, mean, std, crop."""
    import timm.data
    from timm.models import get_pretrained_cfg

    assert config.name is not None
    known = get_pretrained_cfg(config.name)
    cfg = known.to_dict() if known else {}
    wanted = dict(config.arguments)
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    channels = wanted.pop("in_chans", None) or channels
    size = wanted.pop("img_size", None) or (height, width)
    # One number or a pair: timm's own resolution of settings knows only the number.
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    wanted["input_size"] = (channels, height, width)
    if channels != len(cfg.get("mean") or (0, 0, 0)):
        for name in ("mean", "std"):
            values = cfg.get(name) or getattr(timm.data, f"IMAGENET_DEFAULT_{name.upper()}")
            wanted.setdefault(name, [sum(values) / len(values)] * channels)
    found = timm.data.resolve_data_config(wanted, pretrained_cfg=cfg)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def block_names(module: nn.Module) -> list[str]:
    """Blocks of ViT and DeiT (``blocks.i``); other models' chains are found by watching a forward pass."""
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Sequential):
        return [f"blocks.{name}" for name, _ in blocks.named_children()]
    return []


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


def _create(name: str, arguments: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ModelError(f"timm has no model {name!r}{hint}")
    try:
        # Hub progress goes to standard output otherwise.
        with contextlib.redirect_stdout(sys.stderr):
            module = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError, LookupError) as error:  # how timm's constructors refuse arguments
        raise ModelError(f"timm model {name!r}: {_one_line(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:
        what = "its pretrained weights cannot be fetched" if pretrained else "it cannot be built"
        raise ModelError(f"timm model {name!r}: {what}: {_one_line(error)}") from error
    assert isinstance(module, nn.Module)
    return module


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
