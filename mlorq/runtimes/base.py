"""The interface and registry of runtimes, and ``load``, which loads a checkpoint into one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, overload

from pydantic import ValidationError

from mlorq.errors import ConfigError, no_secrets
from mlorq.export_targets.base import require
from mlorq.registry import Registry, Settings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from mlorq.codecs.base import Residency
    from mlorq.export_targets.onnx_graph.session import OnnxModel
    from mlorq.export_targets.openvino_graph.session import OpenvinoModel
    from mlorq.runtimes.benchmark import Variant

Config = TypeVar("Config", bound=Settings)
Location = str | os.PathLike[str]
Device: TypeAlias = "torch.device | str"


class Runtime(ABC, Generic[Config]):
    """Software that computes with a compressed model.

    Attributes:
        name: its name, the value of ``runtime``.
        settings: class of its options.
        packages: import names of the packages that it needs.
        extra: the extra of mlorq that installs them; None: they have to be named.
        as_target: class of the options that determine how it holds weights, for a configuration's ``target``; None: it
            cannot be a target.
        integer_bits: least bits in which it holds affine codes of layers whose inputs have static ranges.
    """

    name: str
    settings: type[Config]
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str | None] = None
    as_target: ClassVar[type[Settings] | None] = None
    integer_bits: ClassVar[int] = 0

    @abstractmethod
    def load(self, location: str, model: nn.Module | None, device: Device, settings: Config) -> Any:
        """A callable with the call and the outputs of the torch module.

        Args:
            location: folder or fsspec URL of a compressed model, or a file that the runtime reads.
            model: a float instance of the architecture, if it is user code.
            device: device of the model.
            settings: options.

        Raises:
            ConfigError: the runtime does not run on the device, or the options do not fit the file.
            CheckpointError: the checkpoint is missing or damaged, or the runtime cannot hold it.
        """

    def check_packages(self) -> None:
        """Check that the runtime's packages are installed.

        Raises:
            ConfigError: one is missing.
        """
        require(f"runtime {self.name}", self.packages, self.extra)

    def residency(self, settings: Settings) -> Residency:
        """How it holds the weights of linear layers; convolutions are float32 in all runtimes.

        Args:
            settings: of class ``as_target``.

        Raises:
            ConfigError: it cannot be a target.
        """
        raise ConfigError(f"runtime {self.name} cannot be a target: its class has no method residency")

    def variants(self, checkpoint: str, folder: str) -> list[Variant]:
        """What ``mlorq benchmark`` measures: the float model first, then the ways of running the compressed one.

        Args:
            checkpoint: folder of a compressed model.
            folder: existing folder for exported files.

        Raises:
            CheckpointError: the checkpoint is missing or damaged, or the runtime cannot hold it.
            ConfigError: the runtime does not say how it is measured.
        """
        raise ConfigError(f"runtime {self.name} cannot be benchmarked: its class has no method variants")


RUNTIMES: Registry[Runtime[Any]] = Registry("runtime")


@overload
def load(
    location: Location,
    model: nn.Module | None = None,
    device: Device = "cpu",
    *,
    runtime: Literal["torch"] = "torch",
    **options: Any,
) -> nn.Module: ...
@overload
def load(
    location: Location,
    model: nn.Module | None = None,
    device: Device = "cpu",
    *,
    runtime: Literal["onnxruntime"],
    **options: Any,
) -> OnnxModel: ...
@overload
def load(
    location: Location,
    model: nn.Module | None = None,
    device: Device = "cpu",
    *,
    runtime: Literal["openvino"],
    **options: Any,
) -> OpenvinoModel: ...
@overload
def load(
    location: Location, model: nn.Module | None = None, device: Device = "cpu", *, runtime: str, **options: Any
) -> Any: ...
@no_secrets()
def load(
    location: Location,
    model: nn.Module | None = None,
    device: Device = "cpu",
    *,
    runtime: str = "torch",
    **options: Any,
) -> Any:
    """The compressed model of a checkpoint, in eval mode.

    Args:
        location: folder or fsspec URL; for ``onnxruntime`` and ``openvino`` also an exported file.
        model: a float instance of the architecture, which is not changed; required if the architecture is user code.
        device: device of the model; ``onnxruntime`` and ``openvino`` compute on the CPU.
        runtime: ``torch`` (an ``nn.Module``, whose outputs are bitwise those of the saved module), ``onnxruntime`` or
            ``openvino`` (callables with the same call and the same outputs).
        options: options of the runtime.

            ``torch``: ``weights`` (``dense``, the default: float matrices, decoded once, for memory and time of the
            float model; ``packed``: codes alone, decoded in every call, for the least memory and many times the time
            of a small batch; ``both``, for a model that is to be saved again).

            ``onnxruntime`` and ``openvino``: ``precision`` (``exact``: equal up to the rounding of sums; ``fast``:
            products by 8-bit integers, which add the NMSE in the attribute ``nmse_added``), ``example`` (a batch, for
            user code), ``threads``.

    Raises:
        ConfigError: the runtime or an option is unknown, or a package is missing.
        CheckpointError: the checkpoint is missing or damaged, or does not fit the model.
    """
    found = RUNTIMES[runtime]
    found.check_packages()
    try:
        settings = found.settings.model_validate(options)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        known = ", ".join(sorted(found.settings.model_fields)) or "none"
        raise ConfigError(f"runtime {found.name}: option {name!r}: {problem['msg']}; known: {known}") from None
    return found.load(os.fspath(location), model, device, settings)
