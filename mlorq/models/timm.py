"""The family of timm's image classifiers, with weights from the hub or from the user's checkpoint."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mlorq.artifacts.locations import resolve_location
from mlorq.errors import CheckpointError, ModelError, one_line
from mlorq.lazy import lazy_exports
from mlorq.models.family import Example, LibrarySettings, ModelFamily
from mlorq.models.family import load as load
from mlorq.models.plain import check_keys, faults, is_name
from mlorq.models.tasks import InputKind

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlorq.models.base import FloatModel

NAME = "timm"
# Arguments of the factory that say where weights are, not what the model is: they are not part of an architecture.
WEIGHTS = ("checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict")
# Arguments of timm's builders beside those of the classes that they build.
BUILDERS = frozenset(("features_only", "feature_cls", "out_indices", "bn_eps", "bn_momentum", "bn_tf", "use_naflex"))
_IMAGES = {"source": "image_folder", "root": "images/", "labels": "labels.tsv"}

__getattr__ = lazy_exports(__name__, {"load_weights": "mlorq.models.state_dict"})


class TimmSettings(LibrarySettings):
    """Settings of a timm model and its weights."""

    checkpoint: str | None = Field(None, description="fsspec URI of a safetensors or PyTorch state dict")
    pretrained: bool = Field(False, description="fetch the weights from the family's hub")
    features: bool = Field(False, description="leave the classifier out: the outputs are features of the image")

    def check(self) -> None:
        """Check that there are a name and weights.

        Raises:
            ValueError: ``name`` is missing, or both ``checkpoint`` and ``pretrained``.
        """
        self.require_name(NAME)
        if not self.pretrained and not self.checkpoint:
            raise ValueError("weights are missing: give checkpoint: URI, or pretrained: true to fetch them")

    @property
    def fetched(self) -> bool:
        """Whether the weights are fetched from the hub; ``checkpoint`` wins over ``pretrained``."""
        return self.pretrained and not self.checkpoint


class Timm(ModelFamily[TimmSettings]):
    """ViT, DeiT, Swin, and other timm models of linear layers and convolutions."""

    name = NAME
    settings = TimmSettings
    rebuilds = True
    rotates = True
    inputs: ClassVar[Mapping[InputKind, str]] = {"images": ""}

    def load(self, settings: TimmSettings, *, dtype: str = "float32", folder: str = "") -> FloatModel:
        """The timm model with its weights.

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
        if settings.features:
            module = without_classifier(module, name)
        as_dtype = getattr(torch, dtype)
        arguments = {key: value for key, value in settings.arguments.items() if key not in WEIGHTS}
        if settings.features:
            arguments["num_classes"] = 0
        try:
            check_arguments(name, arguments)
        except CheckpointError as error:
            raise ModelError(f"model.arguments: {error}") from None
        architecture = {"family": NAME, "name": name, "arguments": arguments}
        if preprocessing(settings) != preprocessing(_settings_of(architecture)):
            raise ModelError("model.arguments: pretrained_cfg changes the preprocessing, which checkpoints do not hold")
        return FloatModel(module.to(as_dtype), NAME, architecture, blocks=block_names(module), dtype=as_dtype)

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        """The module of an architecture, with weights yet to be loaded.

        Raises:
            CheckpointError: the description has other keys, or an argument that timm's classes do not have.
            ModelError: the installed version of timm does not have the model.
        """
        check_keys(architecture, {"family": str, "name": str, "arguments": dict})
        check_arguments(architecture["name"], architecture["arguments"])
        return create(architecture["name"], architecture["arguments"])

    def describe(self, module: nn.Module) -> dict[str, Any] | None:
        """See the function ``describe``."""
        return describe(module)

    def classes(self, model: FloatModel) -> int | None:
        """``num_classes`` of the module; None if it has none."""
        return getattr(model.module, "num_classes", None) or None

    def example(self) -> Example:
        """A ViT with weights from the hub."""
        return Example(
            {"name": "vit_tiny_patch16_224", "pretrained": True},
            {
                "calibration": _IMAGES | {"split": "calibration", "samples": 256},
                "evaluation": _IMAGES | {"split": "evaluation"},
            },
        )

    def features(self, settings: TimmSettings) -> bool:
        """Whether the model has no classifier."""
        return settings.features or settings.arguments.get("num_classes") == 0

    def image_inputs(self, settings: TimmSettings) -> dict[str, Any]:
        """timm's preprocessing settings of the model."""
        return preprocessing(settings)

    def preprocess(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """timm's preprocessing settings of the architecture, and the size of the resized image (``resized``)."""
        described = preprocessing(_settings_of(architecture))
        return {"kind": "image", **described, "resize": resized(described)}

    def _made_input(self, architecture: Mapping[str, Any], samples: int) -> Tensor:
        """Random normalised pixels, ``(samples, channels, height, width)``, from a fixed seed."""
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
    """The architecture of an instance, if ``timm.create_model`` builds an identical module from it; else None."""
    known = getattr(module, "pretrained_cfg", None)
    name = known.get("architecture") if isinstance(known, Mapping) else None
    if not isinstance(name, str):
        return None
    import torch

    from mlorq.models.base import same_construction

    # The arguments that recent versions of timm store in the instance may be wrong: the comparison below decides.
    stored = getattr(module, "_model_args", None)
    arguments = dict(stored) if isinstance(stored, Mapping) else {"num_classes": getattr(module, "num_classes", 1000)}
    architecture = {"family": NAME, "name": name, "arguments": arguments}
    try:
        architecture = json.loads(json.dumps(architecture))
        check_arguments(architecture["name"], architecture["arguments"])
        with torch.random.fork_rng(devices=[]):
            twin = create(architecture["name"], architecture["arguments"])
    except (CheckpointError, ModelError, TypeError, ValueError):
        return None
    return architecture if same_construction(module, twin) else None


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """Check that arguments say what a model is, and nothing else.

    Allowed are the arguments of the classes that the model's file in timm defines or uses, and those in ``BUILDERS``;
    texts among their values must be plain names. Without this, ``checkpoint_path`` would unpickle a file.

    Raises:
        CheckpointError: an argument or its value is not allowed.
        ModelError: timm has no such model.
    """
    import timm
    from torch import nn

    check_name(name)
    file = sys.modules[timm.model_entrypoint(current_name(name).split(".")[0]).__module__]
    classes = [found for found in vars(file).values() if isinstance(found, type) and issubclass(found, nn.Module)]
    known = {key for found in classes for key in inspect.signature(found.__init__).parameters}
    for key in arguments:
        if key not in (known | BUILDERS) - {"self", "kwargs", "device", "dtype", *WEIGHTS}:
            raise CheckpointError(f"timm model {name!r}: argument {key!r} is not one of its classes' arguments")
    for reason in faults(arguments):
        raise CheckpointError(f"timm model {name!r}: argument {reason}")


def check_name(name: str) -> None:
    """Check that timm has a model of this name.

    Raises:
        ModelError: it does not, or the name is an address; the message suggests similar names.
    """
    import timm

    if not is_name(name) or not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ModelError(f"timm has no model {name!r}{hint}")


def preprocessing(settings: TimmSettings) -> dict[str, Any]:
    """timm's preprocessing settings of a model: input size, interpolation, mean, std, crop."""
    import timm.data

    assert settings.name is not None  # see check
    library: Any = timm.data
    cfg = _published(settings.name, settings.arguments)
    wanted = dict(settings.arguments)
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    channels = wanted.pop("in_chans", None) or channels
    size = wanted.pop("img_size", None) or (height, width)
    # An integer or a pair: timm's ``resolve_data_config`` accepts only an integer.
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    wanted["input_size"] = (channels, height, width)
    if channels != len(cfg.get("mean") or (0, 0, 0)):
        for name in ("mean", "std"):
            values = cfg.get(name) or getattr(library, f"IMAGENET_DEFAULT_{name.upper()}")
            wanted.setdefault(name, [sum(values) / len(values)] * channels)
    found = library.resolve_data_config(wanted, pretrained_cfg=cfg)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def without_classifier(module: nn.Module, name: str) -> nn.Module:
    """The model without its classifier, as with ``num_classes=0``.

    Raises:
        ModelError: timm does not say where its classifier is.
    """
    reset: Any = getattr(module, "reset_classifier", None)
    if reset is None:
        raise ModelError(f"timm model {name!r} has no classifier that can be left out: features does not apply")
    reset(0)
    return module


def current_name(name: str) -> str:
    """The name to which timm maps a deprecated one; other names, and removed ones, unchanged."""
    from timm.models import get_deprecated_models, split_model_name_tag

    current = get_deprecated_models().get(name.split(".")[0])
    if current is None:
        return name
    tag = split_model_name_tag(name)[1]
    return f"{split_model_name_tag(current)[0]}.{tag}" if tag else current


def _published(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """timm's configuration of pretrained weights (size, mean, …) that ``create`` gives the model.

    Raises:
        ModelError: timm has no such model, or no weights of that tag.
    """
    import timm.models

    library: Any = timm.models
    check_name(name)
    architecture, tag = library.split_model_name_tag(current_name(name))
    # As in timm's factory: an argument wins over the name's tag.
    given = [arguments.get("pretrained_cfg") or tag, arguments.get("pretrained_cfg_overlay")]
    try:
        found: dict[str, Any] = library.resolve_pretrained_cfg(architecture, *given).to_dict()
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"timm model {name!r}: {one_line(error)}") from error
    return found


def resized(described: Mapping[str, Any]) -> int | list[int] | None:
    """Size to which timm's evaluation transform resizes an image before it is cropped in the centre.

    Args:
        described: the result of ``preprocessing``.

    Returns:
        Length of the shorter side, the aspect ratio is kept; ``[height, width]``, it is not; None for what one number
        does not say (a frame around the image, or an input that is not square).
    """
    height, width = (math.floor(side / described["crop_pct"]) for side in described["input_size"][1:])
    mode = described.get("crop_mode")
    if mode == "squash":
        return [height, width]
    return height if mode != "border" and height == width else None


def block_names(module: nn.Module) -> list[str]:
    """Names of the blocks of ViT and DeiT (``blocks.i``); empty for other models, see ``mlorq.models.blocks``."""
    from torch import nn

    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Sequential):
        return [f"blocks.{name}" for name, _ in blocks.named_children()]
    return []


def create(name: str, arguments: Mapping[str, Any], *, pretrained: bool = False) -> nn.Module:
    """A timm model.

    Args:
        name: name of the model in timm.
        arguments: keyword arguments of its constructor.
        pretrained: whether to fetch its weights from the hub.

    Raises:
        ModelError: the name or an argument is unknown, or the pretrained weights cannot be fetched.
    """
    import timm
    from torch import nn

    check_name(name)
    try:
        # Keeps the hub's progress bars off standard output.
        with contextlib.redirect_stdout(sys.stderr):
            module = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError, LookupError) as error:  # raised by timm's constructors for invalid arguments
        raise ModelError(f"timm model {name!r}: {one_line(error)}") from error
    except (OSError, RuntimeError, ValueError) as error:
        problem = "its pretrained weights cannot be fetched" if pretrained else "it cannot be built"
        raise ModelError(f"timm model {name!r}: {problem}: {one_line(error)}") from error
    assert isinstance(module, nn.Module)
    return module
