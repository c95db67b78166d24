"""Image classifiers of timm: by name, with weights from the hub or from a checkpoint of one's own."""

from __future__ import annotations

import contextlib
import difflib
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mlorq.artifacts.locations import resolve_location
from mlorq.errors import ModelError
from mlorq.lazy import lazy_exports
from mlorq.models.family import Example, InputKind, LibrarySettings, ModelFamily
from mlorq.models.family import load as load

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlorq.models.base import FloatModel

NAME = "timm"
_IMAGES = {"source": "image_folder", "root": "images/", "labels": "labels.tsv"}

__getattr__ = lazy_exports(__name__, {"load_weights": "mlorq.models.state_dict"})


class TimmSettings(LibrarySettings):
    """A model of timm and where its weights come from."""

    checkpoint: str | None = Field(None, description="fsspec URI of a safetensors or PyTorch state dict")
    pretrained: bool = Field(False, description="fetch the weights from the family's hub")

    def check(self) -> None:
        """Raise ValueError where the name or the weights are missing."""
        self.require_name(NAME)
        if not self.pretrained and not self.checkpoint:
            raise ValueError("weights are missing: give checkpoint: URI, or pretrained: true to fetch them")

    @property
    def fetched(self) -> bool:
        """Whether the weights come from the hub: a checkpoint wins over ``pretrained``."""
        return self.pretrained and not self.checkpoint


class Timm(ModelFamily[TimmSettings]):
    """ViT, DeiT, Swin, and whatever else timm builds of linear layers and convolutions."""

    name = NAME
    settings = TimmSettings
    rebuilds = True
    rotates = True
    inputs: ClassVar[Mapping[InputKind, str]] = {"images": ""}

    def load(self, settings: TimmSettings, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        """Build a timm model and load its weights.

        Raises:
            ModelError: the name is unknown, or the weights are missing or do not fit.
        """
        import torch

        from mlorq.models.base import FloatModel
        from mlorq.models.state_dict import load_weights

        name = settings.require_name(NAME)
        module = create(name, settings.arguments, pretrained=settings.fetched)
        if settings.checkpoint:
            load_weights(module, resolve_location(settings.checkpoint, folder))
        as_dtype = getattr(torch, dtype)
        architecture = {"family": NAME, "name": name, "arguments": dict(settings.arguments)}
        return FloatModel(module.to(as_dtype), NAME, architecture, blocks=block_names(module), dtype=as_dtype)

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The module of an architecture, without its weights.

        Raises:
            ModelError: this version of timm does not know it.
        """
        return create(architecture["name"], architecture["arguments"])

    def describe(self, module: nn.Module) -> dict[str, Any] | None:
        """See ``describe`` below."""
        return describe(module)

    def classes(self, model: FloatModel) -> int | None:
        """``num_classes`` of the module."""
        return getattr(model.module, "num_classes", None) or None

    def example(self) -> Example:
        """A ViT with the hub's weights."""
        return Example(
            {"name": "vit_tiny_patch16_224", "pretrained": True},
            {
                "calibration": _IMAGES | {"split": "calibration", "samples": 256},
                "evaluation": _IMAGES | {"split": "evaluation"},
            },
        )

    def image_inputs(self, settings: TimmSettings) -> dict[str, Any]:
        """timm's own preprocessing of the model."""
        return preprocessing(settings)

    def preprocess(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """timm's own preprocessing of the model."""
        return {"kind": "image", **preprocessing(_settings_of(architecture))}

    def _made_input(self, architecture: Mapping[str, Any], samples: int) -> Tensor:
        """Normalised pixels, ``(samples, channels, height, width)``."""
        import torch

        size = preprocessing(_settings_of(architecture))["input_size"]
        return torch.randn(samples, *size, generator=torch.Generator().manual_seed(0))

    def locations(self, settings: TimmSettings) -> list[str]:
        """The checkpoint."""
        return [settings.checkpoint] if settings.checkpoint else []

    def uses_hub(self, settings: TimmSettings, folder: str = "") -> bool:
        """Whether the pretrained weights are fetched."""
        return settings.fetched


def _settings_of(architecture: Mapping[str, Any]) -> TimmSettings:
    return TimmSettings(name=architecture["name"], arguments=dict(architecture["arguments"]))


def describe(module: nn.Module) -> dict[str, Any] | None:
    """The architecture of an instance, where ``timm.create_model`` gives another one just like it; else None."""
    known = getattr(module, "pretrained_cfg", None)
    name = known.get("architecture") if isinstance(known, Mapping) else None
    if not isinstance(name, str):
        return None
    import torch

    from mlorq.models.base import same_construction

    # What a recent timm notes on the instance is only a proposal: the comparison below decides.
    noted = getattr(module, "_model_args", None)
    arguments = dict(noted) if isinstance(noted, Mapping) else {"num_classes": getattr(module, "num_classes", 1000)}
    architecture = {"family": NAME, "name": name, "arguments": arguments}
    try:
        architecture = json.loads(json.dumps(architecture))
        with torch.random.fork_rng(devices=[]):
            twin = create(architecture["name"], architecture["arguments"])
    except (ModelError, TypeError, ValueError):
        return None
    return architecture if same_construction(module, twin) else None


def preprocessing(settings: TimmSettings) -> dict[str, Any]:
    """timm's own preprocessing of a model: input size, interpolation, mean, std, crop."""
    import timm.data
    from timm.models import get_pretrained_cfg

    assert settings.name is not None  # see check
    known: Any = get_pretrained_cfg(settings.name)
    library: Any = timm.data
    cfg = known.to_dict() if known else {}
    wanted = dict(settings.arguments)
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    channels = wanted.pop("in_chans", None) or channels
    size = wanted.pop("img_size", None) or (height, width)
    # One number or a pair: timm's own resolution of settings knows only the number.
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    wanted["input_size"] = (channels, height, width)
    if channels != len(cfg.get("mean") or (0, 0, 0)):
        for name in ("mean", "std"):
            values = cfg.get(name) or getattr(library, f"IMAGENET_DEFAULT_{name.upper()}")
            wanted.setdefault(name, [sum(values) / len(values)] * channels)
    found = library.resolve_data_config(wanted, pretrained_cfg=cfg)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def block_names(module: nn.Module) -> list[str]:
    """Blocks of ViT and DeiT (``blocks.i``); other models' chains are found by watching a forward pass."""
    from torch import nn

    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Sequential):
        return [f"blocks.{name}" for name, _ in blocks.named_children()]
    return []


def create(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A model of timm.

    Raises:
        ModelError: the name or an argument is unknown, or the pretrained weights cannot be fetched.
    """
    import timm
    from torch import nn

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
